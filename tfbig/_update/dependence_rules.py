"""What each operation does to the dependence of its inputs; see `batch_dependence`."""

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

__all__ = (
    "CONSTANT",
    "DISTINCT",
    "RULES",
    "SPARSE_INDICES",
    "Dependence",
    "Mixed",
    "Samples",
    "Sizes",
)


class _Kind(enum.Enum):
    CONSTANT = enum.auto()
    DISTINCT = enum.auto()
    # The indices of a `tf.SparseTensor`: the first column counts samples, the others are joined.
    SPARSE_INDICES = enum.auto()


CONSTANT = _Kind.CONSTANT
DISTINCT = _Kind.DISTINCT
SPARSE_INDICES = _Kind.SPARSE_INDICES


@dataclasses.dataclass(frozen=True)
class Samples:
    """Joined along an axis.

    Attributes:
        axis: int.
        order: str, what put the samples into another order than that of the batch, in which
            they meet only others of that order; None if they stand in that of the batch.
    """

    axis: int = 0
    order: str | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Integers, such as a shape.

    Attributes:
        grows: bool array, of which of them are multiples of the number of samples; as a nested
            tuple, of the shape of the tensor.
    """

    grows: Any


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Neither: the samples meet, or an operation is not known.

    Attributes:
        operation: str, type of the first operation of that kind.
    """

    operation: str


Dependence = _Kind | Samples | Sizes | Mixed

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

Rule = Callable[[Any, list[Dependence]], "Dependence | list[Dependence] | None"]
RULES: dict[str, Rule] = {}


