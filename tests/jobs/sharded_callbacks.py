"""Callbacks of the chief and backups, with state that is divided over the workers.

    sharded_callbacks.py DIRECTORY

Leaves what was raised and warned of; the chief writes in DIRECTORY/files. Ends with exit code 7.
"""

import errno
import pathlib
import sys
import warnings

import keras
import numpy as np

import tfbig
from tests import job
from tfbig.distribute import _sharded_weights

BATCH, EPOCHS = 8, 3


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 3)), rng.normal(size=(40, 2))


def compiled(base=keras.Sequential, **options):
    keras.utils.set_random_seed(3)
    model = base([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)], **options)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def checkpoints(directory):
    """Those of all kinds; the loss is that of the training data, which decreases."""
    make = keras.callbacks.ModelCheckpoint
    return [
        make(directory / "{epoch}-{loss:.3f}.keras"),
        make(directory / "best.keras", monitor="loss", save_best_only=True),
        # The other way round, it saves after the first epoch only.
        make(directory / "worst.keras", monitor="loss", mode="max", save_best_only=True),
        make(directory / "{epoch}.weights.h5", save_weights_only=True),
        # 5 batches an epoch: after batches 3, 1 and 4, 2 and 5.
        make(directory / "{epoch}_{batch}.keras", save_freq=3),
    ]


def fit(model, callbacks, epochs=EPOCHS):
    return model.fit(
        *data(), batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    )


def raised(model, *callbacks):
    """The error that a `fit` raises, and its text."""
    try:
        fit(model, callbacks, epochs=1)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


class DivideByZero(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise ZeroDivisionError


def main(directory):
    directory = pathlib.Path(directory)
    keras.config.set_floatx("float64")
    _sharded_weights.SMALLEST = 1
    strategy = tfbig.distribute.get_strategy(timeout=60)
    is_chief = tfbig.distribute.is_chief(strategy)

    def divided():
        with strategy.scope():
            return compiled(tfbig.Sequential, shard="weights", gradient_accumulation_steps=2)

    model, result, read = divided(), {}, []
    reader = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: read.append(model.optimizer.variables[2].numpy())
    )
    files = tfbig.callbacks.ChiefOnly(checkpoints(directory / "files"), reader)
    fit(model, [files])
    result["read"] = len(read)

    # A backup that cannot be written: the others read all of it nevertheless.
    write_array, written = np.lib.format.write_array, []

    def full_disk(*args, **kwargs):
        written.append(1)
        if len(written) % 7 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_array(*args, **kwargs)

    np.lib.format.write_array = full_disk
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(divided(), [tfbig.callbacks.BackupAndRestore(directory / "backup", 2)], epochs=1)
    np.lib.format.write_array = write_array
    result["not written"] = sum("could not be written" in str(w.message) for w in caught)

    def read_state(*_, **__):
        model.optimizer.variables[2].numpy()

    chief_only = tfbig.callbacks.ChiefOnly
    alone = chief_only(keras.callbacks.LambdaCallback(on_epoch_begin=print))
    result["on one worker"] = raised(model, *([alone] if is_chief else []))
    result["error on the chief"] = raised(divided(), chief_only(DivideByZero()))
    # The last: the chief raises, and the other waits for its gradients until the job ends.
    in_batches = chief_only(keras.callbacks.LambdaCallback(on_train_batch_end=read_state))
    if is_chief:
        result["in batches"] = raised(model, in_batches)
        job.leave(directory, result)
        sys.exit(7)
    job.leave(directory, result)
    fit(model, [in_batches], epochs=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
