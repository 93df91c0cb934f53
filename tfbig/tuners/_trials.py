"""The trials of a search: what the study and the ledger hold of each."""

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna
from keras_tuner.src.engine import metrics_tracking
from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _json, _ledger, _samplers, _space, _study, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("Trials", "as_keras_tuner", "epochs_of", "new_run", "seconds_of")

# Attributes of the study's trials, under the names that running searches have stored.
INDEX, VALUES, METRICS, MESSAGE, BEST_STEP, WHY, EPOCHS = (
    f"tfbig:{name}"
    for name in ("slot", "values", "metrics", "message", "best_step", "why", "epochs")
)
# Which process ran a trial, and when: `RUN` and a number from 0 for each time it was run. The
# process, and the seconds since the epoch at which it began and ended (None if it never said).
RUN = "tfbig:run "

# The attribute in which Optuna keeps the values of a trial that a user has enqueued.
ENQUEUED = "fixed_params"

# The attribute that has values from `tuner.enqueue`, of any type.
GIVEN = "tfbig:enqueued"

# Why a trial ended other than with a result; stored under `WHY`. A void trial never began: no
# values were left for it.
INFEASIBLE, BROKEN, STOPPED_EARLY, VOID = "infeasible", "failed", "pruned", "void"

# Why a trial is infeasible, unless a process with more memory runs it; not stored.
OUT_OF_MEMORY = "out of memory"


def epochs_of(trial: FrozenTrial) -> int:
    """For how many epochs a trial was trained, in all its executions.

    If nobody counted them, the epochs that it reported.
    """
    return int(trial.user_attrs.get(EPOCHS, max(trial.intermediate_values, default=0)))


def new_run(trial: FrozenTrial) -> str:
    """The attribute for the next time that a trial is run."""
    return f"{RUN}{sum(name.startswith(RUN) for name in trial.user_attrs)}"


def seconds_of(trial: FrozenTrial, owner: str | None = None) -> float:
    """For how long a trial was run, without runs whose process was killed.

    Args:
        trial: The trial.
        owner: The process that runs it now, whose run counts as well; None if it has not begun.
    """
    found = 0.0
    for name, value in trial.user_attrs.items():
        if name.startswith(RUN):
            process, began, ended = value
            if ended is None and process == owner:
                ended = time.time()
            found += 0 if ended is None else ended - began
    return found


