"""Rows of a `TrainingMonitor`, in a CSV file that a resumed training run continues."""

import csv
import io
import itertools
import os
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from tfbig import errors

__all__ = ("Row", "RowsFile", "warn")

# Any: numbers, or None where a number is not known.
Row: TypeAlias = dict[str, Any]


class RowsFile:
    """A CSV file of a directory.

    Args:
        directory: the directory, which need not exist yet.
        columns: names of the columns that come first.
        name: name of the file.
        needed: names of the columns in which each row has a number.

    Attributes:
        path: path of the file.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        columns: Sequence[str],
        name: str = "training.csv",
        needed: Sequence[str] = ("update", "seconds"),
    ) -> None:
        self.path = directory / name
        self._needed = needed
        self._columns = columns
        self._names: tuple[str, ...] = ()

    def read(self) -> list[Row]:
        """The rows of the file; none if there is no file.

        Raises:
            InvalidOptionError: If the file is damaged, or not that of a monitor.
        """
        if not self.path.exists():
            return []
        try:
            with open(self.path, newline="") as file:
                text = file.read()
            lines = list(csv.DictReader(io.StringIO(text, newline="")))
            if lines and not text.endswith("\n"):
                del lines[-1]  # The program was killed while it wrote the line.
            rows = [{k: _value(k, v) for k, v in line.items()} for line in lines]
            for name in self._needed:
                if any(row.get(name) is None for row in rows):
                    raise ValueError(f"its column {name} is missing, or has gaps")
            return rows
        except (OSError, ValueError, TypeError, csv.Error) as e:
            raise errors.InvalidOptionError(
                f"{self.path} must be the file of a TrainingMonitor. Received: one that cannot be "
                f"read ({e}). Use another directory."
            ) from e

    def put_aside(self, others: Iterable[pathlib.Path]) -> str:
        """Renames the file, and others beside it, to the first number that is free for all.

        Returns:
            The new name of the file.
        """
        paths = [self.path, *others]
        for number in itertools.count(1):
            targets = [p.with_name(p.name.replace(".", f".{number}.")) for p in paths]
            if not any(target.exists() for target in targets):
                break
        for path, target in zip(paths, targets, strict=True):
            if path.exists():
                path.rename(target)
        return targets[0].name

    def write(self, rows: Sequence[Row]) -> None:
        """Adds the last of the rows; if it has a new column, writes all of them to a new file.

        Raises:
            OSError: If the file cannot be written. The next call then writes all rows.
        """
        is_new = not rows[-1].keys() <= set(self._names)
        if is_new:
            names = [name for row in rows for name in row if name not in self._columns]
            self._names = (*self._columns, *dict.fromkeys(names))
        try:
            self._append(rows if is_new else rows[-1:], is_new)
        except OSError:
            self._names = ()
            raise

    def _append(self, rows: Sequence[Row], is_new: bool) -> None:
        """Adds rows to the file; a new file replaces the previous one atomically."""
        target = self.path.with_suffix(".tmp") if is_new else self.path
        with open(target, "w" if is_new else "a", newline="") as file:
            writer = csv.DictWriter(file, self._names)
            if is_new:
                writer.writeheader()
            writer.writerows(rows)
        if is_new:
            os.replace(target, self.path)


def _value(name: str, text: str) -> float | None:
    if name in ("update", "epoch"):
        return int(text)
    return float(text) if text else None


def warn(what: object, error: Exception) -> None:
    """Warns that something could not be written; training goes on without it."""
    warnings.warn(f"{what} could not be written: {error}. Training continues.", stacklevel=4)
