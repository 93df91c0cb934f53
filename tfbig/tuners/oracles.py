"""The oracles of `keras_tuner.oracles`, also by their old names, and those of tfbig's tuners."""

from tfbig.tuners._asha import ASHAOracle, PASHAOracle
from tfbig.tuners._grid_search import GridSearchOracle
from tfbig.tuners._hyperband import HyperbandOracle
from tfbig.tuners._population_oracle import PopulationOracle
from tfbig.tuners._sampling_oracles import BayesianOptimizationOracle, RandomSearchOracle

# As KerasTuner called them before version 1.1.
BayesianOptimization = BayesianOptimizationOracle
Hyperband = HyperbandOracle
RandomSearch = RandomSearchOracle

__all__ = (
    "ASHAOracle",
    "BayesianOptimization",
    "BayesianOptimizationOracle",
    "GridSearchOracle",
    "Hyperband",
    "HyperbandOracle",
    "PASHAOracle",
    "PopulationOracle",
    "RandomSearch",
    "RandomSearchOracle",
)
