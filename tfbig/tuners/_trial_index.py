"""What is known of a study's trials, kept up to date with those that may have changed."""

import bisect
import datetime
import threading
from collections.abc import Callable

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

__all__ = ("TrialIndex",)


def _moment(trial: FrozenTrial) -> tuple[datetime.datetime, int]:
    """By which trials that have ended are ordered."""
    assert trial.datetime_complete is not None
    return trial.datetime_complete, trial.number


class TrialIndex:
    """The trials of a study as they were when it was read last, and what this process has written.

    A trial that has ended no longer changes, so it is looked at only once.

    Args:
        index_of: Returns the index of a trial in the ledger; None if it has none.
        is_void: Whether a trial has given its index back.
        has_failed: Whether a trial that has ended counts as failed.

    Attributes:
        by_index: The trials that have an index, without void ones. Of the same index, the last one.
        unfinished: The trials that have not ended, by number.
        ended: Those of `by_index` that have ended, in the order in which they did.
        failed: How many of `ended` have failed.
        distributions: Those of all parameters of trials that have ended, by name.
    """

    def __init__(
        self,
        index_of: Callable[[FrozenTrial], int | None],
        is_void: Callable[[FrozenTrial], bool],
        has_failed: Callable[[FrozenTrial], bool],
    ) -> None:
        self._index_of = index_of
        self._is_void = is_void
        self._has_failed = has_failed
        self._lock = threading.RLock()
        self._all: dict[int, FrozenTrial] = {}
        # How many trials there were when the study was read.
        self._read = 0
        self.by_index: dict[int, FrozenTrial] = {}
        self.unfinished: dict[int, FrozenTrial] = {}
        self.ended: list[FrozenTrial] = []
        self.failed = 0
        self.distributions: dict[str, BaseDistribution] = {}

    def read(self, trials: list[FrozenTrial]) -> None:
        """Takes notice of the trials of a study, all of them in order: numbers are places there."""
        with self._lock:
            for number in sorted(n for n in self.unfinished if n < self._read):
                self.put(trials[number])
            for trial in trials[self._read :]:
                self.put(trial)
            self._read = len(trials)

    def put(self, trial: FrozenTrial, is_stored: bool = True) -> None:
        """Takes notice of a trial.

        Args:
            trial: The trial.
            is_stored: Whether the storage has exactly this. If not, it is read again the next time.
        """
        with self._lock:
            before = self._all.get(trial.number)
            self._all[trial.number] = trial
            if before is None or before.number in self.unfinished:
                self._note(trial, is_stored and trial.state.is_finished())

    def _note(self, trial: FrozenTrial, is_final: bool) -> None:
        if is_final:
            self.unfinished.pop(trial.number, None)
            self.distributions |= trial.distributions
        else:
            self.unfinished[trial.number] = trial
        index = self._index_of(trial)
        if index is None:
            return
        known = self.by_index.get(index)
        if known is not None and known.number != trial.number:
            # Rare: another trial had the index before, or has it now.
            self._sort_anew()
        elif self._is_void(trial):
            self.by_index.pop(index, None)
        else:
            self.by_index[index] = trial
            if is_final:
                bisect.insort(self.ended, trial, key=_moment)
                self.failed += self._has_failed(trial)

    def _sort_anew(self) -> None:
        found: dict[int, FrozenTrial] = {}
        for trial in self.in_order():
            index = self._index_of(trial)
            if index is not None and not self._is_void(trial):
                found[index] = trial
        self.by_index = found
        ended = (t for t in found.values() if t.number not in self.unfinished)
        self.ended = sorted(ended, key=_moment)
        self.failed = sum(map(self._has_failed, self.ended))

    def in_order(self) -> list[FrozenTrial]:
        """All trials, by number."""
        with self._lock:
            return [self._all[number] for number in sorted(self._all)]
