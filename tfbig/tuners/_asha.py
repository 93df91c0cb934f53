"""Asynchronous successive halving: trials are promoted as soon as they are among the best.

As in Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, Algorithm 2;
and with rungs that grow as in Bohdal et al., "PASHA: Efficient HPO and NAS with Progressive
Resource Allocation", ICLR 2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Unpack, cast

import keras_tuner
import numpy as np
from optuna.trial import TrialState

from tfbig import _integers, errors
from tfbig.tuners import (
    _ledger,
    _options,
    _proposals,
    _rungs,
    _samplers,
    _trials,
    _tuner_types,
    _views,
)

__all__ = ("ASHA", "PASHA", "ASHAOracle", "PASHAOracle", "noise", "rank_alike", "rungs")

# The metadata of a search that has the number of its highest rung so far.
_HIGHEST = "highest rung"

# Of the differences between trials that overtake each other, so many percent count as noise.
_NOISE_PERCENTILE = 90


def rungs(min_epochs: int, max_epochs: int, factor: int) -> tuple[int, ...]:
    """The epochs after which trials are paused; the last one is the end of training.

    Example:

    >>> rungs(1, 10, 3)
    (1, 3, 9, 10)
    """
    found = []
    epochs = min_epochs
    while epochs < max_epochs:
        found.append(epochs)
        epochs *= factor
    return (*found, max_epochs)


def noise(curves: Sequence[Mapping[int, float]]) -> float:
    """The largest difference between two trials that can be explained by chance.

    Trials that overtake each other at least twice are ranked by chance.

    Args:
        curves: The values of each trial, by epochs.
    """
    distances = []
    for one, other in itertools.combinations(curves, 2):
        differences = [one[epochs] - other[epochs] for epochs in sorted(one.keys() & other.keys())]
        signs = [np.sign(difference) for difference in differences if difference]
        if sum(a != b for a, b in itertools.pairwise(signs)) >= 2:
            distances.append(abs(differences[-1]))
    return float(np.percentile(distances, _NOISE_PERCENTILE)) if distances else 0.0


def rank_alike(before: Sequence[float], after: Sequence[float], noise: float) -> bool:
    """Whether trials are ranked after more epochs as they were before.

    At each place there may be any trial whose value before is that of the one that had the place
    then, up to noise.

    Args:
        before: The values of the trials after fewer epochs.
        after: Those of the same trials after more.
        noise: How far two values may be apart that count as equal.
    """
    places = zip(np.argsort(before, kind="stable"), np.argsort(after, kind="stable"), strict=True)
    return all(abs(before[then] - before[now]) <= noise for then, now in places)


class HalvingQueue(_rungs.RungQueue):
    """Promotes a trial as soon as it is among the best of those that completed its rung.

    Args:
        trials: See `TrialQueue`.
        proposals: See `TrialQueue`.
        oracle: The oracle of the search.
        epochs: The epochs at the ends of the rungs.
        factor: One in so many trials is promoted.
        grows: Whether the highest rungs are used only if the rungs below rank trials differently.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        proposals: _proposals.Proposals,
        oracle: _rungs.RungOracle,
        epochs: Sequence[int],
        factor: int,
        grows: bool,
    ) -> None:
        super().__init__(trials, proposals, oracle)
        self._epochs = epochs
        self._factor = factor
        self._grows = grows

    def epochs_by_rung(self, index: int) -> Sequence[int]:
        del index
        return self._epochs

    def take_paused(self) -> int | None:
        rows = self._ledger.trials()
        for row in self._promotable(rows):
            if self.promote(row):
                return row.index
        return None

    def _promotable(self, rows: Sequence[_ledger.TrialRow]) -> list[_ledger.TrialRow]:
        """The trials that may be promoted, those of the highest rung first."""
        found = []
        for rung in reversed(range(self._highest(rows))):
            ranked = self.ranked(rows, rung)
            best = ranked[: len(ranked) // self._factor]
            found += [row for row in best if self.is_paused_in(row, rung)]
        return found

    def _highest(self, rows: Sequence[_ledger.TrialRow]) -> int:
        """The number of the highest rung, which only grows."""
        last = len(self._epochs) - 1
        if not self._grows or last <= 1:
            return last
        highest = int(self._ledger.metadata(_HIGHEST) or 1)
        grown = highest
        while grown < last and not self._is_settled(rows, grown):
            grown += 1
        if grown == highest:
            return highest
        return int(
            self._ledger.change_metadata(
                _HIGHEST, lambda known: str(max(grown, int(known or highest)))
            )
        )

    def _is_settled(self, rows: Sequence[_ledger.TrialRow], rung: int) -> bool:
        """Whether trials are ranked in a rung as in the one below."""
        members = self.ranked(rows, rung)
        before = [self._sign * cast(float, _rungs.score_in(row, rung - 1)) for row in members]
        after = [self._sign * cast(float, _rungs.score_in(row, rung)) for row in members]
        trials = self._trials.by_index()
        # One that has begun since the study was read is missing.
        curves = [trials[r.index].intermediate_values for r in members if r.index in trials]
        return rank_alike(before, after, noise(curves))

    def left(self) -> tuple[list[_ledger.TrialRow], list[_ledger.TrialRow]]:
        """If no trial runs or will: the paused ones of the highest rung reached, and the others."""
        rows = self._ledger.trials()
        if any(row.state == _ledger.RUNNING for row in rows) or self._promotable(rows):
            return [], []
        last = len(self._epochs) - 1
        trials = self._trials.by_index()
        reached = max((rung for rung in range(last) if self.ranked(rows, rung)), default=0)
        for row in rows:
            trial = trials.get(row.index)
            is_complete = trial is not None and trial.state == TrialState.COMPLETE
            if is_complete and _rungs.rung_of(row) == last:
                # It is complete already.
                reached = last
        longest = [row for row in rows if self.is_paused_in(row, reached)]
        paused = [row for row in rows if row.state == _ledger.PAUSED]
        return longest, [row for row in paused if row not in longest]


class ASHAOracle(_rungs.RungOracle):
    """Promotes a trial as soon as it is among the best of those that completed its rung.

    See `ASHA` for the arguments, and `StudyOracle` for the others.
    """

    _grows = False

    def __init__(
        self,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 30,
        max_epochs: int = 100,
        min_epochs: int = 1,
        factor: int = 3,
        seed: int | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        *,
        sampler: _samplers.SamplerOption = "tpe",
        **kwargs: Unpack[_options.StudyOptions],
    ) -> None:
        max_epochs = _integers.checked("max_epochs", max_epochs)
        min_epochs = _integers.checked("min_epochs", min_epochs)
        factor = _integers.checked("factor", factor, least=2)
        if min_epochs > max_epochs:
            raise errors.InvalidOptionError(
                "`min_epochs` must be <= `max_epochs`. Received: "
                f"min_epochs={min_epochs}, max_epochs={max_epochs}."
            )
        self.max_epochs = max_epochs
        self._epochs = rungs(min_epochs, max_epochs, factor)
        self._factor = factor
        super().__init__(
            objective=objective,
            max_trials=max_trials,
            hyperparameters=hyperparameters,
            sampler=sampler,
            seed=seed,
            **kwargs,
        )

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {
            "epochs of rungs": ", ".join(map(str, self._epochs)),
            "factor": str(self._factor),
        }

    def _new_queue(self, trials: _trials.Trials, proposals: _proposals.Proposals) -> HalvingQueue:
        return HalvingQueue(trials, proposals, self, self._epochs, self._factor, self._grows)

    def _no_trial(self) -> _tuner_types.Trial:
        if not self._is_spent():
            self._end_paused()
        return super()._no_trial()

    def _end_paused(self) -> None:
        """Once no trial will be promoted: completes those that were trained longest."""
        queue = cast(HalvingQueue, self._search.queue)
        longest, others = queue.left()
        for row in longest:
            if self._ledger.take(row):
                # Another process may have paused it since this one read the study.
                frozen = self._search.trials.read_again(row.index)
                assert frozen is not None
                trial_id = _views.trial_id_of(row.index)
                trial = _trials.as_keras_tuner(frozen, trial_id, self.hyperparameters.copy())
                self._search.outcomes.complete(row.index, trial)
        for row in others:
            queue.stop(row)


class PASHAOracle(ASHAOracle):
    """As `ASHAOracle`, but uses a rung only once those below it rank trials differently."""

    _grows = True


class ASHA(_rungs.RungTuner):
    """Trains many models for few epochs, and promotes the best of them without waiting for others.

    As asynchronous successive halving (Li et al., MLSys 2020). A model is paused after `min_epochs`
    epochs, `factor` times as many, and so on. It is promoted as soon as it is among the best
    1/`factor` of those that came as far, and resumes where it stopped: optimizer, loss scale, epoch
    and random states are kept, and its trial keeps its id. So no process ever waits, while
    `Hyperband` waits for all models of a rung. Those that come furthest are complete at the end,
    even if none is trained for `max_epochs`. `search` takes no `epochs`.

    See `OptunaSearch` for the other arguments.

    Args:
        max_trials: How many models are trained, in all processes and runs together; None for any
            number, with `max_seconds` or `max_total_epochs`. Defaults to 30.
        max_epochs: Epochs of a model that is trained to the end. Defaults to 100.
        min_epochs: Epochs after which a model is paused for the first time. Defaults to 1.
        factor: One in so many models is promoted. Defaults to 3.
        sampler: As in `OptunaSearch`. It is told the place of each model: they are compared after
            the same number of epochs, the largest that ten of them have reached, and others come
            after those. Defaults to "tpe".

    Raises:
        InvalidOptionError: If an argument is not valid, or if there are several objectives.
    """

    _oracle_class: type[ASHAOracle] = ASHAOracle

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 30,
        max_epochs: int = 100,
        min_epochs: int = 1,
        factor: int = 3,
        seed: int | None = None,
        *,
        sampler: _samplers.SamplerOption = "tpe",
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        of_oracle, of_tuner = _options.split(kwargs)
        oracle = self._oracle_class(
            objective,
            max_trials,
            max_epochs,
            min_epochs,
            factor,
            seed,
            sampler=sampler,
            **of_oracle,
        )
        super().__init__(oracle, hypermodel, **of_tuner)


class PASHA(ASHA):
    """As `ASHA`, but trains longer only as long as that changes which models are better.

    As progressive ASHA (Bohdal et al., ICLR 2023): at first, models are promoted once. Another rung
    is added when the models of the two highest rungs are ranked differently in them, by more than
    noise. The noise is estimated from models that overtake each other more than once.

    See `ASHA` for the arguments.
    """

    _oracle_class = PASHAOracle
