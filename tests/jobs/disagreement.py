"""Trains with settings that are one worker's own; its error is left.

disagreement.py DIRECTORY WHAT
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import tfbig
from tests import job
from tfbig import _keras


class Sum(keras.layers.Layer):
    """The sum of two products with weights of its own, or the first of them."""

    def __init__(self, is_one):
        super().__init__()
        self.is_one = is_one

    def build(self, shape):
        self.first, self.second = (self.add_weight(shape=(shape[-1], 64)) for _ in range(2))

    def call(self, x):
        first = x @ self.first
        return first if self.is_one else first + x @ self.second

    def get_config(self):
        return {}


def main(directory, what):
    # Bytes: what a worker leaves out below is several whole parts of an exchange.
    _keras.collectives._PART_BYTES = 64
    strategy = tfbig.distribute.get_strategy(timeout=60)
    differs = not tfbig.distribute.is_chief(strategy)

    def own(name, usual, other):
        return other if differs and what == name else usual

    keras.utils.set_random_seed(own("seed", 1, 2))
    # Built before fit, or by it.
    is_built = what != "layers in fit"
    layers = [keras.layers.Dense(2) for _ in range(own("layers", 2, 3))]
    if not is_built:
        layers = [keras.layers.Dense(2), keras.layers.Dense(own(what, 3, 2)), layers[0]]
    if what == "gradients":
        layers = [Sum(is_one=differs), *layers]
    try:
        with strategy.scope():
            if what == "a variable more" and differs:
                tf.Variable(1.0, name="more")
            inputs = [keras.Input((4,))] if is_built else []
            model = tfbig.Sequential(
                [*inputs, *layers], micro_batch_size=own("micro_batch_size", 2, 3)
            )
            model.compile(
                # A learning rate is a variable, and all workers take the value of the chief.
                keras.optimizers.SGD(0.1, momentum=own("momentum", 0.0, 0.9)),
                steps_per_execution=own("steps_per_execution", 1, 2),
                loss="mse",
            )
            if what == "a variable at the end" and differs:
                tf.Variable([1.0, 2.0], name="last")
        samples = own("samples", 16, 12)
        model.fit(
            np.ones((samples, 4)),
            np.ones((samples, 2)),
            batch_size=own("batch_size", 8, 4),
            verbose=0,
        )
    except tfbig.errors.WorkersDisagreeError as e:
        job.leave(directory, str(e))


if __name__ == "__main__":
    main(*sys.argv[1:])
