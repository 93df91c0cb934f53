"""What the training of a trial asks its oracle, and tells it."""

import functools

import numpy as np
import optuna

from tfbig.tuners import _budget, _samplers, _search, _study, _tuner_types

__all__ = ("TrainingTrials",)


class TrainingTrials:
    """The methods of an oracle for trials that are being trained in this process."""

    _budget: _budget.Budget
    # Whether the search was given a seed.
    _seeds_trainings: bool
    _pruner: _samplers.Maker | None

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

    def count_epoch(self, trial_id: str) -> None:
        """Counts an epoch of a trial of this process, if the search has a budget of epochs."""
        if self._budget.counts_epochs:
            self._search.running.count_epoch(trial_id)

    def best_reported(self, trial_id: str) -> float | None:
        """The best value that a trial of this process has reported before; None if none."""
        return self._search.running.best_reported(trial_id)

    def is_updated(self, trial_id: str) -> bool:
        """Whether `update_trial` was called for a trial of this process."""
        return self._search.running[trial_id].is_updated

    def is_lost(self, trial_id: str) -> bool:
        """Whether another process has taken a trial of this one."""
        running = self._search.running.get(trial_id)
        return running is not None and running.is_lost

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
