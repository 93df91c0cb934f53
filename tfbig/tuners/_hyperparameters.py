"""KerasTuner's `HyperParameters`, without what it refuses or gets wrong.

A choice may be of any JSON values, also None and of mixed types; a stepped range has both
its ends; values keep their type.
"""

import contextlib
import copy
import decimal
from typing import Any

import keras_tuner
from keras_tuner.engine import hyperparameters as kt
from keras_tuner.src.engine import conditions as kt_conditions

from tfbig import errors
from tfbig.tuners import _json

__all__ = ("HyperParameters",)


def _is_among(value, values):
    # 1, 1.0 and True are equal in Python.
    text = _json.dumps(value)
    return any(text == _json.dumps(v) for v in values)


class Parent(kt_conditions.Parent):
    """Holds where a hyperparameter has one of some values, of any type."""

    def __init__(self, name, values):
        self.name = name
        self.values = [_json.canonical(v) for v in _listed(values)]

    def is_active(self, values):
        return self.name in values and _is_among(values[self.name], self.values)

    def __eq__(self, other):
        return (
            isinstance(other, kt_conditions.Parent)
            and other.name == self.name
            and _json.dumps(list(other.values)) == _json.dumps(self.values)
        )

    __hash__ = None  # type: ignore[assignment]


def _listed(values):
    return list(values) if isinstance(values, list | tuple) else [values]


def _conditions(conditions):
    """Conditions of this module, from those of KerasTuner or from their configs."""
    found = []
    for condition in conditions or ():
        config = condition["config"] if isinstance(condition, dict) else condition.get_config()
        found.append(Parent(config["name"], config["values"]))
    return found


class _HyperParameter(kt.HyperParameter):
    """What the kinds have in common: conditions of this module."""

    @classmethod
    def from_config(cls, config):
        return cls(**config | {"conditions": _conditions(config.get("conditions"))})

    def get_config(self):
        conditions = [
            {"class_name": "Parent", "config": copy.deepcopy(c.get_config())}
            for c in self.conditions
        ]
        return super().get_config() | {"conditions": conditions}


