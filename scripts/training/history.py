"""The history of a run: the logs of each epoch, and history.csv."""

from __future__ import annotations

import csv
import math
import pathlib
import time
from typing import Any

import command_line
import keras


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Keeps what the table and the curves need, and writes history.csv.

    Args:
        path: Of history.csv. None: it is not written.
        all_epochs: Epochs of the whole run.
        measure: A name that is in the logs of each epoch.
        resumes: Whether the file holds the epochs so far.

    Attributes:
        epochs: The logs of each epoch and its number, "epoch". Without the file, the epochs before
            a backup are missing.
        has_begun: Whether `epochs` is that of this run: from its first epoch on.
        scales: Triples of updates tried, loss scale and skipped updates.
        seconds: Of training, without validation, per epoch. An epoch that was resumed after
            its first batch is left out.

    Raises:
        UsageError: If the epochs so far cannot be read.
    """

    def __init__(
        self, path: pathlib.Path | None, all_epochs: int, measure: str, resumes: bool
    ) -> None:
        super().__init__()
        self.path, self.all_epochs = path, all_epochs
        self._before = _read(path, measure) if path and resumes else []
        self.epochs: list[dict[str, Any]] = []
        self.has_begun = False
        self.scales: list[tuple[int, float, int]] = []
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self.has_begun:
            # Epochs after the backup are trained again.
            self.epochs = [logs for logs in self._before if logs["epoch"] < epoch]
            self.has_begun = True
        self._began = time.perf_counter()
        self._first_batch: int | None = None
        self._ended: float | None = None

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._first_batch is None:
            self._first_batch = batch

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if not self.has_begun:  # No epoch was left.
            self.epochs = self._before
            self.has_begun = True

    def is_complete(self) -> bool:
        """Whether the last epoch is there."""
        return bool(self.epochs) and self.epochs[-1]["epoch"] == self.all_epochs - 1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        self._ended = time.perf_counter()
        if "loss_scale" in logs:
            skipped = int(logs["skipped_updates"])
            self.scales.append((updates(self.model) + skipped, float(logs["loss_scale"]), skipped))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        self.epochs.append({"epoch": epoch} | {k: float(v) for k, v in logs.items()})
        if self._ended is not None and self._first_batch == 0:
            self.seconds.append(self._ended - self._began)
        if self.path is not None:
            _write(self.path, self.epochs)


def updates(model: keras.Model) -> int:
    """Updates of a model so far."""
    # int() of a Keras variable fails under MirroredStrategy (Keras 3.15).
    return int(model.optimizer.iterations.numpy())


def _read(path: pathlib.Path, measure: str) -> list[dict[str, Any]]:
    """The epochs in history.csv; none if there is no file."""
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
            "it away to resume without them."
        ) from None
    return epochs


def _write(path: pathlib.Path, epochs: list[dict[str, Any]]) -> None:
    # In one step, since a run may be killed at any time.
    temporary = path.with_suffix(".tmp")
    names = dict.fromkeys(name for logs in epochs for name in sorted(logs.keys() - {"epoch"}))
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["epoch", *names], restval=math.nan)
        writer.writeheader()
        writer.writerows(epochs)
    temporary.replace(path)
