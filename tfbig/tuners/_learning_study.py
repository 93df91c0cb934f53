"""A study as samplers see it, so that they learn from infeasible trials as well."""

import collections
import copy
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _trials

__all__ = ("LearningStudy", "SharedSpaces", "by_place", "penalized")

# How many trials must have been trained for so many epochs for samplers to compare them there.
_ENOUGH = 10

# The constraint that infeasible trials violate.
_FEASIBILITY = "constraints:tfbig:infeasible"


class LearningStudy(optuna.Study):
    """Shows infeasible trials as `penalized` does; stores nothing.

    Args:
        study: The study whose trials are shown.
        trials: Returns its trials, in order; asked once, as samplers ask several times.
    """

    def __init__(self, study: optuna.Study, trials: Callable[[], list[FrozenTrial]]) -> None:
        # Not that of `optuna.Study`, which reads the storage.
        vars(self).update(vars(study))
        self._shown = functools.cache(lambda: penalized(trials(), self.directions))

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        del use_cache
        found = self._shown()
        if states is not None:
            found = [t for t in found if t.state in states]
        return copy.deepcopy(found) if deepcopy else list(found)


class SharedSpaces:
    """Remembers for samplers, of which each trial has a new one, which parameters trials have."""

    def __init__(self) -> None:
        # What trials have had: each set of parameters once.
        self._known: list[dict[str, BaseDistribution]] = []
        # The place there, by the number of a trial and how many parameters it has, which are only
        # ever added.
        self._places: dict[tuple[int, int], int] = {}

    def give(self, sampler: optuna.samplers.BaseSampler) -> None:
        """Has a sampler ask this for the parameters that all trials have, if it is Optuna's."""
        asked = getattr(sampler, "_search_space", None)
        if type(asked) is IntersectionSearchSpace:
            vars(sampler)["_search_space"] = _Intersection(self, asked._include_pruned)

    def of(self, trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
        """The parameters that all of some trials have, with the same distributions; by name."""
        found = [self._known[place] for place in {self._place(trial) for trial in trials}]
        if not found:
            return {}
        first, *others = found
        common = {n: d for n, d in first.items() if all(other.get(n) == d for other in others)}
        return dict(sorted(common.items()))

    def _place(self, trial: FrozenTrial) -> int:
        parameters = trial.distributions
        key = trial.number, len(parameters)
        place = self._places.get(key)
        if place is None:
            if parameters not in self._known:
                self._known.append(parameters)
            place = self._places[key] = self._known.index(parameters)
        return place


class _Intersection(IntersectionSearchSpace):
    """As Optuna's, which reads all trials again for each sampler."""

    def __init__(self, spaces: SharedSpaces, include_pruned: bool) -> None:
        super().__init__(include_pruned)
        self._spaces = spaces

    def calculate(
        self, study: optuna.Study, use_cache: bool = False
    ) -> dict[str, BaseDistribution]:
        states = [TrialState.COMPLETE] + [TrialState.PRUNED] * self._include_pruned
        return self._spaces.of(study._get_trials(False, states, use_cache))


def penalized(trials: list[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """Trials, of which infeasible ones look complete, with the worst value of a complete one.

    Samplers that know constraints see in addition that they violate one. Others see the value.
    """
    infeasible = {
        t.number
        for t in trials
        if t.state == TrialState.FAIL
        and t.user_attrs.get(_trials.WHY) == _trials.INFEASIBLE
        and t.params
    }
    complete = [t for t in trials if t.state == TrialState.COMPLETE] if infeasible else []
    if not complete:
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


def by_place(
    trials: list[FrozenTrial],
    scores: Mapping[int, Mapping[int, float]],
    direction: StudyDirection,
) -> list[FrozenTrial]:
    """Trials that were trained in rungs, as complete ones whose values are their places.

    Scores can be compared only after the same epochs. As in BOHB (Falkner, Klein and Hutter, ICML
    2018), these are the most that enough trials have reached. Trials that were not promoted as far
    come after those, and the shorter they were trained, the later.

    Args:
        trials: The trials of the study.
        scores: By the index of a trial, its scores by epochs.
        direction: That of the scores.
    """
    reached = collections.Counter(epochs for found in scores.values() for epochs in found)
    enough = [epochs for epochs, count in reached.items() if count >= _ENOUGH]
    compared = max(enough) if enough else min(reached, default=0)
    sign = 1 if direction == StudyDirection.MINIMIZE else -1

    def order(index: int) -> tuple[int, float]:
        found = scores[index]
        # Some have begun with more epochs.
        epochs = min((e for e in found if e >= compared), default=max(found))
        return -min(epochs, compared), sign * found[epochs]

    scored = sorted((index for index, found in scores.items() if found), key=order)
    places = {index: place for place, index in enumerate(scored)}
    seen = []
    for trial in trials:
        place = places.get(trial.user_attrs.get(_trials.INDEX, -1))
        if place is not None and trial.state != TrialState.FAIL:
            trial = copy.copy(trial)
            trial.state, trial.values = TrialState.COMPLETE, [float(sign * place)]
        seen.append(trial)
    return seen
