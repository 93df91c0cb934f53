"""What a study holds of a search, for those who look at it."""

import dataclasses
import functools
import json
from collections.abc import Iterable

import optuna
from optuna.trial import FrozenTrial, TrialState

from tfbig.tuners import _agreement, _json, _ledger, _objectives, _trials, _tuner_types, _views
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("COMPLETE", "FAILED", "INFEASIBLE", "PRUNED", "RUNNING", "Record", "Row", "Run", "read")

COMPLETE, PRUNED, INFEASIBLE, FAILED, RUNNING = (
    "complete",
    "pruned",
    "infeasible",
    "failed",
    "running",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A process that ran a trial, and when.

    Attributes:
        process: The name of the process; "" if it is not known.
        began: Seconds since the epoch.
        ended: Seconds since the epoch; None if the process runs it, or never said.
    """

    process: str
    began: float
    ended: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A trial.

    Attributes:
        trial: Its id.
        status: "complete", "pruned", "infeasible", "failed" or "running".
        scores: The values of the objectives; empty unless it is complete.
        is_feasible: Whether it violates no constraint.
        best_step: The epoch of its score, from 0; None unless it is complete.
        epochs: How many epochs were reported; None if none.
        duration: Seconds from its start to its end; None if it has not ended.
        message: Why it failed; "" if there is nothing to say.
        values: The values of its hyperparameters.
        runs: The processes that ran it, in order.
        frozen: The study's trial.
    """

    trial: str
    status: str
    scores: list[float]
    is_feasible: bool
    best_step: int | None
    epochs: int | None
    duration: float | None
    message: str
    values: _tuner_types.Values
    runs: list[Run]
    frozen: FrozenTrial


@dataclasses.dataclass(frozen=True)
class Record:
    """A search as it was when it was read.

    Attributes:
        name: The name of the search.
        place: Where it is stored, without passwords.
        searched_by: The class of the tuner or oracle.
        settings: What all its processes agree on, as texts.
        max_trials: How many trials there may be; None for any number, or if it is not known.
        objectives: The names of the objectives.
        directions: "minimize" or "maximize" for each objective.
        space: All its hyperparameters.
        rows: The trials in order.
        best_trials: Ids of the best trials, best first; with several objectives, of the front.
    """

    name: str
    place: str
    searched_by: str
    settings: dict[str, str]
    max_trials: int | None
    objectives: list[str]
    directions: list[_objectives.Direction]
    space: HyperParameters
    rows: list[Row]
    best_trials: list[str]

    @functools.cached_property
    def by_trial(self) -> dict[str, Row]:
        """The trials by id."""
        return {row.trial: row for row in self.rows}

    @property
    def is_single(self) -> bool:
        return len(self.objectives) == 1

    @property
    def best(self) -> list[Row]:
        """The best feasible trials, best first; with several objectives, the Pareto front."""
        return [self.by_trial[trial] for trial in self.best_trials]

    def counts(self) -> dict[str, int]:
        """How many trials ended in which way; only what occurs."""
        statuses = [row.status for row in self.rows]
        words = (COMPLETE, PRUNED, INFEASIBLE, FAILED, RUNNING)
        return {word: statuses.count(word) for word in words if word in statuses}

    def sign(self, objective: int) -> int:
        """By which an objective is multiplied to be minimized."""
        return -1 if self.directions[objective] == "maximize" else 1


def read(
    study: optuna.Study, ledger: _ledger.Ledger, place: str, searched_by: str | None = None
) -> Record:
    """Reads a search.

    Args:
        study: The study.
        ledger: The ledger beside it.
        place: Where it is stored, without passwords.
        searched_by: The class of the tuner. Defaults to that of the oracle.
    """
    # Older searches have not stored all of these.
    settings: dict[str, str] = json.loads(ledger.metadata(_agreement.SETTINGS) or "{}")
    space = ledger.metadata(_agreement.SPACE)
    max_trials = ledger.metadata(_agreement.MAX_TRIALS) or str(None)
    kind = settings.pop(_agreement.KIND, "")
    directions: list[_objectives.Direction] = [
        "maximize" if d == optuna.study.StudyDirection.MAXIMIZE else "minimize"
        for d in study.directions
    ]
    names = study.metric_names or [f"objective {i}" for i in range(len(directions))]
    trials = study.get_trials(deepcopy=False)
    rows = _rows(trials)
    return Record(
        name=study.study_name,
        place=place,
        searched_by=searched_by or kind,
        settings=settings,
        max_trials=None if max_trials == str(None) else int(max_trials),
        objectives=names,
        directions=directions,
        space=HyperParameters.from_config(_json.loads(space)) if space else HyperParameters(),
        rows=rows,
        best_trials=_best(rows, directions),
    )


def _rows(trials: Iterable[FrozenTrial]) -> list[Row]:
    found = (t for t in trials if _trials.INDEX in t.user_attrs)
    valid = (t for t in found if t.user_attrs.get(_trials.WHY) != _trials.VOID)
    return [_row(t) for t in sorted(valid, key=lambda t: int(t.user_attrs[_trials.INDEX]))]


def _row(frozen: FrozenTrial) -> Row:
    attrs, is_complete = frozen.user_attrs, frozen.state == TrialState.COMPLETE
    broken = INFEASIBLE if attrs.get(_trials.WHY) == _trials.INFEASIBLE else FAILED
    words = {
        TrialState.COMPLETE: COMPLETE,
        TrialState.PRUNED: PRUNED,
        TrialState.FAIL: broken,
    }
    return Row(
        trial=_views.trial_id_of(attrs[_trials.INDEX]),
        status=words.get(frozen.state, RUNNING),
        scores=list(frozen.values) if is_complete else [],
        is_feasible=all(v <= 0 for v in frozen.constraints.values()),
        best_step=attrs.get(_trials.BEST_STEP, 0) if is_complete else None,
        epochs=max(frozen.intermediate_values, default=None),
        duration=frozen.duration.total_seconds() if frozen.duration else None,
        message=(attrs.get(_trials.MESSAGE) or "").strip(),
        values=_json.loads(attrs.get(_trials.VALUES, "{}")),
        runs=_runs(frozen),
        frozen=frozen,
    )


def _runs(frozen: FrozenTrial) -> list[Run]:
    """The runs of a trial, also of one that is older than the record of them."""
    names = sorted(
        (name for name in frozen.user_attrs if name.startswith(_trials.RUN)),
        key=lambda name: int(name.removeprefix(_trials.RUN)),
    )
    runs = [Run(*frozen.user_attrs[name]) for name in names]
    end = frozen.datetime_complete.timestamp() if frozen.datetime_complete else None
    if not runs and frozen.datetime_start:
        return [Run("", frozen.datetime_start.timestamp(), end)]
    # A process that died never said when it ended: at the latest when another one began.
    nexts = [run.began for run in runs[1:]] + [end]
    return [
        run if run.ended is not None else dataclasses.replace(run, ended=after)
        for run, after in zip(runs, nexts, strict=True)
    ]


def _best(rows: list[Row], directions: list[_objectives.Direction]) -> list[str]:
    signs = [-1 if d == "maximize" else 1 for d in directions]

    def key(row: Row) -> list[float]:
        return [sign * score for sign, score in zip(signs, row.scores, strict=True)]

    found = [row for row in rows if row.scores and row.is_feasible]
    best = sorted(found, key=key) if len(signs) == 1 else _objectives.pareto_front(found, key)
    return [row.trial for row in best]
