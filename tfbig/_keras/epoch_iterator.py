"""Keras's `EpochIterator` cannot start mid-epoch; here it is moved to where a `fit` stopped."""

import collections
from collections.abc import Iterator
from typing import TypeAlias

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.epoch_iterator import EpochIterator

from tfbig import _types
from tfbig._keras import datasets
from tfbig._keras.batches import specs_of_one_replica
from tfbig._keras.padding import data_of

# A step, the last step of the same execution, and the iterator that yields their batches.
_Execution: TypeAlias = tuple[int, int, Iterator[_types.Structure]]


def set_initial_epoch(model: keras.Model, epoch: int) -> None:
    """Makes the current `fit`, if it is just beginning, or the next one start with this epoch."""
    model._initial_epoch = epoch


def of_fit(model: keras.Model) -> EpochIterator:
    """The iterator of the `fit` that is beginning; to be called in `on_train_begin`."""
    return model._epoch_iterator


def effective_batch_size(iterator: EpochIterator) -> int | None:
    """The number of samples of a full batch, over all replicas; None if it is not known."""
    size: int | None = iterator.data_adapter.batch_size
    if size is None:
        dataset = iterator.data_adapter.get_tf_dataset()
        variant = getattr(dataset, "_variant_tensor", None)
        if variant is not None:
            size = int(tf.raw_ops.ComputeBatchSize(input_dataset=variant))
    return size if size is not None and size > 0 else None


def dataset_of(iterator: EpochIterator) -> _types.Dataset:
    """The dataset whose batches are trained on, distributed under a strategy."""
    return iterator._distributed_dataset


def specs_of(iterator: EpochIterator) -> _types.Structure:
    """The specification of the data of a replica's batch, as `fit` was given them."""
    return data_of(specs_of_one_replica(dataset_of(iterator)))


def is_generated(iterator: EpochIterator) -> bool:
    """Whether a generator makes the batches, so that each may be of any size."""
    adapter = iterator.data_adapter
    # Keras makes a generator of it; its items are batches by definition.
    if isinstance(adapter, PyDatasetAdapter):
        return False
    return datasets.is_generated(adapter.get_tf_dataset())


def batches_per_epoch(iterator: EpochIterator) -> int | None:
    """The number of batches of an epoch; None if it is not known."""
    batches: int | None = iterator._num_batches
    return batches


def resume(iterator: EpochIterator, epochs: int, batches: int, num_batches: int | None) -> None:
    """Moves the data of the `fit` that is beginning to where an earlier one stopped.

    Args:
        iterator: its epoch iterator.
        epochs: how many epochs are complete.
        batches: how many batches of the next epoch are consumed.
        num_batches: what `batches_per_epoch` returned in the earlier `fit`.
    """
    enumerate_epoch, adapter = iterator._enumerate_iterator, iterator.data_adapter
    # Make the iterators that the epochs made, which advances the seeds; nothing is read.
    if isinstance(adapter, PyDatasetAdapter) and not iterator.steps_per_epoch:
        # No iterators: Keras's threads would read batches, and hand them over in the next epoch.
        for _ in range(epochs):
            adapter.py_dataset.on_epoch_begin()
            adapter.py_dataset.on_epoch_end()
    elif iterator._num_batches is None and not iterator.steps_per_epoch:
        for _ in range(epochs):
            adapter.on_epoch_begin()
            iter(iterator._get_iterator())
            adapter.on_epoch_end()
    else:
        for _ in range(epochs):
            collections.deque(enumerate_epoch(), maxlen=0)
    if iterator._num_batches is None and not iterator.steps_per_epoch:
        # Keras itself sets it once the data have ended.
        iterator._num_batches = num_batches

    def rest_of_epoch() -> Iterator[_Execution]:
        iterator._enumerate_iterator = enumerate_epoch
        is_first = True
        for begin, end, data in enumerate_epoch():
            if is_first:
                # With steps_per_epoch, a single iterator serves all epochs.
                _skip(data, iterator._steps_seen - iterator.steps_per_execution)
                is_first = False
            if begin < batches:
                _skip(data, end + 1 - begin)
            else:
                yield begin, end, data

    iterator._enumerate_iterator = rest_of_epoch


def _skip(data: Iterator[_types.Structure], batches: int) -> None:
    for _ in range(batches):
        next(data, None)
