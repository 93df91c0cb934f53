"""`coordinate_check`: whether what layers compute keeps its size when the model gets wider."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfbig import _integers, _keras, _types, errors
from tfbig.mup import _coordinate_plot
from tfbig.mup._parametrize import parametrize, widths_of
from tfbig.mup._width import width_of

__all__ = ("CoordinateCheck", "Coordinates", "coordinate_check")


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The mean size of a number in the output of a layer.

    Attributes:
        layer: Name of the layer in the narrowest model; [1] follows in its second call.
        update: Updates before it was measured; 0 is the new model.
        width: Width of the model.
        size: Mean of absolute values.
        change: Mean of absolute differences from the new model.
    """

    layer: str
    update: int
    width: int
    size: float
    change: float


@dataclasses.dataclass(frozen=True)
class CoordinateCheck:
    """What `coordinate_check` measured.

    Attributes:
        rows: The measurements, by layer, update and width.
        tolerance: By what power of the width sizes may grow, or changes grow or shrink.
    """

    rows: tuple[Coordinates, ...]
    tolerance: float

    @property
    def is_ok(self) -> bool:
        """Whether all layers keep their size, and learn as much at every width."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence for each layer that depends on the width.

        What grows counts after any update, what shrinks after the last: the first updates are
        smaller in a wider model if its output begins smaller.
        """
        found = []
        updates = sorted({row.update for row in self.rows})
        for layer in self._layers():
            grown = max(
                (self.exponent(layer, update, of), -update, of)
                for update in updates
                for of in ("size", "change")
            )
            shrunk = self.exponent(layer, updates[-1], "change")
            if grown[0] > self.tolerance:
                power, update, of = grown
                found.append(f"The {of} of {layer} grows as width^{power:.2f} at update {-update}.")
            elif shrunk < -self.tolerance:
                found.append(f"{layer} learns less in a wider model: width^{shrunk:.2f}.")
        return tuple(found)

    def exponent(self, layer: str, update: int, of: str = "size") -> float:
        """The power of the width as which a layer grows; 0 if its output is zero.

        Args:
            layer: Name of a layer.
            update: Number of updates.
            of: "size" or "change".
        """
        rows = [r for r in self.rows if (r.layer, r.update) == (layer, update)]
        sizes = [getattr(r, of) for r in rows]
        if not all(math.isfinite(s) for s in sizes):
            return math.inf
        if not all(s > 0 for s in sizes):
            return 0.0
        return float(np.polyfit(np.log([r.width for r in rows]), np.log(sizes), 1)[0])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws sizes and changes over the width, a line for each layer. Needs matplotlib.

        Args:
            path: Path of the file, a PNG whatever its name.
        """
        _coordinate_plot.draw(self.rows, path)

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(row.layer for row in self.rows))

    def __str__(self) -> str:
        last = max(r.update for r in self.rows)
        columns = [
            ("layer", "size, new", f"size, {last} updates", f"change, {last} updates"),
            *(
                (
                    name,
                    f"width^{self.exponent(name, 0):.2f}",
                    f"width^{self.exponent(name, last):.2f}",
                    f"width^{self.exponent(name, last, 'change'):.2f}",
                )
                for name in self._layers()
            ),
        ]
        lengths = [max(map(len, column)) for column in zip(*columns, strict=True)]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, lengths, strict=True)).rstrip()
            for row in columns
        ]
        verdict = "Sizes and changes do not depend on the width."
        return "\n".join([*lines, "", *(self.failures or [verdict])])


def coordinate_check(
    build_model: Callable[[int], keras.Model],
    x: _types.Structure,
    y: _types.Structure,
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    base_width: int | None = None,
    delta_width: int | None = None,
    updates: int = 4,
    repeats: int = 2,
    tolerance: float = 0.25,
    parametrized: bool = True,
    zero_output: bool = True,
) -> CoordinateCheck:
    """Measures what layers compute at several widths, in a few updates.

    In a model that is parametrized well, the numbers in a layer's output are as large at every
    width, and so is how much an update changes them.

    Use a learning rate as large as in training, or larger.

    Args:
        build_model: Function of a width that returns a new, compiled model.
        x: One batch of data, all of which each update is of.
        y: Its targets.
        widths: Widths, at least two.
        base_width: The width at which hyperparameters are tuned. Defaults to the least of `widths`.
        delta_width: See `build`.
        updates: Updates of each model.
        repeats: Models of each width with other first values, over which sizes are averaged.
        tolerance: Sizes may grow by this power of the width, and changes may grow or shrink by it.
        parametrized: Whether the models are parametrized. False shows what happens without.
        zero_output: Whether the weights of output layers begin at zero. Otherwise, outputs begin
            smaller in wider models, and for the first updates layers learn less there.

    Returns:
        A `CoordinateCheck`; `print` shows a table and what is wrong.

    Raises:
        InvalidOptionError: If a model is not compiled, the widths are fewer than two, or a number
            is not an integer of at least 1.

    Example:

    >>> def build(width):
    ...     hidden = keras.layers.Dense(width, "relu")
    ...     model = keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(1)])
    ...     model.compile(keras.optimizers.Adam(0.01), "mse")
    ...     return model
    >>> x = np.random.default_rng(0).normal(size=(64, 8))
    >>> check = tfbig.mup.coordinate_check(
    ...     build, x, x.sum(axis=1), widths=(32, 128, 512), updates=2, repeats=1
    ... )
    >>> check.is_ok
    True

    Reference:
        [Yang et al., Tensor Programs V, 2022](https://arxiv.org/abs/2203.03466), appendix D.1.
    """
    widths = _checked_widths(widths)
    updates = _integers.checked("updates", updates)
    repeats = _integers.checked("repeats", repeats)
    least = widths[0] if base_width is None else base_width
    other = 2 * least if delta_width is None else delta_width
    names: list[str] = []
    rows = []
    for width in widths:
        runs = []
        for _ in range(repeats):
            model = build_model(width)
            base, delta = build_model(least), build_model(other)
            _prepare(model, base, delta, parametrized, zero_output)
            found, measured = _train(model, x, y, updates)
            names = names or found
            runs.append(measured)
        rows += _mean_rows(names, width, runs)
    rows.sort(key=lambda r: (names.index(r.layer), r.update, r.width))
    return CoordinateCheck(tuple(rows), tolerance)


def _checked_widths(widths: Sequence[int]) -> list[int]:
    try:
        found = sorted({_integers.checked("widths", width) for width in widths})
    except TypeError:
        found = []
    if len(found) < 2:
        raise errors.InvalidOptionError(
            f"`widths` must be at least two different integers. Received: widths={widths!r}."
        )
    return found


def _prepare(
    model: keras.Model,
    base: keras.Model,
    delta: keras.Model,
    parametrized: bool,
    zero_output: bool,
) -> None:
    """See `coordinate_check` for the last two arguments."""
    if not model.compiled:
        raise errors.InvalidOptionError(
            "`build_model` must return a compiled model, which can be trained. Received: "
            f"{model.name}, which is not compiled."
        )
    outputs = [v for v, width in widths_of(model, base, delta) if width.kind == "output"]
    if parametrized:
        parametrize(model, base=base, delta=delta)
    if zero_output:
        _keras.variables.assign_all(outputs, [np.zeros(v.shape) for v in outputs])


def _mean_rows(
    names: list[str], width: int, runs: list[list[list[tuple[float, float]]]]
) -> list[Coordinates]:
    """What layers computed, the mean of several models of a width.

    Args:
        names: The layers.
        width: The width.
        runs: Of each model, what `_train` measured.
    """
    if any(len(measured[0]) != len(names) for measured in runs):
        raise errors.UnsupportedModelError(
            f"Models of all widths must call the same layers. Received: {len(names)} outputs at "
            f"the least width, {len(runs[0][0])} at width {width}."
        )
    mean = np.mean(runs, axis=0)
    return [
        Coordinates(name, update, width, *map(float, mean[update, i]))
        for update in range(len(mean))
        for i, name in enumerate(names)
    ]


def _train(
    model: keras.Model, x: _types.Structure, y: _types.Structure, updates: int
) -> tuple[list[str], list[list[tuple[float, float]]]]:
    """Names of outputs; and for each number of updates, size and change of each."""
    names, first = _outputs(model, x)
    measured = [[(_mean(value), 0.0) for value in first]]
    for _ in range(updates):
        model.train_on_batch(x, y)
        _, now = _outputs(model, x)
        pairs = zip(now, first, strict=True)
        measured.append([(_mean(value), _mean(value - begin)) for value, begin in pairs])
    return names, measured


def _mean(value: _types.Array) -> float:
    return float(np.mean(np.abs(value)))


def _outputs(model: keras.Model, x: _types.Structure) -> tuple[list[str], list[_types.Array]]:
    """Names and values of what all layers compute."""
    multipliers = _multipliers(model)
    names: list[str] = []
    values: list[_types.Array] = []
    calls: dict[int, int] = {}
    with _keras.layers.recording_outputs(model) as recorded:
        model(keras.tree.map_structure(tf.convert_to_tensor, x), training=False)
    for layer, output in recorded:
        number = calls[id(layer)] = calls.get(id(layer), -1) + 1
        tensors = [t for t in keras.tree.flatten(output) if tf.is_tensor(t) and t.dtype.is_floating]
        for i, tensor in enumerate(tensors):
            name = layer.name + (f"[{number}]" if number else "")
            if names.count(name) or len(tensors) > 1:
                name = f"{name}/{len(names)}.{i}"
            names.append(name)
            values.append(tensor.numpy().astype("float64") / multipliers.get(id(layer), 1.0))
    return names, values


def _multipliers(model: keras.Model) -> dict[int, float]:
    """What stands before queries, by the identity of their layer, and makes them smaller."""
    found = {}
    for layer in _keras.layers.all_layers(model):
        query = _keras.layers.query_of(layer)
        width = None if query is None else width_of(query.kernel)
        if width is not None:
            found[id(query)] = width.multiplier
    return found
