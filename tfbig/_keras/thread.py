"""What holds in the running thread, for as long as a context lasts."""

import contextlib
import threading

_thread = threading.local()


def current(name):
    """What `holding` set last under this name and has not ended yet, or None."""
    return getattr(_thread, name, None)


@contextlib.contextmanager
def holding(name, value):
    """Within it, `current(name)` is `value` in this thread."""
    previous = current(name)
    setattr(_thread, name, value)
    try:
        yield
    finally:
        setattr(_thread, name, previous)
