"""Trains, evaluates, predicts and saves as users do; what is written, the chief writes.

chief.py DIRECTORY
"""

import pathlib
import sys
import warnings

import keras
import numpy as np
import tensorflow as tf

import tfbig
from tests import job


class WithMetric(tfbig.Sequential):
    """Holds a metric of its own, whose replicas must not be read when it is saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.largest = keras.metrics.Mean(name="largest")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.largest.update_state(keras.ops.max(y_pred, axis=-1))
        return super().compute_metrics(x, y, y_pred, sample_weight)


class OwnStep(tfbig.Sequential):
    """A step of the user, in which no request to stop travels."""

    def train_step(self, data):
        return super().train_step(data)


def main(directory):
    directory = pathlib.Path(directory)
    keras.config.set_floatx("float64")
    # No seed is set: the workers agree on one.
    strategy = tfbig.distribute.get_strategy(timeout=60)
    with strategy.scope():
        model = WithMetric(
            [
                keras.Input((3,)),
                # Draws a seed of its own on each worker.
                keras.layers.GaussianNoise(0.1),
                keras.layers.Dense(4, "tanh"),
                keras.layers.BatchNormalization(),
            ],
            micro_batch_size=2,
        )
        model.compile("adam", "mse", metrics=["mae"], steps_per_execution=2)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(26, 3)), rng.normal(size=(26, 4))
    files = tfbig.callbacks.ChiefOnly(
        keras.callbacks.ModelCheckpoint(directory / "best.keras", save_best_only=True),
        keras.callbacks.CSVLogger(directory / "log.csv"),
    )
    stopping = keras.callbacks.EarlyStopping(patience=1, min_delta=10)
    callbacks = [files, stopping]
    if tfbig.distribute.is_chief(strategy):
        # The other way to leave something to the chief.
        callbacks.append(keras.callbacks.CSVLogger(directory / "own.csv"))
    history = model.fit(
        x, y, batch_size=8, epochs=5, validation_split=0.25, callbacks=callbacks, verbose=0
    )
    logs = model.train_on_batch(x[:7], y[:7], return_dict=True)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(dataset.with_options(options), verbose=0)
        model.fit(dataset.shard(2, 0).with_options(options), verbose=0)
    result = {
        "epochs": history.epoch,
        "history": history.history,
        "on_batch": {k: float(v) for k, v in logs.items()},
        "evaluation": model.evaluate(x, y, batch_size=7, return_dict=True, verbose=0),
        "prediction": model.predict(x, batch_size=7, verbose=0).tolist(),
        "on_batch_prediction": model.predict_on_batch(x[:5]).tolist(),
        "iterations": int(model.optimizer.iterations.numpy()),
        "same samples": sum("hand every worker the same samples" in str(w.message) for w in caught),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with strategy.scope():
            own = OwnStep([keras.Input((3,)), keras.layers.Dense(4)])
            own.compile("sgd", "mse")
        backup = tfbig.callbacks.BackupAndRestore(directory / "backup")
        own.fit(x, y, batch_size=8, verbose=0, callbacks=[backup])
    result["left alone"] = sum("leaves SIGTERM alone" in str(w.message) for w in caught)
    if tfbig.distribute.is_chief(strategy):
        # Also without a callback, and without waiting for the others.
        model.save(directory / "last.keras")
    job.leave(directory, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
