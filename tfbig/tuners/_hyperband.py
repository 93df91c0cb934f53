"""Hyperband as in Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter
Optimization", JMLR 18 (2018), Algorithm 1.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, TypedDict, Unpack, cast

import keras_tuner
from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import (
    _ledger,
    _objectives,
    _options,
    _oracle,
    _proposals,
    _queue,
    _running,
    _samplers,
    _trials,
    _tuner,
    _tuner_types,
)
from tfbig.tuners._hyperparameters import HyperParameters

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


class _Note(TypedDict):
    """What the ledger notes of a trial: its rung, and its score in each rung."""

    rung: int
    scores: dict[str, float]


def _note(row: _ledger.TrialRow) -> _Note:
    return cast(_Note, {"rung": 0, "scores": {}} | json.loads(row.note))


def _rung(row: _ledger.TrialRow) -> int:
    return _note(row)["rung"]


class BracketQueue(_queue.TrialQueue):
    """Puts completed trials back, and promotes the best of a rung once all have completed it.

    Args:
        trials: See `TrialQueue`.
        proposals: See `TrialQueue`.
        values_for: See `TrialQueue`.
        hyperparameters: See `TrialQueue`.
        brackets: All brackets of the search.
        direction: KerasTuner's "min" or "max".
        score_trial: Sets the score of KerasTuner's trial.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        proposals: _proposals.Proposals,
        values_for: Callable[[int], _tuner_types.Values | None],
        hyperparameters: Callable[[], HyperParameters],
        brackets: list[Bracket],
        direction: str,
        score_trial: Callable[[_tuner_types.Trial], None],
    ) -> None:
        super().__init__(trials, proposals, values_for, hyperparameters)
        self._brackets = brackets
        self._direction = direction
        self._score_trial = score_trial

    def bracket_of(self, index: int) -> int:
        """The number of a trial's bracket."""
        for number, bracket in enumerate(self._brackets):
            if index < bracket.sizes[0]:
                return number
            index -= bracket.sizes[0]
        raise AssertionError(index)

    def epochs_of(self, index: int) -> int:
        """The epoch up to which a trial is trained in its current rung."""
        (row,) = self._ledger.trials(index=index)
        return self._brackets[self.bracket_of(index)].epochs[_rung(row)]

    def take_paused(self) -> int | None:
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
                found = self._promote(rows, rung, size)
                if found is not None:
                    return found
        return None

    def _promote(self, rows: list[_ledger.TrialRow], rung: int, size: int) -> int | None:
        """Ends a rung that all its trials have completed; returns a trial to continue, or None."""
        members = [row for row in rows if _rung(row) >= rung]
        if any(row.state == _ledger.RUNNING and _rung(row) == rung for row in members):
            return None
        # Trials that failed in this rung have no score in it.
        scored = [row for row in members if str(rung) in _note(row)["scores"]]
        sign = -1 if self._direction == "max" else 1
        scored.sort(key=lambda row: (sign * _note(row)["scores"][str(rung)], row.index))
        for place, row in enumerate(scored):
            if row.state != _ledger.PAUSED or _rung(row) != rung:
                continue
            if place < size:
                note = json.dumps({**_note(row), "rung": rung + 1})
                if self._ledger.take(row, note):
                    return row.index
            elif self._ledger.take(row):
                attrs = {_trials.WHY: _trials.STOPPED_EARLY}
                self._trials.end(row.index, TrialState.PRUNED, attrs)
        return None

    def pause(self, running: _running.RunningTrial) -> bool:
        (row,) = self._ledger.trials(index=running.index)
        rung = _rung(row)
        if rung + 1 == len(self._brackets[self.bracket_of(running.index)].sizes):
            return False
        with _objectives.nan_allowed():
            self._score_trial(running.trial)
        if not math.isfinite(running.trial.score):
            return False
        scores = _note(row)["scores"] | {str(rung): float(running.trial.score)}
        self._ledger.set_state(running.index, _ledger.PAUSED, scores=scores)
        return True


class HyperbandOracle(_oracle.StudyOracle):
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

    goes_on = True

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
        for name, value, least in (
            ("max_epochs", max_epochs, 1),
            ("factor", factor, 2),
            ("hyperband_iterations", hyperband_iterations, 1),
        ):
            if type(value) is not int or value < least:
                raise errors.InvalidOptionError(
                    f"`{name}` must be an integer >= {least}. Received: {name}={value!r}."
                )
        self._brackets = brackets(max_epochs, factor) * hyperband_iterations
        self._max_epochs, self._factor = max_epochs, factor
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
            "max_epochs": str(self._max_epochs),
            "factor": str(self._factor),
        }

    def _new_queue(self, trials: _trials.Trials, proposals: _proposals.Proposals) -> BracketQueue:
        return BracketQueue(
            trials,
            proposals,
            self._populated_values,
            self._known_hyperparameters,
            self._brackets,
            self.objective.direction,
            self.score_trial,
        )

    def epochs_of(self, trial_id: str) -> int:
        """The epoch up to which a trial of this process is trained now."""
        return cast(BracketQueue, self._search.queue).epochs_of(int(trial_id))


class Hyperband(_tuner.Tuner):
    """Trains many models for few epochs, and the best of them for more.

    Brackets and rungs are those of the paper (Li et al., JMLR 18, 2018). A promoted model resumes
    where it stopped: optimizer, loss scale, epoch and random states are kept, and its trial keeps
    its id. Do not pass `epochs` to `search`.

    See `OptunaSearch` for the other arguments.

    Args:
        max_epochs: Epochs of a model that is trained to the end. Defaults to 100.
        factor: One in so many models is promoted. Defaults to 3.
        hyperband_iterations: How often all brackets are run. Defaults to 1.
        sampler: As in `OptunaSearch`; proposes the models of a bracket. Defaults to "random", as in
            the paper.
    """

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

    def run_trial(
        self, trial: _tuner_types.Trial, *args: Any, **kwargs: Any
    ) -> _tuner_types.Results:
        """Trains the model of a trial up to the end of its rung."""
        kwargs["epochs"] = self.oracle.epochs_of(trial.trial_id)
        return super().run_trial(trial, *args, **kwargs)
