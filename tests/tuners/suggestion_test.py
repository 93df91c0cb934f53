"""What a search tries is what Optuna suggests for the same parameters, seeds and results."""

import importlib.util
import math

import numpy as np
import optuna
import pytest

from tfbig import tuners

SIZES, RATES, KINDS = [4, 8, 16, 32, 64, 128], (1e-4, 1.0), ["relu", "tanh", "gelu"]
TRIALS, SEED = 25, 3


def loss(values):
    size, rate = math.log2(values["size"]), math.log10(values["rate"])
    return (size - 5) ** 2 + (rate + 2) ** 2 + KINDS.index(values["kind"])


def tried_by_tfbig(sampler, ordered):
    hp = tuners.HyperParameters()
    hp.Choice("size", SIZES, ordered=ordered)
    hp.Float("rate", *RATES, sampling="log")
    hp.Choice("kind", KINDS)
    objective = tuners.Objective("loss", "min")
    oracle = tuners.Oracle(objective, TRIALS, hp, seed=SEED, sampler=sampler, storage="memory")
    oracle._set_project_dir("unused", "p")
    oracle.verbose = 0
    while (trial := oracle.create_trial("one")).status == "RUNNING":
        oracle.update_trial(trial.trial_id, {"loss": loss(trial.hyperparameters.values)})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
    return [trial.hyperparameters.values for trial in oracle.trials.values()]


def tried_by_optuna(make, ordered):
    study = optuna.create_study()
    tried = []
    for index in range(TRIALS):
        # Each trial has a seed of its own, so that a search that was interrupted goes on as it was.
        seeds = np.random.SeedSequence([SEED, index, 0])
        study.sampler = make(int(seeds.generate_state(1)[0]))
        if index == 0:
            # The first trial has the defaults.
            study.enqueue_trial({"size": 0 if ordered else 4, "rate": 1e-4, "kind": "relu"})
        trial = study.ask()
        size = (
            SIZES[trial.suggest_int("size", 0, len(SIZES) - 1)]
            if ordered
            else trial.suggest_categorical("size", SIZES)
        )
        rate = trial.suggest_float("rate", *RATES, log=True)
        tried.append({"size": size, "rate": rate, "kind": trial.suggest_categorical("kind", KINDS)})
        study.tell(trial, loss(tried[-1]))
    return tried


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "gp"])
def test_values_are_those_of_optuna(sampler, ordered):
    if sampler in ("cmaes", "gp") and not importlib.util.find_spec(
        {"gp": "torch"}.get(sampler, sampler)
    ):
        pytest.skip(f"the sampler {sampler} needs a package that is not installed")
    make = {
        "random": optuna.samplers.RandomSampler,
        "tpe": optuna.samplers.TPESampler,
        "cmaes": lambda seed: optuna.samplers.CmaEsSampler(
            seed=seed, warn_independent_sampling=False
        ),
        "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=False),
    }[sampler]
    found = tried_by_tfbig(sampler, ordered)
    assert found == tried_by_optuna(lambda seed: make(seed=seed), ordered)
    assert len({v["size"] for v in found}) > 3
