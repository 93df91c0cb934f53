"""Digits: a small convolutional network reads scanned digits, which scikit-learn ships."""

from __future__ import annotations

from typing import TYPE_CHECKING

import command_line
import digits_data

from tasks import task

if TYPE_CHECKING:
    import keras
    from training.settings import Settings

DEFAULTS = task.Defaults(batch_size=512, epochs=40, learning_rate=0.01)
FLAGS = ()


def load(settings: Settings) -> task.Task:
    """The task.

    Raises:
        MissingExtraError: Without scikit-learn.
    """
    import keras

    import tfbig

    try:
        train, validation = digits_data.load()
    except ModuleNotFoundError:
        raise command_line.MissingExtraError("--task=digits", "sklearn") from None
    return task.Task(
        train=train,
        validation=validation,
        make_model=lambda **options: tfbig.Sequential(_layers(), **options),
        make_optimizer=lambda rate, updates: keras.optimizers.Adam(task.falling(rate, updates)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        make_metrics=lambda: ["accuracy"],
        measure="val_accuracy",
        bar=0.97,
    )


def _layers() -> list[keras.Layer]:
    import keras
    from keras import layers

    convolution = {"kernel_size": 3, "padding": "same", "activation": "relu"}
    return [
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, **convolution),
        layers.Conv2D(32, **convolution),
        layers.MaxPooling2D(),
        layers.Conv2D(64, **convolution),
        layers.MaxPooling2D(),
        layers.Flatten(),
        # Logits are at least float32: a softmax in float16 loses its tail.
        layers.Dense(10, dtype=keras.config.floatx()),
    ]
