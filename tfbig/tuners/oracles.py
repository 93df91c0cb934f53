"""The oracles of `keras_tuner.oracles`, over an Optuna study; with their old names, too."""

from tfbig.tuners._grid_search import GridSearchOracle
from tfbig.tuners._hyperband import HyperbandOracle
from tfbig.tuners._sampling_oracles import BayesianOptimizationOracle, RandomSearchOracle

# As KerasTuner called them before version 1.1.
BayesianOptimization = BayesianOptimizationOracle
Hyperband = HyperbandOracle
RandomSearch = RandomSearchOracle

__all__ = (
    "BayesianOptimization",
    "BayesianOptimizationOracle",
    "GridSearchOracle",
    "Hyperband",
    "HyperbandOracle",
    "RandomSearch",
    "RandomSearchOracle",
)
