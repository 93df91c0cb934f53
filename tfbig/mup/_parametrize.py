"""`parametrize`: weights and updates of a model of any width, from the shapes of a small one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig.mup._axes import fan_in_axes, product
from tfbig.mup._initial_values import initial_factor
from tfbig.mup._width import Width, check_optimizer, width_of

__all__ = ("build", "has_widths", "parametrize", "widths_of")


def parametrize(model: keras.Model, *, base: keras.Model, delta: keras.Model) -> keras.Model:
    """Has a model of any width train with the learning rate of a small one.

    The maximal update parametrization (muP). Dimensions in which `base` and `delta` differ are
    widths. The first values of weights are multiplied such that they are as large as muP asks for,
    and updates are multiplied when the optimizer makes them: the optimizer stays as it is. A model
    of the shapes of `base` stays as it is, too.

    Args:
        model: A new model: built, compiled or not, and not trained. It is changed in place.
        base: A model with the same layers, of the width at which hyperparameters are tuned. Only
            its shapes and initializers count, it is not changed.
        delta: A model with the same layers, which differs from `base` in every width.

    Returns:
        `model`.

    Raises:
        InvalidOptionError: If the model was trained or parametrized before, or updates of its
            optimizer have no rule.
        UnsupportedModelError: If the three models do not have the same layers, or a layer cannot
            be parametrized by the values of its weights and its learning rate.

    Example:

    >>> def build(width):
    ...     hidden = keras.layers.Dense(width, "relu")
    ...     model = keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(1)])
    ...     model.compile(keras.optimizers.Adam(0.01), "mse")
    ...     return model
    >>> model = tfbig.mup.parametrize(build(64), base=build(16), delta=build(32))
    >>> list(tfbig.mup.scales(model).values())[2].learning_rate
    0.25

    Reference:
        [Yang et al., Tensor Programs V, 2022](https://arxiv.org/abs/2203.03466), table 3.
    """
    for name, value in {"model": model, "base": base, "delta": delta}.items():
        if not isinstance(value, keras.Model) or not value.built:
            raise errors.InvalidOptionError(
                f"`{name}` must be a model that is built, so that its weights have shapes. "
                f"Received: {name}={value!r}. Call it once, or give it a keras.Input."
            )
    _check_new(model)
    for variable, width in widths_of(model, base, delta):
        _multiply(variable, width.initial)
        _keras.scaled_updates.set_rule(variable, width.update_scale)
    return model


def build(
    build_model: Callable[[int], keras.Model],
    width: int,
    *,
    base_width: int,
    delta_width: int | None = None,
) -> keras.Model:
    """Builds a model of a width, and parametrizes it.

    Args:
        build_model: Function of a width that returns a new model.
        width: The width of the model.
        base_width: The width at which hyperparameters are tuned.
        delta_width: Any other width, to see which dimensions follow from it. Defaults to twice
            `base_width`.

    Returns:
        The model, with the same first values as `build_model(width)` times a factor for each
        weight.

    Raises:
        InvalidOptionError, UnsupportedModelError: See `parametrize`.

    Example:

    >>> def build(width):
    ...     hidden = keras.layers.Dense(width, "relu")
    ...     return keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(1)])
    >>> model = tfbig.mup.build(build, width=64, base_width=16)
    >>> model.count_params()
    641
    """
    # First, so that it draws the same random numbers and has the same names as without muP.
    model = build_model(width)
    other = 2 * base_width if delta_width is None else delta_width
    return parametrize(model, base=build_model(base_width), delta=build_model(other))


def has_widths(model: keras.Model) -> bool:
    """Whether a model is parametrized."""
    return any(width_of(v) is not None for v in model.weights)


def _check_new(model: keras.Model) -> None:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        check_optimizer(optimizer)
        updates = int(optimizer.iterations.numpy())
        if updates > 0:
            raise errors.InvalidOptionError(
                "A model must be parametrized before it is trained, as its weights are multiplied. "
                f"Received: a model whose optimizer has made {updates} updates. Build it anew."
            )
    if has_widths(model):
        raise errors.InvalidOptionError(
            "A model must be parametrized only once, as its weights are multiplied. Received: "
            f"{model.name}, which is parametrized already. Build it anew."
        )


# --- Widths from shapes ----------------------------------------------------------------


def widths_of(
    model: keras.Model, base: keras.Model, delta: keras.Model
) -> list[tuple[_types.KerasVariable, Width]]:
    """The weights that have a width, and how wide they are. Changes nothing."""
    models = (model, base, delta)
    weights = [[v for v in m.weights if tf.as_dtype(v.dtype).is_floating] for m in models]
    lengths = {len(w) for w in weights}
    if len(lengths) > 1:
        raise errors.UnsupportedModelError(
            "`model`, `base` and `delta` must have the same layers, and differ in width alone. "
            f"Received: {', '.join(f'{len(w)} weights' for w in weights)}. Do not change the "
            "number of layers with the width."
        )
    if all(tuple(b.shape) == tuple(d.shape) for b, d in zip(*weights[1:], strict=True)):
        raise errors.InvalidOptionError(
            "`delta` must differ from `base` in every dimension that is a width. Received: two "
            "models of the same shapes. Build `delta` with another width."
        )
    owners = _owners(model)
    multipliers = _query_multipliers(model, dict(zip(map(id, weights[0]), weights[1], strict=True)))
    found = []
    for variable, in_base, in_delta in zip(*weights, strict=True):
        grows = _grows(variable, in_base, in_delta)
        if any(grows):
            layer = owners[id(variable)]
            _check_layer(layer, variable)
            multiplier = multipliers.get(id(variable), 1.0)
            found.append((variable, _width(layer, variable, in_base, grows, multiplier)))
    return found


def _grows(
    variable: _types.KerasVariable, base: _types.KerasVariable, delta: _types.KerasVariable
) -> list[bool]:
    """Which axes of a weight are widths."""
    shapes = tuple(variable.shape), tuple(base.shape), tuple(delta.shape)
    is_same = variable.name == base.name == delta.name and len({len(s) for s in shapes}) == 1
    if is_same:
        grows = [b != d for b, d in zip(*shapes[1:], strict=True)]
        is_same = all(g or s == b for g, s, b in zip(grows, *shapes[:2], strict=True))
    if not is_same:
        raise errors.UnsupportedModelError(
            "Weights of `model`, `base` and `delta` must have the same names and numbers of axes, "
            "and an axis may differ between `model` and `base` only if it differs between `delta` "
            f"and `base`. Received: {variable.path} of shape {shapes[0]}, {base.path} of shape "
            f"{shapes[1]} and {delta.path} of shape {shapes[2]}. Build all three with one "
            "function, and `delta` with every width changed."
        )
    return grows


def _width(
    layer: _types.Layer,
    variable: _types.KerasVariable,
    base: _types.KerasVariable,
    grows: list[bool],
    multiplier: float,
) -> Width:
    ratios = tuple(a / b for a, b in zip(variable.shape, base.shape, strict=True))
    inputs = fan_in_axes(layer, variable)
    outputs = set(range(len(ratios))) - set(inputs)
    fan_in = product(ratios, inputs)
    kind = "vector"
    if any(grows[i] for i in inputs):
        kind = "hidden" if any(grows[i] for i in outputs) else "output"
    return Width(
        kind=kind,
        fan_in=fan_in,
        fan_out=product(ratios, outputs),
        longest=max(variable.shape) / max(base.shape),
        sums=bool(inputs),
        multiplier=multiplier,
        initial=multiplier * initial_factor(variable, base, kind, fan_in),
    )


def _owners(model: keras.Model) -> dict[int, _types.Layer]:
    """The layer of each weight, by the identity of the weight."""
    layers = [model, *_keras.layers.all_layers(model)]
    owners = {id(v): layer for layer in layers for v in _keras.layers.own_variables(layer)}
    # It assigns the weights of the layer inside.
    for layer in layers:
        if isinstance(layer, keras.layers.SpectralNormalization):
            owners |= {id(v): layer for v in layer.weights}
    return owners


def _query_multipliers(
    model: keras.Model, base_of: dict[int, _types.KerasVariable]
) -> dict[int, float]:
    """Of the weights that make queries, what makes scores fall as the size of a head.

    Keras divides a score by the root of that size; muP divides by the size.
    """
    found: dict[int, float] = {}
    for layer in _keras.layers.all_layers(model):
        query = _keras.layers.query_of(layer)
        for variable in [] if query is None else query.weights:
            if id(variable) not in base_of:
                continue
            ratio = variable.shape[-1] / base_of[id(variable)].shape[-1]
            if ratio == 1.0:
                continue
            if not isinstance(
                layer, keras.layers.MultiHeadAttention | keras.layers.GroupQueryAttention
            ):
                raise errors.UnsupportedModelError(
                    "In attention layers that Keras does not have, heads must keep their size. "
                    f"Received: {type(layer).__name__} {layer.name}, whose heads grow by a factor "
                    f"of {ratio:g}. Change the number of heads with the width, not their size."
                )
            found[id(variable)] = ratio**-0.5
    return found


def _check_layer(layer: _types.Layer, variable: _types.KerasVariable) -> None:
    """Raises for a layer that values and learning rate of its weights cannot parametrize."""
    reason = None
    reversible = getattr(keras.layers, "ReversibleEmbedding", ())
    if isinstance(layer, reversible) and layer.tie_weights:
        reason = (
            "embeds and predicts with one weight, which would need two learning rates. Pass "
            "tie_weights=False"
        )
    elif isinstance(layer, keras.layers.SpectralNormalization):
        reason = "divides it in each call, which would undo how large weights are. Remove it"
    elif getattr(layer, "lora_enabled", False):
        reason = "has LoRA enabled, for which there is no rule. Enable it after training"
    elif variable.regularizer is not None:
        reason = (
            "has a regularizer, whose gradient does not fall with the width as that of the loss "
            "does. Pass weight_decay to the optimizer instead"
        )
    elif variable.constraint is not None and not isinstance(
        variable.constraint, keras.constraints.NonNeg
    ):
        reason = "has a constraint, which would undo how large weights are. Remove it"
    if reason is not None:
        raise errors.UnsupportedModelError(
            "Layers that grow with the width must be parametrizable by first values and learning "
            f"rate. Received: {variable.path} of {type(layer).__name__}, which {reason}."
        )


def _multiply(variable: _types.KerasVariable, factor: float) -> None:
    if factor != 1.0:
        (value,) = _keras.variables.values_of([variable])
        _keras.variables.assign_all([variable], [value * value.dtype.type(factor)])


# --- Files and clones ------------------------------------------------------------------


def _saved(model: keras.Model) -> list[dict[str, Any] | None] | None:
    """The width of each weight, as JSON can hold it."""
    if not has_widths(model):
        return None
    widths = [width_of(v) for v in model.weights]
    return [None if width is None else dataclasses.asdict(width) for width in widths]


def _restore(model: keras.Model, saved: list[dict[str, Any] | None]) -> None:
    if len(model.weights) != len(saved):
        raise errors.UnsupportedModelError(
            "The widths of a model are restored when its weights have been made. Received: "
            f"{len(model.weights)} weights and {len(saved)} widths. Give the model a `build` or "
            "keras.Input, so that Keras builds it before it loads weights."
        )
    for variable, width in zip(model.weights, saved, strict=True):
        if width is not None:
            _keras.scaled_updates.set_rule(variable, Width(**width).update_scale)


def _parametrize_clone(original: keras.Model, clone: keras.Model) -> keras.Model:
    """Gives a clone, whose weights are new, the widths of the original."""
    if not has_widths(original):
        return clone
    if len(clone.weights) != len(original.weights):
        raise errors.UnsupportedModelError(
            "A clone of a parametrized model must have the same weights. Received: "
            f"{len(clone.weights)} weights and {len(original.weights)} in the original. Clone the "
            "model first, and parametrize the clone."
        )
    for variable, source in zip(clone.weights, original.weights, strict=True):
        width = width_of(source)
        # Of a layer that is not cloned, or a model inside it, that was done already.
        if width is not None and width_of(variable) is None:
            _multiply(variable, width.initial)
            _keras.scaled_updates.set_rule(variable, width.update_scale)
    return clone


def _warn_of_hdf5(model: keras.Model) -> None:
    if has_widths(model):
        warnings.warn(
            f"The HDF5 file of {model.name} does not hold the widths of tfbig.mup: a model that is "
            "loaded from it predicts the same, but trains as if it were not parametrized. Save it "
            "as a .keras file.",
            stacklevel=5,
        )


_keras.saving.save_beside_config("tfbig_widths", _saved, _restore)
_keras.saving.before_saving_hdf5(_warn_of_hdf5)
_keras.saving.after_cloning(_parametrize_clone)
