"""Notices that workers build different models.

A variable is made on all workers at once, with the value that the chief sends. Where the
variables differ in shape or type, TensorFlow fails with an error about collectives. A
worker that makes one more than the others waits inside of TensorFlow, for ever, while
they wait for it in `fit`. So each worker counts the variables that it makes; a thread
tells the others when one takes long, and shows what they make of it.
"""

import contextlib
import sys
import threading
import time

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as _context

from tfbig import errors

__all__ = ("find_stuck", "tell_stuck", "watch")

# Seconds after which a variable that is not made yet is told of.
PATIENCE = 3.0

# Milliseconds to look for something that may have been told, or not.
_LOOK = 50


class _Building:
    """The variables of this process.

    Attributes:
        count: int, how many were begun.
        since: float, when the one that is not complete was begun; None without one.
        what: str, which one it is.
    """

    count = 0
    since: float | None = None
    what = ""


def watch(strategy, names, index):
    """Begins to count the variables made under a strategy of several workers.

    Args:
        strategy: `tf.distribute.MultiWorkerMirroredStrategy`.
        names: tuple of str, those of the workers.
        index: int, which of them this is.
    """
    extended = strategy.extended
    create = extended._create_variable

    def counted(next_creator, **kwargs):
        _Building.count += 1
        _Building.what = f"{kwargs.get('name')} {_shape(kwargs)}".strip()
        _Building.since = time.monotonic()
        try:
            return create(next_creator, **kwargs)
        except tf.errors.OpError as e:
            if reason := _difference(names, index):
                raise errors.WorkersDisagreeError(reason) from e
            raise
        finally:
            _Building.since = None

    extended._create_variable = counted
    threading.Thread(target=_tell, args=(index,), daemon=True).start()


def _difference(names, index):
    """How the variable that could not be made differs on another worker, or None."""
    count, what = _Building.count, _Building.what
    _set(_key(index, count), what)
    others = [i for i in range(len(names)) if i != index]
    # TensorFlow may hold the other one, whose thread tells then what it waits for.
    deadline = time.monotonic() + 3 * PATIENCE
    while time.monotonic() < deadline:
        for i in others:
            if (other := _get(_key(i, count))) not in (None, what):
                reason = (
                    f"All workers must run the same program: variable number {count} is {what} "
                    f"on {names[index]}, and {other} on {names[i]}."
                )
                tell_stuck(i, reason)
                return reason
    return None


def _key(index, count):
    """Where a worker tells of a variable that it cannot complete."""
    return f"tfbig/incomplete/{index}/{count}"


def _shape(kwargs):
    value = kwargs.get("initial_value")
    if not callable(value):
        return tuple(np.shape(value))
    return "" if kwargs.get("shape") is None else tuple(tf.TensorShape(kwargs["shape"]))


def _tell(index):
    told = 0
    while True:
        time.sleep(PATIENCE / 3)
        since, count, what = _Building.since, _Building.count, _Building.what
        if since is None or time.monotonic() - since < PATIENCE:
            continue
        if told != count:
            _set(_key(index, count), what)
            told = count
        if reason := _get(f"tfbig/told/{index}"):
            print(f"tfbig: {reason}", file=sys.stderr, flush=True)
            return


def find_stuck(index):
    """What another worker makes that this one, which waits for it, does not; or None."""
    return _get(_key(index, _Building.count + 1))


def tell_stuck(index, reason):
    """Has a worker that waits for a variable show the reason."""
    _set(f"tfbig/told/{index}", reason)
    # It must have read it before this worker, which may run the service, ends.
    time.sleep(PATIENCE)


def _set(key, value):
    # Several workers may tell the same one.
    with contextlib.suppress(tf.errors.OpError):
        _context.context().set_config_key_value(key, value)


def _get(key):
    try:
        return _context.context().get_config_key_value(key, _LOOK)
    except tf.errors.OpError:
        return None
