"""Trials that ran out of memory: a process with more of it may run them."""

from __future__ import annotations

import json
import time

from optuna.trial import TrialState

from tfbig import _integers, _keras
from tfbig.tuners import _ledger, _trials

__all__ = ("ProcessMemory", "checked")

# In the note of a trial: the bytes of the processes in which it ran out of memory, at most.
_RAN_OUT = "ran out"


def checked(value: object) -> int | None:
    """The option `process_memory`.

    Raises:
        InvalidOptionError: If it is not valid.
    """
    rule = "an integer >= 1, a number of bytes, or None"
    return _integers.checked_or_none("process_memory", value, rule=rule)


class ProcessMemory:
    """Leaves trials to processes with more memory, as long as there are any.

    Args:
        trials: The trials of the search.
        grace: Seconds for which a trial waits for a process that does nothing else.
    """

    def __init__(self, trials: _trials.Trials, grace: float) -> None:
        self._trials = trials
        self._ledger = trials.ledger
        self._grace = grace
        self._own: int | None = None
        # By index: when this process first saw that nobody takes a trial.
        self._waiting: dict[int, float] = {}

    def join(self, own: int | None) -> None:
        """Lets other processes know how much memory this one has, if that is known."""
        self._own = own
        if own is not None:
            self._ledger.join_with(own)

    def leave_to_larger(self, index: int) -> bool:
        """Releases a trial of this process that ran out of memory, if another one has more.

        Returns:
            Whether it was released.
        """
        if self._own is None or not self._larger(self._own):
            return False
        return self._ledger.release(index, **{_RAN_OUT: self._own})

    def _larger(self, size: int) -> list[str]:
        """The processes that have more memory, as far as is known."""
        return [owner for owner, own in self._ledger.memory_of_processes().items() if own > size]

    def may_run(self, row: _ledger.TrialRow) -> bool:
        """Whether this process has the memory for a trial.

        A trial for which no process is left that has, ends as infeasible.
        """
        ran_out = json.loads(row.note).get(_RAN_OUT)
        if ran_out is None or (self._own is not None and self._own > ran_out):
            return True
        larger = self._larger(ran_out)
        busy = {other.owner for other in self._ledger.trials(state=_ledger.RUNNING)}
        busy -= {other.owner for other in self._ledger.abandoned()}
        since = self._waiting.setdefault(row.index, time.monotonic())
        if busy & set(larger):
            self._waiting.pop(row.index)
            return False
        has_none_left = not larger or time.monotonic() - since >= self._grace
        if has_none_left and self._ledger.take(row):
            size = _keras.memory.readable(ran_out)
            message = f"Out of memory, in a process with {size}; none with more is left."
            attrs = {_trials.MESSAGE: message, _trials.WHY: _trials.INFEASIBLE}
            self._trials.end(row.index, TrialState.FAIL, attrs)
        return False
