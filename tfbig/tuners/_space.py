"""KerasTuner's hyperparameters as Optuna's parameters, and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

from optuna import distributions

from tfbig.tuners import _hyperparameters as hps
from tfbig.tuners import _json

__all__ = (
    "all_values",
    "combinations",
    "default_values",
    "grid_values",
    "parameters_of",
    "suggested",
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """How a hyperparameter is searched.

    Attributes:
        name: str, its name in the study.
        distribution: `optuna.distributions.BaseDistribution`.
        decode: function, from the parameter's value to the hyperparameter's.
        encode: function, the other way.
    """

    name: str
    distribution: distributions.BaseDistribution
    decode: Callable[[Any], Any]
    encode: Callable[[Any], Any]


def parameter_of(hp, known=None):
    """The `Parameter` of a hyperparameter; None if there is nothing to search.

    Args:
        hp: A hyperparameter of `_hyperparameters`.
        known: dictionary from names to distributions that the study has seen. A name
            whose distribution does not go with this one's is left alone: the parameter
            is then called "name #2", and so on.
    """
    made = _MAKERS[type(hp).__name__](hp)
    if made is None:
        return None
    name, distribution, decode, encode = made
    # The same name may stand under two conditions, with different ranges.
    for condition in hp.conditions:
        values = ", ".join(_json.dumps(v) for v in condition.values)
        name += f" [{condition.name}: {values}]"
    known, unique, number = known or {}, name, 1
    while unique in known and not _go_together(known[unique], distribution):
        number += 1
        unique = f"{name} #{number}"
    return Parameter(unique, distribution, decode, encode)


def _go_together(a, b):
    try:
        distributions.check_distribution_compatibility(a, b)
    except ValueError:
        return False
    return True


def _unchanged(value):
    return value


def _of_choice(hp):
    texts = [_json.dumps(v) for v in hp.values]
    simple = all(v is None or isinstance(v, bool | int | float | str) for v in hp.values)
    # Optuna compares with ==, by which 1, 1.0 and True are one; and has no tuples.
    if simple and len(set(hp.values)) == len(texts):
        return hp.name, distributions.CategoricalDistribution(hp.values), _unchanged, _unchanged
    return hp.name, distributions.CategoricalDistribution(texts), _json.loads, _json.dumps


def _of_boolean(hp):
    return hp.name, distributions.CategoricalDistribution([False, True]), _unchanged, _unchanged


def _of_number(hp):
    kind = type(hp.min_value)
    low, high = hp.min_value, hp.max_value
    is_log = hp.sampling != "linear"
    if hp.step is not None and (is_log or kind is float):
        return _of_steps(hp)
    distribution: distributions.BaseDistribution
    if kind is int:
        step = 1 if is_log else hp.step
        # Optuna warns of a range that steps do not end with.
        high = low + (high - low) // step * step
        distribution = distributions.IntDistribution(low, high, log=is_log, step=step)
    else:
        distribution = distributions.FloatDistribution(low, high, log=is_log)
    if hp.sampling == "reverse_log":

        def mirrored(value):
            # A sum of floats may be rounded over an end.
            return min(max(low + high - value, low), high)

        return f"{hp.name} ({low + high:g} - value)", distribution, mirrored, mirrored
    return hp.name, distribution, _unchanged, _unchanged


def _of_steps(hp):
    """By number of the step: Optuna rounds sums of steps, and has no geometric ones."""
    values = list(hp.values)
    distribution = distributions.IntDistribution(0, len(values) - 1)
    return f"{hp.name} (step)", distribution, values.__getitem__, values.index


def _of_fixed(hp):
    del hp


_MAKERS = {
    hps.Boolean.__name__: _of_boolean,
    hps.Choice.__name__: _of_choice,
    hps.Fixed.__name__: _of_fixed,
    hps.Float.__name__: _of_number,
    hps.Int.__name__: _of_number,
}


def suggested(value_of, hyperparameters, known):
    """Values for all active hyperparameters.

    Args:
        value_of: function of a parameter's name and distribution, that suggests its value.
        hyperparameters: `HyperParameters`.
        known: as for `parameter_of`.

    Returns:
        A dictionary of values by name.
    """
    found = hps.HyperParameters()
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


def parameters_of(hyperparameters, values, known):
    """What the study is told of a trial with these values.

    A value outside of its range, as a default may be, is left out.

    Returns:
        A dictionary from parameters' names to their values, and one to distributions.
    """
    found = hps.HyperParameters()
    found.values = values
    params, by_name = {}, {}
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


def all_values(hp):
    """What a hyperparameter may be; None if that is endless."""
    if isinstance(hp, hps.Float) and hp.step is None:
        return None
    if isinstance(hp, hps.Int) and (hp.step is None or hp.sampling == "linear"):
        return range(hp.min_value, hp.max_value + 1, hp.step or 1)
    return hp.values


def grid_values(hp):
    """What a hyperparameter is in a grid: of an endless range, ten values."""
    return hp.values


def combinations(hyperparameters, values_of):
    """All combinations, one dictionary each, the defaults first.

    Args:
        hyperparameters: `HyperParameters`.
        values_of: `grid_values`, or `all_values` where none is endless.
    """
    values = hps.HyperParameters()

    def rest(index):
        if index == len(hyperparameters.space):
            yield dict(values.values)
            return
        hp = hyperparameters.space[index]
        if hp.name in values.values or not values._conditions_are_active(hp.conditions):
            yield from rest(index + 1)
            return
        for value in _default_first(hp, values_of(hp)):
            values.values[hp.name] = value
            yield from rest(index + 1)
        del values.values[hp.name]

    yield from rest(0)


def _default_first(hp, values):
    yield hp.default
    default = _json.dumps(hp.default)
    for value in values:
        if _json.dumps(value) != default:
            yield value


def default_values(hyperparameters):
    """The values of a trial with all defaults."""
    return next(combinations(hyperparameters, grid_values))
