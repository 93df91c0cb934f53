"""Leaves the loss of each batch of a shuffled PyDataset; that of batch i is the square of i.

shuffled.py DIRECTORY SEEDED
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import tfbig
from tests import job

BATCHES = 8


class Batches(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return BATCHES

    def __getitem__(self, index):
        return np.full((2, 1), float(index)), np.zeros((2, 1))


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(logs["loss"])


def main(directory, seeded):
    strategy = tfbig.distribute.get_strategy(timeout=60)
    if seeded == "keras":
        keras.utils.set_random_seed(1)
    elif seeded == "tensorflow":
        tf.random.set_seed(1)
    with strategy.scope():
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = tfbig.Sequential([keras.Input((1,)), dense])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    losses = Losses()
    model.fit(Batches(), epochs=2, shuffle=True, verbose=0, callbacks=[losses])
    job.leave(directory, losses.seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
