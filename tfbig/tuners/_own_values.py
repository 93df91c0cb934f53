"""Values that the user chooses: in a `populate_space` of their own, or enqueued."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TypeAlias

import optuna
from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import FrozenTrial, TrialState

from tfbig import errors
from tfbig.tuners import _json, _proposals, _queue, _space, _study, _trials, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = (
    "Define",
    "OwnValuesQueue",
    "check",
    "drop_unused",
    "enqueue",
    "enqueued",
    "fitting",
    "is_enqueued",
)

# Has the oracle know the hyperparameters that a program has with some values; returns whether it
# knows all of their names now.
Define: TypeAlias = Callable[[_tuner_types.Values], bool]

_STATUS = kt_trial.TrialStatus


class OwnValuesQueue(_queue.TrialQueue):
    """Asks a user's `populate_space` for each new trial; it alone knows when there are no more.

    Args:
        trials: See `TrialQueue`.
        proposals: See `TrialQueue`.
        populated: Returns the status and values of `populate_space` for the trial of an index.
        hyperparameters: See `TrialQueue`.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        proposals: _proposals.Proposals,
        populated: Callable[[int], tuple[str, _tuner_types.Values]],
        hyperparameters: Callable[[], HyperParameters],
    ) -> None:
        super().__init__(trials, proposals, lambda index: populated(index)[1], hyperparameters)
        self._populated = populated
        self._is_stopped = False

    def take_new(self, max_trials: int | None) -> int | None:
        return None if self._is_stopped else self._ledger.take_new(max_trials)

    def begin(self, index: int) -> FrozenTrial | None:
        # A trial that has begun: its process died, or it raised.
        frozen = self._trials.by_index().get(index)
        if frozen is not None and _trials.VALUES in frozen.user_attrs:
            return frozen
        status, values = self._populated(index)
        if status == _STATUS.RUNNING:
            return self._trials.store(self._trials.of(index), self._hyperparameters(), values)
        if status == _STATUS.IDLE:
            # It is the next trial that any process takes.
            self._ledger.release(index)
        else:
            self._is_stopped = True
            self._trials.end(index, TrialState.FAIL, {_trials.WHY: _trials.VOID})
        return None


def check(hyperparameters: HyperParameters, values: Mapping[str, _tuner_types.Value]) -> None:
    """Raises for values that a trial could not have, or only if the sampler chooses others to suit.

    Args:
        hyperparameters: Those known so far. Without any, the trials define the space.
        values: By name.
    """
    given = HyperParameters()
    given.values = {name: _json.canonical(value) for name, value in values.items()}
    for name, value in given.values.items() if hyperparameters.space else ():
        kinds = [hp for hp in hyperparameters.space if hp.name == name]
        if not kinds:
            known = ", ".join(dict.fromkeys(hp.name for hp in hyperparameters.space))
            raise errors.InvalidOptionError(
                f"`values` must have names of hyperparameters ({known}). Received: {name!r}."
            )
        fitting = [hp for hp in kinds if may_be(hp, value)]
        if not fitting:
            ranges = " or ".join(_space.range_of(hp) for hp in kinds)
            raise errors.InvalidOptionError(
                f"The value of {name!r} must be in its range ({ranges}). Received: {value!r}."
            )
        if not any(given._conditions_are_active(hp.conditions) for hp in fitting):
            needed = " or ".join(_space.condition_of(hp) for hp in fitting)
            raise errors.InvalidOptionError(
                f"A value {value!r} of {name!r} needs {needed} in `values`. Received: "
                f"{given.values!r}."
            )


def enqueue(
    study: optuna.Study, values: Mapping[str, _tuner_types.Value], **attributes: bool
) -> bool:
    """Has a trial try some values, before others; once, however often this is called.

    Args:
        study: The study.
        values: By name; the sampler chooses what is left out.
        **attributes: More attributes of the study's trial.

    Returns:
        Whether the values were not enqueued before.
    """
    if is_enqueued(study, values):
        return False
    given = _json.dumps(dict(values))
    with _study.quiet():
        study.enqueue_trial({}, user_attrs={_trials.GIVEN: given, **attributes})
    return True


