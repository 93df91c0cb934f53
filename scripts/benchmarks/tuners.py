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
Function = Callable[[Mapping[str, float]], float]
# Values of all trials, and the seconds that each suggestion took; of a function, its bounds, a
# number of trials and a seed.
Search = Callable[[Function, Bounds, int, int], tuple[list[float], list[float]]]

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


def _space(kind: Callable[[], Any], bounds: Bounds) -> Any:  # `HyperParameters` of either.
    hps = kind()
    for i, (low, high) in enumerate(bounds):
        hps.Float(f"x{i}", low, high)
    return hps


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


def _tfbig(sampler: str, storage: str | None = "memory") -> Search:
    def run(
        function: Function, bounds: Bounds, trials: int, seed: int
    ) -> tuple[list[float], list[float]]:
        import keras_tuner

        from tfbig import tuners

        oracle = tuners.StudyOracle(
            keras_tuner.Objective("value", "min"),
            trials,
            sampler=sampler,
            hyperparameters=_space(tuners.HyperParameters, bounds),
            seed=seed,
            storage=storage,
        )
        oracle.verbose = 0
        with tempfile.TemporaryDirectory() as directory:
            oracle._set_project_dir(directory, "benchmark")
            return _drive(oracle, function, trials)

    return run


def _keras_tuner(name: str) -> Search:
    def run(
        function: Function, bounds: Bounds, trials: int, seed: int
    ) -> tuple[list[float], list[float]]:
        import keras_tuner

        oracle = getattr(keras_tuner.oracles, name)(
            objective=keras_tuner.Objective("value", "min"),
            max_trials=trials,
            hyperparameters=_space(keras_tuner.HyperParameters, bounds),
            seed=seed + 1,  # 0 would mean no seed.
        )
        oracle.verbose = 0
        with tempfile.TemporaryDirectory() as directory:
            oracle._set_project_dir(directory, "benchmark")
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Its optimizer warns at almost every trial.
                return _drive(oracle, function, trials)

    return run


def _optuna(make: Callable[[Any, int], Any]) -> Search:
    def run(
        function: Function, bounds: Bounds, trials: int, seed: int
    ) -> tuple[list[float], list[float]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=make(optuna.samplers, seed))
        values, seconds = [], []
        for _ in range(trials):
            begin = time.perf_counter()
            trial = study.ask()
            v = {f"x{i}": trial.suggest_float(f"x{i}", *b) for i, b in enumerate(bounds)}
            seconds.append(time.perf_counter() - begin)
            values.append(function(v))
            study.tell(trial, values[-1])
        return values, seconds

    return run


def rows() -> dict[str, Search]:
    """What is measured, by name; only what is installed."""
    found = {
        "KerasTuner, random": _keras_tuner("RandomSearchOracle"),
        "KerasTuner, Bayesian": _keras_tuner("BayesianOptimizationOracle"),
        "Optuna, random": _optuna(lambda s, seed: s.RandomSampler(seed=seed)),
        "Optuna, TPE": _optuna(lambda s, seed: s.TPESampler(seed=seed)),
        "tfbig, random": _tfbig("random"),
        "tfbig, TPE": _tfbig("tpe"),
        "tfbig, TPE, SQLite": _tfbig("tpe", None),
    }
    if importlib.util.find_spec("hyperopt"):
        found["tfbig, Hyperopt"] = _tfbig("hyperopt")
    if importlib.util.find_spec("torch") and importlib.util.find_spec("scipy"):
        found["Optuna, GP"] = _optuna(lambda s, seed: s.GPSampler(seed=seed))
        found["tfbig, GP"] = _tfbig("gp")
    return found


def compare(trials: int, seeds: int) -> list[dict[str, Any]]:
    """Prints the tables; returns what --json holds of each row of both."""
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
    print(f"\nmilliseconds of a suggestion for Branin after so many trials{'':<2}")
    print(f"{'':<22}" + "".join(f"{n:>10}" for n in MOMENTS))
    for row, run in rows().items():
        function, bounds = PROBLEMS["Branin"]
        _, seconds = run(function, bounds, max(MOMENTS) + 5, 0)
        means = [1000 * statistics.mean(seconds[n - 5 : n + 5]) for n in MOMENTS]
        print(f"{row:<22}" + "".join(f"{m:>10.1f}" for m in means), flush=True)
        measured.append({"row": row, "milliseconds": dict(zip(MOMENTS, means, strict=True))})
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
