"""The trials of a search: what the study and the ledger hold of each."""

import contextlib
import copy
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna
from keras_tuner.src.engine import metrics_tracking
from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import (
    _json,
    _ledger,
    _samplers,
    _space,
    _study,
    _trial_index,
    _tuner_types,
)
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("Trials", "as_keras_tuner", "epochs_of", "new_run", "seconds_before", "seconds_now")

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

# The attribute of a trial that another search had: its name there, or True if it is tried again.
TRANSFERRED = "tfbig:transferred"

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


def new_run(trial: FrozenTrial, owner: str) -> tuple[str, bool]:
    """The attribute for the run of a trial that a process begins, and whether it is there yet."""
    count = sum(name.startswith(RUN) for name in trial.user_attrs)
    if count:
        process, _, ended = trial.user_attrs[f"{RUN}{count - 1}"]
        # The process that has just made the trial.
        if process == owner and ended is None:
            return f"{RUN}{count - 1}", True
    return f"{RUN}{count}", False


def seconds_before(trial: FrozenTrial) -> float:
    """For how long a trial was run, without runs that never said when they ended."""
    return sum(ended - began for _, began, ended in _runs(trial) if ended is not None)


def seconds_now(trial: FrozenTrial, owner: str) -> float:
    """For how long the process that runs a trial has done so; 0 if it has not begun."""
    now = time.time()
    return sum(now - began for who, began, ended in _runs(trial) if ended is None and who == owner)