class _Numerical(_HyperParameter):
    """Steps in decimal numbers, so that both ends of 0, 0.1, ... 1 occur as they are written."""

    min_value: Any
    max_value: Any
    step: Any
    sampling: str

    def __init__(self, name, *args, **kwargs):
        super().__init__(name, *args, **kwargs)
        self.step = _json.canonical(self.step)
        if self.step is not None and self.step <= 0:
            raise errors.InvalidOptionError(
                f"`step` of {name!r} must be positive. Received: step={self.step!r}."
            )

    def _get_n_values(self):
        low, high, step = (decimal.Decimal(repr(v)) for v in self._range)
        if self.sampling == "linear":
            return int((high - low) // step) + 1
        count, value = 1, low * step
        while value <= high:
            count, value = count + 1, value * step
        return count

    def _get_value_by_index(self, index):
        low, high, step = (decimal.Decimal(repr(v)) for v in self._range)
        if self.sampling == "linear":
            value = low + index * step
        else:
            value = low * step**index
            if self.sampling == "reverse_log":
                value = high + low - value
        return type(self.min_value)(value)

    @property
    def _range(self):
        return self.min_value, self.max_value, self.step

    @property
    def values(self):
        if self.step is None:
            # As KerasTuner does, ten of them; in order, each once.
            return tuple(sorted({self.prob_to_value(i * 0.1 + 0.05) for i in range(10)}))
        return tuple(self._get_value_by_index(i) for i in range(self._get_n_values()))


class Float(_Numerical, kt.Float):
    pass


class Int(_Numerical, kt.Int):
    def prob_to_value(self, prob):
        # The logarithm of the end may be rounded up.
        return min(super().prob_to_value(prob), self.max_value)


class Boolean(_HyperParameter, kt.Boolean):
    def __init__(self, name, default=False, **kwargs):
        if not isinstance(default, bool):
            raise errors.InvalidOptionError(
                f"`default` of {name!r} must be a bool. Received: default={default!r}."
            )
        super().__init__(name, default=default, **kwargs)


class Fixed(_HyperParameter, kt.Fixed):
    def __init__(self, name, value, **kwargs):
        super().__init__(name, 0, **kwargs)
        self.value = _json.canonical(value)


class Choice(_HyperParameter, kt.Choice):
    """One of some JSON values."""

    def __init__(self, name, values, ordered=None, default=None, **kwargs):
        kt.HyperParameter.__init__(self, name=name, default=default, **kwargs)
        if isinstance(values, str | dict) or not values:
            raise errors.InvalidOptionError(
                f"`values` of {name!r} must be a list of one or more values. Received: "
                f"values={values!r}."
            )
        self._values: list[Any] = []
        for value in map(_json.canonical, values):
            if not _is_among(value, self._values):
                self._values.append(value)
        if default is not None and not _is_among(default, self._values):
            raise errors.InvalidOptionError(
                f"`default` of {name!r} must be one of its values. Received: "
                f"values={self._values!r}, default={default!r}."
            )
        is_numeric = all(type(v) in (int, float) for v in self._values)
        if ordered and not is_numeric:
            raise errors.InvalidOptionError(
                f"`ordered` of {name!r} must be False where the values are not all numbers. "
                f"Received: values={self._values!r}."
            )
        self.ordered = is_numeric if ordered is None else bool(ordered)

    @property
    def default(self):
        if self._default is not None or None in self._values:
            return self._default
        return self._values[0]

    def value_to_prob(self, value):
        index = [_json.dumps(v) for v in self._values].index(_json.dumps(value))
        return (index + 0.5) / len(self._values)

    def get_config(self):
        return super().get_config() | {"default": self._default}


KINDS = {c.__name__: c for c in (Boolean, Choice, Fixed, Float, Int)}


def _own(hyperparameter):
    """A copy of a hyperparameter, of a class of this module."""
    kind = KINDS.get(type(hyperparameter).__name__)
    if kind is None:
        raise errors.InvalidOptionError(
            f"A hyperparameter must be one of {', '.join(KINDS)}. Received: {hyperparameter!r}."
        )
    return kind.from_config(hyperparameter.get_config())


class HyperParameters(keras_tuner.HyperParameters):
    """A search space and the values of a trial.

    As in KerasTuner; `Choice` and `Fixed` take any JSON values and tuples of them.

    Attributes:
        space: list of hyperparameters.
        values: dictionary, the values of those that are active.
    """

    @contextlib.contextmanager
    def conditional_scope(self, parent_name, parent_values):
        name = self._get_name(parent_name)
        if name not in self._hps:
            raise errors.InvalidOptionError(
                f"`parent_name` must name a hyperparameter that was defined. Received: {name!r}."
            )
        condition = Parent(name, parent_values)
        self._conditions.append(condition)
        is_active = condition.is_active(self.values)
        scopes = self.active_scopes if is_active else self.inactive_scopes
        scopes.append(list(self._conditions))
        try:
            yield
        finally:
            self._conditions.pop()

    def _retrieve(self, hp):
        hp = _own(hp)
        is_known = self._exists(hp.name, hp.conditions) and self.is_active(hp)
        if is_known and hp.name not in self.values:
            # The trial is older than the hyperparameter.
            self.values[hp.name] = hp.default
        return super()._retrieve(hp)

    def _register(self, hyperparameter, overwrite=False):
        return super()._register(_own(hyperparameter), overwrite)

    def Choice(  # noqa: N802
        self, name, values, ordered=None, default=None, parent_name=None, parent_values=None
    ):
        """One of `values`: a list of None, bool, int, float, str, or tuples and lists of these."""
        with self._maybe_conditional_scope(parent_name, parent_values):
            return self._retrieve(
                Choice(self._get_name(name), values, ordered, default, conditions=self._conditions)
            )

    def Fixed(self, name, value, parent_name=None, parent_values=None):  # noqa: N802
        """A value that is not searched."""
        with self._maybe_conditional_scope(parent_name, parent_values):
            return self._retrieve(Fixed(self._get_name(name), value, conditions=self._conditions))

    @classmethod
    def from_config(cls, config):
        """The object that `get_config` was called on."""
        found = cls()
        for entry in config["space"]:
            hp = KINDS[entry["class_name"]].from_config(entry["config"])
            found._hps[hp.name].append(hp)
            found._space.append(hp)
        found.values = dict(config["values"])
        return found

    @classmethod
    def of(cls, hyperparameters):
        """A copy of `keras_tuner.HyperParameters`, of this class."""
        return cls.from_config(hyperparameters.get_config())

    def copy(self):
        """A copy, with the same values."""
        return type(self).of(self)

    def ensure_active_values(self):
        """Gives what is active and has no value its default; removes what is not active."""
        for hp in self.space:
            if not self.is_active(hp):
                if not self.is_active(hp.name):
                    self.values.pop(hp.name, None)
            elif hp.name not in self.values:
                self.values[hp.name] = hp.default
