"""Names for what KerasTuner leaves without types; to mypy, each is `Any`."""

from typing import TYPE_CHECKING, Any, TypeAlias

import keras_tuner
from keras_tuner.src.engine import trial as kt_trial

if TYPE_CHECKING:
    from pandas import DataFrame as DataFrame
else:
    # tfbig does not require pandas, which takes long to import.
    DataFrame = Any

Trial: TypeAlias = kt_trial.Trial
Objective: TypeAlias = keras_tuner.Objective
HyperModel: TypeAlias = keras_tuner.HyperModel
Hyperparameter: TypeAlias = keras_tuner.engine.hyperparameters.HyperParameter

# The value of a hyperparameter: None, bool, int, float, str, or tuples, lists and dictionaries of
# these. Only the program that asked for it knows which.
Value: TypeAlias = Any
Values: TypeAlias = dict[str, Value]

Metrics: TypeAlias = dict[str, float]

# What a trial's training returns: a history, a dictionary of metrics or a number; or a list of
# these, one for each execution.
Results: TypeAlias = Any