def _runs(trial: FrozenTrial) -> list[tuple[str, float, float | None]]:
    """The process of each run, when it began, and when it ended; None if it never said."""
    return [value for name, value in trial.user_attrs.items() if name.startswith(RUN)]


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
        self._index = _trial_index.TrialIndex(_index_of, _is_void, _has_failed)
        self._is_looking = False
        # Whether the sampler is one of Optuna's, without options, which wants no results.
        self._is_plain = sampler.name == sampler.kind
        # Else: what is told results, seeded for no trial.
        self._telling: optuna.samplers.BaseSampler | None = None
        with _study.quiet():
            study.pruner = pruner.make(seed, seed) if pruner else optuna.pruners.NopPruner()

    def seed(self, seed: int) -> None:
        """Gives the study a fresh sampler, seeded for a trial."""
        self.study.sampler = self._sampler.make(seed, self._search_seed)

    @contextlib.contextmanager
    def one_look(self, reads: bool = True) -> Iterator[None]:
        """Within, the study is read once; what this process writes is seen at once.

        Args:
            reads: False for not at all: what was read before is enough, as for a trial of this
                process.
        """
        if self._is_looking:
            yield
            return
        if reads:
            self._read()
        self._is_looking = True
        try:
            yield
        finally:
            self._is_looking = False

    def _read(self) -> None:
        self._index.read(self.study.get_trials(deepcopy=False))

    @property
    def _known(self) -> _trial_index.TrialIndex:
        if not self._is_looking:
            self._read()
        return self._index

    def all(self) -> list[FrozenTrial]:
        """The study's trials, in order; void ones as well."""
        return self._known.in_order()

    def _written(self, frozen: FrozenTrial, is_stored: bool = True) -> FrozenTrial:
        self._index.put(frozen, is_stored)
        return frozen

    def by_index(self) -> dict[int, FrozenTrial]:
        """The study's trials by index, without void ones."""
        known = self._known.by_index
        # Another thread may write.
        return known if self._is_looking else dict(known)

    def read_again(self, index: int) -> FrozenTrial | None:
        """The trial of an index as it is now, whatever was seen before; None if there is none."""
        self._read()
        return self._index.by_index.get(index)

    def ended(self) -> list[FrozenTrial]:
        """The trials that have ended, in the order in which they did."""
        return list(self._known.ended)

    def failed(self) -> int:
        """How many of the trials that have ended are broken."""
        return self._known.failed

    def known_distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The distributions of all parameters that a trial has had, by name."""
        index = self._known
        known = dict(index.distributions)
        for trial in index.unfinished.copy().values():
            known |= trial.distributions
        return known

    def has_enqueued(self) -> bool:
        """Whether a trial that was enqueued waits to be run."""
        return any(t.state == TrialState.WAITING for t in self._unfinished())

    def count_enqueued(self) -> int:
        """How many trials that were enqueued wait to be run."""
        waiting = (t for t in self._unfinished() if t.state == TrialState.WAITING)
        # What processes have enqueued at the same time runs once.
        return len({t.user_attrs.get(GIVEN, t.number) for t in waiting})

    def enqueued_values(self) -> set[str]:
        """JSON of the values that were enqueued and wait to be tried."""
        waiting = (t for t in self._unfinished() if t.state == TrialState.WAITING)
        return {t.user_attrs[GIVEN] for t in waiting if GIVEN in t.user_attrs}

    def _unfinished(self) -> list[FrozenTrial]:
        """The trials that have not ended, by number."""
        return [trial for _, trial in sorted(self._known.unfinished.items())]

    def with_enqueued(self, index: int) -> FrozenTrial | None:
        """The trial of an index if it was enqueued; takes one that waits if the index has none.

        None if the index has another trial, or if no trial waits.
        """
        frozen = self.by_index().get(index)
        if frozen is None:
            frozen = next(filter(None, (self._taken(t, index) for t in self._unfinished())), None)
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
        attrs = {INDEX: index, f"{RUN}0": [self.ledger.owner, time.time(), None]}
        made = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs)
        storage = self.study._storage
        made._trial_id = storage.create_new_trial(self.study._study_id, made)
        # What was written is known; reading it back from a database takes long.
        made.number = storage.get_trial_number_from_id(made._trial_id)
        return self._written(made)

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
        with self.one_look():
            self._record_end(index, self.ledger.owner, end)
        return True

    def record_ended(self) -> None:
        """Writes ended trials to the study, also those whose process died before it could."""
        ended = self.ledger.trials(state=_ledger.ENDED)
        if not ended:
            return
        with self.one_look():
            for row in ended:
                self._record_end(row.index, row.owner, json.loads(row.note)["end"])

    def _record_end(self, index: int, owner: str, end: dict[str, Any]) -> None:
        # It may have begun since the study was read.
        frozen = self.by_index().get(index) or self.read_again(index)
        if frozen is not None and not frozen.state.is_finished():
            self._record(frozen, end)
        is_void = end["attrs"].get(WHY) == VOID
        self.ledger.advance(index, owner, _ledger.VOID if is_void else _ledger.RECORDED)

    # `end` is of JSON: the arguments of `Trials.end`.
    def _record(self, frozen: FrozenTrial, end: dict[str, Any]) -> None:
        storage, trial_id, state = self.study._storage, frozen._trial_id, TrialState[end["state"]]
        ended = copy.copy(frozen)
        ended.state, ended.values = state, end["values"]
        ended.user_attrs = frozen.user_attrs | dict(end["attrs"])
        ended.datetime_complete = datetime.datetime.now()
        constraints = {f"constraints:{n}": v for n, v in (end["constraints"] or {}).items()}
        ended.system_attrs = frozen.system_attrs | constraints
        try:
            for name, value in end["attrs"].items():
                if frozen.user_attrs.get(name) != value:
                    storage.set_trial_user_attr(trial_id, name, value)
            for name, value in constraints.items():
                storage.set_trial_system_attr(trial_id, name, value)
            self._tell(ended)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            # Another process was faster, and wrote the same.
            ended = storage.get_trial(trial_id)
            if not ended.state.is_finished():
                raise
        # The storage alone knows when it ended, and of what was reported.
        self._written(ended, is_stored=False)

    def _tell(self, ended: FrozenTrial) -> None:
        storage, trial_id, state = self.study._storage, ended._trial_id, ended.state
        if state == TrialState.FAIL:
            storage.set_trial_state_values(trial_id, state, None)
        elif state == TrialState.COMPLETE and self._is_plain and not ended.constraints:
            # As `study.tell`, which reads the trial twice for a sampler that does not look at it.
            storage.set_trial_state_values(trial_id, state, ended.values)
        else:
            with _study.quiet():
                self._telling = self._telling or self._sampler.make(0, self._search_seed)
                self.study.sampler = self._telling
                self.study.tell(ended.number, ended.values, state)


def _index_of(trial: FrozenTrial) -> int | None:
    return trial.user_attrs.get(INDEX)


def _is_void(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(WHY) == VOID


def _has_failed(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(WHY) == BROKEN


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
