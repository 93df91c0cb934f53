"""The public modules of `keras_tuner.engine`."""

from tfbig.tuners.engine import (
    base_tuner,
    hypermodel,
    hyperparameters,
    metrics_tracking,
    oracle,
    trial,
    tuner,
)

__all__ = (
    "base_tuner",
    "hypermodel",
    "hyperparameters",
    "metrics_tracking",
    "oracle",
    "trial",
    "tuner",
)
