"""The backup of a training run: what it holds, and how it is read.

It is a `.npz` archive of all arrays and of a JSON text about them. Arrays that are divided over
several workers are in further archives, one for each worker, which hold the elements that lie with
it; the first archive names them, and is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig.callbacks import _backup_files
from tfbig.callbacks._backup_files import Member

__all__ = (
    "Backup",
    "Parts",
    "SavedBackup",
    "State",
    "assign",
    "first_difference",
    "is_of",
    "members",
    "parts_of",
    "read",
)

# To be raised when this code would misread a backup that an earlier one has written.
FORMAT = 1

# That of backups in several files.
FORMAT_IN_PARTS = 2

_ABOUT = "about"

_GUARD = "spike guard"

# What reading a damaged archive raises. RuntimeError: it seems to be encrypted, or compressed by a
# method that there is not.
_DAMAGE = (OSError, KeyError, TypeError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile)


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
        logs: those of the last batch; none at the start of an epoch.
        is_cut_short: whether the data ended within the last execution of that epoch.
    """

    first_epoch: int
    epoch: int
    batch: int
    num_batches: int | None
    seed: int
    ended_of: int | None
    described: list[str]
    resized: dict[str, int] | None = None
    logs: dict[str, float] = dataclasses.field(default_factory=dict)
    is_cut_short: bool = False


class State:
    """All variables that are needed to resume training.

    Args:
        model: the model.
        swapped: pairs of variables that have each other's values.

    Attributes:
        variables: the variables; those of metrics are the last. Of a swapped pair, each is where
            the other belongs.
        metrics: the variables of metrics.
        described: a line for each variable.
        guard: the variables of a `SpikeGuard`.
        divided: which variables no process has all of, by their indices.

    Raises:
        BackupError: If an optimizer that the model holds is not built.
    """

    def __init__(
        self,
        model: keras.Model,
        swapped: Iterable[tuple[_types.KerasVariable, _types.KerasVariable]] = (),
    ) -> None:
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
        other = {id(a): b for pair in swapped for a, b in (pair, pair[::-1])}
        self.variables: list[_types.KerasVariable] = [
            other.get(id(v), v) for variables in groups.values() for v in variables
        ]
        # Without names, since those of layers count up in a process.
        self.described = [
            f"{group} {tuple(v.shape)} {v.dtype}"
            for group, variables in groups.items()
            for v in variables
        ]
        self.divided = [
            i for i, v in enumerate(self.variables) if _keras.variables.is_over_workers(v)
        ]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The files of the parts of a backup.

    Attributes:
        files: their names.
        shapes: of each array that is in them, by its index.
    """

    files: Sequence[str]
    shapes: dict[int, Sequence[int]]


def members(state: State, is_chief: bool, metrics: Sequence[_types.Array] = ()) -> Iterator[Member]:
    """What a worker writes of a state, one by one; an array may change with its variable.

    Args:
        state: the state, of which the chief writes all that is not divided.
        is_chief: whether this is the chief.
        metrics: values to be written in place of those that metrics have, if there are any.
    """
    divided = set(state.divided)
    first_metric = len(state.variables) - len(state.metrics)
    for i, variable in enumerate(state.variables):
        if i in divided:
            for begin, piece in _keras.variables.own_pieces_of(variable):
                yield f"{i}@{begin}", piece
        elif is_chief and metrics and i >= first_metric:
            yield str(i), metrics[i - first_metric]
        elif is_chief:
            yield str(i), _keras.variables.view_of(variable)


def about(backup: Backup, state: State, parts: Sequence[str]) -> Member:
    """What the chief writes about a state.

    Args:
        backup: what the backup says besides.
        state: the state.
        parts: the names of the files in which parts of it are.
    """
    # A .npy file keeps only the size of bfloat16 and the like.
    dtypes = [np.dtype(tf.as_dtype(v.dtype).as_numpy_dtype).name for v in state.variables]
    text: dict[str, object] = {"format": FORMAT, **dataclasses.asdict(backup), "dtypes": dtypes}
    if parts:
        shapes = {str(i): tuple(state.variables[i].shape) for i in state.divided}
        text |= {"format": FORMAT_IN_PARTS, "parts": {"files": list(parts), "shapes": shapes}}
    return _ABOUT, np.array(json.dumps(text))


class SavedBackup:
    """The newest backup in a directory, whose arrays are read one by one, while it is open.

    Args:
        directory: a directory that has a backup.

    Attributes:
        backup: what it says.

    Raises:
        FileNotFoundError: If there is none.
        BackupError: If a file is damaged or missing, or has another format. Reading an array may
            raise it too.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        # If there is none, opening it says why.
        found = _backup_files.present(directory) or [_backup_files.path_in(directory)]
        self._path, *self._older = found
        with contextlib.ExitStack() as stack:
            with self._reading():
                self._file = self._open(self._path, stack)
                about = _read_about(self._file)
                found = about.pop("format")
                if found not in (FORMAT, FORMAT_IN_PARTS):
                    raise errors.BackupError(
                        f"The backup {self._path} has format {found}, and this version of tfbig "
                        f"reads format {FORMAT}. The file is kept. Use the version that wrote it, "
                        "or another directory."
                    )
                dtypes = about.pop("dtypes")
                self._dtypes = [tf.as_dtype(name).as_numpy_dtype for name in dtypes]
                self._parts = _parts_in(about.pop("parts", None))
                self._pieces = self._find_pieces(stack)
                self.backup = Backup(**about)
            self._closing = stack.pop_all()

    def _open(self, path: pathlib.Path, stack: contextlib.ExitStack) -> Any:  # Any: of NumPy.
        # Open from here on: the file may be replaced.
        return stack.enter_context(
            np.load(stack.enter_context(open(path, "rb")), allow_pickle=False)
        )

    def _find_pieces(self, stack: contextlib.ExitStack) -> dict[int, list[tuple[int, Any, str]]]:
        """The pieces of each divided array: the first element, the archive, the name in it."""
        pieces: dict[int, list[tuple[int, Any, str]]] = {i: [] for i in self._parts.shapes}
        archives = [self._file]
        for name in self._parts.files:
            try:
                archives.append(self._open(self._path.parent / name, stack))
            except FileNotFoundError:
                raise self._unreadable(f"its part {name} is missing") from None
        for archive in archives:
            for name in archive.files:
                index, is_piece, begin = name.partition("@")
                if is_piece:
                    pieces[int(index)].append((int(begin), archive, name))
        return pieces

    def close(self) -> None:
        """Closes the files."""
        self._closing.close()

    def arrays(self, begin: int = 0) -> Iterator[_types.Array]:
        """The values of `State.variables`, from one on."""
        for i in range(begin, len(self._dtypes)):
            with self._reading():
                if i in self._pieces:
                    array = self._joined(i)
                else:
                    array = self._file[str(i)].view(self._dtypes[i])
            yield array

    def _joined(self, i: int) -> _types.Array:
        shape = self._parts.shapes[i]
        whole, there = np.empty([math.prod(shape)], self._dtypes[i]), 0
        for begin, archive, name in self._pieces[i]:
            piece = archive[name].view(self._dtypes[i])
            whole[begin : begin + piece.size] = piece
            there += piece.size
        if there != whole.size:
            raise self._unreadable(f"its parts have {there} of {whole.size} elements of an array")
        return whole.reshape(shape)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (errors.BackupError, FileNotFoundError):
            raise
        except _DAMAGE as e:
            raise self._unreadable(str(e)) from None

    def _unreadable(self, reason: str) -> errors.BackupError:
        remedy = "Move it away, or use another directory."
        if self._older:
            remedy = (
                f"Move it away, and training resumes from {self._older[0]}, which is older; or use "
                "another directory."
            )
        return errors.BackupError(
            f"The backup {self._path} cannot be read: {reason}. The file is kept. {remedy}"
        )


