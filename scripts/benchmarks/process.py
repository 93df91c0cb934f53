"""The process that measures one row of benchmark.py: what it is told, and what it answers.

It is told by one argument and answers in the last line of stdout, both JSON. It also runs in
the environments of the peers, so it uses the standard library alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import sys
import time

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
    """

    row: str
    model: str
    batch_size: int
    gradient_accumulation_steps: int
    steps: int
    threads: int

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


class Measurement:
    """Time from now to the end of each effective batch, and memory.

    Make it after the imports and the data, before the model.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._peak_before = peak_mib()
        self._ends: list[float] = []

    def begin(self) -> None:
        """Call it right before training."""
        self._ends.append(time.perf_counter())

    def end_batch(self) -> None:
        """Call it after each effective batch, its update included."""
        self._ends.append(time.perf_counter())

    def answer(self, parameters: int) -> None:
        """Prints what was measured."""
        seconds = [after - before for before, after in itertools.pairwise(self._ends)]
        if len(seconds) != self._task.batches:
            raise RuntimeError(f"{len(seconds)} updates instead of {self._task.batches}")
        peak = peak_mib()
        measured = {
            "first_update_seconds": seconds[0],
            "seconds": seconds[WARM_UP:],
            "peak_mib": peak,
            "growth_mib": peak - self._peak_before,
            "parameters": parameters,
        }
        print(json.dumps(measured))