def _rule(*types: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def _rank(tensor: tf.Tensor) -> int | None:
    rank: int | None = tensor.shape.rank
    return rank


def _static(tensor: tf.Tensor) -> list[int] | None:
    """The value of a tensor of integers, as a flat list, if it is known."""
    value = tf.get_static_value(tensor)
    return None if value is None else [int(v) for v in np.reshape(value, [-1])]


def _axis(value: int, rank: int) -> int:
    return value % rank if rank else 0


def _grows(dependence: Dependence, tensor: tf.Tensor) -> Any:
    """Bool array, which of these sizes grow; None if it does not hold sizes."""
    if isinstance(dependence, Sizes):
        return np.asarray(dependence.grows, bool)
    if dependence is CONSTANT and tensor.shape.is_fully_defined():
        return np.zeros(tensor.shape.as_list(), bool)
    return None


def _sizes(grows: Any) -> Sizes:
    return Sizes(_nested(np.asarray(grows, bool).tolist()))


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value


@_rule(*_ELEMENTWISE.split())
def _elementwise(op: Any, inputs: list[Dependence]) -> Dependence | None:
    """Where each entry depends on the entries of the same place alone."""
    if op.type in ("Bitcast", "Select") and _rank(op.inputs[0]) != _rank(op.outputs[0]):
        return None
    if any(isinstance(d, Sizes) for d in inputs):
        return _of_sizes(op, inputs)
    if inputs == [SPARSE_INDICES] or inputs == [DISTINCT]:
        return inputs[0] if op.type in ("Cast", "Identity", "EnsureShape") else None
    return _broadcast(op.outputs[0], op.inputs, inputs)


def _broadcast(
    output: tf.Tensor, tensors: Sequence[tf.Tensor], inputs: list[Dependence]
) -> Dependence | None:
    """Joined along the axis in which all that depend on the batch meet."""
    rank = _rank(output)
    samples: set[Samples] = set()
    if rank is None:
        return inputs[0] if len(inputs) == 1 else None
    for tensor, dependence in zip(tensors, inputs, strict=True):
        if isinstance(dependence, Samples) and _rank(tensor) is not None:
            axis = dependence.axis + rank - len(tensor.shape)
            samples.add(Samples(axis, dependence.order))
        elif dependence is not CONSTANT:
            return None
    if len(samples) != 1:
        return None
    (result,) = samples
    for tensor, dependence in zip(tensors, inputs, strict=True):
        if dependence is CONSTANT and not _is_one(tensor, result.axis - rank):
            return None
    return result


def _is_one(tensor: tf.Tensor, axis: int) -> bool:
    """Whether an axis, counted from the end, is of size one, or is not there."""
    rank = _rank(tensor)
    return rank is not None and (rank < -axis or tensor.shape[axis] == 1)


def _of_sizes(op: Any, inputs: list[Dependence]) -> Dependence | None:
    """A multiple of the number of samples times a constant is one again."""
    # A fraction of the number of samples, rounded, is no multiple of it.
    if not all(t.dtype.is_integer for t in (*op.inputs, *op.outputs)):
        return None
    if op.type in ("Cast", "Identity", "EnsureShape", "StopGradient"):
        return inputs[0]
    if op.type != "Mul":
        return None
    a, b = (_grows(d, t) for d, t in zip(inputs, op.inputs, strict=True))
    if a is None or b is None or np.any(a & b):
        return None
    return _sizes(a | b)


@_rule("Shape")
def _shape(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank, (samples,) = _rank(op.inputs[0]), inputs
    if rank is None or not isinstance(samples, Samples):
        return None
    return _sizes([axis == samples.axis for axis in range(rank)])


@_rule("Size")
def _size(op: Any, inputs: list[Dependence]) -> Dependence | None:
    return _sizes(True) if isinstance(inputs[0], Samples) else None


@_rule("Rank")
def _constant(op: Any, inputs: list[Dependence]) -> Dependence:
    return CONSTANT


@_rule("Pack")
def _pack(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axis, rank = op.get_attr("axis"), _rank(op.outputs[0])
    if any(isinstance(d, Sizes) for d in inputs):
        parts = [_grows(d, t) for d, t in zip(inputs, op.inputs, strict=True)]
        return None if any(p is None for p in parts) else _sizes(np.stack(parts, axis))
    joined = _broadcast(op.inputs[0], op.inputs, inputs)
    if rank is None or not isinstance(joined, Samples) or any(d is CONSTANT for d in inputs):
        return None
    return Samples(joined.axis + (_axis(axis, rank) <= joined.axis), joined.order)


@_rule("ConcatV2")
def _concat(op: Any, inputs: list[Dependence]) -> Dependence | None:
    parts, tensors, axis = inputs[:-1], op.inputs[:-1], _static(op.inputs[-1])
    rank = _rank(op.outputs[0])
    if axis is None or rank is None:
        return None
    if any(isinstance(d, Sizes) for d in parts):
        grown = [_grows(d, t) for d, t in zip(parts, tensors, strict=True)]
        return None if any(g is None for g in grown) else _sizes(np.concatenate(grown, axis[0]))
    if not all(isinstance(d, Samples) and d == parts[0] for d in parts):
        return None
    (samples,) = {d for d in parts if isinstance(d, Samples)}
    # Along the samples: those of the batch stand several times, one batch behind the other.
    is_along = samples.axis == _axis(axis[0], rank)
    return Samples(samples.axis, op.name if is_along else samples.order)


@_rule("Fill")
def _fill(op: Any, inputs: list[Dependence]) -> Dependence | None:
    grows = _grows(inputs[0], op.inputs[0])
    if inputs[1] is not CONSTANT or grows is None or np.sum(grows) != 1:
        return None
    return Samples(int(np.argmax(grows)))


@_rule("BroadcastTo", "Tile")
def _repeated(op: Any, inputs: list[Dependence]) -> Dependence | None:
    grows, (tensor, _) = _grows(inputs[1], op.inputs[1]), op.inputs
    rank = _rank(tensor)
    if grows is None or rank is None:
        return None
    (axes,) = np.nonzero(grows)
    if isinstance(inputs[0], Samples):
        axis = inputs[0].axis + len(grows) - rank
        if op.type == "BroadcastTo":
            return Samples(axis, inputs[0].order) if list(axes) == [axis] else None
        times = tf.get_static_value(op.inputs[1])
        if len(axes) or times is None:
            return None
        return inputs[0] if times[axis] == 1 else Samples(axis, op.name)
    if inputs[0] is not CONSTANT or len(axes) != 1:
        return None
    axis = int(axes[0])
    # A constant stands once for each sample; several of its entries, in turn.
    if op.type == "BroadcastTo" and not _is_one(tensor, axis - len(grows)):
        return None
    return Samples(axis)


@_rule("Reshape")
def _reshape(op: Any, inputs: list[Dependence]) -> Dependence | None:
    shape = op.inputs[1]
    if isinstance(inputs[0], Sizes) and op.outputs[0].shape.is_fully_defined():
        return _sizes(np.reshape(inputs[0].grows, op.outputs[0].shape.as_list()))
    if isinstance(inputs[0], Mixed):
        return inputs[0]
    if _rank(op.outputs[0]) == 1 and inputs[0] is DISTINCT:
        return DISTINCT
    if not isinstance(inputs[0], Samples):
        return None
    if _rank(op.outputs[0]) == 1:
        return Samples(0, inputs[0].order if inputs[0].axis == 0 else op.name)
    grows, sizes = _grows(inputs[1], shape), _static_or_unknown(shape)
    if inputs[0].axis != 0 or grows is None or not len(grows) or np.any(grows[1:]):
        return None
    old, new = (
        math.prod(t.shape[1:]) if t.shape[1:].is_fully_defined() else None
        for t in (op.inputs[0], op.outputs[0])
    )
    if old is not None and new and old % new == 0:
        # Each row stays one, or becomes several.
        return inputs[0] if grows[0] or sizes[0] == -1 else None
    # The entries of each sample, which stand together, become so many rows.
    return inputs[0] if grows[0] and inputs[0].order is None else None


def _static_or_unknown(shape: tf.Tensor) -> list[int | None]:
    """The sizes of a shape that are known; those packed from scalars one by one."""
    value = _static(shape)
    if value is not None:
        return list(value)
    if shape.op.type == "Pack":
        return [None if (v := _static(t)) is None else v[0] for t in shape.op.inputs]
    return [None] * (shape.shape[0] or 1)


@_rule("Transpose")
def _transpose(op: Any, inputs: list[Dependence]) -> Dependence | None:
    order = _static(op.inputs[1])
    if order is None or not isinstance(inputs[0], Samples):
        return None
    return Samples(order.index(inputs[0].axis), inputs[0].order)


@_rule("ExpandDims")
def _expand_dims(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axis, rank = _static(op.inputs[1]), _rank(op.outputs[0])
    if axis is None or rank is None:
        return None
    new = _axis(axis[0], rank)
    if isinstance(inputs[0], Sizes):
        return _sizes(np.expand_dims(np.asarray(inputs[0].grows), new))
    if not isinstance(inputs[0], Samples):
        return None
    return Samples(inputs[0].axis + (new <= inputs[0].axis), inputs[0].order)


@_rule("Squeeze")
def _squeeze(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank, dims = _rank(op.inputs[0]), op.get_attr("squeeze_dims")
    if rank is None:
        return None
    if isinstance(inputs[0], Sizes):
        return _sizes(np.squeeze(np.asarray(inputs[0].grows), tuple(dims) or None))
    return _without_axes(inputs[0], [_axis(d, rank) for d in dims]) if dims else None


def _without_axes(samples: Dependence, axes: Sequence[int]) -> Dependence | None:
    """What is left when axes other than that of the samples are taken out."""
    if not isinstance(samples, Samples) or samples.axis in axes:
        return None
    return Samples(samples.axis - sum(a < samples.axis for a in axes), samples.order)


@_rule("All", "Any", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum")
def _reduce(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axes, rank = _static(op.inputs[1]), _rank(op.inputs[0])
    if axes is None or rank is None:
        return None
    if isinstance(inputs[0], Sizes):
        # The product of one that grows and others that do not.
        is_product = op.type == "Prod" and np.sum(inputs[0].grows) == 1 and rank == 1
        return _sizes(True) if is_product else None
    axes = [_axis(a, rank) for a in axes]
    left = _without_axes(inputs[0], axes)
    return inputs[0] if left is not None and op.get_attr("keep_dims") else left


@_rule("ArgMax", "ArgMin")
def _arg(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axis, rank = _static(op.inputs[1]), _rank(op.inputs[0])
    if axis is None or rank is None:
        return None
    return _without_axes(inputs[0], [_axis(axis[0], rank)])


@_rule("Cumsum", "Cumprod", "ReverseV2", "Roll")
def _along(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axes, rank = _static(op.inputs[-1]), _rank(op.inputs[0])
    if axes is None or rank is None:
        return None
    apart = _without_axes(inputs[0], [_axis(a, rank) for a in axes])
    return inputs[0] if apart is not None and all(d is CONSTANT for d in inputs[1:]) else None


@_rule("LogSoftmax", "Softmax", "TopKV2")
def _last_axis(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank = _rank(op.inputs[0])
    is_apart = isinstance(inputs[0], Samples) and rank is not None and inputs[0].axis < rank - 1
    return inputs[0] if is_apart and all(d is CONSTANT for d in inputs[1:]) else None


@_rule("OneHot")
def _one_hot(op: Any, inputs: list[Dependence]) -> Dependence | None:
    if not isinstance(inputs[0], Samples) or any(d is not CONSTANT for d in inputs[1:]):
        return None
    return inputs[0] if op.get_attr("axis") == -1 else None


@_rule("Split", "SplitV", "Unpack")
def _split(op: Any, inputs: list[Dependence]) -> Dependence | None:
    at = {"Split": 1, "SplitV": 0, "Unpack": 0}[op.type]
    value, others = inputs[at], inputs[:at] + inputs[at + 1 :]
    rank = _rank(op.inputs[at])
    axis = [op.get_attr("axis")] if op.type == "Unpack" else _static(op.inputs[0 if at else -1])
    if rank is None or axis is None or any(d is not CONSTANT for d in others):
        return None
    apart = _without_axes(value, [_axis(axis[0], rank)])
    return apart if op.type == "Unpack" or apart is None else value


# A slice of constant bounds that are not known while tracing.
_PART = slice(1, 1)


@_rule("StridedSlice")
def _strided_slice(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank = _rank(op.inputs[0])
    slices = None if rank is None else _slices(op)
    if slices is None or rank is None or any(d is not CONSTANT for d in inputs[1:]):
        return None
    if isinstance(inputs[0], Sizes):
        if _PART in slices:
            return None
        part = np.asarray(inputs[0].grows)[slices]
        return _sizes(part) if np.any(part) else CONSTANT
    if inputs[0] is SPARSE_INDICES:
        # A column of the indices, other than that which counts the samples.
        columns = op.inputs[0].shape[1]
        is_column = len(slices) == 2 and slices[0] == slice(None) and isinstance(slices[1], int)
        return Samples() if is_column and columns and slices[1] % columns else None
    if not isinstance(inputs[0], Samples):
        return None
    # Follows the axis of the samples through the axes that are added and taken out.
    old = new = 0
    for part in slices:
        if part is None:
            new += 1
            continue
        if old == inputs[0].axis:
            return Samples(new, inputs[0].order) if part == slice(None) else None
        old += 1
        new += not isinstance(part, int)
    return Samples(new + inputs[0].axis - old, inputs[0].order)


def _slices(op: Any) -> tuple[Any, ...] | None:
    """The index of a `StridedSlice`, as Python has it; None if it is not known or has `...`."""
    begin, end, strides = (tf.get_static_value(t) for t in op.inputs[1:])
    if strides is None:
        return None
    names = ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    bits = {n: op.get_attr(f"{n}_mask") for n in names}
    parts: list[Any] = []
    for i, stride in enumerate(strides):

        def has(name: str, i: int = i) -> bool:
            return bool(bits[name] >> i & 1)

        if has("ellipsis"):
            given = bin(op.get_attr("new_axis_mask")).count("1")
            parts += [slice(None)] * (len(op.inputs[0].shape) + given - len(strides) + 1)
            continue
        if has("new_axis"):
            parts.append(None)
            continue
        first = None if has("begin") else begin
        last = None if has("end") else end
        if has("shrink_axis"):
            if begin is None:
                return None
            parts.append(int(begin[i]))
        elif (first is None and not has("begin")) or (last is None and not has("end")):
            # Of bounds that are not known: not all of the axis.
            parts.append(_PART)
        else:
            first = None if first is None else int(first[i]) or None
            last = None if last is None else int(last[i])
            step = None if stride == 1 else int(stride)
            parts.append(slice(first, last, step))
    return tuple(parts)


@_rule("Slice")
def _slice(op: Any, inputs: list[Dependence]) -> Dependence | None:
    begin, size = (tf.get_static_value(t) for t in op.inputs[1:])
    if not isinstance(inputs[0], Samples) or begin is None or begin[inputs[0].axis] != 0:
        return None
    return inputs[0] if size is not None and size[inputs[0].axis] == -1 else None


@_rule("Pad", "PadV2", "MirrorPad")
def _pad(op: Any, inputs: list[Dependence]) -> Dependence | None:
    paddings = tf.get_static_value(op.inputs[1])
    if not isinstance(inputs[0], Samples) or paddings is None or any(paddings[inputs[0].axis]):
        return None
    return inputs[0] if all(d is CONSTANT for d in inputs[1:]) else None


@_rule("GatherV2")
def _gather(op: Any, inputs: list[Dependence]) -> Dependence | None:
    (params, indices, _), axis = op.inputs, _static(op.inputs[2])
    batch_dims, rank = op.get_attr("batch_dims"), _rank(params)
    if axis is None or rank is None or _rank(indices) is None:
        return None
    at = _axis(axis[0], rank)
    source, places = inputs[:2]
    if isinstance(source, Sizes):
        found = _static(indices)
        if found is None or not indices.shape.is_fully_defined():
            return None
        return _sizes(np.asarray(source.grows)[np.reshape(found, indices.shape.as_list())])
    if batch_dims == 0 and source is CONSTANT and isinstance(places, Samples):
        return Samples(at + places.axis, places.order)
    if batch_dims == 0 and isinstance(source, Samples) and places is CONSTANT:
        more = 0 if source.axis < at else len(indices.shape) - 1
        return None if source.axis == at else Samples(source.axis + more, source.order)
    # Each sample has places of its own.
    is_by_sample = source == places == Samples(0) and batch_dims > 0
    return Samples(0) if is_by_sample else None


@_rule("GatherNd")
def _gather_nd(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank = _rank(op.inputs[1])
    if inputs[0] is not CONSTANT or rank is None or not isinstance(inputs[1], Samples):
        return None
    return inputs[1] if inputs[1].axis < rank - 1 else None


@_rule("ResourceGather")
def _resource_gather(op: Any, inputs: list[Dependence]) -> Dependence | None:
    return inputs[1] if op.get_attr("batch_dims") == 0 else None


@_rule("LookupTableFindV2")
def _lookup(op: Any, inputs: list[Dependence]) -> Dependence | None:
    return inputs[1] if inputs[2] is CONSTANT else None


@_rule("BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(op: Any, inputs: list[Dependence]) -> Dependence | None:
    joined = _broadcast(op.outputs[0], op.inputs, inputs)
    rank = _rank(op.outputs[0])
    is_outer = isinstance(joined, Samples) and rank is not None and joined.axis < rank - 2
    return joined if is_outer else None


@_rule(*_BY_ROW.split())
def _by_row(op: Any, inputs: list[Dependence]) -> Dependence | None:
    if not isinstance(inputs[0], Samples) or inputs[0].axis != 0:
        return None
    if op.type == "MatMul" and op.get_attr("transpose_a"):
        return None
    return inputs[0] if all(d is CONSTANT for d in inputs[1:]) else None


@_rule("IdentityN")
def _identity_n(op: Any, inputs: list[Dependence]) -> Dependence | list[Dependence] | None:
    return list(inputs)


@_rule("Unique", "UniqueV2")
def _unique(op: Any, inputs: list[Dependence]) -> Dependence | list[Dependence] | None:
    if not isinstance(inputs[0], Samples) and inputs[0] is not DISTINCT:
        return None
    return [DISTINCT, *[Mixed(op.type)] * (len(op.outputs) - 1)]


@_rule("SparseFillEmptyRows")
def _fill_empty_rows(op: Any, inputs: list[Dependence]) -> list[Dependence] | None:
    if inputs[0] is not SPARSE_INDICES:
        return None
    indices, values, is_empty, _ = op.outputs
    del indices, values, is_empty
    return [SPARSE_INDICES, Samples(), Samples(), Mixed(op.type)]


@_rule("SparseToDense")
def _sparse_to_dense(op: Any, inputs: list[Dependence]) -> Dependence | None:
    grows = _grows(inputs[1], op.inputs[1])
    is_batch = inputs[0] is SPARSE_INDICES and isinstance(inputs[2], Samples)
    return (
        Samples() if is_batch and grows is not None and list(np.nonzero(grows)[0]) == [0] else None
    )


@_rule("RaggedTensorToTensor")
def _to_tensor(op: Any, inputs: list[Dependence]) -> Dependence | None:
    # The row partitions, which are `Mixed`, say only where samples end.
    is_constant = inputs[0] is CONSTANT and inputs[2] is CONSTANT
    return Samples() if is_constant and isinstance(inputs[1], Samples) else None
