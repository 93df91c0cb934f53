"""Measures pipelines in a process of its own: how long stages wait, and what memory they take.

    stages.py times|memory|cores

Prints a line of JSON. Layers that hold their device and sleep take a thread each, as those of
accelerators do not, so that TensorFlow needs more threads than there are cores. "cores" is about
layers that compute: two stages on two cores against one stage after the other, in two processes
that take turns, so that other load on the machine slows both.
"""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import layers

FORWARD, BACKWARD = 0.03, 0.06


class Device:
    """Runs one pass at a time, and counts the micro-batches that it holds."""

    def __init__(self):
        self.lock = threading.Lock()
        self.counts = threading.Lock()
        self.held = self.most = 0

    def run(self, value, seconds, change):
        with self.counts:
            self.held += max(0, change)
            self.most = max(self.most, self.held)
        with self.lock:
            time.sleep(seconds)
        with self.counts:
            self.held += min(0, change)
        return value


class Busy(layers.Layer):
    """Holds its device for a while in the forward pass, and twice as long in the backward pass."""

    def __init__(self, device, part=1.0):
        super().__init__()
        self.device = device
        self.part = part

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        def run(x, seconds, change):
            y = tf.numpy_function(
                lambda x: self.device.run(x, seconds, change), [x], x.dtype, stateful=False
            )
            return tf.ensure_shape(y, x.shape)

        @tf.custom_gradient
        def passes(x):
            forward, backward = self.part * FORWARD, self.part * BACKWARD
            return run(x, forward, 1), lambda upstream: run(upstream, backward, -1)

        return passes(x * self.scale)


class Branching(layers.Layer):
    """A conditional that reads a weight, for which TensorFlow would have iterations wait."""

    def build(self, shape):
        self.shift = self.add_weight(shape=(shape[-1],))

    def call(self, x):
        return tf.cond(
            tf.reduce_sum(x) > 1e9,
            lambda: x * tf.convert_to_tensor(self.shift),
            lambda: x + tf.convert_to_tensor(self.shift),
        )


class Asserting(layers.Layer):
    def call(self, x):
        tf.debugging.assert_less(tf.reduce_max(x), 1e9)
        return x


class Calling(layers.Layer):
    """A function with side effects, for which iterations must wait."""

    def call(self, x):
        sum_of_all = tf.numpy_function(np.sum, [x], x.dtype)
        return x + 0 * tf.ensure_shape(sum_of_all, [])


def pipeline_on(number, **kwargs):
    import tfbig

    return tfbig.distribute.Pipeline([f"CPU:{i}" for i in range(number)], **kwargs)


def busy(number, micro_batches, last=None, **kwargs):
    """The least time of an update over the ideal of GPipe, and what each stage held at most."""
    import tfbig

    devices = [Device() for _ in range(number)]
    pipeline = pipeline_on(number, **kwargs)
    x = h = keras.Input((4,))
    for i, device in enumerate(devices):
        with pipeline.stage(i):
            h = Busy(device)(h)
            if last is not None and i == number - 1:
                h = last()(h)
    model = tfbig.Model(x, h, gradient_accumulation_steps=micro_batches, pipeline=pipeline)
    model.compile("sgd", "mse")
    batch = np.ones((micro_batches, 4), "float32")
    model.train_on_batch(batch, batch)
    least = float("inf")
    # Another process may take the cores meanwhile.
    for _ in range(6):
        begin = time.perf_counter()
        model.train_on_batch(batch, batch)
        least = min(least, time.perf_counter() - begin)
    passes = micro_batches + number - 1
    ideal = passes * (FORWARD + BACKWARD)
    held = [d.most for d in devices]
    prediction = None if last is not None else of_prediction(model, batch) / (passes * FORWARD)
    failed = False
    if last is Asserting:
        try:
            model.train_on_batch(batch * 1e10, batch)
        except tf.errors.InvalidArgumentError:
            failed = True
    bubbles = [] if last is not None else bubbles_of(model, batch)
    return {
        "ratio": least / ideal,
        "prediction": prediction,
        "held": held,
        "failed": failed,
        "bubbles": bubbles,
    }


def of_prediction(model, batch):
    """The least time of a prediction."""
    model.predict_on_batch(batch)
    least = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        model.predict_on_batch(batch)
        least = min(least, time.perf_counter() - begin)
    return least


