"""Keras's `fit` has batches of one size; here each update may ask for a size of its own.

The size of a batch is asked for when its update begins, so that none that was prepared before has
another. Samples keep the order that Keras gives them: arrays are shuffled by Keras's own pipeline,
which hands over the indices of an epoch, and the batches of a dataset are joined and cut.
"""

from __future__ import annotations

import collections
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters import ArrayDataAdapter, TFDatasetAdapter, array_slicing
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.epoch_iterator import EpochIterator

from tfbig import _types, errors
from tfbig._keras import graph_errors
from tfbig._keras.batches import (
    batch_size,
    of_one_size,
    slice_samples,
    spec_of_any_size,
    without_optionals,
)
from tfbig._keras.shuffling import samples_at

__all__ = ("ResizedBatches", "ResizedData", "Sizes", "of", "resize")

# A step, the last step of the same execution, and the iterator that yields their batches.
_Execution: TypeAlias = tuple[int, int, "ResizedBatches"]


class Sizes(Protocol):
    """The size of each update of a `fit`.

    Attributes:
        largest: the largest of all sizes; None if that is not known.
        size: that of the last update.
        samples: how many were handed out in this `fit`.
        is_used: whether data have been resized for it.
    """

    largest: int | None
    size: int
    samples: int
    is_used: bool

    def begin(self) -> None:
        """Called before an epoch, when a backup has been restored."""

    def next(self) -> int:
        """The size of the next update, which begins now."""

    def updates_of(self, samples: int) -> int | None:
        """How many updates come of so many samples from now on; None if that is not known."""

    def state(self) -> dict[str, int]:
        """What a backup keeps."""

    def restore(self, state: dict[str, int]) -> None:
        """Continues after the update that a backup was taken after."""


def resize(
    iterator: EpochIterator, specs: _types.Structure, sizes: Sizes, strategy: _types.Strategy
) -> None:
    """Has an epoch iterator yield batches of the sizes that updates ask for.

    Args:
        iterator: the epoch iterator of a `fit` that is beginning.
        specs: the specification of its batches.
        sizes: the size of each update.
        strategy: the strategy of the model.

    Raises:
        InvalidOptionError: If its data cannot be resized.
    """
    adapter = iterator.data_adapter
    is_dataset = isinstance(adapter, TFDatasetAdapter) and isinstance(
        adapter.get_tf_dataset(), tf.data.Dataset
    )
    if not is_dataset and not isinstance(adapter, ArrayDataAdapter):
        raise errors.InvalidOptionError(
            "BatchSizeSchedule needs arrays or a tf.data.Dataset, whose samples it can count. "
            f"Received: data that Keras reads by {type(adapter).__name__}, or that are distributed "
            "already. Use tf.data.Dataset.from_generator(...), or leave the callback out."
        )
    if is_dataset and strategy.extended._in_multi_worker_mode():
        raise errors.InvalidOptionError(
            "BatchSizeSchedule needs arrays when there are several workers, of which each reads a "
            "part of a dataset of its own. Received: a tf.data.Dataset. Pass arrays, or use one "
            "worker with several replicas."
        )
    if any(s is not None and s.shape.rank == 0 for s in keras.tree.flatten(specs)):
        raise errors.InvalidOptionError(
            "BatchSizeSchedule needs a dataset of batches, which it joins and cuts. Received: a "
            f"dataset of {specs}. Use dataset.batch(n), with any n."
        )
    iterator.data_adapter = ResizedData(iterator, adapter, specs, sizes)


def of(iterator: EpochIterator | None) -> ResizedData | None:
    """What `resize` has put into an epoch iterator, or None."""
    adapter = None if iterator is None else iterator.data_adapter
    return adapter if isinstance(adapter, ResizedData) else None


