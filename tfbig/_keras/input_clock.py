"""Keras does not say how long training waits for data; here every read of a batch is timed."""

import collections
import math
from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.framework import config

from tfbig import _types

__all__ = ("InputClock", "timed")


class InputClock:
    """The seconds that each call of a train function waited for data, for several readers.

    Attributes:
        readers: the waits that each reader, by its name, has not read yet.
    """

    def __init__(self) -> None:
        self.readers: dict[str, collections.deque[float | _types.Tensor]] = {}

    def add(self, seconds: float | _types.Tensor) -> None:
        """Adds the wait of a call; a tensor need not be computed yet."""
        for waits in self.readers.values():
            waits.append(seconds)

    def reader(self, name: str) -> Callable[[], float]:
        """A function that returns the seconds of the next call; zero if there is none."""
        waits = self.readers[name] = collections.deque()
        return lambda: float(waits.popleft()) if waits else 0.0


def timed(
    get_next: Callable[[], _types.Structure], is_wanted: bool
) -> tuple[_types.Structure, _types.Tensor]:
    """A batch, read by `get_next`, and the seconds that this took; in a graph or not.

    The seconds are NaN if they are not wanted, and with deterministic operations, since TensorFlow
    has no deterministic clock.
    """
    if not is_wanted or config.is_op_determinism_enabled():
        return get_next(), tf.constant(math.nan, tf.float64)
    begin = tf.timestamp()
    with tf.control_dependencies([begin]):
        batch = get_next()
    parts = [t for t in tf.nest.flatten(batch, expand_composites=True) if tf.is_tensor(t)]
    with tf.control_dependencies(parts):
        return batch, tf.timestamp() - begin
