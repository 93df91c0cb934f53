"""Which process runs which trial.

One process at a time owns a trial, and its heartbeat shows that it still runs. Whatever another
process does in its name is refused. A process whose heartbeat stands still has died. Each process
measures that with its own clock, so clocks need not agree.

`_sql_ledger.py` keeps this in a database, `_memory_ledger.py` in the memory of one process.
"""

import abc
import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from tfbig.tuners import _processes

__all__ = ("ENDED", "PAUSED", "RECORDED", "RUNNING", "VOID", "Column", "Json", "Ledger", "TrialRow")

# Longest time between two heartbeats, in seconds.
_LONGEST_INTERVAL = 10.0

# What a column is compared with or set to.
Column: TypeAlias = Any
# What is written into a note: anything that JSON can express.
Json: TypeAlias = Any

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


class Ledger(abc.ABC):
    """The ledger of one study, as one process sees it. Each method changes it as a whole or not.

    Args:
        grace: Seconds after which a trial may be taken from a process without a heartbeat.

    Attributes:
        is_shared: Whether other processes can reach it.
        owner: The name of this process.
        heartbeat_interval: Seconds between two heartbeats of this process.
    """

    is_shared: bool

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self.owner = _processes.this_process()
        self.heartbeat_interval = min(grace / 6, _LONGEST_INTERVAL)
        # By index: the owner and heartbeat that were last seen, and when they changed.
        self._seen: dict[int, tuple[tuple[str, int], float]] = {}

    # --- Trials ---

    @abc.abstractmethod
    def trials(self, **where: Column) -> list[TrialRow]:
        """The trials with these values, in order; all of them without any."""

    def trial(self, index: int) -> TrialRow:
        """The trial of an index."""
        (row,) = self.trials(index=index)
        return row

    @abc.abstractmethod
    def count(self, *states: str) -> int:
        """How many trials are in one of some states."""

    def taken(self) -> int:
        """How many places are not free: each of these trials runs, or has had values."""
        return self.count(RUNNING, PAUSED, ENDED, RECORDED)

    @abc.abstractmethod
    def take_new(self, max_trials: int | None, claim: str | None = None) -> int | None:
        """Takes a free place, or adds one, for a trial of this process; claims a name for it.

        Returns:
            The index of the trial; None if there are `max_trials` already, or if another has the
            name.
        """

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

    @abc.abstractmethod
    def _update(self, where: dict[str, Column], **values: Column) -> bool:
        """Changes the trial that has some values; returns whether there is one."""

    def _if_mine(self, index: int) -> dict[str, Column]:
        return {"index": index, "owner": self.owner, "state": RUNNING}

    @abc.abstractmethod
    def heartbeat(self, index: int) -> bool:
        """Says that this process still runs a trial; returns whether it still owns it."""

    @abc.abstractmethod
    def set_state(self, index: int, state: str, **note: Json) -> bool:
        """Sets the state of a trial of this process, and adds to its note.

        Returns:
            Whether this process still owned it. If not, nothing changes.
        """

    def release(self, index: int, **note: Json) -> bool:
        """Lets any process take a trial of this process; returns whether it still owned it."""
        is_mine = self.set_state(index, RUNNING, **note)
        return is_mine and self._update(self._if_mine(index), owner="")

    def advance(self, index: int, owner: str, state: str) -> bool:
        """Sets the state of a trial of a process that has ended it, unless that is done."""
        seen = {"index": index, "state": ENDED, "owner": owner}
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

    @property
    def _memory_entry(self) -> str:
        return f"memory of {self._entry}"

    def join(self) -> None:
        """Lets other processes know that this one works on the study."""
        self.metadata(self._entry, self.owner)

    def join_with(self, memory: int) -> None:
        """Lets other processes know how many bytes of memory this one has."""
        entry = json.dumps([self.owner, memory])
        self.change_metadata(self._memory_entry, lambda _: entry)

    def processes(self) -> set[str]:
        """The processes that have said that they work on the search, and not that they left."""
        return set(self._metadata_like("process "))

    def memory_of_processes(self) -> dict[str, int]:
        """By the names of processes that have not died: their bytes of memory, as they said."""
        found = dict(map(json.loads, self._metadata_like("memory of process ")))
        return {owner: size for owner, size in found.items() if not _processes.is_dead(owner)}

    def leave(self) -> None:
        """Lets other processes know that this one no longer works on the study."""
        self._remove_metadata([self._entry, self._memory_entry])

    def has_others(self) -> bool:
        """Whether other processes work on the study.

        If they may be on other machines, this waits for a heartbeat.
        """
        here = [o for o in self.processes() if _processes.process_id(o) not in (None, os.getpid())]
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

    @abc.abstractmethod
    def claim(self, index: int, name: str) -> bool:
        """Claims a name for a trial; returns whether the trial has it now."""

    @abc.abstractmethod
    def claims(self, **where: Column) -> set[str]:
        """All claimed names; with `index=`, those of one trial."""

    # --- Metadata of the search ---

    @abc.abstractmethod
    def metadata(self, name: str, default: str | None = None) -> str | None:
        """The text stored under a name; stores the default if there is none."""

    def is_first(self, name: str) -> bool:
        """Whether this process is to do what is done once: none does it, or that one has died."""
        owner = self.metadata(name, self.owner)
        return owner == self.owner or _processes.is_dead(str(owner))

    @abc.abstractmethod
    def change_metadata(self, name: str, change: Callable[[str | None], str]) -> str:
        """Replaces the text under a name, None if there is none, by what a function returns."""

    @abc.abstractmethod
    def _metadata_like(self, beginning: str) -> list[str]:
        """The texts under all names with a beginning."""

    @abc.abstractmethod
    def _remove_metadata(self, names: list[str]) -> None:
        """Removes the texts under some names."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Removes everything about the study."""
