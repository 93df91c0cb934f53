"""The loop over micro-batches where the replicas exchange in each of them.

All replicas run it as often as the one that has most micro-batches. One that has fewer repeats a
micro-batch that does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import batch_split
from tfbig._update.batch_split import BatchSplit

__all__ = ("Step", "fold")

# Of a micro-batch, its size, what is carried, and whether it counts; returns what is carried on.
Step: TypeAlias = Callable[
    [_types.Structure, _types.Tensor, _types.Structure, _types.Tensor], _types.Structure
]


def fold(
    split: BatchSplit, data: _types.Structure, step: Step, carry: _types.Structure
) -> _types.Structure:
    """Calls `carry = step(micro_batch, size, carry, counts)`, as often on all replicas.

    In replica context.

    Args:
        split: how the data is split.
        data: nested structure of tensors, `(samples, ...)` each. May hold no sample.
        step: what is called.
        carry: structure of tensors.
    """
    samples = tf.convert_to_tensor(_keras.batches.batch_size(data), tf.int32)
    segments = split.segments(samples)
    (_, larges), (_, smalls) = segments
    own = tf.convert_to_tensor(larges + smalls, tf.int32)
    rounds = tf.reduce_max(_keras.collectives.all_gather(own[tf.newaxis]))
    data = _with_a_sample(data, samples)

    def body(k: _types.Tensor, carry: _types.Structure) -> tuple[_types.Tensor, _types.Structure]:
        i = tf.maximum(tf.minimum(k, own - 1), 0)
        begin, size = batch_split.bounds(segments, i)
        size = tf.maximum(size, 1)
        micro_batch = _keras.batches.slice_samples(data, begin, size)
        return k + 1, step(micro_batch, size, carry, k < own)

    def is_left(k: _types.Tensor, _: _types.Structure) -> _types.Tensor:
        return k < rounds

    return _keras.collectives.while_loop(is_left, body, (tf.constant(0), carry))[1]


def _with_a_sample(data: _types.Structure, samples: _types.Tensor) -> _types.Structure:
    """The data; of a replica that has none, one sample of zeros."""

    def filled(value: _types.Tensor | None) -> _types.Tensor | None:
        if value is None:
            return None
        if isinstance(value, tf.SparseTensor):
            shape = tf.concat([tf.maximum(value.dense_shape[:1], 1), value.dense_shape[1:]], 0)
            return tf.SparseTensor(value.indices, value.values, shape)
        if isinstance(value, tf.RaggedTensor):
            splits = value.row_splits
            splits = tf.cond(samples > 0, lambda: splits, lambda: tf.zeros([2], splits.dtype))
            return tf.RaggedTensor.from_row_splits(_of_known_shape(value.values, samples), splits)
        sample = tf.zeros(tf.concat([[1], tf.shape(value)[1:]], 0), value.dtype)
        return tf.ensure_shape(
            tf.cond(samples > 0, lambda: value, lambda: sample), [None, *value.shape[1:]]
        )

    return tf.nest.map_structure(filled, data)


def _of_known_shape(values: _types.Tensor, samples: _types.Tensor) -> _types.Tensor:
    """The values of a ragged tensor, of which tf.data drops the inner shape if there are none."""
    if isinstance(values, tf.RaggedTensor):
        return values.with_flat_values(_of_known_shape(values.flat_values, samples))
    shape = [0, *(size or 0 for size in values.shape[1:])]
    kept = tf.cond(samples > 0, lambda: values, lambda: tf.zeros(shape, values.dtype))
    return tf.ensure_shape(kept, values.shape)
