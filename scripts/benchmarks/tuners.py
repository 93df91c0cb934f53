"""Searches without models for benchmark.py --tuners: how good, and how long a suggestion takes.

The two functions are common in the field; see Eggensperger et al., "Towards an Empirical Foundation
for Assessing Bayesian Optimization of Hyperparameters", NIPS workshop, 2013.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.markdown import Table

Bounds = list[tuple[float, float]]
Function = Callable[[Mapping[str, Any]], float]
# Values of all trials, and the seconds that each suggestion took; of a function, its space, a
# number of trials and a seed. A space is `Bounds` here.
Search = Callable[[Function, Any, int, int], tuple[list[float], list[float]]]
# Takes what --json holds of the rows so far.
Keep = Callable[[list[dict[str, Any]]], None]

# The time of a suggestion is given after so many trials, as the mean of the ten around it.
MOMENTS = (10, 50, 100, 200)


def branin(v: Mapping[str, float]) -> float:
    """Its minimum is 0.397887."""
    a, b, c, r, s, t = 1, 5.1 / (4 * math.pi**2), 5 / math.pi, 6, 10, 1 / (8 * math.pi)
    x, y = v["x0"], v["x1"]
    return a * (y - b * x**2 + c * x - r) ** 2 + s * (1 - t) * math.cos(x) + s


_ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
_A = np.array(
    [
        [10, 3, 17, 3.5, 1.7, 8],
        [0.05, 10, 17, 0.1, 8, 14],
        [3, 3.5, 1.7, 10, 17, 8],
        [17, 8, 0.05, 10, 0.1, 14],
    ]
)
_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def hartmann6(v: Mapping[str, float]) -> float:
    """Its minimum is -3.32237."""
    x = np.array([v[f"x{i}"] for i in range(6)])
    return -float(_ALPHA @ np.exp(-(_A * (x - _P) ** 2).sum(axis=1)))


PROBLEMS: dict[str, tuple[Function, Bounds]] = {
    "Branin": (branin, [(-5, 10), (0, 15)]),
    "Hartmann6": (hartmann6, [(0, 1)] * 6),
}


def _define(hps: Any, bounds: Bounds) -> None:  # `HyperParameters` of either.
    for i, (low, high) in enumerate(bounds):
        hps.Float(f"x{i}", low, high)


def _suggest(trial: Any, bounds: Bounds) -> dict[str, Any]:  # `optuna.Trial`.
    return {f"x{i}": trial.suggest_float(f"x{i}", *b) for i, b in enumerate(bounds)}


def _drive(oracle: Any, function: Function, trials: int) -> tuple[list[float], list[float]]:
    """Values of all trials, and the seconds that each suggestion took."""
    values, seconds = [], []
    for _ in range(trials):
        begin = time.perf_counter()
        trial = oracle.create_trial("one")
        seconds.append(time.perf_counter() - begin)
        values.append(function(trial.hyperparameters.values))
        oracle.update_trial(trial.trial_id, {"value": values[-1]})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
    return values, seconds


def with_tfbig(
    sampler: str,
    storage: str | None = "memory",
    define: Callable[[Any, Any], None] = _define,
    **sampler_options: Any,
) -> Search:
    """A search of tfbig.

    Args:
        sampler: Its name.
        storage: Of the study.
        define: Given `HyperParameters` and a space, adds the latter to the former.
        **sampler_options: Of Optuna's class.
    """

    def run(
        function: Function, space: Any, trials: int, seed: int
    ) -> tuple[list[float], list[float]]:
        import keras_tuner

        from tfbig import tuners

        hyperparameters = tuners.HyperParameters()
        define(hyperparameters, space)
        oracle = tuners.StudyOracle(
            keras_tuner.Objective("value", "min"),
            trials,
            sampler=sampler,
            sampler_options=sampler_options,
            hyperparameters=hyperparameters,
            seed=seed,
            storage=storage,
        )
        oracle.verbose = 0
        with tempfile.TemporaryDirectory() as directory:
            oracle._set_project_dir(directory, "benchmark")
            return _drive(oracle, function, trials)

    return run


def with_keras_tuner(name: str, define: Callable[[Any, Any], None] = _define) -> Search:
    """A search of KerasTuner, by the name of its oracle; see `with_tfbig`."""

    def run(
        function: Function, space: Any, trials: int, seed: int
    ) -> tuple[list[float], list[float]]:
        import keras_tuner

        hyperparameters = keras_tuner.HyperParameters()
        define(hyperparameters, space)
        oracle = getattr(keras_tuner.oracles, name)(
            objective=keras_tuner.Objective("value", "min"),
            max_trials=trials,
            hyperparameters=hyperparameters,
            seed=seed + 1,  # 0 would mean no seed.
        )
        oracle.verbose = 0
        with tempfile.TemporaryDirectory() as directory:
            oracle._set_project_dir(directory, "benchmark")
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Its optimizer warns at almost every trial.
                return _drive(oracle, function, trials)

    return run


def with_optuna(
    make: Callable[[Any, int], Any], suggest: Callable[[Any, Any], dict[str, Any]] = _suggest
) -> Search:
    """A search of Optuna.

    Args:
        make: Makes a sampler, given `optuna.samplers` and a seed.
        suggest: Given a trial and a space, returns values.
    """

    def run(
        function: Function, space: Any, trials: int, seed: int
    ) -> tuple[list[float], list[float]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=make(optuna.samplers, seed))
        values, seconds = [], []
        for _ in range(trials):
            begin = time.perf_counter()
            trial = study.ask()
            v = suggest(trial, space)
            seconds.append(time.perf_counter() - begin)
            values.append(function(v))
            study.tell(trial, values[-1])
        return values, seconds

    return run


def rows() -> dict[str, Search]:
    """What is measured, by name; only what is installed."""
    found = {
        "KerasTuner, random": with_keras_tuner("RandomSearchOracle"),
        "KerasTuner, Bayesian": with_keras_tuner("BayesianOptimizationOracle"),
        "Optuna, random": with_optuna(lambda s, seed: s.RandomSampler(seed=seed)),
        "Optuna, TPE": with_optuna(lambda s, seed: s.TPESampler(seed=seed)),
        "tfbig, random": with_tfbig("random"),
        "tfbig, TPE": with_tfbig("tpe"),
        "tfbig, TPE, SQLite": with_tfbig("tpe", None),
    }
    if importlib.util.find_spec("hyperopt"):
        found["tfbig, Hyperopt"] = with_tfbig("hyperopt")
    if importlib.util.find_spec("torch") and importlib.util.find_spec("scipy"):
        found["Optuna, GP"] = with_optuna(lambda s, seed: s.GPSampler(seed=seed))
        found["tfbig, GP"] = with_tfbig("gp")
    return found


def compare(trials: int, seeds: int, keep: Keep = lambda measured: None) -> list[dict[str, Any]]:
    """Prints the tables; returns what --json holds of each row of both.

    Args:
        trials: Trials of a search.
        seeds: Searches of each kind.
        keep: Given after each row what will be returned, as far as it is there.
    """
    measured: list[dict[str, Any]] = []
    print(f"best of {trials} trials, median (min to max) of {seeds} seeds")
    print(f"{'':<22}" + "".join(f"{name:>32}" for name in PROBLEMS))
    for row, run in rows().items():
        line = f"{row:<22}"
        for problem, (function, bounds) in PROBLEMS.items():
            best = [min(run(function, bounds, trials, seed)[0]) for seed in range(seeds)]
            line += f"{_median(best):>33}"
            measured.append({"row": row, "problem": problem, "best": best})
        print(line, flush=True)
        keep(measured)
    print(f"\nmilliseconds of a suggestion for Branin after so many trials{'':<2}")
    print(f"{'':<22}" + "".join(f"{n:>10}" for n in MOMENTS))
    for row, run in rows().items():
        function, bounds = PROBLEMS["Branin"]
        _, seconds = run(function, bounds, max(MOMENTS) + 5, 0)
        means = [1000 * statistics.mean(seconds[n - 5 : n + 5]) for n in MOMENTS]
        print(f"{row:<22}" + "".join(f"{m:>10.1f}" for m in means), flush=True)
        measured.append({"row": row, "milliseconds": dict(zip(MOMENTS, means, strict=True))})
        keep(measured)
    return measured


def _median(best: list[float]) -> str:
    low, middle, high = min(best), statistics.median(best), max(best)
    return f"{middle:.3f} ({low:>7.3f} to {high:>7.3f})"


def tables(measured: list[dict[str, Any]]) -> list[Table]:
    """What `compare` has returned."""
    best: dict[str, list[str]] = {}
    milliseconds: list[tuple[str, ...]] = []
    for row in measured:
        if "best" in row:
            best.setdefault(row["row"], []).append(_median(row["best"]))
        else:
            means = row["milliseconds"].values()
            milliseconds.append((row["row"], *(f"{mean:.1f}" for mean in means)))
    return [
        Table(
            "The best value of a search, median (min to max) of the seeds",
            ("search", *PROBLEMS),
            [(name, *cells) for name, cells in best.items()],
        ),
        Table(
            "Milliseconds of a suggestion for Branin after so many trials",
            ("search", *map(str, MOMENTS)),
            milliseconds,
        ),
    ]
