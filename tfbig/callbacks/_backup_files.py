"""The files of a backup, each of which is whole under its name at any moment.

| file | what it is |
|---|---|
| backup.npz | the newest backup |
| backup-1.npz, backup-2.npz, ... | those before it, if several are kept |
| backup-part-....npz | what one of several workers has written of a backup |

Each is a `.npz` archive. It is written under a temporary name, forced to disk, and renamed:
whenever the process or the machine dies, the file is either the old one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np

from tfbig import _types

__all__ = (
    "Draft",
    "Member",
    "clean",
    "has_parts",
    "part_in",
    "path_in",
    "present",
    "publish",
    "remove",
    "remove_part",
    "remove_unfinished",
    "write_archive",
    "write_array",
)

FILE = "backup.npz"

_OLDER = re.compile(r"backup-(\d+)\.npz")
_PART = re.compile(r"backup-part-(\w+)-(\d+)-(\d+)\.npz")

# A name in an archive, and the array of that name.
Member = tuple[str, _types.Array]


def path_in(directory: str | os.PathLike[str], age: int = 0) -> pathlib.Path:
    """The path of a directory's backup.

    Args:
        directory: the directory.
        age: how many backups are newer.
    """
    return pathlib.Path(directory) / (f"backup-{age}.npz" if age else FILE)


def part_in(directory: str | os.PathLike[str], fit: str, number: int, worker: int) -> pathlib.Path:
    """The path of what a worker writes of a backup.

    Args:
        directory: the directory.
        fit: letters and digits that belong to one `fit`.
        number: which of its backups, in the order in which they are taken.
        worker: the index of the worker.
    """
    return pathlib.Path(directory) / f"backup-part-{fit}-{number}-{worker}.npz"


def present(directory: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The backups of a directory, the newest first."""
    directory = pathlib.Path(directory)
    newest = path_in(directory)
    ages = sorted(int(found[1]) for found in _matches(directory, _OLDER))
    return [*([newest] if newest.exists() else []), *(path_in(directory, age) for age in ages)]


def _matches(directory: pathlib.Path, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    for path in directory.glob("backup-*.npz"):
        if found := pattern.fullmatch(path.name):
            yield found


class Draft:
    """A file that has not got its name yet.

    Args:
        directory: the directory, which need not exist yet.
        worker: the index of the worker that writes it.
        members: what it holds. Each is written before the next is asked for.
    """

    def __init__(
        self, directory: str | os.PathLike[str], worker: int, members: Iterable[Member]
    ) -> None:
        self._directory = pathlib.Path(directory)
        # Workers on other machines may have the same process id.
        self._temporary = self._directory / f".backup-{worker}-{os.getpid()}.tmp"
        self._members = members

    def write(self) -> None:
        """Writes it to disk.

        Raises:
            OSError: If it cannot be written. Nothing is left of it then.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            write_archive(self._temporary, self._members)
        except BaseException:
            self.discard()
            raise

    def rename(self, path: pathlib.Path) -> None:
        """Gives it its name, in place of another file.

        Raises:
            OSError: If that fails.
        """
        os.replace(self._temporary, path)
        # The name must reach the disk as well as the contents.
        with contextlib.suppress(OSError):
            descriptor = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def discard(self) -> None:
        """Removes it."""
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def write_archive(path: pathlib.Path, members: Iterable[Member]) -> None:
    """Writes what `np.savez` would, an array at a time, and forces it to disk."""
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in members:
                # Its size is not known before it is written.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    write_array(member, array)
        file.flush()
        os.fsync(file.fileno())


def write_array(file: IO[bytes], array: _types.Array) -> None:
    """Writes what `np.save` would, without copying the array, for which NumPy holds the GIL."""
    array = np.asarray(array, order="C")
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(array.reshape(-1).view(np.uint8).data)


def publish(directory: str | os.PathLike[str], draft: Draft, keep: int) -> None:
    """Makes a draft the newest backup of a directory.

    Until then, the previous one is the newest: a kill leaves it as backup.npz or, if several are
    kept, as backup-1.npz.

    Args:
        directory: the directory.
        draft: what is written.
        keep: how many backups stay.

    Raises:
        OSError: If that fails.
    """
    _vacate(pathlib.Path(directory), 0, keep)
    draft.rename(path_in(directory))
    for path in present(directory)[keep:]:
        with contextlib.suppress(OSError):
            path.unlink()


def _vacate(directory: pathlib.Path, age: int, keep: int) -> None:
    """Makes room for a newer backup, if not all that are kept are needed."""
    if age + 1 < keep and path_in(directory, age).exists():
        _vacate(directory, age + 1, keep)
        os.replace(path_in(directory, age), path_in(directory, age + 1))


def has_parts(directory: str | os.PathLike[str]) -> bool:
    """Whether there are parts of backups."""
    return any(_matches(pathlib.Path(directory), _PART))


def clean(
    directory: str | os.PathLike[str],
    needed: Iterable[pathlib.Path],
    fit: str | None = None,
    number: int = 0,
) -> None:
    """Removes parts that belong to no backup.

    Args:
        directory: the directory.
        needed: the parts of those that are there.
        fit: the `fit` that is running, if there is one.
        number: which of its backups was written last: the parts of a later one stay.
    """
    names = {path.name for path in needed}
    for found in list(_matches(pathlib.Path(directory), _PART)):
        is_later = found[1] == fit and int(found[2]) > number
        if found[0] not in names and not is_later:
            remove_part(pathlib.Path(directory) / found[0])


def remove_part(path: pathlib.Path) -> None:
    """Removes a part of a backup, if it is there."""
    with contextlib.suppress(OSError):
        path.unlink()


def remove_unfinished(directory: str | os.PathLike[str]) -> None:
    """Removes what processes that were killed have left under temporary names."""
    for path in pathlib.Path(directory).glob(".backup-*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def remove(directory: str | os.PathLike[str]) -> None:
    """Removes all backups, and what is left of others."""
    for path in present(directory):
        with contextlib.suppress(OSError):
            path.unlink()
    clean(directory, ())
    remove_unfinished(directory)
