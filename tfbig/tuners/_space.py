"""KerasTuner's hyperparameters as Optuna's parameters, and back."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from optuna import distributions

from tfbig.tuners import _hyperparameters as hps
from tfbig.tuners import _json, _tuner_types

__all__ = (
    "all_values",
    "combinations",
    "condition_of",
    "contains",
    "default_values",
    "grid_values",
    "parameters_of",
    "range_of",
    "suggested",
)


# From a value of a parameter to one of a hyperparameter, or back.
_Convert: TypeAlias = Callable[[_tuner_types.Value], _tuner_types.Value]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """How a hyperparameter is searched.

    Attributes:
        name: The name of the parameter in the study.
        distribution: What the parameter may be.
        decode: Converts the parameter's value to the hyperparameter's.
        encode: Converts it back.
    """

    name: str
    distribution: distributions.BaseDistribution
    decode: _Convert
    encode: _Convert


def parameter_of(
    hp: _tuner_types.Hyperparameter,
    known: Mapping[str, distributions.BaseDistribution] | None = None,
) -> Parameter | None:
    """The parameter of a hyperparameter; None if there is nothing to search.

    Args:
        hp: One of `_hyperparameters`.
        known: Distributions in the study, by name. If the distribution under this parameter's name
            is not compatible, the parameter is called "name #2", and so on.
    """
    made = _MAKERS[type(hp).__name__](hp)
    if made is None:
        return None
    name, distribution = made.name, made.distribution
    # The same name may stand under two conditions, with different ranges.
    for condition in hp.conditions:
        values = ", ".join(_json.dumps(v) for v in condition.values)
        name += f" [{condition.name}: {values}]"
    known, unique, number = known or {}, name, 1
    while unique in known and not _are_compatible(known[unique], distribution):
        number += 1
        unique = f"{name} #{number}"
    return dataclasses.replace(made, name=unique)


def _are_compatible(a: distributions.BaseDistribution, b: distributions.BaseDistribution) -> bool:
    try:
        distributions.check_distribution_compatibility(a, b)
    except ValueError:
        return False
    return True


def _unchanged(value: _tuner_types.Value) -> _tuner_types.Value:
    return value


def _of_choice(hp: _tuner_types.Hyperparameter) -> Parameter:
    texts = [_json.dumps(v) for v in hp.values]
    if getattr(hp, "ordered", False) and len(texts) > 2:
        return _of_ordered(hp)
    simple = all(v is None or isinstance(v, bool | int | float | str) for v in hp.values)
    # Optuna compares with ==, so 1, 1.0 and True are the same to it; and it has no tuples.
    if simple and len(set(hp.values)) == len(texts):
        kinds = distributions.CategoricalDistribution(hp.values)
        return Parameter(hp.name, kinds, _unchanged, _unchanged)
    kinds = distributions.CategoricalDistribution(texts)
    return Parameter(hp.name, kinds, _json.loads, _json.dumps)


# The longest list of values in the name of a parameter; databases limit names.
_LONGEST_NAME = 100


def _of_ordered(hp: _tuner_types.Hyperparameter) -> Parameter:
    """Searches the rank of a number, so that a sampler knows which numbers are neighbours."""
    values = sorted(hp.values)
    texts = [_json.dumps(v) for v in values]
    # Of other values, the same index would mean something else.
    listed = ", ".join(texts)
    if len(listed) > _LONGEST_NAME:
        listed = f"{len(texts)} values, {hashlib.sha256(listed.encode()).hexdigest()[:12]}"
    return Parameter(
        f"{hp.name} (index in {listed})",
        distributions.IntDistribution(0, len(values) - 1),
        values.__getitem__,
        lambda value: texts.index(_json.dumps(value)),
    )


def _of_boolean(hp: _tuner_types.Hyperparameter) -> Parameter:
    kinds = distributions.CategoricalDistribution([False, True])
    return Parameter(hp.name, kinds, _unchanged, _unchanged)


def _of_number(hp: _tuner_types.Hyperparameter) -> Parameter:
    kind = type(hp.min_value)
    low, high = hp.min_value, hp.max_value
    is_log = hp.sampling != "linear"
    if hp.step is not None and (is_log or kind is float):
        return _of_steps(hp)
    distribution: distributions.BaseDistribution
    if kind is int:
        step = 1 if is_log else hp.step
        # Optuna warns if the last step does not reach the end of the range.
        high = low + (high - low) // step * step
        distribution = distributions.IntDistribution(low, high, log=is_log, step=step)
    else:
        distribution = distributions.FloatDistribution(low, high, log=is_log)
    if hp.sampling == "reverse_log":

        def mirrored(value: _tuner_types.Value) -> _tuner_types.Value:
            # Rounding may take a sum of floats out of the range.
            return min(max(low + high - value, low), high)

        return Parameter(f"{hp.name} ({low + high:g} - value)", distribution, mirrored, mirrored)
    return Parameter(hp.name, distribution, _unchanged, _unchanged)


def _of_steps(hp: _tuner_types.Hyperparameter) -> Parameter:
    """Searches the index of a step: Optuna rounds sums of steps, and has no geometric steps."""
    values = list(hp.values)
    distribution = distributions.IntDistribution(0, len(values) - 1)
    return Parameter(f"{hp.name} (step)", distribution, values.__getitem__, values.index)


def _of_fixed(hp: _tuner_types.Hyperparameter) -> None:
    del hp


_MAKERS: dict[str, Callable[[_tuner_types.Hyperparameter], Parameter | None]] = {
    hps.Boolean.__name__: _of_boolean,
    hps.Choice.__name__: _of_choice,
    hps.Fixed.__name__: _of_fixed,
    hps.Float.__name__: _of_number,
    hps.Int.__name__: _of_number,
}


def suggested(
    value_of: Callable[[str, distributions.BaseDistribution], _tuner_types.Value],
    hyperparameters: hps.HyperParameters,
    known: Mapping[str, distributions.BaseDistribution],
    given: _tuner_types.Values | None = None,
) -> _tuner_types.Values:
    """Values for all active hyperparameters.

    Args:
        value_of: Suggests the value of a parameter, by its name and distribution.
        hyperparameters: The space.
        known: As for `parameter_of`.
        given: Values by name that are not suggested.
    """
    found = hps.HyperParameters()
    found.values = dict(given or {})
    for hp in hyperparameters.space:
        if hp.name in found.values or not found._conditions_are_active(hp.conditions):
            continue
        parameter = parameter_of(hp, known)
        if parameter is None:
            found.values[hp.name] = hp.default
        else:
            value = value_of(parameter.name, parameter.distribution)
            found.values[hp.name] = parameter.decode(value)
    return found.values


def parameters_of(
    hyperparameters: hps.HyperParameters,
    values: _tuner_types.Values,
    known: Mapping[str, distributions.BaseDistribution],
) -> tuple[_tuner_types.Values, dict[str, distributions.BaseDistribution]]:
    """What the study stores of a trial with these values.

    Values out of range, which defaults may be, are left out.

    Returns:
        The values and the distributions of the parameters, by name.
    """
    found = hps.HyperParameters()
    found.values = values
    params: _tuner_types.Values = {}
    by_name: dict[str, distributions.BaseDistribution] = {}
    for hp in hyperparameters.space:
        if hp.name not in values or not found._conditions_are_active(hp.conditions):
            continue
        parameter = parameter_of(hp, known)
        if parameter is None:
            continue
        d = parameter.distribution
        try:
            value = parameter.encode(values[hp.name])
            is_inside = d._contains(d.to_internal_repr(value))
        except ValueError:
            continue
        if is_inside:
            params[parameter.name], by_name[parameter.name] = value, d
    return params, by_name


def all_values(hp: _tuner_types.Hyperparameter) -> Iterable[_tuner_types.Value] | None:
    """All values that a hyperparameter may have; None if there are infinitely many."""
    if isinstance(hp, hps.Float) and hp.step is None:
        return None
    if isinstance(hp, hps.Int) and (hp.step is None or hp.sampling == "linear"):
        return range(hp.min_value, hp.max_value + 1, hp.step or 1)
    values: Iterable[_tuner_types.Value] = hp.values
    return values


def grid_values(hp: _tuner_types.Hyperparameter) -> Iterable[_tuner_types.Value]:
    """The values of a hyperparameter in a grid; ten if there are infinitely many."""
    values: Iterable[_tuner_types.Value] = hp.values
    return values


def combinations(
    hyperparameters: hps.HyperParameters,
    values_of: Callable[[_tuner_types.Hyperparameter], Iterable[_tuner_types.Value] | None],
    given: _tuner_types.Values | None = None,
) -> Iterator[_tuner_types.Values]:
    """All combinations of values, the defaults first.

    Args:
        hyperparameters: The space.
        values_of: `grid_values`; or `all_values`, if it is None for no hyperparameter.
        given: Values by name that all combinations have.
    """
    values = hps.HyperParameters()
    values.values = dict(given or {})

    def rest(index: int) -> Iterator[_tuner_types.Values]:
        if index == len(hyperparameters.space):
            yield dict(values.values)
            return
        hp = hyperparameters.space[index]
        if hp.name in values.values or not values._conditions_are_active(hp.conditions):
            yield from rest(index + 1)
            return
        for value in _default_first(hp, values_of(hp) or ()):
            values.values[hp.name] = value
            yield from rest(index + 1)
        del values.values[hp.name]

    yield from rest(0)


def _default_first(
    hp: _tuner_types.Hyperparameter, values: Iterable[_tuner_types.Value]
) -> Iterator[_tuner_types.Value]:
    yield hp.default
    default = _json.dumps(hp.default)
    for value in values:
        if _json.dumps(value) != default:
            yield value


def default_values(hyperparameters: hps.HyperParameters) -> _tuner_types.Values:
    """The defaults of all active hyperparameters."""
    return next(combinations(hyperparameters, grid_values))


def range_of(hp: _tuner_types.Hyperparameter) -> str:
    """What a hyperparameter may be, in words that are the same for the same range."""
    if isinstance(hp, hps.Int | hps.Float):
        step = f", step {hp.step!r}" if _is_stepped(hp) else ""
        scale = "" if hp.sampling == "linear" else f", {hp.sampling}"
        return f"{hp.min_value!r} to {hp.max_value!r}{step}{scale}"
    if isinstance(hp, hps.Fixed):
        return _shown(hp.value)
    return ", ".join(map(_shown, sorted(hp.values, key=_json.dumps)))


def _shown(value: _tuner_types.Value) -> str:
    # What is equal as JSON is shown alike, whatever the order of the keys of dictionaries.
    return repr(_json.loads(_json.dumps(value)))


def condition_of(hp: _tuner_types.Hyperparameter) -> str:
    """What the condition of a hyperparameter demands, as `name=value`."""
    return " and ".join(f"{c.name}={' or '.join(map(_shown, c.values))}" for c in hp.conditions)


def _is_stepped(hp: _tuner_types.Hyperparameter) -> bool:
    is_by_one = isinstance(hp, hps.Int) and hp.sampling == "linear" and hp.step == 1
    return hp.step is not None and not is_by_one


def contains(hp: _tuner_types.Hyperparameter, other: _tuner_types.Hyperparameter) -> bool:
    """Whether a hyperparameter may have all values that another of its kind may have."""
    if isinstance(hp, hps.Int | hps.Float):
        is_alike = (hp.step, hp.sampling) == (other.step, other.sampling)
        if not is_alike or not hp.min_value <= other.min_value <= other.max_value <= hp.max_value:
            return False
        return not _is_stepped(hp) or set(other.values) <= set(hp.values)
    if isinstance(hp, hps.Fixed):
        return range_of(hp) == range_of(other)
    return set(map(_json.dumps, other.values)) <= set(map(_json.dumps, hp.values))
