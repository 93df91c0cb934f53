"""What comes before any model: TensorFlow, Keras, the strategy and the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import command_line

from training import settings, stages

if TYPE_CHECKING:
    import tensorflow as tf

    import tfbig


def start() -> tuple[tf.distribute.Strategy, tfbig.distribute.Pipeline | None]:
    """Configures TensorFlow and Keras by the flags; returns the strategy and the pipeline.

    Raises:
        UsageError: If --strategy=tpu finds none, or --pipeline does not go with the devices.
    """
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    import keras

    strategy = _strategy()
    pipeline = stages.pipeline(strategy)
    precision = settings.PRECISION.value
    if precision == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(precision)
    keras.utils.set_random_seed(settings.SEED.value)
    if precision == "mixed_float16":
        # The first float16 operation makes TensorFlow remark on the processor.
        tf.matmul(tf.ones((1, 1), tf.float16), tf.ones((1, 1), tf.float16))
    return strategy, pipeline


def _strategy() -> tf.distribute.Strategy:
    import tfbig

    name = settings.STRATEGY.value
    devices = stages.mirrored_replicas() if name == "mirrored" else None
    stages.make_devices(devices or 1)
    try:
        return tfbig.distribute.get_strategy(name, devices=devices)
    except tfbig.errors.ClusterError as e:
        if name != "tpu":
            raise
        raise command_line.UsageError(e) from None
