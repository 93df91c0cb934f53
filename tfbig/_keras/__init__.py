"""What Keras and `tf.distribute` do wrong for tfbig, and what is done about it.

No other package touches `keras.src` or a private Keras name. Every workaround states its reason;
`tests/keras_defects/canaries_test.py` demonstrates each defect, and fails once upstream mends it.
There is one module for each concern: `_keras.losses.metrics_results`.
"""

import keras

from tfbig import _backend

_backend.check(keras.backend.backend())

from tfbig._keras import (
    batches,
    building,
    compiling,
    datasets,
    devices,
    epoch_iterator,
    graph_errors,
    input_clock,
    layers,
    losses,
    memory,
    optimizer,
    padding,
    recomputation,
    replica_step,
    saving,
    shuffling,
    step_function,
    thread,
    trainer,
    variables,
)

__all__ = (
    "batches",
    "building",
    "compiling",
    "datasets",
    "devices",
    "epoch_iterator",
    "graph_errors",
    "input_clock",
    "layers",
    "losses",
    "memory",
    "optimizer",
    "padding",
    "recomputation",
    "replica_step",
    "saving",
    "shuffling",
    "step_function",
    "thread",
    "trainer",
    "variables",
)
