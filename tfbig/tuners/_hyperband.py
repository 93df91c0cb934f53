"""Hyperband as in Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter
Optimization", JMLR 18 (2018), Algorithm 1.
"""

import dataclasses
import json
import math

from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import _json, _ledger, _oracle, _trials

__all__ = ("Bracket", "HyperbandOracle", "brackets")


@dataclasses.dataclass(frozen=True)
class Bracket:
    """A successive halving.

    Attributes:
        sizes: tuple of int, how many trials are in each rung.
        epochs: tuple of int, how many epochs a trial has been trained at the end of
            each rung.
    """

    sizes: tuple[int, ...]
    epochs: tuple[int, ...]


def brackets(max_epochs, factor):
    """The brackets of one iteration, the one with most trials first.

    Args:
        max_epochs: int, the paper's R.
        factor: int, the paper's eta.

    Example:

    >>> [bracket.sizes for bracket in brackets(9, 3)]
    [(9, 3, 1), (5, 1), (3,)]
    """
    last = 0
    while factor ** (last + 1) <= max_epochs:
        last += 1
    found = []
    for s in range(last, -1, -1):
        most = math.ceil((last + 1) * factor**s / (s + 1))
        sizes = tuple(most // factor**i for i in range(s + 1))
        epochs = tuple(max(1, round(max_epochs * factor ** (i - s))) for i in range(s + 1))
        found.append(Bracket(sizes, epochs))
    return found


class HyperbandOracle(_oracle.StudyOracle):
    """Runs brackets: trains many trials a little, and the best of them more.

    A rung is decided when all its trials have come to its end; meanwhile, processes begin with
    the next bracket. A trial that goes on keeps its id.

    Args:
        max_epochs: int, epochs of a trial that is trained to its end.
        factor: int, one of so many trials goes on.
        hyperband_iterations: int, how often all brackets are run.
        **kwargs: as for `StudyOracle`.
    """

    goes_on = True

    def __init__(self, max_epochs=100, factor=3, hyperband_iterations=1, **kwargs):
        for name, value, least in (
            ("max_epochs", max_epochs, 1),
            ("factor", factor, 2),
            ("hyperband_iterations", hyperband_iterations, 1),
        ):
            if type(value) is not int or value < least:
                raise errors.InvalidOptionError(
                    f"`{name}` must be an integer >= {least}. Received: {name}={value!r}."
                )
        self._brackets = brackets(max_epochs, factor) * hyperband_iterations
        self._max_epochs, self._factor = max_epochs, factor
        super().__init__(max_trials=sum(b.sizes[0] for b in self._brackets), **kwargs)

    def _settings(self):
        return super()._settings() | {
            "max_epochs": str(self._max_epochs),
            "factor": str(self._factor),
        }

    def _bracket_of(self, slot):
        """The number of a slot's bracket."""
        for number, bracket in enumerate(self._brackets):
            if slot < bracket.sizes[0]:
                return number
            slot -= bracket.sizes[0]
        raise AssertionError(slot)

    def epochs_of(self, trial_id):
        """Up to which epoch a trial of this process is trained now."""
        slot = int(trial_id)
        (row,) = self._ledger.slots(slot=slot)
        return self._brackets[self._bracket_of(slot)].epochs[_rung(row)]

    def _take_paused(self):
        """A trial that goes on to the next rung, held by this process; or None."""
        by_bracket: dict[int, list[_ledger.Slot]] = {}
        for slot in self._ledger.slots():
            by_bracket.setdefault(self._bracket_of(slot.slot), []).append(slot)
        for number, slots in by_bracket.items():
            bracket = self._brackets[number]
            if len(slots) < bracket.sizes[0]:
                continue
            for rung, size in enumerate(bracket.sizes[1:]):
                found = self._decide(slots, rung, size)
                if found is not None:
                    return found
        return None

    def _decide(self, slots, rung, size):
        """Ends a rung whose trials have all come to its end; returns one that goes on, or None."""
        members = [s for s in slots if _rung(s) >= rung]
        if any(s.state == _ledger.RUNNING and _rung(s) == rung for s in members):
            return None
        # What ended without a value at this rung is not among these.
        valued = [s for s in members if str(rung) in _note(s)["scores"]]
        sign = -1 if self.objective.direction == "max" else 1
        valued.sort(key=lambda s: (sign * _note(s)["scores"][str(rung)], s.slot))
        for place, slot in enumerate(valued):
            if slot.state != _ledger.PAUSED or _rung(slot) != rung:
                continue
            if place < size:
                note = _note(slot) | {"rung": rung + 1}
                if self._ledger.take(slot, json.dumps(note)):
                    return slot.slot
            elif self._ledger.take(slot):
                self._trials.end(slot.slot, TrialState.PRUNED, {_trials.WHY: _trials.STOPPED_EARLY})
        return None

    def _pause(self, held):
        (row,) = self._ledger.slots(slot=held.slot)
        rung = _rung(row)
        if rung + 1 == len(self._brackets[self._bracket_of(held.slot)].sizes):
            return False
        with _oracle.nan_allowed():
            self.score_trial(held.trial)
        if not math.isfinite(held.trial.score):
            return False
        values = _json.dumps(held.trial.hyperparameters.values)
        self.study._storage.set_trial_user_attr(held.number, _trials.VALUES, values)
        scores = _note(row)["scores"] | {str(rung): float(held.trial.score)}
        self._ledger.put(held.slot, _ledger.PAUSED, scores=scores)
        return True


def _note(slot):
    return {"rung": 0, "scores": {}} | json.loads(slot.note)


def _rung(slot):
    return _note(slot)["rung"]
