"""The processes of workers, and their output."""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import IO

from tfbig import _lifetime
from tfbig.launch import _private_network

__all__ = ("Printer", "Worker", "start")


def start(
    command: Sequence[str],
    environment: dict[str, str],
    network: _private_network.PrivateNetwork | None,
) -> subprocess.Popen[bytes]:
    """Starts a process that leads a group of its own, and whose output can be read.

    Args:
        command: Program and arguments.
        environment: Its environment variables.
        network: The network that it sees; None for that of the machine.
    """
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=functools.partial(_prepare, os.getpid(), network),
    )


def _prepare(launcher: int, network: _private_network.PrivateNetwork | None) -> None:
    """In the child: joins its network, and dies with the launcher, even if that is killed."""
    if network is not None:
        # First, because a change of credentials clears the signal that is set below.
        network.join()
    _lifetime.end_with_parent(launcher)


@dataclasses.dataclass
class Worker:
    """One process of the job.

    Attributes:
        number: The name of the worker in all starts of the job.
        process: The leader of a process group of its own.
        printers: The threads that copy its output.
    """

    number: int
    process: subprocess.Popen[bytes]
    printers: list[threading.Thread] = dataclasses.field(default_factory=list)

    @property
    def exit_code(self) -> int | None:
        """The exit code: None while the process runs, 128 + n if signal n killed it."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        # To the group, because the worker may have started processes. If the whole group is
        # gone, macOS reports PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def describe_failure(self) -> str:
        """Says how it ended."""
        code = self.process.returncode
        if code < 0:
            # Real-time signals have no names.
            name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
            return f"worker {self.number} was killed by {name}"
        return f"worker {self.number} failed with exit code {code}"


class Printer:
    """Copies the lines of several streams to file descriptors, labeled and never interleaved."""

    # Seconds to wait for the workers' last output. A process that left a worker's group may hold
    # the output open forever.
    PATIENCE = 1.0

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def start(self, source: IO[bytes], target: int, label: bytes) -> threading.Thread:
        def copy() -> None:
            # If the reader is gone, the worker gets the error, as it would without a launcher.
            with source, contextlib.suppress(BrokenPipeError):
                for line in source:
                    with self.lock:
                        _write(target, label + line.rstrip(b"\r\n") + b"\n")

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread

    def finish(self, threads: list[threading.Thread]) -> None:
        """Waits until everything is printed, however slow the reader is."""
        patience = self.PATIENCE
        while patience > 0 and any(t.is_alive() for t in threads):
            time.sleep(0.01)
            # A held lock means that a line is waiting for the reader.
            if not self.lock.locked():
                patience -= 0.01


def _write(target: int, data: bytes) -> None:
    # Not through sys.stdout: Python aborts at exit if a thread is waiting in it.
    while data:
        data = data[os.write(target, data) :]
