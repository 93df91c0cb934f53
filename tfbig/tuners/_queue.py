"""Which trial a process runs next, and with which values."""

from collections.abc import Callable

from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _ledger, _proposals, _running, _trials, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("TrialQueue",)

# How often a trial whose process died is run again.
_MAX_DEATHS = 20


class TrialQueue:
    """Hands out trials: abandoned ones first, then paused ones, then new ones.

    Args:
        trials: The trials of the search.
        proposals: Values that no trial has.
        values_for: Returns values for the trial of an index; None if the space is exhausted.
        hyperparameters: Returns the hyperparameters known so far.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        proposals: _proposals.Proposals,
        values_for: Callable[[int], _tuner_types.Values | None],
        hyperparameters: Callable[[], HyperParameters],
    ) -> None:
        self._trials = trials
        self._ledger = trials.ledger
        self._proposals = proposals
        self._values_for = values_for
        self._hyperparameters = hyperparameters
        # Whether this process may run a trial that another one has given up.
        self.may_run: Callable[[_ledger.TrialRow], bool] = lambda row: True

    def next(self, max_trials: int | None) -> tuple[int, FrozenTrial] | None:
        """Index and values of a trial that this process owns from now on; None if there is none."""
        for row in self._ledger.abandoned():
            if not self.may_run(row) or not self._ledger.take(row, died=bool(row.owner)):
                continue
            if row.deaths >= _MAX_DEATHS:
                message = f"The processes that ran it died, {row.deaths + 1} times."
                attrs = {_trials.MESSAGE: message, _trials.WHY: _trials.BROKEN}
                self._trials.end(row.index, TrialState.FAIL, attrs)
                continue
            if (frozen := self.begin(row.index)) is not None:
                return row.index, frozen
        for take in (self.take_paused, lambda: self.take_new(max_trials)):
            index = take()
            if index is not None and (frozen := self.begin(index)) is not None:
                return index, frozen
        return None

    def is_over(self) -> bool:
        """Whether no trial runs or is paused; until then, one may become free."""
        return not self._ledger.count(_ledger.RUNNING, _ledger.PAUSED)

    def take_paused(self) -> int | None:
        """Hook: a paused trial that continues now, owned by this process; None if there is none."""
        return None

    def take_new(self, max_trials: int | None) -> int | None:
        """Hook: a new trial, owned by this process; None if there may be no more."""
        is_exhausted = self._proposals.first_untried() is _proposals.EXHAUSTED
        if is_exhausted and not self._trials.has_enqueued():
            return None
        return self._ledger.take_new(max_trials)

    def pause(self, running: _running.RunningTrial) -> bool:
        """Hook: whether a completed trial is put back, to be continued later."""
        del running
        return False

    def begin(self, index: int) -> FrozenTrial | None:
        """The study's trial of an index, with values; None if there are none for it."""
        frozen = self._trials.of(index)
        if _trials.VALUES in frozen.user_attrs:
            return frozen
        values = self._proposals.claimed(index)
        if values is None:
            values = self._values_for(index)
        if values is None:
            # Since this process looked, another has taken the last values. Its place becomes free:
            # there may be values again once more hyperparameters are known.
            self._trials.end(index, TrialState.FAIL, {_trials.WHY: _trials.VOID})
            return None
        return self._trials.store(frozen, self._hyperparameters(), values)
