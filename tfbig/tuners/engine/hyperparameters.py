"""Hyperparameters and search spaces."""

from keras_tuner.engine.hyperparameters import HyperParameter, serialize

from tfbig import _types
from tfbig.tuners._hyperparameters import (
    KINDS,
    Boolean,
    Choice,
    Fixed,
    Float,
    HyperParameters,
    Int,
)

__all__ = (
    "Boolean",
    "Choice",
    "Fixed",
    "Float",
    "HyperParameter",
    "HyperParameters",
    "Int",
    "deserialize",
    "serialize",
)


def deserialize(config: _types.Config) -> HyperParameter | HyperParameters:
    """A hyperparameter or a space from what `serialize` returned."""
    kinds = KINDS | {HyperParameters.__name__: HyperParameters}
    return kinds[config["class_name"]].from_config(config["config"])
