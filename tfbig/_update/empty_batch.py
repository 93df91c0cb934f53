"""Batches without samples: one replica's share may be empty, the whole batch may not."""

from __future__ import annotations

import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._update import replicas

__all__ = ("refuse_empty_data", "refuse_without_active_replicas")


def refuse_empty_data(data: _types.Structure) -> _types.Structure:
    """The data of the only replica, refused if it holds no sample.

    With several replicas the data is returned as it is: only the exchange tells whether every
    share is empty.
    """
    if replicas.count() > 1:
        return data
    samples = _keras.batches.batch_size(data)
    if isinstance(samples, int) and samples == 0:
        raise errors.InvalidOptionError(_keras.graph_errors.NO_SAMPLES)
    # Without the dependency, the update could run before the assertion fails.
    assertion = tf.debugging.assert_positive(samples, _keras.graph_errors.NO_SAMPLES)
    with tf.control_dependencies([assertion]):
        return tf.nest.map_structure(
            lambda v: v if v is None else tf.identity(v), data, expand_composites=True
        )


def refuse_without_active_replicas(
    weight: _types.Tensor, active_replicas: _types.Tensor
) -> _types.Tensor:
    """The weight of the whole batch, refused if no replica had a sample."""
    assertion = tf.debugging.assert_positive(active_replicas, _keras.graph_errors.NO_SAMPLES)
    with tf.control_dependencies([assertion]):
        return tf.identity(weight)