class ResizedData(DataAdapter):  # type: ignore[misc]  # Keras has no types.
    """The data of a `fit`, in place of those that Keras has batched.

    Args:
        iterator: the epoch iterator.
        adapter: the adapter that Keras made for the data.
        specs: the specification of its batches.
        sizes: the size of each update.
    """

    def __init__(
        self, iterator: EpochIterator, adapter: DataAdapter, specs: _types.Structure, sizes: Sizes
    ) -> None:
        # It refers to this: together they would keep the data until garbage is collected.
        self._iterator = weakref.proxy(iterator)
        self._sizes = sizes
        self.specs = keras.tree.map_structure(_of_any_size, specs)
        # The samples of an epoch; None if they are not known.
        self._samples: int | None = None
        self._finish: Callable[[_types.Structure], _types.Structure] = without_optionals
        if isinstance(adapter, ArrayDataAdapter):
            self._samples = adapter._num_samples
            self._dataset, self._finish = _indices_and_arrays(adapter)
        else:
            self._dataset = adapter.get_tf_dataset()
        sizes.is_used = True
        # How many times the data were begun, and how they stand now.
        self._begun = 0
        self._batches: ResizedBatches | None = None
        # The batch that a resumed epoch begins with.
        self._first = 0
        # Of Keras's class it keeps only what makes an iterator.
        iterator._distributed_dataset = self._dataset
        iterator._enumerate_iterator = self._epoch

    # --- What Keras asks for ----------------------------------------------------

    def get_tf_dataset(self) -> _types.Dataset:
        return self._dataset

    @property
    def num_batches(self) -> int | None:
        return None  # It differs between epochs.

    @property
    def batch_size(self) -> int | None:
        return self._sizes.largest

    @property
    def has_partial_batch(self) -> bool | None:
        return None

    @property
    def partial_batch_size(self) -> int | None:
        return None

    # --- An epoch ---------------------------------------------------------------

    def steps_of_epoch(self) -> int | None:
        """The number of steps of the epoch that is beginning; None if it is not known."""
        if self._iterator.steps_per_epoch:
            return int(self._iterator.steps_per_epoch)
        if self._samples is None:
            return None
        read = self._batches.read if self._first and self._batches is not None else 0
        steps = self._sizes.updates_of(self._samples - read)
        return None if steps is None else self._first + steps

    def _epoch(self) -> Iterator[_Execution]:
        """Replaces `EpochIterator._enumerate_iterator`."""
        limit, each = self._iterator.steps_per_epoch, self._iterator.steps_per_execution
        first, self._first = self._first, 0
        # With steps_per_epoch, an epoch continues where the last one stopped.
        if not first and (not limit or self._batches is None or self._batches.is_at_end()):
            self._batches = self._begin()
            if self._batches.is_at_end():
                raise errors.InvalidOptionError(graph_errors.NO_SAMPLES)
        assert self._batches is not None
        for step in itertools.count(first, each):
            if limit and step >= limit:
                break
            if self._batches.is_at_end():
                if limit:
                    self._iterator._interrupted_warning()
                break
            yield step, step + each - 1, self._batches

    def _begin(self) -> ResizedBatches:
        self._begun += 1
        pieces = iter(self._iterator._get_iterator())
        return ResizedBatches(pieces, self._finish, self._sizes, self.specs)

    # --- Backups ----------------------------------------------------------------

    def state(self) -> dict[str, int]:
        """Where the data stand, for `resume`."""
        read = 0 if self._batches is None else self._batches.read
        return {"begun": self._begun, "read": read, **self._sizes.state()}

    def resume(self, batches: int, state: dict[str, int]) -> None:
        """Moves the data of the `fit` that is beginning to where an earlier one stopped.

        Args:
            batches: how many batches of the epoch to resume are consumed.
            state: what `state` returned.
        """
        state = dict(state)
        begun, read = state.pop("begun"), state.pop("read")
        self._sizes.restore(state)
        self._first = batches
        continues = bool(batches or self._iterator.steps_per_epoch)
        # Iterators of complete passes, which advance the seeds; nothing is read.
        for _ in range(begun - continues):
            self._begin()
        if continues and begun:
            self._batches = self._begin()
            self._batches.skip(read)


