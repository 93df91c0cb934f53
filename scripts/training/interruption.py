"""What Ctrl-C does to training: end it with a backup, or at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def with_backup(program: str) -> Iterator[None]:
    """Inside it, Ctrl-C ends training with a backup after the running update.

    It raises SIGTERM, for which `tfbig.callbacks.BackupAndRestore` listens during `fit`. If nothing
    listens, and the second time, Ctrl-C ends training at once.

    Args:
        program: Its name for messages.

    Raises:
        KeyboardInterrupt: In either case.
    """
    interrupt, terminate = (signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM))
    if interrupt is not signal.default_int_handler:  # As in a job in the background.
        yield
        return
    is_asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        signal.signal(signal.SIGINT, interrupt)
        if signal.getsignal(signal.SIGTERM) is unheard:
            raise KeyboardInterrupt
        is_asked = True
        # Not `print`, which the signal may have interrupted.
        text = f"\n{program}: a backup comes after the running update; Ctrl-C again ends at once\n"
        os.write(2, text.encode())
        signal.raise_signal(signal.SIGTERM)

    def unheard(number: int, frame: FrameType | None) -> None:
        # `fit` passes on a signal that it did not handle: after a second Ctrl-C the one from here.
        if not is_asked:
            signal.signal(signal.SIGTERM, terminate or signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, unheard)
    try:
        yield
    except SystemExit:
        if not is_asked:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate or signal.SIG_DFL)
