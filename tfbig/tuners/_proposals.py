"""Values to try next; each combination belongs to one trial alone."""

import enum
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from tfbig.tuners import _json, _learning_study, _space, _study, _trials, _tried, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("EXHAUSTED", "Proposals")

# After so many suggestions that were tried before, and as many at random, the first untried
# combination is taken.
_MAX_COLLISIONS = 20

# So many combinations are looked at for the one that a trial has claimed. In a larger space, the
# sampler suggests it again, or another one.
_MAX_LOOKED_AT = 100_000


class Exhausted(enum.Enum):
    """Returned instead of a combination if all have been tried."""

    EXHAUSTED = enum.auto()


EXHAUSTED: Final = Exhausted.EXHAUSTED


class Proposals:
    """Asks the sampler until it suggests a combination that no trial has.

    Args:
        trials: The trials so far.
        seed: The seed of the search.
        hyperparameters: Returns the hyperparameters known so far.
        values_of: Returns all values of a hyperparameter; None if there are infinitely many.
        initial: Names of the hyperparameters that the program has before any trial.
        learned_from: Returns trials as samplers are to see them.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        seed: int,
        hyperparameters: Callable[[], HyperParameters],
        values_of: Callable[[_tuner_types.Hyperparameter], Iterable[_tuner_types.Value] | None],
        initial: set[str],
        learned_from: Callable[[list[FrozenTrial]], list[FrozenTrial]] = lambda trials: trials,
    ) -> None:
        self._trials = trials
        self._learned_from = learned_from
        self._ledger = trials.ledger
        self._seed = seed
        self._hyperparameters = hyperparameters
        self._values_of = values_of
        self._tried = _tried.TriedCombinations(trials, hyperparameters, initial)
        self._spaces = _learning_study.SharedSpaces()
        # The last name that this process has claimed for a trial, by index.
        self._claimed: dict[int, str] = {}
        # The combinations of so many hyperparameters that were not looked at yet; the last one that
        # was, unless it is known to be tried.
        self._size = -1
        self._rest: Iterator[_tuner_types.Values] = iter(())
        self._candidate: _tuner_types.Values | None = None

    def values_for(self, index: int) -> _tuner_types.Values | None:
        """Values claimed for a trial; None if the space is exhausted."""
        if index == 0:
            values = _space.default_values(self._hyperparameters())
            if self.claim(index, values):
                return values
        with _study.quiet():
            return self._suggested(index) or self._first_unclaimed(index)

    def _suggested(self, index: int) -> _tuner_types.Values | None:
        """Values that the sampler suggests, claimed for a trial; None if all were tried."""
        is_tried, is_infinite = self._is_tried(), self._is_infinite()
        frozen = self._trials.of(index)
        seen = self._as_samplers_see(frozen)
        # The first untried combinations are all in one corner of the space, so random ones come
        # before them.
        for attempt in range(_MAX_COLLISIONS * (1 if is_infinite else 2)):
            # Seeded for each trial, so that a resumed search makes the same suggestions.
            seeds = np.random.SeedSequence([self._seed, index, attempt])
            seed = int(seeds.generate_state(1)[0])
            if attempt < _MAX_COLLISIONS:
                self._trials.seed(seed)
                sampler = self._trials.study.sampler
            else:
                sampler = optuna.samplers.RandomSampler(seed)
            values = self._suggestion(sampler, seen, frozen)
            if not is_tried(values) and self.claim(index, values):
                return values
        return None

    def _first_unclaimed(self, index: int) -> _tuner_types.Values | None:
        """The first combination that nobody has, claimed for a trial; None if there is none."""
        while isinstance(untried := self.first_untried(), dict):
            if self.claim(index, untried):
                return untried
        # Also if the sampler repeats itself in an infinite space.
        return None

    def completed(self, index: int, seed: int, given: _tuner_types.Values) -> _tuner_types.Values:
        """Values of which some are given, and the others are chosen; claimed for a trial.

        Nobody has tried them, unless all that have the given ones were tried.

        Args:
            index: The index of the trial.
            seed: The seed of the sampler.
            given: By name.
        """
        frozen, is_tried = self._trials.of(index), self._is_tried()
        with _study.quiet():
            seen = self._as_samplers_see(frozen)
            for attempt in range(_MAX_COLLISIONS):
                seeds = np.random.SeedSequence([seed, attempt])
                self._trials.seed(int(seeds.generate_state(1)[0]))
                values = self._suggestion(self._trials.study.sampler, seen, frozen, given)
                is_new = not is_tried(values) and self.claim(index, values)
                if is_new or values.keys() == given.keys():
                    return values
        return self.first_with(index, given) or values

    def first_with(self, index: int, given: _tuner_types.Values) -> _tuner_types.Values | None:
        """The first combination with given values that nobody has, claimed for a trial.

        Args:
            index: The index of the trial.
            given: By name.

        Returns:
            None if there is none, or in an infinite space.
        """
        if self._is_infinite():
            return None
        is_tried, waiting = self._tried.look(), self._trials.enqueued_values()
        for values in _space.combinations(self._hyperparameters(), self._values_of, given):
            is_free = not is_tried(values) and _json.dumps(values) not in waiting
            if is_free and self.claim(index, values):
                return values
        return None

    def _as_samplers_see(self, frozen: FrozenTrial) -> _learning_study.LearningStudy:
        """The study that the sampler of a trial learns from."""
        study = self._trials.study
        filtered = optuna.pruners._filter_study(study, frozen)
        # Hyperband's pruner shows the trials of a bracket.
        seen = self._trials.all if filtered is study else filtered.get_trials
        return _learning_study.LearningStudy(filtered, lambda: self._learned_from(seen()))

    def _suggestion(
        self,
        sampler: optuna.samplers.BaseSampler,
        filtered: optuna.Study,
        frozen: FrozenTrial,
        given: _tuner_types.Values | None = None,
    ) -> _tuner_types.Values:
        self._spaces.give(sampler)
        sampler.before_trial(filtered, frozen)
        space = sampler.infer_relative_search_space(filtered, frozen)
        relative = sampler.sample_relative(filtered, frozen, space)

        def value(name: str, distribution: BaseDistribution) -> _tuner_types.Value:
            if distribution.single():
                return distribution.to_external_repr(getattr(distribution, "low", 0))
            if name in relative:
                found = relative[name]
                if distribution._contains(distribution.to_internal_repr(found)):
                    return found
            return sampler.sample_independent(filtered, frozen, name, distribution)

        known = self._trials.known_distributions()
        return _space.suggested(value, self._hyperparameters(), known, given)

    def claim(self, index: int, values: _tuner_types.Values) -> bool:
        """Claims a combination for a trial; returns whether the trial has it now."""
        name = _json.name_of(values)
        # Claims are never taken back, so the ledger need not be asked again when the trial ends.
        if self._claimed.get(index) != name:
            if not self._ledger.claim(index, name):
                return False
            self._claimed[index] = name
        return True

    def claimed(self, index: int) -> _tuner_types.Values | None:
        """The combination that a trial has claimed in a finite space; None if none is found."""
        own = set() if self._is_infinite() else self._ledger.claims(index=index)
        if not own:
            return None
        combinations = itertools.islice(self._combinations(), _MAX_LOOKED_AT)
        return next((v for v in combinations if _json.name_of(v) in own), None)

    def first_untried(self) -> _tuner_types.Values | Literal[Exhausted.EXHAUSTED] | None:
        """The first combination that no trial has, or `EXHAUSTED`; None in an infinite space."""
        if self._is_infinite():
            return None
        size = len(self._hyperparameters().space)
        if size != self._size:
            self._size, self._rest, self._candidate = size, self._combinations(), None
        is_tried = self._tried.look()
        while True:
            # What was tried stays so: each combination is looked at until then.
            if self._candidate is None:
                self._candidate = self._next_combination()
            if self._candidate is None:
                return EXHAUSTED
            is_claimed = self._ledger.claims(name=_json.name_of(self._candidate))
            if not is_claimed and not is_tried(self._candidate):
                return self._candidate
            self._candidate = None

    def _next_combination(self) -> _tuner_types.Values | None:
        try:
            return next(self._rest, None)
        except BaseException:
            # An interrupted generator has ended, but not because nothing is left.
            self._size = -1
            raise

    def _is_tried(self) -> Callable[[_tuner_types.Values], bool]:
        return (lambda values: False) if self._is_infinite() else self._tried.look()

    def _is_infinite(self) -> bool:
        return any(self._values_of(hp) is None for hp in self._hyperparameters().space)

    def _combinations(self) -> Iterator[_tuner_types.Values]:
        return _space.combinations(self._hyperparameters(), self._values_of)
