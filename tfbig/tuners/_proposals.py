"""Values to try next, each combination claimed by one trial alone."""

import hashlib

import numpy as np
import optuna

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
    """

    def __init__(self, trials, seed, hyperparameters, values_of):
        self._trials = trials
        self._ledger = trials.ledger
        self._seed = seed
        self._hyperparameters = hyperparameters
        self._values_of = values_of

    def values_for(self, slot):
        """Values claimed for a slot; None where the space is exhausted."""
        if slot == 0:
            values = _space.default_values(self._hyperparameters())
            if self.claim(slot, values):
                return values
        for attempt in range(_MOST_COLLISIONS):
            # Of its own for each trial: a search that is resumed goes on as it would have.
            seeds = np.random.SeedSequence([self._seed, slot, attempt])
            with _study.quiet():
                self._trials.seed(int(seeds.generate_state(1)[0]))
                values = self._suggestion(self._trials.by_slot()[slot])
            if self.claim(slot, values):
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
        claims = self._ledger.claims() | self._tried_with_defaults()
        return next((v for v in self._combinations() if name_of(v) not in claims), EXHAUSTED)

    def _tried_with_defaults(self):
        """Combinations of trials that did not ask for what others have asked for since."""
        found, hps = set(), self._hyperparameters().copy()
        for trial in self._trials.by_slot().values():
            if _trials.VALUES in trial.user_attrs:
                hps.values = _json.loads(trial.user_attrs[_trials.VALUES])
                hps.ensure_active_values()
                found.add(name_of(hps.values))
        return found

    def _is_endless(self):
        return any(self._values_of(hp) is None for hp in self._hyperparameters().space)

    def _combinations(self):
        return _space.combinations(self._hyperparameters(), self._values_of)
