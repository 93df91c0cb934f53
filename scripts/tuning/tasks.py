"""What tune.py searches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import command_line
import digits_data

if TYPE_CHECKING:
    import keras
    import keras_tuner

OBJECTIVE = "val_loss"


@dataclasses.dataclass
class Task:
    """A model to search, and its data.

    Attributes:
        train: Arrays `(x, y)`.
        validation: Arrays `(x, y)`.
        build: Makes a compiled model of hyperparameters.
    """

    train: tuple[Any, Any]
    validation: tuple[Any, Any]
    build: Callable[[keras_tuner.HyperParameters], keras.Model]


def digits() -> Task:
    """Scanned digits, which scikit-learn ships."""
    import keras
    from keras import layers

    try:
        train, validation = digits_data.load()
    except ModuleNotFoundError:
        raise command_line.MissingExtraError("--task=digits", "sklearn") from None

    def build(hp: keras_tuner.HyperParameters) -> keras.Model:
        activation = hp.Choice("activation", ["relu", "swish", "tanh", None], default="relu")
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(
                    hp.Int("filters", 8, 64, step=8, default=16),
                    kernel_size=3,
                    padding="same",
                    activation=activation,
                ),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(
                    hp.Int("units", 16, 256, sampling="log", default=64), activation=activation
                ),
                layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)),
                layers.Dense(10),
            ]
        )
        rate = hp.Float("learning_rate", 1e-4, 1e-1, sampling="log", default=1e-3)
        model.compile(
            keras.optimizers.Adam(rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    return Task(train, validation, build)


TASKS: dict[str, Callable[[], Task]] = {"digits": digits}
