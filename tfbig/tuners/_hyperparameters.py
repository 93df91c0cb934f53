"""KerasTuner's `HyperParameters`, without its restrictions and faults.

A choice takes any JSON values, including None and mixed types; a stepped range includes both ends;
values keep their type.
"""

import contextlib
import copy
import decimal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import keras_tuner
from keras_tuner.engine import hyperparameters as kt
from keras_tuner.src.engine import conditions as kt_conditions

from tfbig import _types, errors
from tfbig.tuners import _json, _tuner_types

__all__ = ("HyperParameters",)


def _is_among(value: _tuner_types.Value, values: Iterable[_tuner_types.Value]) -> bool:
    # 1, 1.0 and True are equal in Python.
    text = _json.dumps(value)
    return any(text == _json.dumps(v) for v in values)


class Parent(kt_conditions.Parent):  # type: ignore[misc]  # KerasTuner has no types.
    """True if a hyperparameter has one of some values, of any type."""

    def __init__(self, name: str, values: _tuner_types.Value) -> None:
        self.name = name
        self.values = [_json.canonical(v) for v in _listed(values)]

    def is_active(self, values: _tuner_types.Values) -> bool:
        return self.name in values and _is_among(values[self.name], self.values)

    def __eq__(self, other: object) -> bool:
        return bool(
            isinstance(other, kt_conditions.Parent)
            and other.name == self.name
            and _json.dumps(list(other.values)) == _json.dumps(self.values)
        )

    __hash__ = None  # type: ignore[assignment]


def _listed(values: _tuner_types.Value) -> list[_tuner_types.Value]:
    return list(values) if isinstance(values, list | tuple) else [values]


# KerasTuner's conditions have no types; their configs are dictionaries.
def _conditions(conditions: Iterable[Any] | None) -> list[Parent]:
    """Conditions of this module, from KerasTuner's or from their configs."""
    found = []
    for condition in conditions or ():
        config = condition["config"] if isinstance(condition, dict) else condition.get_config()
        found.append(Parent(config["name"], config["values"]))
    return found


class _HyperParameter(kt.HyperParameter):  # type: ignore[misc]  # KerasTuner has no types.
    """What all kinds have in common: conditions of this module."""

    @classmethod
    def from_config(cls, config: _types.Config) -> Self:
        return cls(**config | {"conditions": _conditions(config.get("conditions"))})

    def get_config(self) -> _types.Config:
        conditions = [
            {"class_name": "Parent", "config": copy.deepcopy(c.get_config())}
            for c in self.conditions
        ]
        config: _types.Config = super().get_config()
        return config | {"conditions": conditions}


