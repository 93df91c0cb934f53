"""Starts a multi-worker job on this machine: `python -m tfbig.launch --workers N script.py ...`.

Every worker is a process with its own `TF_CONFIG`, which
`tfbig.distribute.get_strategy` reads. Their output is labelled by worker. The
first worker that fails ends the job: its exit code becomes that of the
launcher, and all others are ended. With `--max_restarts R` the job is started
again, up to R times; a program that backs up with
`tfbig.callbacks.BackupAndRestore` goes on where it was.

With `--independent` the workers are no job: each runs the program for itself, as the
processes of a search do, with a GPU of its own where there are any. One that fails leaves the
others alone; with `--max_restarts R` it is started again, up to R times for all of them.

For more than one machine, SLURM or Kubernetes start the processes; see README.
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

__all__ = ("main",)

# Exit codes of this program's own making; others are the first failing worker's.
INTERRUPTED = 130

# From <linux/prctl.h>: the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m tfbig.launch",
        description="Starts a Python program as a multi-worker job on this machine.",
        epilog="Exit code: 0 if all workers succeed, else that of the first worker that "
        "fails (128 + n if signal n ended it), 130 after Ctrl-C, 2 for wrong arguments.",
        # Arguments of the script are looked at too, and must not be taken for short forms.
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=_positive, required=True, help="number of processes")
    parser.add_argument(
        "--per_worker_devices",
        type=_positive,
        metavar="D",
        help="GPUs of each worker: worker i sees the i-th D of those in CUDA_VISIBLE_DEVICES "
        "(or of 0, 1, ...). By default every worker sees all devices",
    )
    parser.add_argument(
        "--max_restarts",
        type=_not_negative,
        default=0,
        metavar="R",
        help="start the job again after a failure, up to R times (default: 0)",
    )
    parser.add_argument(
        "--independent",
        action="store_true",
        help="no multi-worker job: each worker for itself, as for a search; TFBIG_WORKER is its "
        "number",
    )
    parser.add_argument(
        "--grace_period",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="seconds that workers have to end by themselves before they are killed (default: 5)",
    )
    parser.add_argument("script", help="Python program that every worker runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _positive(text):
    return _integer(text, 1)


def _not_negative(text):
    return _integer(text, 0)


def _integer(text, least):
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}. Received: {text}")
    return value


def _seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0. Received: {text}")
    return value


def _free_ports(count):
    """Ports that are free now; held together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _environment(devices):
    # Else lines of a worker that is killed are lost in its buffer.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def _of_job(index, addresses, devices):
    """The environment of a worker of a job."""
    task = {"type": "worker", "index": index}
    config = json.dumps({"cluster": {"worker": addresses}, "task": task})
    return _environment(devices) | {"TF_CONFIG": config}


def _of_its_own(index, devices):
    """The environment of a worker that is independent of the others."""
    environment = _environment(devices if devices is not None else _own_device(index))
    environment.pop("TF_CONFIG", None)
    # Workers may share a GPU; by itself TensorFlow takes all of its memory.
    environment.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    return environment | {"TFBIG_WORKER": str(index)}