def _read_about(archive: Any) -> dict[str, Any]:  # Any: of NumPy, and of JSON.
    about: dict[str, Any] = json.loads(str(archive[_ABOUT]))
    return about


def _parts_in(text: dict[str, Any] | None) -> Parts:  # Any: of JSON.
    if text is None:
        return Parts((), {})
    return Parts(text["files"], {int(i): tuple(shape) for i, shape in text["shapes"].items()})


def parts_of(directory: str | os.PathLike[str]) -> list[pathlib.Path] | None:
    """The parts of all backups in a directory; None if one of these cannot be read."""
    found: list[pathlib.Path] = []
    try:
        for path in _backup_files.present(directory):
            with np.load(path, allow_pickle=False) as archive:
                files = _parts_in(_read_about(archive).get("parts")).files
            found += [path.parent / name for name in files]
    except _DAMAGE:
        return None
    return found


def assign(state: State, saved: SavedBackup, kept: Collection[_types.KerasVariable] = ()) -> bool:
    """Gives the variables of a model the values in a backup, including those of metrics.

    If the backup has no guard, or one with another `window`, the guard of the model keeps its
    values. What the backup has of a guard that training no longer has is ignored.

    Args:
        state: the state of the model.
        saved: the backup.
        kept: variables that keep their values.

    Returns:
        Whether the backup is of such a model; if not, nothing is assigned.
    """
    if not is_of(state, saved):
        return False
    has_same_guard = saved.backup.described == state.described
    guard = {id(v) for v in state.guard}
    variables = [v for v in state.variables if has_same_guard or id(v) not in guard]
    values = (
        value
        for line, value in zip(saved.backup.described, saved.arrays(), strict=True)
        if has_same_guard or not line.startswith(_GUARD)
    )
    stays = {id(v) for v in kept}
    for variable, value in zip(variables, values, strict=True):
        if id(variable) not in stays:
            _keras.variables.assign_all([variable], [value])
    return True


def is_of(state: State, saved: SavedBackup) -> bool:
    """Whether a backup is of such a model."""
    return _required(saved.backup.described) == _required(state.described)


def _required(described: Sequence[str]) -> list[str]:
    """The lines of all variables but those of a guard."""
    return [line for line in described if not line.startswith(_GUARD)]


def first_difference(state: State, saved: SavedBackup) -> str:
    """Says how a backup differs from a model that it cannot be assigned to."""
    there, wanted = _required(saved.backup.described), _required(state.described)
    pairs = itertools.zip_longest(there, wanted, fillvalue="nothing")
    one, other = next(pair for pair in pairs if pair[0] != pair[1])
    return f"it holds {one!r} where the model has {other!r}"


def read(directory: str | os.PathLike[str]) -> SavedBackup | None:
    """The backup in a directory, open; None if there is none.

    Raises:
        BackupError: If the file is damaged or has another format.
    """
    try:
        return SavedBackup(directory)
    except FileNotFoundError:
        return None
