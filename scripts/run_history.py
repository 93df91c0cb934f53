"""The history of a run: the logs of each epoch, and history.csv."""

import csv
import time

import keras


class Recorder(keras.callbacks.Callback):
    """Keeps what the table and the curves need, and writes history.csv.

    Args:
        path: Where to; of a run that goes on, it holds the epochs so far. None: nowhere.
        all_epochs: int, epochs of the whole run.

    Attributes:
        epochs: list of dict, the logs of each epoch; None before the first.
        scales: list of (updates tried, loss scale, skipped updates).
        seconds: list of float, of training, without validation, per epoch.
    """

    def __init__(self, path, all_epochs):
        super().__init__()
        self.path, self.all_epochs = path, all_epochs
        self.epochs = None
        self.scales = []
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        if self.epochs is None:
            self.epochs = _read(self.path, epoch)
        self._began, self._ended = time.perf_counter(), None

    def on_train_end(self, logs=None):
        if self.epochs is None:  # All were complete.
            self.epochs = _read(self.path, self.all_epochs)

    def on_train_batch_end(self, batch, logs=None):
        self._ended = time.perf_counter()
        if "loss_scale" in logs:
            skipped = int(logs["skipped_updates"])
            self.scales.append((updates(self.model) + skipped, float(logs["loss_scale"]), skipped))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append({k: float(v) for k, v in logs.items()})
        if self._ended is not None:
            self.seconds.append(self._ended - self._began)
        if self.path is not None:
            _write(self.path, self.epochs)


def updates(model):
    """Updates of a model so far."""
    # int() of a Keras variable fails under MirroredStrategy (Keras 3.15).
    return int(model.optimizer.iterations.numpy())


def _read(path, epochs):
    """The logs of the first epochs in history.csv; fewer if it holds fewer."""
    if path is None or not epochs or not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))[:epochs]
    return [{k: float(v) for k, v in row.items() if k != "epoch"} for row in rows]


def _write(path, epochs):
    # Whole, and in one step: a run may be killed at any time, and go on.
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *sorted(epochs[-1])])
        writer.writeheader()
        writer.writerows({"epoch": i, **logs} for i, logs in enumerate(epochs))
    temporary.replace(path)
