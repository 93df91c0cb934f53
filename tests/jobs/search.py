"""Searches on several workers, which train each trial together.

search.py DIRECTORY
"""

import pathlib
import sys

import keras
import numpy as np
import optuna

import tfbig
from tests import job

TRIALS = 3


class PruneSecond(optuna.pruners.BasePruner):
    """Stops the second trial after an epoch; only the chief asks it."""

    def prune(self, study, trial):
        return trial.number == 1


def main(directory):
    directory = pathlib.Path(directory)
    strategy = tfbig.distribute.get_strategy(timeout=60)
    trained = []

    def build(hp):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        rate = hp.Float("rate", 1e-4, 1e-1, sampling="log")
        model.compile(keras.optimizers.SGD(rate), "mse")
        return model

    class Note(keras.callbacks.Callback):
        def __deepcopy__(self, memo):
            return self

        def on_train_begin(self, logs=None):
            replicas = self.model.distribute_strategy.num_replicas_in_sync
            trained.append([float(self.model.optimizer.learning_rate.numpy()), replicas])

    tuner = tfbig.tuners.RandomSearch(
        build,
        "val_loss",
        TRIALS,
        seed=0,
        pruner=PruneSecond,
        directory=directory,
        project_name="shared",
        distribution_strategy=strategy,
        overwrite=True,
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)), rng.normal(size=(16, 1))
    tuner.search(
        x, y, validation_data=(x, y), batch_size=8, epochs=3, verbose=0, callbacks=[Note()]
    )
    statuses = [t.status for t in tuner.oracle.trials.values()]
    best = tuner.get_best_hyperparameters()[0].values
    job.leave(directory, {"trained": trained, "best": best, "statuses": statuses})


if __name__ == "__main__":
    main(*sys.argv[1:])
