"""Opens the study of a search, and the ledger beside it."""

import contextlib
import math
import os
import pathlib
import random
import sqlite3
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import optuna
import optuna.storages._rdb.models
import sqlalchemy as sa

from tfbig import errors
from tfbig.tuners import _directory, _ledger, _memory_ledger, _objectives, _sql_ledger

__all__ = (
    "FILE",
    "MEMORY",
    "check_directions",
    "file_url",
    "is_sqlite_in_memory",
    "name_metrics",
    "open_study",
    "remove_unless_used",
    "shown",
    "without_secrets",
)

# The storage of a search that is not kept.
MEMORY = "memory"

FILE = "study.db"

# With which the name of an SQLite file begins that is quoted.
_FILE_URI = "file:"

# Seconds that a process waits while another writes to an SQLite file.
_BUSY_TIMEOUT = 120

# A database driver's connection: each driver has a class of its own.
_Connection: TypeAlias = Any


def is_sqlite_in_memory(storage: str) -> bool:
    """Whether a URL is that of an SQLite database in memory, which nobody else can see."""
    try:
        url = sa.engine.make_url(storage)
    except sa.exc.ArgumentError:
        return False
    database = (url.database or "").removeprefix(_FILE_URI)
    is_unnamed = not database or database.startswith(":memory:")
    return url.get_backend_name() == "sqlite" and (is_unnamed or url.query.get("mode") == MEMORY)


def shown(storage: str) -> str:
    """A storage without its passwords, for messages; the path of a file that this has quoted."""
    try:
        url = sa.engine.make_url(storage)
    except sa.exc.ArgumentError:
        return "a text that is not a database URL"
    if url.get_backend_name() == "sqlite" and (url.database or "").startswith(f"{_FILE_URI}/"):
        return urllib.parse.unquote(str(url.database).removeprefix(_FILE_URI))
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def without_secrets(text: str, storage: str | None) -> str:
    """A text with the passwords of a storage replaced."""
    try:
        url = sa.engine.make_url(storage or "")
    except sa.exc.ArgumentError:
        return text
    secrets = [url.password, *(v for k, v in url.query.items() if "pass" in k.lower())]
    for secret in map(str, filter(None, secrets)):
        # The text may have the password as the URL spells it.
        text = text.replace(secret, "***").replace(urllib.parse.quote(secret, safe=""), "***")
    return text


@contextlib.contextmanager
def quiet(verbosity: int = optuna.logging.WARNING) -> Iterator[None]:
    """Keeps Optuna's own messages from mixing with those of the search."""
    level = optuna.logging.get_verbosity()
    is_quiet = level >= verbosity
    # It makes every logger of the process forget its level.
    if not is_quiet:
        optuna.logging.set_verbosity(verbosity)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # PyTorch warns if it finds no GPU; Optuna's Gaussian process does not use one.
            warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)
            yield
    finally:
        if not is_quiet:
            optuna.logging.set_verbosity(level)


def open_study(
    storage: str | None,
    directory: str | os.PathLike[str],
    name: str,
    directions: list[_objectives.Direction],
    grace: float,
) -> tuple[optuna.Study, _ledger.Ledger]:
    """The study of a name and its ledger; both are created if there are none.

    Args:
        storage: None for a file in the directory; `MEMORY`; or a database URL.
        directory: Where the file is.
        name: The name of the study.
        directions: "minimize" or "maximize", for each objective.
        grace: See `Ledger`.

    Raises:
        StorageUnavailableError: If the database cannot be reached or written.
        StudyError: If the study has different directions.
    """
    if storage == MEMORY:
        _check_not_stored(directory, name)
        with quiet():
            study = optuna.create_study(directions=directions, study_name=name)
        return study, _memory_ledger.MemoryLedger(grace)
    storage = _url(storage, directory)
    with quiet(), _unavailable(storage):
        study = optuna.create_study(
            storage=_backend(storage), study_name=name, directions=directions, load_if_exists=True
        )
        ledger = _sql_ledger.SqlLedger(_engine(storage), study._study_id, grace)
    if storage.startswith("sqlite"):
        _check_not_emptied(ledger, directory, name)
    check_directions(study, directions, shown(storage))
    return study, ledger