class ResizedBatches:
    """One pass over the data, in batches of the sizes that updates ask for.

    Args:
        pieces: iterator of structures of samples, in any number each.
        finish: makes a batch of the samples that were joined.
        sizes: the size of each update.
        specs: the specification of a batch, of any size.

    Attributes:
        read: how many samples were handed out, or skipped.
    """

    def __init__(
        self,
        pieces: Iterator[_types.Structure],
        finish: Callable[[_types.Structure], _types.Structure],
        sizes: Sizes,
        specs: _types.Structure,
    ) -> None:
        self.read = 0
        self.specs = specs
        self.sizes = sizes
        self._pieces = pieces
        self._finish = finish
        # What is left of a piece: the piece, where that begins, and where it ends.
        self._left: tuple[_types.Structure, int, int] | None = None

    def __iter__(self) -> Iterator[_types.Structure]:
        return self

    def __next__(self) -> _types.Structure:
        if self.is_at_end():
            raise StopIteration
        before = self.read
        # Beside a GPU, which would be given each part for itself.
        with tf.device("CPU:0"):
            batch = self._finish(_joined(list(self._take(self.sizes.next()))))
        self.sizes.samples += self.read - before
        return batch

    def is_at_end(self) -> bool:
        """Whether no sample is left."""
        while self._left is None:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            piece = of_one_size(without_optionals(piece))
            if samples := int(batch_size(piece)):
                self._left = piece, 0, samples
        return False

    def skip(self, samples: int) -> None:
        """Leaves out so many samples."""
        collections.deque(self._take(samples), maxlen=0)

    def _take(self, samples: int) -> Iterator[_types.Structure]:
        """The next samples, in parts; fewer at the end of the data."""
        while samples > 0 and not self.is_at_end():
            assert self._left is not None
            piece, begin, end = self._left
            taken = min(samples, end - begin)
            self._left = (piece, begin + taken, end) if begin + taken < end else None
            samples -= taken
            self.read += taken
            yield piece if taken == end and not begin else _cut(piece, begin, taken)


def _cut(piece: _types.Structure, begin: int, samples: int) -> _types.Structure:
    """So many samples of a piece, as `slice_samples`, with few operations."""

    def part(value: _types.Structure) -> _types.Structure:
        if isinstance(value, tf.SparseTensor):
            return slice_samples(value, begin, samples)
        return None if value is None else value[begin : begin + samples]

    return keras.tree.map_structure(part, piece)


def _joined(parts: list[_types.Structure]) -> _types.Structure:
    """The samples of several structures in one."""
    if len(parts) == 1:
        return parts[0]

    def join(*values: _types.Structure) -> _types.Structure:
        if values[0] is None:
            return None
        if isinstance(values[0], tf.SparseTensor):
            return tf.sparse.concat(0, list(values))
        return tf.concat(list(values), 0)

    try:
        return keras.tree.map_structure(join, *parts)
    except (tf.errors.InvalidArgumentError, ValueError) as e:
        shapes = [keras.tree.map_structure(lambda v: getattr(v, "shape", None), p) for p in parts]
        raise errors.InvalidOptionError(
            "BatchSizeSchedule joins batches of the dataset, whose samples must all have one "
            f"shape. Received: batches of the shapes {shapes}. Pad them to a fixed shape, or use "
            "ragged tensors."
        ) from e


def _of_any_size(spec: _types.Structure) -> _types.Structure:
    if isinstance(spec, tf.RaggedTensorSpec):
        shape = [None, *spec.shape[1:]]
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec([None, *spec.shape[1:]], spec.dtype)
    return spec_of_any_size(spec)


def _indices_and_arrays(
    adapter: ArrayDataAdapter,
) -> tuple[_types.Dataset, Callable[[_types.Structure], _types.Structure]]:
    """A dataset of the indices of each epoch's samples, and what makes samples of indices."""
    samples = adapter._num_samples
    indices = ArrayDataAdapter(np.arange(samples), batch_size=samples, shuffle=adapter._shuffle)
    inputs = array_slicing.convert_to_sliceable(adapter._inputs, target_backend="tensorflow")
    # As tensors, the way that Keras makes them.
    with tf.device("CPU:0"):
        arrays = next(iter(tf.data.Dataset.from_tensors(keras.tree.lists_to_tuples(inputs))))

    def finish(indices: _types.Structure) -> _types.Structure:
        # Keras's adapter makes a tuple of the inputs.
        return samples_at(keras.tree.flatten(indices)[0], arrays)

    return indices.get_tf_dataset(), finish


_begin_epoch_of_keras = keras.callbacks.ProgbarLogger.on_epoch_begin


def _begin_epoch(
    self: keras.callbacks.ProgbarLogger, epoch: int, logs: _types.Logs | None = None
) -> None:
    # Keras expects all epochs to have as many steps as the first.
    data = of(getattr(self.model, "_epoch_iterator", None))
    if data is not None:
        self.target = data.steps_of_epoch()
    _begin_epoch_of_keras(self, epoch, logs)


keras.callbacks.ProgbarLogger.on_epoch_begin = _begin_epoch
