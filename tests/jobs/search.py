"""Searches on several workers, which train each trial together.

search.py DIRECTORY

In the second search, weights and the state of optimizers are divided over the workers.
"""

import pathlib
import sys

import keras
import numpy as np
import optuna

import tfbig
from tests import job
from tfbig.distribute import _sharded_weights

TRIALS = 3


class PruneSecond(optuna.pruners.BasePruner):
    """Stops the second trial after an epoch; only the chief asks it."""

    def prune(self, study, trial):
        return trial.number == 1


def divided(directory, strategy, data):
    """Scores of a search that divides state and weights, and losses of its best models."""

    class Search(tfbig.tuners.ASHA):
        def on_trial_end(self, trial):
            super().on_trial_end(trial)
            ended.append(trial.status)

    def build(hp):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
        model.compile(keras.optimizers.Adam(hp.Choice("rate", [0.01, 0.1])), "mse")
        return model

    ended = []
    tuner = Search(
        build,
        "val_loss",
        max_trials=2,
        max_epochs=2,
        factor=2,
        seed=0,
        directory=directory,
        project_name="divided",
        distribution_strategy=strategy,
        overwrite=True,
        shard="weights",
    )
    checkpoint = keras.callbacks.ModelCheckpoint(
        directory / "{epoch}_{batch}.weights.h5", save_freq=2, save_weights_only=True
    )
    callbacks = [tfbig.callbacks.ChiefOnly(checkpoint)]
    tuner.search(*data, validation_data=data, batch_size=8, verbose=0, callbacks=callbacks)
    scores = [trial.score for trial in tuner.oracle.get_best_trials(2)]
    models = tuner.get_best_models(2)
    losses = [model.evaluate(*data, batch_size=8, verbose=0) for model in models]
    return {"ended": ended, "scores": scores, "losses": losses}


def main(directory):
    directory = pathlib.Path(directory)
    _sharded_weights.SMALLEST = 1
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
    job.leave(
        directory,
        {
            "trained": trained,
            "best": best,
            "statuses": statuses,
            "divided": divided(directory, strategy, (x, y)),
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
