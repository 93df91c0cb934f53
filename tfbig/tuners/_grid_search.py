"""Grid search: every combination, each once."""

from collections.abc import Iterable
from typing import Unpack

import keras_tuner
from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import (
    _agreement,
    _json,
    _options,
    _oracle,
    _proposals,
    _queue,
    _space,
    _trials,
    _tuner,
    _tuner_types,
)

__all__ = ("GridSearch", "GridSearchOracle")


class GridProposals(_proposals.Proposals):
    """Completes values that are given to a combination of the grid."""

    def completed(self, index: int, seed: int, given: _tuner_types.Values) -> _tuner_types.Values:
        return self.first_with(index, given) or super().completed(index, seed, given)


class GridQueue(_queue.TrialQueue):
    """Hands out new trials only for combinations that no trial has claimed, and enqueued ones."""

    def take_new(self, max_trials: int | None) -> int | None:
        if self._trials.has_enqueued():
            return self._ledger.take_new(max_trials)
        while isinstance(values := self._proposals.first_untried(), dict):
            index = self._ledger.take_new(max_trials, claim=_json.name_of(values))
            is_full = max_trials is not None and self._ledger.taken() >= max_trials
            if index is not None or is_full:
                return index
        return None

    def begin(self, index: int) -> FrozenTrial | None:
        frozen = self._trials.of(index)
        is_ready = _trials.VALUES in frozen.user_attrs or _trials.ENQUEUED in frozen.system_attrs
        if not is_ready and not self._ledger.claims(index=index):
            # Another process has taken the enqueued trial.
            self._trials.end(index, TrialState.FAIL, {_trials.WHY: _trials.VOID})
            return None
        return super().begin(index)


class GridSearchOracle(_oracle.StudyOracle):
    """Tries all values of a grid.

    See `StudyOracle` for the other arguments.

    Args:
        max_trials: None to end when all combinations have been tried.
    """

    def __init__(
        self,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = None,
        seed: int | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        **kwargs: Unpack[_options.StudyOptions],
    ) -> None:
        super().__init__(
            objective, max_trials, hyperparameters, sampler="random", seed=seed, **kwargs
        )

    _proposals_class = GridProposals

    def _values_of(self, hp: _tuner_types.Hyperparameter) -> Iterable[_tuner_types.Value]:
        return _space.grid_values(hp)

    def _new_queue(
        self, trials: _trials.Trials, proposals: _proposals.Proposals
    ) -> _queue.TrialQueue:
        if self._has_own_values:
            return super()._new_queue(trials, proposals)
        return GridQueue(trials, proposals, self._populated_values, self._known_hyperparameters)

    def _settings(self) -> dict[str, str]:
        # The name under which grid searches have stored it.
        return super()._settings() | {_agreement.KIND: "_GridOracle"}


class GridSearch(_tuner.Tuner):
    """Tries all combinations of values, each once.

    A range without steps has ten values, as in KerasTuner. If a trial did not ask for a
    hyperparameter that others ask for, the search assumes that it does not matter to the trial.

    See `OptunaSearch` for the other arguments.

    Args:
        max_trials: None to end when all combinations have been tried.
    """

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = None,
        seed: int | None = None,
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        of_oracle, of_tuner = _options.split(kwargs)
        oracle = GridSearchOracle(objective, max_trials, seed, **of_oracle)
        super().__init__(oracle, hypermodel, **of_tuner)
