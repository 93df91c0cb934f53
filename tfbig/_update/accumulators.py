"""Accumulators: what the gradient of a variable is added up in.

float32 or wider. A dense gradient has one buffer. The gradient of a table that is
looked up is a `tf.IndexedSlices`, a row for each look-up, and has a buffer for each
way of looking up; `table_rows` says which rows the whole batch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import table_rows
from tfbig._update.table_rows import Rows

__all__ = (
    "Accumulator",
    "add",
    "dtype_for",
    "map_values",
    "result",
    "size_of",
    "squared_norm",
    "start",
    "values",
    "widest",
)

# What a loop carries for one look-up of a table, by name.
# Any: tensors and tensor arrays.
_Part: TypeAlias = dict[str, Any]

# A tensor, or a list of `_Part`.
Accumulator: TypeAlias = _types.Tensor | list[_Part]


def dtype_for(dtype: _types.DType | str) -> _types.DType:
    """float32, or the given dtype if it is wider."""
    dtype = tf.as_dtype(dtype)
    return dtype if dtype.size > tf.float32.size else tf.float32


def widest(dtype: _types.DType | str, variables: Iterable[keras.Variable]) -> _types.DType:
    """The widest of the accumulator dtypes for a dtype and for variables."""
    found = dtype_for(dtype)
    for variable in variables:
        other = dtype_for(variable.dtype)
        found = other if other.size > found.size else found
    return found


def size_of(variables: Iterable[keras.Variable]) -> int:
    """Bytes of the accumulators of dense gradients of these variables, on the fullest replica."""
    return sum(_elements(v) * dtype_for(v.dtype).size for v in variables)


def _elements(variable: keras.Variable) -> int:
    shapes: list[Sequence[int]] = [variable.shape]
    if isinstance(variable, _keras.sharded_variable.ShardedWeight):
        shapes = [piece.shape for piece in variable.pieces.values()]
    return max(math.prod(shape) for shape in shapes)


def start(variable: keras.Variable, rows: Sequence[Rows] = ()) -> Accumulator:
    """An empty accumulator: a structure of tensors that a loop can carry.

    Args:
        variable: the variable.
        rows: `Rows` of each part of its gradient; none where that is added up densely.
    """
    dtype = dtype_for(variable.dtype)
    if not rows:
        return tf.zeros(variable.shape, dtype)
    return [_start_part(kind, dtype, variable.shape[1:]) for kind in rows]


def _start_part(kind: Rows, dtype: _types.DType, shape: Sequence[int]) -> _Part:
    if kind is Rows.SHARED:
        return {
            "indices": _of_any_length(tf.zeros([0], tf.int64)),
            "values": _of_any_length(tf.zeros([0, *shape], dtype)),
        }

    def array(dtype: _types.DType, shape: list[int | None]) -> tf.TensorArray:
        return tf.TensorArray(
            dtype, size=0, dynamic_size=True, element_shape=shape, infer_shape=False
        )

    return {
        "count": tf.constant(0),
        _index_name(kind): array(tf.int64, [None]),
        "values": array(dtype, [None, *shape]),
    }


def _index_name(kind: Rows) -> str:
    return "positions" if kind is Rows.SHARED_OF_ANY_LENGTH else "indices"


def _of_any_length(tensor: _types.Tensor) -> _types.Tensor:
    # A loop keeps the shape of what it carries.
    return tf.compat.v1.placeholder_with_default(tensor, [None, *tensor.shape[1:]])


def add(
    totals: list[Accumulator],
    gradients: list[_types.Gradient | None],
    weight: _types.Tensor,
    are_alike: _types.Tensor | None = None,
    is_first: _types.Tensor | None = None,
) -> list[Accumulator]:
    """The accumulators with `weight * gradient` added to each.

    Args:
        totals: the accumulators.
        gradients: the gradient for each; None adds nothing.
        weight: float scalar.
        are_alike: bool scalar: whether the weights of all gradients of the sum are one. This
            saves passes over dense gradients, which take a good part of the time of small
            micro-batches. None if that is not known.
        is_first: bool scalar: whether nothing has been added yet.
    """
    pairs = list(zip(totals, gradients, strict=True))
    # The accumulator of a dense gradient is a tensor.
    dense: dict[int, tuple[_types.Tensor, _types.Tensor]] = {
        i: (total, g) for i, (total, g) in enumerate(pairs) if isinstance(g, tf.Tensor)
    }
    sums = [t if isinstance(g, tf.Tensor) else _add_slices(t, g, weight) for t, g in pairs]

    def summed(
        function: Callable[[_types.Tensor, _types.Tensor], _types.Tensor],
    ) -> list[_types.Tensor]:
        # Of inputs of unknown length, TensorFlow may not know the shape of a gradient.
        return [
            tf.ensure_shape(function(total, tf.cast(gradient, total.dtype)), total.shape)
            for total, gradient in dense.values()
        ]

    def weighted() -> list[_types.Tensor]:
        return summed(lambda total, gradient: total + tf.cast(weight, total.dtype) * gradient)

    def first() -> list[_types.Tensor]:
        return summed(lambda _, gradient: gradient)

    def further() -> list[_types.Tensor]:
        return summed(tf.add)

    if are_alike is None or not dense:
        results = weighted()
    elif tf.get_static_value(are_alike):
        results = tf.cond(is_first, first, further)
    else:
        branch = tf.where(are_alike, tf.where(is_first, 0, 1), 2)
        results = tf.switch_case(branch, [first, further, weighted])
    for i, result in zip(dense, results, strict=True):
        sums[i] = result
    return sums


def _add_slices(
    total: Accumulator, gradient: tf.IndexedSlices | None, weight: _types.Tensor
) -> Accumulator:
    """The accumulator with weighted slices, or None, added."""
    if gradient is None:
        return total
    if not isinstance(total, list):
        values = tf.cast(weight, total.dtype) * tf.cast(gradient.values, total.dtype)
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, tf.newaxis], values)
    sums = []
    parts = table_rows.parts(gradient, len(total))
    for part, (values, indices) in zip(total, parts, strict=True):
        if "positions" in part:
            size = tf.cast(gradient.dense_shape[0], tf.int64)
            indices = table_rows.with_positions(indices, len(total), size)
        sums.append(_add_part(part, values, indices, weight))
    return sums


def _add_part(
    part: _Part, values: _types.Tensor, indices: _types.Tensor, weight: _types.Tensor | float
) -> _Part:
    dtype = part["values"].dtype
    values = tf.cast(weight, dtype) * tf.cast(values, dtype)
    indices = tf.cast(indices, tf.int64)
    if "count" not in part:
        # The first micro-batch tells how many rows there are.
        is_first = tf.equal(tf.size(part["indices"]), 0)
        sums = tf.cond(is_first, lambda: values, lambda: part["values"] + values)
        return {"indices": indices, "values": tf.ensure_shape(sums, [None, *sums.shape[1:]])}
    k, name = part["count"], "positions" if "positions" in part else "indices"
    return {
        "count": k + 1,
        name: part[name].write(k, indices),
        "values": part["values"].write(k, values),
    }


def result(
    total: Accumulator, variable: keras.Variable, rows: Sequence[Rows] = ()
) -> _types.Gradient:
    """The accumulated gradient: a tensor, or `tf.IndexedSlices` whose indices are keys."""
    if not rows:
        return total
    size = variable.shape[0]
    values, keys = [], []
    for i, part in enumerate(total):
        if "count" in part:
            part = _concatenated(part, variable)
        values.append(part["values"])
        keys.append(table_rows.keys(part[_index_name(rows[i])], i, rows, size))
    if len(rows) > 1:
        values, keys = [tf.concat(values, 0)], [tf.concat(keys, 0)]
    return tf.IndexedSlices(values[0], keys[0], tf.constant(variable.shape.as_list(), tf.int64))


def _concatenated(part: _Part, variable: keras.Variable) -> _Part:
    if tf.executing_eagerly() and part["count"] == 0:
        # Eagerly, TensorFlow cannot concatenate an empty array.
        no_values = tf.zeros([0, *variable.shape[1:]], part["values"].dtype)
        part = _add_part(part, no_values, tf.zeros([0], tf.int64), 1)
    return {name: array.concat() for name, array in part.items() if name != "count"}


def values(gradient: _types.Gradient) -> _types.Tensor:
    """The values of a gradient, dense or of rows."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def map_values(
    function: Callable[[_types.Tensor], _types.Tensor], gradient: _types.Gradient | None
) -> _types.Gradient | None:
    """A gradient with `function` of its values; None for None."""
    if not isinstance(gradient, tf.IndexedSlices):
        return None if gradient is None else function(gradient)
    return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)


def squared_norm(gradient: _types.Gradient, factor: _types.Tensor, compiled: bool) -> _types.Tensor:
    """The sum of the squares of `factor * gradient`, float32 or wider.

    Args:
        gradient: dense, or with several rows of the same index.
        factor: float scalar.
        compiled: whether XLA compiles it.
    """
    dtype = dtype_for(gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        values, indices, size = gradient.values, gradient.indices, gradient.dense_shape[0]
        if not compiled:
            # Only as many rows as there are distinct ones; XLA must know their number.
            unique, indices = tf.unique(indices)
            size = tf.size(unique)
        gradient = tf.math.unsorted_segment_sum(tf.cast(values, dtype), indices, size)
    return tf.reduce_sum(tf.square(tf.cast(gradient, dtype) * tf.cast(factor, dtype)))
