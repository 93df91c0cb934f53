"""Values to try next, each combination claimed by one trial alone."""

import hashlib

import numpy as np
import optuna
from optuna.trial import TrialState

from tfbig.tuners import _json, _space, _study, _trials

__all__ = ("Proposals",)

# Suggestions that were tried before, until the first untried one is taken.
_MOST_COLLISIONS = 20


def name_of(values):
    """What a combination is claimed by."""
    return hashlib.sha256(_json.dumps(values).encode()).hexdigest()[:40]


class Exhausted:
    """Stands for the combination that there is not."""


EXHAUSTED = Exhausted()


class Proposals:
    """Asks the sampler, until it suggests what no trial has.

    Args:
        trials: `Trials`.
        seed: int, that of the search.
        hyperparameters: function that returns the `HyperParameters` known so far.
        values_of: function of a hyperparameter that returns all its values, or None where they
            are endless.
        initial: set of str, names of the hyperparameters that the program has before any trial.
    """

    def __init__(self, trials, seed, hyperparameters, values_of, initial):
        self._trials = trials
        self._ledger = trials.ledger
        self._seed = seed
        self._hyperparameters = hyperparameters
        self._values_of = values_of
        self._initial = initial

    def values_for(self, slot):
        """Values claimed for a slot; None where the space is exhausted."""
        if slot == 0:
            values = _space.default_values(self._hyperparameters())
            if self.claim(slot, values):
                return values
        is_known = self._known()
        for attempt in range(_MOST_COLLISIONS):
            # Of its own for each trial: a search that is resumed goes on as it would have.
            seeds = np.random.SeedSequence([self._seed, slot, attempt])
            with _study.quiet():
                self._trials.seed(int(seeds.generate_state(1)[0]))
                values = self._suggestion(self._trials.by_slot()[slot])
            if not is_known(values) and self.claim(slot, values):
                return values
        while (values := self.first_untried()) is not EXHAUSTED:
            if self.claim(slot, values):
                return values
        return None

    def _suggestion(self, frozen):
        """What the sampler suggests for a trial; nothing is stored."""
        study, sampler = self._trials.study, self._trials.study.sampler
        filtered = optuna.pruners._filter_study(study, frozen)
        sampler.before_trial(filtered, frozen)
        space = sampler.infer_relative_search_space(filtered, frozen)
        relative = sampler.sample_relative(filtered, frozen, space)

        def value(name, distribution):
            if distribution.single():
                return distribution.to_external_repr(getattr(distribution, "low", 0))
            if name in relative:
                found = relative[name]
                if distribution._contains(distribution.to_internal_repr(found)):
                    return found
            return sampler.sample_independent(filtered, frozen, name, distribution)

        known = self._trials.known_distributions()
        return _space.suggested(value, self._hyperparameters(), known)

    def claim(self, slot, values):
        """Claims a combination; returns whether the slot has it now."""
        return self._ledger.claim(slot, name_of(values))

    def claimed(self, slot):
        """What a slot has claimed, of a space that is not endless; None if nothing."""
        own = self._ledger.claims(slot=slot)
        if not own or self._is_endless():
            return None
        return next((v for v in self._combinations() if name_of(v) in own), None)

    def first_untried(self):
        """The first combination that no trial has; None where they are endless; `EXHAUSTED`."""
        if self._is_endless():
            return None
        claims, is_known = self._ledger.claims(), self._known()
        for values in self._combinations():
            if name_of(values) not in claims and not is_known(values):
                return values
        return EXHAUSTED

    def _known(self):
        """A function of a combination: whether a trial of fewer hyperparameters was the same.

        A trial that was completed without asking for what others ask for does not depend on it,
        unless the program has it from the beginning: it is another then than that of the trial,
        which is taken for one of the default, as are trials that may ask yet.
        """
        if self._is_endless():
            return lambda values: False
        found: dict[frozenset[str], set[str]] = {}
        hps = self._hyperparameters().copy()
        for trial in self._trials.by_slot().values():
            if _trials.VALUES not in trial.user_attrs:
                continue
            own = _json.loads(trial.user_attrs[_trials.VALUES])
            hps.values = dict(own)
            hps.ensure_active_values()
            added = hps.values.keys() - own.keys()
            if trial.state == TrialState.COMPLETE:
                added &= self._initial
            values = {n: v for n, v in hps.values.items() if n in own or n in added}
            found.setdefault(frozenset(values), set()).add(name_of(values))

        def is_known(values):
            return any(
                names <= values.keys() and name_of({n: values[n] for n in names}) in known
                for names, known in found.items()
            )

        return is_known

    def _is_endless(self):
        return any(self._values_of(hp) is None for hp in self._hyperparameters().space)

    def _combinations(self):
        return _space.combinations(self._hyperparameters(), self._values_of)
