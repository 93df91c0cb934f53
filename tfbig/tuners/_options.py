"""The options of tuners, declared once, so that type checkers and editors know them."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, cast

import keras
import keras_tuner

from tfbig import _integers, _numbers, _types, errors
from tfbig._update import step_options
from tfbig.tuners import _outcomes, _samplers, _study, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = (
    "Build",
    "BuildAny",
    "ObjectiveOption",
    "OracleOptions",
    "PassedOn",
    "SearchOptions",
    "StudyOptions",
    "TunerOptions",
    "checked_objective",
    "checked_oracle_options",
    "checked_tuner_options",
    "split",
)

# A metric's name or an objective; several of them; or None, if training returns a number.
ObjectiveOption: TypeAlias = (
    str | _tuner_types.Objective | Sequence[str | _tuner_types.Objective] | None
)

# A function of hyperparameters that returns a compiled model, or an object that has one; with
# `scale_width`, of hyperparameters and a width.
Build: TypeAlias = (
    Callable[[HyperParameters], keras.Model]
    | Callable[[HyperParameters, int], keras.Model]
    | _tuner_types.HyperModel
    | None
)

# The same for models that need not be Keras's.
BuildAny: TypeAlias = Callable[[HyperParameters], Any] | _tuner_types.HyperModel | None


class StudyOptions(TypedDict, total=False):
    """Options of every oracle, besides those that it names."""

    allow_new_entries: bool
    tune_new_entries: bool
    max_retries_per_trial: int
    max_consecutive_failed_trials: int
    storage: str | None
    grace_period: float
    constraints: _outcomes.Constraints | None
    sampler_options: _samplers.Options | None
    pruner: _samplers.PrunerOption
    pruner_options: _samplers.Options | None


class OracleOptions(StudyOptions, total=False):
    """Options of every tuner that its `StudyOracle` takes."""

    hyperparameters: keras_tuner.HyperParameters | None


class KerasTunerOptions(TypedDict, total=False):
    """Options of every tuner that KerasTuner takes."""

    max_model_size: int | None
    optimizer: str | _types.Optimizer | None
    loss: str | keras.losses.Loss | _types.AnyFunction | None
    metrics: Sequence[str | keras.metrics.Metric | _types.AnyFunction] | None
    distribution_strategy: _types.Strategy | None
    logger: None
    tuner_id: str | None


class PassedOn(KerasTunerOptions, step_options.Options, total=False):
    """Options of every tuner that KerasTuner takes, and those of models."""


class TunerOptions(PassedOn, total=False):
    """Options of every tuner that `Tuner` takes."""

    directory: str | os.PathLike[str] | None
    project_name: str | None
    overwrite: bool
    executions_per_trial: int
    folds: int | None
    keep_best_k: int
    max_seconds: float | None
    max_total_epochs: int | None
    patience: int | None
    timeout_per_trial: float | None
    process_memory: int | None
    isolate: bool
    transfer_from: str | os.PathLike[str] | None
    transfer: Literal["best", "observations"]
    scale_width: tuple[int, int] | None


class SearchOptions(OracleOptions, TunerOptions, total=False):
    """Options of every tuner."""


def split(options: SearchOptions) -> tuple[OracleOptions, TunerOptions]:
    """The options that the oracle takes, and those that `Tuner` takes."""
    of_oracle = {k: v for k, v in options.items() if k in OracleOptions.__optional_keys__}
    of_tuner = {k: v for k, v in options.items() if k not in of_oracle}
    return cast(OracleOptions, of_oracle), cast(TunerOptions, of_tuner)


def checked_objective(objective: ObjectiveOption) -> ObjectiveOption:
    """The option `objective` as KerasTuner takes it; a list of one is that one.

    Raises:
        InvalidOptionError: If a direction is not valid.
    """
    given = list(objective) if isinstance(objective, list | tuple) else [objective]
    for one in given:
        direction = getattr(one, "direction", "min")
        if direction not in ("min", "max"):
            raise errors.InvalidOptionError(
                "The direction of an `objective` must be 'min' or 'max'. Received: "
                f"{direction!r} for {getattr(one, 'name', one)!r}. For a metric of Keras, its name "
                "is enough."
            )
    return given[0] if len(given) == 1 else given


# What the checks receive may be of any type.
def checked_oracle_options(
    max_trials: Any, seed: Any, grace_period: Any, storage: Any
) -> tuple[int | None, int | None, float]:
    """The first three; raises for options of `StudyOracle` that are not valid."""
    max_trials = _integers.checked_or_none("max_trials", max_trials)
    seed = _integers.checked_or_none("seed", seed, least=0)
    seconds = _numbers.as_number(grace_period)
    if seconds is None or not seconds > 0:
        raise errors.InvalidOptionError(
            "`grace_period` must be a positive number of seconds. Received: "
            f"grace_period={grace_period!r}."
        )
    if storage is not None and not isinstance(storage, str):
        # A URL object shows its password.
        raise errors.InvalidOptionError(
            "`storage` must be None, 'memory' or a database URL. Received: an object of type "
            f"{type(storage).__name__}."
        )
    if storage is not None and _study.is_sqlite_in_memory(storage):
        raise errors.InvalidOptionError(
            "`storage` must not be an SQLite database in memory, which no other process and no "
            f"later run can see. Received: storage={_study.shown(storage)!r}. Use 'memory' for a "
            "search that is not kept."
        )
    return max_trials, seed, seconds


def checked_tuner_options(
    executions_per_trial: Any, folds: Any, keep_best_k: Any, resumes_trials: bool
) -> tuple[int, int | None, int]:
    """The first three; raises for options of `Tuner` that are not valid."""
    executions_per_trial = _integers.checked("executions_per_trial", executions_per_trial)
    keep_best_k = _integers.checked("keep_best_k", keep_best_k)
    folds = _integers.checked_or_none("folds", folds, least=2)
    if folds is not None and executions_per_trial > 1:
        raise errors.InvalidOptionError(
            "`folds` needs executions_per_trial=1. Received: "
            f"folds={folds}, executions_per_trial={executions_per_trial}."
        )
    if resumes_trials and (folds or executions_per_trial > 1):
        raise errors.InvalidOptionError(
            "A tuner that resumes trials must train each of them once. Received: "
            f"folds={folds}, executions_per_trial={executions_per_trial}."
        )
    return executions_per_trial, folds, keep_best_k
