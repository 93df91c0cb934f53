"""Population-based training for benchmark.py --tuners --tables, really trained.

It changes hyperparameters during training, so that its losses are in no table of learning curves.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import curve_searches, learning_curves, tuners
from benchmarks.markdown import Table

SIZE, EPOCHS_PER_GENERATION = 8, 3
EPOCHS = SIZE * learning_curves.EPOCHS

# What it is compared with, which trains as many epochs.
COMPARED = ("tfbig, ASHA, random", "tfbig, ASHA, TPE")
ROW = "tfbig, population-based training, trained"


def best_loss(
    seed: int,
    size: int = SIZE,
    epochs: int = learning_curves.EPOCHS,
    epochs_per_generation: int = EPOCHS_PER_GENERATION,
    quantile: float = 0.25,
) -> float:
    """Trains a population of perceptrons on the digits; returns the least validation loss seen.

    Args:
        seed: The seed of the search.
        size: How many models there are.
        epochs: Epochs of a model.
        epochs_per_generation: Epochs after which models are compared.
        quantile: The part of them that is replaced then.
    """
    import digits_data
    import keras

    from tfbig import tuners

    def build(hp: Any) -> keras.Model:
        values = {name: hp.Choice(name, list(c)) for name, c in learning_curves.SPACE.items()}
        del values["batch_size"]  # The tuner passes it to `fit`.
        return learning_curves.perceptron(**values)

    train, validation = digits_data.load()
    with tempfile.TemporaryDirectory() as directory:
        tuner = tuners.PopulationBasedTraining(
            build,
            tuners.Objective("val_loss", "min"),
            population_size=size,
            max_epochs=epochs,
            epochs_per_generation=epochs_per_generation,
            quantile=quantile,
            # The others change the state of a model: the units the shapes of weights; and without
            # dropout, Keras's layer has no random state.
            explore=["learning_rate", "batch_size"],
            seed=seed,
            storage="memory",
            directory=directory,
        )
        tuner.oracle.verbose = 0
        tuner.search(
            *train, validation_data=validation, validation_batch_size=len(validation[1]), verbose=0
        )
        values = [trial.intermediate_values.values() for trial in tuner.oracle.study.trials]
    return min(value for member in values for value in member)


def compare(
    curves: learning_curves.Curves,
    trained: Mapping[str, Sequence[curve_searches.Trained]],
    seeds: int,
    keep: tuners.Keep = lambda measured: None,
) -> list[dict[str, Any]]:
    """Prints the table; returns what --json holds of each search.

    Args:
        curves: In which the others were looked up.
        trained: What they have trained, by name and seed.
        seeds: For how many seeds a population is trained.
        keep: Given after each seed what will be returned, as far as it is there.
    """
    print(f"\nleast validation loss seen in {EPOCHS} epochs, median (min to max) of the seeds")
    print(f"{'least of the table':<45}{'':>12}{curves.losses.min():.4f}")
    measured = [
        {
            "row": row,
            "losses": [
                float(min(curves.losses[index, epoch - 1] for index, epoch in one[:EPOCHS]))
                for one in trained[row]
            ],
        }
        for row in COMPARED
    ]
    for entry in measured:
        _print(entry)
    own: dict[str, Any] = {"row": ROW, "losses": []}
    measured.append(own)
    for seed in range(seeds):
        own["losses"].append(best_loss(seed))
        keep(measured)
    _print(own)
    return measured


def _print(entry: Mapping[str, Any]) -> None:
    losses = entry["losses"]
    print(f"{entry['row']:<45}{len(losses):>4} seeds  {_median(losses)}", flush=True)


def _median(losses: Sequence[float]) -> str:
    return f"{statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def table(measured: list[dict[str, Any]]) -> Table:
    """What `compare` has returned."""
    return Table(
        f"The least validation loss seen in {EPOCHS} epochs, median (min to max) of the seeds. "
        "Population-based training cannot be looked up, so it is really trained",
        ("search", "seeds", "validation loss"),
        [(e["row"], str(len(e["losses"])), _median(e["losses"])) for e in measured],
    )
