"""What Keras and `tf.distribute` do differently from what tfbig needs.

This is the only package that touches `keras.src` or a private Keras name. Every workaround states
its reason; `tests/keras_defects/canaries_test.py` demonstrates each defect, and fails on the day
upstream mends it. One module for each concern: `_keras.losses.metrics_results`.
"""

import keras

from tfbig import _backend

_backend.check(keras.backend.backend())

from tfbig._keras import (
    compiling,
    data,
    devices,
    input_clock,
    layers,
    losses,
    memory,
    optimizer,
    padding,
    recomputation,
    saving,
    thread,
    trainer,
    variables,
)

__all__ = (
    "compiling",
    "data",
    "devices",
    "input_clock",
    "layers",
    "losses",
    "memory",
    "optimizer",
    "padding",
    "recomputation",
    "saving",
    "thread",
    "trainer",
    "variables",
)
