"""The command line of the launcher, and its restarts."""

import argparse
import os
import signal
import types
from collections.abc import Sequence
from typing import NoReturn

from tfbig import _lifetime
from tfbig.launch import _environment, _job, _membership, _private_network, _processes

__all__ = ("main",)

# The launcher's own exit code after Ctrl-C; other codes come from the first failing worker.
INTERRUPTED = _lifetime.INTERRUPTED
# That of a worker that has taken a backup because it must end: `BackupAndRestore`'s.
PREEMPTED = 138

OPEN = (
    "the job's ports are open on all interfaces of this machine, and whoever reaches one can run "
    "code as you. --network=private closes them, if the program needs no other network; "
    "--network=host leaves them open, without this warning"
)


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
        "--min_workers",
        type=_positive,
        metavar="M",
        help="let a restart leave out workers that were the first to fail twice in succession, as "
        "long as M are left; the next restart takes them back. By default none is left out",
    )
    parser.add_argument(
        "--network",
        choices=("host", "private"),
        help="host: the workers use the machine's network, and whoever reaches their ports can run "
        "code as you. private: they have a network of their own (Linux), in which they reach one "
        "another and nothing else. By default host, with a warning",
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


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not os.path.isfile(options.script):
        parser.error(f"script must be a Python file. Received: {options.script}")
    devices = _environment.visible_devices()
    needed = options.workers * (options.per_worker_devices or 0)
    if devices and len(devices) < needed:
        parser.error(
            f"--workers={options.workers} with --per_worker_devices={options.per_worker_devices} "
            f"requires {needed} devices. Received: CUDA_VISIBLE_DEVICES={','.join(devices)}"
        )
    if options.min_workers is None:
        return
    if options.min_workers > options.workers:
        parser.error(
            f"--min_workers must be at most --workers={options.workers}. Received: "
            f"{options.min_workers}"
        )
    if options.independent or not options.max_restarts:
        parser.error(
            "--min_workers says which workers a restart of the job may leave out: it requires "
            "--max_restarts, and no --independent"
        )


def _network(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> _private_network.PrivateNetwork | None:
    """Returns the network of the workers, None for that of the machine."""
    if options.network == "private":
        try:
            return _private_network.PrivateNetwork()
        except _private_network.PrivateNetworkError as e:
            parser.error(
                "--network=private requires Linux, and the right to make a network namespace or a "
                f"user namespace. Received: {e}. Use --network=host, with a firewall"
            )
    # Independent workers have no server. A worker alone has none either, as a rule: `get_strategy`
    # then makes a strategy of one process, unless the program asks for kind="multi_worker".
    if options.network is None and options.workers > 1 and not options.independent:
        _job.say(OPEN)
    return None


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
    network = None
    try:
        _lifetime.raise_on_interrupt()
        network = _network(parser, options)
        return _run_with_restarts(options, network)
    except KeyboardInterrupt:
        _job.say("interrupted; all workers have ended")
        return INTERRUPTED
    except _Terminated as e:
        _job.say("terminated; all workers have ended")
        return 128 + e.number
    finally:
        if network is not None:
            network.close()


def _run_with_restarts(
    options: argparse.Namespace, network: _private_network.PrivateNetwork | None
) -> int:
    printer = _processes.Printer()
    membership = _membership.Membership(options.workers, options.min_workers or options.workers)
    # Independent workers restart one by one, in `IndependentWorkers.wait`.
    restarts_left = 0 if options.independent else options.max_restarts
    while True:
        kind = _job.IndependentWorkers if options.independent else _job.Job
        failed = _run(kind(options, printer, membership.present, network))
        if failed is None:
            return 0
        code = failed.exit_code or 0
        if options.independent:
            return code
        left = f"; restarts left: {restarts_left}" if options.max_restarts else ""
        _job.say(f"{failed.describe_failure()}; all workers have ended{left}")
        if restarts_left == 0:
            return code
        restarts_left -= 1
        if code != PREEMPTED:
            membership.record_failure(failed.number)
        if membership.absent:
            _job.say(_describe_absence(membership))


def _run(job: _job.Job) -> _processes.Worker | None:
    """Starts the workers once; returns the one that failed, or None."""
    number = signal.SIGTERM
    try:
        job.start()
        return job.wait()
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


def _describe_absence(membership: _membership.Membership) -> str:
    absent, present = (", ".join(map(str, n)) for n in (membership.absent, membership.present))
    last = len(membership.present) - 1
    return (
        f"until the next restart, the job continues without worker(s) {absent}; worker(s) "
        f"{present} are its task(s) 0 to {last}"
    )
