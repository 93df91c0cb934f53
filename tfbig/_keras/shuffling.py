"""Keras shuffles arrays unrepeatably, or all epochs alike; here each epoch has a seeded order."""

import contextlib
import random
import warnings

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.epoch_iterator import EpochIterator
from tensorflow.python.eager import context as tf_context

from tfbig import _types
from tfbig._keras.thread import current, holding


def global_seed() -> int | None:
    """The seed of `tf.random.set_seed` or `keras.utils.set_random_seed`, or None."""
    seed: int | None = tf_context.global_seed()
    return seed


def new_seed() -> int:
    """A seed to shuffle by: the global one, else one from the system's entropy."""
    seed = global_seed()
    return random.SystemRandom().getrandbits(62) if seed is None else seed


def reseeded_shuffling(seed: int) -> contextlib.AbstractContextManager[None]:
    """A context in which `fit` on arrays shuffles by this seed, differently in each epoch.

    Keras uses the same order in every epoch once a seed is set, and an order that cannot be
    repeated if none is. `reseed` does the same for a `PyDataset`.
    """
    return holding("shuffle_seed", seed)


_get_tf_dataset = ArrayDataAdapter.get_tf_dataset


def _reseeded_tf_dataset(self: ArrayDataAdapter) -> _types.Dataset:
    seed = current("shuffle_seed")
    if seed is None or not self._shuffle:
        return _get_tf_dataset(self)
    inputs = array_slicing.convert_to_sliceable(self._inputs, target_backend="tensorflow")
    inputs = keras.tree.lists_to_tuples(inputs)

    def permutation(digits: _types.Tensor) -> _types.Tensor:
        # Each iteration over the dataset has its own, which depends on how many came before.
        key = tf.stack([seed, tf.reduce_sum(digits * [1, 2**10, 2**20, 2**30])])
        indices = tf.range(self._num_samples, dtype=tf.int64)
        if self._shuffle != "batch":
            return tf.random.experimental.stateless_shuffle(indices, key)
        # As in Keras: the samples of each batch among themselves.
        places = tf.random.stateless_uniform([self._num_samples], key, dtype=tf.float64)
        batch = tf.cast(indices // self._batch_size, tf.float64)
        return tf.cast(tf.argsort(batch + places), tf.int64)

    def batches(indices: _types.Tensor) -> _types.Dataset:
        return tf.data.Dataset.from_tensor_slices(indices).batch(self._batch_size)

    # `shuffle` draws when an iterator is made, `Dataset.random` when it is first read: with
    # replicas, that happens in the background, and iterators that Keras drops unread race.
    keys = tf.data.Dataset.range(2**10).shuffle(2**10, seed).batch(4).take(1)
    whole = tf.data.Dataset.from_tensors(inputs).repeat()
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return (
        tf.data.Dataset.zip(keys.map(permutation).flat_map(batches), whole)
        .map(samples_at, num_parallel_calls=tf.data.AUTOTUNE)
        .with_options(options)
        .prefetch(tf.data.AUTOTUNE)
    )


def samples_at(indices: _types.Tensor, arrays: _types.Structure) -> _types.Structure:
    """The samples of (nested) arrays at these indices."""

    def part(value: _types.Structure) -> _types.Structure:
        if isinstance(value, array_slicing.TensorflowSparseWrapper):
            return array_slicing.slice_tensorflow_sparse_wrapper(value, indices)
        if isinstance(value, list | tuple | dict):
            return None  # `traverse` descends into it.
        return tf.gather(value, indices) if tf.is_tensor(value) else value

    return keras.tree.traverse(part, arrays)


ArrayDataAdapter.get_tf_dataset = _reseeded_tf_dataset


class _InOrder:
    """The batches of a `PyDataset`, in an order of its own for each epoch.

    Args:
        dataset: the `PyDataset`, of a known number of batches.
        seed: what it is shuffled by.
    """

    def __init__(self, dataset: keras.utils.PyDataset, seed: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, 0
        self._shuffle()

    def _shuffle(self) -> None:
        # A global seed may be negative.
        generator = np.random.default_rng([self._seed % 2**64, self._epoch])
        self._order = generator.permutation(self.num_batches)

    @property
    def num_batches(self) -> int:
        number: int = self._dataset.num_batches
        return number

    def __getitem__(self, index: int) -> _types.Structure:
        return self._dataset[int(self._order[index])]

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()
        # Not when the next epoch begins: Keras's threads may read before that.
        self._epoch += 1
        self._shuffle()


def reseed(iterator: EpochIterator) -> None:
    """Has the epoch iterator of a `fit` shuffle the batches of a `PyDataset` by the seed.

    Args:
        iterator: the epoch iterator, before its first epoch.
    """
    seed, adapter = current("shuffle_seed"), iterator.data_adapter
    if seed is None or not isinstance(adapter, PyDatasetAdapter) or adapter.num_batches is None:
        return  # What has no end, Keras does not shuffle.
    if iterator.steps_per_epoch and not adapter.shuffle and adapter.enqueuer is not None:
        warnings.warn(
            "With `steps_per_epoch`, the threads of a PyDataset with workers > 1 read ahead, and "
            "what they have read comes first in the next epoch: when training resumes, or on "
            "another worker, other batches may follow. Leave `steps_per_epoch` out, or pass "
            "workers=1 to the PyDataset.",
            stacklevel=2,
        )
        return
    if not adapter.shuffle:
        return
    if iterator.steps_per_epoch:
        warnings.warn(
            "With `steps_per_epoch`, `fit` shuffles the batches of a PyDataset in an order that "
            "cannot be repeated, when training resumes or on another worker. Leave "
            "`steps_per_epoch` out, or pass shuffle=False.",
            stacklevel=2,
        )
        return
    adapter.py_dataset, adapter.shuffle = _InOrder(adapter.py_dataset, seed), False
    if adapter.enqueuer is not None:
        adapter.enqueuer.py_dataset, adapter.enqueuer.shuffle = adapter.py_dataset, False
