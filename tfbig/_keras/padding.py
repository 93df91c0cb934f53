"""Keras gives a TPU batches of several sizes, which its programs cannot take; here all have one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf
from keras.src.trainers.epoch_iterator import EpochIterator

from tfbig import _types, errors
from tfbig._keras.batches import batch_size

__all__ = ("PaddedBatch", "check_divides", "data_of", "fix_batch_size", "without_padding")


class PaddedBatch(NamedTuple):
    """A batch of which only the first samples count.

    Attributes:
        data: structure of tensors `(batch, ...)`.
        counted: int32 vector `(batch,)`: 1 for each sample, then 0 for each row of padding. Split
            over replicas like the data, so that each knows how many samples it has.
    """

    data: _types.Structure
    counted: _types.Tensor


def check_divides(size: int, replicas: int) -> None:
    """Raises if `size` samples cannot be shared out equally over the replicas."""
    if size % replicas:
        larger = -(-size // replicas) * replicas
        smaller = f"{larger - replicas} or " if larger > replicas else ""
        raise errors.InvalidOptionError(
            "On a TPU, the batch size must be divisible by the number of cores, which is "
            f"{replicas}. Received: batch_size={size}. Use {smaller}{larger}."
        )


def fix_batch_size(iterator: EpochIterator, size: int | None, strategy: _types.Strategy) -> bool:
    """Has an epoch iterator yield batches of one size.

    If the last batch of an epoch may be smaller, all become `PaddedBatch`.

    Args:
        iterator: the epoch iterator of a `fit` or `evaluate` that is beginning.
        size: samples of a batch; None if that is not known.
        strategy: the strategy of the model.

    Returns:
        Whether batches are padded.

    Raises:
        InvalidOptionError: If the size is not known, or not divisible by the replicas.
        UnsupportedModelError: If the inputs are not dense.
    """
    dataset = iterator.data_adapter.get_tf_dataset()
    if isinstance(dataset, tf.distribute.DistributedDataset):
        return False  # Made by the user, and shared out over the replicas already.
    if size is None:
        raise errors.InvalidOptionError(
            "On a TPU, the batch size must be known before training. Received: data of unknown "
            "batch size. Use arrays, or a dataset with batch(n, drop_remainder=True)."
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
    is_padded = iterator.data_adapter.has_partial_batch is not False
    fix: Callable[[_types.Structure], _types.Structure] = functools.partial(
        _padded if is_padded else _fixed, size=size
    )
    # `map` unpacks a tuple, even one that holds only the inputs.
    is_tuple = isinstance(dataset.element_spec, tuple)
    dataset = dataset.map(lambda *data: fix(data if is_tuple else data[0]))
    iterator._distributed_dataset = strategy.experimental_distribute_dataset(dataset)
    return is_padded


def _fixed(data: _types.Structure, size: int) -> _types.Structure:
    """The batch, with its size as a static shape."""
    return keras.tree.map_structure(
        lambda v: tf.ensure_shape(v, [size, *v.shape[1:]]) if tf.is_tensor(v) else v, data
    )


def _padded(data: _types.Structure, size: int) -> PaddedBatch:
    """The batch, filled up with zeros."""
    missing = size - batch_size(data)

    def filled(value: _types.Tensor) -> _types.Tensor:
        if not tf.is_tensor(value):
            return value
        return tf.pad(value, [[0, missing]] + [[0, 0]] * (value.shape.rank - 1))

    counted = tf.cast(tf.range(size) < size - missing, tf.int32)
    return PaddedBatch(_fixed(keras.tree.map_structure(filled, data), size), counted)


def data_of(batch: _types.Structure | PaddedBatch) -> _types.Structure:
    """The data of a batch, padded or not, or of its specification."""
    return batch.data if isinstance(batch, PaddedBatch) else batch


def without_padding(
    data: _types.Structure | PaddedBatch,
) -> tuple[_types.Structure, _types.Tensor | None]:
    """The data of a batch, and how many of its samples count: int32 scalar, or None for all."""
    if isinstance(data, PaddedBatch):
        return data.data, tf.reduce_sum(data.counted)
    return data, None
