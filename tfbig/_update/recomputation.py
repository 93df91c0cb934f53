"""Which layers of a model recompute their activations in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import keras

from tfbig import _keras, _types, errors

__all__ = ("Recompute", "blocks", "check", "check_fits", "layers_of", "serialized", "without_inner")

# All blocks, layers or their names, a predicate of layers, or nothing.
Recompute: TypeAlias = (
    "Literal[True] | list[str | _types.Layer] | Callable[[_types.Layer], bool] | None"
)


def check(recompute: object) -> Recompute:
    """Returns the option, checked as far as possible without the model; None for no layers."""
    if recompute is None or isinstance(recompute, bool):
        return True if recompute else None
    if callable(recompute) and not isinstance(recompute, keras.Layer):
        return recompute
    if isinstance(recompute, list | tuple) and all(
        isinstance(x, str | keras.Layer) for x in recompute
    ):
        return list(recompute) or None
    raise errors.InvalidOptionError(
        "`recompute` must be True, a list of layers or of their names, or a function that returns "
        f"whether to recompute a layer. Received: recompute={recompute!r}."
    )


def layers_of(model: keras.Model, recompute: Recompute) -> list[_types.Layer]:
    """The layers to recompute, without those inside of others.

    Args:
        model: a built model.
        recompute: what `check` returned.

    Raises:
        InvalidOptionError: If the model has no such layer.
        UnsupportedModelError: If a layer cannot be recomputed.
    """
    if recompute is None:
        return []
    if isinstance(recompute, list):
        chosen = _named(model, recompute)
    elif recompute is True:
        chosen = blocks(model)
    else:
        chosen = [x for x in _keras.layers.all_layers(model) if _is_call(x) and recompute(x)]
    if not chosen:
        raise errors.InvalidOptionError(
            "`recompute` must match at least one layer. Received: "
            f"recompute={recompute!r}, which matches none of {_names(model)}."
        )
    return without_inner(chosen)


def without_inner(layers: list[_types.Layer]) -> list[_types.Layer]:
    """The layers, without those inside of others.

    Raises:
        UnsupportedModelError: If a layer cannot be recomputed.
    """
    inside = {id(x) for layer in layers for x in _keras.layers.all_layers(layer)}
    outer = [x for x in dict.fromkeys(layers) if id(x) not in inside]
    for layer in outer:
        _keras.recomputation.check_can_recompute(layer)
    return outer


def check_fits(model: keras.Model, recompute: Recompute) -> None:
    """Raises if a model cannot recompute these layers; see `layers_of`."""
    layers_of(model, recompute)


def serialized(model: keras.Model, recompute: Recompute) -> Literal[True] | list[str] | None:
    """The option as JSON can hold it: a function becomes the names of the layers it chose."""
    if recompute is None or recompute is True:
        return recompute
    if not isinstance(recompute, list):
        recompute = layers_of(model, recompute)
    return [x if isinstance(x, str) else x.name for x in recompute]


def _is_call(layer: _types.Layer) -> bool:
    return not isinstance(layer, keras.layers.InputLayer)


def blocks(model: keras.Model) -> list[_types.Layer]:
    """The layers of a model, and of the models inside it, that have variables or layers."""
    found: list[_types.Layer] = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += blocks(layer)
        # An embedding's activations are its output, which is kept in any case.
        elif _keras.layers.all_layers(layer) or (
            layer.trainable_variables and not isinstance(layer, keras.layers.Embedding)
        ):
            found.append(layer)
    return found


def _named(model: keras.Model, wanted: list[str | _types.Layer]) -> list[_types.Layer]:
    layers = [x for x in _keras.layers.all_layers(model) if _is_call(x)]
    chosen: list[_types.Layer] = []
    for want in wanted:
        found = [x for x in layers if x is want or want in (x.name, x.path)]
        if not found:
            name = want if isinstance(want, str) else want.name
            raise errors.InvalidOptionError(
                f"`recompute` must hold layers of the model. Received: {name!r}. It has "
                f"{_names(model)}."
            )
        chosen += found
    return chosen


def _names(model: keras.Model) -> str:
    return ", ".join(x.name for x in model.layers if _is_call(x)) or "no layers"
