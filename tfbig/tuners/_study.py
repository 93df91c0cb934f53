"""Opening the study of a search, and the ledger beside it."""

import contextlib
import os
import pathlib
import random
import sqlite3
import time
import urllib.parse
import warnings

import optuna
import sqlalchemy as sa

from tfbig import errors
from tfbig.tuners import _ledger

__all__ = ("MEMORY", "name_metrics", "open_study", "shown", "without_secrets")

# The storage of a search that nothing is kept of.
MEMORY = "memory"

FILE = "study.db"

# Seconds that a process waits while another writes to an SQLite file.
_BUSY = 120


def shown(storage):
    """A storage as it may be printed: without passwords."""
    try:
        url = sa.engine.make_url(storage)
    except sa.exc.ArgumentError:
        return "a text that is no database URL"
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def without_secrets(text, storage):
    """A text in which the passwords of a storage are not."""
    try:
        url = sa.engine.make_url(storage or "")
    except sa.exc.ArgumentError:
        return text
    secrets = [url.password, *(v for k, v in url.query.items() if "pass" in k.lower())]
    for secret in map(str, filter(None, secrets)):
        # Also as it stands in the URL.
        text = text.replace(secret, "***").replace(urllib.parse.quote(secret, safe=""), "***")
    return text


@contextlib.contextmanager
def quiet(verbosity=optuna.logging.WARNING):
    """The engine's own messages would stand among those of the search."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(verbosity)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Of torch, where it finds no GPU; Optuna's Gaussian process does not use one.
            warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def open_study(storage, directory, name, directions, grace):
    """The study of this name, made if there is none, and its `Ledger`.

    Args:
        storage: None, for a file in the directory; `MEMORY`; or a database URL.
        directory: path.
        name: str.
        directions: list of "minimize" and "maximize".
        grace: float, see `Ledger`.

    Returns:
        `optuna.Study`, `Ledger`.

    Raises:
        StorageUnavailableError: If the database cannot be reached or written.
        StudyError: If the study has other directions.
    """
    if storage == MEMORY:
        with quiet():
            study = optuna.create_study(directions=directions, study_name=name)
        # One connection is the database; one thread at a time has it.
        engine = sa.create_engine(
            "sqlite://",
            poolclass=sa.pool.QueuePool,
            pool_size=1,
            max_overflow=0,
            connect_args={"check_same_thread": False},
        )
        _ledger.create_tables(engine)
        return study, _ledger.Ledger(engine, study._study_id, grace)
    storage = _url(storage, directory)
    with quiet(), _unavailable(storage):
        study = optuna.create_study(
            storage=_backend(storage), study_name=name, directions=directions, load_if_exists=True
        )
        ledger = _ledger.Ledger(_engine(storage), study._study_id, grace)
    found = [d.name.lower() for d in study.directions]
    if found != directions:
        raise errors.StudyError(
            f"The study {name!r} in {shown(storage)} has the directions {', '.join(found)}, and "
            f"this search {', '.join(directions)}. It is left as it is. Use another project_name, "
            "or overwrite=True to begin anew."
        )
    return study, ledger


def name_metrics(study, names):
    """Tells Optuna's own tools, as its dashboard, what the objectives are called."""
    if study.metric_names != names:
        with quiet():
            study.set_metric_names(names)


def _url(storage, directory):
    if storage is not None:
        return storage
    os.makedirs(directory, exist_ok=True)
    return f"sqlite:///{pathlib.Path(directory, FILE).absolute()}"


def _existing(storage, directory, name, grace):
    """The `Ledger` of a study and Optuna's storage; None if there is no such study."""
    storage = _url(storage, directory)
    with quiet(), _unavailable(storage):
        backend = _backend(storage)
        try:
            number = backend.get_study_id_from_name(name)
        except KeyError:
            return None
        return _ledger.Ledger(_engine(storage), number, grace), backend


def is_in_use(storage, directory, name, grace):
    """Whether other processes work on a study."""
    found = _existing(storage, directory, name, grace)
    return found is not None and found[0].others()


def remove(storage, directory, name):
    """Removes a study and its ledger."""
    if (found := _existing(storage, directory, name, 1)) is not None:
        with quiet():
            found[0].clear()
            optuna.delete_study(study_name=name, storage=found[1])


@contextlib.contextmanager
def _unavailable(storage):
    """Raises one error, without the password, for all that a database may say."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as e:
        inner = e.__cause__ if isinstance(e, optuna.exceptions.StorageInternalError) else e
        reason = str(getattr(inner, "orig", None) or inner).strip().splitlines()[0]
    except ImportError:
        reason = "there is no driver for it; for PostgreSQL, pip install psycopg[binary]"
    else:
        return
    raise errors.StorageUnavailableError(
        f"The storage {shown(storage)} cannot be used: {without_secrets(reason, storage)}."
    ) from None


def _backend(storage):
    """Optuna's storage. Processes that make its tables at once disturb each other."""
    arguments = {"timeout": _BUSY} if storage.startswith("sqlite") else {}
    attempts = 10
    for attempt in range(attempts):
        try:
            made = optuna.storages.RDBStorage(storage, engine_kwargs={"connect_args": arguments})
            if storage.startswith("sqlite"):
                sa.event.listen(made.engine, "connect", _be_quick)
                made.engine.dispose()
            with made.engine.connect():  # Fails here rather than in the middle.
                pass
            _ledger.create_tables(made.engine)
            return made
        except (sa.exc.IntegrityError, sa.exc.ProgrammingError, sa.exc.OperationalError) as e:
            is_race = "exist" in str(e).lower() or "unique" in str(e).lower()
            if attempt == attempts - 1 or not (is_race or "locked" in str(e)):
                raise
            time.sleep(random.uniform(0.05, 0.3))
    raise AssertionError


def _be_quick(connection, _):
    """Has SQLite write to a log first: readers wait for nobody, and no commit for the disk.

    A process that is killed loses nothing by that, a machine without power the last commits.
    """
    # Another process may be about to do the same; it holds for the file.
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _engine(storage):
    """A database whose transactions are one after the other."""
    if not storage.startswith("sqlite"):
        return sa.create_engine(storage, pool_pre_ping=True)
    engine = sa.create_engine(storage, connect_args={"timeout": _BUSY})
    sa.event.listen(engine, "connect", _be_quick)

    # Python's sqlite3 begins a transaction with the first write, SQLite reads before that
    # in another: two processes could read the same and both go on.
    @sa.event.listens_for(engine, "connect")
    def leave_transactions_alone(connection, _):
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin_at_once(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