def check_directions(
    study: optuna.Study, directions: list[_objectives.Direction], place: str
) -> None:
    """Raises `StudyError` if a study has other directions."""
    found = [d.name.lower() for d in study.directions]
    if found != directions:
        raise errors.StudyError(
            f"The study {study.study_name!r} in {place} was created by a different search "
            f"(directions: {', '.join(found)}, expected {', '.join(directions)}). It is unchanged. "
            "Use a different `project_name`, or `overwrite=True` to start over."
        )


def _check_not_emptied(
    ledger: _ledger.Ledger, directory: str | os.PathLike[str], name: str
) -> None:
    """Raises if a study knows of no trial, and files of trials are there."""
    if _directory.has_trials(directory) and not ledger.trials():
        raise errors.StudyError(
            f"The study {name!r} is empty, but {os.fspath(directory)} has files of its trials, "
            "which a new search would overwrite: its database was removed or emptied. Restore it, "
            "use a different `project_name`, or `overwrite=True` to start over."
        )


def _check_not_stored(directory: str | os.PathLike[str], name: str) -> None:
    """Raises if a directory has a stored search, whose models one in memory would overwrite."""
    has_file = pathlib.Path(directory, FILE).exists()
    if has_file and _directory.has_trials(directory) and _existing(None, directory, name):
        raise errors.StudyError(
            f"{os.fspath(directory)} has a stored search, and one with storage='memory' would "
            "overwrite the files of its trials. Leave out `storage` to resume it, use a different "
            "`project_name`, or `overwrite=True` to remove it."
        )


def name_metrics(study: optuna.Study, names: list[str]) -> None:
    """Names the objectives for Optuna's own tools, such as its dashboard."""
    if study.metric_names != names:
        with quiet():
            study.set_metric_names(names)


def _url(storage: str | None, directory: str | os.PathLike[str]) -> str:
    if storage is not None:
        return storage
    _directory.make(directory)
    return file_url(pathlib.Path(directory, FILE))


def file_url(path: pathlib.Path, **options: str) -> str:
    """The URL of an SQLite file, whatever characters its path has.

    Args:
        path: The path of the file.
        **options: Those of SQLite, such as `mode="ro"`.
    """
    database = _FILE_URI + urllib.parse.quote(str(path.absolute()))
    # Versions of SQLAlchemy differ in whether they quote it once more.
    url = sa.URL.create("sqlite", database=database, query={**options, "uri": "true"})
    return url.render_as_string(hide_password=False)


def _existing(
    storage: str | None, directory: str | os.PathLike[str], name: str, grace: float = math.inf
) -> tuple[_ledger.Ledger, optuna.storages.RDBStorage] | None:
    """The ledger of a study and Optuna's storage; None if there is no such study."""
    url = _url(storage, directory)
    with quiet(), _unavailable(url):
        backend = _backend(url)
        try:
            number = backend.get_study_id_from_name(name)
        except KeyError:
            return None
        return _sql_ledger.SqlLedger(_engine(url), number, grace), backend


def remove_unless_used(
    storage: str | None, directory: str | os.PathLike[str], name: str, grace: float
) -> None:
    """Removes a study, its ledger and the files of its trials.

    Raises:
        StudyError: If other processes work on it, or in its directory. Nothing is removed then.
    """
    is_in_memory = storage == MEMORY
    if is_in_memory:
        storage = None  # An earlier search may have been stored.
    with _directory.in_use(directory, alone=is_in_memory):
        has_storage = storage is not None or pathlib.Path(directory, FILE).exists()
        found = _existing(storage, directory, name, grace) if has_storage else None
        if found is not None:
            ledger, backend = found
            if ledger.has_others():
                where = directory if storage is None else shown(storage)
                raise errors.StudyError(
                    f"overwrite=True would remove the study {name!r} in {where}, but other "
                    "processes work on it. Nothing is removed. End them first, or leave out "
                    "`overwrite` to join them."
                )
            with quiet():
                ledger.clear()
                optuna.delete_study(study_name=name, storage=backend)
        _directory.remove_trials(directory)


