"""Hyperparameter search: KerasTuner's interface over Optuna's engine.

An existing KerasTuner program changes one import. Any number of processes may run the same search,
and any of them may be killed at any moment: when the program runs again, the search resumes.

To read the code, begin with `search` in `_base_tuner.py`, the loop of a search; what it asks is in
`_oracle.py`, and how a trial trains a model in `_tuner.py`. docs/architecture.md has the others.
"""

from tfbig.tuners import applications, engine, errors, oracles, tuners
from tfbig.tuners._asha import ASHA, PASHA
from tfbig.tuners._grid_search import GridSearch
from tfbig.tuners._hyperband import Hyperband
from tfbig.tuners._hyperparameters import HyperParameters
from tfbig.tuners._optuna_search import (
    BayesianOptimization,
    HyperoptSearch,
    OptunaSearch,
    RandomSearch,
)
from tfbig.tuners._oracle import StudyOracle
from tfbig.tuners._population import PopulationBasedTraining
from tfbig.tuners._sklearn_tuner import SklearnTuner
from tfbig.tuners._synchronized import synchronized
from tfbig.tuners._tuner import Tuner
from tfbig.tuners.engine.hypermodel import HyperModel
from tfbig.tuners.engine.hyperparameters import HyperParameter
from tfbig.tuners.engine.oracle import Objective, Oracle

__all__ = (
    "ASHA",
    "PASHA",
    "BayesianOptimization",
    "GridSearch",
    "HyperModel",
    "HyperParameter",
    "HyperParameters",
    "Hyperband",
    "HyperoptSearch",
    "Objective",
    "OptunaSearch",
    "Oracle",
    "PopulationBasedTraining",
    "RandomSearch",
    "SklearnTuner",
    "StudyOracle",
    "Tuner",
    "applications",
    "engine",
    "errors",
    "oracles",
    "synchronized",
    "tuners",
)
