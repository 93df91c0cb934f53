"""What train.py needs to know of a task."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


@dataclasses.dataclass
class Defaults:
    """Defaults of flags of train.py.

    Attributes:
        batch_size: Samples of an update.
        epochs: Passes over the training data.
        learning_rate: The highest.
        jit_compile: Whether XLA compiles the step.
    """

    batch_size: int
    epochs: int
    learning_rate: float
    jit_compile: bool = False


@dataclasses.dataclass
class Task:
    """A model, its data, and the bar that it must reach.

    Attributes:
        train: Arrays `(x, y)`, or `(x,)` without labels.
        validation: Arrays `(x, y)`, or None.
        make_model: Makes the model; takes the options of a `tfbig.Model`.
        make_optimizer: Makes the optimizer; takes the learning rate and the number of updates.
        measure: The name in the logs of what is judged at the end.
        bar: What the measure must reach.
        loss: A Keras loss, or None if the model has its own.
        make_metrics: Makes the list of Keras metrics.
        lower_is_better: Whether the measure must be below the bar rather than above.
        curves: The names in the logs of what is plotted.
        callbacks: Keras callbacks, which may add to the logs of an epoch.
        conclude: Takes the trained model and the output directory, writes what else a run leaves
            and returns lines to print.
    """

    train: tuple[Any, ...]
    validation: tuple[Any, Any] | None
    make_model: Callable[..., keras.Model]
    make_optimizer: Callable[[float, int], keras.optimizers.Optimizer]
    measure: str
    bar: float
    loss: keras.losses.Loss | None = None
    make_metrics: Callable[[], list[Any]] = list
    lower_is_better: bool = False
    curves: tuple[str, ...] = ("loss", "accuracy")
    callbacks: list[keras.callbacks.Callback] = dataclasses.field(default_factory=list)
    conclude: Callable[[keras.Model, pathlib.Path], list[str]] = lambda model, path: []

    def reaches_bar(self, value: float) -> bool:
        """Whether a value of the measure is good enough; NaN is not."""
        return value < self.bar if self.lower_is_better else value >= self.bar


def falling(
    learning_rate: float, updates: int, warmup: int = 0
) -> keras.optimizers.schedules.LearningRateSchedule:
    """A learning rate that falls to 0 along a cosine, after `warmup` updates in which it rises."""
    import keras

    decay = keras.optimizers.schedules.CosineDecay
    if not warmup:
        return decay(learning_rate, updates)
    return decay(0.0, updates - warmup, warmup_target=learning_rate, warmup_steps=warmup)
