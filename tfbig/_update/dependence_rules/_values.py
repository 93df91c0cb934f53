"""Operations that compute: entry by entry, row by row, or along axes."""

import dataclasses
from typing import Any

import numpy as np

from tfbig._update.dependence import (
    CONSTANT,
    DISTINCT,
    SPARSE_INDICES,
    Coupled,
    Dependence,
    Mixed,
    Samples,
    Sizes,
    Total,
)
from tfbig._update.dependence_rules._rules import (
    Rules,
    as_sizes,
    axis_of,
    broadcast,
    growing_sizes,
    rank_of,
    static_integers,
    without_axes,
)

__all__ = ("RULES",)

RULES = Rules()

# The result has the shape of all inputs, broadcast, and each entry depends on theirs alone.
_ELEMENTWISE = """
Abs Acos Acosh Add AddN AddV2 AsString Asin Asinh Atan Atan2 Atanh Bitcast BitwiseAnd BitwiseOr
BitwiseXor Bucketize Cast Ceil CheckNumerics ClipByValue Cos Cosh Div DivNoNan Elu EnsureShape
Equal Erf Erfc Exp Expm1 Floor FloorDiv FloorMod Greater GreaterEqual Identity Inv Invert IsFinite
IsInf IsNan LeakyRelu LeftShift Less LessEqual Lgamma Log Log1p LogicalAnd LogicalNot LogicalOr
Maximum Minimum Mod Mul MulNoNan Neg NotEqual OnesLike Pow PreventGradient RealDiv Reciprocal Relu
Relu6 RightShift Rint Round Rsqrt Select SelectV2 Selu Sigmoid Sign Sin Sinh Snapshot Softplus
Softsign Sqrt Square SquaredDifference StaticRegexReplace StopGradient StringJoin StringLength
StringLower StringStrip StringToHashBucket StringToHashBucketFast StringToHashBucketStrong
StringToNumber StringUpper Sub Substr Tan Tanh TruncateDiv TruncateMod Xdivy Xlogy ZerosLike
"""

# The first input has one sample in each row, and so has the result; the rest must be constant.
_BY_ROW = """
AvgPool AvgPool3D BiasAdd Conv2D Conv3D DepthToSpace DepthwiseConv2dNative MatMul MaxPool MaxPool3D
MaxPoolV2 ResizeBilinear ResizeNearestNeighbor SpaceToDepth
"""


@RULES.of(*_ELEMENTWISE.split())
def _elementwise(op: Any, inputs: list[Dependence]) -> Dependence | None:
    """Where each entry depends on the entries of the same place alone."""
    if op.type in ("Bitcast", "Select") and rank_of(op.inputs[0]) != rank_of(op.outputs[0]):
        return None
    if any(isinstance(d, Sizes) for d in inputs):
        return _of_sizes(op, inputs)
    if inputs == [SPARSE_INDICES] or inputs == [DISTINCT]:
        return inputs[0] if op.type in ("Cast", "Identity", "EnsureShape") else None
    if _pairs_samples(op, inputs):
        return Coupled(op.type)
    result = broadcast(op.outputs[0], op.inputs, inputs)
    if op.type in ("OnesLike", "ZerosLike") and isinstance(result, Samples):
        return dataclasses.replace(result, is_same=True)
    return result


def _pairs_samples(op: Any, inputs: list[Dependence]) -> bool:
    """Whether samples along one axis meet samples along another."""
    pairs = list(zip(op.inputs, inputs, strict=True))
    if any(rank_of(t) is None for t, _ in pairs):
        return False
    axes = {d.axis - len(t.shape) for t, d in pairs if isinstance(d, Samples)}
    return len(axes) > 1 and all(d is CONSTANT or isinstance(d, Samples) for d in inputs)


def _of_sizes(op: Any, inputs: list[Dependence]) -> Dependence | None:
    """A multiple of the number of samples times a constant is one again."""
    # A fraction of the number of samples, rounded, is no multiple of it.
    if op.outputs[0].dtype.is_integer and not all(t.dtype.is_integer for t in op.inputs):
        return None
    if op.type in ("Cast", "Identity", "EnsureShape", "StopGradient"):
        return inputs[0]
    if op.type != "Mul":
        return None
    a, b = (growing_sizes(d, t) for d, t in zip(inputs, op.inputs, strict=True))
    if a is None or b is None or np.any(a & b):
        return None
    return as_sizes(a | b)


@RULES.of(*_BY_ROW.split())
def _by_row(op: Any, inputs: list[Dependence]) -> Dependence | None:
    if op.type == "MatMul" and isinstance(inputs[1], Samples):
        return _product_of_samples(op, inputs)
    if not isinstance(inputs[0], Samples) or inputs[0].axis != 0:
        return None
    if op.type == "MatMul" and op.get_attr("transpose_a"):
        return None
    return inputs[0] if all(d is CONSTANT for d in inputs[1:]) else None


