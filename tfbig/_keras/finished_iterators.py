"""Keras stands still between epochs until a thread of TensorFlow wakes up; here it does not wait.

A thread of `tf.data` tunes an iterator while it is read. Between two looks it sleeps: 10 ms, then
20, 40 and so on, up to a minute. Letting go of the iterator wakes the thread and waits for its end,
but in TensorFlow 2.21 the thread may look whether it shall end just before it is told so, and go
back to sleep: often at most ends of epochs, validations and predictions. Training then stands still
for up to as long as the epoch has taken, and at most for a minute.

So in a `fit`, `evaluate` or `predict` of tfbig,

- what Keras makes of arrays and generators is not tuned. All there is to tune is how many batches
  are prepared at the same time; that stays as tuning begins, with one on each core, at most 16.
- datasets of users are tuned, but another thread lets go of their iterators, and waits.
"""

import atexit
import contextlib
import functools
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.trainers.data_adapters import (
    ArrayDataAdapter,
    GeneratorDataAdapter,
    PyDatasetAdapter,
)
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from tfbig import _types
from tfbig._keras.thread import current, holding

# Two suffice while epochs take equally long: nothing sleeps for longer than an iterator was read.
_THREADS = 4


def released() -> contextlib.AbstractContextManager[None]:
    """A context in which Keras does not wait for the end of the iterators that it makes."""
    return holding("releases_iterators", True)


class _Releaser:
    """Threads that let go of what finished iterators hold."""

    def __init__(self) -> None:
        # A finalizer may run at any point of a thread, even within `put` of another kind of queue.
        self._finished: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        self._taken = threading.Condition()
        self._threads: list[threading.Thread] = []

    def watch(self, iterator: Iterator[_types.Structure]) -> None:
        """Releases on another thread what an iterator holds, once nothing refers to the iterator.

        Waits while many have not ended, so that they do not pile up.
        """
        with self._taken:
            if not self._threads:
                self._start()
            self._taken.wait_for(lambda: self._finished.qsize() < _THREADS)
        # The dictionary outlives the iterator, and with it the resources and the dataset.
        weakref.finalize(iterator, self._finished.put, vars(iterator)).atexit = False

    def _start(self) -> None:
        self._threads = [
            threading.Thread(target=self._release, name=f"tfbig-release-{i}", daemon=True)
            for i in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()
        # While TensorFlow is still there: it must outlive all iterators.
        atexit.register(self._stop)

    def _release(self) -> None:
        while True:
            finished = self._finished.get()
            with self._taken:
                self._taken.notify_all()
            if finished is None:
                return
            # Not `del`: the iterator that ends may still refer to its dictionary, and would be the
            # last to do so. Waits without Python's lock.
            finished.clear()

    def _stop(self) -> None:
        for _ in self._threads:
            self._finished.put(None)
        for thread in self._threads:
            thread.join()


_releaser = _Releaser()

_get_iterator = TFEpochIterator._get_iterator


def _get_watched_iterator(self: TFEpochIterator) -> _types.Dataset | Iterable[_types.Structure]:
    dataset = _get_iterator(self)
    if not current("releases_iterators"):
        return dataset
    if _stays_unread(self):
        return ()
    iterator = iter(dataset)
    _releaser.watch(iterator)
    return iterator


def _stays_unread(iterator: TFEpochIterator) -> bool:
    """Whether Keras asks for an iterator over arrays that it will never read.

    It asks at the end of an epoch, and again when the next begins. Each takes some 10 ms. Over
    other data, and where tfbig shuffles, making an iterator may advance a seed.
    """
    return (
        isinstance(iterator.data_adapter, ArrayDataAdapter)
        and current("shuffle_seed") is None
        and iterator.steps_per_epoch is None
        and iterator._current_iterator is not None
        and iterator._steps_seen >= iterator._num_batches
    )


TFEpochIterator._get_iterator = _get_watched_iterator

_UNTUNED = tf.data.Options()
_UNTUNED.autotune.enabled = False


def _leave_untuned(adapter_class: type[DataAdapter]) -> None:
    """Has the datasets of an adapter class of Keras not be tuned."""
    get_tf_dataset = adapter_class.get_tf_dataset

    @functools.wraps(get_tf_dataset)
    def get_untuned_dataset(self: DataAdapter) -> _types.Dataset:
        dataset = get_tf_dataset(self)
        return dataset.with_options(_UNTUNED) if current("releases_iterators") else dataset

    adapter_class.get_tf_dataset = get_untuned_dataset


for _adapter_class in (ArrayDataAdapter, GeneratorDataAdapter, PyDatasetAdapter):
    _leave_untuned(_adapter_class)
