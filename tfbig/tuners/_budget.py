"""How long a search may go on."""

import time
from collections.abc import Iterable

from optuna.trial import FrozenTrial

from tfbig.tuners import _trials

__all__ = ("Budget",)


class Budget:
    """The time and the epochs in which trials may begin.

    Args:
        max_seconds: Seconds from now; None for no limit.
        max_total_epochs: Epochs of all trials together; None for no limit.
    """

    def __init__(
        self, max_seconds: float | None = None, max_total_epochs: int | None = None
    ) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_total_epochs = max_total_epochs

    @property
    def counts_epochs(self) -> bool:
        """Whether it matters how many epochs there were."""
        return self._max_total_epochs is not None

    def is_spent(self, trials: Iterable[FrozenTrial]) -> bool:
        """Whether no further trial may begin after these."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return True
        if self._max_total_epochs is None:
            return False
        epochs = sum(map(_trials.epochs_of, trials))
        return epochs >= self._max_total_epochs
