"""How long a search may go on, and a trial."""

import dataclasses
import time
from collections.abc import Callable, Iterable

from optuna.trial import FrozenTrial, TrialState

from tfbig import _integers, _numbers, errors
from tfbig.tuners import _trials

__all__ = ("Budget", "Limits")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that a user sets, each None for no limit.

    Attributes:
        max_seconds: Seconds from the beginning of the search after which no trial begins.
        max_total_epochs: Epochs of all trials together after which no trial begins.
        patience: After so many ended trials in a row without a better one, no trial begins.
        timeout_per_trial: Seconds of training after which a trial is stopped.

    Raises:
        InvalidOptionError: If one is not valid.
    """

    max_seconds: float | None = None
    max_total_epochs: int | None = None
    patience: int | None = None
    timeout_per_trial: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_seconds", "timeout_per_trial"):
            value = getattr(self, name)
            if value is None:
                continue
            seconds = _numbers.as_number(value)
            if seconds is None or not seconds > 0:
                raise errors.InvalidOptionError(
                    f"`{name}` must be a number of seconds > 0 or None. Received: {name}={value!r}."
                )
            object.__setattr__(self, name, seconds)
        for name in ("max_total_epochs", "patience"):
            number = _integers.checked_or_none(name, getattr(self, name))
            object.__setattr__(self, name, number)


class Budget:
    """The time and the epochs in which trials may begin.

    Args:
        limits: The limits. Their time begins now.
        rank: Returns a sort key of complete trials, by which better ones come first.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        rank: Callable[[FrozenTrial], list[float]] = lambda trial: trial.values,
    ) -> None:
        self._limits = limits = limits or Limits()
        self._rank = rank
        seconds = limits.max_seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def counts_epochs(self) -> bool:
        """Whether it matters how many epochs there were."""
        return self._limits.max_total_epochs is not None

    def is_spent(self, trials: Iterable[FrozenTrial]) -> bool:
        """Whether no further trial may begin after these."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return True
        patience, most = self._limits.patience, self._limits.max_total_epochs
        if patience is most is None:
            return False
        trials = list(trials)
        if patience is not None and self._since_best(trials) >= patience:
            return True
        return most is not None and sum(map(_trials.epochs_of, trials)) >= most

    def _since_best(self, trials: list[FrozenTrial]) -> int:
        """How many trials have ended since the best one; 0 if none is complete."""
        best: list[float] | None = None
        since = 0
        ended = [t for t in trials if t.state.is_finished()]
        for trial in sorted(ended, key=lambda t: (t.datetime_complete, t.number)):
            is_feasible = all(value <= 0 for value in trial.constraints.values())
            if trial.state == TrialState.COMPLETE and is_feasible:
                rank = self._rank(trial)
                if best is None or rank < best:
                    best, since = rank, 0
                    continue
            since += best is not None
        return since

    @property
    def timeout_per_trial(self) -> float | None:
        """Seconds of training after which a trial is stopped; None for no limit."""
        return self._limits.timeout_per_trial

    def is_late(self, seconds: float) -> bool:
        """Whether a trial that was trained for so many seconds is stopped."""
        timeout = self._limits.timeout_per_trial
        return timeout is not None and seconds > timeout

    @property
    def too_late(self) -> str:
        """Why a trial that is late was stopped."""
        return f"The trial took longer than timeout_per_trial={self._limits.timeout_per_trial:g} s."
