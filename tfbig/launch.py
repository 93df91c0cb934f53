"""Starts a multi-worker job on this machine: `python -m tfbig.launch --workers N script.py ...`.

Every worker is a process with its own `TF_CONFIG`, which `tfbig.distribute.get_strategy` reads.
Each line of output is labeled with its worker. The first worker that fails ends the job: its exit
code becomes the launcher's, and all other workers are ended. `--max_restarts R` restarts the job
up to R times; a program that backs up with `tfbig.callbacks.BackupAndRestore` resumes where it
was.

With `--independent` the workers do not form a job: each runs the program on its own, like the
processes of a search, with a GPU of its own if there are any. A worker that fails does not affect
the others; `--max_restarts R` allows R restarts, counted over all workers.

On several machines, SLURM or Kubernetes starts the processes; see docs/strategies.md.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from typing import IO, NoReturn

__all__ = ("main",)

# The launcher's own exit code after Ctrl-C; other codes come from the first failing worker.
INTERRUPTED = 130

# From <linux/prctl.h>: the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tfbig.launch",
        description="Starts a Python program as a multi-worker job on this machine.",
        epilog="Exit code: 0 if all workers succeed, otherwise that of the first worker to "
        "fail (128 + n if signal n killed it), 130 after Ctrl-C, 2 for invalid arguments.",
        # argparse also looks at the script's arguments and must not read them as abbreviations.
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=_positive, required=True, help="number of processes")
    parser.add_argument(
        "--per_worker_devices",
        type=_positive,
        metavar="D",
        help="GPUs per worker: worker i sees the i-th group of D GPUs in CUDA_VISIBLE_DEVICES "
        "(or in 0, 1, ...). By default every worker sees all devices",
    )
    parser.add_argument(
        "--max_restarts",
        type=_not_negative,
        default=0,
        metavar="R",
        help="restart the job after a failure, up to R times (default: 0)",
    )
    parser.add_argument(
        "--independent",
        action="store_true",
        help="run unrelated processes instead of one job, as a search does; each worker's number "
        "is in TFBIG_WORKER",
    )
    parser.add_argument(
        "--grace_period",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="seconds that workers have to exit before they are killed (default: 5)",
    )
    parser.add_argument("script", help="Python program that every worker runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


def _positive(text: str) -> int:
    return _integer(text, 1)


def _not_negative(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}. Received: {text}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0. Received: {text}")
    return value


def _free_ports(count: int) -> list[int]:
    """Returns distinct ports that are free now."""
    # All sockets stay open until the last port is chosen, so no port is chosen twice.
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _environment(devices: list[str] | None) -> dict[str, str]:
    # Without this, a worker that is killed loses the lines in its buffer.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def _job_environment(index: int, addresses: list[str], devices: list[str] | None) -> dict[str, str]:
    """Returns the environment of a worker that belongs to a job."""
    task = {"type": "worker", "index": index}
    config = json.dumps({"cluster": {"worker": addresses}, "task": task})
    return _environment(devices) | {"TF_CONFIG": config}


def _independent_environment(index: int, devices: list[str] | None) -> dict[str, str]:
    """Returns the environment of a worker that is independent of the others."""
    environment = _environment(devices if devices is not None else _device_in_turn(index))
    environment.pop("TF_CONFIG", None)
    # Workers may share a GPU, and by default TensorFlow allocates all of its memory.
    environment.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    return environment | {"TFBIG_WORKER": str(index)}


def _device_in_turn(index: int) -> list[str] | None:
    """Deals GPUs out to the workers in turn; None if there are no GPUs."""
    devices = _visible_devices()
    if devices is None:
        devices = [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    return [devices[index % len(devices)]] if devices else None


def _visible_devices() -> list[str] | None:
    """Returns the devices in CUDA_VISIBLE_DEVICES, or None if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1")]


def _devices_of(index: int, per_worker: int | None) -> list[str] | None:
    """Returns the GPUs of one worker, or None if all workers see all devices."""
    if per_worker is None:
        return None
    devices = _visible_devices()
    if devices is None:
        return [str(i) for i in range(index * per_worker, (index + 1) * per_worker)]
    # "-1" hides all GPUs, so the workers run on the CPU.
    return devices[index * per_worker : (index + 1) * per_worker] or ["-1"]


