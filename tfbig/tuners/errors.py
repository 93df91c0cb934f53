"""The errors of `keras_tuner.errors`, which say how a trial or the search ends."""

from keras_tuner.errors import (
    FailedTrialError,
    FatalError,
    FatalRuntimeError,
    FatalTypeError,
    FatalValueError,
)

__all__ = (
    "FailedTrialError",
    "FatalError",
    "FatalRuntimeError",
    "FatalTypeError",
    "FatalValueError",
)
