"""Names of processes, by which other processes can tell whether they still run."""

import contextlib
import os
import pathlib
import socket
import uuid

__all__ = ("is_dead", "process_id", "this_process")


def this_process() -> str:
    """A name for this process that no other process ever has."""
    pid = os.getpid()
    return f"{_machine()}|{pid}|{_started(pid)}|{uuid.uuid4().hex[:8]}"


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()[:60]}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()[:60]


def _started(pid: int) -> str:
    """When a process started, in clock ticks; "" if that cannot be known."""
    with contextlib.suppress(OSError, IndexError):
        status = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A zombie never does anything again.
        return "" if status[0] == "Z" else status[19]
    return ""


def is_dead(name: str) -> bool:
    """Whether a process has certainly ended; False for processes of other machines."""
    machine, pid, started, _ = name.split("|")
    return bool(started) and machine == _machine() and _started(int(pid)) != started


def process_id(name: str) -> int | None:
    """The id of a process on this machine; None for other machines."""
    machine, _, rest = name.partition("|")
    return int(rest.split("|")[0]) if rest and machine == _machine() else None
