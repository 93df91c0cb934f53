"""Operations that tell shapes, lay entries out anew, repeat them or put them together."""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tfbig._update.dependence import (
    CONSTANT,
    DISTINCT,
    Dependence,
    Mixed,
    Samples,
    Sizes,
)
from tfbig._update.dependence_rules._rules import (
    Rules,
    as_sizes,
    axis_of,
    broadcast,
    growing_sizes,
    is_of_size_one,
    rank_of,
    static_integers,
    without_axes,
)

__all__ = ("RULES", "of_draws")

RULES = Rules()


@RULES.of("Shape")
def _shape(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank, (samples,) = rank_of(op.inputs[0]), inputs
    if rank is None or not isinstance(samples, Samples):
        return None
    return as_sizes([axis == samples.axis for axis in range(rank)])


@RULES.of("Size")
def _size(op: Any, inputs: list[Dependence]) -> Dependence | None:
    return as_sizes(True) if isinstance(inputs[0], Samples) else None


@RULES.of("Rank")
def _constant(op: Any, inputs: list[Dependence]) -> Dependence:
    return CONSTANT


@RULES.of("Pack")
def _pack(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axis, rank = op.get_attr("axis"), rank_of(op.outputs[0])
    if any(isinstance(d, Sizes) for d in inputs):
        parts = [growing_sizes(d, t) for d, t in zip(inputs, op.inputs, strict=True)]
        return None if any(p is None for p in parts) else as_sizes(np.stack(parts, axis))
    joined = broadcast(op.inputs[0], op.inputs, inputs)
    if rank is None or not isinstance(joined, Samples) or any(d is CONSTANT for d in inputs):
        return None
    return Samples(joined.axis + (axis_of(axis, rank) <= joined.axis), joined.order)


@RULES.of("ConcatV2")
def _concat(op: Any, inputs: list[Dependence]) -> Dependence | None:
    parts, tensors, axis = inputs[:-1], op.inputs[:-1], static_integers(op.inputs[-1])
    rank = rank_of(op.outputs[0])
    if axis is None or rank is None:
        return None
    if any(isinstance(d, Sizes) for d in parts):
        grown = [growing_sizes(d, t) for d, t in zip(parts, tensors, strict=True)]
        return None if any(g is None for g in grown) else as_sizes(np.concatenate(grown, axis[0]))
    if not all(isinstance(d, Samples) and d == parts[0] for d in parts):
        return None
    (samples,) = {d for d in parts if isinstance(d, Samples)}
    # Along the samples: those of the batch stand several times, one batch behind the other.
    is_along = samples.axis == axis_of(axis[0], rank)
    return Samples(samples.axis, op.name if is_along else samples.order)


@RULES.of("Fill")
def _fill(op: Any, inputs: list[Dependence]) -> Dependence | None:
    grows = growing_sizes(inputs[0], op.inputs[0])
    if inputs[1] is not CONSTANT or grows is None or np.sum(grows) != 1:
        return None
    return Samples(int(np.argmax(grows)), is_same=True)


def of_draws(op: Any, shape: Dependence) -> Dependence:
    """The dependence of random numbers of a shape, if those of other seeds are just as good."""
    grows = growing_sizes(shape, op.inputs[0])
    if grows is None or np.sum(grows) != 1:
        return Mixed(op.type)
    return Samples(int(np.argmax(grows)))


@RULES.of("BroadcastTo", "Tile")
def _repeated(op: Any, inputs: list[Dependence]) -> Dependence | None:
    grows, (tensor, _) = growing_sizes(inputs[1], op.inputs[1]), op.inputs
    rank = rank_of(tensor)
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
    if op.type == "BroadcastTo" and not is_of_size_one(tensor, axis - len(grows)):
        return None
    return Samples(axis, is_same=op.type == "BroadcastTo")


@RULES.of("Reshape")
def _reshape(op: Any, inputs: list[Dependence]) -> Dependence | None:
    shape = op.inputs[1]
    if isinstance(inputs[0], Sizes) and op.outputs[0].shape.is_fully_defined():
        return as_sizes(np.reshape(inputs[0].grows, op.outputs[0].shape.as_list()))
    if isinstance(inputs[0], Mixed):
        return inputs[0]
    if rank_of(op.outputs[0]) == 1 and inputs[0] is DISTINCT:
        return DISTINCT
    if not isinstance(inputs[0], Samples):
        return None
    if rank_of(op.outputs[0]) == 1:
        return Samples(0, inputs[0].order if inputs[0].axis == 0 else op.name)
    grows, sizes = growing_sizes(inputs[1], shape), _static_or_unknown(shape)
    if inputs[0].axis != 0 or grows is None or not len(grows) or np.any(grows[1:]):
        return None
    before, after = (t.shape[1:] for t in (op.inputs[0], op.outputs[0]))
    if not after.is_fully_defined() and None not in sizes and -1 not in sizes[1:]:
        after = tf.TensorShape(sizes[1:])
    old, new = (math.prod(s) if s.is_fully_defined() else None for s in (before, after))
    if old is not None and new and old % new == 0:
        # Each row stays one, or becomes several.
        return inputs[0] if grows[0] or sizes[0] == -1 else None
    # The entries of each sample, which stand together, become so many rows.
    return inputs[0] if grows[0] and inputs[0].order is None else None


def _static_or_unknown(shape: tf.Tensor) -> list[int | None]:
    """The sizes of a shape that are known; those packed from scalars one by one."""
    value = static_integers(shape)
    if value is not None:
        return list(value)
    if shape.op.type == "Pack":
        return [None if (v := static_integers(t)) is None else v[0] for t in shape.op.inputs]
    return [None] * (shape.shape[0] or 1)


@RULES.of("Transpose")
def _transpose(op: Any, inputs: list[Dependence]) -> Dependence | None:
    order = static_integers(op.inputs[1])
    if order is None or not isinstance(inputs[0], Samples):
        return None
    return Samples(order.index(inputs[0].axis), inputs[0].order)


@RULES.of("ExpandDims")
def _expand_dims(op: Any, inputs: list[Dependence]) -> Dependence | None:
    axis, rank = static_integers(op.inputs[1]), rank_of(op.outputs[0])
    if axis is None or rank is None:
        return None
    new = axis_of(axis[0], rank)
    if isinstance(inputs[0], Sizes):
        return as_sizes(np.expand_dims(np.asarray(inputs[0].grows), new))
    if not isinstance(inputs[0], Samples):
        return None
    return dataclasses.replace(inputs[0], axis=inputs[0].axis + (new <= inputs[0].axis))


@RULES.of("Squeeze")
def _squeeze(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank, dims = rank_of(op.inputs[0]), op.get_attr("squeeze_dims")
    if rank is None:
        return None
    if isinstance(inputs[0], Sizes):
        return as_sizes(np.squeeze(np.asarray(inputs[0].grows), tuple(dims) or None))
    return without_axes(inputs[0], [axis_of(d, rank) for d in dims]) if dims else None


@RULES.of("Split", "SplitV", "Unpack")
def _split(op: Any, inputs: list[Dependence]) -> Dependence | None:
    at = {"Split": 1, "SplitV": 0, "Unpack": 0}[op.type]
    value, others = inputs[at], inputs[:at] + inputs[at + 1 :]
    rank = rank_of(op.inputs[at])
    is_unpack = op.type == "Unpack"
    axis = [op.get_attr("axis")] if is_unpack else static_integers(op.inputs[0 if at else -1])
    if rank is None or axis is None or any(d is not CONSTANT for d in others):
        return None
    apart = without_axes(value, [axis_of(axis[0], rank)])
    return apart if is_unpack or apart is None else value


@RULES.of("IdentityN")
def _identity_n(op: Any, inputs: list[Dependence]) -> Dependence | list[Dependence] | None:
    return list(inputs)
