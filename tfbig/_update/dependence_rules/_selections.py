"""Operations that take out entries: slices, padding and look-ups."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tfbig._update.dependence import (
    CONSTANT,
    SPARSE_INDICES,
    Dependence,
    Samples,
    Sizes,
)
from tfbig._update.dependence_rules._rules import (
    Rules,
    as_sizes,
    axis_of,
    rank_of,
    static_integers,
    static_value,
)

__all__ = ("RULES",)

RULES = Rules()

# A slice of constant bounds that are not known while tracing.
_PART = slice(1, 1)


@RULES.of("StridedSlice")
def _strided_slice(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank = rank_of(op.inputs[0])
    slices = None if rank is None else _slices(op)
    if slices is None or rank is None or any(d is not CONSTANT for d in inputs[1:]):
        return None
    if isinstance(inputs[0], Sizes):
        if _PART in slices:
            return None
        part = np.asarray(inputs[0].grows)[slices]
        return as_sizes(part) if np.any(part) else CONSTANT
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
            is_whole = part == slice(None)
            return dataclasses.replace(inputs[0], axis=new) if is_whole else None
        old += 1
        new += not isinstance(part, int)
    return dataclasses.replace(inputs[0], axis=new + inputs[0].axis - old)


def _slices(op: Any) -> tuple[Any, ...] | None:
    """The index of a `StridedSlice`, as Python has it; None if it is not known or has `...`."""
    begin, end, strides = (static_value(t) for t in op.inputs[1:])
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
        first: Any = None if has("begin") else begin
        last: Any = None if has("end") else end
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


@RULES.of("Slice")
def _slice(op: Any, inputs: list[Dependence]) -> Dependence | None:
    begin, size = (tf.get_static_value(t) for t in op.inputs[1:])
    if not isinstance(inputs[0], Samples) or begin is None or begin[inputs[0].axis] != 0:
        return None
    return inputs[0] if size is not None and size[inputs[0].axis] == -1 else None


@RULES.of("Pad", "PadV2", "MirrorPad")
def _pad(op: Any, inputs: list[Dependence]) -> Dependence | None:
    paddings = tf.get_static_value(op.inputs[1])
    if not isinstance(inputs[0], Samples) or paddings is None or any(paddings[inputs[0].axis]):
        return None
    return inputs[0] if all(d is CONSTANT for d in inputs[1:]) else None


@RULES.of("GatherV2")
def _gather(op: Any, inputs: list[Dependence]) -> Dependence | None:
    (params, indices, _), axis = op.inputs, static_integers(op.inputs[2])
    batch_dims, rank = op.get_attr("batch_dims"), rank_of(params)
    if axis is None or rank is None or rank_of(indices) is None:
        return None
    at = axis_of(axis[0], rank)
    source, places = inputs[:2]
    if isinstance(source, Sizes):
        found = static_integers(indices)
        if found is None or not indices.shape.is_fully_defined():
            return None
        return as_sizes(np.asarray(source.grows)[np.reshape(found, indices.shape.as_list())])
    if batch_dims == 0 and source is CONSTANT and isinstance(places, Samples):
        return Samples(at + places.axis, places.order)
    if batch_dims == 0 and isinstance(source, Samples) and places is CONSTANT:
        more = 0 if source.axis < at else len(indices.shape) - 1
        return None if source.axis == at else Samples(source.axis + more, source.order)
    # Each sample has places of its own.
    is_by_sample = source == places == Samples(0) and batch_dims > 0
    return Samples(0) if is_by_sample else None


@RULES.of("GatherNd")
def _gather_nd(op: Any, inputs: list[Dependence]) -> Dependence | None:
    rank = rank_of(op.inputs[1])
    if inputs[0] is not CONSTANT or rank is None or not isinstance(inputs[1], Samples):
        return None
    return inputs[1] if inputs[1].axis < rank - 1 else None


@RULES.of("ResourceGather")
def _resource_gather(op: Any, inputs: list[Dependence]) -> Dependence | None:
    return inputs[1] if op.get_attr("batch_dims") == 0 else None


@RULES.of("LookupTableFindV2")
def _lookup(op: Any, inputs: list[Dependence]) -> Dependence | None:
    return inputs[1] if inputs[2] is CONSTANT else None
