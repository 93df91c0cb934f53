"""KerasTuner's `Oracle` over an Optuna study, which alone knows the state of a search."""

import contextlib
import json
import math
import pathlib
import random
import shutil
import threading
import time
import warnings

import keras_tuner
import numpy as np
import optuna
from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import _json, _ledger, _proposals, _samplers, _space, _study, _trials
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("StudyOracle",)

# How often a trial whose process died is run again.
_MOST_DEATHS = 20

# Seconds between two looks at what other processes do.
_LOOK = 0.5

RUNNING, IDLE = kt_trial.TrialStatus.RUNNING, kt_trial.TrialStatus.IDLE
COMPLETED, STOPPED = kt_trial.TrialStatus.COMPLETED, kt_trial.TrialStatus.STOPPED
FAILED, INVALID = kt_trial.TrialStatus.FAILED, kt_trial.TrialStatus.INVALID


class StudyOracle(keras_tuner.Oracle):
    """Asks an Optuna study for values, and tells it results.

    Any number of processes may have one over the same study. A trial's id is the
    number of its slot; see `_ledger`.

    Args:
        objective: as in KerasTuner. Several are searched for their Pareto front.
        max_trials: int, or None for no bound.
        sampler: str or function of a seed, see `_samplers`.
        pruner: str or function of a seed or None, see `_samplers`.
        hyperparameters: `keras_tuner.HyperParameters` or None.
        allow_new_entries: bool.
        tune_new_entries: bool.
        seed: int or None.
        max_retries_per_trial: int, how often a trial that raised is run again.
        max_consecutive_failed_trials: int, after how many that raised the search ends.
        storage: None, "memory" or a database URL.
        grace_period: float, seconds after which a trial is run elsewhere whose process is
            not heard of.
        constraints: function of the metrics of a trial, a dictionary, that returns a dictionary
            of numbers; a trial is feasible where all are <= 0.
    """

    def __init__(
        self,
        objective=None,
        max_trials=None,
        sampler="tpe",
        pruner=None,
        hyperparameters=None,
        allow_new_entries=True,
        tune_new_entries=True,
        seed=None,
        max_retries_per_trial=0,
        max_consecutive_failed_trials=3,
        storage=None,
        grace_period=60.0,
        constraints=None,
    ):
        _check(max_trials, seed, grace_period, storage)
        super().__init__(
            objective=objective,
            max_trials=max_trials,
            hyperparameters=hyperparameters and HyperParameters.of(hyperparameters),
            allow_new_entries=allow_new_entries,
            tune_new_entries=tune_new_entries,
            seed=seed,
            max_retries_per_trial=max_retries_per_trial,
            max_consecutive_failed_trials=max_consecutive_failed_trials,
        )
        if hyperparameters is None:
            self.hyperparameters = HyperParameters()
        self.seed = seed
        self._sampler = _samplers.sampler(sampler, storage)
        self._pruner = _samplers.pruner(pruner, self.objective)
        self._storage = storage
        self._grace = grace_period
        self._constraints = constraints
        # Of this process, by trial id: what it holds.
        self._held = {}
        self._views = {}
        self._opened = None
        self._deadline = self._most_epochs = None
        self._ended_before = 0

    _values_of = staticmethod(_space.all_values)

    # --- The study ---

    @property
    def _objectives(self):
        return getattr(self.objective, "objectives", [self.objective])

    @property
    def wanted(self):
        """Names that the logs of an epoch must hold; none where the objective is a number."""
        is_default = isinstance(self.objective, keras_tuner.src.engine.objective.DefaultObjective)
        return [] if is_default else [o.name for o in self._objectives]

    @property
    def objective_names(self):
        """str, for people."""
        return ", ".join(o.name for o in self._objectives)

    @property
    def directions(self):
        """list of "minimize" and "maximize", one for each objective."""
        return [f"{o.direction}imize" for o in self._objectives]

    @property
    def study(self):
        """The `optuna.Study`; made, or opened, when it is first asked for."""
        return self._trials.study

    @property
    def _trials(self):
        return self._open()[0]

    @property
    def _proposals(self):
        return self._open()[1]

    @property
    def _ledger(self):
        return self._trials.ledger

    def _open(self):
        if self._opened is None:
            study, ledger = _study.open_study(
                self._storage, self._project_dir, self._project_name, self.directions, self._grace
            )
            self._agree(ledger)
            _study.name_metrics(study, [o.name for o in self._objectives])
            trials = _trials.Trials(study, ledger, self._sampler, self._pruner, self.seed)
            proposals = _proposals.Proposals(
                trials,
                self.seed,
                lambda: self.hyperparameters,
                self._values_of,
                {hp.name for hp in self.hyperparameters.space},
            )
            self._opened = trials, proposals
            self._remember_space()
        return self._opened

    def begin_anew(self):
        """Removes the study, unless other processes work on it.

        Raises:
            StudyError: If others work on it; nothing is removed then.
        """
        directory = pathlib.Path(self._project_dir)
        is_there = self._storage not in (None, _study.MEMORY) or (directory / _study.FILE).exists()
        if is_there and _study.is_in_use(self._storage, directory, self._project_name, self._grace):
            raise errors.StudyError(
                f"overwrite=True would remove the study {self._project_name!r} in {self._where}, "
                "on which other processes work. Nothing is removed. End them first, or leave "
                "overwrite out to join them."
            )
        if is_there:
            _study.remove(self._storage, directory, self._project_name)
        for path in directory.glob("trial_*"):
            shutil.rmtree(path, ignore_errors=True)
        # From now on, another that would begin anew as well is refused.
        self._ledger.enter()

    def begin_search(self, max_seconds=None, max_total_epochs=None):
        """Called before the first trial.

        Args:
            max_seconds: float or None, seconds from now in which trials begin.
            max_total_epochs: int or None, epochs of all trials until which trials begin.
        """
        if max_total_epochs is not None and len(self._objectives) > 1:
            raise errors.InvalidOptionError(
                "`max_total_epochs` goes with one objective: of several, no epoch is reported. "
                f"Received: max_total_epochs={max_total_epochs} and {self.objective_names}."
            )
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._most_epochs = max_total_epochs
        # A program that was corrected is given a chance.
        self._ended_before = len(self._trials.ended())
        self._ledger.enter()

    def _is_spent(self):
        """Whether the time or the epochs of this search are used up."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return True
        if self._most_epochs is None:
            return False
        steps = (max(t.intermediate_values, default=0) for t in self._trials.by_slot().values())
        return sum(steps) >= self._most_epochs

    def _settings(self):
        """What must not change in the life of a study: dictionary of str."""
        return {
            "objective": ", ".join(f"{o.name} ({o.direction})" for o in self._objectives),
            "way to search": type(self).__name__,
            "sampler": self._sampler.name,
            "pruner": self._pruner.name if self._pruner else "none",
        }

    def _agree(self, ledger):
        wanted = self._settings()
        if self.seed is not None:
            wanted["seed"] = str(self.seed)
        drawn = {"seed": str(random.SystemRandom().randrange(2**31))}
        known = json.loads(ledger.fact("settings", json.dumps(drawn | wanted)))
        for name, value in wanted.items():
            if known.get(name) != value:
                raise errors.StudyError(
                    f"The study {self._project_name!r} in {self._where} is of another search: its "
                    f"{name} is {known.get(name)!r}, and that of this one {value!r}. It is left as "
                    "it is. Use another project_name, or overwrite=True to begin anew."
                )
        self.seed = int(known["seed"])

    @property
    def name(self):
        """str, which search this is among all of a program."""
        return f"{self._where}|{self._project_name}"

    @property
    def _where(self):
        return self._project_dir if self._storage is None else _study.shown(self._storage)

    def _remember_space(self):
        """Joins the hyperparameters known here with those that the study knows."""
        if self._opened is None:
            return
        ledger = self._opened[0].ledger

        def join(known):
            if known is not None:
                known = HyperParameters.from_config(_json.loads(known))
                self._check_kinds(known)
                missing = [
                    hp
                    for hp in known.space
                    if not self.hyperparameters._exists(hp.name, hp.conditions)
                ]
                self.hyperparameters.merge(missing)
            space = self.hyperparameters.copy()
            space.values = {}
            return _json.dumps(space.get_config())

        ledger.change_fact("space", join)

    def _check_kinds(self, known):
        """Refuses a study whose space has nothing to do with this one's."""
        mine = {hp.name: type(hp).__name__ for hp in self.hyperparameters.space}
        theirs = {hp.name: type(hp).__name__ for hp in known.space}
        differing = [n for n in mine.keys() & theirs.keys() if mine[n] != theirs[n]]
        if differing or (mine and theirs and not mine.keys() & theirs.keys()):
            raise errors.StudyError(
                f"The study {self._project_name!r} in {self._where} is of another search space: it "
                f"has {theirs}, and this search {mine}. It is left as it is. Use another "
                "project_name, or overwrite=True to begin anew."
            )

    # --- Trials, as KerasTuner sees them ---

    @staticmethod
    def _trial_id(slot):
        return f"{slot:04d}"

    @property
    def trials(self):
        """Dictionary from trial ids to `keras_tuner.engine.trial.Trial`, in order."""
        if self._opened is None and self._project_name is None:
            return {}
        return {
            self._trial_id(slot): self._view(t)
            for slot, t in sorted(self._trials.by_slot().items())
        }

    @trials.setter
    def trials(self, value):
        del value  # The constructor of KerasTuner begins with none.

    def _view(self, frozen):
        trial_id = self._trial_id(frozen.user_attrs[_trials.SLOT])
        if trial_id in self._held:
            return self._held[trial_id].trial
        if frozen.number in self._views:
            return self._views[frozen.number]
        trial = _trials.seen(frozen, trial_id, self.hyperparameters.copy())
        if frozen.state.is_finished():
            self._views[frozen.number] = trial
        return trial

    def get_trial(self, trial_id):
        """The trial of an id."""
        if trial_id in self._held:
            return self._held[trial_id].trial
        return self.trials[trial_id]

    @property
    def start_order(self):
        """Ids in the order in which trials began."""
        return list(self.trials)

    @start_order.setter
    def start_order(self, value):
        del value

    @property
    def end_order(self):
        """Ids in the order in which trials ended."""
        return [self._trial_id(t.user_attrs[_trials.SLOT]) for t in self._trials.ended()]

    @end_order.setter
    def end_order(self, value):
        del value

    @property
    def ongoing_trials(self):
        """The trial that this process runs, by the id that it gave itself."""
        return {h.tuner_id: h.trial for h in self._held.values()}

    @ongoing_trials.setter
    def ongoing_trials(self, value):
        del value

    def get_best_trials(self, num_trials=1):
        """The best completed trials, best first; with several objectives the Pareto front.

        The front is in the order of the first objective.
        """
        if len(self._objectives) > 1:
            best = self.study.best_trials
        else:
            done = [t for t in self._trials.by_slot().values() if t.state == TrialState.COMPLETE]
            best = [t for t in done if all(v <= 0 for v in t.constraints.values())]
        signs = [-1 if o.direction == "max" else 1 for o in self._objectives]
        best.sort(key=lambda t: [s * v for s, v in zip(signs, t.values, strict=True)])
        return [self._view(t) for t in best[:num_trials]]

    def remaining_trials(self):
        """How many trials may still begin, of all processes; None without a bound."""
        return None if self.max_trials is None else self.max_trials - len(self._ledger.slots())

    # The study is saved as it goes.

    def save(self):
        """Does nothing."""

    def reload(self):
        """Does nothing."""

    def get_state(self):
        """An empty dictionary."""
        return {}

    def set_state(self, state):
        """Does nothing."""

    def update_space(self, hyperparameters):
        """Adds hyperparameters that are new, here and for all processes."""
        before = len(self.hyperparameters.space)
        super().update_space(hyperparameters)
        if len(self.hyperparameters.space) > before:
            self._remember_space()

    # --- Beginning a trial ---

    def create_trial(self, tuner_id):
        """The next trial of this process, which holds it until `end_trial`.

        Returns:
            `keras_tuner.engine.trial.Trial`, of status RUNNING; IDLE, if there may be one
            later; or STOPPED, if there is none.
        """
        for held in self._held.values():
            if held.tuner_id == tuner_id:
                return held.trial
        self._trials.tell_ended()
        self._check_failures()
        found = None if self._is_spent() else self._next()
        if found is None:
            is_over = self._is_spent() or not any(
                s.state in (_ledger.RUNNING, _ledger.PAUSED) for s in self._ledger.slots()
            )
            if is_over:
                self._trials.tell_ended()
            else:
                time.sleep(_LOOK)
            return kt_trial.Trial(self.get_space(), "", STOPPED if is_over else IDLE)
        slot, frozen = found
        hps = self.hyperparameters.copy()
        hps.values = _json.loads(frozen.user_attrs[_trials.VALUES])
        trial = kt_trial.Trial(hps, self._trial_id(slot), RUNNING)
        if self.goes_on:
            self._restore_metrics(trial, frozen)
        self._held[trial.trial_id] = _Held(trial, frozen._trial_id, self._ledger, slot, tuner_id)
        self._display.on_trial_begin(trial)
        return trial

    def _next(self):
        """A slot of this process and its trial in the study, with values; or None."""
        for slot in self._ledger.abandoned():
            if not self._ledger.take(slot, died=bool(slot.owner)):
                continue
            if slot.died >= _MOST_DEATHS:
                message = f"The processes that ran it died, {slot.died + 1} times."
                self._trials.end(
                    slot.slot,
                    TrialState.FAIL,
                    {_trials.MESSAGE: message, _trials.WHY: _trials.BROKEN},
                )
                continue
            if (frozen := self._begin(slot.slot)) is not None:
                return slot.slot, frozen
        for take in (self._take_paused, self._take_new):
            slot = take()
            if slot is not None and (frozen := self._begin(slot)) is not None:
                return slot, frozen
        return None

    def _take_paused(self):
        """Hook: a trial that was put aside and goes on now, held by this process; or None."""

    def _take_new(self):
        if self._proposals.first_untried() is _proposals.EXHAUSTED:
            return None
        return self._ledger.take_new(self.max_trials)

    def _begin(self, slot):
        """The study's trial of a slot, with values; None: there are none for it."""
        frozen = self._trials.of(slot)
        if _trials.VALUES in frozen.user_attrs:
            return frozen
        values = self._proposals.claimed(slot)
        if values is None:
            # Of KerasTuner's `_random_values`, which an overridden `populate_space` may call.
            self._seed_state = int(np.random.SeedSequence([self.seed, slot]).generate_state(1)[0])
            proposed = self.populate_space(self._trial_id(slot))
            if proposed["status"] != RUNNING:
                # Between the look and the trial, another process took the last values.
                self._trials.end(slot, TrialState.FAIL, {_trials.WHY: _trials.VOID})
                return None
            values = self._completed(proposed["values"])
        return self._trials.store(frozen, self.hyperparameters, values)

    def _completed(self, values):
        """Values with the defaults of what they leave out."""
        hps = self.hyperparameters.copy()
        hps.values = {k: _json.canonical(v) for k, v in (values or {}).items()}
        hps.ensure_active_values()
        return hps.values

    def populate_space(self, trial_id):
        """Values for a trial; to be overridden for another way to search.

        Args:
            trial_id: str.

        Returns:
            A dictionary with "status": RUNNING, or STOPPED where the space is exhausted, and
            "values": a dictionary of values by name.
        """
        values = self._proposals.values_for(int(trial_id))
        if values is None:
            return {"status": STOPPED, "values": None}
        return {"status": RUNNING, "values": values}

    def _duplicate(self, values):
        """Whether a trial has these values; for an overridden `populate_space`."""
        names = {_proposals.name_of(t.hyperparameters.values) for t in self.trials.values()}
        return _proposals.name_of(values) in names

    # --- Within a trial ---

    # Whether a trial that is run again goes on where it was, instead of at its begin.
    goes_on = False

    def _restore_metrics(self, trial, frozen):
        for step, value in frozen.intermediate_values.items():
            if not trial.metrics.exists(self.objective.name):
                trial.metrics.register(self.objective.name, direction=self.objective.direction)
            trial.metrics.update(self.objective.name, value, step=step - 1)

    def epochs_of(self, trial_id):
        """Up to which epoch a trial of this process is trained; None: as `search` says."""
        del trial_id

    @property
    def seed_of_folds(self):
        """int, the same for all trials of the study."""
        self._open()
        return self.seed

    def best_reported(self, trial_id):
        """The best value that a trial of this process has reported before; or None."""
        metrics = self._held[trial_id].trial.metrics
        exists = metrics.exists(self.objective.name)
        return metrics.get_best_value(self.objective.name) if exists else None

    def is_updated(self, trial_id):
        """Whether `update_trial` was called for a trial of this process."""
        return self._held[trial_id].is_updated

    def is_lost(self, trial_id):
        """Whether another process has taken a trial of this one."""
        return trial_id in self._held and self._held[trial_id].is_lost

    def report(self, trial_id, values, step):
        """Tells the study the objective's value after a step.

        Args:
            trial_id: str.
            values: dictionary of metrics, which may hold the objective or not.
            step: int, from 1.

        Returns:
            bool, whether the trial is to be pruned.
        """
        held = self._held[trial_id]
        if len(self._objectives) > 1 or not self.objective.has_value(values):
            return False
        value = float(self.objective.get_value(values))
        held.reported[step] = value
        if not self._ledger.beat(held.slot):
            held.is_lost = True
            return False
        storage = self.study._storage
        storage.set_trial_intermediate_value(held.number, step, value)
        if self._pruner is None:
            return False
        frozen = storage.get_trial(held.number)
        # Without what an earlier process reported of later steps.
        frozen.intermediate_values = dict(held.reported)
        with _study.quiet():
            filtered = optuna.pruners._filter_study(self.study, frozen)
            return self.study.pruner.prune(filtered, frozen)

    def update_trial(self, trial_id, metrics, step=0):
        """Keeps metrics of a trial of this process.

        Raises:
            ValueError: If the objective is not among them.
        """
        self._check_objective_found(metrics)
        self._held[trial_id].is_updated = True
        trial = self._held[trial_id].trial
        for name, value in metrics.items():
            if not trial.metrics.exists(name):
                directions = {o.name: o.direction for o in self._objectives}
                trial.metrics.register(name, direction=directions.get(name))
            with nan_allowed():
                trial.metrics.update(name, value, step=step)
        return trial

    # --- Ending a trial ---

    def end_trial(self, trial, status=COMPLETED):
        """Tells the study how a trial ended.

        Args:
            trial: `keras_tuner.engine.trial.Trial` with status COMPLETED; STOPPED, where it was
                pruned; INVALID, where it raised and may be run again; or FAILED. An
                attribute `why` may say more. Or, as before KerasTuner 1.2, the id of one.
            status: str, for a trial that is given by its id.
        """
        if isinstance(trial, str):
            trial = self.get_trial(trial)
            trial.status = COMPLETED if status == "COMPLETE" else status
        held = self._held.get(trial.trial_id)
        if held is None:
            return
        held.stop_beating()
        kept = held.trial
        kept.status, kept.message, kept.hyperparameters = (
            trial.status,
            trial.message,
            trial.hyperparameters,
        )
        self.update_space(kept.hyperparameters)
        kept.hyperparameters.ensure_active_values()
        self._proposals.claim(held.slot, kept.hyperparameters.values)
        if kept.status == COMPLETED and self._pause(held):
            del self._held[trial.trial_id]
            return
        del self._held[trial.trial_id]
        state, result = self._result(kept, getattr(trial, "why", None))
        if state is None:
            print(f"Trial {kept.trial_id} raised, and is run again.")
            self._ledger.release(held.slot, raised=self._raised(held.slot) + 1)
        elif self._trials.end(held.slot, state, **result):
            trial.status, trial.score = kept.status, kept.score
            trial.best_step, trial.metrics = kept.best_step, kept.metrics
            self._display.on_trial_end(kept)
        else:
            warnings.warn(
                f"Trial {kept.trial_id} was run elsewhere, as this process was not heard of for "
                f"{self._grace:g} s; what it found here is dropped.",
                stacklevel=2,
            )

    def _pause(self, held):
        """Hook: whether a trial that was completed is put aside, to be gone on with later."""
        del held
        return False

    def _result(self, trial, why):
        """Optuna's state of an ended trial, None to run it again; and the rest of `Trials.end`."""
        values = constraints = None
        if trial.status == COMPLETED:
            values, constraints = self._scored(trial)
            if not all(map(math.isfinite, values)):
                trial.status, why = INVALID, _trials.INFEASIBLE
                trial.message = f"The objective is not finite: {values}."
        if trial.status == INVALID and why != _trials.INFEASIBLE:
            if self._raised(int(trial.trial_id)) < self.max_retries_per_trial:
                return None, {}
            trial.status = FAILED
        if trial.status == COMPLETED:
            state = TrialState.COMPLETE
        elif trial.status == STOPPED:
            state, why = TrialState.PRUNED, _trials.STOPPED_EARLY
        else:
            state, why = TrialState.FAIL, why or _trials.BROKEN
        attrs = {
            _trials.VALUES: _json.dumps(trial.hyperparameters.values),
            _trials.METRICS: json.dumps(trial.metrics.get_config()),
            _trials.BEST_STEP: int(trial.best_step or 0),
            _trials.WHY: why,
            _trials.MESSAGE: trial.message,
        }
        attrs = {k: v for k, v in attrs.items() if v is not None}
        is_complete = state == TrialState.COMPLETE
        return state, {
            "attrs": attrs,
            "values": values if is_complete else None,
            "constraints": constraints if is_complete else None,
        }

    def _raised(self, slot):
        """How often a slot was run again since it raised."""
        (row,) = self._ledger.slots(slot=slot)
        return json.loads(row.note).get("raised", 0)

    def _scored(self, trial):
        if len(self._objectives) == 1:
            with nan_allowed():
                self.score_trial(trial)
            values = [float(trial.score)]
        else:
            values = [float(trial.metrics.get_last_value(o.name)) for o in self._objectives]
            trial.score = tuple(values)
        constraints = None
        if self._constraints is not None:
            metrics = {n: h.get_last_value() for n, h in trial.metrics.metrics.items()}
            constraints = {k: float(v) for k, v in self._constraints(metrics).items()}
        return values, constraints

    def on_death(self, pid, what):
        """Records that a process of this machine died in a trial; returns whether it did."""
        for slot in self._ledger.slots(state=_ledger.RUNNING):
            if _ledger.process_id(slot.owner) == pid and self._ledger.take(slot):
                self._trials.end(
                    slot.slot,
                    TrialState.FAIL,
                    {_trials.MESSAGE: what, _trials.WHY: _trials.INFEASIBLE},
                )
                return True
        return False

    def release(self):
        """Lets others run the trials of this process, which ends in the middle of them."""
        for held in self._held.values():
            held.stop_beating()
            self._ledger.release(held.slot)
        self._held.clear()
        self._ledger.leave()

    # --- How the search as a whole goes ---

    def _check_failures(self):
        """Ends the search where trials fail one after the other."""
        count = 0
        for frozen in self._trials.ended()[self._ended_before :]:
            if frozen.user_attrs.get(_trials.WHY) == _trials.BROKEN:
                count += 1
                message = frozen.user_attrs.get(_trials.MESSAGE, "")
            elif frozen.user_attrs.get(_trials.WHY) != _trials.INFEASIBLE:
                count = 0
            if count >= self.max_consecutive_failed_trials:
                raise errors.SearchError(
                    f"{count} trials in a row failed. The last one:\n{message}"
                )

    def check_result(self):
        """Raises where a search has ended and no trial is complete."""
        ended = self._trials.ended()
        if not ended or any(t.state == TrialState.COMPLETE for t in ended):
            return
        messages = [t.user_attrs[_trials.MESSAGE] for t in ended if _trials.MESSAGE in t.user_attrs]
        first = messages[0] if messages else "all were pruned"
        raise errors.SearchError(f"None of {len(ended)} trials was completed. The first:\n{first}")

    @property
    def verbose(self):
        """0: trials are not printed."""
        return self._display.verbose

    @verbose.setter
    def verbose(self, value):
        self._display.verbose = 1 if value == "auto" else value


