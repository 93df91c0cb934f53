"""The errors of `keras_tuner.errors` and `TrialPruned`, which say how a trial or a search ends."""

from keras_tuner.errors import (
    FailedTrialError,
    FatalError,
    FatalRuntimeError,
    FatalTypeError,
    FatalValueError,
)

from tfbig.tuners._trial_callbacks import TrialPruned

__all__ = (
    "FailedTrialError",
    "FatalError",
    "FatalRuntimeError",
    "FatalTypeError",
    "FatalValueError",
    "TrialPruned",
)
