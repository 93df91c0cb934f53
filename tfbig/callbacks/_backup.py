"""The backup of a training run: one file, replaced atomically.

It is a `.npz` archive of all arrays and of a JSON text about them. It is written under a temporary
name, forced to disk, and renamed: whenever the process or the machine dies, the file is either the
old one or the new one.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _types, errors

__all__ = ("Backup", "SavedBackup", "State", "assign", "path_in", "read", "remove", "write")

FILE = "backup.npz"

# To be raised when this code would misread a backup that an earlier one has written.
FORMAT = 1

_ABOUT = "about"

_GUARD = "spike guard"


@dataclasses.dataclass
class Backup:
    """The state of training between two updates.

    Attributes:
        first_epoch: the epoch that training started with.
        epoch: the epoch to resume; those before are complete.
        batch: how many batches of that epoch are consumed.
        num_batches: the number of batches of an epoch; None if it is not known.
        seed: what the data are shuffled by.
        ended_of: the number of epochs, once training has ended; else None.
        described: what tells one model from another: a line for each array.
        resized: where the data stand whose batches change in size; None for others.
    """

    first_epoch: int
    epoch: int
    batch: int
    num_batches: int | None
    seed: int
    ended_of: int | None
    described: list[str]
    resized: dict[str, int] | None = None


class State:
    """All variables that are needed to resume training.

    Attributes:
        variables: the variables; those of metrics are the last.
        metrics: the variables of metrics.
        described: a line for each variable.
        guard: the variables of a `SpikeGuard`.

    Raises:
        BackupError: If an optimizer that the model holds is not built.
    """

    def __init__(self, model: keras.Model) -> None:
        scale, noise = model.loss_scale_state, model.noise_scale_state
        optimizers = {}
        for name, optimizer in _keras.optimizer.optimizers_of(model):
            if name and not optimizer.built:
                raise errors.BackupError(
                    "An optimizer must be built before `fit` to be part of the backup. Received: "
                    f"{name}, not built. Call {name}.build(variables)."
                )
            kind = type(optimizer).__name__
            optimizers[f"{name}, {kind}" if name else kind] = optimizer.variables
        self.guard = [] if model.update_guard is None else model.update_guard.variables()
        groups = {
            "weight": model.weights,
            **optimizers,
            "loss scale": scale.variables() if scale is not None else [],
            "noise scale": noise.variables() if noise is not None else [],
            "seed": model.seed_states.variables(),
            _GUARD: self.guard,
            "metric": model.metrics_variables,
        }
        self.metrics: list[_types.KerasVariable] = list(groups["metric"])
        self.variables: list[_types.KerasVariable] = [
            v for variables in groups.values() for v in variables
        ]
        # Without names, since those of layers count up in a process.
        self.described = [
            f"{group} {tuple(v.shape)} {v.dtype}"
            for group, variables in groups.items()
            for v in variables
        ]


def path_in(directory: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a directory's backup."""
    return pathlib.Path(directory) / FILE


def write(
    directory: str | os.PathLike[str], backup: Backup, arrays: Iterable[_types.Array]
) -> None:
    """Writes a backup in place of the previous one.

    Args:
        directory: the directory, which need not exist yet.
        backup: what the backup says besides.
        arrays: the values of `State.variables`. Each is written before the next is asked for, so
            that only one is in memory.

    Raises:
        OSError: If it cannot be written; the previous one is then untouched.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".backup-{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                _write_all(archive, backup, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path_in(directory))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(directory)


def _write_all(archive: zipfile.ZipFile, backup: Backup, arrays: Iterable[_types.Array]) -> None:
    """Writes what `np.savez` would, one array at a time."""

    def add(name: str, array: _types.Array) -> None:
        # Its size is not known before it is written.
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)

    # A .npy file keeps only the size of bfloat16 and the like.
    dtypes = []
    for i, array in enumerate(arrays):
        dtypes.append(array.dtype.name)
        add(str(i), array)
    about = {"format": FORMAT, **dataclasses.asdict(backup), "dtypes": dtypes}
    add(_ABOUT, np.array(json.dumps(about)))


def _sync(directory: pathlib.Path) -> None:
    # The name must reach the disk as well as the contents.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class SavedBackup:
    """The backup in a directory, whose arrays are read one by one, while it is open.

    Args:
        directory: a directory that has a backup.

    Attributes:
        backup: what it says.

    Raises:
        FileNotFoundError: If there is none.
        BackupError: If the file is damaged or has another format. Reading an array may raise it
            too.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._path = path_in(directory)
        with contextlib.ExitStack() as stack:
            with self._reading():
                # Open from here on: the file may be replaced.
                file = stack.enter_context(open(self._path, "rb"))
                self._file = stack.enter_context(np.load(file, allow_pickle=False))
                # Any: of JSON.
                about: dict[str, Any] = json.loads(str(self._file[_ABOUT]))
                found = about.pop("format")
                if found != FORMAT:
                    raise errors.BackupError(
                        f"The backup {self._path} has format {found}, and this version of tfbig "
                        f"reads format {FORMAT}. The file is kept. Use the version that wrote it, "
                        "or another directory."
                    )
                dtypes = about.pop("dtypes")
                self._dtypes = [tf.as_dtype(name).as_numpy_dtype for name in dtypes]
                self.backup = Backup(**about)
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Closes the file."""
        self._closing.close()

    def arrays(self, begin: int = 0) -> Iterator[_types.Array]:
        """The values of `State.variables`, from one on."""
        for i in range(begin, len(self._dtypes)):
            with self._reading():
                array = self._file[str(i)].view(self._dtypes[i])
            yield array

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (errors.BackupError, FileNotFoundError):
            raise
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise errors.BackupError(
                f"The backup {self._path} cannot be read: {e}. The file is kept. Move it away, or "
                "use another directory."
            ) from None


def assign(state: State, saved: SavedBackup) -> bool:
    """Gives the variables of a model what a backup holds; those of metrics, too.

    A guard that the backup knows nothing of begins anew, and what the backup knows of one that
    training has no longer is left out.

    Returns:
        Whether the backup is of such a model; if not, nothing is assigned.
    """

    def required(described: list[str]) -> list[str]:
        return [line for line in described if not line.startswith(_GUARD)]

    lines = saved.backup.described
    if required(lines) != required(state.described):
        return False
    has_same_guard = lines == state.described
    guard = {id(v) for v in state.guard}
    variables = [v for v in state.variables if has_same_guard or id(v) not in guard]
    values = (
        value
        for line, value in zip(lines, saved.arrays(), strict=True)
        if has_same_guard or not line.startswith(_GUARD)
    )
    _keras.variables.assign_all(variables, values)
    return True


def read(directory: str | os.PathLike[str]) -> SavedBackup | None:
    """The backup in a directory, open; None if there is none.

    Raises:
        BackupError: If the file is damaged or has another format.
    """
    try:
        return SavedBackup(directory)
    except FileNotFoundError:
        return None


def remove(directory: str | os.PathLike[str]) -> None:
    """Removes the backup, and unfinished ones of processes that were killed."""
    directory = pathlib.Path(directory)
    for path in (path_in(directory), *directory.glob(".backup-*.tmp")):
        with contextlib.suppress(OSError):
            path.unlink()
