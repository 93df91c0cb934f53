"""What Keras and `tf.distribute` do wrong for tfbig, and what is done about it.

No other package imports `keras.src`. Every workaround states its reason. docs/keras.md lists the
defects, and which of them `tests/keras_defects/canaries_test.py` demonstrates; it fails once
upstream mends one. There is one module for each concern: `_keras.losses.metrics_results`.
"""

import keras

from tfbig import _backend

_backend.check(keras.backend.backend())

from tfbig._keras import (
    batches,
    building,
    chunked_attention,
    chunked_head,
    collectives,
    compiling,
    datasets,
    devices,
    epoch_iterator,
    finished_iterators,
    gradients,
    graph_errors,
    input_clock,
    layers,
    learning_rate_factor,
    losses,
    memory,
    optimizer,
    padding,
    pipelined_loop,
    recomputation,
    replica_step,
    resized_batches,
    saving,
    scaled_updates,
    sharded_optimizer,
    sharded_variable,
    shuffling,
    stage_clock,
    stages,
    start,
    step_function,
    thread,
    trainer,
    variable_identity,
    variables,
    work,
    workers_together,
)

__all__ = (
    "batches",
    "building",
    "chunked_attention",
    "chunked_head",
    "collectives",
    "compiling",
    "datasets",
    "devices",
    "epoch_iterator",
    "finished_iterators",
    "gradients",
    "graph_errors",
    "input_clock",
    "layers",
    "learning_rate_factor",
    "losses",
    "memory",
    "optimizer",
    "padding",
    "pipelined_loop",
    "recomputation",
    "replica_step",
    "resized_batches",
    "saving",
    "scaled_updates",
    "sharded_optimizer",
    "sharded_variable",
    "shuffling",
    "stage_clock",
    "stages",
    "start",
    "step_function",
    "thread",
    "trainer",
    "variable_identity",
    "variables",
    "work",
    "workers_together",
)
