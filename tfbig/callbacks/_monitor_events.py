"""The events that a `TrainingMonitor` writes for TensorBoard."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import tensorflow as tf

from tfbig.callbacks import _monitor_file

__all__ = ("Events",)


class Events:
    """Events of a directory; if they cannot be written, they end, and training does not.

    Args:
        directory: the directory, which exists.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._writer: tf.summary.SummaryWriter | None = None
        with self._ending_at_errors():
            self._writer = tf.summary.create_file_writer(str(directory))

    def write(self, values: _monitor_file.Row, update: int, prefix: str = "") -> None:
        """Writes those values that are known, by their names."""
        if self._writer is None:
            return
        with self._ending_at_errors(), self._writer.as_default():
            for name, value in values.items():
                if value is not None:
                    tf.summary.scalar(prefix + name, value, step=update)
            self._writer.flush()

    def close(self) -> None:
        """Nothing is written after it."""
        if self._writer is not None:
            with self._ending_at_errors():
                self._writer.close()

    @contextlib.contextmanager
    def _ending_at_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as e:
            self._writer = None
            _monitor_file.warn(f"TensorBoard's events in {self._directory}", e)
