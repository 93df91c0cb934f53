"""The ready-made hypermodels of `keras_tuner.applications`."""

from keras_tuner.applications import HyperEfficientNet, HyperResNet, HyperXception

from tfbig.tuners._image_augment import HyperImageAugment

__all__ = ("HyperEfficientNet", "HyperImageAugment", "HyperResNet", "HyperXception")
