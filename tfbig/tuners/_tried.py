"""Which combinations of values trials have tried."""

from collections.abc import Callable

from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _json, _trials, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("TriedCombinations",)

# By the names of hyperparameters: the combinations of their values, by name.
_Names = dict[frozenset[str], set[str]]


class TriedCombinations:
    """Combinations that trials have tried, also trials that knew fewer hyperparameters.

    A completed trial that never asked for a hyperparameter does not depend on it, whatever its
    value. Two cases differ: if the program has had the hyperparameter from the beginning, or if the
    trial may still ask for it, the trial counts as one with its default.

    Args:
        trials: The trials so far.
        hyperparameters: Returns the hyperparameters known so far.
        initial: Names of the hyperparameters that the program has before any trial.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        hyperparameters: Callable[[], HyperParameters],
        initial: set[str],
    ) -> None:
        self._trials = trials
        self._hyperparameters = hyperparameters
        self._initial = initial
        # Trials that have ended do not change, as long as there are no new hyperparameters.
        self._size = 0
        self._ended: _Names = {}
        self._numbers: set[int] = set()

    def look(self) -> Callable[[_tuner_types.Values], bool]:
        """Reads the trials; returns whether a combination was tried by one of them."""
        hps = self._hyperparameters().copy()
        if len(hps.space) != self._size:
            self._size, self._ended, self._numbers = len(hps.space), {}, set()
        others: _Names = {}
        for trial in self._trials.by_index().values():
            if trial.number in self._numbers or _trials.VALUES not in trial.user_attrs:
                continue
            names, combination = self._tried(trial, hps)
            if trial.state.is_finished():
                self._numbers.add(trial.number)
                self._ended.setdefault(names, set()).add(combination)
            else:
                others.setdefault(names, set()).add(combination)

        def is_tried(values: _tuner_types.Values) -> bool:
            return any(
                names <= values.keys() and _json.name_of({n: values[n] for n in names}) in tried
                for found in (self._ended, others)
                for names, tried in found.items()
            )

        return is_tried

    def _tried(self, trial: FrozenTrial, hps: HyperParameters) -> tuple[frozenset[str], str]:
        own = _json.loads(trial.user_attrs[_trials.VALUES])
        hps.values = dict(own)
        hps.ensure_active_values()
        added = hps.values.keys() - own.keys()
        if trial.state == TrialState.COMPLETE:
            added &= self._initial
        values = {n: v for n, v in hps.values.items() if n in own or n in added}
        return frozenset(values), _json.name_of(values)
