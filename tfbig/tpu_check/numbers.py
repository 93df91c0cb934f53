"""An update by all cores, run on the CPU, beside one of the whole batch in plain Keras."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tfbig import _types, errors
from tfbig.tpu_check._types import Array
from tfbig.tpu_check.pure import PureFunction

__all__ = (
    "TOLERANCES",
    "Difference",
    "Runner",
    "Update",
    "differences",
    "distance",
    "imitated",
    "is_floating",
    "poisoned",
    "run",
    "whole_update",
)

# What counts as rounding, relative to the largest change of a weight.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}

# Runs a core's program on all cores: takes its arguments, and returns its results. The arrays are
# of shape `(cores, ...)`.
Runner: TypeAlias = Callable[[list[Array]], list[Array]]


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update did to the variables.

    Attributes:
        before: Arrays of shape `(cores, ...)`, by path of the variable.
        after: Arrays of shape `(cores, ...)` of the variables that were assigned.
    """

    before: Mapping[str, Array]
    after: Mapping[str, Array]

    def apart(self, own: Collection[str] = ()) -> list[str]:
        """Returns the variables that differ in any bit between the cores.

        Args:
            own: Variables that each core keeps for itself, which may differ.
        """
        return [n for n, v in self.after.items() if n not in own and not _is_equal(v, v[:1])]

    def has_nan(self) -> bool:
        """Returns whether a NaN was assigned."""
        return any(np.isnan(v).any() for v in self.after.values() if is_floating(v))

    def changed(self, names: Iterable[str]) -> list[str]:
        """Returns those of the named variables in which a bit changed on any core."""
        return [
            n for n in names if n in self.after and not _is_equal(self.after[n], self.before[n])
        ]


def is_floating(array: Array) -> bool:
    """Returns whether an array holds floats, including those that numpy lacks, such as bfloat16."""
    return bool(tf.as_dtype(array.dtype).is_floating)


def distance(a: Array, b: Array) -> float:
    """Returns the largest absolute difference of two arrays of floats, computed in float64."""
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0))


def _is_equal(a: Array, b: Array) -> bool:
    return np.array_equal(a, np.broadcast_to(b, a.shape), equal_nan=is_floating(a))


def run(function: PureFunction, data: _types.Structure, cores: int, runner: Runner) -> Update:
    """Runs a core's program once on all cores.

    Args:
        function: The program.
        data: Structure of arrays: the batch of all cores.
        cores: Number of cores.
        runner: Runs the program.

    Raises:
        UnsupportedModelError: If the value of a variable is unknown.
    """
    flat = [v for v in keras.tree.flatten(data) if v is not None]
    values: list[Array] = []
    for argument in function.arguments:
        if argument.index is not None:
            value = np.asarray(flat[argument.index])
            values.append(value.reshape(cores, -1, *value.shape[1:]))
        elif argument.values is None:
            raise errors.UnsupportedModelError(
                "A variable must belong to the model, a layer or the optimizer. "
                f"Received: {argument.name!r}. Create it with add_weight."
            )
        else:
            values.append(np.stack(argument.values))
    results = zip(function.results, runner(values), strict=True)
    before = {a.name: v for a, v in zip(function.arguments, values, strict=True)}
    return Update(before, {r.name: v for r, v in results if r.argument is not None})


def imitated(function: PureFunction) -> Runner:
    """Makes a runner that only needs TensorFlow: it runs all cores in one graph.

    Args:
        function: The program.
    """

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types.
    def all_cores(values: list[tf.Tensor]) -> list[list[tf.Tensor]]:
        return function.together(
            [list(core) for core in zip(*map(tf.unstack, values), strict=True)]
        )

    def runner(values: list[Array]) -> list[Array]:
        results = all_cores([tf.constant(v) for v in values])
        return [np.stack(copies) for copies in zip(*results, strict=True)]

    return runner


def whole_update(model: keras.Model, data: _types.Structure, rate: float = 1.0) -> list[Array]:
    """Updates a model with the whole batch as Keras does, and then restores its weights.

    Args:
        model: A compiled Keras model with a built `keras.optimizers.SGD`.
        data: Structure of arrays, `(x, y)` or `(x, y, sample_weight)`.
        rate: Learning rate.

    Returns:
        The updated weights, in the order of `get_weights`.
    """
    before = model.get_weights()
    model.optimizer.learning_rate = rate
    # Not `train_on_batch`, which always hands three parts to a `train_step`.
    model.make_train_function()
    model.train_function(iter([data]))
    after: list[Array] = model.get_weights()
    model.set_weights(before)
    return after


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a weight is off.

    Attributes:
        name: Path of the weight.
        size: The largest over elements and cores, in units of the largest change of any weight;
            inf if a value is not finite.
    """

    name: str
    size: float


def differences(update: Update, wanted: Sequence[Array], names: Sequence[str]) -> list[Difference]:
    """Returns how far each floating weight is off, the largest difference first.

    Args:
        update: The update of all cores.
        wanted: What the weights should be.
        names: Paths of the weights.
    """
    before = {n: update.before[n][0] for n in names if n in update.before}
    changes = [
        distance(w, before[n])
        for n, w in zip(names, wanted, strict=True)
        if n in before and is_floating(w)
    ]
    largest = max(changes, default=0) or 1.0
    found = []
    for name, value in zip(names, wanted, strict=True):
        if name in before and is_floating(value):
            size = distance(update.after.get(name, update.before[name]), value) / largest
            found.append(Difference(name, size if np.isfinite(size) else np.inf))
    return sorted(found, key=lambda d: -d.size)


def poisoned(
    data: tuple[_types.Structure, ...], cores: int
) -> tuple[tuple[_types.Structure, ...] | None, bool]:
    """Puts NaN into the samples of the last core.

    NaN goes into the weights, else into the targets, on which every loss depends, else into the
    inputs, which a layer may turn into anything.

    Args:
        data: Structure of arrays, `(x, y)` or `(x, y, sample_weight)`.
        cores: Number of cores.

    Returns:
        The batch, or None if it has no floats; and whether its loss must be NaN.
    """
    for i, part in reversed([*enumerate(data)]):
        flat = keras.tree.flatten(part)
        places = [j for j, v in enumerate(flat) if v is not None and is_floating(v)]
        if places:
            value = flat[places[0]].copy()
            value[-len(value) // cores :] = np.nan
            flat[places[0]] = value
            return (*data[:i], keras.tree.pack_sequence_as(part, flat), *data[i + 1 :]), i > 0
    return None, False
