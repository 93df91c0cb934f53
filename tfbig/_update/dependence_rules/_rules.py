"""Rules by type of operation, and what they ask of tensors."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfbig import _types
from tfbig._update.dependence import CONSTANT, Dependence, Samples, Sizes

__all__ = (
    "Rules",
    "as_sizes",
    "axis_of",
    "broadcast",
    "growing_sizes",
    "is_of_size_one",
    "rank_of",
    "static_integers",
    "static_value",
    "without_axes",
)

# Takes an operation and the dependences of its inputs; returns that of its output, or a list of
# those of its outputs, or None if it cannot tell.
# Any: operations have no types.
Rule: TypeAlias = Callable[[Any, list[Dependence]], Dependence | list[Dependence] | None]


class Rules(dict[str, Rule]):
    """Rules by type of operation."""

    def of(self, *types: str) -> Callable[[Rule], Rule]:
        """Registers a function as the rule of operations of these types."""

        def register(rule: Rule) -> Rule:
            self.update(dict.fromkeys(types, rule))
            return rule

        return register


def rank_of(tensor: tf.Tensor) -> int | None:
    """The rank of a tensor, if it is known."""
    rank: int | None = tensor.shape.rank
    return rank


def static_value(tensor: tf.Tensor) -> _types.Array | None:
    """The value of a tensor, if it is known; also where indices are computed from a rank."""
    value: _types.Array | None = tf.get_static_value(tensor)
    if value is None and tensor.op.type == "StridedSlice":
        value = _known_size(tensor.op)
    if value is not None or tensor.op.type not in _ARITHMETIC:
        return value
    inputs = [static_value(t) for t in tensor.op.inputs]
    known = [v for v in inputs if v is not None]
    return _ARITHMETIC[tensor.op.type](*known) if len(known) == len(inputs) else None


def _known_size(op: Any) -> _types.Array | None:
    """One of the sizes of a tensor, taken out of its shape."""
    shape, index = op.inputs[0].op, static_integers(op.inputs[1])
    if shape.type != "Shape" or index is None or op.get_attr("shrink_axis_mask") != 1:
        return None
    (tensor,) = shape.inputs
    size = tensor.shape[index[0]] if tensor.shape.rank is not None else None
    return None if size is None else np.asarray(size)


_ARITHMETIC: dict[str, Callable[..., _types.Array]] = {
    "Add": np.add,
    "AddV2": np.add,
    "Pack": lambda *values: np.stack(values),
    "Sub": np.subtract,
}


def static_integers(tensor: tf.Tensor) -> list[int] | None:
    """The value of a tensor of integers, as a flat list, if it is known."""
    value = static_value(tensor)
    return None if value is None else [int(v) for v in np.reshape(value, [-1])]


def axis_of(value: int, rank: int) -> int:
    """An axis, counted from the front."""
    return value % rank if rank else 0


def growing_sizes(dependence: Dependence, tensor: tf.Tensor) -> Any:
    """Bool array, which of these sizes grow; None if it does not hold sizes."""
    if isinstance(dependence, Sizes):
        return np.asarray(dependence.grows, bool)
    if dependence is CONSTANT and tensor.shape.is_fully_defined():
        return np.zeros(tensor.shape.as_list(), bool)
    return None


def as_sizes(grows: Any) -> Sizes:
    """The dependence of sizes, from a bool array of which of them grow."""
    return Sizes(_nested(np.asarray(grows, bool).tolist()))


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value


def broadcast(
    output: tf.Tensor, tensors: Sequence[tf.Tensor], inputs: list[Dependence]
) -> Dependence | None:
    """Joined along the axis in which all that depend on the batch meet."""
    rank = rank_of(output)
    samples: list[Samples] = []
    if rank is None:
        return inputs[0] if len(inputs) == 1 else None
    for tensor, dependence in zip(tensors, inputs, strict=True):
        if isinstance(dependence, Samples) and rank_of(tensor) is not None:
            axis = dependence.axis + rank - len(tensor.shape)
            samples.append(dataclasses.replace(dependence, axis=axis))
        elif dependence is not CONSTANT:
            return None
    if len(set(samples)) != 1:
        return None
    result = dataclasses.replace(samples[0], is_same=all(s.is_same for s in samples))
    for tensor, dependence in zip(tensors, inputs, strict=True):
        if dependence is CONSTANT and not is_of_size_one(tensor, result.axis - rank):
            return None
    return result


def is_of_size_one(tensor: tf.Tensor, axis: int) -> bool:
    """Whether an axis, counted from the end, is of size one, or is not there."""
    rank = rank_of(tensor)
    return rank is not None and (rank < -axis or tensor.shape[axis] == 1)


def without_axes(samples: Dependence, axes: Sequence[int]) -> Dependence | None:
    """What is left when axes other than that of the samples are taken out."""
    if not isinstance(samples, Samples) or samples.axis in axes:
        return None
    axis = samples.axis - sum(a < samples.axis for a in axes)
    return dataclasses.replace(samples, axis=axis)
