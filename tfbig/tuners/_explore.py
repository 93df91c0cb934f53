"""Values near others: how a population explores."""

from __future__ import annotations

import bisect
from collections.abc import Container, Sequence

import numpy as np

from tfbig.tuners import _hyperparameters as hps
from tfbig.tuners import _json, _own_values, _space, _tuner_types

__all__ = ("explored", "nearby")

# A number is multiplied by one of these.
FACTORS = (0.8, 1.2)


def explored(
    hyperparameters: hps.HyperParameters,
    values: _tuner_types.Values,
    names: Container[str] | None,
    resample_probability: float,
    rng: np.random.Generator,
) -> _tuner_types.Values:
    """Values in which each number is a little smaller or larger, and some are drawn anew.

    Args:
        hyperparameters: The space.
        values: The values to begin with, by name.
        names: The hyperparameters that may change; None for all.
        resample_probability: How likely each of them is drawn anew.
        rng: Decides.
    """
    found, before = hyperparameters.copy(), hyperparameters.copy()
    found.values, before.values = dict(values), values
    for hp in hyperparameters.space:
        # The value is that of another one of its name, if what both depend on has changed.
        is_free = names is None or hp.name in names or not before.is_active(hp)
        if not is_free or hp.name not in values or not found._conditions_are_active(hp.conditions):
            continue
        # Drawn in any case, so that one hyperparameter more does not change what others become.
        is_anew, seed, is_larger = rng.random(), int(rng.integers(2**31)), bool(rng.integers(2))
        if is_anew < resample_probability or not _own_values.may_be(hp, values[hp.name]):
            found.values[hp.name] = hp.random_sample(seed)
        else:
            found.values[hp.name] = nearby(hp, values[hp.name], is_larger)
    found.ensure_active_values()
    return found.values


def nearby(
    hp: _tuner_types.Hyperparameter, value: _tuner_types.Value, is_larger: bool
) -> _tuner_types.Value:
    """The value times a factor, within the range; a neighbour of it, if there are steps.

    Values without order stay as they are.
    """
    if isinstance(hp, hps.Int | hps.Float):
        all_values = _space.all_values(hp)
        target = value * FACTORS[is_larger]
        if all_values is None:
            return min(max(target, hp.min_value), hp.max_value)
        # Those of a reversed range fall.
        steps = all_values if isinstance(all_values, range) else sorted(all_values)
        return _neighbour(steps, value, target, is_larger)
    if isinstance(hp, hps.Choice) and getattr(hp, "ordered", False):
        ordered = sorted(hp.values)
        position = [_json.dumps(v) for v in ordered].index(_json.dumps(value))
        return ordered[min(max(position + (1 if is_larger else -1), 0), len(ordered) - 1)]
    return value


def _neighbour(
    values: Sequence[_tuner_types.Value],
    value: _tuner_types.Value,
    target: _tuner_types.Value,
    is_larger: bool,
) -> _tuner_types.Value:
    """The value nearest to a target, but another one in its direction if there is one."""
    position = bisect.bisect_left(values, value)
    after = bisect.bisect_left(values, target)
    around = values[max(after - 1, 0) : after + 1]
    nearest = min(around, key=lambda v: abs(v - target)) if around else values[-1]
    if nearest != value and (nearest > value) == is_larger:
        return nearest
    return values[min(max(position + (1 if is_larger else -1), 0), len(values) - 1)]
