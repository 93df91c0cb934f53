"""The workers of one start."""

import argparse
import functools
import signal
import sys
import time
from collections.abc import Sequence

from tfbig.launch import _environment, _private_network, _processes

__all__ = ("IndependentWorkers", "Job", "say")


class Job:
    """The workers of one start of a job: if one fails, all end."""

    def __init__(
        self,
        options: argparse.Namespace,
        printer: _processes.Printer,
        numbers: Sequence[int],
        network: _private_network.PrivateNetwork | None,
    ) -> None:
        """Creates a job that `start` starts.

        Args:
            options: The launcher's.
            printer: Prints the output of the workers.
            numbers: Numbers of the workers that take part.
            network: The network that they see; None for that of the machine.
        """
        self.options = options
        self.printer = printer
        self.numbers = numbers
        self.network = network
        self.workers: list[_processes.Worker] = []

    @functools.cached_property
    def _addresses(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in _environment.free_ports(len(self.numbers))]

    def _devices_of(self, number: int) -> list[str] | None:
        return _environment.devices_of(number, self.options.per_worker_devices)

    def _environment_of(self, number: int) -> dict[str, str]:
        index = self.numbers.index(number)
        return _environment.of_job(index, self._addresses, self._devices_of(number))

    def start(self) -> None:
        """Starts all workers."""
        for number in self.numbers:
            self.workers.append(self._start_worker(number))
        # Printing starts threads, and a process with threads should not fork.
        for worker in self.workers:
            self._print_output_of(worker)

    def _start_worker(self, number: int) -> _processes.Worker:
        command = [sys.executable, self.options.script, *self.options.arguments]
        environment = self._environment_of(number)
        return _processes.Worker(number, _processes.start(command, environment, self.network))

    def _print_output_of(self, worker: _processes.Worker) -> None:
        width = len(str(self.options.workers - 1))
        label = f"[worker {worker.number:>{width}}] ".encode()
        for source, target in ((worker.process.stdout, 1), (worker.process.stderr, 2)):
            assert source is not None  # `_processes.start` opens both pipes.
            worker.printers.append(self.printer.start(source, target, label))

    def wait(self) -> _processes.Worker | None:
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


class IndependentWorkers(Job):
    """Workers that do not know each other; a failed one restarts alone."""

    def _environment_of(self, number: int) -> dict[str, str]:
        return _environment.of_independent(number, self._devices_of(number))

    def wait(self) -> _processes.Worker | None:
        """Waits until all have ended; returns the first that failed and was not restarted."""
        failed: list[_processes.Worker] = []
        restarts_left = self.options.max_restarts
        while True:
            codes = [w.exit_code for w in self.workers]
            for i, code in enumerate(codes):
                if not code or self.workers[i] in failed:
                    continue
                outcome = self.workers[i].describe_failure()
                if restarts_left == 0:
                    say(f"{outcome}; the others continue")
                    failed.append(self.workers[i])
                    continue
                restarts_left -= 1
                say(f"{outcome} and is restarted; restarts left: {restarts_left}")
                self.printer.finish(self.workers[i].printers)
                self.workers[i] = self._start_worker(self.workers[i].number)
                self._print_output_of(self.workers[i])
            if all(w.exit_code is not None for w in self.workers) and None not in codes:
                return failed[0] if failed else None
            time.sleep(0.05)


def say(text: str) -> None:
    """Prints a line of the launcher itself."""
    print(f"tfbig.launch: {text}", file=sys.stderr, flush=True)
