"""Trains compiled by XLA, eagerly, and with gradients exchanged in half precision or one by one.

Leaves the deviations from plain Keras.

modes.py DIRECTORY
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import tfbig
from tests import job
from tfbig import _keras

# Arguments of compile, options of the model, and bytes of a part of an exchange, if not as ever.
MODES = {
    "jit_compile": ({"jit_compile": True}, {}, None),
    "run_eagerly": ({"run_eagerly": True}, {}, None),
    "bfloat16": ({}, {"exchange_dtype": "bfloat16"}, None),
    "bfloat16 in parts": ({}, {"exchange_dtype": "bfloat16", "shard": "optimizer"}, 16),
    "float16": ({}, {"exchange_dtype": "float16"}, None),
    "float16 in parts": ({}, {"exchange_dtype": "float16", "exchange_bucket_bytes": 32}, 16),
    "buckets": ({}, {"exchange_bucket_bytes": 1}, None),
    "parts": ({}, {"exchange_bucket_bytes": 32}, 16),
}


def train(base, compile_arguments, **options):
    keras.utils.set_random_seed(0)
    model = base(
        [keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)], **options
    )
    model.compile("sgd", "mse", metrics=["mae"], **compile_arguments)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(37, 4)), rng.normal(size=(37, 2))
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
    return [
        *model.get_weights(),
        *history.values(),
        model.evaluate(x, y, batch_size=8, verbose=0),
        model.predict(x, batch_size=8, verbose=0),
    ]


def main(directory):
    keras.config.set_floatx("float64")
    strategy = tfbig.distribute.get_strategy(timeout=60)
    whole = train(keras.Sequential, {})
    deviations = {}
    with strategy.scope():
        assert tf.function(_keras.collectives._goes_in_parts)()
    as_ever, next_keys = _keras.collectives._PART_BYTES, _keras.collectives.next_keys
    parts = []

    def counted(launcher, operation, tensor):
        parts.append(operation)
        return next_keys(launcher, operation, tensor)

    _keras.collectives.next_keys = counted
    for name, (arguments, options, part_bytes) in MODES.items():
        _keras.collectives._PART_BYTES = part_bytes or as_ever
        parts.clear()
        with strategy.scope():
            split = train(tfbig.Sequential, arguments, gradient_accumulation_steps=3, **options)
        deviations[name] = max(
            float(np.max(np.abs(np.subtract(a, b)))) for a, b in zip(split, whole, strict=True)
        )
        # With a part for each tensor at most, there are up to ten.
        assert (len(parts) > 15) == (part_bytes is not None), name
    job.leave(directory, deviations)


if __name__ == "__main__":
    main(*sys.argv[1:])
