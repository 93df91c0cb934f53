"""What training goes back to: a copy of its state in memory, or the last backup."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

import keras

from tfbig import _keras, _types, errors
from tfbig.callbacks import _backup
from tfbig.callbacks._backup_and_restore import BackupAndRestore
from tfbig.distribute import _workers

__all__ = ("BackupSource", "Snapshots", "Source")


class Source(Protocol):
    """Where an earlier state of training comes from."""

    def passed(self, updates: int, is_calm: bool) -> None:
        """Tells of so many more updates.

        Args:
            updates: their number.
            is_calm: whether the last of them gives no reason to doubt the weights before it.
        """

    def restore(self) -> None:
        """Gives the model its earlier state."""


class Snapshots:
    """Copies of the state in the memory of the host.

    Each worker copies what its own replicas hold, so nothing is exchanged. Whether a copy is of
    good weights, only the update after it tells: until then, the previous copy is kept too.

    Args:
        model: the model, with variables that are as they should be.
        kept: variables that stay as they are.
        every: updates between copies.
    """

    def __init__(
        self, model: keras.Model, kept: Iterable[_types.KerasVariable], every: int
    ) -> None:
        state = _backup.State(model)
        left_alone = {id(v) for v in _left_alone(model, state, kept)}
        self._variables = [v for v in state.variables if id(v) not in left_alone]
        self._every = every
        self._since = 0
        self._confirmed = self._copy()
        self._latest: list[list[_types.Array]] | None = None

    def _copy(self) -> list[list[_types.Array]]:
        return _keras.variables.held_values_of(self._variables)

    def passed(self, updates: int, is_calm: bool) -> None:
        self._since += updates
        if is_calm and self._latest is not None:
            self._confirmed, self._latest = self._latest, None
        if self._since >= self._every:
            # Let go of an earlier one, which would take memory while this one is made.
            self._since, self._latest = 0, None
            self._latest = self._copy()

    def restore(self) -> None:
        self._since, self._latest = 0, None
        _keras.variables.assign_held(self._variables, self._confirmed)


class BackupSource:
    """The last backup that a `BackupAndRestore` has written.

    Args:
        model: the model.
        kept: variables that stay as they are.
        backup: what writes it.
    """

    def __init__(
        self,
        model: keras.Model,
        kept: Iterable[_types.KerasVariable],
        backup: BackupAndRestore,
    ) -> None:
        self._model = model
        self._kept = list(kept)
        self._backup = backup
        # The program may change into another directory.
        self._directory = os.path.abspath(backup.backup_dir)

    def passed(self, updates: int, is_calm: bool) -> None:
        del updates, is_calm

    def restore(self) -> None:
        workers = _workers.Workers.of(self._model.distribute_strategy)
        # It must be the same on all workers.
        self._backup.wait_until_finished()
        directory = self._directory
        saved = _backup.read(directory)
        seen = f"epoch {saved.backup.epoch}, batch {saved.backup.batch}" if saved else "none"
        try:
            workers.agree("a rollback of SpikeGuard", {"backup": seen})
            if saved is None:
                raise errors.SpikeError(
                    f"There is no backup in {directory} to go back to yet. Take the first "
                    "one earlier, with a smaller `save_freq`, or pass `snapshot_every` to "
                    "SpikeGuard."
                )
            state = _backup.State(self._model)
            if not _backup.assign(state, saved, _left_alone(self._model, state, self._kept)):
                raise errors.SpikeError(
                    f"The backup in {directory}, which SpikeGuard would go back to, belongs to "
                    "another model, optimizer or loss scale: "
                    f"{_backup.first_difference(state, saved)}. The file is kept, and so are the "
                    "weights. Give each training a directory for itself."
                )
        finally:
            if saved is not None:
                saved.close()


def _left_alone(
    model: keras.Model, state: _backup.State, kept: Iterable[_types.KerasVariable]
) -> list[_types.KerasVariable]:
    """The variables that keep their values when training goes back.

    Metrics go on counting. A learning rate that callbacks set is theirs: a schedule follows from
    `iterations`, which goes back.
    """
    return [*state.metrics, *kept, *_keras.optimizer.learning_rates_of(model)]
