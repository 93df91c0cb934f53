"""What a task is to train.py."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Defaults:
    """What flags of train.py are where they are not given.

    Attributes:
        batch_size: int, samples of an update.
        epochs: int.
        learning_rate: float, the highest.
        jit_compile: bool, whether XLA compiles the step.
    """

    batch_size: int
    epochs: int
    learning_rate: float
    jit_compile: bool = False


@dataclasses.dataclass
class Task:
    """What is trained on what, and what it must reach.

    Attributes:
        train: `(x, y)` arrays; `(x,)` where there are no labels.
        validation: `(x, y)` arrays, or None.
        make_model: Function of the options of a `tfbig.Model`, which returns one.
        make_optimizer: Function of a learning rate and the number of updates in all.
        measure: str, the name in the logs of what is judged at the end.
        bar: float that the measure must reach.
        loss: a Keras loss, or None where the model has its own.
        make_metrics: Function that returns a list of Keras metrics.
        lower_is_better: bool, whether the measure must be below the bar rather than above.
        curves: tuple of str, the names in the logs of what is plotted.
        callbacks: list of Keras callbacks, which may add to the logs of an epoch.
        conclude: Function of the trained model and the output directory that writes what else
            a run leaves, and returns lines to print.
    """

    train: tuple
    validation: tuple | None
    make_model: Callable
    make_optimizer: Callable
    measure: str
    bar: float
    loss: object = None
    make_metrics: Callable = list
    lower_is_better: bool = False
    curves: tuple = ("loss", "accuracy")
    callbacks: list = dataclasses.field(default_factory=list)
    conclude: Callable = lambda model, path: []

    def reaches_bar(self, value):
        """Whether a value of the measure is good enough; NaN is not."""
        return value < self.bar if self.lower_is_better else value >= self.bar


def falling(learning_rate, updates, warmup=0):
    """A learning rate that falls to 0 along a cosine, after a rise over some of the updates."""
    import keras

    decay = keras.optimizers.schedules.CosineDecay
    if not warmup:
        return decay(learning_rate, updates)
    return decay(0.0, updates - warmup, warmup_target=learning_rate, warmup_steps=warmup)
