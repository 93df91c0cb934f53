"""Hyperband as in Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter
Optimization", JMLR 18 (2018), Algorithm 1.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Unpack

import keras_tuner

from tfbig import _integers
from tfbig.tuners import _ledger, _options, _proposals, _rungs, _samplers, _trials

__all__ = ("Bracket", "Hyperband", "HyperbandOracle", "brackets")


@dataclasses.dataclass(frozen=True)
class Bracket:
    """One run of successive halving.

    Attributes:
        sizes: How many trials are in each rung.
        epochs: The epoch up to which the trials of each rung are trained.
    """

    sizes: tuple[int, ...]
    epochs: tuple[int, ...]


def brackets(max_epochs: int, factor: int) -> list[Bracket]:
    """The brackets of one iteration, the one with most trials first.

    Args:
        max_epochs: The paper's R.
        factor: The paper's eta.

    Example:

    >>> [bracket.sizes for bracket in brackets(9, 3)]
    [(9, 3, 1), (5, 1), (3,)]
    """
    last = 0
    while factor ** (last + 1) <= max_epochs:
        last += 1
    found = []
    for s in range(last, -1, -1):
        most = math.ceil((last + 1) * factor**s / (s + 1))
        sizes = tuple(most // factor**i for i in range(s + 1))
        epochs = tuple(max(1, round(max_epochs * factor ** (i - s))) for i in range(s + 1))
        found.append(Bracket(sizes, epochs))
    return found


class _OvertakenError(Exception):
    """Another process has taken a trial since its row was read."""


class BracketQueue(_rungs.RungQueue):
    """Promotes the best of a rung once all trials of their bracket have completed it.

    Args:
        trials: See `TrialQueue`.
        proposals: See `TrialQueue`.
        oracle: The oracle of the search.
        brackets: All brackets of the search.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        proposals: _proposals.Proposals,
        oracle: _rungs.RungOracle,
        brackets: list[Bracket],
    ) -> None:
        super().__init__(trials, proposals, oracle)
        self._brackets = brackets

    def bracket_of(self, index: int) -> int:
        """The number of a trial's bracket."""
        for number, bracket in enumerate(self._brackets):
            if index < bracket.sizes[0]:
                return number
            index -= bracket.sizes[0]
        raise AssertionError(index)

    def epochs_by_rung(self, index: int) -> Sequence[int]:
        return self._brackets[self.bracket_of(index)].epochs

    def take_paused(self) -> int | None:
        while True:
            try:
                return self._take_paused()
            except _OvertakenError:
                continue

    def _take_paused(self) -> int | None:
        by_bracket: dict[int, list[_ledger.TrialRow]] = {}
        for row in self._ledger.trials():
            if row.state == _ledger.VOID:
                continue
            by_bracket.setdefault(self.bracket_of(row.index), []).append(row)
        is_exhausted: bool | None = None
        for number, rows in by_bracket.items():
            sizes = self._brackets[number].sizes
            if len(rows) < sizes[0]:
                # A space with fewer combinations never fills the bracket.
                if is_exhausted is None:
                    is_exhausted = self._proposals.first_untried() is _proposals.EXHAUSTED
                if not is_exhausted:
                    continue
                sizes = tuple(max(1, size * len(rows) // sizes[0]) for size in sizes)
            for rung, size in enumerate(sizes[1:]):
                found = self._end_rung(rows, rung, size)
                if found is not None:
                    return found
        return None

    def _end_rung(self, rows: list[_ledger.TrialRow], rung: int, size: int) -> int | None:
        """Ends a rung that all its trials have completed; returns a trial to continue, or None."""
        if any(row.state == _ledger.RUNNING and _rungs.rung_of(row) <= rung for row in rows):
            return None
        for place, row in enumerate(self.ranked(rows, rung)):
            if not self.is_paused_in(row, rung):
                continue
            if not (self.stop(row) if place >= size else self.promote(row)):
                raise _OvertakenError
            if place < size:
                return row.index
        return None


class HyperbandOracle(_rungs.RungOracle):
    """Runs brackets: trains many trials a little, and the best of them longer.

    A rung ends when all its trials have completed it. Meanwhile, processes begin the next bracket.
    A promoted trial keeps its id. A bracket that the space has too few combinations for is run with
    those that there are, with the same part of them promoted.

    Args:
        max_epochs: Epochs of a trial that is trained to the end, >= 1.
        factor: One in so many trials is promoted, >= 2.
        hyperband_iterations: How often all brackets are run, >= 1.
        sampler: As in `OptunaSearch`; proposes the models of a bracket. Defaults to "random".
        **kwargs: As for `StudyOracle`.
    """

    def __init__(
        self,
        objective: _options.ObjectiveOption = None,
        max_epochs: int = 100,
        factor: int = 3,
        hyperband_iterations: int = 1,
        seed: int | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        *,
        sampler: _samplers.SamplerOption = "random",
        **kwargs: Unpack[_options.StudyOptions],
    ) -> None:
        max_epochs = _integers.checked("max_epochs", max_epochs)
        factor = _integers.checked("factor", factor, least=2)
        hyperband_iterations = _integers.checked("hyperband_iterations", hyperband_iterations)
        self._brackets = brackets(max_epochs, factor) * hyperband_iterations
        self.max_epochs, self._factor = max_epochs, factor
        super().__init__(
            objective=objective,
            max_trials=sum(bracket.sizes[0] for bracket in self._brackets),
            hyperparameters=hyperparameters,
            sampler=sampler,
            seed=seed,
            **kwargs,
        )

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {
            "max_epochs": str(self.max_epochs),
            "factor": str(self._factor),
        }

    def _new_queue(self, trials: _trials.Trials, proposals: _proposals.Proposals) -> BracketQueue:
        return BracketQueue(trials, proposals, self, self._brackets)


class Hyperband(_rungs.RungTuner):
    """Trains many models for few epochs, and the best of them for more.

    Brackets and rungs are those of the paper (Li et al., JMLR 18, 2018). A promoted model resumes
    where it stopped: optimizer, loss scale, epoch and random states are kept, and its trial keeps
    its id. `search` ignores `epochs`, with a warning, since programs for KerasTuner pass it.

    See `OptunaSearch` for the other arguments.

    Args:
        max_epochs: Epochs of a model that is trained to the end. Defaults to 100.
        factor: One in so many models is promoted. Defaults to 3.
        hyperband_iterations: How often all brackets are run. Defaults to 1.
        sampler: As in `OptunaSearch`; proposes the models of a bracket. Defaults to "random", as in
            the paper.

    Raises:
        InvalidOptionError: If an argument is not valid, or if there are several objectives.
    """

    _ignores_epochs = True

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        max_epochs: int = 100,
        factor: int = 3,
        hyperband_iterations: int = 1,
        seed: int | None = None,
        *,
        sampler: _samplers.SamplerOption = "random",
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        of_oracle, of_tuner = _options.split(kwargs)
        oracle = HyperbandOracle(
            objective,
            max_epochs,
            factor,
            hyperband_iterations,
            seed,
            sampler=sampler,
            **of_oracle,
        )
        super().__init__(oracle, hypermodel, **of_tuner)
