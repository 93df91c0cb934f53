"""Keras fails late on layers that exchange or are out of scope; here they are found before."""

import contextlib
import functools
from collections.abc import Iterable, Iterator

import keras
import tensorflow as tf

from tfbig import _types, errors
from tfbig._keras.sharded_variable import ShardedVariable
from tfbig._keras.thread import current
from tfbig._keras.variables import native


def forward(
    model: keras.Model, data: _types.Structure, training: bool
) -> tuple[_types.Tensor, _types.Structure, _types.Structure, _types.Structure, _types.Structure]:
    """Calls the model and its loss on one micro-batch.

    Returns:
        A tuple `(loss, x, y, y_pred, sample_weight)`.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y_pred = model(x, training=training) if model._call_has_training_arg else model(x)
    head = current("head")
    if head is not None:
        head.find(y_pred)
    loss = model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )
    return loss, x, y, y_pred, sample_weight


def has_synchronized_layers(model: keras.Model) -> bool:
    """Whether a layer exchanges with the other replicas in its forward pass.

    `BatchNormalization(synchronized=True)` does, which fails in a `tf.while_loop`.
    """
    return any(getattr(layer, "synchronized", False) for layer in model._flatten_layers())


@contextlib.contextmanager
def without_synchronization(model: keras.Model) -> Iterator[None]:
    """Within it, no layer exchanges, because a nested graph must not contain a collective."""
    layers = [x for x in model._flatten_layers() if getattr(x, "synchronized", False)]
    for layer in layers:
        layer.synchronized = False
    try:
        yield
    finally:
        for layer in layers:
            layer.synchronized = True


def all_layers(model: keras.Model) -> list[_types.Layer]:
    """All layers inside a model, at any depth."""
    return list(model._flatten_layers(include_self=False))


def as_inputs(model: keras.Model, values: Iterable[_types.Structure]) -> _types.Structure:
    """Values in the order of `model.inputs`, as the list or dictionary that the model takes."""
    structure = getattr(model, "_inputs_struct", None)
    if not isinstance(structure, dict):
        return list(values)
    return keras.tree.pack_sequence_as(structure, list(values))


def own_variables(layer: _types.Layer) -> list[_types.KerasVariable]:
    """The variables of this very layer, not of those inside it."""
    return [*own_weights(layer), *(generator.state for generator in layer._seed_generators)]


def own_weights(layer: _types.Layer) -> list[_types.KerasVariable]:
    """The weights of this very layer, trainable or not, not of those inside it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def query_of(layer: _types.Layer) -> _types.Layer | None:
    """The layer inside an attention layer that makes its queries; None in other layers."""
    for name in ("_query_dense", "query_dense"):
        if isinstance(vars(layer).get(name), keras.layers.Layer):
            return vars(layer)[name]
    return None


@contextlib.contextmanager
def recording_outputs(
    model: keras.Model,
) -> Iterator[list[tuple[_types.Layer, _types.Structure]]]:
    """Within it, every call of a layer of the model is recorded, in order.

    Yields:
        Pairs of a layer and its output, of each call.
    """
    calls: list[tuple[_types.Layer, _types.Structure]] = []

    def record(layer: _types.Layer, call: _types.AnyFunction) -> _types.AnyFunction:
        @functools.wraps(call)
        def recorded(*args: object, **kwargs: object) -> _types.Structure:
            output = call(*args, **kwargs)
            calls.append((layer, output))
            return output

        return recorded

    layers = all_layers(model)
    kept = [vars(layer).get("call") for layer in layers]
    for layer in layers:
        # Past Keras, which would track the function.
        vars(layer)["call"] = record(layer, layer.call)
    try:
        yield calls
    finally:
        for layer, call in zip(layers, kept, strict=True):
            if call is None:
                del vars(layer)["call"]
            else:
                vars(layer)["call"] = call


def draws_random_numbers(layer: _types.Layer) -> bool:
    """Whether a layer has a random generator of its own, and uses it."""
    return bool(layer._seed_generators) and getattr(layer, "rate", 1) != 0


def owns_directly(layer: _types.Layer, variable: _types.KerasVariable) -> bool:
    """Whether a non-trainable variable belongs to this very layer, not to one inside it."""
    return any(variable is v for v in layer._non_trainable_variables)


def computes_in_float16(model: keras.Model) -> bool:
    """Whether the model, or a layer of it, computes in float16."""
    return any(layer.compute_dtype == "float16" for layer in model._flatten_layers())


def check_scope(model: keras.Model) -> None:
    """Raises if the model or its optimizer was made outside of the strategy's scope."""
    strategy = model._distribute_strategy
    if tf.distribute.has_strategy() and tf.distribute.get_strategy() is not strategy:
        raise errors.UnsupportedStrategyError(
            "The model must be built in the scope of the strategy that it runs under. "
            f"Received: a model built under {_name(strategy)}, run under "
            f"{_name(tf.distribute.get_strategy())}. Build and compile it inside "
            "`with strategy.scope():`."
        )
    optimizer = model.optimizer
    owner = getattr(optimizer, "_distribution_strategy", None)
    if owner is not None and owner is not model.distribute_strategy:
        raise errors.UnsupportedStrategyError(
            "The optimizer must be made in the scope of the model's strategy. Received: "
            f"{type(optimizer).__name__} made under {_name(owner)}, model under "
            f"{_name(strategy)}. Make it inside `with strategy.scope():`."
        )
    if strategy is None:
        return
    for variable in model.variables:
        if isinstance(variable, ShardedVariable):
            is_of_strategy = variable.strategy is strategy
        else:
            is_of_strategy = strategy.extended.variable_created_in_scope(native(variable))
        if not is_of_strategy:
            raise errors.UnsupportedStrategyError(
                "All variables must be made in the scope of the model's strategy. Received: "
                f"{variable.path}, made outside of {_name(strategy)}. Build the layers inside "
                "`with strategy.scope():`."
            )


def _name(strategy: _types.Strategy | None) -> str:
    return "no strategy" if strategy is None else type(strategy).__name__
