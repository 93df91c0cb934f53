"""The ledger of a search that is not kept: in the memory of one process, whose threads share it."""

import collections
import dataclasses
import json
import threading
from collections.abc import Callable

from tfbig.tuners import _ledger
from tfbig.tuners._ledger import Column, Json, TrialRow

__all__ = ("MemoryLedger",)


class MemoryLedger(_ledger.Ledger):
    """Dictionaries, changed by one thread at a time.

    Args:
        grace: See `Ledger`.
    """

    is_shared = False

    def __init__(self, grace: float) -> None:
        super().__init__(grace)
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            # By index, in order. The results of most trials are in the study and not asked for
            # again, so trials are kept by state as well.
            self._rows: dict[int, TrialRow] = {}
            self._in_state: dict[str, set[int]] = collections.defaultdict(set)
            self._holders: dict[str, int] = {}
            self._names: dict[int, set[str]] = collections.defaultdict(set)
            self._texts: dict[str, str] = {}

    # --- Trials ---

    def _set(self, row: TrialRow) -> None:
        if row.index in self._rows:
            self._in_state[self._rows[row.index].state].discard(row.index)
        self._rows[row.index] = row
        self._in_state[row.state].add(row.index)

    def trials(self, **where: Column) -> list[TrialRow]:
        with self._lock:
            if "index" in where:
                found = [self._rows[i] for i in (where["index"],) if i in self._rows]
            elif "state" in where:
                found = [self._rows[i] for i in sorted(self._in_state[where["state"]])]
            else:
                found = list(self._rows.values())
        return [r for r in found if all(getattr(r, name) == v for name, v in where.items())]

    def count(self, *states: str) -> int:
        with self._lock:
            return sum(len(self._in_state[state]) for state in states)

    def take_new(self, max_trials: int | None, claim: str | None = None) -> int | None:
        with self._lock:
            free = min(self._in_state[_ledger.VOID], default=None)
            index = len(self._rows) if free is None else free
            if free is None and max_trials is not None and index >= max_trials:
                return None
            if claim is not None and not self.claim(index, claim):
                return None
            deaths = 0 if free is None else self._rows[free].deaths
            self._set(TrialRow(index, self.owner, 0, deaths, _ledger.RUNNING, "{}"))
        return index

    def _update(self, where: dict[str, Column], **values: Column) -> bool:
        with self._lock:
            for row in self.trials(**where):
                self._set(dataclasses.replace(row, **values))
                return True
        return False

    def heartbeat(self, index: int) -> bool:
        with self._lock:
            row = self._rows.get(index)
            count = 0 if row is None else row.heartbeat + 1
            return self._update(self._if_mine(index), heartbeat=count)

    def set_state(self, index: int, state: str, **note: Json) -> bool:
        with self._lock:
            for row in self.trials(**self._if_mine(index)):
                text = json.dumps(json.loads(row.note) | note)
                self._set(dataclasses.replace(row, state=state, note=text))
                return True
        return False

    # --- Claims ---

    def claim(self, index: int, name: str) -> bool:
        with self._lock:
            if name not in self._holders:
                self._holders[name] = index
                self._names[index].add(name)
            return self._holders[name] == index

    def claims(self, **where: Column) -> set[str]:
        with self._lock:
            held = self._names[where["index"]] if "index" in where else self._holders
            if "name" in where:
                return {name for name in (where["name"],) if name in held}
            return set(held)

    # --- Metadata of the search ---

    def metadata(self, name: str, default: str | None = None) -> str | None:
        with self._lock:
            if default is not None:
                return self._texts.setdefault(name, default)
            return self._texts.get(name)

    def change_metadata(self, name: str, change: Callable[[str | None], str]) -> str:
        with self._lock:
            self._texts[name] = change(self._texts.get(name))
            return self._texts[name]

    def _metadata_like(self, beginning: str) -> list[str]:
        with self._lock:
            return [text for name, text in self._texts.items() if name.startswith(beginning)]

    def _remove_metadata(self, names: list[str]) -> None:
        with self._lock:
            for name in names:
                self._texts.pop(name, None)
