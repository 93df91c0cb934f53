"""How long training waits for data."""

import collections
import math

import tensorflow as tf
from tensorflow.python.framework import config

__all__ = ("InputClock", "timed")


class InputClock:
    """The seconds that each call of a train function waited for data."""

    def __init__(self):
        self._waits: collections.deque = collections.deque()

    def add(self, seconds):
        """Adds a call: float seconds, or a scalar tensor that may not be computed yet."""
        self._waits.append(seconds)

    def pop(self):
        """The seconds of the first call that was not read yet, a float; zero if there is none."""
        return float(self._waits.popleft()) if self._waits else 0.0


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