def _own_device(index):
    """One GPU for each worker in turn; None if there are none."""
    devices = _visible_devices()
    if devices is None:
        devices = [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    return [devices[index % len(devices)]] if devices else None


def _visible_devices():
    """What CUDA_VISIBLE_DEVICES lists, or None if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1")]


def _devices_of(index, per_worker):
    """The GPUs of one worker, or None if they are not divided."""
    if per_worker is None:
        return None
    devices = _visible_devices()
    if devices is None:
        return [str(i) for i in range(index * per_worker, (index + 1) * per_worker)]
    # An empty list hides all: the workers use the CPU.
    return devices[index * per_worker : (index + 1) * per_worker] or ["-1"]


def _end_with(launcher):
    """In the child: dies with the launcher, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The launcher may have died before the call.
        if os.getppid() != launcher:
            os._exit(128 + signal.SIGKILL)


@dataclasses.dataclass
class _Worker:
    """One process of the job.

    Attributes:
        index: int, its task index.
        process: `subprocess.Popen`, leader of a process group of its own.
        printers: threads that copy its output.
    """

    index: int
    process: subprocess.Popen
    printers: list

    @property
    def exit_code(self):
        """None while it runs; 128 + n if signal n ended it."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number):
        # To the group: the worker may have started processes itself. Where all of
        # them are gone macOS says PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class _Printer:
    """Copies lines of several streams to file descriptors, each labelled, none torn."""

    # Seconds for what workers said last. A process that left a worker's group may
    # hold its output open for ever.
    PATIENCE = 1.0

    def __init__(self):
        self.lock = threading.Lock()

    def start(self, source, target, label):
        def copy():
            # Without a reader the worker gets the error, as it would without a launcher.
            with source, contextlib.suppress(BrokenPipeError):
                for line in source:
                    with self.lock:
                        _write(target, label + line.rstrip(b"\r\n") + b"\n")

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread

    def finish(self, threads):
        """Waits until all is printed, however slow the reader is."""
        patience = self.PATIENCE
        while patience > 0 and any(t.is_alive() for t in threads):
            time.sleep(0.01)
            # While it is held, a line waits for the reader.
            if not self.lock.locked():
                patience -= 0.01


def _write(target, data):
    # Not through sys.stdout: Python aborts at its exit when a thread waits in it.
    while data:
        data = data[os.write(target, data) :]


class _Job:
    """All workers of one start."""

    def __init__(self, options, printer):
        self.options = options
        self.printer = printer
        self.workers = []

    def start(self):
        options = self.options
        addresses = [f"127.0.0.1:{port}" for port in _free_ports(options.workers)]
        for i in range(options.workers):
            devices = _devices_of(i, options.per_worker_devices)
            self.workers.append(self.made(i, _of_job(i, addresses, devices)))
        # Not before: a process with threads should not fork.
        for worker in self.workers:
            self.print_from(worker)

    def made(self, index, environment):
        """A worker, started."""
        process = subprocess.Popen(
            [sys.executable, self.options.script, *self.options.arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=functools.partial(_end_with, os.getpid()),
        )
        return _Worker(index, process, [])

    def print_from(self, worker):
        width = len(str(self.options.workers - 1))
        label = f"[worker {worker.index:>{width}}] ".encode()
        for source, target in ((worker.process.stdout, 1), (worker.process.stderr, 2)):
            worker.printers.append(self.printer.start(source, target, label))

    def wait(self):
        """Waits until all succeeded or one failed; returns that one, or None."""
        while True:
            codes = [w.exit_code for w in self.workers]
            # Among those that failed within one look, a signal's death is the
            # cause, an error that another is gone its consequence.
            failed = [w for w, code in zip(self.workers, codes, strict=True) if code]
            if failed:
                return max(failed, key=lambda w: w.exit_code)
            if None not in codes:
                return None
            time.sleep(0.05)

    def end(self, number=signal.SIGTERM, within=None):
        """Ends all workers, their children too, and prints what they still say."""
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


class _Independent(_Job):
    """Workers each for itself; all restarts are of single ones."""

    def start(self):
        self.workers = [self.again(i) for i in range(self.options.workers)]
        for worker in self.workers:
            self.print_from(worker)

    def again(self, index):
        return self.made(
            index, _of_its_own(index, _devices_of(index, self.options.per_worker_devices))
        )

    def wait(self):
        """Waits until all have ended; returns the first that failed and was not restarted."""
        failed = []
        left = self.options.max_restarts
        while True:
            codes = [w.exit_code for w in self.workers]
            for i, code in enumerate(codes):
                if not code or self.workers[i] in failed:
                    continue
                what = _described(self.workers[i])
                if left == 0:
                    _say(f"{what}; the others go on")
                    failed.append(self.workers[i])
                    continue
                left -= 1
                _say(f"{what}, and is started again; restarts left: {left}")
                self.printer.finish(self.workers[i].printers)
                self.workers[i] = self.again(i)
                self.print_from(self.workers[i])
            if all(w.exit_code is not None for w in self.workers) and None not in codes:
                return failed[0] if failed else None
            time.sleep(0.05)


class _Terminated(BaseException):
    """A signal to the launcher to end.

    Attributes:
        number: int, which.
    """

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def _raise_terminated(number, frame):
    raise _Terminated(number)


def _say(text):
    print(f"tfbig.launch: {text}", file=sys.stderr, flush=True)


def _described(worker):
    code = worker.process.poll()
    if code < 0:
        # Real-time signals have no names.
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        return f"worker {worker.index} was ended by {name}"
    return f"worker {worker.index} failed with exit code {code}"


def _run(options, printer):
    """Starts the job once; returns the exit code and what happened."""
    job = (_Independent if options.independent else _Job)(options, printer)
    number = signal.SIGTERM
    try:
        job.start()
        failed = job.wait()
        if failed is None:
            return 0, "all workers succeeded"
        return failed.exit_code, _described(failed)
    except KeyboardInterrupt:
        number = signal.SIGINT
        raise
    finally:
        try:
            job.end(number)
        except (KeyboardInterrupt, _Terminated):
            # The second one: no more patience.
            job.end(signal.SIGKILL, within=0)
            raise


def _check(parser, options):
    if not os.path.isfile(options.script):
        parser.error(f"script must be a Python file. Received: {options.script}")
    devices = _visible_devices()
    needed = options.workers * (options.per_worker_devices or 0)
    if devices and len(devices) < needed:
        parser.error(
            f"--workers={options.workers} with --per_worker_devices={options.per_worker_devices} "
            f"need {needed} devices. Received: CUDA_VISIBLE_DEVICES={','.join(devices)}"
        )


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup lets SIGHUP be ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise_terminated)
    printer = _Printer()
    try:
        restarts = 0 if options.independent else options.max_restarts
        for left in reversed(range(restarts + 1)):
            code, what = _run(options, printer)
            if code == 0 or options.independent:
                break
            more = f"; restarts left: {left}" if options.max_restarts else ""
            _say(f"{what}; all workers are ended{more}")
        return code
    except KeyboardInterrupt:
        _say("interrupted; all workers are ended")
        return INTERRUPTED
    except _Terminated as e:
        _say("terminated; all workers are ended")
        return 128 + e.number


if __name__ == "__main__":
    sys.exit(main())
