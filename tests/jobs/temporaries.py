"""Compiles an update as a whole; prints the bytes of temporary memory that XLA plans for it.

temporaries.py DIRECTORY [STEPS...]

For each number of micro-batches, and last for the whole batch of the last number. What XLA
plans is read from the reports that it writes into DIRECTORY.
"""

import json
import os
import pathlib
import re
import sys

os.environ["XLA_FLAGS"] = f"--xla_dump_to={sys.argv[1]} --xla_dump_hlo_as_text"

import keras
import tensorflow as tf

import tfbig
from tfbig import _keras

WIDTH, MICRO_BATCH_SIZE, LAYERS = 64, 1024, 6


def compile_update(samples, steps, name):
    """Compiles and runs one update, as a program of this name."""
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        inner = [keras.layers.Dense(WIDTH, "tanh") for _ in range(LAYERS)]
        # With the norm of the gradient it is tfbig's step, also where it is not split.
        model = tfbig.Sequential(
            [keras.Input((WIDTH,)), *inner], gradient_accumulation_steps=steps, log_grad_norm=True
        )
        model.compile("sgd", "mse")
        model.optimizer.build(model.trainable_variables)
        spec = tf.TensorSpec([samples, WIDTH], "float32")
        _keras.building.build_for(model, (spec, spec))

    def update(x):
        with _keras.devices.compiled_as_a_whole():
            return strategy.run(model.train_step, args=((x, x),))

    update.__name__ = name
    tf.function(update, jit_compile=True, autograph=False)(tf.zeros([samples, WIDTH]))


def temporaries(directory, name):
    """The size of the temporary allocation of a program, from XLA's report."""
    (path,) = pathlib.Path(directory).glob(f"*inference_{name}_*memory-usage-report.txt")
    sizes = re.findall(r"size ([\d.]+)(B|KiB|MiB|GiB), preallocated-temp", path.read_text())
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return max(float(size) * units[unit] for size, unit in sizes)


def main(directory, *counts):
    counts = [int(k) for k in counts]
    programs = [(f"steps{k}_end", k * MICRO_BATCH_SIZE, k) for k in counts]
    programs.append(("whole_end", counts[-1] * MICRO_BATCH_SIZE, 1))
    for name, samples, steps in programs:
        compile_update(samples, steps, name)
    print(json.dumps([temporaries(directory, name) for name, *_ in programs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
