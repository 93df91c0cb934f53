"""What a search has found: as a table, and as shares of importance."""

import contextlib
import importlib.util
import warnings
from typing import Any

import optuna
from optuna import distributions
from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import _hyperparameters as hps
from tfbig.tuners import _progress, _space, _study

__all__ = (
    "dataframe",
    "importance",
    "names_in",
    "quiet",
    "rows_of",
    "score_names",
    "shares_in",
    "study_of",
)


def rows_of(tuner):
    """A dictionary for each trial: what all trials have, and `values` by hyperparameter."""
    oracle = tuner.oracle
    frozen_trials = oracle._trials.by_slot()
    for trial_id, trial in oracle.trials.items():
        if (frozen := frozen_trials.get(int(trial_id))) is None:
            continue  # It began between the two looks.
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


def names_in(rows):
    """Names of hyperparameters that trials have, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row["values"]))


def score_names(oracle):
    names = [o.name for o in oracle._objectives]
    return ["score"] if len(names) == 1 else names


def dataframe(tuner):
    """The trials of a search as a `pandas.DataFrame`; see `Tuner.to_dataframe`."""
    try:
        import pandas as pd
    except ImportError:
        raise errors.InvalidOptionError(
            "to_dataframe() needs pandas, not installed here. pip install pandas"
        ) from None
    rows = list(rows_of(tuner))
    columns = {name: [row[name] for row in rows] for name in ("trial", "status")}
    for i, name in enumerate(score_names(tuner.oracle)):
        columns[name] = pd.Series([row["scores"][i] for row in rows], dtype="float64")
    for name in ("best_step", "epochs"):
        columns[name] = pd.Series([row[name] for row in rows], dtype="Int64")
    columns["duration"] = pd.Series([row["duration"] for row in rows], dtype="float64")
    for name in names_in(rows):
        values = [row["values"].get(name, pd.NA) for row in rows]
        kinds = {type(v) for v in values}
        # Elsewhere pandas would turn integers into floats, and None into NaN.
        is_plain = len(kinds) == 1 and kinds <= {bool, int, float, str}
        series = pd.Series(values, dtype=None if is_plain else object)
        columns[f"hp {name}" if name in columns else name] = series
    return pd.DataFrame(columns)


def _distribution(hp, values):
    """An Optuna distribution over real values, as wide as those that occurred."""
    if isinstance(hp, hps.Int | hps.Float) and all(type(v) in (int, float) for v in values):
        low, high = min(hp.min_value, *values), max(hp.max_value, *values)
        is_log = hp.sampling == "log" and low > 0
        is_whole = isinstance(hp, hps.Int) and all(type(v) is int for v in values)
        kind = distributions.IntDistribution if is_whole else distributions.FloatDistribution
        return kind(low, high, log=is_log)
    choices = list(dict.fromkeys(map(_category, [*_choices(hp), *values])))
    return distributions.CategoricalDistribution(choices)


def _choices(hp):
    return hp.values if isinstance(hp, hps.Choice | hps.Boolean) else ()


def _category(value):
    """A value as a text: by Optuna's ==, 1 and True are the same."""
    return value if isinstance(value, str) else repr(value)


def _labels(hyperparameters):
    """Hyperparameters that are searched, and a name for each that no other has."""
    searched = [hp for hp in hyperparameters.space if not isinstance(hp, hps.Fixed)]
    names = [hp.name for hp in searched]
    for hp in searched:
        # The same name may stand under two conditions, with different ranges.
        is_single = names.count(hp.name) == 1
        parameter = None if is_single else _space.parameter_of(hp)
        yield hp, hp.name if parameter is None else parameter.name


def study_of(tuner, rows):
    """A copy of the study in memory whose parameters are called, and are, as users know them."""
    oracle = tuner.oracle
    params_of: dict[str, dict[str, Any]] = {row["trial"]: {} for row in rows}
    distributions_of: dict[str, dict[str, Any]] = {row["trial"]: {} for row in rows}
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
    study.set_metric_names([o.name for o in oracle._objectives])
    by_id = {row["trial"]: row["frozen"] for row in rows}
    for slot in range(max(map(int, by_id), default=-1) + 1):
        trial_id = oracle._trial_id(slot)
        frozen = by_id.get(trial_id)
        if frozen is None or not frozen.state.is_finished():
            # Keeps the numbers of those that come after it.
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


def shares_in(study, objective=0):
    """Shares by name, the largest first; an empty dictionary where there is nothing to compare.

    Raises:
        InvalidOptionError: If scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise errors.InvalidOptionError(
            "The importance of hyperparameters needs scikit-learn, not installed here. "
            "pip install tfbig[sklearn]"
        )
    # Only these are weighed; a trial that ended otherwise may lack parameters.
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 2:
        return {}
    common = set.intersection(*(set(t.params) for t in complete))
    if not common:
        return {}
    shares = optuna.importance.get_param_importances(
        study,
        # The same trials have the same importance.
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        params=sorted(common),
        target=lambda trial: trial.values[objective],
    )
    return {name: float(share) for name, share in shares.items()}


def importance(tuner, objective=None):
    """What part of the objective's variance each hyperparameter has; see `Tuner.importance`."""
    names = [o.name for o in tuner.oracle._objectives]
    if objective is not None and objective not in names:
        raise errors.InvalidOptionError(
            f"`objective` must be one of {', '.join(names)}. Received: objective={objective!r}."
        )
    with quiet():
        study = study_of(tuner, list(rows_of(tuner)))
        return shares_in(study, 0 if objective is None else names.index(objective))


@contextlib.contextmanager
def quiet():
    """Neither Optuna nor matplotlib has anything to say that a user could act on."""
    with _study.quiet(optuna.logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
