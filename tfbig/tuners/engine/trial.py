"""A trial and its status."""

from keras_tuner.engine.trial import Trial, TrialStatus

__all__ = ("Trial", "TrialStatus")
