"""The backup of a training: one file, replaced in one step.

A `.npz` archive of all arrays, and a JSON text about them. It is written beside
its place under another name, forced to disk, and renamed: whenever the process or
the machine dies, the file is either the old one or the new one.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import zipfile

import numpy as np
import tensorflow as tf

from tfbig import _keras, errors

__all__ = ("Backup", "read", "write")

FILE = "backup.npz"

# Raised when a backup that is read with other code would mean something else.
FORMAT = 1

_ABOUT = "about"


@dataclasses.dataclass
class Backup:
    """A moment of a training, between two updates.

    Attributes:
        first_epoch: int, the first epoch of the training.
        epoch: int, the epoch that goes on; those before are complete.
        batch: int, batches of the next epoch that are consumed.
        num_batches: int, batches of an epoch, where that is known; or None.
        seed: int, what the data are shuffled by.
        ended_of: int, once training has ended: of how many epochs; else None.
        described: list of str, what tells one model from another: a line for each
            array.
        arrays: list of NumPy arrays, the values of `State.variables`.
    """

    first_epoch: int
    epoch: int
    batch: int
    num_batches: int | None
    seed: int
    ended_of: int | None
    described: list
    arrays: list


class State:
    """All variables that a training goes on from.

    Attributes:
        variables: list of variables; the last are those of metrics.
        metrics: list of variables, those of metrics.
        described: list of str, a line for each variable.
    """

    def __init__(self, model):
        scale, noise = model.loss_scale_state, model.noise_scale_state
        optimizers = {}
        for name, optimizer in _keras.optimizer.optimizers_of(model):
            if name and not optimizer.built:
                raise errors.BackupError(
                    "An optimizer must be built before `fit` to be a part of the backup. Received: "
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
        self.metrics = list(groups["metric"])
        self.variables = [v for variables in groups.values() for v in variables]
        # Without the names of models, which count up in a process.
        self.described = [
            f"{group} {tuple(v.shape)} {v.dtype}"
            for group, variables in groups.items()
            for v in variables
        ]


def path_in(directory):
    return pathlib.Path(directory) / FILE


def write(directory, backup):
    """Writes a backup in place of the previous one.

    Raises:
        OSError: If it cannot be written; the previous one is then untouched.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        **{k: v for k, v in dataclasses.asdict(backup).items() if k != "arrays"},
    }
    arrays = {str(i): array for i, array in enumerate(backup.arrays)}
    # .npy files know bfloat16 and the like by their size only.
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


def _sync(directory):
    # The name must reach the disk as well as the contents.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(directory):
    """The `Backup` of a directory; None if there is none.

    Raises:
        BackupError: If the file is damaged or of another format.
    """
    path = path_in(directory)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = json.loads(str(file[_ABOUT]))
            found = about.pop("format")
            if found != FORMAT:
                raise errors.BackupError(
                    f"The backup {path} has format {found}, and this version of tfbig reads "
                    f"format {FORMAT}. It is left as it is. Use the version that wrote it, or "
                    "another directory."
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
            f"The backup {path} cannot be read: {e}. It is left as it is. Move it away, or use "
            "another directory."
        ) from None


def remove(directory):
    """Removes the backup, and what a killed process left of another."""
    directory = pathlib.Path(directory)
    for path in (path_in(directory), *directory.glob(".backup-*.tmp")):
        with contextlib.suppress(OSError):
            path.unlink()
