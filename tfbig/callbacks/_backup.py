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
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _types, errors

__all__ = ("Backup", "read", "write")

FILE = "backup.npz"

# To be raised when this code would misread a backup that an earlier one has written.
FORMAT = 1

_ABOUT = "about"


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
        arrays: the values of `State.variables`.
    """

    first_epoch: int
    epoch: int
    batch: int
    num_batches: int | None
    seed: int
    ended_of: int | None
    described: list[str]
    arrays: list[_types.Array]


class State:
    """All variables that are needed to resume training.

    Attributes:
        variables: the variables; those of metrics are the last.
        metrics: the variables of metrics.
        described: a line for each variable.

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
        groups = {
            "weight": model.weights,
            **optimizers,
            "loss scale": scale.variables() if scale is not None else [],
            "noise scale": noise.variables() if noise is not None else [],
            "seed": model.seed_states.variables(),
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


def write(directory: str | os.PathLike[str], backup: Backup) -> None:
    """Writes a backup in place of the previous one.

    Raises:
        OSError: If it cannot be written; the previous one is then untouched.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Any: of JSON.
    about: dict[str, Any] = {
        "format": FORMAT,
        **{k: v for k, v in dataclasses.asdict(backup).items() if k != "arrays"},
    }
    arrays = {str(i): array for i, array in enumerate(backup.arrays)}
    # A .npy file keeps only the size of bfloat16 and the like.
    about["dtypes"] = [array.dtype.name for array in backup.arrays]
    arrays[_ABOUT] = np.array(json.dumps(about))
    temporary = directory / f".backup-{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path_in(directory))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(directory)


def _sync(directory: pathlib.Path) -> None:
    # The name must reach the disk as well as the contents.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(directory: str | os.PathLike[str]) -> Backup | None:
    """The backup in a directory; None if there is none.

    Raises:
        BackupError: If the file is damaged or has another format.
    """
    path = path_in(directory)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = json.loads(str(file[_ABOUT]))
            found = about.pop("format")
            if found != FORMAT:
                raise errors.BackupError(
                    f"The backup {path} has format {found}, and this version of tfbig reads "
                    f"format {FORMAT}. The file is kept. Use the version that wrote it, or another "
                    "directory."
                )
            dtypes = [tf.as_dtype(name).as_numpy_dtype for name in about.pop("dtypes")]
            arrays = [file[str(i)].view(dtype) for i, dtype in enumerate(dtypes)]
        return Backup(arrays=arrays, **about)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as e:
        if isinstance(e, errors.BackupError):
            raise
        raise errors.BackupError(
            f"The backup {path} cannot be read: {e}. The file is kept. Move it away, or use "
            "another directory."
        ) from None


def remove(directory: str | os.PathLike[str]) -> None:
    """Removes the backup, and unfinished ones of processes that were killed."""
    directory = pathlib.Path(directory)
    for path in (path_in(directory), *directory.glob(".backup-*.tmp")):
        with contextlib.suppress(OSError):
            path.unlink()
