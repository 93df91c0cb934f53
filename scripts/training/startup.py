"""What comes before any model: TensorFlow, Keras and the strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import command_line

from training import settings

if TYPE_CHECKING:
    import tensorflow as tf


def start() -> tf.distribute.Strategy:
    """Configures TensorFlow and Keras by the flags; returns the strategy.

    Raises:
        UsageError: If --strategy=tpu finds none.
    """
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    import keras

    strategy = _strategy()
    precision = settings.PRECISION.value
    if precision == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(precision)
    keras.utils.set_random_seed(settings.SEED.value)
    if precision == "mixed_float16":
        # The first float16 operation makes TensorFlow remark on the processor.
        tf.matmul(tf.ones((1, 1), tf.float16), tf.ones((1, 1), tf.float16))
    return strategy


def _strategy() -> tf.distribute.Strategy:
    import tensorflow as tf

    import tfbig

    name = settings.STRATEGY.value
    devices = settings.REPLICAS.value if name == "mirrored" else None
    if name == "mirrored" and not tf.config.list_physical_devices("GPU"):
        devices = devices or 2
    try:
        return tfbig.distribute.get_strategy(name, devices=devices)
    except tfbig.errors.ClusterError as e:
        if name != "tpu":
            raise
        raise command_line.UsageError(e) from None
