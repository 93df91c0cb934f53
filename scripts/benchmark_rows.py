"""The rows of benchmark.py: what each is called, and the processes that measure them."""

import collections
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

import benchmark_peers

ROWS = {
    "whole": "plain, whole batch",
    "built_in": "plain, built-in accumulation",
    "built_in_jit": "plain, built-in accumulation, jit_compile",
    "micro": "plain, micro-batch",
    "tfbig": "tfbig",
    "jit": "tfbig, jit_compile",
    "recompute": "tfbig, recompute",
    "torch": "PyTorch, Accelerate",
    "jax": "Keras on JAX, built-in accumulation",
}
OF_TFBIG = ("tfbig", "jit", "recompute")
# These are the whole batch where it is one micro-batch.
_OF_SEVERAL = ("built_in", "built_in_jit", "micro")
_SKIPPED = {("cnn", "jit"): "XLA on CPU runs convolutions in a loop very slowly"}

_DIRECTORY = pathlib.Path(__file__).parent


class FailedError(Exception):
    """A row has not been measured; the text says why, in a line."""


class DifferentModelsError(Exception):
    """What was measured is not the same model in two rows."""


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
        task: benchmark_process.Task.
        runs: list of dict, what each process measured.
        skipped: str or None, why it is not measured.
        error: str or None, why it could not be measured.
    """

    task: object
    runs: list = dataclasses.field(default_factory=list)
    skipped: str | None = None
    error: str | None = None

    @property
    def name(self):
        return self.task.row

    @property
    def title(self):
        if self.name == "whole" and self.task.gradient_accumulation_steps == 1:
            return "plain"
        return ROWS[self.name]

    @property
    def group(self):
        """What the rows that are compared with each other have in common."""
        return self.task.model, self.task.gradient_accumulation_steps

    def summary(self):
        """Medians of the runs as a dictionary; empty if there are none."""
        if self.error or not self.runs:
            return {}
        seconds = [statistics.median(run["seconds"]) for run in self.runs]
        samples = self.task.batch_size

        def median(name):
            return statistics.median(run[name] for run in self.runs)

        # What a first update takes that a later one does not: tracing, compiling, filling
        # caches.
        start = [
            run["first_update_seconds"] - own for run, own in zip(self.runs, seconds, strict=True)
        ]
        return {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "samples_per_second": samples / statistics.median(seconds),
            "samples_per_second_min": samples / max(seconds),
            "samples_per_second_max": samples / min(seconds),
            "first_update_seconds": median("first_update_seconds"),
            "start_seconds": statistics.median(start),
            "peak_mib": median("peak_mib"),
            "growth_mib": median("growth_mib"),
            "parameters": self.runs[0]["parameters"],
        }


def make(tasks):
    """The rows of tasks, without those that are another one."""
    return [
        Row(task, skipped=_SKIPPED.get((task.model, task.row)))
        for task in tasks
        if task.gradient_accumulation_steps > 1 or task.row not in _OF_SEVERAL
    ]


def _limit_cores(threads):
    # JAX has no setting, and takes a thread for each core that it may use. So all get as many
    # cores as threads, where the system can do that: Linux.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _start(task, interpreter, timeout):
    """Measures a task in a process; returns what it answered."""
    program = "benchmark_torch.py" if task.row == "torch" else "benchmark_keras.py"
    threads = str(task.threads)
    try:
        # Kills the process when the time is over, or when this one is told to end.
        done = subprocess.run(
            [str(interpreter), str(_DIRECTORY / program), json.dumps(dataclasses.asdict(task))],
            # XLA for CPU reads NPROC, and documents it nowhere.
            env=os.environ | {"OMP_NUM_THREADS": threads, "NPROC": threads},
            preexec_fn=lambda: _limit_cores(task.threads),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise FailedError(f"killed after {timeout:g} s") from None
    if done.returncode < 0:
        # The kernel does so where memory is short.
        raise FailedError(f"killed by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise FailedError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _check_parameters(rows):
    """Raises DifferentModelsError unless all rows of a model have as many parameters."""
    counts = collections.defaultdict(dict)
    for row in rows:
        if row.runs:
            counts[row.task.model].setdefault(row.runs[-1]["parameters"], row.title)
    for model, found in counts.items():
        if len(found) > 1:
            said = " but ".join(f"{count:,} in '{title}'" for count, title in found.items())
            raise DifferentModelsError(f"{model} is not the same model everywhere: {said}")


def measure(rows, runs, timeout, peers_directory):
    """Measures rows, each run of each in a process of its own, the rows in turn.

    A row that fails keeps the reason, and is not tried again.

    Args:
        rows: list of Row, to which the runs are added.
        runs: int, for each row.
        timeout: float, seconds of a process.
        peers_directory: Path, where the environments of peers are.

    Raises:
        DifferentModelsError: If a model has more parameters in one row than in another.
    """
    interpreters = {}
    for peer in benchmark_peers.PEERS:
        own = [row for row in rows if row.name == peer]
        try:
            if own:
                interpreters[peer] = benchmark_peers.python(peer, peers_directory)
        except benchmark_peers.UnavailableError as e:
            for row in own:
                row.error = str(e)
    for i in range(runs):
        for row in rows:
            if row.skipped or row.error:
                continue
            model, k = row.group
            print(f"run {i + 1}/{runs}: {model}, K={k}, {row.title}", file=sys.stderr, flush=True)
            try:
                interpreter = interpreters.get(row.name, sys.executable)
                row.runs.append(_start(row.task, interpreter, timeout))
            except FailedError as e:
                row.error = " ".join(str(e).split())
                continue
            _check_parameters(rows)
