"""Ctrl-C in a training: with a backup, or at once."""

import contextlib
import os
import signal


@contextlib.contextmanager
def with_backup(program):
    """Within it, Ctrl-C ends a training with a backup after the running update.

    It is asked for by SIGTERM, to which `tfbig.callbacks.BackupAndRestore` listens during `fit`.
    Where it does not, and the second time, Ctrl-C ends the training at once.

    Args:
        program: str, its name for messages.

    Raises:
        KeyboardInterrupt: In either case.
    """
    interrupt, terminate = (signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM))
    if interrupt is not signal.default_int_handler:  # Such as of a job in the background.
        yield
        return
    is_asked = False

    def ask(number, frame):
        nonlocal is_asked
        signal.signal(signal.SIGINT, interrupt)
        if signal.getsignal(signal.SIGTERM) is unheard:
            raise KeyboardInterrupt
        is_asked = True
        # Not by print, in which the signal may have arrived.
        text = f"\n{program}: a backup comes after the running update; Ctrl-C again ends at once\n"
        os.write(2, text.encode())
        signal.raise_signal(signal.SIGTERM)

    def unheard(number, frame):
        # `fit` passes on what it did not get to: after a second Ctrl-C what was asked for here.
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
