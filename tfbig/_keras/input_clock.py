"""How long training waits for data."""

import collections
import math

import tensorflow as tf
from tensorflow.python.framework import config

__all__ = ("InputClock", "timed")


class InputClock:
    """The seconds that each call of a train function waited for data, for several readers.

    Attributes:
        readers: dictionary of str, the name of a reader, to what it has not read yet.
    """

    def __init__(self):
        self.readers: dict[str, collections.deque] = {}

    def add(self, seconds):
        """Adds a call: float seconds, or a scalar tensor that may not be computed yet."""
        for waits in self.readers.values():
            waits.append(seconds)

    def reader(self, name):
        """A function that returns the seconds of the next call, a float; zero if there is none."""
        waits = self.readers[name] = collections.deque()
        return lambda: float(waits.popleft()) if waits else 0.0


def timed(get_next, is_wanted):
    """What a function that reads a batch returns, and the seconds that takes; in a graph or not.

    NaN where they are not wanted, and with deterministic operations, among which TensorFlow has
    no clock.
    """
    if not is_wanted or config.is_op_determinism_enabled():
        return get_next(), tf.constant(math.nan, tf.float64)
    begin = tf.timestamp()
    with tf.control_dependencies([begin]):
        batch = get_next()
    parts = [t for t in tf.nest.flatten(batch, expand_composites=True) if tf.is_tensor(t)]
    with tf.control_dependencies(parts):
        return batch, tf.timestamp() - begin
