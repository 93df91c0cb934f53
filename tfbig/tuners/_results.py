"""What a search has found: a table, and the importance of hyperparameters."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

import optuna
from optuna import distributions
from optuna.trial import FrozenTrial, TrialState

from tfbig import errors
from tfbig.tuners import _hyperparameters as hps
from tfbig.tuners import _progress, _space, _study, _tuner_types, _views
from tfbig.tuners._oracle import StudyOracle

if TYPE_CHECKING:
    from tfbig.tuners import _tuner_results

__all__ = (
    "Row",
    "dataframe",
    "importance",
    "names_in",
    "quiet",
    "rows_of",
    "score_names",
    "shares_in",
    "study_of",
)


class Row(TypedDict):
    """A trial, as tables show it."""

    trial: str
    status: str
    scores: list[float] | list[None]
    best_step: int | None
    epochs: int | None
    duration: float | None
    message: str
    values: _tuner_types.Values
    frozen: FrozenTrial


def rows_of(tuner: "_tuner_results.TunerResults") -> Iterator[Row]:
    """A row for each trial."""
    oracle = tuner.oracle
    frozen_trials = oracle._search.trials.by_index()
    for trial_id, trial in oracle.trials.items():
        if (frozen := frozen_trials.get(int(trial_id))) is None:
            continue  # It began after the other trials were read.
        is_complete = frozen.state == TrialState.COMPLETE
        yield {
            "trial": trial_id,
            "status": _progress.status_of(trial),
            "scores": frozen.values if is_complete else [None] * len(oracle.directions),
            "best_step": trial.best_step if is_complete else None,
            "epochs": max(frozen.intermediate_values, default=None),
            "duration": frozen.duration.total_seconds() if frozen.duration else None,
            "message": (trial.message or "").strip(),
            "values": trial.hyperparameters.values,
            "frozen": frozen,
        }


def names_in(rows: Iterable[Row]) -> list[str]:
    """Names of the hyperparameters of trials, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["values"]))


def score_names(oracle: StudyOracle) -> list[str]:
    """The columns of the scores."""
    names = oracle._objectives.names
    return ["score"] if len(names) == 1 else names


def dataframe(tuner: "_tuner_results.TunerResults") -> _tuner_types.DataFrame:
    """The trials of a search as a `pandas.DataFrame`; see `Tuner.to_dataframe`."""
    try:
        import pandas as pd
    except ImportError:
        raise errors.InvalidOptionError(
            "to_dataframe() needs pandas, which is not installed. pip install pandas"
        ) from None
    rows = list(rows_of(tuner))
    # A column is a list or a series of pandas.
    columns: dict[str, Any] = {"trial": [row["trial"] for row in rows]}
    columns["status"] = [row["status"] for row in rows]
    for i, name in enumerate(score_names(tuner.oracle)):
        columns[name] = pd.Series([row["scores"][i] for row in rows], dtype="float64")
    columns["best_step"] = pd.Series([row["best_step"] for row in rows], dtype="Int64")
    columns["epochs"] = pd.Series([row["epochs"] for row in rows], dtype="Int64")
    columns["duration"] = pd.Series([row["duration"] for row in rows], dtype="float64")
    for name in names_in(rows):
        values = [row["values"].get(name, pd.NA) for row in rows]
        kinds = {type(v) for v in values}
        # Otherwise pandas would convert integers to floats, and None to NaN.
        is_plain = len(kinds) == 1 and kinds <= {bool, int, float, str}
        series = pd.Series(values, dtype=None if is_plain else object)
        columns[f"hp {name}" if name in columns else name] = series
    return pd.DataFrame(columns)


def _distribution(
    hp: _tuner_types.Hyperparameter, values: list[_tuner_types.Value]
) -> distributions.BaseDistribution:
    """An Optuna distribution over real values that includes all that occurred."""
    if isinstance(hp, hps.Int | hps.Float) and all(type(v) in (int, float) for v in values):
        low, high = min(hp.min_value, *values), max(hp.max_value, *values)
        is_log = hp.sampling == "log" and low > 0
        is_whole = isinstance(hp, hps.Int) and all(type(v) is int for v in values)
        if is_whole:
            return distributions.IntDistribution(low, high, log=is_log)
        return distributions.FloatDistribution(low, high, log=is_log)
    choices = list(dict.fromkeys(map(_category, [*_choices(hp), *values])))
    return distributions.CategoricalDistribution(choices)


