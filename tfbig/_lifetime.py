"""How processes end: with the one that started them, and at Ctrl-C while they start."""

import ctypes
import os
import signal
import sys
import types
from typing import NoReturn

__all__ = (
    "INTERRUPTED",
    "end_with_parent",
    "exit_on_interrupt",
    "is_program",
    "raise_on_interrupt",
)

# The exit code of the launcher after Ctrl-C.
INTERRUPTED = 130

# From <linux/prctl.h>: the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1

# Looked up here, because a process that was just forked from several threads may wait for a lock
# of the linker forever.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """In a process that was just forked: has it die with its parent, even if that is killed.

    The parent's thread that started the process must wait for its end: Linux takes the end of that
    thread for the parent's. On other systems, this does nothing.

    Args:
        parent: The id of the parent.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the call.
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def is_program(module: str) -> bool:
    """Whether Python is importing a module to run it: `python -m module`."""
    if sys.argv[:1] != ["-m"]:
        return False
    command = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    return command[-1].endswith(module)


def exit_on_interrupt() -> None:
    """Until `raise_on_interrupt`, Ctrl-C ends the launcher without a traceback."""
    # It may be ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_on_interrupt)


def raise_on_interrupt() -> None:
    """Has Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit_on_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_on_interrupt(number: int, frame: types.FrameType | None) -> NoReturn:
    os.write(2, b"tfbig.launch: interrupted before any worker was started\n")
    os._exit(INTERRUPTED)
