"""The history of a run: the logs of each epoch, and history.csv."""

import csv
import math
import time

import command_line
import keras


class Recorder(keras.callbacks.Callback):
    """Keeps what the table and the curves need, and writes history.csv.

    Args:
        path: Where to. None: nowhere.
        all_epochs: int, epochs of the whole run.
        measure: str, a name that is in the logs of each epoch.
        goes_on: bool, whether the file holds the epochs so far.

    Attributes:
        epochs: list of dict, the logs of each epoch and its number, "epoch"; None before the
            first. Those before a backup are missing where there is no file.
        scales: list of (updates tried, loss scale, skipped updates).
        seconds: list of float, of training, without validation, per epoch.

    Raises:
        UsageError: If the epochs so far cannot be read.
    """

    def __init__(self, path, all_epochs, measure, goes_on):
        super().__init__()
        self.path, self.all_epochs = path, all_epochs
        self._before = _read(path, measure) if path and goes_on else []
        self.epochs = None
        self.scales = []
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        if self.epochs is None:
            # What came after the backup is done again.
            self.epochs = [logs for logs in self._before if logs["epoch"] < epoch]
        self._began, self._ended = time.perf_counter(), None

    def on_train_end(self, logs=None):
        if self.epochs is None:  # All were complete.
            self.epochs = self._before

    def is_complete(self):
        """Whether the last epoch is there."""
        return bool(self.epochs) and self.epochs[-1]["epoch"] == self.all_epochs - 1

    def on_train_batch_end(self, batch, logs=None):
        self._ended = time.perf_counter()
        if "loss_scale" in logs:
            skipped = int(logs["skipped_updates"])
            self.scales.append((updates(self.model) + skipped, float(logs["loss_scale"]), skipped))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append({"epoch": epoch} | {k: float(v) for k, v in logs.items()})
        if self._ended is not None:
            self.seconds.append(self._ended - self._began)
        if self.path is not None:
            _write(self.path, self.epochs)


def updates(model):
    """Updates of a model so far."""
    # int() of a Keras variable fails under MirroredStrategy (Keras 3.15).
    return int(model.optimizer.iterations.numpy())


def _read(path, measure):
    """The epochs in history.csv; none where there is no file."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, restval=math.nan))
        epochs = [
            {"epoch": int(row.pop("epoch"))} | {k: float(v) for k, v in row.items()} for row in rows
        ]
        numbers = [logs["epoch"] for logs in epochs]
        if numbers != sorted(set(numbers)) or not all(measure in logs for logs in epochs):
            raise ValueError(f"it has no {measure}, or its epochs are not in order")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
        raise command_line.UsageError(
            f"{path} holds the epochs so far, and cannot be read ({type(e).__name__}: {e}). Move "
            "it away to go on without them."
        ) from None
    return epochs


def _write(path, epochs):
    # Whole, and in one step: a run may be killed at any time, and go on.
    temporary = path.with_suffix(".tmp")
    names = dict.fromkeys(name for logs in epochs for name in sorted(logs.keys() - {"epoch"}))
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["epoch", *names], restval=math.nan)
        writer.writeheader()
        writer.writerows(epochs)
    temporary.replace(path)
