"""The logger "tfbig" of Python's logging, which writes to stderr unless configured otherwise."""

import logging
import sys

__all__ = ("logger",)


class _Stderr(logging.Handler):
    """Writes to the current `sys.stderr`, which notebooks and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def logger() -> logging.Logger:
    """Returns the logger of this package."""
    found = logging.getLogger("tfbig")
    if not found.handlers and found.level == logging.NOTSET:
        found.addHandler(_Stderr())
        found.setLevel(logging.INFO)
        found.propagate = False
    return found
