"""Trials that are trained rung by rung: paused at the end of one, and perhaps promoted later.

`_hyperband.py`, `_asha.py` and `_population.py` say which: each has a queue that decides, an oracle
with the options, and a tuner.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import keras
import optuna
from optuna.trial import FrozenTrial, TrialState

from tfbig import _types, errors
from tfbig.tuners import (
    _learning_study,
    _ledger,
    _objectives,
    _oracle,
    _proposals,
    _queue,
    _running,
    _trial_callbacks,
    _trials,
    _tuner,
    _tuner_types,
    _views,
)

__all__ = ("Note", "RungOracle", "RungQueue", "RungTuner", "note_of", "rung_of", "score_in")


class Note(TypedDict):
    """What the ledger notes of a trial.

    Attributes:
        rung: The rung that it has reached.
        violates: Whether it violated a constraint when it was paused.
        scores: By rung, its score at the end.
        copied: By the rung from which on it is a copy, the trial that it is a copy of.
        values: By the rung from which on it has them, JSON of its values.
    """

    rung: int
    violates: bool
    scores: dict[int, float]
    copied: dict[int, int]
    values: dict[int, str]


def note_of(row: _ledger.TrialRow) -> Note:
    """What the ledger notes of a trial."""
    note = {"rung": 0, "violates": False} | json.loads(row.note)
    # The keys of JSON are texts.
    by_rung = {
        name: {int(rung): value for rung, value in note.get(name, {}).items()}
        for name in ("scores", "copied", "values")
    }
    return cast(Note, note | by_rung)


def rung_of(row: _ledger.TrialRow) -> int:
    """The rung that a trial has reached, from 0."""
    return note_of(row)["rung"]


def score_in(row: _ledger.TrialRow, rung: int) -> float | None:
    """The score of a trial at the end of a rung; None if it has not completed that."""
    return note_of(row)["scores"].get(rung)


class RungQueue(_queue.TrialQueue):
    """Puts trials back that have completed a rung; a subclass says which of them are promoted.

    Args:
        trials: See `TrialQueue`.
        proposals: See `TrialQueue`.
        oracle: The oracle of the search.
    """

    def __init__(
        self, trials: _trials.Trials, proposals: _proposals.Proposals, oracle: RungOracle
    ) -> None:
        super().__init__(trials, proposals, oracle._populated_values, oracle._known_hyperparameters)
        self._oracle = oracle
        # Scores are minimized after multiplication with it.
        self._sign = -1 if oracle.objective.direction == "max" else 1

    def epochs_by_rung(self, index: int) -> Sequence[int]:
        """Hook: the epoch up to which a trial is trained in each rung."""
        raise NotImplementedError

    def epochs_of(self, index: int) -> int:
        """The epoch up to which a trial is trained in its current rung."""
        return self.epochs_by_rung(index)[rung_of(self._ledger.trial(index))]

    def epochs_completed(self, index: int) -> int:
        """The epochs at the end of the last rung that a trial has completed; 0 if none."""
        epochs, note = self.epochs_by_rung(index), note_of(self._ledger.trial(index))
        return max((epochs[rung] for rung in note["scores"]), default=0)

    def pause(self, running: _running.RunningTrial) -> bool:
        row = self._ledger.trial(running.index)
        rung = rung_of(row)
        if rung + 1 == len(self.epochs_by_rung(running.index)):
            return False
        score = self.score(running)
        if score is None:
            return False
        # Another process may have taken it, and written its own.
        if running.is_lost_now():
            return False
        scores = note_of(row)["scores"] | {rung: score}
        # If it is not promoted, these are its results.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._trials.study._storage.set_trial_user_attr(
                running.storage_id, _trials.METRICS, json.dumps(running.trial.metrics.get_config())
            )
        violates = not self._oracle.is_feasible(running.trial)
        return self._ledger.set_state(
            running.index, _ledger.PAUSED, scores=scores, violates=violates
        )

    def score(self, running: _running.RunningTrial) -> float | None:
        """The score of a trial at the end of its rung; None if it cannot go on."""
        with _objectives.nan_allowed():
            self._oracle.score_trial(running.trial)
        return float(running.trial.score) if math.isfinite(running.trial.score) else None

    def is_paused_in(self, row: _ledger.TrialRow, rung: int) -> bool:
        """Whether a trial is paused at the end of a rung."""
        return row.state == _ledger.PAUSED and rung_of(row) == rung

    def ranked(self, rows: Sequence[_ledger.TrialRow], rung: int) -> list[_ledger.TrialRow]:
        """The trials that have completed a rung, best first; those that failed in it have not.

        Those that violate a constraint are the worst.
        """
        found = []
        for row in rows:
            score = score_in(row, rung)
            if score is not None:
                found.append((note_of(row)["violates"], self._sign * score, row.index, row))
        return [row for *_, row in sorted(found, key=lambda entry: entry[:3])]

    def paused(self) -> list[tuple[int, float]]:
        """Index and score of paused trials; those that were trained longest first, best first."""
        found = []
        for row in self._ledger.trials(state=_ledger.PAUSED):
            if note_of(row)["violates"]:
                continue
            score = note_of(row)["scores"][rung_of(row)]
            epochs = self.epochs_by_rung(row.index)[rung_of(row)]
            found.append((-epochs, self._sign * score, row.index, score))
        return [(index, score) for _, _, index, score in sorted(found)]

    def scores_by_epochs(self, trials: Sequence[FrozenTrial]) -> dict[int, dict[int, float]]:
        """By index: the scores of a trial at the ends of its rungs, by the epochs until then."""
        values = {
            t.user_attrs.get(_trials.INDEX): t.values[0]
            for t in trials
            if t.state == TrialState.COMPLETE
        }
        found = {}
        for row in self._ledger.trials():
            epochs = self.epochs_by_rung(row.index)
            scores = {epochs[rung]: score for rung, score in note_of(row)["scores"].items()}
            if row.index in values:
                scores[epochs[rung_of(row)]] = values[row.index]
            found[row.index] = scores
        return found

    def promote(self, row: _ledger.TrialRow, note: Note | None = None) -> bool:
        """Has this process continue a paused trial; returns whether no other was faster.

        Args:
            row: The trial as it was seen.
            note: Replaces its note, but for the rung.
        """
        new = {**(note or note_of(row)), "rung": rung_of(row) + 1}
        return self._ledger.take(row, json.dumps(new))

    def stop(self, row: _ledger.TrialRow) -> bool:
        """Ends a paused trial that is not promoted; returns whether no other was faster."""
        attrs = {_trials.WHY: _trials.STOPPED_EARLY}
        return self._ledger.take(row) and self._trials.end(row.index, TrialState.PRUNED, attrs)


class RungOracle(_oracle.StudyOracle):
    """An oracle of trials that are trained rung by rung. See `StudyOracle` for the arguments.

    Attributes:
        max_epochs: Epochs of a trial that is trained to the end.
    """

    goes_on = True
    max_epochs: int

    # As for `StudyOracle`.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self._objectives.is_single:
            raise errors.InvalidOptionError(
                "A tuner that pauses trials needs a single objective: with several, it cannot say "
                f"which trial is better. Received: the objectives {self.objective_names}. Use "
                "another tuner."
            )

    def is_feasible(self, trial: _tuner_types.Trial) -> bool:
        """Whether the metrics of a trial violate no constraint."""
        return self._search.outcomes.is_feasible(trial)

    @property
    def _rungs(self) -> RungQueue:
        return cast(RungQueue, self._search.queue)

    def epochs_of(self, trial_id: str) -> int:
        """The epoch up to which a trial of this process is trained now."""
        return self._rungs.epochs_of(int(trial_id))

    def last_step(self, trial_id: str) -> int:
        """The last step that a trial was trained for before; 0 if it is not known to have been."""
        # What replaces `fit` may report nothing in between.
        completed = self._rungs.epochs_completed(int(trial_id))
        return max(super().last_step(trial_id), completed)

    def _as_learned_from(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Trials as samplers see them, paused ones as well."""
        scores = self._rungs.scores_by_epochs(trials)
        return _learning_study.by_place(trials, scores, self.study.direction)

    def get_best_trials(self, num_trials: int = 1) -> list[_tuner_types.Trial]:
        """The best completed trials, best first.

        If none is complete, because the search was interrupted or its budget is spent: the paused
        ones that were trained longest, best first.
        """
        complete = super().get_best_trials(num_trials)
        if complete:
            return complete
        best = []
        for index, score in self._rungs.paused()[:num_trials]:
            trial = self.get_trial(_views.trial_id_of(index))
            trial.score = score
            best.append(trial)
        return best


