"""Detects workers that build different models.

All workers create a variable at the same time, with the value that the chief sends. If the
variables differ in shape or dtype, TensorFlow fails with an error about collectives. A worker that
creates one more variable than the others waits inside TensorFlow forever, while the others wait
for it in `fit`. So each worker counts the variables that it creates. If one takes long, a thread
tells the other workers, and prints the reason that they find.
"""

import contextlib
import sys
import threading
import time
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as _context

from tfbig import _types, errors

__all__ = ("extra_variable", "send_reason", "watch")

# Seconds after which a worker announces a variable that is still being created.
PATIENCE = 3.0

# Milliseconds to wait for a value that may not have been published.
_READ_TIMEOUT = 50


class _Creation:
    """The variables that this process creates.

    Attributes:
        count: Number of variables whose creation has begun.
        begun_at: When the creation of the current one began; None if there is none.
        variable: Name and shape of the current one.
    """

    count = 0
    begun_at: float | None = None
    variable = ""


def watch(strategy: _types.Strategy, names: tuple[str, ...], index: int) -> None:
    """Starts counting the variables created under a strategy.

    Args:
        strategy: A `tf.distribute.MultiWorkerMirroredStrategy`.
        names: Names of the workers.
        index: Which of them this process is.
    """
    extended = strategy.extended
    create = extended._create_variable

    # `Any`: the arguments are those of TensorFlow's variable creators.
    def counted(next_creator: Any, **kwargs: Any) -> _types.Variable:
        _Creation.count += 1
        _Creation.variable = f"{kwargs.get('name')} {_shape(kwargs)}".strip()
        _Creation.begun_at = time.monotonic()
        try:
            return create(next_creator, **kwargs)
        except tf.errors.OpError as e:
            if reason := _difference(names, index):
                raise errors.WorkersDisagreeError(reason) from e
            raise
        finally:
            _Creation.begun_at = None

    extended._create_variable = counted
    threading.Thread(target=_announce_slow_creation, args=(index,), daemon=True).start()


def _difference(names: tuple[str, ...], index: int) -> str | None:
    """Returns how the variable that failed differs on another worker, or None."""
    count, variable = _Creation.count, _Creation.variable
    _publish(_key(index, count), variable)
    others = [i for i in range(len(names)) if i != index]
    # TensorFlow may block the other worker, whose thread then announces its variable.
    deadline = time.monotonic() + 3 * PATIENCE
    while time.monotonic() < deadline:
        for i in others:
            if (other := _read(_key(i, count))) not in (None, variable):
                reason = (
                    f"All workers must run the same program: variable number {count} is "
                    f"{variable} on {names[index]}, and {other} on {names[i]}."
                )
                send_reason(i, reason)
                return reason
    return None


def _key(index: int, count: int) -> str:
    """Returns the key under which a worker publishes a variable that it cannot complete."""
    return f"tfbig/incomplete/{index}/{count}"


def _shape(kwargs: dict[str, Any]) -> tuple[int | None, ...] | str:
    value: Any = kwargs.get("initial_value")  # A tensor, an array, a number, or what makes one.
    if not callable(value):
        return tuple(np.shape(value))
    return "" if kwargs.get("shape") is None else tuple(tf.TensorShape(kwargs["shape"]))


def _announce_slow_creation(index: int) -> None:
    announced = 0
    while True:
        time.sleep(PATIENCE / 3)
        begun_at, count, variable = _Creation.begun_at, _Creation.count, _Creation.variable
        if begun_at is None or time.monotonic() - begun_at < PATIENCE:
            continue
        if announced != count:
            _publish(_key(index, count), variable)
            announced = count
        if reason := _read(f"tfbig/told/{index}"):
            print(f"tfbig: {reason}", file=sys.stderr, flush=True)
            return


def extra_variable(index: int) -> str | None:
    """Returns the variable that another worker creates and this one does not, or None."""
    return _read(_key(index, _Creation.count + 1))


def send_reason(index: int, reason: str) -> None:
    """Has a worker that waits for a variable print the reason."""
    _publish(f"tfbig/told/{index}", reason)
    # The other worker must read it before this one ends, which may run the service.
    time.sleep(PATIENCE)


def _publish(key: str, value: str) -> None:
    # Several workers may write to the same key; the first wins.
    with contextlib.suppress(tf.errors.OpError):
        _context.context().set_config_key_value(key, value)


def _read(key: str) -> str | None:
    try:
        return str(_context.context().get_config_key_value(key, _READ_TIMEOUT))
    except tf.errors.OpError:
        return None
