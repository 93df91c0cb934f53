"""The process that measures one row of benchmark.py: what it is told, and what it answers.

Told is one argument, answered the last line on stdout, both JSON. It runs in the
environments of the peers too, hence the standard library alone.
"""

import dataclasses
import itertools
import json
import resource
import sys
import time

WARM_UP = 2  # Effective batches before the clock counts.
LEARNING_RATE, EPSILON = 1e-3, 1e-7  # Adam's, whose second one differs between frameworks.

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_MIB = 2**20 if sys.platform == "darwin" else 2**10


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        row: str, a key of `benchmark_rows.ROWS`.
        model: str, a key of `benchmark_models.MODELS`.
        batch_size: int, samples of an effective batch.
        gradient_accumulation_steps: int, micro-batches per effective batch; divides it.
        steps: int, effective batches measured.
        threads: int, those of an operation.
    """

    row: str
    model: str
    batch_size: int
    gradient_accumulation_steps: int
    steps: int
    threads: int

    @property
    def micro_batch_size(self):
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def batches(self):
        """Effective batches to train on."""
        return WARM_UP + self.steps


def read_task():
    """The task of this process."""
    return Task(**json.loads(sys.argv[1]))


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_MIB


class Measurement:
    """Time from now to the end of each effective batch, and memory.

    Made when the imports are done and the data are there, before there is a model.
    """

    def __init__(self, task):
        self._task = task
        self._peak_before = peak_mib()
        self._ends = []

    def begin(self):
        """Training is asked for."""
        self._ends.append(time.perf_counter())

    def end_batch(self):
        """An effective batch has ended, its update included."""
        self._ends.append(time.perf_counter())

    def answer(self, parameters):
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
