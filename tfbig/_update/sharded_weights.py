"""Which weights of a model are divided over the replicas, and which layers recompute for it."""

from __future__ import annotations

import keras

from tfbig import _keras, _log, _types, errors
from tfbig._update import gathered_weights, recomputation
from tfbig.distribute import _sharded_weights

__all__ = ("divide", "layers_to_recompute", "make_whole")


def divide(model: keras.Model, strategy: _types.Strategy) -> None:
    """Divides the weights of a built model, one at a time.

    Small ones stay whole.

    Raises:
        UnsupportedStrategyError: If the strategy does not support it.
    """
    _sharded_weights.check_strategy(strategy)
    if strategy.num_replicas_in_sync == 1:
        return
    found = [v for v in _weights(model) if not gathered_weights.is_divided(v)]
    found = [v for v in found if _sharded_weights.is_large(v)]
    for layer in recomputation.without_inner(_blocks_of(model, found)):
        _refuse_synchronized(layer)
    for variable in found:
        _sharded_weights.divide(variable, _keras.variables.values_of([variable])[0], strategy)
    if found:
        _tell(model)
        _log.logger().info(
            "tfbig: %d weights of %s lie on %d replicas in equal chunks; %s recompute",
            len(found),
            model.name,
            strategy.num_replicas_in_sync,
            ", ".join(layer.name for layer in layers_to_recompute(model)) or "no layers",
        )


def make_whole(model: keras.Model) -> None:
    """Gives every replica all of the weights again, one at a time."""
    divided = [v for v in _weights(model) if gathered_weights.is_divided(v)]
    for variable in divided:
        _keras.sharded_variable.make_whole(variable)
    if divided:
        _tell(model)


def _refuse_synchronized(layer: _types.Layer) -> None:
    """Raises for a layer that would exchange statistics once more when it recomputes."""
    for inner in layer._flatten_layers():
        if getattr(inner, "synchronized", False):
            raise errors.UnsupportedModelError(
                "A layer with divided weights recomputes, and must not exchange with other "
                f"replicas. Received: {type(inner).__name__} {inner.path!r} with "
                "synchronized=True. Use shard='optimizer', or synchronized=False."
            )


def _tell(model: keras.Model) -> None:
    """Tells the models inside that the weights are others."""
    for inner in _keras.layers.all_layers(model):
        if isinstance(inner, keras.Model):
            inner.train_function = inner.test_function = inner.predict_function = None


def layers_to_recompute(model: keras.Model) -> list[_types.Layer]:
    """The blocks of a model that have divided weights."""
    return _blocks_of(model, [v for v in _weights(model) if gathered_weights.is_divided(v)])


def _blocks_of(model: keras.Model, weights: list[_types.KerasVariable]) -> list[_types.Layer]:
    wanted = {id(v) for v in weights}
    blocks = recomputation.blocks(model)
    return [x for x in blocks if wanted & {id(v) for v in x.variables}]


def _weights(model: keras.Model) -> list[_types.KerasVariable]:
    """The weights that are, or were, trainable: what no forward pass assigns."""
    found: dict[int, _types.KerasVariable] = {}
    for layer in model._flatten_layers():
        found |= {id(v): v for v in layer._trainable_variables}
    return list(found.values())
