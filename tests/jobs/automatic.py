"""Trains with micro_batch_size="auto" where memory runs out on the last worker alone.

automatic.py DIRECTORY

Leaves the sizes that were found, the deviation from plain Keras, and a digest of the weights.
"""

import hashlib
import sys

import keras
import numpy as np

import tfbig
from tests import job
from tests.update.automatic_test import Limited, RunsOut


def build(base, **options):
    keras.utils.set_random_seed(0)
    limited = Limited(10**6)
    x = keras.Input((5, 3))
    # A mask has the workers exchange denominators before the gradients.
    h = keras.layers.Dense(4, "tanh")(limited(keras.layers.Masking()(x)))
    model = base(x, keras.layers.Dense(2)(h), **options)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model, limited


def main(directory):
    keras.config.set_floatx("float64")
    strategy = tfbig.distribute.get_strategy(timeout=60)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70, 5, 3)) * (rng.uniform(size=(70, 5, 1)) > 0.4)
    y = rng.normal(size=(70, 5, 2))
    arguments = {"batch_size": 32, "shuffle": False, "verbose": 0, "epochs": 2}

    plain, _ = build(keras.Model)
    want = [*plain.fit(x, y, **arguments).history["loss"]]
    with strategy.scope():
        model, limited = build(tfbig.Model, micro_batch_size="auto")
    # It acts on the last replica, which is the last worker's.
    limited.most = 13
    sizes = []
    sees = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: sizes.append(model.micro_batch_size)
    )
    got = model.fit(x, y, callbacks=[RunsOut(limited, 3), sees], **arguments).history["loss"]
    weights = model.get_weights()
    deviations = [
        np.max(np.abs(np.subtract(a, b)))
        for a, b in zip([*weights, got], [*plain.get_weights(), want], strict=True)
    ]
    digest = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
    job.leave(
        directory,
        {"sizes": sizes, "deviation": float(max(deviations)), "digest": digest},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
