"""Trains in float64 with SGD, on workers that are lost when there are three.

    elastic.py DIRECTORY

Each worker kills itself after the updates that are its own in `kills`. The chief leaves the weights
in DIRECTORY/end.npy, and prints "N workers, update U" after each update.
"""

import json
import os
import pathlib
import signal
import sys

import keras
import numpy as np

import tfbig

# (Number of workers, index) -> after which updates the worker kills itself, each in one start only.
KILLS = {(3, 1): (4, 7), (2, 1): (10,)}
UPDATES = 16


class Killed(keras.callbacks.Callback):
    """Kills this worker, and remembers in a directory that it has done so."""

    def __init__(self, directory, workers, index):
        super().__init__()
        self.directory, self.workers, self.index = directory, workers, index

    def on_train_batch_end(self, batch, logs=None):
        update = int(self.model.optimizer.iterations.numpy())
        if self.index == 0:
            print(f"{self.workers} workers, update {update}", flush=True)
        done = self.directory / f"killed {update}"
        if update in KILLS.get((self.workers, self.index), ()) and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(directory):
    directory = pathlib.Path(directory)
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(1)
    config = json.loads(os.environ.get("TF_CONFIG", "{}"))
    workers = len(config["cluster"]["worker"]) if config else 1
    index = config["task"]["index"] if config else 0
    strategy = tfbig.distribute.get_strategy(timeout=60)
    with strategy.scope():
        model = tfbig.Sequential(
            [keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)],
            gradient_accumulation_steps=2,
        )
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(60, 2))
    callbacks = [
        tfbig.callbacks.BackupAndRestore(directory / "backup", 2),
        Killed(directory, workers, index),
    ]
    # The last of the 4 batches of an epoch has 12 samples.
    model.fit(x, y, batch_size=16, epochs=UPDATES // 4, callbacks=callbacks, verbose=0)
    if tfbig.distribute.is_chief(strategy):
        np.save(directory / "end.npy", np.concatenate([w.ravel() for w in model.get_weights()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
