"""Oracles without models, and the options of tuners."""

import keras_tuner
import pytest

from tfbig.tuners import _grid_search, _hyperband, _oracle, _population_oracle


class Silent:
    """A display that shows nothing."""

    verbose = 0

    def on_trial_begin(self, trial):
        del trial

    def on_trial_end(self, trial):
        del trial


@pytest.fixture
def make(tmp_path):
    """Makes oracles over one study in a directory."""
    oracles = []

    def made(
        max_trials=10, hyperparameters=None, kind=_oracle.StudyOracle, project="p", **arguments
    ):
        arguments = {
            "objective": keras_tuner.Objective("loss", "min"),
            "seed": 0,
            "hyperparameters": hyperparameters,
        } | arguments
        if kind not in (_hyperband.HyperbandOracle, _population_oracle.PopulationOracle):
            arguments["max_trials"] = max_trials
        if kind is _grid_search.GridSearchOracle:
            arguments.pop("sampler", None)
        oracle = kind(**arguments)
        oracle._set_project_dir(str(tmp_path), project)
        oracle._display = Silent()
        oracles.append(oracle)
        return oracle

    yield made
    for oracle in oracles:
        if oracle._opened:
            oracle.release()


@pytest.fixture
def options(tmp_path):
    return {"objective": "val_loss", "directory": tmp_path, "project_name": "p", "seed": 0}
