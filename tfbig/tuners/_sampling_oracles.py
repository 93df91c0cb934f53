"""Oracles of KerasTuner's names and arguments that ask one of Optuna's samplers."""

import warnings
from typing import Unpack

import keras_tuner

from tfbig.tuners import _agreement, _options, _oracle, _samplers

__all__ = ("BayesianOptimizationOracle", "RandomSearchOracle", "warn_if_ignored")


def warn_if_ignored(alpha: float | None, beta: float | None) -> None:
    """Warns the caller of a constructor that what it passes has no effect."""
    if alpha is not None or beta is not None:
        warnings.warn(
            "`alpha` and `beta` belong to KerasTuner's Gaussian process and are ignored.",
            stacklevel=3,
        )


class RandomSearchOracle(_oracle.StudyOracle):
    """Chooses values at random; see `StudyOracle` for the arguments."""

    def __init__(
        self,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 10,
        seed: int | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        **kwargs: Unpack[_options.StudyOptions],
    ) -> None:
        super().__init__(
            objective, max_trials, hyperparameters, sampler="random", seed=seed, **kwargs
        )

    def _settings(self) -> dict[str, str]:
        # The name under which the tuners have stored it.
        return super()._settings() | {_agreement.KIND: "StudyOracle"}


class BayesianOptimizationOracle(_oracle.StudyOracle):
    """Chooses values that a model of the objective expects to do well.

    See `BayesianOptimization` and `StudyOracle` for the arguments.
    """

    def __init__(
        self,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 10,
        num_initial_points: int | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        seed: int | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        *,
        sampler: _samplers.SamplerOption = "tpe",
        **kwargs: Unpack[_options.StudyOptions],
    ) -> None:
        warn_if_ignored(alpha, beta)
        if num_initial_points is not None:
            sampler = _samplers.beginning_at_random(sampler, num_initial_points)
        super().__init__(
            objective, max_trials, hyperparameters, sampler=sampler, seed=seed, **kwargs
        )

    def _settings(self) -> dict[str, str]:
        # The name under which the tuners have stored it.
        return super()._settings() | {_agreement.KIND: "StudyOracle"}
