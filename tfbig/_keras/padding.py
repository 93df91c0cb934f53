"""Batches of one size for TPUs, whose programs have fixed shapes."""

import functools
import typing

import keras
import tensorflow as tf

from tfbig import errors
from tfbig._keras.data import batch_size

__all__ = ("PaddedBatch", "check_divides", "data_of", "fix_batches", "without_padding")


class PaddedBatch(typing.NamedTuple):
    """A batch of which only the first samples count.

    Attributes:
        data: structure of tensors `(batch, ...)`.
        counted: int32 vector `(batch,)`: 1 for a sample, then 0 for what only fills the batch.
            Cut over replicas like the data, so that each knows how many samples it has.
    """

    data: typing.Any
    counted: tf.Tensor


def check_divides(size, replicas):
    """Raises if a batch of so many samples is not the same number for each replica."""
    if size % replicas:
        larger = -(-size // replicas) * replicas
        smaller = f"{larger - replicas} or " if larger > replicas else ""
        raise errors.InvalidOptionError(
            f"On a TPU, a batch must divide by the cores, of which there are {replicas}. Received: "
            f"batch_size={size}. Use {smaller}{larger}."
        )


def fix_batches(iterator, size, strategy):
    """Has an epoch iterator of Keras yield batches of one size.

    Where the last batch of an epoch may be smaller, all become `PaddedBatch`.

    Args:
        iterator: the epoch iterator of a `fit` or `evaluate` that begins.
        size: int, samples of a batch; None if that is not known.
        strategy: `tf.distribute.Strategy`.

    Returns:
        Whether batches are padded.

    Raises:
        InvalidOptionError: If the size is not known, or does not divide by the replicas.
    """
    dataset = iterator.data_adapter.get_tf_dataset()
    if isinstance(dataset, tf.distribute.DistributedDataset):
        return False  # Of the user: it is cut over the replicas already.
    if size is None:
        raise errors.InvalidOptionError(
            "On a TPU, the batch size must be known before training. Received: data whose batch "
            "size is not. Use arrays, or a dataset with batch(n, drop_remainder=True)."
        )
    check_divides(size, strategy.num_replicas_in_sync)
    leaves = tf.nest.flatten(dataset.element_spec)
    tensors = [s for s in leaves if isinstance(s, tf.TensorSpec)]
    is_dense = all(s.shape.rank is not None for s in tensors) and not any(
        isinstance(s, tf.RaggedTensorSpec | tf.SparseTensorSpec) for s in leaves
    )
    if not is_dense:
        raise errors.UnsupportedModelError(
            "On a TPU, inputs must be dense tensors of fixed shapes. Received: a dataset of "
            f"{dataset.element_spec}. Use to_tensor(shape=...)."
        )
    if all(s.shape.rank and s.shape[0] == size for s in tensors):
        return False
    is_ragged = iterator.data_adapter.has_partial_batch is not False
    fix = functools.partial(_padded if is_ragged else _fixed, size=size)
    # `map` takes a tuple apart, also one that holds only the inputs.
    is_tuple = isinstance(dataset.element_spec, tuple)
    dataset = dataset.map(lambda *data: fix(data if is_tuple else data[0]))
    iterator._distributed_dataset = strategy.experimental_distribute_dataset(dataset)
    return is_ragged


def _fixed(data, size):
    """The batch, with a shape that says its size."""
    return keras.tree.map_structure(
        lambda v: tf.ensure_shape(v, [size, *v.shape[1:]]) if tf.is_tensor(v) else v, data
    )


def _padded(data, size):
    """The batch filled with zeros, as `PaddedBatch`."""
    missing = size - batch_size(data)

    def filled(value):
        if not tf.is_tensor(value):
            return value
        return tf.pad(value, [[0, missing]] + [[0, 0]] * (value.shape.rank - 1))

    counted = tf.cast(tf.range(size) < size - missing, tf.int32)
    return PaddedBatch(_fixed(keras.tree.map_structure(filled, data), size), counted)


def data_of(batch):
    """The data of a batch, padded or not, or of its specification."""
    return batch.data if isinstance(batch, PaddedBatch) else batch


def without_padding(data):
    """The data of a batch, and how many of its samples count: int32 scalar, or None for all."""
    if isinstance(data, PaddedBatch):
        return data.data, tf.reduce_sum(data.counted)
    return data, None
