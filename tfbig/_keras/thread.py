"""Patches of Keras reach all threads; what they act on is therefore set for one thread alone."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_thread = threading.local()


# Any: each name has a value of a type of its own, which the module that sets it knows.
def current(name: str) -> Any:
    """The value that the innermost open `holding` of this name has set, or None."""
    return getattr(_thread, name, None)


@contextlib.contextmanager
def holding(name: str, value: object) -> Iterator[None]:
    """Within it, `current(name)` is `value` in this thread."""
    previous = current(name)
    setattr(_thread, name, value)
    try:
        yield
    finally:
        setattr(_thread, name, previous)
