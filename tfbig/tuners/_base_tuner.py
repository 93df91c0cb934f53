"""The loop of a search: it runs the trials that an oracle over a study hands out."""

import gc
import os
import pathlib
import shutil
import traceback
from collections.abc import Mapping
from typing import Any, cast, overload

import keras
import keras_tuner
import tensorflow as tf
from keras_tuner.src.engine import trial as kt_trial

from tfbig import _integers, _keras, errors
from tfbig.distribute import _workers
from tfbig.tuners import (
    _budget,
    _directory,
    _isolation,
    _options,
    _oracle,
    _own_values,
    _process_memory,
    _progress,
    _study,
    _transfer,
    _trial_callbacks,
    _trial_results,
    _trials,
    _tuner_results,
    _tuner_types,
    _worker_oracle,
)
from tfbig.tuners._from_study import StoredAtOnce
from tfbig.tuners._trial_callbacks import STATE, TrialLost, TrialPruned

__all__ = ("BaseTuner",)

# Errors that the values of a trial cause, rather than the program.
_INFEASIBLE = (
    keras_tuner.errors.FailedTrialError,
    errors.LossScaleError,
)

_STATUS = kt_trial.TrialStatus


class BaseTuner(
    StoredAtOnce,
    _tuner_results.TunerResults,
    keras_tuner.engine.base_tuner.BaseTuner,  # type: ignore[misc]  # KerasTuner has no types.
):
    """Runs the trials of a search for models of any kind; override `run_trial`.

    Args:
        oracle: Chooses values, and stores results.
        hypermodel: Function of `hp`, or `keras_tuner.HyperModel`, that returns a model. May be left
            out if `run_trial` does not use `self.hypermodel`.
        directory: Where projects are. Defaults to the working directory.
        project_name: The directory of this search in it, and the name of its study.
        overwrite: Whether to start over instead of resuming. Refused while other processes work on
            the study.
        keep_best_k: The models of so many of the best trials are kept. Defaults to 10.
        max_seconds: Seconds after which no trial begins.
        max_total_epochs: Epochs of all trials together after which no trial begins.
        patience: After so many ended trials in a row without a better one, no trial begins.
        timeout_per_trial: Seconds after which a trial is stopped as if pruned: after a batch of
            Keras's `fit`; with several workers, after an epoch; in a loop of your own, when
            `should_prune` says so. One that hangs in between is stopped only with `isolate`: after
            `grace_period` seconds more, its process is ended, and the trial is infeasible.
        process_memory: Bytes of memory that this process has for a trial. A trial that runs out of
            memory is left to a process with more, and is infeasible if there is none. None: what
            the host gives the process, without a GPU; unknown with one.
        isolate: Whether each trial runs in a process of its own. Then no memory is carried over,
            and a trial that is killed for its memory is infeasible. The program is run again for
            each trial, up to `search`, without other searches before it. Defaults to False.
        transfer_from: An earlier search to begin with: the directory of its project, its file, or a
            database URL. Its space may be another: what fits by name and range is taken.
        transfer: "best" to try the values of its best three trials first; or "observations" to
            have the sampler learn from all its complete trials whose values are all of this space,
            as if they were of this search. They do not count as trials. Defaults to "best".
        **kwargs: As for `keras_tuner.engine.base_tuner.BaseTuner`.
    """

    oracle: _oracle.StudyOracle

    # The file of a trial's model in its directory, which only the best trials keep; None if this
    # class does not know it.
    _model_file: str | None = None

    def __init__(
        self,
        oracle: _oracle.StudyOracle,
        hypermodel: _options.BuildAny = None,
        directory: str | os.PathLike[str] | None = None,
        project_name: str | None = None,
        overwrite: bool = False,
        *,
        keep_best_k: int = 10,
        max_seconds: float | None = None,
        max_total_epochs: int | None = None,
        patience: int | None = None,
        timeout_per_trial: float | None = None,
        process_memory: int | None = None,
        isolate: bool = False,
        transfer_from: str | os.PathLike[str] | None = None,
        transfer: _transfer.Transfer = "best",
        **kwargs: Any,  # KerasTuner's, which has no types.
    ) -> None:
        _check_environment()
        if not isinstance(oracle, _oracle.StudyOracle):
            raise errors.InvalidOptionError(
                f"`oracle` must be a `tfbig.tuners.Oracle`. Received: oracle={oracle!r}. "
                "tfbig.tuners.oracles has those of KerasTuner."
            )
        _transfer.check(transfer_from, transfer)
        if transfer_from is not None and transfer == "observations" and oracle.goes_on:
            raise errors.InvalidOptionError(
                "`transfer` does not go with a tuner that pauses trials, since scores after other "
                "numbers of epochs cannot be compared. Received: transfer='observations'. Use "
                "transfer='best'."
            )
        self._transfer_from = transfer_from
        self._transfer: _transfer.Transfer = transfer
        self._keep_best_k = keep_best_k
        # What `report` has told last.
        self._reported: _trial_callbacks.ReportObjective | None = None
        # The trials that had ended, and those whose models were kept, when models were removed.
        self._seen_ended: set[str] = set()
        self._kept: set[str] = set()
        self._limits = _budget.Limits(max_seconds, max_total_epochs, patience, timeout_per_trial)
        self._memory = _process_memory.checked(process_memory)
        project = directory or ".", project_name or "untitled_project"
        # KerasTuner makes it, too, but leaves errors to TensorFlow.
        _directory.make(os.path.join(*project))
        oracle._set_project_dir(*project)
        oracle.set_settings_of_tuner(self._settings())
        strategy = kwargs.get("distribution_strategy") or tf.distribute.get_strategy()
        self._workers = _workers.Workers.of(strategy)
        if self._workers.count > 1 and oracle.storage == _study.MEMORY:
            raise errors.InvalidOptionError(
                "`storage` must be one that all workers can read. Received: storage='memory' and a "
                f"distribution_strategy over {self._workers.count} workers. Leave out `storage`, "
                "or use a database URL."
            )
        self._isolate = bool(isolate)
        if self._isolate:
            _isolation.check(self._workers, oracle.storage)
        self._is_trial_process = _isolation.is_trial_process(oracle.name)
        # Its results are in the storage.
        self._was_run_before = (
            _isolation.was_run_before(oracle.name) and oracle.storage != _study.MEMORY
        )
        is_first = not (self._is_trial_process or self._was_run_before)
        if overwrite and self._workers.is_chief and is_first:
            oracle.begin_anew()
        verbose = oracle.verbose
        oracle._display = _progress.Progress(oracle)
        oracle.verbose = verbose
        super().__init__(
            oracle,
            hypermodel,
            directory=directory,
            project_name=project_name,
            overwrite=False,
            **kwargs,
        )
        if not self._workers.is_chief:
            # It has all attributes of the oracle.
            self.oracle = cast(_oracle.StudyOracle, _worker_oracle.WorkerOracle(oracle))

    def _settings(self) -> dict[str, str]:
        """Hook: how trials are trained and scored, which all processes of a search agree on."""
        return {}

    # --- What a user tells the search ---

    @overload
    def report(self, path: str | os.PathLike[str]) -> None: ...

    @overload
    def report(
        self, path: _tuner_types.Trial, step: int, logs: _tuner_types.Metrics | float
    ) -> None: ...

    def report(
        self,
        path: str | os.PathLike[str] | _tuner_types.Trial,
        step: int | None = None,
        logs: _tuner_types.Metrics | float | None = None,
    ) -> None:
        """Reports a step of a trial, from a `run_trial` or a loop of your own.

        `report(trial, step, logs)` tells the study, whose pruner then decides: see `should_prune`.
        The step counts as an epoch. The tuner itself reports what Keras's `fit` does.

        `report(path)` writes a report on the search: one HTML file that needs no network.

        Args:
            path: The trial that runs; or the file of the report, which is replaced atomically.
            step: From 1, in rising order.
            logs: Metrics with the objective; or its value.

        Raises:
            SearchError: If `step` is not valid, or if the objective is not among the metrics or is
                not one number.
        """
        if not isinstance(path, kt_trial.Trial):
            super().report(path)
            return
        if step is None or logs is None:
            raise TypeError("`report` of a trial needs `step` and `logs`.")
        number = _integers.as_integer(step)
        if number is None or number < 1:
            raise errors.SearchError(f"`step` must be an integer >= 1. Received: step={step!r}.")
        names = self.oracle.wanted or [self.oracle.objective.name]
        metrics = dict(logs) if isinstance(logs, Mapping) else {names[0]: float(logs)}
        missing = [n for n in names if n not in metrics]
        if missing:
            raise errors.SearchError(
                f"`logs` must have the objective {missing[0]!r}. Received: {sorted(metrics)}."
            )
        metrics = _trial_results.single_numbers(metrics, names)
        self.oracle.count_epoch(path.trial_id)
        self._reported = _trial_callbacks.ReportObjective(
            self.oracle, self._workers, path.trial_id, (), reports=True
        )
        self._reported.decide(metrics, number)
        if self._reported.is_lost:
            raise TrialLost

    def should_prune(self, trial: _tuner_types.Trial) -> bool:
        """Whether the pruner stops a trial after its last `report`, or its time is over.

        Raise `tfbig.tuners.errors.TrialPruned` then.
        """
        reported = self._reported
        return reported is not None and reported.is_of(trial) and reported.is_pruned

    def enqueue(self, values: Mapping[str, _tuner_types.Value]) -> bool:
        """Has a trial try values of yours, before those that the tuner chooses.

        Trials try what was enqueued first, first. They count as any others; `search` warns if there
        are too many for `max_trials`. A program that is started again may enqueue the same values
        again, which has no effect.

        Args:
            values: Values of hyperparameters by name. The tuner chooses those that are left out,
                but not one that another one depends on.

        Returns:
            Whether the values were not enqueued before; False on workers that are not the chief.

        Raises:
            InvalidOptionError: If there is no such hyperparameter, if it cannot have the value, or
                if what it depends on has another value or none.
        """
        if not self._workers.is_chief or _own_values.is_enqueued(self.oracle.study, values):
            return False
        self._define_for(values)
        _own_values.check(self.oracle.get_space(), values)
        return _own_values.enqueue(self.oracle.study, values)

    def _define_for(self, values: Mapping[str, _tuner_types.Value]) -> bool:
        """Has the oracle know the hyperparameters that the model has only with some values.

        Returns:
            Whether it knows all of their names, or none because the trials define the space.
        """
        before = -1
        while True:
            hp = self.oracle.get_space()
            if not hp.space or values.keys() <= {known.name for known in hp.space}:
                return True
            is_fixed = self.hypermodel is None or not self.oracle.allow_new_entries
            if is_fixed or len(hp.space) == before:
                return False
            before = len(hp.space)
            hp.values = _own_values.fitting(hp, values)
            self.hypermodel.build(hp)
            self.oracle.update_space(hp)

    # --- The search ---

    def search(self, *fit_args: Any, **fit_kwargs: Any) -> None:
        """Runs trials until none is left. Any number of processes may do so at once.

        Args:
            *fit_args: Arguments of `run_trial`.
            **fit_kwargs: Arguments of `run_trial`.

        Raises:
            InvalidOptionError: With `isolate`, if a trial of another search calls this, or if the
                program has run a search in memory before.
            SearchError: If several trials in a row fail, if no trial completes, or if a result
                lacks the objective.
            StudyError: If a different search created the study, or uses the directory in memory.
            StorageUnavailableError: If the database cannot be reached.
        """
        if self._was_run_before:
            return
        if "verbose" in fit_kwargs:
            self.oracle.verbose = fit_kwargs["verbose"]
        memory = self._memory
        if memory is None and not tf.config.list_physical_devices("GPU"):
            memory = _keras.memory.limit()
        is_in_memory = self.oracle.storage == _study.MEMORY
        with (
            _isolation.searching(self.project_dir, self._isolate, is_in_memory),
            _isolation.telling(self._is_trial_process),
            _directory.in_use(self.project_dir, alone=is_in_memory),
        ):
            self.oracle.begin_search(self._limits, memory)
            # Garbage is collected before each trial; objects that exist now need not be visited.
            gc.freeze()
            try:
                # A trial process is started after its parent has done it.
                is_parent = self._workers.is_chief and not self._is_trial_process
                if self._transfer_from is not None and is_parent:
                    _transfer.transfer(
                        self.oracle, self._transfer_from, self._transfer, self._define_for
                    )
                if is_parent:
                    self.oracle.warn_of_random_values()
                    self.oracle.warn_of_trials_left_out()
                self.on_search_begin()
                if self._isolate and not self._is_trial_process:
                    watch = _isolation.Watch(self.oracle.watch_interval, self.oracle.why_overdue)
                    _isolation.run_trials(
                        self.oracle.name, self.oracle.may_begin, self.oracle.on_death, watch
                    )
                else:
                    is_over = self._run_trials(*fit_args, **fit_kwargs)
            finally:
                gc.unfreeze()
                self.oracle.release()
            if self._is_trial_process:
                _isolation.end_trial_process(is_over)
            self.on_search_end()
            self.oracle.check_result()

    def _run_trials(self, *fit_args: Any, **fit_kwargs: Any) -> bool:
        """Runs all trials, or one in a trial process; returns whether none is left."""
        while True:
            self.pre_create_trial()
            trial = _worker_oracle.shared_trial(self.oracle, self._workers, self.tuner_id)
            if trial.status == _STATUS.STOPPED:
                return True
            if trial.status == _STATUS.RUNNING:
                self.on_trial_begin(trial)
                self._try_run_and_update_trial(trial, *fit_args, **fit_kwargs)
                self.on_trial_end(trial)
                if self._is_trial_process:
                    return False

    def _try_run_and_update_trial(
        self, trial: _tuner_types.Trial, *fit_args: Any, **fit_kwargs: Any
    ) -> None:
        try:
            self._run_and_update_trial(trial, *fit_args, **fit_kwargs)
            trial.status = _STATUS.COMPLETED
        except (
            keras_tuner.errors.FatalError,
            errors.SearchError,
            errors.StorageUnavailableError,
        ):
            raise
        except TrialPruned as e:
            trial.status = _STATUS.STOPPED
            trial.message = str(e) or None
        except TrialLost:
            trial.status = _STATUS.INVALID
        except Exception as e:
            trial.status = _STATUS.INVALID
            trial.message = traceback.format_exc()[-20_000:]
            if isinstance(e, MemoryError | tf.errors.ResourceExhaustedError):
                trial.why = _trials.OUT_OF_MEMORY
            elif isinstance(e, _INFEASIBLE):
                trial.why = _trials.INFEASIBLE

    def _run_and_update_trial(
        self, trial: _tuner_types.Trial, *fit_args: Any, **fit_kwargs: Any
    ) -> None:
        results = self.run_trial(trial, *fit_args, **fit_kwargs)
        objective = self.oracle.objective
        if self.oracle.is_updated(trial.trial_id):
            return  # The user's `run_trial` has done it.
        _trial_results.check(results, objective, "Tuner.run_trial()")
        metrics, step = _trial_results.best_of(results, objective)
        parts = results if isinstance(results, list) else [results]
        epochs = self.oracle.epochs_of(trial.trial_id) if self.oracle.goes_on else None
        if epochs is not None and not isinstance(parts[0], keras.callbacks.History):
            step = epochs - 1
        if metrics:
            self.oracle.update_trial(trial.trial_id, metrics, step=step)
        elif self._workers.is_chief and self.oracle.best_reported(trial.trial_id) is None:
            # A resumed trial may have reported it before, which the chief alone knows.
            raise errors.SearchError(
                f"A trial must report the objective {self.oracle.objective_names}. Received: no "
                "epoch with it. Pass `callbacks` on to `fit`, and validate at least once: choose "
                "`validation_freq` accordingly."
            )

    def on_trial_end(self, trial: _tuner_types.Trial) -> None:
        """Tells the study, and removes weights that are no longer among the best."""
        with self.oracle.one_look():
            self.oracle.end_trial(trial)
            if self._workers.is_chief:
                self._remove_worse()

    def _remove_worse(self) -> None:
        ended = {t.trial_id for t in self.oracle.trials.values() if t.status != _STATUS.RUNNING}
        # Those that are only paused need theirs in any case.
        best = {t.trial_id for t in self.oracle.get_best_trials(self._keep_best_k)} & ended
        # Of those that ended before, only what was among the best can have become worse.
        for trial_id in (ended - self._seen_ended) | (self._kept - best):
            directory = pathlib.Path(self.project_dir, f"trial_{trial_id}")
            shutil.rmtree(directory / STATE, ignore_errors=True)
            if self._model_file and trial_id not in best:
                (directory / self._model_file).unlink(missing_ok=True)
        self._seen_ended, self._kept = ended, best


def _check_environment() -> None:
    """Refuses KerasTuner's own way to search with several processes."""
    if "KERASTUNER_TUNER_ID" in os.environ or "KERASTUNER_ORACLE_IP" in os.environ:
        raise errors.SearchError(
            "tfbig does not use KerasTuner's chief and workers. Unset KERASTUNER_TUNER_ID, "
            "KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT, and start the same program several "
            "times with the same storage; or once, with `python -m tfbig.launch --workers N "
            "--independent`."
        )
