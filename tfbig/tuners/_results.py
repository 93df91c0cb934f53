"""What a search has found: a table, and the importance of hyperparameters."""

import contextlib
import dataclasses
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import optuna
from optuna import distributions

from tfbig import errors
from tfbig.tuners import _hyperparameters as hps
from tfbig.tuners import _record, _space, _study, _tuner_types

if TYPE_CHECKING:
    from tfbig.tuners import _tuner_results

__all__ = (
    "Searched",
    "category",
    "dataframe",
    "importance",
    "names_in",
    "quiet",
    "record_of",
    "score_names",
    "searched_in",
    "shares_in",
    "study_of",
)


def record_of(tuner: "_tuner_results.TunerResults") -> _record.Record:
    """The search of a tuner."""
    oracle = tuner.oracle
    trials = oracle._search.trials
    place = f"{_study.FILE} in {oracle._project_dir}"
    if oracle._storage is not None:
        # The part after "?" may contain a password, too.
        place = _study.shown(oracle._storage).partition("?")[0]
    if oracle._storage == _study.MEMORY:
        place = "memory"
    return _record.read(trials.study, trials.ledger, place, type(tuner).__name__)


def names_in(rows: Iterable[_record.Row]) -> list[str]:
    """Names of the hyperparameters of trials, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def score_names(record: _record.Record) -> list[str]:
    """The columns of the scores."""
    return ["score"] if record.is_single else record.objectives


def dataframe(tuner: "_tuner_results.TunerResults") -> _tuner_types.DataFrame:
    """The trials of a search as a `pandas.DataFrame`; see `Tuner.to_dataframe`."""
    try:
        import pandas as pd
    except ImportError:
        raise errors.InvalidOptionError(
            "to_dataframe() needs pandas, which is not installed. pip install pandas"
        ) from None
    record = record_of(tuner)
    rows = record.rows
    # A column is a list or a series of pandas.
    columns: dict[str, Any] = {"trial": [row.trial for row in rows]}
    columns["status"] = [row.status for row in rows]
    for i, name in enumerate(score_names(record)):
        scores = [row.scores[i] if row.scores else None for row in rows]
        columns[name] = pd.Series(scores, dtype="float64")
    columns["best_step"] = pd.Series([row.best_step for row in rows], dtype="Int64")
    columns["epochs"] = pd.Series([row.epochs for row in rows], dtype="Int64")
    columns["duration"] = pd.Series([row.duration for row in rows], dtype="float64")
    for name in names_in(rows):
        values = [row.values.get(name, pd.NA) for row in rows]
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
    choices = list(dict.fromkeys(map(category, [*_choices(hp), *values])))
    return distributions.CategoricalDistribution(choices)


def _choices(hp: _tuner_types.Hyperparameter) -> Iterable[_tuner_types.Value]:
    choices: Iterable[_tuner_types.Value] = ()
    if isinstance(hp, hps.Choice | hps.Boolean):
        choices = hp.values
    return choices


def category(value: _tuner_types.Value) -> str:
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


@dataclasses.dataclass(frozen=True)
class Searched:
    """A hyperparameter that is searched, and the values it has had.

    Attributes:
        label: Its name, which is unique.
        distribution: A distribution over real values that includes all that occurred.
        values: The values by trial, only of trials in which it is active; of a category, its text.
    """

    label: str
    distribution: distributions.BaseDistribution
    values: _tuner_types.Values

    @property
    def iscategory(self) -> bool:
        return isinstance(self.distribution, distributions.CategoricalDistribution)


def searched_in(record: _record.Record) -> list[Searched]:
    """The hyperparameters that are searched, with the names and values that users know."""
    found = []
    known = hps.HyperParameters()
    for hp, label in _labels(record.space):
        values: _tuner_types.Values = {}
        for row in record.rows:
            known.values = row.values
            if hp.name in row.values and known._conditions_are_active(hp.conditions):
                values[row.trial] = row.values[hp.name]
        if not values:
            continue
        distribution = _distribution(hp, list(values.values()))
        if isinstance(distribution, distributions.CategoricalDistribution):
            values = {trial: category(value) for trial, value in values.items()}
        found.append(Searched(label, distribution, values))
    return found


def study_of(
    record: _record.Record, searched: list[Searched], rows: Iterable[_record.Row]
) -> optuna.Study:
    """A copy of complete trials in memory, with the names and values that users know."""
    study = optuna.create_study(directions=record.directions)
    for row in rows:
        active = [one for one in searched if row.trial in one.values]
        made = optuna.trial.create_trial(
            values=row.scores,
            params={one.label: one.values[row.trial] for one in active},
            distributions={one.label: one.distribution for one in active},
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
    complete = study.get_trials(deepcopy=False)
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
        # The square of a larger number is not finite.
        target=lambda trial: min(max(trial.values[objective], -1e100), 1e100),
    )
    return {name: float(share) for name, share in shares.items()}


def importance(
    tuner: "_tuner_results.TunerResults", objective: str | None = None
) -> dict[str, float]:
    """The share of each hyperparameter in the objective's variance; see `Tuner.importance`."""
    record = record_of(tuner)
    names = record.objectives
    if objective is not None and objective not in names:
        raise errors.InvalidOptionError(
            f"`objective` must be one of {', '.join(names)}. Received: objective={objective!r}."
        )
    with quiet():
        study = study_of(record, searched_in(record), [row for row in record.rows if row.scores])
        return shares_in(study, 0 if objective is None else names.index(objective))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Optuna and scikit-learn, whose warnings a user could not act on."""
    with _study.quiet(optuna.logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
