"""The trials of a search: what the study and the ledger hold of each."""

import json
from typing import Any

import optuna
from keras_tuner.src.engine import metrics_tracking
from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import TrialState

from tfbig.tuners import _json, _ledger, _space, _study

__all__ = ("Trials", "seen")

# Attributes of the study's trials.
SLOT, VALUES, METRICS, MESSAGE, BEST_STEP, WHY = (
    f"tfbig:{name}" for name in ("slot", "values", "metrics", "message", "best_step", "why")
)

# How a trial ended besides by its objective; kept under `WHY`. A void one never began: there
# were no values left for it.
INFEASIBLE, BROKEN, STOPPED_EARLY, VOID = "infeasible", "failed", "pruned", "void"


class Trials:
    """The trials in a study, by their slots in the ledger.

    Args:
        study: `optuna.Study`.
        ledger: `Ledger`.
        sampler: `Maker`.
        pruner: `Maker` or None.
        seed: int, that of the search.
    """

    def __init__(self, study, ledger, sampler, pruner, seed):
        self.study = study
        self.ledger = ledger
        self._search_seed = seed
        self._sampler = sampler
        with _study.quiet():
            study.pruner = pruner.make(seed, seed) if pruner else optuna.pruners.NopPruner()

    def seed(self, seed=0):
        """Gives the study a fresh sampler, seeded for a trial."""
        self.study.sampler = self._sampler.make(seed, self._search_seed)

    def by_slot(self):
        """`optuna.trial.FrozenTrial` of each slot that has one."""
        trials = self.study.get_trials(deepcopy=False)
        slots = {t.user_attrs[SLOT]: t for t in trials if SLOT in t.user_attrs}
        return {slot: t for slot, t in slots.items() if t.user_attrs.get(WHY) != VOID}

    def ended(self):
        """Those that have ended, in that order."""
        ended = [t for t in self.by_slot().values() if t.state.is_finished()]
        return sorted(ended, key=lambda t: (t.datetime_complete, t.number))

    def known_distributions(self):
        """Of all parameters, by name."""
        known: dict[str, Any] = {}
        for trial in self.study.get_trials(deepcopy=False):
            known |= trial.distributions
        return known

    def of(self, slot):
        """The trial of a slot; made if there is none."""
        frozen = self.by_slot().get(slot)
        if frozen is not None:
            return frozen
        # In one step, so that there is none without its slot.
        made = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={SLOT: slot})
        storage = self.study._storage
        return storage.get_trial(storage.create_new_trial(self.study._study_id, made))

    def store(self, frozen, hyperparameters, values):
        """Stores the values of a trial; returns it as it is then."""
        storage, trial_id = self.study._storage, frozen._trial_id
        params, distributions = _space.parameters_of(
            hyperparameters, values, self.known_distributions()
        )
        for name, value in params.items():
            d = distributions[name]
            storage.set_trial_param(trial_id, name, d.to_internal_repr(value), d)
        storage.set_trial_user_attr(trial_id, VALUES, _json.dumps(values))
        return storage.get_trial(trial_id)

    def end(self, slot, state, attrs, values=None, constraints=None):
        """Ends a slot of this process; returns whether it still was its own."""
        end = {"state": state.name, "attrs": attrs, "values": values, "constraints": constraints}
        # From here on it has ended, whatever happens to this process.
        if not self.ledger.put(slot, _ledger.ENDED, end=end):
            return False
        self.tell_ended()
        return True

    def tell_ended(self):
        """Tells the study what has ended, also where the process died that should have."""
        ended = [s for s in self.ledger.slots() if s.state == _ledger.ENDED]
        if not ended:
            return
        trials = self.by_slot()
        for slot in ended:
            frozen = trials.get(slot.slot)
            if frozen is not None and not frozen.state.is_finished():
                try:
                    self._tell(frozen, json.loads(slot.note)["end"])
                except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
                    # Another process was faster, with the same.
                    if not self.study._storage.get_trial(frozen._trial_id).state.is_finished():
                        raise
            self.ledger.move(slot, _ledger.TOLD)

    def _tell(self, frozen, end):
        storage, trial_id, state = self.study._storage, frozen._trial_id, TrialState[end["state"]]
        for name, value in end["attrs"].items():
            storage.set_trial_user_attr(trial_id, name, value)
        for name, value in (end["constraints"] or {}).items():
            storage.set_trial_system_attr(trial_id, f"constraints:{name}", value)
        if state == TrialState.FAIL:
            storage.set_trial_state_values(trial_id, state, None)
            return
        with _study.quiet():
            self.seed()
            self.study.tell(frozen.number, end["values"], state)


_STATUS = kt_trial.TrialStatus


def seen(frozen, trial_id, hyperparameters):
    """A trial of the study as KerasTuner's.

    Args:
        frozen: `optuna.trial.FrozenTrial`.
        trial_id: str.
        hyperparameters: `HyperParameters`, which become the trial's.
    """
    attrs = frozen.user_attrs
    hyperparameters.values = _json.loads(attrs.get(VALUES, "{}"))
    status = {
        TrialState.COMPLETE: _STATUS.COMPLETED,
        TrialState.PRUNED: _STATUS.STOPPED,
        TrialState.FAIL: _STATUS.INVALID if attrs.get(WHY) == INFEASIBLE else _STATUS.FAILED,
    }.get(frozen.state, _STATUS.RUNNING)
    trial = kt_trial.Trial(hyperparameters, trial_id, status, attrs.get(MESSAGE))
    if METRICS in attrs:
        config = json.loads(attrs[METRICS])
        trial.metrics = metrics_tracking.MetricsTracker.from_config(config)
    trial.best_step = attrs.get(BEST_STEP, 0)
    if frozen.state == TrialState.COMPLETE:
        trial.score = frozen.values[0] if len(frozen.values) == 1 else tuple(frozen.values)
    return trial
