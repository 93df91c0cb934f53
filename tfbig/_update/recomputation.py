"""Which layers of a model compute their activations again in the backward pass."""

import keras

from tfbig import _keras, errors

__all__ = ("check", "layers_of", "serialized")


def check(recompute):
    """Returns the option, checked as far as it can be without the model; None for none."""
    if recompute is None or isinstance(recompute, bool):
        return recompute or None
    if callable(recompute) and not isinstance(recompute, keras.Layer):
        return recompute
    if isinstance(recompute, list | tuple) and all(
        isinstance(x, str | keras.Layer) for x in recompute
    ):
        return list(recompute) or None
    raise errors.InvalidOptionError(
        "`recompute` must be True, a list of layers or of their names, or a function that says "
        f"of a layer whether it is meant. Received: recompute={recompute!r}."
    )


def layers_of(model, recompute):
    """The outermost of the layers that are meant.

    Args:
        model: `keras.Model`, built.
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
        chosen = _blocks(model)
    else:
        chosen = [x for x in _keras.layers.all_layers(model) if _is_call(x) and recompute(x)]
    if not chosen:
        raise errors.InvalidOptionError(
            f"`recompute` must mean one layer at least. Received: recompute={recompute!r}, which "
            f"means none of {_names(model)}."
        )
    inside = {id(x) for layer in chosen for x in _keras.layers.all_layers(layer)}
    chosen = [x for x in chosen if id(x) not in inside]
    for layer in chosen:
        _keras.recomputation.check_can_recompute(layer)
    return chosen


def serialized(model, recompute):
    """The option as JSON can hold it: a function becomes the names of the layers it chose."""
    if recompute is None or recompute is True:
        return recompute
    if not isinstance(recompute, list):
        recompute = layers_of(model, recompute)
    return [x if isinstance(x, str) else x.name for x in recompute]


def _is_call(layer):
    return not isinstance(layer, keras.layers.InputLayer)


def _blocks(model):
    """The layers of a model, and of the models inside it, that have variables or layers."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += _blocks(layer)
        # An embedding's activations are its output, which is kept in any case.
        elif _keras.layers.all_layers(layer) or (
            layer.trainable_variables and not isinstance(layer, keras.layers.Embedding)
        ):
            found.append(layer)
    return found


def _named(model, wanted):
    layers = [x for x in _keras.layers.all_layers(model) if _is_call(x)]
    chosen = []
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


def _names(model):
    return ", ".join(x.name for x in model.layers if _is_call(x)) or "no layers"
