"""The goodput of a training run in a CSV file that a resumed run continues."""

from __future__ import annotations

import pathlib
import time

import keras

from tfbig import _keras
from tfbig.callbacks._goodput import CAUSES, Goodput
from tfbig.callbacks._monitor_file import Row, RowsFile

__all__ = ("SHARES", "GoodputFile", "is_synchronous")

# `time` is that of the system's clock, which goes on while no program runs; `ended` is 1 once
# training has ended, after which the time until it goes on is not lost.
_COLUMNS = ("update", "epoch", "seconds", "time", "ended")

# The share of each cause; together they are 1.
SHARES = ("goodput", *CAUSES[1:])


class GoodputFile:
    """The file goodput.csv of a directory, and the meter whose shares it holds.

    A row is written at the end of each epoch, after each backup, and when `fit` ends.

    Args:
        directory: the directory, which need not exist yet.

    Attributes:
        rows: its rows.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        columns = (*_COLUMNS, *SHARES)
        self.file = RowsFile(directory, columns, "goodput.csv", needed=columns)
        self.rows: list[Row] = []

    def begin(self, model: keras.Model, updates: int, meter: Goodput) -> None:
        """Takes up the time of earlier sessions, and counts what was lost between.

        Args:
            model: the model that trains.
            updates: how many updates it has made.
            meter: the new session's.
        """
        rows = self.file.read() if updates else []
        # What came after the backup was made again, and the time was lost.
        self.rows = [row for row in rows if row["update"] <= updates]
        before, gap = None, 0.0
        if self.rows:
            last = self.rows[-1]
            before = {
                cause: last["seconds"] * last[name]
                for cause, name in zip(CAUSES, SHARES, strict=True)
            }
            has_ended = rows[-1]["ended"] or last["ended"]
            # The system's clock may have been set back.
            gap = 0.0 if has_ended else max(0.0, time.time() - last["time"])
        meter.begin(before, gap, getattr(model, "skipped_updates", 0), model.times_traced)

    def write(self, meter: Goodput, updates: int, epoch: int, has_ended: bool = False) -> Row:
        """Adds a row with the shares so far.

        Raises:
            OSError: If the file cannot be written.
        """
        shares = meter.shares()
        values = (updates, epoch, meter.total, time.time(), int(has_ended), *shares.values())
        row: Row = dict(zip((*_COLUMNS, *SHARES), values, strict=True))
        self.rows.append(row)
        self.file.write(self.rows)
        return row


def is_synchronous(model: keras.Model) -> bool:
    """Whether an update is done when the call that makes it returns."""
    devices = _keras.devices.devices_of(model.distribute_strategy)
    if model.pipeline is not None:
        devices = [d for stage in model.pipeline.stages for d in stage.devices]
    return all("CPU" in device for device in devices)
