"""The log "tfbig" of Python's logging, which is shown on stderr unless told otherwise."""

import logging
import sys

__all__ = ("logger",)


class _Stderr(logging.Handler):
    """Writes to what is `sys.stderr` then, which notebooks and tests replace."""

    def emit(self, record):
        print(self.format(record), file=sys.stderr, flush=True)


def logger():
    """The logger of this package."""
    found = logging.getLogger("tfbig")
    if not found.handlers and found.level == logging.NOTSET:
        found.addHandler(_Stderr())
        found.setLevel(logging.INFO)
        found.propagate = False
    return found
