"""A search that begins with what an earlier one has found."""

import os
import warnings
from typing import Any, Literal, TypeAlias

import optuna
from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import (
    _json,
    _oracle,
    _own_values,
    _read_only,
    _record,
    _space,
    _trials,
    _tuner_types,
)
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("Transfer", "check", "transfer")

Transfer: TypeAlias = Literal["best", "observations"]

# So many of the best trials are tried again.
_BEST = 3

# After so many trials with hyperparameters that the program does not define for them, others are
# not looked at: each takes a model that is built.
_MOST_FAILURES = 10


# What the check receives may be of any type.
def check(transfer_from: Any, how: Any) -> None:
    """Raises for options that are not valid."""
    if transfer_from is not None and not isinstance(transfer_from, str | os.PathLike):
        raise errors.InvalidOptionError(
            "`transfer_from` must be the directory of a project, its file, or a database URL. "
            f"Received: an object of type {type(transfer_from).__name__}."
        )
    if how not in ("best", "observations"):
        raise errors.InvalidOptionError(
            f"`transfer` must be 'best' or 'observations'. Received: transfer={how!r}."
        )


def transfer(
    oracle: _oracle.StudyOracle,
    where: str | os.PathLike[str],
    how: Transfer,
    define: _own_values.Define,
) -> None:
    """Gives a search what fits from an earlier one; once, however often this is called.

    Args:
        oracle: The oracle of the search.
        where: The directory of the earlier search, its file, or a database URL.
        how: See `Tuner`.
        define: See `Define`.

    Raises:
        StudyError: If there is no search, or if it had another objective.
        StorageUnavailableError: If it cannot be read.
    """
    earlier = _read_only.open_study(os.fspath(where)).record()
    if how == "best":
        _try_again(oracle, earlier, define)
    else:
        _observe(oracle, earlier, define)


def _try_again(
    oracle: _oracle.StudyOracle, earlier: _record.Record, define: _own_values.Define
) -> None:
    best = earlier.best[:_BEST]
    for row in best:
        define(row.values)
    space = oracle.get_space()
    found = [_own_values.fitting(space, row.values) for row in best]
    for values in filter(None, found):
        _own_values.enqueue(oracle.study, values, **{_trials.TRANSFERRED: True})
    if not any(found):
        _warn(earlier, f"none of the {len(found)} best trials has a value in the space")


def _observe(
    oracle: _oracle.StudyOracle, earlier: _record.Record, define: _own_values.Define
) -> None:
    study, space = oracle.study, oracle.get_space()
    mine = oracle.wanted or [oracle.objective_names], oracle.directions
    if (earlier.objectives, earlier.directions) != mine:
        raise errors.StudyError(
            "transfer='observations' needs the objectives of the earlier search: "
            f"{', '.join(earlier.objectives)} ({', '.join(earlier.directions)}). Received: "
            f"{oracle.objective_names} ({', '.join(oracle.directions)}). Use transfer='best'."
        )
    if not space.space:
        raise errors.InvalidOptionError(
            "transfer='observations' needs hyperparameters that are known before the first trial. "
            "Received: none. Pass `hyperparameters`, or use transfer='best'."
        )
    rows = [row for row in earlier.rows if row.scores and row.is_feasible]
    failures = 0
    for row in rows:
        failures += not define(row.values)
        if failures == _MOST_FAILURES:
            break  # The program has no such hyperparameters.
    space = oracle.get_space()
    taken = {t.user_attrs.get(_trials.TRANSFERRED) for t in study.get_trials(deepcopy=False)}
    count = 0
    for row in rows:
        space.values = dict(row.values)
        space.ensure_active_values()
        # A sampler would take a default for a choice of the search.
        is_whole = space.values == {n: row.values[n] for n in space.values if n in row.values}
        params, distributions = _space.parameters_of(space, space.values, {})
        if not is_whole or not _has_all(space, params):
            continue
        count += 1
        name = f"{earlier.place} {earlier.name} {row.trial}"
        if name not in taken and oracle._ledger.is_first(f"transferred {_json.name_of(name)}"):
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.COMPLETE,
                    values=row.scores,
                    params=params,
                    distributions=distributions,
                    user_attrs={_trials.TRANSFERRED: name},
                )
            )
    if count < len(rows):
        _warn(earlier, f"{len(rows) - count} of {len(rows)} trials do not fit into the space")


def _has_all(space: HyperParameters, params: _tuner_types.Values) -> bool:
    """Whether all values that are searched are in range; others have no parameter."""
    searched = [
        hp
        for hp in space.space
        if space._conditions_are_active(hp.conditions) and _space.parameter_of(hp) is not None
    ]
    return len(params) == len(searched)


def _warn(earlier: _record.Record, what: str) -> None:
    warnings.warn(
        f"transfer_from: of the search {earlier.name!r} in {earlier.place}, {what}.", stacklevel=5
    )
