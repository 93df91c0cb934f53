"""Where the wall time of training goes: to updates that count, and elsewhere by cause."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from tfbig import _types

__all__ = ("CAUSES", "Goodput", "backing_up", "spending_on_backups")

# Of so many updates it is known how long each took, in case that they are taken back.
_REMEMBERED = 100_000

# In the order in which they are written; the first is the share that counts.
CAUSES = (
    "updates",
    "input",
    "skipped",
    "tracing",
    "validation",
    "backups",
    "restarts",
    "other",
)


class Goodput:
    """Attributes each moment of training to one cause, so that nothing is counted twice.

    Args:
        is_synchronous: whether an update is done when the call that makes it returns, as on the
            CPU. Elsewhere the time until the next call counts as that of the update.
        on_backup: called after each backup.
        on_end: called when `fit` has ended, also by an exception.

    Attributes:
        seconds: the seconds of each cause, of earlier sessions too; without those since the last
            change of the cause, see `shares`.
    """

    def __init__(
        self, is_synchronous: bool, on_backup: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        self.seconds = dict.fromkeys(CAUSES, 0.0)
        self.on_backup, self.on_end = on_backup, on_end
        self._after_update = "other" if is_synchronous else "updates"
        self._cause, self._since = "other", time.perf_counter()
        # Of updates whose logs are not read yet: seconds, updates, and skipped updates so far.
        self._unread: list[tuple[float, int, _types.Tensor]] = []
        self._skipped = 0.0
        # Of each update that counts, the last one at the end.
        self._counted: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        # The updates that were made in the same call as a trace, and the seconds of those calls.
        self._traced, self._seconds_traced = 0, 0.0
        self._traces = 0

    def begin(
        self, before: Mapping[str, float] | None, gap: float, skipped: int, traces: int
    ) -> None:
        """Takes up the seconds of earlier sessions.

        Args:
            before: the seconds of each cause until training resumes; None if it begins.
            gap: seconds from then until now.
            skipped: how many updates have been skipped so far.
            traces: how often the step has been traced so far.
        """
        for cause, seconds in (before or {}).items():
            self.seconds[cause] += seconds
        self.seconds["restarts"] += gap
        self._skipped, self._traces = skipped, traces

    def turn_to(self, cause: str) -> float:
        """From now on, time goes to a cause; returns the seconds since the last change."""
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        self.seconds[self._cause] += passed
        self._cause = cause
        return passed

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Within it, time goes to a cause."""
        before = self._cause
        self.turn_to(cause)
        try:
            yield
        finally:
            self.turn_to(before)

    def begin_update(self) -> None:
        """To be called before the call that makes updates."""
        self.turn_to("updates")

    def end_update(
        self, updates: int, waited: float, traces: int, skipped: _types.Tensor | None
    ) -> None:
        """To be called after the call that makes updates.

        Args:
            updates: how many it has made.
            waited: seconds for which it waited for data; NaN if that is not known.
            traces: how often the step has been traced so far.
            skipped: how many updates have been skipped so far; None if that is not known.
        """
        passed, updates = self.turn_to(self._after_update), max(1, updates)
        waited = min(waited, passed) if math.isfinite(waited) else 0.0
        self._move("updates", "input", waited)
        passed -= waited
        is_traced, self._traces = traces > self._traces, traces
        if is_traced:
            self._move("updates", "tracing", passed)
            self._traced += updates
            self._seconds_traced += passed
            passed = 0.0
        elif self._traced:
            # They took as long as those without tracing.
            own = min(passed / updates * self._traced, self._seconds_traced)
            self._move("tracing", "updates", own)
            self._count(own, self._traced)
            self._traced, self._seconds_traced = 0, 0.0
        if skipped is not None:
            self._unread.append((passed, updates, skipped))
        elif not is_traced:
            self._count(passed, updates)

    def leave_out(self, updates: int) -> None:
        """Takes the last updates that count for skipped ones."""
        if not updates:
            return
        self.read_skipped()
        for _ in range(min(updates, len(self._counted))):
            self._move("updates", "skipped", self._counted.pop())

    def shares(self) -> dict[str, float]:
        """The share of each cause in the seconds so far; their sum is 1."""
        self.turn_to(self._cause)
        self.read_skipped()
        total = self.total
        return {cause: seconds / total for cause, seconds in self.seconds.items()}

    @property
    def total(self) -> float:
        """All seconds; not zero."""
        return sum(self.seconds.values()) or math.ulp(0.0)

    def read_skipped(self) -> None:
        """Reads how many updates were skipped, for which it waits until they are done."""
        for seconds, updates, skipped in self._unread:
            now = float(skipped)
            new = min(max(0.0, now - self._skipped), updates)
            self._move("updates", "skipped", seconds * new / updates)
            self._skipped = now
            # Those of a call with a trace are not known yet.
            if seconds:
                self._count(seconds * (1 - new / updates), updates - round(new))
        self._unread = []

    def _count(self, seconds: float, updates: int) -> None:
        """Remembers updates that count."""
        self._counted.extend([seconds / updates] * updates if updates else [])

    def _move(self, source: str, target: str, seconds: float) -> None:
        self.seconds[source] -= seconds
        self.seconds[target] += seconds


@contextlib.contextmanager
def spending_on_backups(meters: Collection[Goodput]) -> Iterator[None]:
    """Within it, the time of all meters goes to backups."""
    with contextlib.ExitStack() as stack:
        for meter in meters:
            stack.enter_context(meter.spending("backups"))
        yield


@contextlib.contextmanager
def backing_up(meters: Collection[Goodput]) -> Iterator[None]:
    """Within it, a backup is taken: the time of all meters goes to that."""
    with spending_on_backups(meters):
        yield
    for meter in meters:
        meter.on_backup()