class Trials:
    """The trials in a study, by their index in the ledger.

    Reading a study takes longer than most of what is done with it. `one_look` reads it once.

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
        # During `one_look`: the trials by number, and those that are not void by index.
        self._seen: dict[int, FrozenTrial] | None = None
        self._by_index: dict[int, FrozenTrial] = {}
        # The numbers of trials that have ended, which do not change any more, and what they had.
        self._ended: set[int] = set()
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {}
        with _study.quiet():
            study.pruner = pruner.make(seed, seed) if pruner else optuna.pruners.NopPruner()

    def seed(self, seed: int = 0) -> None:
        """Gives the study a fresh sampler, seeded for a trial."""
        self.study.sampler = self._sampler.make(seed, self._search_seed)

    @contextlib.contextmanager
    def one_look(self) -> Iterator[None]:
        """Within, the study is read once; what this process writes is seen at once."""
        if self._seen is not None:
            yield
            return
        trials = self.study.get_trials(deepcopy=False)
        self._seen, self._by_index = {t.number: t for t in trials}, _by_index(trials)
        try:
            yield
        finally:
            self._seen = None

    def all(self) -> list[FrozenTrial]:
        """The study's trials, in order; void ones as well."""
        if self._seen is not None:
            return list(self._seen.values())
        return self.study.get_trials(deepcopy=False)

    def _written(self, frozen: FrozenTrial) -> FrozenTrial:
        if self._seen is not None:
            self._seen[frozen.number] = frozen
            index = frozen.user_attrs[INDEX]
            if frozen.user_attrs.get(WHY) != VOID:
                self._by_index[index] = frozen
            else:
                self._by_index.pop(index, None)
        return frozen

    def by_index(self) -> dict[int, FrozenTrial]:
        """The study's trials by index, without void ones."""
        return self._by_index if self._seen is not None else _by_index(self.all())

    def read_again(self, index: int) -> FrozenTrial | None:
        """The trial of an index as it is now, whatever was seen before; None if there is none."""
        frozen = _by_index(self.study.get_trials(deepcopy=False)).get(index)
        return None if frozen is None else self._written(frozen)

    def ended(self) -> list[FrozenTrial]:
        """The trials that have ended, in the order in which they did."""
        ended = [t for t in self.by_index().values() if t.state.is_finished()]
        return sorted(ended, key=lambda t: (t.datetime_complete, t.number))

    def known_distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The distributions of all parameters that a trial has had, by name."""
        known = dict(self._distributions)
        for trial in self.all():
            if trial.number in self._ended:
                continue
            known |= trial.distributions
            if trial.state.is_finished():
                self._distributions |= trial.distributions
                self._ended.add(trial.number)
        return known

    def has_enqueued(self) -> bool:
        """Whether a trial that was enqueued waits to be run."""
        return any(t.state == TrialState.WAITING for t in self.all())

    def with_enqueued(self, index: int) -> FrozenTrial | None:
        """The trial of an index if it was enqueued; takes one that waits if the index has none.

        None if the index has another trial, or if no trial waits.
        """
        frozen = self.by_index().get(index)
        if frozen is None:
            frozen = next(filter(None, (self._taken(t, index) for t in self.all())), None)
        return frozen if frozen is not None and ENQUEUED in frozen.system_attrs else None

    def _taken(self, frozen: FrozenTrial, index: int) -> FrozenTrial | None:
        """Gives an enqueued trial an index; None if it is none, or if it has another one."""
        attrs, storage, trial_id = frozen.user_attrs, self.study._storage, frozen._trial_id
        is_free = ENQUEUED in frozen.system_attrs and INDEX not in attrs
        if not is_free or frozen.state.is_finished():
            return None
        # Processes that enqueue the same at the same time do not see each other.
        is_again = GIVEN in attrs and any(
            t.number < frozen.number and t.user_attrs.get(GIVEN) == attrs[GIVEN] for t in self.all()
        )
        # If this process is killed from here on, the trial belongs to whoever takes the index.
        if not is_again and not self.ledger.claim(index, f"enqueued {frozen.number}"):
            return None
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            if is_again:
                storage.set_trial_state_values(trial_id, TrialState.FAIL, None)
                return None
            storage.set_trial_user_attr(trial_id, INDEX, index)
            if frozen.state == TrialState.WAITING:
                storage.set_trial_state_values(trial_id, TrialState.RUNNING, None)
        return self._written(storage.get_trial(trial_id))

    def of(self, index: int) -> FrozenTrial:
        """The study's trial of an index; created if there is none."""
        frozen = self.with_enqueued(index) or self.by_index().get(index)
        if frozen is not None:
            return frozen
        # In one step, so that no trial is ever without its index.
        made = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={INDEX: index})
        storage = self.study._storage
        trial_id = storage.create_new_trial(self.study._study_id, made)
        return self._written(storage.get_trial(trial_id))

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
        # Optuna's storages refuse to change a parameter.
        for name in [n for n in params if n not in frozen.params]:
            d = distributions[name]
            storage.set_trial_param(trial_id, name, d.to_internal_repr(params[name]), d)
        text = _json.dumps(values)
        storage.set_trial_user_attr(trial_id, VALUES, text)
        # What was written is known; reading it back from a database takes long.
        stored = copy.copy(frozen)
        stored.params = params | frozen.params
        stored.distributions = distributions | frozen.distributions
        stored.user_attrs = frozen.user_attrs | {VALUES: text}
        return self._written(stored)

    def store_found(
        self,
        index: int,
        hyperparameters: HyperParameters,
        values: _tuner_types.Values,
        is_lost: Callable[[], bool],
    ) -> None:
        """Stores the values of a trial, if it has asked for more since they were stored.

        Samplers learn most from trials that have all parameters.

        Args:
            index: The index of the trial.
            hyperparameters: The space.
            values: The values.
            is_lost: Asked before anything is stored: whether another process has taken the trial,
                whose values may be others by now.
        """
        frozen = self.by_index().get(index)
        if frozen is None or frozen.user_attrs.get(VALUES) == _json.dumps(values) or is_lost():
            return
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.store(frozen, hyperparameters, values)

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
        ended = self.ledger.trials(state=_ledger.ENDED)
        if not ended:
            return
        with self.one_look():
            trials = self.by_index()
            for row in ended:
                end = json.loads(row.note)["end"]
                # It may have begun since the study was read.
                frozen = trials.get(row.index) or self.read_again(row.index)
                if frozen is not None and not frozen.state.is_finished():
                    self._record(frozen, end)
                is_void = end["attrs"].get(WHY) == VOID
                self.ledger.advance(row, _ledger.VOID if is_void else _ledger.RECORDED)

    # `end` is of JSON: the arguments of `Trials.end`.
    def _record(self, frozen: FrozenTrial, end: dict[str, Any]) -> None:
        storage, trial_id, state = self.study._storage, frozen._trial_id, TrialState[end["state"]]
        told: FrozenTrial | None = None
        try:
            for name, value in end["attrs"].items():
                if frozen.user_attrs.get(name) != value:
                    storage.set_trial_user_attr(trial_id, name, value)
            for name, value in (end["constraints"] or {}).items():
                storage.set_trial_system_attr(trial_id, f"constraints:{name}", value)
            if state == TrialState.FAIL:
                storage.set_trial_state_values(trial_id, state, None)
            else:
                with _study.quiet():
                    self.seed()
                    told = self.study.tell(frozen.number, end["values"], state)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            # Another process was faster, and wrote the same.
            if not storage.get_trial(trial_id).state.is_finished():
                raise
        self._written(told or storage.get_trial(trial_id))


def _by_index(trials: list[FrozenTrial]) -> dict[int, FrozenTrial]:
    # Of the same index, the last one: its place was free after the others.
    found: dict[int, FrozenTrial] = {}
    for trial in trials:
        attrs = trial.user_attrs
        if INDEX in attrs and attrs.get(WHY) != VOID:
            found[attrs[INDEX]] = trial
    return found


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
