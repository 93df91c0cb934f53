"""The trials of a search as KerasTuner sees them."""

import heapq
from collections.abc import Callable

from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _objectives, _running, _trials, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("TrialViews", "trial_id_of")


def trial_id_of(index: int) -> str:
    """KerasTuner's id of the trial of an index."""
    return f"{index:04d}"


class TrialViews:
    """Makes KerasTuner's trials of the study's.

    Args:
        trials: The trials of the search.
        running: Those of this process, which are shown as this process knows them.
        objectives: What the search optimizes.
        hyperparameters: Returns the hyperparameters known so far.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        running: _running.RunningTrials,
        objectives: _objectives.Objectives,
        hyperparameters: Callable[[], HyperParameters],
    ) -> None:
        self._trials = trials
        self._running = running
        self._objectives = objectives
        self._hyperparameters = hyperparameters
        # Ended trials, by their number in the study: they do not change any more.
        self._ended: dict[int, _tuner_types.Trial] = {}

    def _view(self, frozen: FrozenTrial) -> _tuner_types.Trial:
        trial_id = trial_id_of(frozen.user_attrs[_trials.INDEX])
        if (running := self._running.get(trial_id)) is not None:
            return running.trial
        if frozen.number in self._ended:
            return self._ended[frozen.number]
        trial = _trials.as_keras_tuner(frozen, trial_id, self._hyperparameters().copy())
        if frozen.state.is_finished():
            self._ended[frozen.number] = trial
        return trial

    def by_id(self) -> dict[str, _tuner_types.Trial]:
        """All trials by id, in order."""
        found = sorted(self._trials.by_index().items())
        return {trial_id_of(index): self._view(frozen) for index, frozen in found}

    def of(self, trial_id: str) -> _tuner_types.Trial:
        """The trial of an id."""
        if (running := self._running.get(trial_id)) is not None:
            return running.trial
        return self.by_id()[trial_id]

    def ended_ids(self) -> list[str]:
        """Ids of ended trials, in the order in which they ended."""
        return [trial_id_of(t.user_attrs[_trials.INDEX]) for t in self._trials.ended()]

    def best(self, count: int) -> list[_tuner_types.Trial]:
        """The best feasible trials, best first; with several objectives, the Pareto front."""
        # What was transferred from another search is none of them.
        complete = (t for t in self._trials.by_index().values() if t.state == TrialState.COMPLETE)
        found = [t for t in complete if all(v <= 0 for v in t.constraints.values())]
        rank = self._objectives.rank
        if self._objectives.is_single:
            best = heapq.nsmallest(count, found, key=rank)
        else:
            best = _objectives.pareto_front(found, rank)[:count]
        return [self._view(t) for t in best]
