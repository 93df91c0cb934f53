"""The tuners, under the names of `keras_tuner.tuners`."""

from tfbig.tuners._grid_search import GridSearch
from tfbig.tuners._hyperband import Hyperband
from tfbig.tuners._optuna_search import BayesianOptimization, RandomSearch
from tfbig.tuners._sklearn_tuner import SklearnTuner
from tfbig.tuners._tuner import Tuner

__all__ = (
    "BayesianOptimization",
    "GridSearch",
    "Hyperband",
    "RandomSearch",
    "SklearnTuner",
    "Tuner",
)