def is_enqueued(study: optuna.Study, values: Mapping[str, _tuner_types.Value]) -> bool:
    """Whether some values were enqueued before, also if they were tried."""
    given = _json.dumps(dict(values))
    return any(t.user_attrs.get(_trials.GIVEN) == given for t in study.get_trials(deepcopy=False))


def drop_unused(trial_id: str, frozen: FrozenTrial, hyperparameters: HyperParameters) -> None:
    """Removes enqueued values that a trial had no hyperparameters for, and warns of them.

    Args:
        trial_id: The id of the trial.
        frozen: That of the study.
        hyperparameters: What the trial asked for, with its values.
    """
    values = hyperparameters.values
    used = {hp.name for hp in hyperparameters.space if hyperparameters.is_active(hp)}
    given: _tuner_types.Values = _json.loads(frozen.user_attrs.get(_trials.GIVEN, "{}"))
    # A name from the study that no hyperparameter has is still among the values.
    fixed: _tuner_types.Values = frozen.system_attrs.get(_trials.ENQUEUED, {})
    given |= {name: value for name, value in fixed.items() if name in values}
    unused = {name: value for name, value in given.items() if name not in used}
    for name in unused:
        values.pop(name, None)
    if unused and not frozen.user_attrs.get(_trials.TRANSFERRED):
        warnings.warn(
            f"Trial {trial_id} was to try {given}, but did not use {unused}: with {values}, it has "
            "no such hyperparameters. Enqueue with each value those that it depends on.",
            stacklevel=4,
        )


def fitting(
    hyperparameters: HyperParameters, values: Mapping[str, _tuner_types.Value]
) -> _tuner_types.Values:
    """The values that hyperparameters of the same name may have; all if the space is not known."""
    if not hyperparameters.space:
        return dict(values)
    found = HyperParameters()
    for hp in hyperparameters.space:
        is_active = found._conditions_are_active(hp.conditions)
        if hp.name in values and is_active and may_be(hp, values[hp.name]):
            found.values[hp.name] = _json.canonical(values[hp.name])
    return found.values


def may_be(hp: _tuner_types.Hyperparameter, value: _tuner_types.Value) -> bool:
    """Whether a hyperparameter may have a value."""
    value = _json.canonical(value)
    allowed = _space.all_values(hp)
    if isinstance(allowed, range):
        return type(value) is int and value in allowed
    if allowed is not None:
        return _json.dumps(value) in map(_json.dumps, allowed)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return bool(is_number and math.isfinite(value) and hp.min_value <= value <= hp.max_value)


def enqueued(
    trials: _trials.Trials,
    proposals: _proposals.Proposals,
    hyperparameters: HyperParameters,
    index: int,
    seed: int,
) -> _tuner_types.Values | None:
    """Values for a trial that was enqueued; None if there are none.

    Args:
        trials: The trials of the search.
        proposals: Chooses the values of hyperparameters that were not given.
        hyperparameters: Those known so far.
        index: The index of the trial.
        seed: Of the suggestion.
    """
    frozen = trials.with_enqueued(index)
    if frozen is None:
        return None
    fixed: _tuner_types.Values = dict(frozen.system_attrs[_trials.ENQUEUED])
    given: _tuner_types.Values = _json.loads(frozen.user_attrs.get(_trials.GIVEN, "{}"))
    known = trials.known_distributions()
    for hp in hyperparameters.space:
        # A user of Optuna may have taken the name from the study.
        parameter = _space.parameter_of(hp, known)
        if parameter is not None and parameter.name in fixed and hp.name not in fixed:
            given.setdefault(hp.name, parameter.decode(fixed.pop(parameter.name)))
    return proposals.completed(index, seed, fixed | given)
