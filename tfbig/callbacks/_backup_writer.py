"""Backups are written at once or by a thread, by the chief or by all workers in parts.

A backup in parts becomes one when the chief gives its own part the name of a backup. It does so
once all other parts are on disk, under names that no other backup has. Until then the previous
backup is the newest, whoever dies.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tfbig import _types
from tfbig.callbacks import _backup, _backup_files
from tfbig.callbacks._backup_files import Draft, Member
from tfbig.distribute import _workers

__all__ = ("BackupWriter",)

# Seconds between two looks for the parts of other workers.
_POLL_SECONDS = 0.1

# Seconds that the chief waits for the parts of workers which it cannot ask: an exception ends
# training, theirs perhaps too.
_GRACE_SECONDS = 10.0


class BackupWriter:
    """Writes the backups of a `fit`, one at a time.

    All workers have one, and call its methods at the same points, but for `report` and `end`.

    Args:
        directory: the directory.
        workers: the workers.
        keep: how many backups stay.
        fit: letters and digits that belong to this `fit`, the same on all workers.
    """

    def __init__(
        self, directory: str | os.PathLike[str], workers: _workers.Workers, keep: int, fit: str
    ) -> None:
        self._directory, self._workers, self._keep, self._fit = directory, workers, keep, fit
        self._number = 0
        self._copies = _Copies()
        self._running: _Writing | None = None
        if workers.is_chief:
            _backup_files.remove_unfinished(directory)
            self._clean()

    def write(
        self,
        backup: _backup.Backup,
        state: _backup.State,
        metrics: Sequence[_types.Array],
        is_on_background: bool,
    ) -> bool:
        """Writes a backup, once the previous one is written.

        Args:
            backup: what it says besides.
            state: the state.
            metrics: values to be written in place of those that metrics have, if there are any.
            is_on_background: whether to return when the state is copied, and have a thread write.

        Returns:
            Whether it is written, or being written; False after a warning.
        """
        self.settle()
        self._number += 1
        if not self._workers.is_chief and not state.divided:
            return True
        writing = self._running = self._prepare(backup, state, metrics, is_on_background)
        if is_on_background:
            writing.start()
            return True
        writing.write()
        return self.settle()

    def _prepare(
        self,
        backup: _backup.Backup,
        state: _backup.State,
        metrics: Sequence[_types.Array],
        is_copied: bool,
    ) -> _Writing:
        directory, number, worker = self._directory, self._number, self._workers.index
        others = range(1, self._workers.count if state.divided else 1)
        parts = [self._part_of(i) for i in others]
        members: Iterable[Member] = _backup.members(state, self._workers.is_chief, metrics)
        if is_copied:
            members = self._copies.of(members)
        if not self._workers.is_chief:
            draft = Draft(directory, worker, members)
            path = parts[worker - 1]
            return _Writing(draft, lambda: draft.rename(path), None)
        about = _backup.about(backup, state, [path.name for path in parts])
        draft = Draft(directory, worker, itertools.chain(members, [about]))

        def publish() -> None:
            _backup_files.publish(directory, draft, self._keep)
            self._clean(number)

        return _Writing(draft, publish, parts)

    def _part_of(self, worker: int) -> pathlib.Path:
        """Where a worker writes its part of the last backup."""
        return _backup_files.part_in(self._directory, self._fit, self._number, worker)

    def _clean(self, number: int = 0) -> None:
        """Removes parts that are in no backup, after one was written."""
        if _backup_files.has_parts(self._directory):
            needed = _backup.parts_of(self._directory)
            if needed is not None:
                _backup_files.clean(self._directory, needed, self._fit, number)

    def settle(self) -> bool:
        """Waits until the running backup is written, or has failed.

        Returns:
            Whether the last one could be written; False after a warning.
        """
        running = self._running
        if running is None:
            return True
        running.wait_until_written()
        failures = [] if running.error is None else [str(running.error)]
        if running.is_in_parts:
            answers = self._workers.exchange("the parts of a backup", "".join(failures))
            failures = [
                f"{name}: {answer}"
                for name, answer in zip(self._workers.names, answers, strict=True)
                if answer
            ]
            running.decide(is_valid=not failures)
        running.finish()
        if failures and not self._workers.is_chief:
            # It takes room that the next one may need.
            _backup_files.remove_part(self._part_of(self._workers.index))
        self._running = None
        return self._judge(running, failures)

    def _judge(self, running: _Writing, failures: list[str]) -> bool:
        if running.error is not None and not isinstance(running.error, OSError):
            raise running.error
        if running.error is not None and not failures:
            failures = [str(running.error)]  # Of the last step, giving it its name.
        if failures and self._workers.is_chief and not running.is_reported:
            self._warn("; ".join(failures))
        return not failures

    def report(self) -> None:
        """Warns if the running backup has failed meanwhile."""
        running = self._running
        if running is None or running.is_alive():
            return
        if not running.is_in_parts:
            self.settle()
        elif isinstance(running.error, OSError) and not running.is_reported:
            # All workers settle it together, later.
            self._warn(str(running.error))
            running.is_reported = True

    def _warn(self, reason: str) -> None:
        warnings.warn(
            f"The backup in {self._directory} could not be written: {reason}. Training continues; "
            "the previous backup, if there is one, is intact.",
            stacklevel=2,
        )

    def end(self) -> None:
        """Waits for the running backup when others can no longer be asked, after an exception."""
        running, self._running = self._running, None
        if running is None:
            return
        running.give_up()
        if running.error is not None and not running.is_reported:
            self._warn(str(running.error))


class _Writing(threading.Thread):
    """What a worker writes of a backup, in a thread if it is started.

    Args:
        draft: what is written.
        name: function that gives it its name.
        parts: of the chief, the parts of others that must be there before it gets its name; None
            on other workers.

    Attributes:
        is_in_parts: whether other workers write parts.
        is_reported: whether a warning of the error has been given.
        error: what was raised, if anything.
    """

    def __init__(
        self, draft: Draft, name: Callable[[], None], parts: Sequence[pathlib.Path] | None
    ) -> None:
        super().__init__(name="tfbig backup")
        self.is_in_parts = parts is None or bool(parts)
        self.is_reported = False
        self.error: BaseException | None = None
        self._draft, self._name_it, self._parts = draft, name, parts or ()
        self._is_written, self._is_decided = threading.Event(), threading.Event()
        self._is_valid = False

    def run(self) -> None:
        try:
            self.write()
            self._conclude()
        except BaseException as e:
            self.error = e

    def write(self) -> None:
        """Writes it to disk; what nothing else belongs to gets its name."""
        try:
            self._draft.write()
            if not self._parts:
                self._name_it()
        except OSError as e:
            self.error = e
        finally:
            self._is_written.set()

    def _conclude(self) -> None:
        """Gives it its name once the parts are there, or when that is decided."""
        if not self._parts or self.error is not None:
            return
        while not (is_there := all(path.exists() for path in self._parts)):
            if self._is_decided.wait(_POLL_SECONDS):
                break
        try:
            # On a network's file system, files of others may be seen late.
            if is_there or self._is_valid:
                self._name_it()
            else:
                self._draft.discard()
        except OSError as e:
            self.error = e

    def wait_until_written(self) -> None:
        """Waits until it is on disk, or has failed."""
        self._is_written.wait()

    def decide(self, is_valid: bool) -> None:
        """Says whether all workers have written their parts."""
        self._is_valid = is_valid
        self._is_decided.set()

    def finish(self) -> None:
        """Waits until all is done, after `decide`."""
        if self.ident is None:
            self._conclude()
        else:
            self.join()

    def give_up(self) -> None:
        """Waits until all is done, though the parts of others may never come."""
        if self.ident is None:
            self._draft.discard()
            return
        self._is_written.wait()
        self.join(_GRACE_SECONDS)
        self.decide(is_valid=False)
        self.join()


class _Copies:
    """Copies of arrays, in memory that serves again: to get it anew takes longer than to copy."""

    def __init__(self) -> None:
        self._arrays: dict[str, _types.Array] = {}

    def of(self, members: Iterable[Member]) -> list[Member]:
        """Copies of members, which change when this is called again."""
        return [(name, self._copy(name, array)) for name, array in members]

    def _copy(self, name: str, array: _types.Array) -> _types.Array:
        array = np.asarray(array)
        copy = self._arrays.get(name)
        if copy is None or copy.shape != array.shape or copy.dtype != array.dtype:
            copy = self._arrays[name] = np.empty(array.shape, array.dtype)
        np.copyto(copy, array)
        return copy
