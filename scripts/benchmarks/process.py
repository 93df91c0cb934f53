"""The process that measures one row of benchmark.py: what it is told, and what it answers.

It is told by one argument and answers in the last line of stdout, both JSON. It also runs in
the environments of the peers, so it uses the standard library alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable

WARM_UP = 2  # Effective batches before the timed ones.
LEARNING_RATE, EPSILON = 1e-3, 1e-7  # Adam's; the default epsilon differs between frameworks.

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_MIB = 2**20 if sys.platform == "darwin" else 2**10


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        row: A key of `rows.ROWS`.
        model: A key of `models.MODELS`.
        batch_size: Samples of an effective batch.
        gradient_accumulation_steps: Micro-batches per effective batch; divides it.
        steps: Effective batches to time.
        threads: Threads of an operation.
        hardware: A value of --hardware.
    """

    row: str
    model: str
    batch_size: int
    gradient_accumulation_steps: int
    steps: int
    threads: int
    hardware: str = "cpu"

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch."""
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def batches(self) -> int:
        """Effective batches to train on."""
        return WARM_UP + self.steps


def read_task() -> Task:
    """The task of this process."""
    return Task(**json.loads(sys.argv[1]))


def peak_mib() -> float:
    """The largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_MIB


def resident_mib() -> float:
    """The resident size of this process, in MiB. On Linux."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Measurement:
    """Time from now to the end of each effective batch, CPU time, and memory.

    Make it after the imports and the data, before the model.

    Args:
        task: What is measured.
        peak: The largest memory so far, in MiB.
    """

    def __init__(self, task: Task, peak: Callable[[], float] = peak_mib) -> None:
        self._task = task
        self._peak = peak
        self._peak_before = peak()
        self._ends: list[float] = []
        self._cpu_ends: list[float] = []

    def begin(self) -> None:
        """Call it right before training."""
        self.end_batch()

    def end_batch(self) -> None:
        """Call it after each effective batch, its update included."""
        self._ends.append(time.perf_counter())
        self._cpu_ends.append(time.process_time())

    def answer(self, parameters: int, floor: Callable[[], float] | None = None) -> None:
        """Prints what was measured.

        Args:
            parameters: Of the model.
            floor: Measures milliseconds for the products of a sample. It is called after all else
                is measured, since it takes memory.
        """
        seconds, cpu_seconds = (
            [after - before for before, after in itertools.pairwise(ends)]
            for ends in (self._ends, self._cpu_ends)
        )
        if len(seconds) != self._task.batches:
            raise RuntimeError(f"{len(seconds)} updates instead of {self._task.batches}")
        peak = self._peak()
        measured = {
            "first_update_seconds": seconds[0],
            "seconds": seconds[WARM_UP:],
            "cpu_seconds": cpu_seconds[WARM_UP:],
            "peak_mib": peak,
            "growth_mib": peak - self._peak_before,
            "parameters": parameters,
            "floor_milliseconds": None if floor is None else floor(),
        }
        print(json.dumps(measured))
