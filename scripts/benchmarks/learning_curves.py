"""Learning curves of a perceptron on the digits, trained once, for benchmark.py --tables.

As a program, it trains all configurations, a few seconds each, and writes learning_curves.npz
beside itself. Interrupted, it resumes where it was:

  python scripts/benchmarks/learning_curves.py
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

FILE = pathlib.Path(__file__).with_name("learning_curves.npz")
EPOCHS = 27
SPACE: dict[str, tuple[float, ...]] = {
    "units": (16, 32, 64, 128),
    "learning_rate": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "dropout": (0.0, 0.25, 0.5),
    "batch_size": (32, 128, 512),
}
_ROWS_PER_SAVE = 8


@dataclasses.dataclass(frozen=True)
class Curves:
    """Losses of all configurations of a space after each epoch.

    Attributes:
        space: The values of each hyperparameter, by name.
        losses: Of shape (configurations, epochs); the last hyperparameter varies fastest.
    """

    space: Mapping[str, tuple[float, ...]]
    losses: np.ndarray

    @property
    def epochs(self) -> int:
        """For how many epochs each configuration was trained."""
        return self.losses.shape[1]

    def index_of(self, values: Mapping[str, Any]) -> int:
        """The row of a configuration."""
        indices = [choices.index(values[name]) for name, choices in self.space.items()]
        return int(np.ravel_multi_index(indices, [len(c) for c in self.space.values()]))


def load(path: pathlib.Path = FILE) -> Curves:
    """The validation losses that were stored.

    Raises:
        ValueError: If the file is not complete.
    """
    stored = _stored(path)
    space = {name: tuple(stored[name].tolist()) for name in SPACE}
    losses = stored["val_loss"]
    if len(losses) != np.prod([len(choices) for choices in space.values()]):
        raise ValueError(f"{path} is not complete: run {__file__}")
    return Curves(space, losses)


def perceptron(
    units: int, learning_rate: float, dropout: float, steps_per_execution: int = 1
) -> keras.Model:
    """A model of the digits with one hidden layer, compiled."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(units, "relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )
    return model


def _stored(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _write(path: pathlib.Path, rows: dict[str, np.ndarray]) -> None:
    new = path.with_name(f"new-{os.getpid()}-{path.name}")
    np.savez_compressed(new, **{name: np.array(choices) for name, choices in SPACE.items()}, **rows)
    os.replace(new, path)


def _train(path: pathlib.Path) -> None:
    """Trains what the file does not have yet."""
    import digits_data
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    train, validation = digits_data.load()
    names = ("val_loss", "val_accuracy")
    rows = {name: np.zeros((0, EPOCHS), np.float32) for name in names}
    if path.exists():
        stored = _stored(path)
        if any(stored[name].tolist() != list(choices) for name, choices in SPACE.items()):
            raise SystemExit(f"{path} has other configurations: remove it to begin anew")
        rows = {name: stored[name] for name in names}
    configurations = [
        dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())
    ]
    for index in range(len(rows["val_loss"]), len(configurations)):
        values = configurations[index]
        keras.utils.clear_session()
        # Each has a seed of its own, so that no chance is common to all.
        keras.utils.set_random_seed(index)
        batch_size = values.pop("batch_size")
        steps = math.ceil(len(train[1]) / batch_size)
        history = perceptron(**values, steps_per_execution=steps).fit(
            *train,
            batch_size=batch_size,
            epochs=EPOCHS,
            validation_data=validation,
            validation_batch_size=len(validation[1]),
            verbose=0,
        )
        for name in names:
            row = np.array([history.history[name]], np.float32)
            rows[name] = np.concatenate([rows[name], row])
        if (index + 1) % _ROWS_PER_SAVE == 0 or index + 1 == len(configurations):
            _write(path, rows)
            print(f"{index + 1} of {len(configurations)}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    sys.path[0] = str(pathlib.Path(__file__).parents[1])
    _train(FILE)