def bubbles_of(model, batch):
    """What the monitor measures in each of several updates."""
    import tfbig

    with tempfile.TemporaryDirectory() as directory:
        options = {"frequency": 1, "plot": False, "tensorboard": False}
        monitor = tfbig.callbacks.TrainingMonitor(directory, **options)
        data = np.tile(batch, (5, 1))
        model.fit(data, data, batch_size=len(batch), verbose=0, callbacks=[monitor])
    return [row["bubble"] for row in monitor.rows]


def times():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {
            "2": busy(2, 6),
            "4": busy(4, 12),
            "one in flight": busy(2, 6, in_flight=1),
            "branching": busy(4, 8, Branching),
            "asserting": busy(4, 8, Asserting),
            "calling": busy(4, 8, Calling),
        }
    return found | {
        "warnings": [str(w.message) for w in caught if "side effects" in str(w.message)]
    }


def memory():
    """Bytes that an update takes at its peak, by micro-batches and by how many are in flight."""
    import tfbig
    from tfbig._keras.memory import Meter

    width, samples = 64, 2048
    meter = Meter(["CPU:0"])

    def taken(micro_batches, in_flight, recompute=None, expected=float("inf")):
        pipeline = pipeline_on(2, in_flight=in_flight)
        # Small data and weights, large activations: 12 MiB of a micro-batch on each stage.
        x = h = keras.Input((1,))
        for i in range(2):
            with pipeline.stage(i):
                h = keras.Sequential([layers.Dense(width, "tanh") for _ in range(24)])(h)
                # So long that the threads get as far as they may.
                h = Busy(Device(), 0.3)(h)
                h = layers.Dense(1)(h) if i else h
        model = tfbig.Model(
            *(x, h),
            gradient_accumulation_steps=micro_batches,
            pipeline=pipeline,
            recompute=recompute,
        )
        model.compile("sgd", "mse")
        batch = np.ones((micro_batches * samples, 1), "float32")
        model.train_on_batch(batch, batch)
        update = functools.partial(model.train_on_batch, batch, batch)
        # What is dropped at once may wait for a thread, and counts as well: updates differ, and
        # the more micro-batches, the more often it happens.
        found = [meter(update) for _ in range(5)]
        if expected is None:
            return statistics.median(found)
        while min(found) > expected and len(found) < 20:
            found.append(meter(update))
        return min(found)

    few = taken(4, 3, expected=None)
    return {
        "micro_batches": {4: few} | {k: taken(k, 3, expected=1.03 * few) for k in (8, 16, 32)},
        "in_flight": {n: taken(16, n) for n in (1, 2, 4)},
        "recomputed": taken(16, 4, recompute=lambda layer: isinstance(layer, keras.Sequential)),
    }


def cores(rounds=15):
    """Seconds of an update: of two stages at the same time, and of one after the other."""
    command = [sys.executable, __file__, "computing"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([*command, f"{n}"], **pipes)) for n in (2, 1)
        ]
        for process in processes:
            stack.callback(process.kill)
        taken = []
        for i in range(rounds):
            pair = {}
            # Each comes first as often as the other.
            for process in processes if i % 2 else reversed(processes):
                process.stdin.write("update\n")
                pair[process] = float(process.stdout.readline())
            taken.append([pair[process] for process in processes])
    together, in_turn = zip(*taken[1:], strict=True)
    return {
        "ratio": statistics.median(a / b for a, b in taken[1:]),
        "together": together,
        "in turn": in_turn,
        "load": os.getloadavg(),
    }


def computing(threads):
    """For each line that it reads, makes an update of two stages, and prints how long it took.

    Args:
        threads: how many stages compute at the same time, each with one thread.
    """
    import tfbig

    tf.config.threading.set_inter_op_parallelism_threads(threads)
    pipeline = pipeline_on(2, in_flight=None if threads > 1 else 1)
    x = h = keras.Input((768,))
    for i in range(2):
        with pipeline.stage(i):
            for _ in range(4):
                h = layers.Dense(768, "relu")(h)
    model = tfbig.Model(x, h, gradient_accumulation_steps=16, pipeline=pipeline)
    model.compile("sgd", "mse")
    batch = np.ones((16 * 64, 768), "float32")
    model.train_on_batch(batch, batch)
    for _ in sys.stdin:
        begin = time.perf_counter()
        model.train_on_batch(batch, batch)
        print(time.perf_counter() - begin, flush=True)


def main(what, *arguments):
    tf.config.threading.set_inter_op_parallelism_threads(16)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )
    if what == "computing":
        computing(*map(int, arguments))
    else:
        print(json.dumps({"times": times, "memory": memory, "cores": cores}[what]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
