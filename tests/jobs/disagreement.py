"""Trains with settings that are one worker's own; its error is left.

disagreement.py DIRECTORY WHAT
"""

import sys

import keras
import numpy as np

import tfbig
from tests import job


def main(directory, what):
    strategy = tfbig.distribute.get_strategy(timeout=60)
    differs = not tfbig.distribute.is_chief(strategy)

    def own(name, usual, other):
        return other if differs and what == name else usual

    keras.utils.set_random_seed(own("seed", 1, 2))
    layers = [keras.layers.Dense(2) for _ in range(own("layers", 2, 3))]
    try:
        with strategy.scope():
            inputs = [] if what == "layers" else [keras.Input((4,))]
            model = tfbig.Sequential(
                [*inputs, *layers], micro_batch_size=own("micro_batch_size", 2, 3)
            )
            model.compile(
                keras.optimizers.SGD(own("learning_rate", 0.1, 0.2)),
                steps_per_execution=own("steps_per_execution", 1, 2),
                loss="mse",
            )
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
