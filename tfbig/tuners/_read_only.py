"""Opens the study of a search to look at it: nothing in it changes, and no file appears beside it.

SQLite would create files beside a database that it reads, and fails where it may not. There are
three cases. If there is no log beside the file, nobody is writing, and the file is read as it is.
If there are a log and an index of it, another process writes or has been killed; SQLite reads both,
and notes in the index, if it may, that somebody reads. If there is a log alone, a copy is read.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import optuna
import sqlalchemy as sa

from tfbig import errors
from tfbig.tuners import _ledger, _objectives, _record, _sql_ledger, _study

__all__ = ("OpenStudy", "ReadOnlyLedger", "open_if_needed", "open_study", "unavailable")

# Only those who take trials over need a grace period.
_NO_GRACE = float("inf")

# Bytes 18 and 19 of an SQLite file that is written by way of a log.
_HAS_LOG = b"\2\2"


class ReadOnlyLedger(_sql_ledger.SqlLedger):
    """A ledger that nobody may write.

    What the processes of a search agree on is compared with what is stored, and not stored.

    Attributes:
        opened: What this belongs to.
    """

    opened: "OpenStudy"

    def _changed_metadata(self, name: str, change: Callable[[str | None], str]) -> str:
        return change(self.metadata(name))

    def join(self) -> NoReturn:
        raise errors.StorageUnavailableError(
            "The study cannot be written, so its results can be read, but no trial can run. Copy "
            "the project's directory to where it can be written, or change its permissions."
        )


class OpenStudy:
    """A study that is open, and that nobody may write through this.

    Attributes:
        study: The study.
        ledger: The ledger beside it.
        place: Where it is stored, without passwords.
    """

    def __init__(
        self,
        study: optuna.Study,
        ledger: ReadOnlyLedger,
        url: str,
        place: str,
        file: "_File | None" = None,
    ) -> None:
        self.study = study
        self.ledger = ledger
        self._url = url
        self.place = place
        self._file = file

    def record(self) -> _record.Record:
        """The search as it is now.

        Raises:
            StorageUnavailableError: If the database cannot be read.
        """
        with unavailable(self._url, self.place):
            return _record.read(self.study, self.ledger, self.place)

    def running(self) -> tuple[list[_ledger.TrialRow], set[str]]:
        """The trials that run, and the processes that have said that they work on the search.

        Raises:
            StorageUnavailableError: If the database cannot be read.
        """
        with unavailable(self._url, self.place):
            return self.ledger.trials(state=_ledger.RUNNING), self.ledger.processes()

    def is_stale(self) -> bool:
        """Whether it must be opened again to see what has changed."""
        return self._file is not None and self._file.is_stale()


class _File:
    """An SQLite file, and the way in which it can be read without a change."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._log, self._index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
        self._stamp = self._now()
        self._is_shared = not self._has_log_header() or self._index.exists()
        if self._is_shared:
            # Not SQLite's default, so that a file that was removed meanwhile is not created anew.
            self.url = _study.file_url(path, mode="ro")
        elif self._log.exists():
            self.url = _study.file_url(self._copied(), mode="rw")
        else:
            self.url = _study.file_url(path, immutable="1")

    def is_stale(self) -> bool:
        if self._is_shared:
            return self._has_log_header() and not self._index.exists()
        return self._now() != self._stamp

    def _has_log_header(self) -> bool:
        with open(self._path, "rb") as file:
            return file.read(20)[18:] == _HAS_LOG

    def _now(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for path in (self._path, self._log):
            status = path.stat() if path.exists() else None
            found.append(status and (status.st_mtime_ns, status.st_size))
        return found

    def _copied(self) -> pathlib.Path:
        directory = tempfile.mkdtemp(prefix="tfbig-study-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        copy = pathlib.Path(directory, _study.FILE)
        # The log last: a file is only written from a log that stays until then.
        for path in (self._path, self._log):
            shutil.copyfile(path, copy.with_name(path.name.replace(self._path.name, copy.name)))
        return copy


def open_if_needed(
    storage: str | None,
    directory: str | os.PathLike[str],
    name: str,
    directions: list[_objectives.Direction],
) -> tuple[optuna.Study, _ledger.Ledger] | None:
    """The study of a project's directory that this process may not write; None if it may.

    The arguments are those of `_study.open_study`.
    """
    path = pathlib.Path(directory, _study.FILE)
    if storage is not None or not path.exists():
        return None
    if _can_write(path) and _can_write(path.parent):
        return None
    opened = open_file(path, name)
    _study.check_directions(opened.study, directions, str(path))
    # A copy of the file lives as long as this.
    opened.ledger.opened = opened
    return opened.study, opened.ledger


def _can_write(path: pathlib.Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def open_study(where: str, name: str | None = None) -> OpenStudy:
    """The study of a search.

    Args:
        where: The directory of a project, its file, or a database URL.
        name: The name of the study. Defaults to the only one.

    Raises:
        StudyError: If there is no such study.
        StorageUnavailableError: If the database cannot be read.
    """
    if "://" not in where:
        return open_file(_file_in(pathlib.Path(where)), name)
    with _study._unavailable(where):
        url = sa.engine.make_url(where)
        if url.get_backend_name() == "sqlite":
            if not url.database or url.database.startswith((":memory:", "file:")):
                raise errors.StudyError(f"{_study.shown(where)} is not a file with a study.")
            return open_file(_file_in(pathlib.Path(url.database)), name)
        return _open(where, _study.shown(where).partition("?")[0], name)


def open_file(path: pathlib.Path, name: str | None) -> OpenStudy:
    """The study in an SQLite file; see `open_study`."""
    try:
        file = _File(path)
    except OSError as e:
        raise errors.StorageUnavailableError(f"{path} cannot be read: {e.strerror}.") from None
    return _open(file.url, str(path), name, file)


def _file_in(path: pathlib.Path) -> pathlib.Path:
    if path.is_dir() and not (path / _study.FILE).exists():
        nearby = sorted(str(p.parent) for p in path.glob(f"*/{_study.FILE}"))
        hint = f" Did you mean {' or '.join(nearby[:5])}?" if nearby else ""
        raise errors.StudyError(f"{path} holds no search: it has no {_study.FILE}.{hint}")
    if not path.exists():
        raise errors.StudyError(f"{path} does not exist.")
    return path / _study.FILE if path.is_dir() else path


def _open(url: str, place: str, name: str | None, file: _File | None = None) -> OpenStudy:
    with _study.quiet(), unavailable(url, place):
        engine = _engine(url)
        tables = set(sa.inspect(engine).get_table_names())
        if not {"studies", *_sql_ledger.TABLES} <= tables:
            raise errors.StudyError(f"{place} holds no search of tfbig.")
        # Without a pool: a connection that stays would keep others from tidying up.
        arguments: dict[str, Any] = {"poolclass": sa.pool.NullPool}
        if file is None:
            arguments["execution_options"] = _execution_options(url)
        storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments, skip_table_creation=True)
        names = [s.study_name for s in storage.get_all_studies()]
        if name is None and len(names) == 1:
            (name,) = names
        if name not in names:
            listed = ", ".join(map(repr, names)) or "none"
            what = "holds several searches" if name is None else f"holds no search {name!r}"
            what = what if names else "holds no search yet"
            raise errors.StudyError(f"{place} {what}. Its searches: {listed}.")
        study = optuna.load_study(study_name=name, storage=storage)
        ledger = ReadOnlyLedger(engine, study._study_id, _NO_GRACE)
        return OpenStudy(study, ledger, url, place, file)


def _execution_options(url: str) -> dict[str, Any]:
    return {"postgresql_readonly": True} if url.startswith("postgres") else {}


def _engine(url: str) -> sa.Engine:
    return sa.create_engine(
        url, poolclass=sa.pool.NullPool, execution_options=_execution_options(url)
    )


@contextlib.contextmanager
def unavailable(url: str, place: str) -> Iterator[None]:
    """Turns the errors of a database, and those of what is in it, into errors of tfbig."""
    try:
        with _study._unavailable(url):
            yield
    except errors.StorageUnavailableError as e:
        text = str(e).replace(f"The storage {_study.shown(url)}", place)
        raise errors.StorageUnavailableError(text) from None
    except errors.TfbigError:
        raise
    except (ValueError, KeyError, AssertionError) as e:
        # As Optuna and JSON say that the tables hold something else than they should.
        what = f"{type(e).__name__}: {e}".rstrip(": ").splitlines()[0]
        raise errors.StorageUnavailableError(
            f"{place} is damaged, or was written by another version ({what})."
        ) from None
    except RuntimeError as e:
        # Optuna's, of tables that another version of it has made.
        raise errors.StorageUnavailableError(f"{place} cannot be read: {e}") from None
