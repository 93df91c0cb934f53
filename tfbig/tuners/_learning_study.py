"""A study as samplers see it, so that they learn from infeasible trials as well."""

import copy
from collections.abc import Callable, Container, Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _trials

__all__ = ("LearningStudy", "penalized")

# The constraint that infeasible trials violate.
_FEASIBILITY = "constraints:tfbig:infeasible"


class LearningStudy(optuna.Study):
    """Shows infeasible trials as `penalized` does; stores nothing.

    Args:
        study: The study whose trials are shown.
        trials: Returns its trials, in order.
    """

    def __init__(self, study: optuna.Study, trials: Callable[[], list[FrozenTrial]]) -> None:
        # Not that of `optuna.Study`, which reads the storage.
        vars(self).update(vars(study))
        self._all = trials

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        del use_cache
        found = penalized(self._all(), self.directions)
        if states is not None:
            found = [t for t in found if t.state in states]
        return copy.deepcopy(found) if deepcopy else found


def penalized(trials: list[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """Trials, of which infeasible ones look complete, with the worst value of a complete one.

    Samplers that know constraints see in addition that they violate one. Others see the value.
    """
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    infeasible = {
        t.number
        for t in trials
        if t.state == TrialState.FAIL
        and t.user_attrs.get(_trials.WHY) == _trials.INFEASIBLE
        and t.params
    }
    if not infeasible or not complete:
        return trials
    worst = [
        (max if direction == StudyDirection.MINIMIZE else min)(t.values[i] for t in complete)
        for i, direction in enumerate(directions)
    ]
    # Samplers want every trial to have the same constraints. Those of the user are not known.
    own = {f"constraints:{name}": 0.0 for t in complete for name in t.constraints}
    found = []
    for trial in trials:
        if trial.number in infeasible:
            trial = copy.copy(trial)
            trial.state, trial.values = TrialState.COMPLETE, worst
            trial.system_attrs = trial.system_attrs | own | {_FEASIBILITY: 1.0}
        elif trial.state == TrialState.COMPLETE:
            trial = copy.copy(trial)
            trial.system_attrs = trial.system_attrs | {_FEASIBILITY: 0.0}
        found.append(trial)
    return found
