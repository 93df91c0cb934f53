"""What the training of one trial returns: a history, a dictionary of metrics, or a number."""

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras_tuner.src.engine import tuner_utils

from tfbig import errors
from tfbig.tuners import _tuner_types

__all__ = ("best_of", "check", "single_numbers")


def single_numbers(logs: _tuner_types.Metrics, wanted: Sequence[str]) -> _tuner_types.Metrics:
    """Metrics, of which those that are arrays of one number become that number.

    `keras.metrics.F1Score` of one output is an example.

    Args:
        logs: What Keras logs.
        wanted: Names of the objectives.

    Raises:
        SearchError: If an objective is several numbers.
    """
    for name in wanted:
        if name in logs and np.size(logs[name]) != 1:
            raise errors.SearchError(
                f"The objective must be one number. Received: {name!r} with "
                f"{np.size(logs[name])} of them. Give the metric an average, such as "
                "keras.metrics.F1Score(average='macro')."
            )
    return {
        name: float(np.reshape(value, ())) if np.ndim(value) and np.size(value) == 1 else value
        for name, value in logs.items()
    }


def check(results: _tuner_types.Results, objective: _tuner_types.Objective, function: str) -> None:
    """Raises if results are not a history, a dictionary with the objectives, or a number.

    Args:
        results: Those of one execution, or a list of those of each.
        objective: KerasTuner's.
        function: What returned them, for errors.
    """
    for result in results if isinstance(results, list) else [results]:
        if hasattr(objective, "objectives") and isinstance(result, dict):
            missing = [o.name for o in objective.objectives if o.name not in result]
            if missing:
                raise errors.SearchError(
                    f"{function} must return the objective {missing[0]!r}. Received: "
                    f"{sorted(result)}."
                )
        else:
            tuner_utils.validate_trial_results(result, objective, function)


def best_of(
    results: _tuner_types.Results, objective: _tuner_types.Objective
) -> tuple[_tuner_types.Metrics, int]:
    """Metrics at the best epoch, averaged over executions; and that epoch, from 0."""
    if isinstance(results, list):
        parts = [best_of(r, objective) for r in results]
        names = set.intersection(*(set(metrics) for metrics, _ in parts))
        means = {n: float(np.mean([metrics[n] for metrics, _ in parts])) for n in sorted(names)}
        return means, int(np.mean([epoch for _, epoch in parts]))
    if not isinstance(results, keras.callbacks.History):
        wanted = [o.name for o in getattr(objective, "objectives", [objective])]
        metrics = tuner_utils.convert_to_metrics_dict(results, objective)
        return single_numbers(metrics, wanted), 0
    return _best_epoch(results, objective)


def _best_epoch(
    history: keras.callbacks.History, objective: _tuner_types.Objective
) -> tuple[_tuner_types.Metrics, int]:
    """Metrics of the best epoch; of the last one with several objectives."""
    steps = getattr(history, "epoch", None)
    if steps is None:  # The user has filled the history.
        steps = range(len(next(iter(history.history.values()), ())))
    if not steps:
        return {}, 0
    epochs = [
        single_numbers(dict(zip(history.history, values, strict=True)), ())
        for values in zip(*history.history.values(), strict=True)
    ]
    best = len(epochs) - 1
    if not hasattr(objective, "objectives"):
        values = [objective.get_value(logs) for logs in epochs]
        for epoch in reversed(range(len(epochs))):
            is_finite = math.isfinite(values[epoch])
            if is_finite and not objective.better_than(values[best], values[epoch]):
                best = epoch
    return epochs[best], steps[best]
