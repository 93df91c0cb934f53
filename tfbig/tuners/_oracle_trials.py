"""The trials of an oracle, as KerasTuner's programs read them, and add trials of known results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TypeAlias

from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import _json, _ledger, _outcomes, _search, _tuner_types, _views
from tfbig.tuners._from_study import FromStudy
from tfbig.tuners._hyperparameters import HyperParameters
from tfbig.tuners._objectives import Objectives

__all__ = ("OracleTrials", "TrialsById")

_STATUS = kt_trial.TrialStatus

# By their id.
Trials: TypeAlias = MutableMapping[str, _tuner_types.Trial]


class TrialsById(MutableMapping[str, _tuner_types.Trial]):
    """The trials of a search by their id. A trial that is put in is added to the search.

    Args:
        trials: The trials.
        add: Adds one to the search, which gives it its id.
    """

    def __init__(
        self,
        trials: Mapping[str, _tuner_types.Trial],
        add: Callable[[_tuner_types.Trial], None],
    ) -> None:
        self._trials = dict(trials)
        self._add = add

    def __getitem__(self, trial_id: str) -> _tuner_types.Trial:
        return self._trials[trial_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._trials)

    def __len__(self) -> int:
        return len(self._trials)

    def __repr__(self) -> str:
        return repr(self._trials)

    def __setitem__(self, trial_id: str, trial: _tuner_types.Trial) -> None:
        if self._trials.get(trial_id) is not trial:
            self._add(trial)
        self._trials[trial.trial_id] = trial

    def __delitem__(self, trial_id: str) -> None:
        raise errors.InvalidOptionError(
            f"A search keeps all its trials. Received: an attempt to remove {trial_id!r}. Use "
            "another `project_name`, or overwrite=True."
        )

    # Copies are dictionaries: what is put into them is not added.

    def copy(self) -> dict[str, _tuner_types.Trial]:
        return dict(self._trials)

    def __or__(self, other: Mapping[str, _tuner_types.Trial]) -> dict[str, _tuner_types.Trial]:
        return {**self._trials, **other}

    def __ror__(self, other: Mapping[str, _tuner_types.Trial]) -> dict[str, _tuner_types.Trial]:
        return {**other, **self._trials}

    def __reduce__(self) -> tuple[type, tuple[dict[str, _tuner_types.Trial]]]:
        return dict, (self.copy(),)


def _replace(oracle: OracleTrials, given: Trials) -> None:
    """An assignment to `oracle.trials`."""
    # KerasTuner's constructor assigns, before there is a search.
    if not hasattr(oracle, "_opened"):
        return
    known = oracle.trials
    for trial_id in known.keys() - given.keys():
        del known[trial_id]
    known.update(given)


class OracleTrials:
    """What an oracle tells of its trials."""

    goes_on: bool
    hyperparameters: HyperParameters
    max_trials: int | None
    _opened: _search.Search | None
    _project_name: str | None
    update_space: Callable[[HyperParameters], None]

    @property
    def _search(self) -> _search.Search:
        raise NotImplementedError

    @property
    def _objectives(self) -> Objectives:
        raise NotImplementedError

    @FromStudy.written_by(_replace)
    def trials(self) -> Trials:
        """All trials by id, in order; `keras_tuner.engine.trial.Trial`.

        A complete trial that is put in is added to the search, once, however often the program
        runs. It counts as one of `max_trials`, and gets the id that follows the last.
        """
        if self._opened is None and self._project_name is None:
            return TrialsById({}, self._add)
        return TrialsById(self._search.views.by_id(), self._add)

    @FromStudy
    def start_order(self) -> list[str]:
        """Ids in the order in which trials began."""
        return list(self.trials)

    @FromStudy
    def end_order(self) -> list[str]:
        """Ids in the order in which trials ended."""
        return self._search.views.ended_ids()

    @FromStudy
    def ongoing_trials(self) -> dict[str, _tuner_types.Trial]:
        """The trials that this process runs, by the id of the tuner."""
        return {} if self._opened is None else self._opened.running.by_tuner()

    def _add(self, trial: _tuner_types.Trial) -> None:
        """Adds a complete trial to the search; gives it its id there."""
        scores = self._scores_of(trial)
        search = self._search
        self.update_space(HyperParameters.of(trial.hyperparameters))
        values = {name: _json.canonical(v) for name, v in trial.hyperparameters.values.items()}
        name = f"added {_json.name_of({'values': values, 'scores': scores})}"
        ledger = search.trials.ledger
        index = ledger.take_new(self.max_trials, claim=name)
        if index is None:
            row = self._row_of(name)
            index = row.index
            # A process that was killed may have left it half added.
            is_left = row.state == _ledger.RUNNING and index in {
                r.index for r in ledger.abandoned()
            }
            if not is_left or not ledger.take(row, died=bool(row.owner)):
                trial.trial_id = _views.trial_id_of(index)
                return
        with search.trials.one_look():
            search.trials.store(search.trials.of(index), self.hyperparameters, values)
        search.proposals.claim(index, values)
        attrs = _outcomes.attributes_of(trial, None)
        search.trials.end(index, TrialState.COMPLETE, attrs, scores)
        trial.trial_id = _views.trial_id_of(index)

    def _row_of(self, name: str) -> _ledger.TrialRow:
        """What the ledger says of a trial that was added before."""
        ledger = self._search.trials.ledger
        for row in ledger.trials() if ledger.claims(name=name) else ():
            if name in ledger.claims(index=row.index):
                return row
        raise errors.InvalidOptionError(
            "A trial that is added to `trials` counts as one of `max_trials`. Received: "
            f"max_trials={self.max_trials}, and as many trials. Use a larger `max_trials`."
        )

    def _scores_of(self, trial: _tuner_types.Trial) -> list[float]:
        """The scores of a trial that may be added; raises for others."""
        if self._project_name is None:
            raise errors.InvalidOptionError(
                "`trials` can take trials once the oracle has a tuner. Received: a trial before "
                "that. Add it to `tuner.oracle.trials`."
            )
        if self.goes_on:
            raise errors.InvalidOptionError(
                "A search that pauses trials compares scores after so many epochs, which a trial "
                "from elsewhere does not have. Received: a trial for `trials`. Use `enqueue`."
            )
        score = trial.score
        scores = list(score) if isinstance(score, list | tuple) else [score]
        is_whole = len(scores) == len(self._objectives.names) and None not in scores
        if trial.status != _STATUS.COMPLETED or not is_whole or not all(map(math.isfinite, scores)):
            raise errors.InvalidOptionError(
                "A trial that is added to `trials` must be COMPLETED, with a finite score for each "
                f"objective. Received: status={trial.status!r}, score={score!r}. Use `enqueue` to "
                "have values tried."
            )
        return [float(s) for s in scores]
