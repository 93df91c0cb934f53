"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal
import sys

__all__ = ("end_with_parent",)

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
