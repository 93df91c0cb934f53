"""Callbacks of the chief and backups, with state that is divided over the workers.

    sharded_callbacks.py DIRECTORY

Leaves what was raised and warned of; the chief writes in DIRECTORY/files. Ends with exit code 7.
"""

import errno
import pathlib
import sys
import time
import warnings

import keras
import numpy as np

import tfbig
from tests import job
from tfbig import _keras
from tfbig._keras import workers_together
from tfbig.callbacks import _backup, _backup_files
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


def backups(divided, directory, is_chief):
    """Backs up in parts; leaves the last one in DIRECTORY/backup, and its state in state.npz."""
    result = {"joined": 0, "begun": 0}
    joined, write = workers_together.joined, _backup_files.write_archive

    def counted(*args):
        result["joined"] += 1
        return joined(*args)

    def failing(path, members):
        result["begun"] += 1
        if result["begun"] == (3 if is_chief else 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, members)

    workers_together.joined = counted
    # The second of five cannot be written by the other worker, the third by the chief.
    _backup_files.write_archive = failing
    full = directory / "full"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(divided(), [Look(3, full, result), tfbig.callbacks.BackupAndRestore(full, 1)], epochs=1)
    result["said"] = [str(w.message) for w in caught if "could not be written" in str(w.message)]
    result["left"] = len(list(full.iterdir()))

    # In the background, where the other worker writes only once it may.
    may_write = directory / "may write"

    def held(path, members):
        while not is_chief and not may_write.exists():
            time.sleep(0.02)
        write(path, members)

    _backup_files.write_archive = held
    model = divided()
    backup = tfbig.callbacks.BackupAndRestore(
        directory / "backup", 2, save_on_background=True, delete_checkpoint=False
    )
    fit(model, [Release(directory / "backup", may_write, is_chief, result), backup], epochs=1)
    _backup_files.write_archive, workers_together.joined = write, joined
    state = _keras.variables.values_of(_backup.State(model).variables)
    if is_chief:
        np.savez(directory / "state.npz", *state)
    return result


class Look(keras.callbacks.Callback):
    """Says what lies in a directory before a batch."""

    def __init__(self, batch, directory, result):
        super().__init__()
        self.batch, self.directory, self.result = batch, directory, result

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.batch:
            self.result["files"] = sorted(path.name for path in self.directory.iterdir())


class Release(keras.callbacks.Callback):
    """Lets the other worker write in the second update after the backup."""

    def __init__(self, directory, may_write, is_chief, result):
        super().__init__()
        self.path, self.may_write = directory / "backup.npz", may_write
        self.is_chief, self.result = is_chief, result

    def on_train_batch_end(self, batch, logs=None):
        if not self.is_chief or batch != 3:
            return
        # The chief has written its part.
        deadline = time.monotonic() + 30
        while not list(self.path.parent.glob(".*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        self.result["before"] = self.path.exists()
        self.may_write.touch()
        while not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.result["after"] = self.path.exists()


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

    result["backups"] = backups(divided, directory, is_chief)

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
