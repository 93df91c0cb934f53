"""The base of tuners of Keras models."""

from keras_tuner.engine.tuner import maybe_distribute

from tfbig.tuners._tuner import Tuner

__all__ = ("Tuner", "maybe_distribute")
