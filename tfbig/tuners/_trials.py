"""The trials of a search: what the study and the ledger hold of each."""

import json
from collections.abc import Mapping
from typing import Any

import optuna
from keras_tuner.src.engine import metrics_tracking
from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _json, _ledger, _samplers, _space, _study, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("Trials", "as_keras_tuner", "epochs_of", "new_run")

# Attributes of the study's trials, under the names that running searches have stored.
INDEX, VALUES, METRICS, MESSAGE, BEST_STEP, WHY, EPOCHS = (
    f"tfbig:{name}"
    for name in ("slot", "values", "metrics", "message", "best_step", "why", "epochs")
)
# Which process ran a trial, and when: `RUN` and a number from 0 for each time it was run. The
# process, and the seconds since the epoch at which it began and ended (None if it never said).
RUN = "tfbig:run "

# Why a trial ended other than with a result; stored under `WHY`. A void trial never began: no
# values were left for it.
INFEASIBLE, BROKEN, STOPPED_EARLY, VOID = "infeasible", "failed", "pruned", "void"


def epochs_of(trial: FrozenTrial) -> int:
    """For how many epochs a trial was trained, in all its executions.

    If nobody counted them, the epochs that it reported.
    """
    return int(trial.user_attrs.get(EPOCHS, max(trial.intermediate_values, default=0)))


def new_run(trial: FrozenTrial) -> str:
    """The attribute for the next time that a trial is run."""
    return f"{RUN}{sum(name.startswith(RUN) for name in trial.user_attrs)}"


class Trials:
    """The trials in a study, by their index in the ledger.

    Args:
        study: The study, whose sampler and pruner this sets.
        ledger: The ledger beside it.
        sampler: Makes the sampler of each trial.
        pruner: Makes the pruner; None for none.
        seed: The seed of the search.
    """

    def __init__(
        self,
        study: optuna.Study,
        ledger: _ledger.Ledger,
        sampler: _samplers.Maker,
        pruner: _samplers.Maker | None,
        seed: int,
    ) -> None:
        self.study = study
        self.ledger = ledger
        self._search_seed = seed
        self._sampler = sampler
        with _study.quiet():
            study.pruner = pruner.make(seed, seed) if pruner else optuna.pruners.NopPruner()

    def seed(self, seed: int = 0) -> None:
        """Gives the study a fresh sampler, seeded for a trial."""
        self.study.sampler = self._sampler.make(seed, self._search_seed)

    def by_index(self) -> dict[int, FrozenTrial]:
        """The study's trials by index, without void ones."""
        trials = self.study.get_trials(deepcopy=False)
        found = {t.user_attrs[INDEX]: t for t in trials if INDEX in t.user_attrs}
        return {index: t for index, t in found.items() if t.user_attrs.get(WHY) != VOID}

    def ended(self) -> list[FrozenTrial]:
        """The trials that have ended, in the order in which they did."""
        ended = [t for t in self.by_index().values() if t.state.is_finished()]
        return sorted(ended, key=lambda t: (t.datetime_complete, t.number))

    def known_distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The distributions of all parameters that a trial has had, by name."""
        known: dict[str, optuna.distributions.BaseDistribution] = {}
        for trial in self.study.get_trials(deepcopy=False):
            known |= trial.distributions
        return known

    def of(self, index: int) -> FrozenTrial:
        """The study's trial of an index; created if there is none."""
        frozen = self.by_index().get(index)
        if frozen is not None:
            return frozen
        # In one step, so that no trial is ever without its index.
        made = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={INDEX: index})
        storage = self.study._storage
        return storage.get_trial(storage.create_new_trial(self.study._study_id, made))

    def store(
        self,
        frozen: FrozenTrial,
        hyperparameters: HyperParameters,
        values: _tuner_types.Values,
    ) -> FrozenTrial:
        """Stores the values of a trial; returns it with them."""
        storage, trial_id = self.study._storage, frozen._trial_id
        params, distributions = _space.parameters_of(
            hyperparameters, values, self.known_distributions()
        )
        for name, value in params.items():
            d = distributions[name]
            storage.set_trial_param(trial_id, name, d.to_internal_repr(value), d)
        storage.set_trial_user_attr(trial_id, VALUES, _json.dumps(values))
        return storage.get_trial(trial_id)

    def end(
        self,
        index: int,
        state: TrialState,
        attrs: Mapping[str, str | int],
        values: list[float] | None = None,
        constraints: Mapping[str, float] | None = None,
    ) -> bool:
        """Ends a trial of this process; returns whether it still owned the trial."""
        end = {"state": state.name, "attrs": attrs, "values": values, "constraints": constraints}
        # From here on the trial has ended, whatever happens to this process.
        if not self.ledger.set_state(index, _ledger.ENDED, end=end):
            return False
        self.record_ended()
        return True

    def record_ended(self) -> None:
        """Writes ended trials to the study, also those whose process died before it could."""
        ended = [row for row in self.ledger.trials() if row.state == _ledger.ENDED]
        if not ended:
            return
        trials = self.by_index()
        for row in ended:
            frozen = trials.get(row.index)
            if frozen is not None and not frozen.state.is_finished():
                try:
                    self._record(frozen, json.loads(row.note)["end"])
                except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
                    # Another process was faster, and wrote the same.
                    if not self.study._storage.get_trial(frozen._trial_id).state.is_finished():
                        raise
            self.ledger.advance(row, _ledger.RECORDED)

    # `end` is of JSON: the arguments of `Trials.end`.
    def _record(self, frozen: FrozenTrial, end: dict[str, Any]) -> None:
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


def as_keras_tuner(
    frozen: FrozenTrial, trial_id: str, hyperparameters: HyperParameters
) -> _tuner_types.Trial:
    """A trial of the study as KerasTuner's.

    Args:
        frozen: The trial of the study.
        trial_id: Its id for KerasTuner.
        hyperparameters: Become the trial's, with its values.
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