# What a database says if it cannot be used, rather than if it was used in a wrong way.
_UNAVAILABLE = (sa.exc.OperationalError, sa.exc.DatabaseError, sa.exc.InternalError)
# These pass, and are tried again.
_PASSING = ("locked", "deadlock", "serialize", "exist", "unique")


def _explained(engine: sa.Engine, storage: str) -> sa.Engine:
    """Makes a database that fails during a search say so in tfbig's words: a full disk, damage."""

    @sa.event.listens_for(engine, "handle_error")
    def explain(context: sa.engine.ExceptionContext) -> Exception | None:
        error = context.sqlalchemy_exception
        # Its subclasses are faults of programs.
        if type(error) not in _UNAVAILABLE:
            return None
        reason = str(context.original_exception).strip().splitlines()[0]
        if any(word in reason.lower() for word in _PASSING):
            return None
        return _unavailable_error(storage, reason)

    return engine


def _unavailable_error(storage: str, reason: str) -> errors.StorageUnavailableError:
    return errors.StorageUnavailableError(
        f"The storage {shown(storage)} cannot be used: {without_secrets(reason, storage)}. What it "
        "has recorded is kept; start the program again once it can be used."
    )


@contextlib.contextmanager
def _unavailable(storage: str) -> Iterator[None]:
    """Turns every error of a database into one of tfbig's, without the password."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as e:
        is_wrapped = isinstance(e, optuna.exceptions.StorageInternalError)
        inner: BaseException | None = e.__cause__ if is_wrapped else e
        reason = str(getattr(inner, "orig", None) or inner).strip().splitlines()[0]
    except ImportError:
        reason = "its driver is not installed; for PostgreSQL, pip install psycopg[binary]"
    else:
        return
    raise _unavailable_error(storage, reason) from None


def _backend(storage: str) -> optuna.storages.RDBStorage:
    """Optuna's storage; tries again if several processes create its tables at once."""
    arguments = {"timeout": _BUSY_TIMEOUT} if storage.startswith("sqlite") else {}
    attempts = 10
    for attempt in range(attempts):
        try:
            if storage.startswith("sqlite"):
                _create_at_once(storage)
            made = optuna.storages.RDBStorage(storage, engine_kwargs={"connect_args": arguments})
            if storage.startswith("sqlite"):
                sa.event.listen(made.engine, "connect", _use_write_ahead_log)
                made.engine.dispose()
            with made.engine.connect():  # Fail here rather than during the search.
                pass
            _sql_ledger.create_tables(made.engine)
            _explained(made.engine, storage)
            return made
        except (sa.exc.IntegrityError, sa.exc.ProgrammingError, sa.exc.OperationalError) as e:
            is_race = "exist" in str(e).lower() or "unique" in str(e).lower()
            if attempt == attempts - 1 or not (is_race or "locked" in str(e)):
                raise
            time.sleep(random.uniform(0.05, 0.3))
    raise AssertionError


def _create_at_once(storage: str) -> None:
    """Creates the tables of Optuna in an SQLite file, all or none.

    Optuna itself creates them one by one, and looks for no index where there is a table. If it is
    killed between the table of the studies and the index that keeps their names apart, two
    processes can later create a study of the same name, and no process can read it any more.
    """
    engine = _engine(storage)
    optuna.storages._rdb.models.BaseModel.metadata.create_all(engine)
    engine.dispose()


def _use_write_ahead_log(connection: _Connection, _: object) -> None:
    """Lets SQLite write to a log first: readers never wait, and commits do not wait for the disk.

    If a process is killed, nothing is lost. If the machine loses power, the last commits are.
    """
    # Another process may be doing the same; once is enough for the file.
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _engine(storage: str) -> sa.Engine:
    """A database whose transactions are serialized."""
    if not storage.startswith("sqlite"):
        return _explained(sa.create_engine(storage, pool_pre_ping=True), storage)
    engine = sa.create_engine(storage, connect_args={"timeout": _BUSY_TIMEOUT})
    _explained(engine, storage)
    sa.event.listen(engine, "connect", _use_write_ahead_log)

    # Python's sqlite3 begins a transaction at the first write. Earlier reads would not be part of
    # it: two processes could read the same state, and both act on it.
    @sa.event.listens_for(engine, "connect")
    def leave_transactions_alone(connection: _Connection, _: object) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin_at_once(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
