"""Trains with two stages on each worker.

    staged.py DIRECTORY OPTIMIZER...

Leaves the deviations from plain Keras on one device, and where the variables of each stage lie.
"""

import sys
import warnings

import keras
import numpy as np
import tensorflow as tf

import tfbig
from tests import job
from tests.update import pipeline_test as suite
from tfbig._keras import variables


def trained(cls, optimizer, strategy, **options):
    keras.utils.set_random_seed(1)
    make, x, y, _ = suite.PROGRAMS["masks"]
    with strategy.scope():
        model = make(cls, **options)
        model.compile(suite.OPTIMIZERS[optimizer](), suite.crossentropy())
    history = model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0).history
    evaluated = model.evaluate(x, y, batch_size=12, verbose=0)
    values = variables.values_of([*model.variables, *model.optimizer.variables])
    return model, [*values, evaluated, *history.values()]


def main(directory, *optimizers):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    keras.config.set_floatx("float64")
    warnings.filterwarnings("ignore", "`gradient_accumulation_steps` is larger")
    strategy = tfbig.distribute.get_strategy(timeout=60)
    deviations, devices = {}, {}
    for optimizer in optimizers:
        pipeline = tfbig.distribute.Pipeline(["CPU:0", "CPU:1"])
        options = {"pipeline": pipeline, "gradient_accumulation_steps": 3}
        model, found = trained(tfbig.Model, optimizer, strategy, **options)
        _, expected = trained(keras.Model, optimizer, tf.distribute.OneDeviceStrategy("CPU:0"))
        deviations[optimizer] = max(
            float(np.max(np.abs(np.subtract(a, b, dtype=float))))
            for a, b in zip(found, expected, strict=True)
        )
        devices = {k: sorted(v) for k, v in suite.devices_of(model).items()}
    job.leave(directory, {"deviations": deviations, "devices": devices})


if __name__ == "__main__":
    main(*sys.argv[1:])