@contextlib.contextmanager
def nan_allowed():
    """NumPy warns where all values are NaN; such a trial is infeasible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


class _Held:
    """A trial of this process, and the thread that says that it lives."""

    def __init__(self, trial, number, ledger, slot, tuner_id):
        self.tuner_id = tuner_id
        self.trial = trial
        self.number = number
        self.slot = slot
        self.is_lost = self.is_updated = False
        self.reported = {}
        self._ledger = ledger
        self._interval = ledger.interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self):
        while not self._ended.wait(self._interval):
            try:
                if not self._ledger.beat(self.slot):
                    self.is_lost = True
                    return
            except Exception as e:  # The database may be back at the next beat.
                warnings.warn(
                    f"The search's storage did not answer: {type(e).__name__}", stacklevel=1
                )

    def stop_beating(self):
        self._ended.set()
        self._thread.join()


def _check(max_trials, seed, grace_period, storage):
    for name, value in (("max_trials", max_trials), ("seed", seed)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise errors.InvalidOptionError(
                f"`{name}` must be an integer or None. Received: {name}={value!r}."
            )
    if seed is not None and seed < 0:
        raise errors.InvalidOptionError(f"`seed` must not be negative. Received: seed={seed}.")
    if max_trials is not None and max_trials < 1:
        raise errors.InvalidOptionError(
            f"`max_trials` must be at least 1. Received: max_trials={max_trials}."
        )
    if not isinstance(grace_period, int | float) or grace_period <= 0:
        raise errors.InvalidOptionError(
            f"`grace_period` must be a positive number of seconds. Received: {grace_period!r}."
        )
    if storage is not None and not isinstance(storage, str):
        raise errors.InvalidOptionError(
            "`storage` must be None, 'memory' or a database URL. Received: an object of type "
            f"{type(storage).__name__}."
        )