class _Numerical(_HyperParameter):
    """Computes steps in decimal, so that 0, 0.1, ... 1 has both ends exactly."""

    min_value: _tuner_types.Value
    max_value: _tuner_types.Value
    step: _tuner_types.Value
    sampling: str

    # KerasTuner's, which differ between Int and Float.
    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(name, *args, **kwargs)
        self.step = _json.canonical(self.step)
        if self.step is not None and self.step <= 0:
            raise errors.InvalidOptionError(
                f"`step` of {name!r} must be positive. Received: step={self.step!r}."
            )

    def _get_n_values(self) -> int:
        low, high, step = (decimal.Decimal(repr(v)) for v in self._range)
        if self.sampling == "linear":
            return int((high - low) // step) + 1
        count, value = 1, low * step
        while value <= high:
            count, value = count + 1, value * step
        return count

    def _get_value_by_index(self, index: int) -> _tuner_types.Value:
        low, high, step = (decimal.Decimal(repr(v)) for v in self._range)
        if self.sampling == "linear":
            value = low + index * step
        else:
            value = low * step**index
            if self.sampling == "reverse_log":
                value = high + low - value
        return type(self.min_value)(value)

    @property
    def _range(self) -> tuple[_tuner_types.Value, _tuner_types.Value, _tuner_types.Value]:
        return self.min_value, self.max_value, self.step

    @property
    def values(self) -> tuple[_tuner_types.Value, ...]:
        if self.step is None:
            # Ten, as in KerasTuner; sorted, without duplicates.
            return tuple(sorted({self.prob_to_value(i * 0.1 + 0.05) for i in range(10)}))
        return tuple(self._get_value_by_index(i) for i in range(self._get_n_values()))


class Float(_Numerical, kt.Float):  # type: ignore[misc]  # KerasTuner has no types.
    pass


class Int(_Numerical, kt.Int):  # type: ignore[misc]  # KerasTuner has no types.
    def prob_to_value(self, prob: float) -> int:
        # Rounding may exceed the end of a logarithmic range.
        value: int = min(super().prob_to_value(prob), self.max_value)
        return value


class Boolean(_HyperParameter, kt.Boolean):  # type: ignore[misc]  # KerasTuner has no types.
    # `kwargs` are KerasTuner's.
    def __init__(self, name: str, default: bool = False, **kwargs: Any) -> None:
        if not isinstance(default, bool):
            raise errors.InvalidOptionError(
                f"`default` of {name!r} must be a Python boolean. Received: default={default!r}."
            )
        super().__init__(name, default=default, **kwargs)


class Fixed(_HyperParameter, kt.Fixed):  # type: ignore[misc]  # KerasTuner has no types.
    # `kwargs` are KerasTuner's.
    def __init__(self, name: str, value: _tuner_types.Value, **kwargs: Any) -> None:
        super().__init__(name, 0, **kwargs)
        self.value = _json.canonical(value)


class Choice(_HyperParameter, kt.Choice):  # type: ignore[misc]  # KerasTuner has no types.
    """One of some JSON values."""

    # `kwargs` are KerasTuner's.
    def __init__(
        self,
        name: str,
        values: Sequence[_tuner_types.Value],
        ordered: bool | None = None,
        default: _tuner_types.Value = None,
        **kwargs: Any,
    ) -> None:
        kt.HyperParameter.__init__(self, name=name, default=default, **kwargs)
        if isinstance(values, str | dict) or not values:
            raise errors.InvalidOptionError(
                f"`values` of {name!r} must be a list of at least one value. Received: "
                f"values={values!r}."
            )
        self._values: list[_tuner_types.Value] = []
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
                f"`ordered` of {name!r} must be `False` unless all values are numbers. "
                f"Received: values={self._values!r}."
            )
        self.ordered = is_numeric if ordered is None else bool(ordered)

    @property
    def default(self) -> _tuner_types.Value:
        if self._default is not None or None in self._values:
            return self._default
        return self._values[0]

    def value_to_prob(self, value: _tuner_types.Value) -> float:
        index = [_json.dumps(v) for v in self._values].index(_json.dumps(value))
        return (index + 0.5) / len(self._values)

    def get_config(self) -> _types.Config:
        return super().get_config() | {"default": self._default}


KINDS: dict[str, type[_HyperParameter]] = {
    c.__name__: c for c in (Boolean, Choice, Fixed, Float, Int)
}


def _own(hyperparameter: _tuner_types.Hyperparameter) -> _HyperParameter:
    """A copy of a hyperparameter, of a class of this module."""
    kind = KINDS.get(type(hyperparameter).__name__)
    if kind is None:
        raise errors.InvalidOptionError(
            f"A hyperparameter must be one of {', '.join(KINDS)}. Received: {hyperparameter!r}."
        )
    return kind.from_config(hyperparameter.get_config())


