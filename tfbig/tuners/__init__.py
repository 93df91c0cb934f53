"""Hyperparameter search: KerasTuner's interface over Optuna's engine.

An existing KerasTuner program changes one import. Any number of processes may run
the same search, and any of them may be killed at any moment: run again, the search goes on.
"""

from tfbig.tuners._hyperparameters import HyperParameters
from tfbig.tuners._oracle import StudyOracle
from tfbig.tuners._tuner import Tuner
from tfbig.tuners._tuners import (
    BayesianOptimization,
    GridSearch,
    Hyperband,
    HyperoptSearch,
    OptunaSearch,
    RandomSearch,
)

__all__ = (
    "BayesianOptimization",
    "GridSearch",
    "HyperParameters",
    "Hyperband",
    "HyperoptSearch",
    "OptunaSearch",
    "RandomSearch",
    "StudyOracle",
    "Tuner",
)
