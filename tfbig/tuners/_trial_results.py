"""What the training of one trial returns: a history, a dictionary of metrics, or a number."""

import math
from collections.abc import Iterator, Sequence

import keras
import numpy as np
from keras_tuner.src.engine import tuner_utils

from tfbig import errors
from tfbig.tuners import _tuner_types

__all__ = ("best_of", "check", "note_epoch", "single_numbers")

# The attribute of a history that has the metrics by epoch.
_NOTED = "_tfbig_noted"


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
        results: Those of one execution, or a list of those of each, which may be lists.
        objective: KerasTuner's.
        function: What returned them, for errors.
    """
    if isinstance(results, list):
        if not results:
            raise errors.SearchError(f"{function} must return a result of a trial. Received: [].")
        for result in results:
            check(result, objective, function)
    elif hasattr(objective, "objectives") and isinstance(results, dict):
        missing = [o.name for o in objective.objectives if o.name not in results]
        if missing:
            raise errors.SearchError(
                f"{function} must return the objective {missing[0]!r}. Received: {sorted(results)}."
            )
    else:
        tuner_utils.validate_trial_results(results, objective, function)


def best_of(
    results: _tuner_types.Results, objective: _tuner_types.Objective
) -> tuple[_tuner_types.Metrics, int]:
    """Metrics at the best epoch, averaged over executions; and that epoch, from 0.

    There are no metrics if no epoch has the objective.
    """
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


def note_epoch(model: keras.Model, epoch: int, metrics: _tuner_types.Metrics) -> None:
    """Notes in the history of a model what an epoch has logged, for `best_of`.

    A history has a list for each metric. With `validation_freq`, some lists are shorter, and do
    not say of which epochs their values are.

    Args:
        model: The model that is being trained.
        epoch: From 0.
        metrics: What Keras has logged.
    """
    history = getattr(model, "history", None)
    if isinstance(history, keras.callbacks.History):
        vars(history).setdefault(_NOTED, {})[epoch] = metrics


def _best_epoch(
    history: keras.callbacks.History, objective: _tuner_types.Objective
) -> tuple[_tuner_types.Metrics, int]:
    """Metrics of the best epoch; of the last one with several objectives; none if none has it."""
    found = {step: logs for step, logs in _epochs(history) if objective.has_value(logs)}
    if not found:
        return {}, 0
    best = max(found)
    if not hasattr(objective, "objectives"):
        values = {step: objective.get_value(logs) for step, logs in found.items()}
        for step in sorted(found, reverse=True):
            is_finite = math.isfinite(values[step])
            if is_finite and not objective.better_than(values[best], values[step]):
                best = step
    return found[best], best


def _epochs(history: keras.callbacks.History) -> Iterator[tuple[int, _tuner_types.Metrics]]:
    """The epochs of a history, from 0, and the metrics of each."""
    lists = history.history
    steps = getattr(history, "epoch", None)
    if steps is None:  # The user has filled the history.
        steps = range(len(next(iter(lists.values()), ())))
    noted = vars(history).get(_NOTED, {})
    # The user may have added a list, or changed one.
    full = {name: values for name, values in lists.items() if len(values) == len(steps)}
    for position, step in enumerate(steps):
        listed = {name: values[position] for name, values in full.items()}
        yield step, single_numbers(noted.get(step, {}) | listed, ())