class HyperParameters(keras_tuner.HyperParameters):  # type: ignore[misc]  # KerasTuner has no types.
    """A search space and the values of a trial.

    As in KerasTuner; `Choice` and `Fixed` take any JSON values and tuples of them.

    Attributes:
        values: The values of active hyperparameters, by name.
    """

    values: _tuner_types.Values

    @contextlib.contextmanager
    def conditional_scope(
        self, parent_name: str, parent_values: _tuner_types.Value
    ) -> Iterator[None]:
        name = self._get_name(parent_name)
        if name not in self._hps:
            raise errors.InvalidOptionError(
                "`parent_name` must be the name of a hyperparameter that is already defined. "
                f"Received: {name!r}, which is not defined."
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

    def _retrieve(self, hp: _tuner_types.Hyperparameter) -> _tuner_types.Value:
        hp = _own(hp)
        is_known = self._exists(hp.name, hp.conditions) and self.is_active(hp)
        if is_known and hp.name not in self.values:
            # The trial began before this hyperparameter was known.
            self.values[hp.name] = hp.default
        return super()._retrieve(hp)

    def _register(
        self, hyperparameter: _tuner_types.Hyperparameter, overwrite: bool = False
    ) -> _tuner_types.Value:
        return super()._register(_own(hyperparameter), overwrite)

    def Choice(  # noqa: N802
        self,
        name: str,
        values: Sequence[_tuner_types.Value],
        ordered: bool | None = None,
        default: _tuner_types.Value = None,
        parent_name: str | None = None,
        parent_values: _tuner_types.Value = None,
    ) -> _tuner_types.Value:
        """One of `values`: None, bool, int, float, str, or tuples, lists and dictionaries of these.

        As in KerasTuner otherwise.
        """
        with self._maybe_conditional_scope(parent_name, parent_values):
            return self._retrieve(
                Choice(self._get_name(name), values, ordered, default, conditions=self._conditions)
            )

    def Int(  # noqa: N802
        self,
        name: str,
        min_value: int,
        max_value: int,
        step: int | None = None,
        sampling: str = "linear",
        default: int | None = None,
        parent_name: str | None = None,
        parent_values: _tuner_types.Value = None,
    ) -> int:
        """An integer from `min_value` to `max_value`, both included; as in KerasTuner."""
        value: int = super().Int(
            name, min_value, max_value, step, sampling, default, parent_name, parent_values
        )
        return value

    def Float(  # noqa: N802
        self,
        name: str,
        min_value: float,
        max_value: float,
        step: float | None = None,
        sampling: str = "linear",
        default: float | None = None,
        parent_name: str | None = None,
        parent_values: _tuner_types.Value = None,
    ) -> float:
        """A number from `min_value` to `max_value`; as in KerasTuner."""
        value: float = super().Float(
            name, min_value, max_value, step, sampling, default, parent_name, parent_values
        )
        return value

    def Boolean(  # noqa: N802
        self,
        name: str,
        default: bool = False,
        parent_name: str | None = None,
        parent_values: _tuner_types.Value = None,
    ) -> bool:
        """True or False; as in KerasTuner."""
        value: bool = super().Boolean(name, default, parent_name, parent_values)
        return value

    def Fixed(  # noqa: N802
        self,
        name: str,
        value: _tuner_types.Value,
        parent_name: str | None = None,
        parent_values: _tuner_types.Value = None,
    ) -> _tuner_types.Value:
        """A value that is not searched."""
        with self._maybe_conditional_scope(parent_name, parent_values):
            return self._retrieve(Fixed(self._get_name(name), value, conditions=self._conditions))

    @classmethod
    def from_config(cls, config: _types.Config) -> Self:
        """The object of a config from `get_config`."""
        found = cls()
        for entry in config["space"]:
            hp = KINDS[entry["class_name"]].from_config(entry["config"])
            found._hps[hp.name].append(hp)
            found._space.append(hp)
        found.values = dict(config["values"])
        return found

    @classmethod
    def of(cls, hyperparameters: keras_tuner.HyperParameters) -> Self:
        """A copy of `keras_tuner.HyperParameters`, of this class."""
        return cls.from_config(hyperparameters.get_config())

    def copy(self) -> Self:
        """A copy, with the same values."""
        # As from the config, but hyperparameters that were checked are not checked again.
        found = type(self)()
        for hp in self.space:
            twin = copy.copy(hp)
            found._hps[hp.name].append(twin)
            found._space.append(twin)
        found.values = dict(self.values)
        return found

    def ensure_active_values(self) -> None:
        """Sets missing values of active hyperparameters to defaults; removes inactive values."""
        for hp in self.space:
            if not self.is_active(hp):
                if not self.is_active(hp.name):
                    self.values.pop(hp.name, None)
            elif hp.name not in self.values:
                self.values[hp.name] = hp.default
