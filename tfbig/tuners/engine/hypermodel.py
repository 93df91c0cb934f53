"""What builds the models of a search."""

from keras_tuner import HyperModel

__all__ = ("HyperModel",)
