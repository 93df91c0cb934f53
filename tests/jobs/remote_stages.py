"""Trains with stages in other processes, one of which dies.

remote_stages.py            starts two servers, and prints a line of JSON
remote_stages.py CLUSTER i  is one of them
"""

import contextlib
import json
import socket
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers

SERVERS = 2


def serve(cluster, index):
    server = tf.distribute.Server(
        tf.train.ClusterSpec(json.loads(cluster)), job_name="worker", task_index=int(index)
    )
    print("ready", flush=True)
    server.join()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def build(cls, **options):
    keras.utils.set_random_seed(1)
    x = h = keras.Input((16,))
    for _ in range(3):
        h = layers.Dense(16, "gelu")(h)
    model = cls(x, layers.Dense(4)(h), **options)
    model.compile(keras.optimizers.AdamW(0.01, global_clipnorm=0.5), "mse", metrics=["mae"])
    return model


def train():
    import tfbig

    with contextlib.ExitStack() as stack:
        cluster = {"worker": [f"127.0.0.1:{free_port()}" for _ in range(SERVERS)]}
        servers = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(cluster), str(i)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for i in range(SERVERS)
        ]
        for server in servers:
            stack.callback(server.kill)
        for server in servers:
            assert server.stdout.readline() == b"ready\n"
        tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(cluster))
        keras.config.set_floatx("float64")
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(96, 16)), rng.normal(size=(96, 4))
        devices = [f"/job:worker/task:{i}/device:CPU:0" for i in range(SERVERS)]
        pipeline = tfbig.distribute.Pipeline(devices)
        plain = build(keras.Model)
        model = build(tfbig.Model, pipeline=pipeline, gradient_accumulation_steps=4)
        values = []
        for m in (plain, model):
            history = m.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0).history
            values.append([*m.get_weights(), m.predict(x, verbose=0), *history.values()])
        result = {
            "deviation": max(
                float(np.abs(np.subtract(a, b)).max()) for a, b in zip(*values, strict=True)
            ),
            "devices": sorted({v.value.device for v in model.trainable_variables}),
        }
        servers[1].kill()
        servers[1].wait()
        try:
            model.fit(x, y, batch_size=32, verbose=0)
        except tf.errors.UnavailableError as e:
            result["error"] = type(e).__name__
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        serve(*sys.argv[1:])
    else:
        train()