def _product_of_samples(op: Any, inputs: list[Dependence]) -> Dependence | None:
    left, right = inputs
    if not isinstance(left, Samples) or not isinstance(right, Samples):
        return None
    are_rows = left.axis == int(op.get_attr("transpose_a"))
    are_columns = right.axis != int(op.get_attr("transpose_b"))
    if are_rows and are_columns:
        return Coupled(op.type)
    is_over_samples = not are_rows and not are_columns and left.order == right.order
    return Total(op.type, is_mean=False) if is_over_samples else None


@RULES.of("BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(op: Any, inputs: list[Dependence]) -> Dependence | None:
    joined = broadcast(op.outputs[0], op.inputs, inputs)
    rank = rank_of(op.outputs[0])
    is_outer = isinstance(joined, Samples) and rank is not None and joined.axis < rank - 2
    return joined if is_outer else None


@RULES.of("All", "Any", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum")
def _reduce(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axes, rank = static_integers(op.inputs[1]), rank_of(op.inputs[0])
    if axes is None or rank is None:
        return None
    if isinstance(inputs[0], Sizes):
        # The product of one that grows, or none, and others that do not.
        grown = np.sum(inputs[0].grows)
        is_product = op.type == "Prod" and grown <= 1 and rank == 1
        return as_sizes(grown == 1) if is_product else None
    axes = [axis_of(a, rank) for a in axes]
    if isinstance(inputs[0], Samples) and inputs[0].axis in axes and op.type in ("Mean", "Sum"):
        return _over_samples(op, inputs[0])
    left = without_axes(inputs[0], axes)
    return inputs[0] if left is not None and op.get_attr("keep_dims") else left


def _over_samples(op: Any, samples: Samples) -> Dependence:
    if not samples.is_same:
        return Total(op.type, is_mean=op.type == "Mean")
    if op.type == "Mean":
        return CONSTANT
    # As many times the same as there are samples.
    shape = op.outputs[0].shape
    return as_sizes(np.ones(shape, bool)) if shape.is_fully_defined() else Mixed(op.type)


@RULES.of("ArgMax", "ArgMin")
def _arg(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axis, rank = static_integers(op.inputs[1]), rank_of(op.inputs[0])
    if axis is None or rank is None:
        return None
    return without_axes(inputs[0], [axis_of(axis[0], rank)])


@RULES.of("Cumsum", "Cumprod", "ReverseV2", "Roll")
def _along(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axes, rank = static_integers(op.inputs[-1]), rank_of(op.inputs[0])
    if axes is None or rank is None:
        return None
    apart = without_axes(inputs[0], [axis_of(a, rank) for a in axes])
    return inputs[0] if apart is not None and all(d is CONSTANT for d in inputs[1:]) else None


@RULES.of("LogSoftmax", "Softmax", "TopKV2")
def _last_axis(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank = rank_of(op.inputs[0])
    is_apart = isinstance(inputs[0], Samples) and rank is not None and inputs[0].axis < rank - 1
    return inputs[0] if is_apart and all(d is CONSTANT for d in inputs[1:]) else None


@RULES.of("Einsum")
def _einsum(op: Any, inputs: list[Dependence]) -> Dependence | None:
    terms, _, result = op.get_attr("equation").decode().partition("->")
    if "." in terms or any(d is not CONSTANT and not isinstance(d, Samples) for d in inputs):
        return None
    named = list(zip(terms.split(","), inputs, strict=True))
    letters = {term[d.axis] for term, d in named if isinstance(d, Samples)}
    if len(letters) > 1:
        return Coupled(op.type) if letters <= set(result) else None
    (letter,) = letters
    orders = {d.order for _, d in named if isinstance(d, Samples)}
    if len(orders) > 1 or any(d is CONSTANT and letter in term for term, d in named):
        return None
    if letter in result:
        return Samples(result.index(letter), orders.pop())
    return Total(op.type, is_mean=False)


@RULES.of("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
def _cross_entropy(op: Any, inputs: list[Dependence]) -> Dependence | None:
    logits, labels = inputs
    return logits if logits == labels and isinstance(logits, Samples) and not logits.axis else None


@RULES.of("OneHot")
def _one_hot(op: Any, inputs: list[Dependence]) -> Dependence | None:
    if not isinstance(inputs[0], Samples) or any(d is not CONSTANT for d in inputs[1:]):
        return None
    return inputs[0] if op.get_attr("axis") == -1 else None
