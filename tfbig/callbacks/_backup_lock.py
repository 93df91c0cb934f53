"""A directory of backups serves one training at a time: a lock, which ends with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from tfbig import _log, errors
from tfbig.distribute import _workers

__all__ = ("held",)

FILE = "backup.lock"

# Seconds to wait for another training, which may be about to end and be writing its last backup.
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.2

# The open files of locks.
_held: set[int] = set()


def _leave_to_parent() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A child that has them open as well would keep the locks of a parent that was killed.
os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def held(directory: str | os.PathLike[str], workers: _workers.Workers) -> Iterator[None]:
    """Within it, no other training uses a directory.

    Args:
        directory: the directory, which need not exist yet.
        workers: those that use it together.

    Raises:
        BackupError: On all workers, if another training uses it.
    """
    path = pathlib.Path(directory, FILE)
    descriptor, refusal = None, ""
    if workers.is_chief:
        try:
            descriptor = _acquire(path)
        except BlockingIOError:
            refusal = _refusal(path)
        except OSError:
            # The file system cannot lock, or is read-only. Training may still resume from there.
            pass
    try:
        refusal = workers.exchange("the lock of the backups", refusal)[0]
        if refusal:
            raise errors.BackupError(refusal)
        yield
    finally:
        # Not in a child that was forked meanwhile.
        if descriptor in _held:
            with contextlib.suppress(OSError):
                path.unlink()
            _close(descriptor)


def _acquire(path: pathlib.Path) -> int:
    """Waits for the lock; returns the descriptor of the file that has it.

    Raises:
        BlockingIOError: If another training keeps it.
        OSError: If the file system cannot lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    has_said = False
    while True:
        try:
            descriptor = _try(path)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            if not has_said:
                has_said = True
                _log.logger().info("tfbig: waiting for %s, which uses %s", _user(path), path.parent)
            time.sleep(_POLL_SECONDS)
        else:
            if descriptor is not None:
                return descriptor


def _try(path: pathlib.Path) -> int | None:
    """Takes the lock; None if the file was removed meanwhile, by the training that had it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    has_lock = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            has_lock = os.path.samestat(os.fstat(descriptor), path.stat())
    finally:
        if not has_lock:
            _close(descriptor)
    if not has_lock:
        return None
    with contextlib.suppress(OSError):  # A full disk.
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _user(path: pathlib.Path) -> str:
    """Who has the lock."""
    with contextlib.suppress(OSError, UnicodeError):
        return path.read_text() or "another process"
    return "another process"


def _refusal(path: pathlib.Path) -> str:
    return (
        "Only one training at a time can use a directory of backups; each would overwrite those of "
        f"the other. Received: {path.parent}, which {_user(path)} uses. Wait until that training "
        f"has ended, or use another directory. If it ended with its machine, remove {path}."
    )
