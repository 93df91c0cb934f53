"""The rows of a table's gradient: which of them the whole batch has, however it is split.

The gradient of a table that is looked up is a `tf.IndexedSlices`, a row for each look-up. Keras's
optimizers square each row for itself, so it matters which look-ups share one. In the whole batch

- a look-up for each sample, as of tokens, has a row for each: micro-batches add rows (`KEPT`);
- a look-up that does not depend on the batch, as of positions, has as many rows as indices,
  whatever the number of samples: micro-batches add up row by row (`SHARED`);
- a look-up of the distinct indices of the batch, as that of sparse inputs, has a row for each
  index: rows of one index are added up (`DISTINCT`).

A table may be looked up several times, of which the gradient holds one part each. Where the
look-ups of a table cannot be told apart, its gradient is added up as that of a dense weight.

Rows travel under keys, which say which of them are one: the index; beyond the table's size, also
the part, and the position in it.
"""

import enum
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfbig import _keras
from tfbig._update import batch_dependence

__all__ = ("Rows", "add_up", "classify", "keys", "parts", "with_positions")


class Rows(enum.Enum):
    """What micro-batches and replicas do with the rows of one look-up."""

    KEPT = enum.auto()
    SHARED = enum.auto()
    # Shared, of as many positions as the micro-batch has, such as the longest of its samples.
    SHARED_OF_ANY_LENGTH = enum.auto()
    DISTINCT = enum.auto()


def _index_parts(indices: tf.Tensor) -> list[tf.Tensor]:
    """The indices of each look-up; TensorFlow puts them one behind the other."""
    op = indices.op
    if op.type == "ConcatV2":
        return [part for t in op.inputs[:-1] for part in _index_parts(t)]
    if op.type in ("Cast", "Identity"):
        inner = _index_parts(op.inputs[0])
        return inner if len(inner) > 1 else [indices]
    return [indices]


def classify(
    gradient: Any, dependences: batch_dependence.Dependences
) -> tuple[Rows, ...] | batch_dependence.Mixed:
    """What becomes of the rows of each look-up of a gradient.

    Args:
        gradient: `tf.IndexedSlices` of a graph.
        dependences: `Dependences` of that graph.

    Returns:
        A tuple of `Rows`, in the order of the parts; or what cannot be followed.
    """
    found: list[Rows] = []
    for indices in _index_parts(gradient.indices):
        dependence = dependences.of(indices)
        if dependence is batch_dependence.CONSTANT:
            has_length = indices.shape[0] is not None
            found.append(Rows.SHARED if has_length else Rows.SHARED_OF_ANY_LENGTH)
        elif dependence is batch_dependence.DISTINCT:
            found.append(Rows.DISTINCT)
        elif isinstance(dependence, batch_dependence.Samples):
            found.append(Rows.KEPT)
        elif isinstance(dependence, batch_dependence.Mixed):
            return dependence
        else:
            return batch_dependence.Mixed(indices.op.type)
    # One part serves all that are kept.
    return (Rows.KEPT,) if set(found) == {Rows.KEPT} else tuple(found)


def parts(gradient: tf.IndexedSlices, number: int) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Pairs of values and indices, one for each part of a gradient."""
    if number == 1:
        return [(gradient.values, gradient.indices)]
    indices = _index_parts(gradient.indices)
    values = tf.split(gradient.values, [tf.size(i) for i in indices], num=number)
    return list(zip(values, indices, strict=True))


def with_positions(indices: tf.Tensor, number: int, size: int) -> tf.Tensor:
    """The keys of rows that are one where index and position are the same.

    Args:
        indices: integer vector.
        number: int, of how many parts they are one.
        size: int, rows of the table.
    """
    positions = tf.range(tf.size(indices, tf.int64), dtype=tf.int64)
    return tf.cast(indices, tf.int64) + size * number * positions


def keys(indices: tf.Tensor, part: int, rows: Sequence[Rows], size: int) -> tf.Tensor:
    """The keys of the rows of one part.

    Args:
        indices: integer vector; of any length, what `with_positions` returned.
        part: int, which part it is.
        rows: `Rows` of each part.
        size: int, rows of the table.
    """
    indices = tf.cast(indices, tf.int64)
    if rows[part] is Rows.SHARED:
        indices = with_positions(indices, len(rows), size)
    return indices + size * part


def add_up(
    gradient: tf.IndexedSlices, rows: Sequence[Rows], size: int, replicas: int
) -> tf.IndexedSlices:
    """The gradient with its rows of one key added up, under their indices.

    Args:
        gradient: `tf.IndexedSlices` whose indices are keys: of one replica, or of all.
        rows: `Rows` of each part.
        size: int, rows of the table.
        replicas: int, of how many replicas the rows are.
    """
    if set(rows) == {Rows.KEPT}:
        return gradient
    found = []
    for part, kind in enumerate(rows):
        values, key = gradient.values, gradient.indices
        if len(rows) > 1:
            is_of_part = tf.equal(key // size % len(rows), part)
            values, key = tf.boolean_mask(values, is_of_part), tf.boolean_mask(key, is_of_part)
        is_one_already = kind is Rows.KEPT or (kind is Rows.SHARED and replicas == 1)
        if not is_one_already:
            values, key = _sum_of_equal(values, key, size, is_checked=kind is not Rows.DISTINCT)
        found.append((values, key % size))
    values, indices = (tf.concat(x, 0) for x in zip(*found, strict=True))
    return tf.IndexedSlices(values, indices, gradient.dense_shape)


def _sum_of_equal(
    values: tf.Tensor, key: tf.Tensor, size: int, is_checked: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    unique, places, counts = tf.unique_with_counts(key)
    if is_checked:
        # Positions in sequences of several lengths mean other things, unless each index has one.
        is_same = tf.reduce_all(tf.equal(counts, counts[:1]))
        is_one = tf.equal(tf.size(tf.unique(unique % size)[0]), tf.size(unique))
        assertion = tf.debugging.Assert(is_same | is_one, [_keras.graph_errors.LENGTHS_DIFFER])
        with tf.control_dependencies([] if assertion is None else [assertion]):
            unique = tf.identity(unique)
    return tf.math.unsorted_segment_sum(values, places, tf.size(unique)), unique


def warn_of_added_rows(path: str, operation: str) -> None:
    """Says that the rows of a table's gradient are added up."""
    warnings.warn(
        f"The look-ups of {path!r} cannot be followed ({operation}), so the rows of its gradient "
        "are added up. Optimizers that square gradients, such as Adam, then make another update "
        "than Keras for the whole batch, where each look-up is squared. Compute the indices from "
        "each sample alone, or from no sample.",
        stacklevel=2,
    )
