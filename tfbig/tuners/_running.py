"""The trials that this process runs: their heartbeats, and the metrics that they report."""

import contextlib
import threading
import time
import warnings

import optuna
from optuna.trial import FrozenTrial

from tfbig.tuners import _ledger, _objectives, _study, _trials, _tuner_types

__all__ = ("RunningTrial", "RunningTrials", "restore_metrics")


class RunningTrial:
    """A trial of this process, and the thread that keeps its heartbeat.

    Attributes:
        trial: KerasTuner's trial.
        storage_id: The id of the trial in Optuna's storage.
        index: Its index in the ledger.
        tuner_id: The id of the tuner that runs it.
        is_lost: Whether another process has taken it.
        is_updated: Whether the user's `run_trial` has reported its metrics.
        run: The attribute of the study's trial that tells when which process ran it.
        began: When this process began to run it, in seconds since the epoch.
        seconds_before: For how long it was run before, if it continues where it stopped then.
        last_step: The last step that it had reported before; 0 if none.
        reported: Values of the objective by step, as this process reported them.
    """

    def __init__(
        self,
        trial: _tuner_types.Trial,
        storage_id: int,
        ledger: _ledger.Ledger,
        index: int,
        tuner_id: str,
        run: str,
        seconds_before: float,
        last_step: int,
    ) -> None:
        self.last_step = last_step
        self.tuner_id = tuner_id
        self.seconds_before = seconds_before
        self.run, self.began = run, time.time()
        # The time of day may be set meanwhile.
        self._started = time.monotonic()
        self.trial = trial
        self.storage_id = storage_id
        self.index = index
        self.is_lost = self.is_updated = False
        self.reported: dict[int, float] = {}
        self._ledger = ledger
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        # Otherwise nobody sees it, and a thread takes longer to start than all else here.
        if ledger.is_shared:
            self._thread = threading.Thread(target=self._keep_heartbeat, daemon=True)
            self._thread.start()

    def _keep_heartbeat(self) -> None:
        while not self._ended.wait(self._ledger.heartbeat_interval):
            try:
                if not self._ledger.heartbeat(self.index):
                    self.is_lost = True
                    return
            except Exception as e:  # The database may be back at the next heartbeat.
                warnings.warn(
                    f"The storage of the search did not answer: {type(e).__name__}", stacklevel=1
                )

    @property
    def seconds(self) -> float:
        """For how long the trial has been run, here and before."""
        return self.seconds_before + time.monotonic() - self._started

    def is_lost_now(self) -> bool:
        """Whether another process has taken it, asked anew: this one may have been stopped."""
        self.is_lost = self.is_lost or not self._ledger.heartbeat(self.index)
        return self.is_lost

    def stop_heartbeat(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


class RunningTrials:
    """The trials of this process, by their id.

    Args:
        trials: The trials of the search.
        objectives: What it optimizes.
        has_pruner: Whether the study has a pruner that the user asked for.
    """

    def __init__(
        self, trials: _trials.Trials, objectives: _objectives.Objectives, has_pruner: bool
    ) -> None:
        self._trials = trials
        self._ledger = trials.ledger
        self._objectives = objectives
        self._has_pruner = has_pruner
        self._by_id: dict[str, RunningTrial] = {}

    def __getitem__(self, trial_id: str) -> RunningTrial:
        return self._by_id[trial_id]

    def get(self, trial_id: str) -> RunningTrial | None:
        return self._by_id.get(trial_id)

    def of_tuner(self, tuner_id: str) -> RunningTrial | None:
        return next((r for r in self._by_id.values() if r.tuner_id == tuner_id), None)

    def by_tuner(self) -> dict[str, _tuner_types.Trial]:
        """The trials by the id of the tuner that runs them."""
        return {running.tuner_id: running.trial for running in self._by_id.values()}

    def add(
        self,
        trial: _tuner_types.Trial,
        frozen: FrozenTrial,
        index: int,
        tuner_id: str,
        goes_on: bool,
    ) -> None:
        """Adds a trial that this process begins to run.

        Args:
            trial: The trial.
            frozen: That of the study.
            index: Its index in the ledger.
            tuner_id: The id of the tuner that runs it.
            goes_on: Whether it continues where it stopped, instead of from the start.
        """
        run, is_noted = _trials.new_run(frozen, self._ledger.owner)
        before = _trials.seconds_before(frozen) if goes_on else 0.0
        last = max(frozen.intermediate_values, default=0)
        running = RunningTrial(
            trial, frozen._trial_id, self._ledger, index, tuner_id, run, before, last
        )
        self._by_id[trial.trial_id] = running
        if not is_noted:
            self._note_run(running, None)

    def remove(self, trial_id: str) -> None:
        self._note_run(self._by_id.pop(trial_id), time.time())

    def _note_run(self, running: RunningTrial, ended: float | None) -> None:
        """Stores that this process runs a trial, or has run it, for reports."""
        # If the trial has ended, another process had taken it.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._trials.study._storage.set_trial_user_attr(
                running.storage_id, running.run, [self._ledger.owner, running.began, ended]
            )

    def release(self) -> None:
        """Lets other processes run the trials of this one, which ends in the middle of them."""
        for trial_id, running in list(self._by_id.items()):
            running.stop_heartbeat()
            self.remove(trial_id)
            self._ledger.release(running.index)
        self.release_others()

    def release_others(self) -> None:
        """Lets any process run the trials that this one owns, but does not run.

        An error or a signal has left them, before a trial was added here or after it was removed.
        """
        running = {r.index for r in self._by_id.values()}
        for row in self._ledger.trials(owner=self._ledger.owner, state=_ledger.RUNNING):
            if row.index not in running:
                self._ledger.release(row.index)

    def best_reported(self, trial_id: str) -> float | None:
        """The best value that a trial has reported so far, in any process; None if none."""
        metrics, name = self[trial_id].trial.metrics, self._objectives.combined.name
        best: float | None = metrics.get_best_value(name) if metrics.exists(name) else None
        return best

    def count_epoch(self, trial_id: str) -> None:
        """Counts an epoch of a trial, before what it reports."""
        running, storage = self[trial_id], self._trials.study._storage
        epochs = _trials.epochs_of(storage.get_trial(running.storage_id)) + 1
        storage.set_trial_user_attr(running.storage_id, _trials.EPOCHS, epochs)

    def report(self, trial_id: str, values: _tuner_types.Metrics, step: int) -> bool:
        """Writes the value of the objective to the study; returns whether to prune the trial."""
        running, objective = self[trial_id], self._objectives.combined
        if not self._objectives.is_single or not objective.has_value(values):
            return False
        value = float(objective.get_value(values))
        running.reported[step] = value
        if running.is_lost_now():
            return False
        study = self._trials.study
        study._storage.set_trial_intermediate_value(running.storage_id, step, value)
        if not self._has_pruner:
            return False
        frozen = study._storage.get_trial(running.storage_id)
        # Without what an earlier process has reported for later steps.
        first = min(running.reported)
        earlier = {s: v for s, v in frozen.intermediate_values.items() if s < first}
        frozen.intermediate_values = earlier | running.reported
        with _study.quiet():
            filtered = optuna.pruners._filter_study(study, frozen)
            return study.pruner.prune(filtered, frozen)

    def update(self, trial_id: str, metrics: _tuner_types.Metrics, step: int) -> _tuner_types.Trial:
        """Adds metrics to a trial."""
        self[trial_id].is_updated = True
        trial = self[trial_id].trial
        for name, value in metrics.items():
            if not trial.metrics.exists(name):
                trial.metrics.register(name, direction=self._objectives.direction_of(name))
            with _objectives.nan_allowed():
                trial.metrics.update(name, value, step=step)
        return trial


def restore_metrics(
    trial: _tuner_types.Trial,
    frozen: FrozenTrial,
    objective: _tuner_types.Objective,
    after: int = 0,
) -> None:
    """Gives a trial the values of the objective that it has reported to the study.

    Args:
        trial: The trial.
        frozen: That of the study.
        objective: The objective.
        after: The step until which they are of another model.
    """
    for step, value in frozen.intermediate_values.items():
        if step <= after:
            continue
        if not trial.metrics.exists(objective.name):
            trial.metrics.register(objective.name, direction=objective.direction)
        with _objectives.nan_allowed():
            trial.metrics.update(objective.name, value, step=step - 1)