def _choices(hp: _tuner_types.Hyperparameter) -> Iterable[_tuner_types.Value]:
    choices: Iterable[_tuner_types.Value] = ()
    if isinstance(hp, hps.Choice | hps.Boolean):
        choices = hp.values
    return choices


def _category(value: _tuner_types.Value) -> str:
    """A value as text: Optuna compares with ==, so that 1 and True are the same."""
    return value if isinstance(value, str) else repr(value)


def _labels(
    hyperparameters: hps.HyperParameters,
) -> Iterator[tuple[_tuner_types.Hyperparameter, str]]:
    """The hyperparameters that are searched, each with a unique name."""
    searched = [hp for hp in hyperparameters.space if not isinstance(hp, hps.Fixed)]
    names = [hp.name for hp in searched]
    for hp in searched:
        # Under different conditions, the same name may have different ranges.
        is_single = names.count(hp.name) == 1
        parameter = None if is_single else _space.parameter_of(hp)
        yield hp, hp.name if parameter is None else parameter.name


def study_of(tuner: "_tuner_results.TunerResults", rows: list[Row]) -> optuna.Study:
    """A copy of the study in memory, with the names and values that users know."""
    oracle = tuner.oracle
    params_of: dict[str, _tuner_types.Values] = {row["trial"]: {} for row in rows}
    distributions_of: dict[str, dict[str, distributions.BaseDistribution]] = {
        row["trial"]: {} for row in rows
    }
    known = hps.HyperParameters()
    for hp, label in _labels(oracle.hyperparameters):
        having = []
        for row in rows:
            known.values = row["values"]
            if hp.name in known.values and known._conditions_are_active(hp.conditions):
                having.append(row)
        if not having:
            continue
        distribution = _distribution(hp, [row["values"][hp.name] for row in having])
        is_text = isinstance(distribution, distributions.CategoricalDistribution)
        for row in having:
            value = row["values"][hp.name]
            params_of[row["trial"]][label] = _category(value) if is_text else value
            distributions_of[row["trial"]][label] = distribution
    study = optuna.create_study(directions=oracle.directions)
    study.set_metric_names(oracle._objectives.names)
    by_id = {row["trial"]: row["frozen"] for row in rows}
    for index in range(max(map(int, by_id), default=-1) + 1):
        trial_id = _views.trial_id_of(index)
        frozen = by_id.get(trial_id)
        if frozen is None or not frozen.state.is_finished():
            # Keeps the numbers of the trials after it.
            made = optuna.trial.create_trial(state=TrialState.FAIL)
        else:
            is_complete = frozen.state == TrialState.COMPLETE
            made = optuna.trial.create_trial(
                state=frozen.state,
                values=frozen.values if is_complete else None,
                params=params_of[trial_id],
                distributions=distributions_of[trial_id],
                intermediate_values=frozen.intermediate_values,
                system_attrs={f"constraints:{k}": v for k, v in frozen.constraints.items()},
            )
        study.add_trial(made)
    return study


def shares_in(study: optuna.Study, objective: int = 0) -> dict[str, float]:
    """Shares by name, largest first; empty if there is nothing to compare.

    Args:
        study: From `study_of`.
        objective: The index of the objective.

    Raises:
        InvalidOptionError: If scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise errors.InvalidOptionError(
            "The importance of hyperparameters needs scikit-learn, which is not installed. "
            "pip install tfbig[sklearn]"
        )
    # Optuna considers only these; other trials may lack parameters.
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 2:
        return {}
    common = set.intersection(*(set(t.params) for t in complete))
    if not common:
        return {}
    shares = optuna.importance.get_param_importances(
        study,
        # Seeded, so that the same trials give the same result.
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        params=sorted(common),
        target=lambda trial: trial.values[objective],
    )
    return {name: float(share) for name, share in shares.items()}


def importance(
    tuner: "_tuner_results.TunerResults", objective: str | None = None
) -> dict[str, float]:
    """The share of each hyperparameter in the objective's variance; see `Tuner.importance`."""
    names = tuner.oracle._objectives.names
    if objective is not None and objective not in names:
        raise errors.InvalidOptionError(
            f"`objective` must be one of {', '.join(names)}. Received: objective={objective!r}."
        )
    with quiet():
        study = study_of(tuner, list(rows_of(tuner)))
        return shares_in(study, 0 if objective is None else names.index(objective))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Optuna and matplotlib, whose warnings a user could not act on."""
    with _study.quiet(optuna.logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
