"""Which process runs which trial: three tables beside the study's, changed by transactions.

One process at a time owns a trial, and its heartbeat shows that it still runs. Whatever another
process does in its name is refused. A process whose heartbeat stands still has died. Each process
measures that with its own clock, so clocks need not agree.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import sqlalchemy as sa

from tfbig.tuners import _processes

__all__ = ("TABLES", "Ledger", "TrialRow")

# Longest time between two heartbeats, in seconds.
_LONGEST_INTERVAL = 10.0

# What a column is compared with or set to; SQLAlchemy converts it by the column's type.
_Column: TypeAlias = Any
# What is written into a note: anything that JSON can express.
_Json: TypeAlias = Any

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

# The states of a trial: a process runs it, or may take it; it waits to be continued; its result is
# in the note; its result is in the study as well; there were no values for it, so that its place is
# free.
RUNNING, PAUSED, ENDED, RECORDED, VOID = "running", "paused", "ended", "told", "void"


@dataclasses.dataclass(frozen=True)
class TrialRow:
    """A trial as a process saw it in the ledger.

    Attributes:
        index: The number of the trial in the search, from 0.
        owner: The process that runs it; "" if none does.
        heartbeat: How often the owner has said that it still runs.
        deaths: How often the trial was taken from a process that had died.
        state: `RUNNING`, `PAUSED`, `ENDED`, `RECORDED` or `VOID`.
        note: JSON, what the search needs to know of the trial besides the study.
    """

    index: int
    owner: str
    heartbeat: int
    deaths: int
    state: str
    note: str


class Ledger:
    """The tables, for one study and one process.

    Args:
        engine: A database whose transactions are serialized.
        study: The id of the study.
        grace: Seconds after which a trial may be taken from a process without a heartbeat.
        is_shared: Whether other processes can reach the database.

    Attributes:
        is_shared: Whether other processes can reach the database.
        owner: The name of this process.
        heartbeat_interval: Seconds between two heartbeats of this process.
    """

    def __init__(self, engine: sa.Engine, study: int, grace: float, is_shared: bool = True) -> None:
        self.is_shared = is_shared
        self._engine = engine
        self._study = study
        self._grace = grace
        self.owner = _processes.this_process()
        self.heartbeat_interval = min(grace / 6, _LONGEST_INTERVAL)
        # By index: the owner and heartbeat that were last seen, and when they changed.
        self._seen: dict[int, tuple[tuple[str, int], float]] = {}

    def _where(self, table: sa.Table, **columns: _Column) -> sa.ColumnElement[bool]:
        found = [table.c["study"] == self._study]
        found += [table.c[name] == value for name, value in columns.items()]
        return sa.and_(*found)

    # --- Trials ---

    def trials(self, **where: _Column) -> list[TrialRow]:
        """The trials with these values, in order; all of them without any."""
        columns = [_TRIALS.c[field.name] for field in dataclasses.fields(TrialRow)]
        query = sa.select(*columns).where(self._where(_TRIALS, **where))
        with self._engine.begin() as connection:
            return [TrialRow(*row) for row in connection.execute(query.order_by(columns[0]))]

    def count(self, *states: str) -> int:
        """How many trials are in one of some states."""
        where = self._where(_TRIALS), _TRIALS.c["state"].in_(states)
        query = sa.select(sa.func.count()).select_from(_TRIALS).where(*where)
        with self._engine.begin() as connection:
            return int(connection.execute(query).scalar_one())

    def taken(self) -> int:
        """How many places are not free: each of these trials runs, or has had values."""
        return self.count(RUNNING, PAUSED, ENDED, RECORDED)

    def take_new(self, max_trials: int | None, claim: str | None = None) -> int | None:
        """Takes a free place, or adds one, for a trial of this process; claims a name for it.

        Returns:
            The index of the trial; None if there are `max_trials` already, or if another has the
            name.
        """
        while True:
            for row in self.trials(state=VOID):
                if self.take(row, note="{}"):
                    if claim is None or self.claim(row.index, claim):
                        return row.index
                    self.set_state(row.index, VOID)
                    return None
            try:
                return self._add(max_trials, claim)
            except sa.exc.IntegrityError:  # Another process was faster.
                if claim is not None and self.claims(name=claim):
                    return None

    def _add(self, max_trials: int | None, claim: str | None) -> int | None:
        count = sa.select(sa.func.count()).where(self._where(_TRIALS))
        new = {"study": self._study, "owner": self.owner, "heartbeat": 0, "deaths": 0}
        with self._engine.begin() as connection:
            index: int = connection.execute(count).scalar_one()
            if max_trials is not None and index >= max_trials:
                return None
            connection.execute(
                _TRIALS.insert().values(index=index, state=RUNNING, note="{}", **new)
            )
            if claim is not None:
                values = {"study": self._study, "name": claim, "index": index}
                connection.execute(_CLAIMS.insert().values(**values))
        return index

    def take(self, row: TrialRow, note: str | None = None, died: bool = False) -> bool:
        """Makes this process the owner of a trial, unless the trial has changed since it was seen.

        Args:
            row: The trial as it was seen.
            note: Replaces its note.
            died: Whether its owner has died.

        Returns:
            Whether this process is the owner now.
        """
        seen = {
            "index": row.index,
            "owner": row.owner,
            "heartbeat": row.heartbeat,
            "state": row.state,
        }
        return self._update(
            seen,
            owner=self.owner,
            heartbeat=0,
            deaths=row.deaths + died,
            state=RUNNING,
            note=row.note if note is None else note,
        )

    def _update(self, where: dict[str, _Column], **values: _Column) -> bool:
        with self._engine.begin() as connection:
            done = connection.execute(
                _TRIALS.update().where(self._where(_TRIALS, **where)).values(values)
            )
            return bool(done.rowcount == 1)

    def _if_mine(self, index: int) -> dict[str, _Column]:
        return {"index": index, "owner": self.owner, "state": RUNNING}

    def heartbeat(self, index: int) -> bool:
        """Says that this process still runs a trial; returns whether it still owns it."""
        return self._update(self._if_mine(index), heartbeat=_TRIALS.c["heartbeat"] + 1)

    def set_state(self, index: int, state: str, **note: _Json) -> bool:
        """Sets the state of a trial of this process, and adds to its note.

        Returns:
            Whether this process still owned it. If not, nothing changes.
        """
        where = self._where(_TRIALS, **self._if_mine(index))
        with self._engine.begin() as connection:
            query = sa.select(_TRIALS.c["note"]).where(where).with_for_update()
            known = connection.execute(query).scalar_one_or_none()
            if known is None:
                return False
            new = json.dumps(json.loads(known) | note)
            connection.execute(_TRIALS.update().where(where).values(state=state, note=new))
        return True

    def release(self, index: int, **note: _Json) -> bool:
        """Lets any process take a trial of this process; returns whether it still owned it."""
        is_mine = self.set_state(index, RUNNING, **note)
        return is_mine and self._update(self._if_mine(index), owner="")

    def advance(self, row: TrialRow, state: str) -> bool:
        """Sets the state of a trial that no process runs, unless it has changed."""
        seen = {"index": row.index, "state": row.state, "owner": row.owner}
        return self._update(seen, state=state, owner="")

    def abandoned(self) -> list[TrialRow]:
        """Running trials whose process has ended, or has had no heartbeat for too long."""
        found, now = [], time.monotonic()
        for row in self.trials(state=RUNNING):
            if row.owner == self.owner:
                continue
            state = (row.owner, row.heartbeat)
            seen, since = self._seen.get(row.index, (None, now))
            if seen != state:
                self._seen[row.index] = (state, since := now)
            if not row.owner or _processes.is_dead(row.owner) or now - since >= self._grace:
                found.append(row)
        return found

    # --- Processes ---

    @property
    def _entry(self) -> str:
        return f"process {self.owner[-8:]}"

    def join(self) -> None:
        """Lets other processes know that this one works on the study."""
        self.metadata(self._entry, self.owner)

    def join_with(self, memory: int) -> None:
        """Lets other processes know how many bytes of memory this one has."""
        entry = json.dumps([self.owner, memory])
        self.change_metadata(f"memory of {self._entry}", lambda _: entry)

    def memory_of_processes(self) -> dict[str, int]:
        """By the names of processes that have not died: their bytes of memory, as they said."""
        names = _SEARCH_METADATA.c["name"].like("memory of process %")
        query = sa.select(_SEARCH_METADATA.c["text"]).where(self._where(_SEARCH_METADATA), names)
        with self._engine.begin() as connection:
            found = dict(map(json.loads, connection.execute(query).scalars()))
        return {owner: size for owner, size in found.items() if not _processes.is_dead(owner)}

    def leave(self) -> None:
        """Lets other processes know that this one no longer works on the study."""
        names = _SEARCH_METADATA.c["name"].in_([self._entry, f"memory of {self._entry}"])
        with self._engine.begin() as connection:
            where = sa.and_(self._where(_SEARCH_METADATA), names)
            connection.execute(_SEARCH_METADATA.delete().where(where))

    def has_others(self) -> bool:
        """Whether other processes work on the study.

        If they may be on other machines, this waits for a heartbeat.
        """
        names = _SEARCH_METADATA.c["name"].like("process %")
        query = sa.select(_SEARCH_METADATA.c["text"]).where(self._where(_SEARCH_METADATA), names)
        with self._engine.begin() as connection:
            joined = connection.execute(query).scalars().all()
        here = [o for o in joined if _processes.process_id(o) not in (None, os.getpid())]
        if any(not _processes.is_dead(owner) for owner in here):
            return True
        before = {
            row.index: row
            for row in self.trials(state=RUNNING)
            if row.owner and _processes.process_id(row.owner) != os.getpid()
        }
        if not any(not _processes.is_dead(row.owner) for row in before.values()):
            return False
        return self._change_within(min(self._grace, _LONGEST_INTERVAL * 1.5), before)

    def _change_within(self, seconds: float, before: dict[int, TrialRow]) -> bool:
        """Whether one of some trials changes in the next seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.2)
            now = {row.index: row for row in self.trials()}
            if any(now.get(index) != row for index, row in before.items()):
                return True
        return False

    # --- Claims ---

    def claim(self, index: int, name: str) -> bool:
        """Claims a name for a trial; returns whether the trial has it now."""
        query = sa.select(_CLAIMS.c["index"]).where(self._where(_CLAIMS, name=name))
        try:
            with self._engine.begin() as connection:
                holder = connection.execute(query).scalar_one_or_none()
                if holder is None:
                    values = {"study": self._study, "name": name, "index": index}
                    connection.execute(_CLAIMS.insert().values(**values))
                return holder is None or holder == index
        except sa.exc.IntegrityError:
            return False  # Another process was faster.

    def claims(self, **where: _Column) -> set[str]:
        """All claimed names; with `index=`, those of one trial."""
        with self._engine.begin() as connection:
            query = sa.select(_CLAIMS.c["name"]).where(self._where(_CLAIMS, **where))
            return set(connection.execute(query).scalars())

    # --- Metadata of the search ---

    def metadata(self, name: str, default: str | None = None) -> str | None:
        """The text stored under a name; stores the default if there is none."""
        query = sa.select(_SEARCH_METADATA.c["text"])
        query = query.where(self._where(_SEARCH_METADATA, name=name))
        try:
            with self._engine.begin() as connection:
                known: str | None = connection.execute(query).scalar_one_or_none()
                if known is None and default is not None:
                    values = {"study": self._study, "name": name, "text": default}
                    connection.execute(_SEARCH_METADATA.insert().values(**values))
                    return default
                return known
        except sa.exc.IntegrityError:
            return self.metadata(name)

    def is_first(self, name: str) -> bool:
        """Whether this process is to do what is done once: none does it, or that one has died."""
        owner = self.metadata(name, self.owner)
        return owner == self.owner or _processes.is_dead(str(owner))

    def change_metadata(self, name: str, change: Callable[[str | None], str]) -> str:
        """Replaces the text under a name, None if there is none, by what a function returns."""
        try:
            return self._changed_metadata(name, change)
        except sa.exc.IntegrityError:  # Another process was faster; there is a row to lock now.
            return self._changed_metadata(name, change)

    def _changed_metadata(self, name: str, change: Callable[[str | None], str]) -> str:
        where = self._where(_SEARCH_METADATA, name=name)
        query = sa.select(_SEARCH_METADATA.c["text"]).where(where).with_for_update()
        with self._engine.begin() as connection:
            known = connection.execute(query).scalar_one_or_none()
            new = change(known)
            if known is None:
                values = {"study": self._study, "name": name, "text": new}
                connection.execute(_SEARCH_METADATA.insert().values(**values))
            elif new != known:
                connection.execute(_SEARCH_METADATA.update().where(where).values(text=new))
        return new

    def clear(self) -> None:
        """Removes everything about the study."""
        with self._engine.begin() as connection:
            for table in (_TRIALS, _CLAIMS, _SEARCH_METADATA):
                connection.execute(table.delete().where(self._where(table)))


def create_tables(engine: sa.Engine) -> None:
    _METADATA.create_all(engine)
