"""Searches in published tables for benchmark.py --tuners --tables: how good they end."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from benchmarks import tables, tuners
from benchmarks.markdown import Table

# One search takes a minute.
BAYESIAN, BAYESIAN_SEEDS = "KerasTuner, Bayesian", 2
# What the others are compared with, seed by seed.
REFERENCE = "Optuna, TPE"

_SAMPLES = 10_000  # Of the bootstrap.


def _are_numbers(choices: tuple[Any, ...]) -> bool:
    return not any(isinstance(choice, str) for choice in choices)


def _define(hps: Any, space: tables.Space) -> None:  # `HyperParameters` of either.
    for name, choices in space.items():
        hps.Choice(name, list(choices))


def _define_unordered(hps: Any, space: tables.Space) -> None:
    for name, choices in space.items():
        hps.Choice(name, list(choices), ordered=False)


def suggest(trial: Any, space: tables.Space) -> dict[str, Any]:  # `optuna.Trial`.
    """Values of a trial of Optuna, numbers by their indices."""
    return {
        name: choices[trial.suggest_int(name, 0, len(choices) - 1)]
        if _are_numbers(choices)
        else trial.suggest_categorical(name, choices)
        for name, choices in space.items()
    }


def _suggest_categorical(trial: Any, space: tables.Space) -> dict[str, Any]:
    return {name: trial.suggest_categorical(name, choices) for name, choices in space.items()}


def rows() -> dict[str, tuners.Search]:
    """What is compared, by name; only what is installed."""
    found = {
        "KerasTuner, random": tuners.with_keras_tuner("RandomSearchOracle", _define),
        BAYESIAN: tuners.with_keras_tuner("BayesianOptimizationOracle", _define),
        "Optuna, random": tuners.with_optuna(lambda s, seed: s.RandomSampler(seed=seed), suggest),
        "Optuna, TPE": tuners.with_optuna(lambda s, seed: s.TPESampler(seed=seed), suggest),
        "Optuna, TPE, all categorical": tuners.with_optuna(
            lambda s, seed: s.TPESampler(seed=seed), _suggest_categorical
        ),
        "tfbig, random": tuners.with_tfbig("random", define=_define),
        "tfbig, TPE": tuners.with_tfbig("tpe", define=_define),
        "tfbig, TPE, ordered=False": tuners.with_tfbig("tpe", define=_define_unordered),
        "tfbig, NSGA-II": tuners.with_tfbig("nsga2", define=_define),
    }
    for sampler, name, needed in (
        ("cmaes", "CMA-ES", ("cmaes",)),
        ("qmc", "quasi-Monte Carlo", ("scipy",)),
        ("hyperopt", "Hyperopt", ("hyperopt",)),
        ("gp", "GP", ("torch", "scipy")),
    ):
        if all(map(importlib.util.find_spec, needed)):
            found[f"tfbig, {name}"] = tuners.with_tfbig(sampler, define=_define)
            if sampler == "gp":
                found[f"Optuna, {name}"] = tuners.with_optuna(
                    lambda s, seed: s.GPSampler(seed=seed), suggest
                )
    return found


def regrets(search: tuners.Search, problem: tables.Problem, trials: int, seeds: int) -> list[float]:
    """The regret at the end of a search, for each of so many seeds."""
    found = []
    for seed in range(seeds):
        lookups = tables.Lookups(problem, seed)
        search(lookups, problem.space, trials, seed)
        found.append(lookups.regret())
    return found


def compare(
    problems: Mapping[str, tables.Problem],
    trials: int,
    seeds: int,
    keep: tuners.Keep = lambda measured: None,
    only: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Prints the table; returns what --json holds of each search in each problem.

    Args:
        problems: The tables, by name.
        trials: Trials of a search.
        seeds: Searches of each kind.
        keep: Given after each row what will be returned, as far as it is there.
        only: The rows; all if empty.
    """
    measured: list[dict[str, Any]] = []
    print(f"regret after {trials} trials, mean of {seeds} seeds (its 90 % interval)")
    for name, problem in problems.items():
        print(f"{name}: {problem.losses[..., 0].size} configurations, regret in {problem.unit}")
    print(f"{'':<30}" + "".join(f"{name:>26}" for name in problems))
    for row, search in rows().items():
        if only and row not in only:
            continue
        count = min(seeds, BAYESIAN_SEEDS) if row == BAYESIAN else seeds
        line = f"{titled(row, count, seeds):<30}"
        for name, problem in problems.items():
            found = regrets(search, problem, trials, count)
            line += f"{_mean(found):>26}"
            measured.append({"row": row, "problem": name, "regrets": found})
        print(line, flush=True)
        keep(measured)
    return measured


def titled(row: str, count: int, seeds: int) -> str:
    """The name of a search, which says so if it ran for fewer seeds than others."""
    return row if count == seeds else f"{row} ({count} seeds)"


def interval_of_mean(values: list[float]) -> tuple[float, float]:
    """The 90 % interval of a mean, by bootstrap."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (_SAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(means, [5, 95])
    return float(low), float(high)


def _mean(values: list[float], sign: str = "") -> str:
    low, high = interval_of_mean(values)
    return f"{np.mean(values):{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def tables_of(
    measured: list[dict[str, Any]], problems: Mapping[str, tables.Problem]
) -> list[Table]:
    """What `compare` has returned, as regrets and as differences from `REFERENCE`."""
    compared = _differences(measured, problems)
    return [table(measured, problems), *([compared] if compared.lines else [])]


def _differences(measured: list[dict[str, Any]], problems: Mapping[str, tables.Problem]) -> Table:
    regrets = {(entry["row"], entry["problem"]): entry["regrets"] for entry in measured}
    lines = []
    for row in dict.fromkeys(entry["row"] for entry in measured):
        pairs = [(regrets.get((row, name)), regrets.get((REFERENCE, name))) for name in problems]
        # Of other seeds, differences would say nothing.
        if row != REFERENCE and all(a and b and len(a) == len(b) for a, b in pairs):
            lines.append((row, *(_mean(np.subtract(*pair).tolist(), "+") for pair in pairs)))
    return Table(
        f"Regret minus that of '{REFERENCE}' with the same seed, mean (90 % interval of it)",
        ("search", *(f"{name}, {problem.unit}" for name, problem in problems.items())),
        lines,
    )


def table(measured: list[dict[str, Any]], problems: Mapping[str, tables.Problem]) -> Table:
    """What `compare` has returned."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in measured:
        found.setdefault(entry["row"], {})[entry["problem"]] = entry["regrets"]
    most = max(len(entry["regrets"]) for entry in measured)
    return Table(
        "Regret at the end of a search, mean of the seeds (90 % interval of it, by bootstrap)",
        ("search", *(f"{name}, {problem.unit}" for name, problem in problems.items())),
        [
            (
                titled(row, len(next(iter(by_problem.values()))), most),
                *(_mean(by_problem[name]) for name in problems),
            )
            for row, by_problem in found.items()
        ],
    )
