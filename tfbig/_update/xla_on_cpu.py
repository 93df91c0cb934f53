"""Whether XLA makes a model faster on a CPU, told from the graph of its loss.

XLA fuses what lies between matrix products, which themselves are no faster. Measured on two cores:
decoders and vision transformers of up to 128 tokens take 0.7 to 0.9 of the time up to a width of
512, and 1.09 at 1,024; convolutional networks take six times as long. Whatever is not known to be
computed in the same way is left to TensorFlow.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence

import tensorflow as tf

from tfbig import _keras, _types

__all__ = ("depending_on_values", "is_faster")

# Multiplications and additions of a forward pass for one sample. Compiling takes one to three
# seconds, which a smaller model would have to train for long to save.
_LEAST_WORK = 1e7

# Its multiplications and additions for each value that other operations compute: 120 for a decoder
# of width 256, 220 for 512, 470 for 1,024 and for the dense layers of a classifier.
_MOST_INTENSITY = 300

# The share of convolutions in it: that of the patches of a small vision transformer is 0.04.
_MOST_CONVOLUTIONS = 0.05

# Operations that XLA computes as TensorFlow does, but for rounding and random numbers of a seed.
# Not among them, though XLA has them: those in which a loop or a branch is hidden, those that XLA
# is slow at on a CPU (pooling, sorting), and those whose errors it swallows.
_OPERATIONS = frozenset(
    [
        *("Abs", "Add", "AddN", "AddV2", "All", "Any", "ArgMax", "ArgMin"),
        *("BatchMatMul", "BatchMatMulV2", "BiasAdd", "Bitcast", "BitwiseAnd", "BroadcastArgs"),
        *("BroadcastTo", "Cast", "Ceil", "ConcatV2", "Const", "Conv2D", "Cos", "Cumsum"),
        "DivNoNan",
        *("Einsum", "Elu", "Equal", "Erf", "Erfc", "Exp", "ExpandDims", "Expm1", "Fill"),
        *("Floor", "FloorDiv", "FloorMod", "GatherV2", "Greater", "GreaterEqual", "Identity"),
        *("IdentityN", "IsFinite", "IsNan", "L2Loss", "LeakyRelu", "Less", "LessEqual", "Log"),
        *("Log1p", "LogSoftmax", "LogicalAnd", "LogicalNot", "LogicalOr", "MatMul"),
        *("MatrixBandPart", "Max", "Maximum", "Mean", "Min", "Minimum", "Mul", "Neg", "NoOp"),
        *("NotEqual", "OneHot", "OnesLike", "Pack", "Pad", "PadV2", "Placeholder", "Pow"),
        *("PreventGradient", "Prod", "Range", "Rank", "ReadVariableOp", "RealDiv", "Reciprocal"),
        *("Relu", "Relu6", "Reshape", "Round", "Rsqrt", "Select", "SelectV2", "Selu", "Shape"),
        *("ShapeN", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign"),
        *("SparseSoftmaxCrossEntropyWithLogits", "Split", "SplitV", "Sqrt", "Square"),
        *("SquaredDifference", "Squeeze", "StatelessRandomGetKeyCounter"),
        *("StatelessRandomNormalV2", "StatelessRandomUniformIntV2", "StatelessRandomUniformV2"),
        *("StatelessTruncatedNormalV2", "StopGradient", "StridedSlice"),
        *("Sub", "Sum", "Tanh", "Tile", "Transpose", "Unpack", "Xlogy", "ZerosLike"),
    ]
)

# Of weights of attention, tokens: with 64 to 128 an update takes 0.73 to 0.86 of the time, with 256
# 0.95, with 512 as long, with 1,024 1.14. Of the cumulative sums in a mask, which XLA computes when
# it compiles: 2,048 take it a minute.
_MOST_IN_A_ROW = {"Softmax": 256, "Cumsum": 1024}

# Random numbers take XLA twice as long: with dropout in a decoder of width 256, an update takes
# 0.85 of the time with 64 tokens, 0.94 with 96, 1.0 with 128, 1.25 with 256.
_MOST_IN_A_ROW_WITH_RANDOM_NUMBERS = {**_MOST_IN_A_ROW, "Softmax": 96}

_RANDOM = frozenset(
    [
        *("StatelessRandomNormalV2", "StatelessRandomUniformIntV2", "StatelessRandomUniformV2"),
        "StatelessTruncatedNormalV2",
    ]
)

# Random numbers of a shape that occurs once, for each value that other operations compute. XLA
# computes those where they are used, each many times over: 225 ns a number, not 6. One dropout of
# all tokens in a decoder, 0.005 of the values, makes 1.3 of 0.77.
_MOST_RANDOM_ALONE = 0.001

# Inputs that XLA must know when it compiles, or by which TensorFlow refuses what XLA does not, by
# their positions.
_STRUCTURAL = {
    **dict.fromkeys(["Assert", "Fill", "Split", "StatelessRandomNormalV2"], (0,)),
    **dict.fromkeys(["StatelessRandomUniformIntV2", "StatelessRandomUniformV2"], (0,)),
    "StatelessTruncatedNormalV2": (0,),
    **dict.fromkeys(["BroadcastTo", "FloorDiv", "FloorMod", "OneHot"], (1,)),
    **dict.fromkeys(["Pad", "PadV2", "Reshape", "Tile", "Transpose"], (1,)),
    # Of a mask, which does not change. Of values, XLA is slow at it on a CPU.
    "Cumsum": (0, 1),
    "Slice": (1, 2),
    "SplitV": (1, 2),
    "Range": (0, 1, 2),
    "StridedSlice": (1, 2, 3),
}

# They depend on the shapes of their inputs, and not on the values.
_OF_SHAPES = frozenset(["OnesLike", "Rank", "Shape", "ShapeN", "Size", "ZerosLike"])
_INPUTS = frozenset(["Placeholder", "ReadVariableOp"])


def is_faster(operations: Sequence[tf.Operation], data: _types.Structure) -> bool:
    """Whether to have XLA compile the forward and backward pass of a micro-batch.

    Args:
        operations: of the forward pass of a micro-batch of any size, in the order of their making.
        data: structure of the tensors of a batch.
    """
    most_in_a_row = _MOST_IN_A_ROW
    if any(operation.type in _RANDOM for operation in operations):
        most_in_a_row = _MOST_IN_A_ROW_WITH_RANDOM_NUMBERS
    if not (
        operations
        and _have_one_shape(data)
        and all(_is_known(o) and not _is_too_long(o, most_in_a_row) for o in operations)
    ):
        return False
    of_values = depending_on_values(operations)
    if any(
        operation.inputs[i].op.name in of_values
        for operation in operations
        for i in _STRUCTURAL.get(operation.type, ())
    ):
        return False
    work = _keras.work.of_operations(operations)
    return (
        work.products >= _LEAST_WORK
        and work.products <= _MOST_INTENSITY * work.others
        and work.convolutions <= _MOST_CONVOLUTIONS * work.products
        and _random_numbers_alone(operations) <= _MOST_RANDOM_ALONE * work.others
    )


def _have_one_shape(data: _types.Structure) -> bool:
    """Whether all batches have the same shape, but for the number of samples."""
    leaves = tf.nest.flatten(data)
    return all(
        v is None or (isinstance(v, tf.Tensor) and v.shape.rank and v.shape[1:].is_fully_defined())
        for v in leaves
    )


def _is_known(operation: tf.Operation) -> bool:
    """Whether XLA computes an operation as TensorFlow does."""
    # Of half precision, XLA keeps more digits between operations than there are.
    is_exact = all(
        t.dtype.size >= tf.float32.size
        for t in operation.outputs
        if t.dtype.is_floating or t.dtype.is_complex
    )
    # Of an assertion, see `_STRUCTURAL`: XLA leaves it out.
    is_known = operation.type in _OPERATIONS or operation.type == "Assert"
    return is_exact and is_known


def _random_numbers_alone(operations: Iterable[tf.Operation]) -> int:
    """For one sample, the random numbers of which no others have the shape."""
    shapes = collections.Counter(
        tuple(operation.outputs[0].shape) for operation in operations if operation.type in _RANDOM
    )
    return sum(math.prod(n or 1 for n in s) for s, count in shapes.items() if count == 1)


def _is_too_long(operation: tf.Operation, most_in_a_row: dict[str, int]) -> bool:
    """Whether a sequence is so long that XLA has nothing to gain, or takes minutes to compile."""
    shape = operation.outputs[0].shape if operation.outputs else None
    most = most_in_a_row.get(operation.type)
    if most is None or shape is None or shape.rank is None:
        return most is not None
    # The softmax of a classifier has fewer dimensions than the weights of attention.
    is_attention = operation.type != "Softmax" or shape.rank >= 4
    return is_attention and any(n is None or n > most for n in shape[-2:])


def depending_on_values(operations: Iterable[tf.Operation]) -> set[str]:
    """The names of operations that depend on values, and not on constants and shapes alone.

    Args:
        operations: in the order of their making.
    """
    found: set[str] = set()
    for operation in operations:
        is_of_shape = operation.type in _OF_SHAPES
        if operation.type in _INPUTS or (
            not is_of_shape and any(t.op.name in found for t in operation.inputs)
        ):
            found.add(operation.name)
    return found
