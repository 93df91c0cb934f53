"""Follows a search that other processes run."""

import shutil
import sys
import time
from typing import Protocol, TextIO

from tfbig import errors
from tfbig.tuners import _ledger, _processes, _progress, _read_only, _record

__all__ = ("Watch",)

# Seconds without a sign of life after which a process of another machine counts as dead. Processes
# have a heartbeat every ten seconds, or more often.
_SILENCE = 60.0


class _Open(Protocol):
    """Opens the study."""

    def __call__(self) -> _read_only.OpenStudy: ...


class _Alive:
    """Which processes of a search still live."""

    def __init__(self) -> None:
        # By process: its heartbeat as it was last seen, and when that changed.
        self._seen: dict[str, tuple[tuple[int, int] | None, float]] = {}

    def among(self, joined: set[str], running: list[_ledger.TrialRow]) -> set[str]:
        """The processes that live.

        Args:
            joined: The processes that have said that they work on the search.
            running: The trials that run.
        """
        now = time.monotonic()
        beats = {row.owner: (row.index, row.heartbeat) for row in running if row.owner}
        alive = set()
        for process in joined | beats.keys():
            beat, since = self._seen.get(process, (None, now))
            if process not in self._seen or beat != beats.get(process):
                since = now
            self._seen[process] = (beats.get(process), since)
            is_known = _processes.process_id(process) is not None and process.split("|")[2]
            is_dead = _processes.is_dead(process) if is_known else now - since >= _SILENCE
            if not is_dead:
                alive.add(process)
        return alive


class Watch:
    """Prints a line for each trial that ends, and below it how the search stands.

    Args:
        reopen: Opens the study.
        interval: Seconds between two looks.
        out: Where it prints. Defaults to the standard output.
    """

    def __init__(self, reopen: _Open, interval: float, out: TextIO | None = None) -> None:
        self._reopen = reopen
        self._opened = reopen()
        self._interval = interval
        self._out = out or sys.stdout
        self._alive = _Alive()
        self._ended: set[str] | None = None
        self._status = ""

    def run(self) -> None:
        """Watches until no process works on the search any more.

        Raises:
            StorageUnavailableError: If the search cannot be read at all.
        """
        goes_on = self._look()
        while goes_on:
            time.sleep(self._interval)
            goes_on = self._looked()
        self._show("No process works on the search.")

    def _looked(self) -> bool:
        """Shows what is new; returns whether a process still works on the search."""
        try:
            return self._look()
        except errors.StorageUnavailableError as e:
            # A server that restarts, or a file that is being replaced.
            self._show(f"{e} Trying again.")
            return True

    def _look(self) -> bool:
        if self._opened.is_stale():
            self._opened = self._reopen()
        # Before the trials, so that none that ends meanwhile is missed.
        running, processes = self._opened.running()
        alive = self._alive.among(processes, running)
        record = self._opened.record()
        if self._ended is None:
            self._print(f"Search {record.name!r} in {record.place}")
            self._ended = {row.trial for row in record.rows if row.status != _record.RUNNING}
        for row in record.rows:
            if row.status != _record.RUNNING and row.trial not in self._ended:
                self._ended.add(row.trial)
                self._print(_line(record, row))
        owned = sum(row.owner in alive for row in running)
        self._show(_status(record, owned, len(alive)))
        return bool(alive)

    def _print(self, line: str) -> None:
        """Prints a line above the status."""
        if self._out.isatty() and self._status:
            line = f"\r\x1b[K{line}"
        self._status = ""
        print(line, file=self._out, flush=True)

    def _show(self, status: str) -> None:
        """Shows the status, in a terminal always in the last line."""
        if status == self._status:
            return
        if self._out.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{status[:width]}", end="", file=self._out, flush=True)
        else:
            print(status, file=self._out, flush=True)
        self._status = status

    def close(self) -> None:
        """Leaves the last line of a terminal."""
        if self._out.isatty() and self._status:
            print(file=self._out, flush=True)


def _of(record: _record.Record) -> str:
    return f" of {record.max_trials}" if record.max_trials else ""


def _line(record: _record.Record, row: _record.Row) -> str:
    line = f"trial {row.trial}{_of(record)}: {row.status}"
    if row.scores:
        line += f", {', '.join(record.objectives)} {_progress.shown_score(row.scores)}"
    elif row.message:
        line += f": {row.message.splitlines()[-1]}"
    if row.duration is not None:
        line += f", {row.duration:.1f} s"
    values = ", ".join(f"{k}={_progress.shown(v)}" for k, v in row.values.items())
    return f"{line}; {values or 'default configuration'}"


def _status(record: _record.Record, running: int, alive: int) -> str:
    ended = sum(row.status != _record.RUNNING for row in record.rows)
    processes = "1 process" if alive == 1 else f"{alive} processes"
    told = f"{ended}{_of(record)} trials have ended, {running} running, {processes} alive"
    if not record.best:
        return f"{told}, no result yet"
    if not record.is_single:
        return f"{told}, {len(record.best)} trials in the Pareto front"
    best = record.best[0]
    score = _progress.shown_score(best.scores)
    return f"{told}, best {record.objectives[0]} {score} (trial {best.trial})"
