"""The values of new trials, which a user's oracle may choose by `populate_space`."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras_tuner.src.engine import trial as kt_trial

from tfbig.tuners import _json, _oracle_trials, _own_values, _tuner_types, _views

__all__ = ("PopulatesSpace",)

_STATUS = kt_trial.TrialStatus


class PopulatesSpace(_oracle_trials.OracleTrials):
    """The methods of an oracle that choose the values of a trial."""

    @property
    def _has_own_values(self) -> bool:
        """Whether a user's `populate_space` chooses the values."""
        return type(self).populate_space is not PopulatesSpace.populate_space

    def _populated_values(self, index: int) -> _tuner_types.Values | None:
        """The values of a new trial; None if the space is exhausted."""
        status, values = self._populated(index)
        return values if status == _STATUS.RUNNING else None

    def _populated(self, index: int) -> tuple[str, _tuner_types.Values]:
        """What `populate_space` returns for a trial, unless it was given to the study."""
        search = self._search
        # Used by KerasTuner's `_random_values`, which an override may call.
        self._seed_state = int(np.random.SeedSequence([search.seed, index]).generate_state(1)[0])
        enqueued = _own_values.enqueued(
            search.trials, search.proposals, self.hyperparameters, index, self._seed_state
        )
        if enqueued is not None:
            return _STATUS.RUNNING, self._with_active(enqueued)
        proposed = self.populate_space(_views.trial_id_of(index))
        values = proposed.get("values") or {}
        # What is proposed here has the values of all active hyperparameters.
        return proposed["status"], self._with_active(values) if self._has_own_values else values

    def _with_active(self, values: _tuner_types.Values) -> _tuner_types.Values:
        """Values of JSON, with those of all active hyperparameters."""
        hps = self.hyperparameters.copy()
        hps.values = {k: _json.canonical(v) for k, v in values.items()}
        hps.ensure_active_values()
        return hps.values

    def populate_space(self, trial_id: str) -> dict[str, Any]:  # As in KerasTuner.
        """Values for a trial; override it to search in another way.

        Returns:
            A dictionary with "status": RUNNING; IDLE to be asked again later; or STOPPED if there
            are no more trials; and "values": a dictionary of values by name.
        """
        values = self._search.proposals.values_for(int(trial_id))
        status = _STATUS.STOPPED if values is None else _STATUS.RUNNING
        return {"status": status, "values": values}

    def _duplicate(self, values: _tuner_types.Values) -> bool:
        """Whether a trial has these values; KerasTuner's, for an overridden `populate_space`."""
        names = {_json.name_of(t.hyperparameters.values) for t in self.trials.values()}
        return _json.name_of(values) in names
