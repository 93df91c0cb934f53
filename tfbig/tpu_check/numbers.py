"""An update of all cores, run on the CPU, beside one of the whole batch in plain Keras."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from tfbig import errors

__all__ = (
    "TOLERANCES",
    "Difference",
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


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update made of the variables.

    Attributes:
        before: dict of arrays `(cores, ...)`, by path of the variable.
        after: dict of arrays `(cores, ...)`, of those that were assigned.
    """

    before: dict
    after: dict

    def apart(self, own=()):
        """List of str, the variables that are not the same on all cores, to the bit.

        Args:
            own: collection of str, those of which each core has its own.
        """
        return [n for n, v in self.after.items() if n not in own and not _is_equal(v, v[:1])]

    def has_nan(self):
        """Whether NaN is in what was assigned."""
        return any(np.isnan(v).any() for v in self.after.values() if is_floating(v))

    def changed(self, names):
        """List of str, those of the variables of which a bit has changed, on any core."""
        return [
            n for n in names if n in self.after and not _is_equal(self.after[n], self.before[n])
        ]


def is_floating(array):
    """Whether an array holds floats, also of a kind that numpy does not know, as bfloat16."""
    return tf.as_dtype(array.dtype).is_floating


def distance(a, b):
    """The largest difference of two arrays of floats, taken in float64."""
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0))


def _is_equal(a, b):
    return np.array_equal(a, np.broadcast_to(b, a.shape), equal_nan=is_floating(a))


def run(function, data, cores, runner):
    """Runs a core's program once on all cores.

    Args:
        function: `PureFunction`.
        data: structure of arrays, the batch of all cores.
        cores: int.
        runner: function of a list of arrays `(cores, ...)`, the arguments; returns the results.

    Returns:
        An `Update`.

    Raises:
        UnsupportedModelError: If the value of a variable is not known.
    """
    flat = [v for v in keras.tree.flatten(data) if v is not None]
    values = []
    for argument in function.arguments:
        if argument.kind == "data":
            value = np.asarray(flat[argument.index])
            values.append(value.reshape(cores, -1, *value.shape[1:]))
        elif argument.values is None:
            raise errors.UnsupportedModelError(
                "A variable must belong to the model, a layer or the optimizer to be run. "
                f"Received: {argument.name!r}. Make it with add_weight."
            )
        else:
            values.append(np.stack(argument.values))
    results = runner(values)
    named = [(r, v) for r, v in zip(function.results, results, strict=True)]
    before = {a.name: v for a, v in zip(function.arguments, values, strict=True)}
    return Update(before, {r.name: v for r, v in named if r.argument is not None})


def imitated(function):
    """A runner for `run` that needs TensorFlow alone: the traced graph, all cores in one."""

    @tf.function(autograph=False)
    def all_cores(values):
        return function.together(
            [list(core) for core in zip(*map(tf.unstack, values), strict=True)]
        )

    def runner(values):
        results = all_cores([tf.constant(v) for v in values])
        return [np.stack(copies) for copies in zip(*results, strict=True)]

    return runner


def whole_update(model, data, rate=1.0):
    """One update of the whole batch as Keras does it; the weights are taken back.

    Args:
        model: compiled Keras model with a built `keras.optimizers.SGD`.
        data: structure of arrays, `(x, y)` or `(x, y, sample_weight)`.
        rate: float, learning rate.

    Returns:
        List of arrays, as of `get_weights`.
    """
    before = model.get_weights()
    model.optimizer.learning_rate = rate
    # `train_on_batch` would hand a `train_step` three parts, whatever there are.
    model.make_train_function()
    model.train_function(iter([data]))
    after = model.get_weights()
    model.set_weights(before)
    return after


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a weight is from where it should be.

    Attributes:
        name: str, path of the weight.
        size: float, the largest over elements and cores, in units of the largest change of any
            weight; inf where one is not finite.
    """

    name: str
    size: float


def differences(update, wanted, names):
    """List of `Difference`, the largest first.

    Args:
        update: `Update`.
        wanted: list of arrays, of what the weights should be.
        names: list of str, paths of the weights.
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


def poisoned(data, cores):
    """The batch with NaN in the samples of the last core.

    In weights, else in targets, which every loss depends on; else in inputs, of which a layer may
    make anything.

    Args:
        data: structure of arrays, `(x, y)` or `(x, y, sample_weight)`.
        cores: int.

    Returns:
        The batch, or None if it has no floats, and whether its loss must be NaN.
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
