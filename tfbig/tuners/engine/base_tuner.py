"""The base of tuners of models that are not Keras's."""

from tfbig.tuners._base_tuner import BaseTuner

__all__ = ("BaseTuner",)
