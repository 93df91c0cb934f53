"""Which workers take part in a start of the job."""

from collections.abc import Sequence

__all__ = ("Membership",)

# A worker that is the first to fail in so many starts in succession counts as lost.
LOST_AFTER = 2


class Membership:
    """Leaves out workers that are lost, as long as enough are left.

    The launcher sees which worker failed first, not why. Once may be chance, so the job starts
    again with all workers. A worker that is the first to fail again is left out of the next start.
    When that fails too, the worker is taken back, and left out as soon as it is the first to fail.

    Attributes:
        present: Numbers of the workers of the next start.
    """

    def __init__(self, workers: int, least: int) -> None:
        """Creates one in which all workers take part.

        Args:
            workers: Number of workers.
            least: Number of workers below which none is left out.
        """
        self._all = range(workers)
        self._least = least
        self._failures = dict.fromkeys(self._all, 0)
        self.present: Sequence[int] = self._all

    @property
    def absent(self) -> list[int]:
        """Numbers of the workers that the next start leaves out."""
        return [i for i in self._all if i not in self.present]

    def record_failure(self, worker: int) -> None:
        """Decides who takes part in the next start.

        Args:
            worker: Number of the worker that was the first to fail in the last one.
        """
        if not self._is_lost(worker):
            # The others held out until something new happened. What a worker known as lost says of
            # them is nothing: it may have failed before their turn came.
            self._failures.update(dict.fromkeys(set(self.present) - {worker}, 0))
        self._failures[worker] += 1
        absent = {*self.absent, worker} if self._is_lost(worker) else set()
        if len(self._all) - len(absent) < self._least:
            absent = {worker} if len(self._all) > self._least else set()
        self.present = [i for i in self._all if i not in absent]

    def _is_lost(self, worker: int) -> bool:
        return self._failures[worker] >= LOST_AFTER