class RungTuner(_tuner.Tuner):
    """Trains the model of a trial up to the end of its rung."""

    oracle: RungOracle

    # Whether `epochs` is ignored, instead of refused.
    _ignores_epochs = False

    def _arguments_of_fit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments without `epochs`, which the rungs say.

        Raises:
            InvalidOptionError: If there are `epochs`, unless this tuner ignores them.
        """
        if self._has_own_run_trial:
            return args, kwargs  # In a user's `run_trial` they may have an effect.
        args, kwargs = super()._arguments_of_fit(args, kwargs)
        names = _positional_names(self.hypermodel.fit)
        if "epochs" in names[: len(args)]:
            # By name, so that what comes after them does not move.
            first = names.index("epochs")
            kwargs = dict(zip(names[first:], args[first:], strict=False)) | kwargs
            args = args[:first]
        if "epochs" not in kwargs:
            return args, kwargs
        name, epochs = type(self).__name__, kwargs["epochs"]
        remedy = (
            f"Leave it out, and set `max_epochs` of the tuner, which is {self.oracle.max_epochs}."
        )
        if not self._ignores_epochs:
            raise errors.InvalidOptionError(
                f"`search` of {name} must not have `epochs`: the tuner itself says for how many "
                f"epochs a trial is trained. Received: epochs={epochs}. {remedy}"
            )
        if self._workers.is_chief and not self._is_trial_process:
            warnings.warn(
                f"`epochs` has no effect in `search` of {name}, which itself says for how many "
                f"epochs a trial is trained. Received: epochs={epochs}. {remedy}",
                stacklevel=3,
            )
        return args, {key: value for key, value in kwargs.items() if key != "epochs"}

    def on_search_begin(self) -> None:
        """Checks that no hyperparameter says how long trials are trained, which this tuner does."""
        super().on_search_begin()
        if "epochs" in {hp.name for hp in self.oracle.get_space().space}:
            raise errors.InvalidOptionError(
                f"{type(self).__name__} itself says for how many epochs a trial is trained. "
                "Received: a hyperparameter named 'epochs'. Leave it out, or use another tuner."
            )

    def on_search_end(self) -> None:
        """Removes the states of trials that ended while they were paused."""
        super().on_search_end()
        if self._workers.is_chief:
            with contextlib.suppress(OSError), self.oracle.one_look():
                self._remove_worse()

    def run_trial(
        self, trial: _tuner_types.Trial, *args: Any, **kwargs: Any
    ) -> _tuner_types.Results:
        """Trains the model of a trial up to the end of its rung."""
        # Before the state of a trial is touched that is another's now.
        self._raise_if_lost(trial)
        kwargs["epochs"] = self.oracle.epochs_of(trial.trial_id)
        return super().run_trial(trial, *args, **kwargs)

    def _raise_if_lost(self, trial: _tuner_types.Trial) -> None:
        """Raises `TrialLost`, on all workers, if another process has taken a trial."""
        is_lost = self.oracle.is_lost_now(trial.trial_id)
        if self._workers.count > 1:
            answers = self._workers.exchange("whether a trial is lost", json.dumps(is_lost))
            is_lost = json.loads(answers[0])
        if is_lost:
            raise _trial_callbacks.TrialLost


def _positional_names(fit: _types.AnyFunction) -> list[str]:
    """The names of what `search` passes by position to the `fit` of a `HyperModel`."""
    _, _, *parameters = inspect.signature(fit).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        # They go on to Keras.
        _, *of_keras = inspect.signature(keras.Model.fit).parameters
        names += of_keras[len(names) :]
    return names
