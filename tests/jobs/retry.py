"""Trains with a loss scale that overflows at first, with `retry`.

    retry.py DIRECTORY

Leaves the weights at the end, and how many updates were skipped.
"""

import sys

import keras

import tfbig
from tests import job
from tests.update import retried_batches_test


def main(directory):
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(1)
    strategy = tfbig.distribute.get_strategy("multi_worker", timeout=60)
    with strategy.scope():
        layers = retried_batches_test.layers()
        model = tfbig.Sequential(
            [x for x in layers if not isinstance(x, keras.layers.BatchNormalization)],
            gradient_accumulation_steps=2,
            loss_scale=tfbig.DynamicLossScale(retried_batches_test.SCALE, retry=True),
        )
        model.compile(retried_batches_test.OPTIMIZERS["sgd"](), "mse")
    retried_batches_test.fit(model, *retried_batches_test.data())
    weights = [w.tolist() for w in model.get_weights()]
    job.leave(directory, {"weights": weights, "skipped": model.skipped_updates})


if __name__ == "__main__":
    main(*sys.argv[1:])
