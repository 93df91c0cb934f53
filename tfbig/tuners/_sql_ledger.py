"""The ledger in a database: three tables beside the study's, changed by transactions."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa

from tfbig.tuners import _ledger
from tfbig.tuners._ledger import Column, Json, TrialRow

__all__ = ("TABLES", "SqlLedger", "create_tables")

_METADATA = sa.MetaData()

# Tables and columns keep the names under which running searches have stored them; `key` is the
# name in this code.
_TRIALS = sa.Table(
    "tfbig_slots",
    _METADATA,
    sa.Column("study", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Integer, key="index", primary_key=True, autoincrement=False),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("beat", sa.Integer, key="heartbeat", nullable=False),
    sa.Column("died", sa.Integer, key="deaths", nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

_CLAIMS = sa.Table(
    "tfbig_claims",
    _METADATA,
    sa.Column("study", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("slot", sa.Integer, key="index", nullable=False),
)

_SEARCH_METADATA = sa.Table(
    "tfbig_facts",
    _METADATA,
    sa.Column("study", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
)

# The names of all of them.
TABLES = tuple(_METADATA.tables)

# What parameters are called that a row is compared with. One that is called as a column is the
# column's new value.
_SEEN = "seen_{}"


def _with(names: Iterable[str]) -> tuple[sa.BindParameter[Any], ...]:
    return tuple(sa.bindparam(_SEEN.format(name)) for name in names)


# Building a statement takes longer than SQLite takes to run it, so each is built once.


def _rows(table: sa.Table, names: tuple[str, ...]) -> sa.ColumnElement[bool]:
    """The rows of a study that have some values."""
    names = ("study", *names)
    return sa.and_(*(table.c[n] == seen for n, seen in zip(names, _with(names), strict=True)))


@functools.cache
def _select(table: sa.Table, columns: tuple[str, ...], names: tuple[str, ...]) -> sa.Select[Any]:
    found = [table.c[name] for name in columns]
    return sa.select(*found).where(_rows(table, names)).order_by(found[0])


@functools.cache
def _locked(table: sa.Table, column: str, names: tuple[str, ...]) -> sa.Select[Any]:
    return sa.select(table.c[column]).where(_rows(table, names)).with_for_update()


@functools.cache
def _count(states: int) -> sa.Select[int]:
    """Counts trials in one of so many states."""
    among = _TRIALS.c["state"].in_(_with(f"state_{i}" for i in range(states)))
    return sa.select(sa.func.count()).select_from(_TRIALS).where(_rows(_TRIALS, ()), among)


@functools.cache
def _places() -> sa.Select[int, int | None]:
    """How many places there are, and the first free one."""
    free = sa.case((_TRIALS.c["state"] == _ledger.VOID, _TRIALS.c["index"]))
    return sa.select(sa.func.count(), sa.func.min(free)).where(_rows(_TRIALS, ()))


@functools.cache
def _update(table: sa.Table, names: tuple[str, ...]) -> sa.Update:
    return table.update().where(_rows(table, names))


@functools.cache
def _beat(names: tuple[str, ...]) -> sa.Update:
    return _update(_TRIALS, names).values(heartbeat=_TRIALS.c["heartbeat"] + 1)


@functools.cache
def _insert(table: sa.Table) -> sa.Insert:
    return table.insert()


_ROW = tuple(field.name for field in dataclasses.fields(TrialRow))


class _OvertakenError(Exception):
    """Another process was faster."""


class SqlLedger(_ledger.Ledger):
    """The tables, for one study and one process.

    Args:
        engine: A database whose transactions are serialized.
        study: The id of the study.
        grace: See `Ledger`.
    """

    is_shared = True

    def __init__(self, engine: sa.Engine, study: int, grace: float) -> None:
        super().__init__(grace)
        self._engine = engine
        self._study = study

    def _compared(self, **columns: Column) -> dict[str, Column]:
        """Parameters for what rows are compared with."""
        columns = {"study": self._study, **columns}
        return {_SEEN.format(name): value for name, value in columns.items()}

    # --- Trials ---

    def trials(self, **where: Column) -> list[TrialRow]:
        query = _select(_TRIALS, _ROW, tuple(where))
        with self._engine.begin() as connection:
            return [TrialRow(*row) for row in connection.execute(query, self._compared(**where))]

    def count(self, *states: str) -> int:
        seen = self._compared(**{f"state_{i}": state for i, state in enumerate(states)})
        with self._engine.begin() as connection:
            return int(connection.execute(_count(len(states)), seen).scalar_one())

    def take_new(self, max_trials: int | None, claim: str | None = None) -> int | None:
        while True:
            try:
                return self._take_new(max_trials, claim)
            except (sa.exc.IntegrityError, _OvertakenError):
                if claim is not None and self.claims(name=claim):
                    return None

    def _take_new(self, max_trials: int | None, claim: str | None) -> int | None:
        with self._engine.begin() as connection:
            count, free = connection.execute(_places(), self._compared()).one()
            if free is None and max_trials is not None and count >= max_trials:
                return None
            index: int = count if free is None else free
            new = {"owner": self.owner, "heartbeat": 0, "state": _ledger.RUNNING, "note": "{}"}
            if free is None:
                new |= {"study": self._study, "index": index, "deaths": 0}
                connection.execute(_insert(_TRIALS), new)
            else:
                seen = {"index": index, "state": _ledger.VOID}
                taken = connection.execute(
                    _update(_TRIALS, tuple(seen)), self._compared(**seen) | new
                )
                if taken.rowcount != 1:
                    raise _OvertakenError
            if claim is not None and not self._claim(connection, index, claim):
                connection.rollback()
                return None
        return index

    def _update(self, where: dict[str, Column], **values: Column) -> bool:
        with self._engine.begin() as connection:
            done = connection.execute(
                _update(_TRIALS, tuple(where)), self._compared(**where) | values
            )
            return bool(done.rowcount == 1)

    def heartbeat(self, index: int) -> bool:
        where = self._if_mine(index)
        with self._engine.begin() as connection:
            done = connection.execute(_beat(tuple(where)), self._compared(**where))
            return bool(done.rowcount == 1)

    def set_state(self, index: int, state: str, **note: Json) -> bool:
        where = self._if_mine(index)
        names, seen = tuple(where), self._compared(**where)
        with self._engine.begin() as connection:
            query = _locked(_TRIALS, "note", names)
            known = connection.execute(query, seen).scalar_one_or_none()
            if known is None:
                return False
            new = {"state": state, "note": json.dumps(json.loads(known) | note)}
            connection.execute(_update(_TRIALS, names), seen | new)
        return True

    # --- Claims ---

    def claim(self, index: int, name: str) -> bool:
        try:
            with self._engine.begin() as connection:
                return self._claim(connection, index, name)
        except sa.exc.IntegrityError:
            return False  # Another process was faster.

    def _claim(self, connection: sa.Connection, index: int, name: str) -> bool:
        query = _select(_CLAIMS, ("index",), ("name",))
        holder = connection.execute(query, self._compared(name=name)).scalar_one_or_none()
        if holder is None:
            values = {"study": self._study, "name": name, "index": index}
            connection.execute(_insert(_CLAIMS), values)
        return holder is None or holder == index

    def claims(self, **where: Column) -> set[str]:
        query = _select(_CLAIMS, ("name",), tuple(where))
        with self._engine.begin() as connection:
            return set(connection.execute(query, self._compared(**where)).scalars())

    # --- Metadata of the search ---

    def metadata(self, name: str, default: str | None = None) -> str | None:
        query = _select(_SEARCH_METADATA, ("text",), ("name",))
        try:
            with self._engine.begin() as connection:
                found = connection.execute(query, self._compared(name=name))
                known: str | None = found.scalar_one_or_none()
                if known is None and default is not None:
                    self._add_metadata(connection, name, default)
                    return default
                return known
        except sa.exc.IntegrityError:
            return self.metadata(name)

    def _add_metadata(self, connection: sa.Connection, name: str, text: str) -> None:
        values = {"study": self._study, "name": name, "text": text}
        connection.execute(_insert(_SEARCH_METADATA), values)

    def change_metadata(self, name: str, change: Callable[[str | None], str]) -> str:
        try:
            return self._changed_metadata(name, change)
        except sa.exc.IntegrityError:  # Another process was faster; there is a row to lock now.
            return self._changed_metadata(name, change)

    def _changed_metadata(self, name: str, change: Callable[[str | None], str]) -> str:
        seen = self._compared(name=name)
        query = _locked(_SEARCH_METADATA, "text", ("name",))
        with self._engine.begin() as connection:
            known = connection.execute(query, seen).scalar_one_or_none()
            new = change(known)
            if known is None:
                self._add_metadata(connection, name, new)
            elif new != known:
                connection.execute(_update(_SEARCH_METADATA, ("name",)), seen | {"text": new})
        return new

    def _metadata_like(self, beginning: str) -> list[str]:
        query = _select(_SEARCH_METADATA, ("text",), ())
        query = query.where(_SEARCH_METADATA.c["name"].startswith(beginning))
        with self._engine.begin() as connection:
            return list(connection.execute(query, self._compared()).scalars())

    def _remove_metadata(self, names: list[str]) -> None:
        where = _rows(_SEARCH_METADATA, ()), _SEARCH_METADATA.c["name"].in_(names)
        with self._engine.begin() as connection:
            connection.execute(_SEARCH_METADATA.delete().where(*where), self._compared())

    def clear(self) -> None:
        with self._engine.begin() as connection:
            for table in (_TRIALS, _CLAIMS, _SEARCH_METADATA):
                connection.execute(table.delete().where(_rows(table, ())), self._compared())


def create_tables(engine: sa.Engine) -> None:
    _METADATA.create_all(engine)
