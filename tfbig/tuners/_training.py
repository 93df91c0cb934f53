"""What the training of a trial asks its oracle, and tells it."""

import functools

import numpy as np
import optuna

from tfbig import errors
from tfbig.tuners import _samplers, _search, _study, _tuner_types
from tfbig.tuners._budget import Budget, Limits
from tfbig.tuners._objectives import Objectives

__all__ = ("TrainingTrials",)

# Longest time, in seconds, until the parent of a trial process looks at it again.
_LONGEST_INTERVAL = 10.0


class TrainingTrials:
    """The methods of an oracle for trials that are being trained in this process."""

    _budget: Budget
    # Whether the search was given a seed.
    _seeds_trainings: bool
    _pruner: _samplers.Maker | None
    goes_on: bool
    # Seconds without a sign of life after which a process is given up.
    _grace: float

    @property
    def _objectives(self) -> Objectives:
        raise NotImplementedError

    @property
    def objective_names(self) -> str:
        raise NotImplementedError

    @property
    def _search(self) -> _search.Search:
        raise NotImplementedError

    @functools.cached_property
    def compares_folds(self) -> bool:
        """Whether the pruner wants the value of each fold, rather than the mean so far."""
        if self._pruner is None:
            return False
        with _study.quiet():
            return isinstance(self._pruner.make(0, 0), optuna.pruners.WilcoxonPruner)

    def epochs_of(self, trial_id: str) -> int | None:
        """The epoch up to which a trial of this process is trained; None: as `search` says."""
        del trial_id
        return None

    @property
    def seed_of_folds(self) -> int:
        """The seed by which samples are assigned to folds, the same for all trials."""
        return self._search.seed

    def seed_of_training(self, trial_id: str, execution: int) -> int | None:
        """The seed of a training; None for a random one, if the search was given no seed.

        Args:
            trial_id: A trial of this process.
            execution: How often the trial was trained before.
        """
        if not self._seeds_trainings:
            return None
        # Not those of suggestions, which end with small numbers.
        seeds = np.random.SeedSequence([self._search.seed, int(trial_id), execution, 1])
        return int(seeds.generate_state(1)[0])

    def check_limits(self, limits: Limits) -> None:
        """Raises for limits that do not go with this search."""
        for name, value in (
            ("max_total_epochs", limits.max_total_epochs),
            ("patience", limits.patience),
        ):
            if value is not None and not self._objectives.is_single:
                raise errors.InvalidOptionError(
                    f"`{name}` needs a single objective. Received: {name}={value} and the "
                    f"objectives {self.objective_names}. Use `max_seconds` or `max_trials`."
                )
        if limits.patience is not None and self.goes_on:
            raise errors.InvalidOptionError(
                "`patience` does not go with a tuner that pauses trials, since most end at the end "
                f"of the search. Received: patience={limits.patience}. Use `max_seconds` or "
                "`max_total_epochs`."
            )

    def is_late(self, trial_id: str) -> bool:
        """Whether a trial of this process has been trained for too long."""
        running = self._search.running.get(trial_id)
        return running is not None and self._budget.is_late(running.seconds)

    @property
    def too_late(self) -> str:
        """Why a trial that is late is stopped."""
        return self._budget.too_late

    @property
    def watch_interval(self) -> float | None:
        """Seconds after which to ask `why_overdue` again; None if trials may take any time."""
        timeout = self._budget.timeout_per_trial
        return None if timeout is None else min((timeout + self._grace) / 10, _LONGEST_INTERVAL)

    def why_overdue(self, pid: int) -> str | None:
        """Why a process of this machine must be ended in the middle of its trial.

        Args:
            pid: The id of the process.

        Returns:
            None if it has no trial, or one that may still stop by itself.
        """
        seconds = self._search.outcomes.seconds_of_process(pid, self.goes_on)
        if seconds is None or not self._budget.is_late(seconds - self._grace):
            return None
        return (
            f"{self.too_late} Because it did not stop by itself within grace_period="
            f"{self._grace:g} s more, its process was ended."
        )

    def count_epoch(self, trial_id: str) -> None:
        """Counts an epoch of a trial of this process, if the search has a budget of epochs."""
        if self._budget.counts_epochs:
            self._search.running.count_epoch(trial_id)

    def best_reported(self, trial_id: str) -> float | None:
        """The best value that a trial of this process has reported before; None if none."""
        return self._search.running.best_reported(trial_id)

    def last_step(self, trial_id: str) -> int:
        """The last step that a trial of this process had reported before it was run; 0 if none."""
        return self._search.running[trial_id].last_step

    def is_updated(self, trial_id: str) -> bool:
        """Whether `update_trial` was called for a trial of this process."""
        return self._search.running[trial_id].is_updated

    def is_lost(self, trial_id: str) -> bool:
        """Whether another process has taken a trial of this one."""
        running = self._search.running.get(trial_id)
        return running is not None and running.is_lost

    def is_lost_now(self, trial_id: str) -> bool:
        """As `is_lost`, but asks the storage: this process may have been stopped for long."""
        return self._search.running[trial_id].is_lost_now()

    def report(self, trial_id: str, values: _tuner_types.Metrics, step: int) -> bool:
        """Tells the study the value of the objective after a step.

        Args:
            trial_id: A trial of this process.
            values: Metrics, with or without the objective.
            step: From 1.

        Returns:
            Whether to prune the trial.
        """
        return self._search.running.report(trial_id, values, step)
