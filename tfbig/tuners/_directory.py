"""The directory of a project: the files of its trials, and which searches use it."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from tfbig import errors

__all__ = ("GENERATIONS", "has_trials", "in_use", "make", "remove_trials")

# Where a population keeps its states.
GENERATIONS = "generations"


def make(directory: str | os.PathLike[str]) -> None:
    """Makes the directory of a project, unless there is one.

    Raises:
        StorageUnavailableError: If that is not possible.
    """
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as e:
        raise errors.StorageUnavailableError(
            f"The directory {os.fspath(directory)} cannot be made: {e.strerror}. Choose another "
            "`directory`."
        ) from None


def _files_of_trials(directory: str | os.PathLike[str]) -> list[pathlib.Path]:
    directory = pathlib.Path(directory)
    return [*directory.glob("trial_*"), *directory.glob(GENERATIONS)]


def has_trials(directory: str | os.PathLike[str]) -> bool:
    """Whether there are files of trials."""
    return bool(_files_of_trials(directory))


def remove_trials(directory: str | os.PathLike[str]) -> None:
    """Removes the files of all trials."""
    for path in _files_of_trials(directory):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def in_use(directory: str | os.PathLike[str], alone: bool) -> Iterator[None]:
    """Within, a search uses a directory.

    Args:
        directory: The directory.
        alone: Whether no other search may use it meanwhile. Searches in memory know nothing of each
            other, and give their trials the same names.

    Raises:
        StudyError: If another search uses it that does not go with this one.
        StorageUnavailableError: If there is no such directory, and it cannot be made.
    """
    make(directory)
    # Whatever ends the process unlocks it.
    opened = os.open(directory, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        with contextlib.suppress(OSError):  # Some network file systems cannot lock.
            try:
                fcntl.flock(opened, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise errors.StudyError(
                    f"Another search uses {os.fspath(directory)}, and one of the two has "
                    "storage='memory', so each would overwrite the models of the other. Wait "
                    "until it has ended, or use a different `project_name`."
                ) from None
        yield
    finally:
        # A process that was forked meanwhile has it open as well.
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_UN)
        os.close(opened)