def _die_with(launcher: int) -> None:
    """In the child: dies with the launcher, even if the launcher is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The launcher may have died before the call.
        if os.getppid() != launcher:
            os._exit(128 + signal.SIGKILL)


@dataclasses.dataclass
class _Worker:
    """One process of the job.

    Attributes:
        index: Its task index.
        process: The leader of a process group of its own.
        printers: The threads that copy its output.
    """

    index: int
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


class _Printer:
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


class _Job:
    """The workers of one start of a job: if one fails, all end."""

    def __init__(self, options: argparse.Namespace, printer: _Printer) -> None:
        self.options = options
        self.printer = printer
        self.workers: list[_Worker] = []

    @functools.cached_property
    def _addresses(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in _free_ports(self.options.workers)]

    def _environment_of(self, index: int) -> dict[str, str]:
        devices = _devices_of(index, self.options.per_worker_devices)
        return _job_environment(index, self._addresses, devices)

    def start(self) -> None:
        for i in range(self.options.workers):
            self.workers.append(self._start_worker(i))
        # Printing starts threads, and a process with threads should not fork.
        for worker in self.workers:
            self._print_output_of(worker)

    def _start_worker(self, index: int) -> _Worker:
        process = subprocess.Popen(
            [sys.executable, self.options.script, *self.options.arguments],
            env=self._environment_of(index),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=functools.partial(_die_with, os.getpid()),
        )
        return _Worker(index, process)

    def _print_output_of(self, worker: _Worker) -> None:
        width = len(str(self.options.workers - 1))
        label = f"[worker {worker.index:>{width}}] ".encode()
        for source, target in ((worker.process.stdout, 1), (worker.process.stderr, 2)):
            assert source is not None  # `_start_worker` opens both pipes.
            worker.printers.append(self.printer.start(source, target, label))

    def wait(self) -> _Worker | None:
        """Waits until all workers succeed or one fails; returns the failed worker, or None."""
        while True:
            codes = [w.exit_code for w in self.workers]
            failed = [(code, w) for w, code in zip(self.workers, codes, strict=True) if code]
            if failed:
                # If several failed at once, a death by signal is the cause, and an error about a
                # missing worker the consequence.
                return max(failed, key=lambda pair: pair[0])[1]
            if None not in codes:
                return None
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM, within: float | None = None) -> None:
        """Ends all workers and their children, and prints their last output."""
        running = [w for w in self.workers if w.exit_code is None]
        for worker in running:
            worker.send(number)
        deadline = time.monotonic() + (self.options.grace_period if within is None else within)
        while time.monotonic() < deadline and any(w.exit_code is None for w in running):
            time.sleep(0.05)
        for worker in self.workers:
            worker.send(signal.SIGKILL)
            worker.process.wait()
        self.printer.finish([thread for w in self.workers for thread in w.printers])


class _IndependentWorkers(_Job):
    """Workers that do not know each other; a failed one restarts alone."""

    def _environment_of(self, index: int) -> dict[str, str]:
        devices = _devices_of(index, self.options.per_worker_devices)
        return _independent_environment(index, devices)

    def wait(self) -> _Worker | None:
        """Waits until all have ended; returns the first that failed and was not restarted."""
        failed: list[_Worker] = []
        restarts_left = self.options.max_restarts
        while True:
            codes = [w.exit_code for w in self.workers]
            for i, code in enumerate(codes):
                if not code or self.workers[i] in failed:
                    continue
                outcome = _describe_failure(self.workers[i])
                if restarts_left == 0:
                    _say(f"{outcome}; the others continue")
                    failed.append(self.workers[i])
                    continue
                restarts_left -= 1
                _say(f"{outcome} and is restarted; restarts left: {restarts_left}")
                self.printer.finish(self.workers[i].printers)
                self.workers[i] = self._start_worker(i)
                self._print_output_of(self.workers[i])
            if all(w.exit_code is not None for w in self.workers) and None not in codes:
                return failed[0] if failed else None
            time.sleep(0.05)


class _Terminated(BaseException):
    """A signal told the launcher to end.

    Attributes:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _raise_terminated(number: int, frame: types.FrameType | None) -> NoReturn:
    raise _Terminated(number)


def _say(text: str) -> None:
    print(f"tfbig.launch: {text}", file=sys.stderr, flush=True)


def _describe_failure(worker: _Worker) -> str:
    code = worker.process.returncode
    if code < 0:
        # Real-time signals have no names.
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        return f"worker {worker.index} was killed by {name}"
    return f"worker {worker.index} failed with exit code {code}"


def _run(options: argparse.Namespace, printer: _Printer) -> tuple[int, str]:
    """Starts the workers once; returns the exit code and what happened."""
    job = (_IndependentWorkers if options.independent else _Job)(options, printer)
    number = signal.SIGTERM
    try:
        job.start()
        failed = job.wait()
        if failed is None:
            return 0, "all workers succeeded"
        return failed.exit_code or 0, _describe_failure(failed)
    except KeyboardInterrupt:
        number = signal.SIGINT
        raise
    finally:
        try:
            job.end(number)
        except (KeyboardInterrupt, _Terminated):
            # The second signal ends the grace period.
            job.end(signal.SIGKILL, within=0)
            raise


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not os.path.isfile(options.script):
        parser.error(f"script must be a Python file. Received: {options.script}")
    devices = _visible_devices()
    needed = options.workers * (options.per_worker_devices or 0)
    if devices and len(devices) < needed:
        parser.error(
            f"--workers={options.workers} with --per_worker_devices={options.per_worker_devices} "
            f"requires {needed} devices. Received: CUDA_VISIBLE_DEVICES={','.join(devices)}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name. Defaults to those of this process.

    Returns:
        The exit code.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup has SIGHUP ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise_terminated)
    try:
        return _run_with_restarts(options)
    except KeyboardInterrupt:
        _say("interrupted; all workers have ended")
        return INTERRUPTED
    except _Terminated as e:
        _say("terminated; all workers have ended")
        return 128 + e.number


def _run_with_restarts(options: argparse.Namespace) -> int:
    printer = _Printer()
    # Independent workers restart one by one, in `_IndependentWorkers.wait`.
    restarts_left = 0 if options.independent else options.max_restarts
    while True:
        code, outcome = _run(options, printer)
        if code == 0 or options.independent:
            return code
        left = f"; restarts left: {restarts_left}" if options.max_restarts else ""
        _say(f"{outcome}; all workers have ended{left}")
        if restarts_left == 0:
            return code
        restarts_left -= 1


if __name__ == "__main__":
    sys.exit(main())
