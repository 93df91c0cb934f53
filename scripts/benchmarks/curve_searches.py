"""Searches in learning curves for benchmark.py --tuners --tables: regret by epochs trained.

Nothing is trained: a search is told what `learning_curves` has stored. All searches train for at
most 27 epochs and, if they stop or pause, after 1, 3 and 9.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import learning_curves, table_searches, tuners
from benchmarks.markdown import Table

# Regret is given after so many epochs of all trials together.
MOMENTS = (100, 200, 400, 800)

# A search has arrived if it holds one of so many percent of the configurations, the best ones.
TARGET_PERCENT = 5

Curves = learning_curves.Curves
# A configuration and an epoch from 1 for each epoch trained, in order.
Trained = list[tuple[int, int]]
# What is trained; of curves, a number of epochs and a seed.
Search = Callable[[Curves, int, int], Trained]

_FACTOR = 3

# TPE suggests again and again what was tried, once that is most of the table: a search takes half a
# minute.
SLOW, SLOW_SEEDS = ("tfbig, ASHA, TPE", 'tfbig, TPE, pruner="asha"'), 10


def drive(oracle: Any, curves: Curves, budget: int) -> Trained:
    """Runs an oracle of tfbig until so many epochs are trained, or it ends.

    Args:
        oracle: Of the objective "val_loss".
        curves: What is looked up.
        budget: The number of epochs; the last trial may exceed it.
    """
    trained: Trained = []
    reached: dict[str, int] = {}
    while len(trained) < budget:
        trial = oracle.create_trial("one")
        if trial.status != "RUNNING":
            break
        row = curves.index_of(trial.hyperparameters.values)
        begin = reached.get(trial.trial_id, 0)
        end = oracle.epochs_of(trial.trial_id) if oracle.goes_on else curves.epochs
        trial.status = "COMPLETED"
        for epoch in range(begin + 1, end + 1):
            trained.append((row, epoch))
            logs = {"val_loss": float(curves.losses[row, epoch - 1])}
            # After the last epoch, pruning saves nothing.
            if oracle.report(trial.trial_id, logs, epoch) and epoch < end:
                trial.status = "STOPPED"
                break
        reached[trial.trial_id] = epoch
        if trial.status == "COMPLETED":
            losses = curves.losses[row, begin:end]
            best = int(losses.argmin())
            oracle.update_trial(trial.trial_id, {"val_loss": float(losses[best])}, begin + best)
        oracle.end_trial(trial)
    return trained


def _tfbig(name: str, **arguments: Any) -> Search:
    """A search of tfbig, by the name of its oracle in `_oracles`."""

    def run(curves: Curves, budget: int, seed: int) -> Trained:
        import keras_tuner

        from tfbig import tuners

        space = tuners.HyperParameters()
        for hyperparameter, choices in curves.space.items():
            space.Choice(hyperparameter, list(choices))
        oracle = _oracles()[name](
            objective=keras_tuner.Objective("val_loss", "min"),
            hyperparameters=space,
            seed=seed,
            storage="memory",
            **arguments,
        )
        oracle.verbose = 0
        with tempfile.TemporaryDirectory() as directory:
            oracle._set_project_dir(directory, "benchmark")
            return drive(oracle, curves, budget)

    return run


def _oracles() -> dict[str, Callable[..., Any]]:
    from tfbig import tuners

    return {
        "study": tuners.StudyOracle,
        "hyperband": tuners.oracles.HyperbandOracle,
        "asha": tuners.oracles.ASHAOracle,
        "pasha": tuners.oracles.PASHAOracle,
    }


def _optuna(curves: Curves, budget: int, seed: int) -> Trained:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=_FACTOR),
    )
    trained: Trained = []
    while len(trained) < budget:
        trial = study.ask()
        row = curves.index_of(table_searches.suggest(trial, curves.space))
        for epoch in range(1, curves.epochs + 1):
            trained.append((row, epoch))
            trial.report(float(curves.losses[row, epoch - 1]), epoch)
            if trial.should_prune() and epoch < curves.epochs:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(curves.losses[row].min()))
    return trained


def rows(epochs: int = learning_curves.EPOCHS) -> dict[str, Search]:
    """What is compared, by name.

    Args:
        epochs: For how many epochs a configuration is trained to the end.
    """
    pruned = {"pruner": "asha", "pruner_options": {"min_resource": 1, "reduction_factor": _FACTOR}}
    rungs = {"max_epochs": epochs, "factor": _FACTOR}
    endless = rungs | {"max_trials": None}
    return {
        "tfbig, random": _tfbig("study", sampler="random"),
        "tfbig, TPE": _tfbig("study", sampler="tpe"),
        # So many iterations that the epochs suffice.
        "tfbig, Hyperband": _tfbig("hyperband", hyperband_iterations=9, **rungs),
        "tfbig, ASHA, random": _tfbig("asha", sampler="random", **endless),
        "tfbig, ASHA, TPE": _tfbig("asha", sampler="tpe", **endless),
        "tfbig, PASHA, random": _tfbig("pasha", sampler="random", **endless),
        'tfbig, random, pruner="asha"': _tfbig("study", sampler="random", **pruned),
        'tfbig, TPE, pruner="asha"': _tfbig("study", sampler="tpe", **pruned),
        "Optuna, TPE, SuccessiveHalvingPruner": _optuna,
    }


def regrets(curves: Curves, trained: Trained) -> np.ndarray:
    """The regret after each epoch that was trained.

    It is that of the configuration with the least loss seen, after the epoch at which that is best,
    even if the search has not trained it so long: how much more than the least loss of all.
    """
    best_of_rows = curves.losses.min(axis=1) - curves.losses.min()
    found, least = [], math.inf
    for row, epoch in trained:
        seen = curves.losses[row, epoch - 1]
        if seen < least:
            least, regret = seen, best_of_rows[row]
        found.append(regret)
    return np.array(found)


def target(curves: Curves) -> float:
    """The regret of the worst of the best `TARGET_PERCENT` percent of the configurations."""
    best = curves.losses.min(axis=1)
    return float(np.percentile(best, TARGET_PERCENT) - best.min())


def epochs_until(regrets: Sequence[float] | np.ndarray, target: float) -> int | None:
    """After how many epochs regret is not more than the target, and stays so; None if never."""
    above = np.flatnonzero(np.asarray(regrets) > target)
    epochs = int(above[-1]) + 2 if len(above) else 1
    return epochs if epochs <= len(regrets) else None


def compare(
    curves: Curves, seeds: int, keep: tuners.Keep = lambda measured: None
) -> tuple[list[dict[str, Any]], dict[str, list[Trained]]]:
    """Prints the table.

    Args:
        curves: What is looked up.
        seeds: Searches of each kind.
        keep: Given after each row what --json holds so far.

    Returns:
        What --json holds of each search, and what each has trained, by its name and seed.
    """
    wanted, measured, all_trained = target(curves), [], {}
    print(f"\nregret after so many epochs, median of {seeds} seeds (5th to 95th percentile), and")
    print(f"epochs until regret stays <= {wanted:.4f}, that of the best {TARGET_PERCENT} %")
    print(f"{'':<38}" + "".join(f"{head:>28}" for head in (*MOMENTS, "epochs")))
    for row, search in rows(curves.epochs).items():
        count = min(seeds, SLOW_SEEDS) if row in SLOW else seeds
        trained = [search(curves, max(MOMENTS), seed) for seed in range(count)]
        by_seed = [regrets(curves, one) for one in trained]
        entry = {
            "row": row,
            "target": wanted,
            "regrets": {n: [float(one[min(n, len(one)) - 1]) for one in by_seed] for n in MOMENTS},
            "epochs_until": [epochs_until(one[: max(MOMENTS)], wanted) for one in by_seed],
        }
        measured.append(entry)
        all_trained[row] = trained
        cells = _cells(entry)
        name = table_searches.titled(row, count, seeds)
        print(f"{name:<38}" + "".join(f"{cell:>28}" for cell in cells), flush=True)
        keep(measured)
    return measured, all_trained


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    regret = [_median(values, "{:.4f}") for values in entry["regrets"].values()]
    epochs = [math.inf if count is None else count for count in entry["epochs_until"]]
    return (*regret, _median(epochs, "{:.0f}"))


def _median(values: Sequence[float], form: str) -> str:
    # Not interpolated, since some may be infinite.
    found = np.percentile(values, [5, 50, 95], method="nearest")
    low, middle, high = (form.format(v) if v < math.inf else "never" for v in found)
    return f"{middle} ({low} to {high})"


def table(measured: list[dict[str, Any]]) -> Table:
    """What `compare` has returned first."""
    wanted = measured[0]["target"]
    seeds = [len(entry["epochs_until"]) for entry in measured]
    return Table(
        "Regret in validation loss after so many epochs of all trials together, and epochs until "
        f"it stays <= {wanted:.4f}: median of the seeds (5th to 95th percentile)",
        ("search", *(f"{n} epochs" for n in MOMENTS), f"epochs until <= {wanted:.4f}"),
        [
            (table_searches.titled(entry["row"], count, max(seeds)), *_cells(entry))
            for entry, count in zip(measured, seeds, strict=True)
        ],
    )
