"""KerasTuner's `Oracle` over an Optuna study, which alone holds the state of a search.

KerasTuner wants one class with a wide interface. Behind it, each part does one thing: `_queue`
decides which trial runs next, `_running` records what running trials report, `_outcomes` ends
trials, and `_views` shows them to KerasTuner.
"""

import contextlib
import time
import warnings
from collections.abc import Iterable

import keras_tuner
import optuna
from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import FrozenTrial

from tfbig import errors
from tfbig.tuners import (
    _agreement,
    _budget,
    _json,
    _options,
    _outcomes,
    _own_values,
    _populating,
    _process_memory,
    _proposals,
    _queue,
    _read_only,
    _running,
    _samplers,
    _space,
    _study,
    _training,
    _trials,
    _tuner_types,
    _views,
)
from tfbig.tuners._from_study import StoredAtOnce
from tfbig.tuners._hyperparameters import HyperParameters
from tfbig.tuners._ledger import Ledger
from tfbig.tuners._objectives import Direction, Objectives
from tfbig.tuners._search import Search

__all__ = ("StudyOracle",)

# Seconds until a process that has nothing to do looks again for an abandoned trial.
_POLL_INTERVAL = 0.5

_STATUS = kt_trial.TrialStatus


class StudyOracle(
    StoredAtOnce,
    _training.TrainingTrials,
    _populating.PopulatesSpace,
    keras_tuner.Oracle,  # type: ignore[misc]  # KerasTuner has no types.
):
    """Asks an Optuna study for values, and tells it results.

    Any number of processes may have one over the same study.

    Args:
        objective: As in KerasTuner. For several objectives, the search looks for their Pareto
            front.
        max_trials: How many trials there may be; None for any number.
        hyperparameters: As in KerasTuner.
        allow_new_entries: As in KerasTuner.
        tune_new_entries: As in KerasTuner.
        seed: The seed of the search, >= 0; None for a random one.
        max_retries_per_trial: How often a trial that raised an error is run again.
        max_consecutive_failed_trials: After how many failed trials in a row the search ends.
        sampler: See `OptunaSearch`; `sampler_options`, `pruner` and `pruner_options` as well.
        storage: None for a file in the project's directory, "memory", or a database URL.
        grace_period: Seconds without a heartbeat after which another process takes a trial.
        constraints: Function of a trial's metrics that returns a dictionary of numbers; the trial
            is feasible if all of them are <= 0.
    """

    # Whether a trial that is run again continues where it stopped, instead of from the start.
    goes_on = False

    _proposals_class = _proposals.Proposals

    hyperparameters: HyperParameters
    max_trials: int | None
    max_retries_per_trial: int
    max_consecutive_failed_trials: int

    def __init__(
        self,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        allow_new_entries: bool = True,
        tune_new_entries: bool = True,
        seed: int | None = None,
        max_retries_per_trial: int = 0,
        max_consecutive_failed_trials: int = 3,
        *,
        sampler: _samplers.SamplerOption = "tpe",
        sampler_options: _samplers.Options | None = None,
        pruner: _samplers.PrunerOption = None,
        pruner_options: _samplers.Options | None = None,
        storage: str | None = None,
        grace_period: float = 60.0,
        constraints: _outcomes.Constraints | None = None,
    ) -> None:
        max_trials, seed, grace_period = _options.checked_oracle_options(
            max_trials, seed, grace_period, storage
        )
        super().__init__(
            objective=_options.checked_objective(objective),
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
        # KerasTuner takes 0 for no seed.
        self.seed = seed
        self._seeds_trainings = seed is not None
        self._sampler = _samplers.sampler(sampler, storage, sampler_options)
        self._pruner = _samplers.pruner(pruner, self.objective, pruner_options)
        self._storage = storage
        self._grace = grace_period
        self._constraints = constraints
        self._budget = _budget.Budget()
        self._project_name: str | None = None
        self._opened: Search | None = None
        self._settings_of_tuner: dict[str, str] = {}

    # --- The study ---

    @property
    def _objectives(self) -> Objectives:
        return Objectives(self.objective)

    @property
    def wanted(self) -> list[str]:
        """Names that the logs of an epoch must contain; none if the objective is a number."""
        return self._objectives.logged_names

    @property
    def objective_names(self) -> str:
        """The names of the objectives, for messages."""
        return ", ".join(self._objectives.names)

    @property
    def directions(self) -> list[Direction]:
        """ "minimize" or "maximize", for each objective."""
        return self._objectives.directions

    @property
    def study(self) -> optuna.Study:
        """The study; created or opened on first use."""
        return self._search.trials.study

    @property
    def name(self) -> str:
        """Identifies this search among all searches of a program."""
        return f"{self._where}|{self._project_name}"

    @property
    def storage(self) -> str | None:
        """None for a file in the project's directory, "memory", or a database URL."""
        return self._storage

    @property
    def _where(self) -> str:
        return str(self._project_dir) if self._storage is None else _study.shown(self._storage)

    @property
    def _ledger(self) -> Ledger:
        return self._search.trials.ledger

    @property
    def _study_in_words(self) -> str:
        return f"{self._project_name!r} in {self._where}"

    @property
    def _search(self) -> Search:
        if self._opened is None:
            where = self._storage, self._project_dir, str(self._project_name), self.directions
            study, ledger = _read_only.open_if_needed(*where) or _study.open_study(
                *where, self._grace
            )
            space = _agreement.SharedSpace(ledger, self._study_in_words)
            initial = {hp.name for hp in self.hyperparameters.space}
            wider = space.check(self.hyperparameters)
            self.seed, changed = _agreement.agree_on_settings(
                ledger, self._study_in_words, self._settings(), self.seed
            )
            _study.name_metrics(study, self._objectives.names)
            space.push(self.hyperparameters)
            if not isinstance(ledger, _read_only.ReadOnlyLedger):
                _agreement.record_changes(study, changed + wider)
            self._opened = self._parts(study, ledger, self.seed, space, initial)
        return self._opened

    def _parts(
        self,
        study: optuna.Study,
        ledger: Ledger,
        seed: int,
        space: _agreement.SharedSpace,
        initial: set[str],
    ) -> Search:
        objectives = self._objectives
        trials = _trials.Trials(study, ledger, self._sampler, self._pruner, seed)
        proposals = self._proposals_class(
            trials,
            seed,
            self._known_hyperparameters,
            self._values_of,
            initial,
            self._as_learned_from,
        )
        running = _running.RunningTrials(trials, objectives, self._pruner is not None)
        memory = _process_memory.ProcessMemory(trials, self._grace)
        queue = self._new_queue(trials, proposals)
        queue.may_run = memory.may_run
        return Search(
            seed,
            space,
            trials,
            queue,
            proposals,
            running,
            _outcomes.Outcomes(
                trials, objectives, self._constraints, self.score_trial, self._grace, memory
            ),
            _views.TrialViews(trials, running, objectives, self._known_hyperparameters),
            memory,
        )

    def _known_hyperparameters(self) -> HyperParameters:
        return self.hyperparameters

    def _values_of(self, hp: _tuner_types.Hyperparameter) -> Iterable[_tuner_types.Value] | None:
        """Hook: all values of a hyperparameter that are tried; None for infinitely many."""
        return _space.all_values(hp)

    def _is_itself_after(self, index: int) -> int:
        """Hook: the step until which the reports of a trial are of another model."""
        del index
        return 0

    def _as_learned_from(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Hook: trials as samplers see them."""
        return trials

    def _new_queue(
        self, trials: _trials.Trials, proposals: _proposals.Proposals
    ) -> _queue.TrialQueue:
        """Hook: decides which trial runs next."""
        if self._has_own_values:
            return _own_values.OwnValuesQueue(
                trials, proposals, self._populated, self._known_hyperparameters
            )
        return _queue.TrialQueue(
            trials, proposals, self._populated_values, self._known_hyperparameters
        )

    def _settings(self) -> dict[str, str]:
        """What must not change during the life of a study."""
        return {
            "objective": self._objectives.described(),
            _agreement.KIND: type(self).__name__,
            "sampler": self._sampler.name,
            "pruner": self._pruner.name if self._pruner else "none",
            "width": "",
            **self._settings_of_tuner,
        }

    def set_settings_of_tuner(self, settings: dict[str, str]) -> None:
        """Says how the tuner trains and scores trials; to be called before the study is opened."""
        self._settings_of_tuner = settings

    def warn_of_random_values(self) -> None:
        """Warns if the sampler draws hyperparameters at random that it cannot model."""
        _samplers.warn_of_random_values(self._sampler, self.hyperparameters.space)

    def warn_of_trials_left_out(self) -> None:
        """Warns if there are more enqueued trials than the search may still run."""
        if self.max_trials is None:
            return
        trials = self._search.trials
        with trials.one_look():
            waiting = trials.count_enqueued()
            left = max(0, self.max_trials - len(trials.by_index()))
        if waiting > left:
            warnings.warn(
                f"{waiting - left} of {waiting} enqueued trials will not run, those enqueued last: "
                f"the search has {self.max_trials} trials in all, of which {left} are left. "
                "Enqueue fewer, or let it have more.",
                stacklevel=4,
            )

    def begin_anew(self) -> None:
        """Removes the study.

        Raises:
            StudyError: If other processes work on it. Nothing is removed then.
        """
        _study.remove_unless_used(
            self._storage, self._project_dir, str(self._project_name), self._grace
        )
        # From now on, other processes may not remove the study either.
        self._ledger.join()

    def begin_search(
        self, limits: _budget.Limits | None = None, process_memory: int | None = None
    ) -> None:
        """Called before the first trial.

        Args:
            limits: How long the search may go on, and a trial.
            process_memory: Bytes of memory that this process has; None if unknown.
        """
        if limits is not None:
            self.check_limits(limits)
        self._budget = _budget.Budget(limits, self._objectives.rank)
        self._search.memory.join(process_memory)
        self._ledger.change_metadata(_agreement.MAX_TRIALS, lambda _: str(self.max_trials))
        self._search.outcomes.begin_search()
        # If the storage failed in an earlier search, they could not be released then.
        self._search.running.release_others()
        self._ledger.join()

    def one_look(self) -> contextlib.AbstractContextManager[None]:
        """Within, the study is read once, which saves time."""
        return self._search.trials.one_look()

    # --- Trials, as KerasTuner sees them ---

    def get_trial(self, trial_id: str) -> _tuner_types.Trial:
        """The trial of an id."""
        return self._search.views.of(trial_id)

    def get_best_trials(self, num_trials: int = 1) -> list[_tuner_types.Trial]:
        """The best completed trials, best first.

        With several objectives these are the Pareto front, ordered by the first objective.
        """
        return self._search.views.best(num_trials)

    def remaining_trials(self) -> int | None:
        """How many trials may still begin, in all processes; None for any number."""
        return None if self.max_trials is None else self.max_trials - self._ledger.taken()

    def update_space(self, hyperparameters: HyperParameters) -> None:
        """Adds new hyperparameters, here and for all processes."""
        before = len(self.hyperparameters.space)
        super().update_space(hyperparameters)
        if len(self.hyperparameters.space) > before and self._opened is not None:
            self._opened.space.push(self.hyperparameters)

    # --- Proposing a trial ---

    def create_trial(self, tuner_id: str) -> _tuner_types.Trial:
        """The next trial of this process, which owns it until `end_trial`.

        Returns:
            `keras_tuner.engine.trial.Trial`, of status RUNNING; IDLE if there may be one later; or
            STOPPED if there is none.
        """
        search = self._search
        if (running := search.running.of_tuner(tuner_id)) is not None:
            return running.trial
        while True:
            # If this process is stopped for long between taking a trial and storing its values,
            # another may have ended the trial.
            lost = contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError)
            with lost, search.trials.one_look():
                return self._next_trial(search, tuner_id)

    def may_begin(self) -> bool:
        """Whether the limits of the search let another trial begin, in any process.

        Raises:
            SearchError: If too many trials in a row have failed.
        """
        self._search.trials.record_ended()
        self._search.outcomes.check_failures(self.max_consecutive_failed_trials)
        return not self._is_spent()

    def _next_trial(self, search: Search, tuner_id: str) -> _tuner_types.Trial:
        # Others may have found hyperparameters that this process has not.
        search.space.pull(self.hyperparameters)
        found = search.queue.next(self.max_trials) if self.may_begin() else None
        if found is None:
            return self._no_trial()
        index, frozen = found
        hps = self.hyperparameters.copy()
        hps.values = _json.loads(frozen.user_attrs[_trials.VALUES])
        trial = kt_trial.Trial(hps, _views.trial_id_of(index), _STATUS.RUNNING)
        if self.goes_on:
            after = self._is_itself_after(index)
            _running.restore_metrics(trial, frozen, self.objective, after)
        search.running.add(trial, frozen, index, tuner_id, self.goes_on)
        self._display.on_trial_begin(trial)
        return trial

    def _is_spent(self) -> bool:
        return self._budget.is_spent(self._search.trials.by_index().values())

    def _no_trial(self) -> _tuner_types.Trial:
        """Says that there is no trial, for now or ever."""
        search = self._search
        is_over = self._is_spent() or search.queue.is_over()
        if is_over:
            search.trials.record_ended()
        else:
            time.sleep(_POLL_INTERVAL)
        return kt_trial.Trial(self.get_space(), "", _STATUS.STOPPED if is_over else _STATUS.IDLE)

    # --- Ending a trial ---

    def update_trial(
        self, trial_id: str, metrics: _tuner_types.Metrics, step: int = 0
    ) -> _tuner_types.Trial:
        """Adds metrics to a trial of this process.

        Raises:
            ValueError: If the objective is not among them.
        """
        self._check_objective_found(metrics)
        return self._search.running.update(trial_id, metrics, step)

    def end_trial(self, trial: _tuner_types.Trial | str, status: str = _STATUS.COMPLETED) -> None:
        """Tells the study how a trial ended.

        Args:
            trial: `keras_tuner.engine.trial.Trial` with status COMPLETED; STOPPED if it was
                pruned; INVALID if it raised an error and may be run again; or FAILED. An attribute
                `why` may say more. Or the id of a trial, as before KerasTuner 1.2.
            status: For a trial that is given by its id.
        """
        search = self._search
        if isinstance(trial, str):
            trial = self.get_trial(trial)
            trial.status = _STATUS.COMPLETED if status == "COMPLETE" else status
        running = search.running.get(trial.trial_id)
        if running is None:
            return
        # Of other trials, nothing needs to be known.
        with search.trials.one_look(reads=False):
            has_ended = self._end(search, running, trial)
        if has_ended:
            self._display.on_trial_end(running.trial)

    def _end(
        self, search: Search, running: _running.RunningTrial, trial: _tuner_types.Trial
    ) -> bool:
        """Ends a trial of this process, pauses or releases it; returns whether it has ended."""
        running.stop_heartbeat()
        kept = running.trial
        kept.status, kept.message = trial.status, trial.message
        kept.hyperparameters = trial.hyperparameters
        self.update_space(kept.hyperparameters)
        kept.hyperparameters.ensure_active_values()
        has_asked = kept.status in (_STATUS.COMPLETED, _STATUS.STOPPED)
        if has_asked and running.last_step == 0:
            frozen = search.trials.by_index().get(running.index)
            if frozen is not None:
                _own_values.drop_unused(trial.trial_id, frozen, kept.hyperparameters)
        values = kept.hyperparameters.values
        search.proposals.claim(running.index, values)
        search.trials.store_found(running.index, self.hyperparameters, values, running.is_lost_now)
        is_paused = kept.status == _STATUS.COMPLETED and search.queue.pause(running)
        search.running.remove(trial.trial_id)
        why = getattr(trial, "why", None)
        if is_paused or not search.outcomes.end(running, why, self.max_retries_per_trial):
            return False
        trial.status, trial.score = kept.status, kept.score
        trial.best_step, trial.metrics = kept.best_step, kept.metrics
        return True

    def on_death(self, pid: int, what: str, may_lack_memory: bool = False) -> bool:
        """Records that a process of this machine died in a trial; returns whether it had one."""
        return self._search.outcomes.record_death(pid, what, may_lack_memory)

    def release(self) -> None:
        """Lets other processes run the trials of this one, which stops in the middle of them."""
        # If the storage fails, others see that this process is gone.
        with contextlib.suppress(errors.StorageUnavailableError):
            self._search.running.release()
            self._ledger.leave()

    def check_result(self) -> None:
        """Raises if the search has ended and no trial is complete."""
        self._search.outcomes.check_result()

    @property
    def verbose(self) -> int:
        """0 prints nothing about trials."""
        return int(self._display.verbose)

    @verbose.setter
    def verbose(self, value: int | str) -> None:
        self._display.verbose = 1 if value == "auto" else value
