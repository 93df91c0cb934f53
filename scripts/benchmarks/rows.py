"""The rows of benchmark.py: what each is called, and the processes that measure them."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import peers
from benchmarks.process import Task

ROWS = {
    "whole": "plain, whole batch",
    "built_in": "plain, built-in accumulation",
    "built_in_jit": "plain, built-in accumulation, jit_compile",
    "micro": "plain, micro-batch",
    "tfbig": "tfbig",
    "jit": "tfbig, jit_compile",
    "no_jit": "tfbig, jit_compile=False",
    "recompute": "tfbig, recompute",
    "pipeline": "tfbig, pipeline",
    "torch": "PyTorch, Accelerate",
    "jax": "Keras on JAX, built-in accumulation",
}
OF_TFBIG = ("tfbig", "jit", "no_jit", "recompute", "pipeline")
# Measured only where they are named: stages are for models that do not fit on one device.
ON_REQUEST = ("no_jit", "pipeline")
# With one micro-batch these equal "whole".
_OF_SEVERAL = ("built_in", "built_in_jit", "micro")
_SKIPPED = {("cnn", "jit"): "XLA on CPU runs convolutions in a loop very slowly"}

_SCRIPTS = pathlib.Path(__file__).parents[1]


class FailedError(Exception):
    """A row was not measured; the message says why, in one line."""


class DifferentModelsError(Exception):
    """Two rows measured different models."""


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
        task: What its processes measure.
        runs: What each process measured.
        skipped: Why it is not measured, or None.
        error: Why it could not be measured, or None.
    """

    task: Task
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        return self.task.row

    @property
    def title(self) -> str:
        if self.name == "whole" and self.task.gradient_accumulation_steps == 1:
            return "plain"
        return ROWS[self.name]

    @property
    def group(self) -> tuple[str, int]:
        """Model and number of micro-batches: rows with the same ones are compared."""
        return self.task.model, self.task.gradient_accumulation_steps

    def summary(self) -> dict[str, Any]:
        """Medians of the runs; empty if there are none."""
        if self.error or not self.runs:
            return {}
        seconds = [statistics.median(run["seconds"]) for run in self.runs]
        samples = self.task.batch_size

        def median(name: str) -> float:
            return statistics.median(run[name] for run in self.runs)

        # The first update also traces, compiles and fills caches.
        start = [
            run["first_update_seconds"] - own for run, own in zip(self.runs, seconds, strict=True)
        ]
        return {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "cpu_seconds": statistics.median(
                statistics.median(run["cpu_seconds"]) for run in self.runs
            ),
            **self._floor(seconds),
            "samples_per_second": samples / statistics.median(seconds),
            "samples_per_second_min": samples / max(seconds),
            "samples_per_second_max": samples / min(seconds),
            "first_update_seconds": median("first_update_seconds"),
            "start_seconds": statistics.median(start),
            "peak_mib": median("peak_mib"),
            "growth_mib": median("growth_mib"),
            "parameters": self.runs[0]["parameters"],
        }

    def _floor(self, seconds: list[float]) -> dict[str, float]:
        """The floor in milliseconds a sample, and how many times as long the row takes.

        Args:
            seconds: Of each run, for an effective batch.
        """
        floors = [run.get("floor_milliseconds") for run in self.runs]
        if None in floors:
            return {}
        # Of one process each, so that other load is in both.
        ratios = [
            1e3 * own / self.task.batch_size / floor
            for own, floor in zip(seconds, floors, strict=True)
        ]
        return {
            "floor_milliseconds": statistics.median(floors),
            "floor_ratio": statistics.median(ratios),
        }


def make(tasks: list[Task]) -> list[Row]:
    """The rows of tasks, without those that repeat another one."""
    return [
        Row(task, skipped=_skipped(task))
        for task in tasks
        if task.gradient_accumulation_steps > 1 or task.row not in _OF_SEVERAL
    ]


def _skipped(task: Task) -> str | None:
    return _SKIPPED.get((task.model, task.row)) if task.hardware == "cpu" else None


def _limit_cores(threads: int) -> None:
    # JAX has no setting and starts a thread for each core that it may use. So every row gets as
    # many cores as threads, where the system allows it: on Linux.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _run(task: Task, interpreter: pathlib.Path | str, timeout: float) -> dict[str, Any]:
    """Measures a task in a process; returns what it answered."""
    module = "benchmarks.with_torch" if task.row == "torch" else "benchmarks.with_keras"
    threads = str(task.threads)
    path = [str(_SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": threads,
        "NPROC": threads,  # XLA for CPU reads it, and documents it nowhere.
    }
    try:
        # Kills the process when the time is over, or when this one is told to end.
        done = subprocess.run(
            # -P: a directory `benchmarks` of the user must not be imported instead.
            [str(interpreter), "-P", "-m", module, json.dumps(dataclasses.asdict(task))],
            env=os.environ | variables,
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


def _check_parameters(rows: list[Row]) -> None:
    """Raises DifferentModelsError unless all rows of a model have the same number of parameters."""
    counts: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for row in rows:
        if row.runs:
            counts[row.task.model].setdefault(row.runs[-1]["parameters"], row.title)
    for model, found in counts.items():
        if len(found) > 1:
            said = " but ".join(f"{count:,} in '{title}'" for count, title in found.items())
            raise DifferentModelsError(f"{model} is not the same model everywhere: {said}")


def measure(
    rows: list[Row], runs: int, timeout: float, peers_directory: pathlib.Path | str
) -> None:
    """Measures rows, each run of each in a process of its own, the rows in turn.

    A row that fails keeps the reason and is not retried.

    Args:
        rows: The runs are added to them.
        runs: Processes for each row.
        timeout: Seconds after which a process is killed.
        peers_directory: Where the environments of peers are.

    Raises:
        DifferentModelsError: If a model has more parameters in one row than in another.
    """
    interpreters = {}
    for peer in peers.PEERS:
        own = [row for row in rows if row.name == peer]
        try:
            if own:
                interpreters[peer] = peers.python(peer, peers_directory)
        except peers.UnavailableError as e:
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
                row.runs.append(_run(row.task, interpreter, timeout))
            except FailedError as e:
                row.error = " ".join(str(e).split())
                continue
            _check_parameters(rows)
