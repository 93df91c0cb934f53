"""What a split batch cannot compute exactly, whatever tfbig does: refused, or warned of once."""

import warnings
from collections.abc import Iterable

import keras

from tfbig import _keras, errors

__all__ = (
    "refuse_divided_loss",
    "refuse_stateful_layers",
    "warn_of_changed_state",
    "warn_of_what_is_not_exact",
)

# Registered name of a class -> what the loss of a batch is divided by, inside of `compute_loss`.
_DIVIDED_BY = {
    "keras_hub>RetinaNetObjectDetector": "the anchors of all samples that hold an object"
}


def refuse_stateful_layers(model: keras.Model, split: object) -> None:
    """Raises for layers that continue from the state of the previous batch.

    Args:
        model: a built model.
        split: how its batches are split, for the message.
    """
    names = [x.name for x in _keras.layers.all_layers(model) if getattr(x, "stateful", False)]
    if names:
        raise errors.UnsupportedModelError(
            "A layer that continues from the state of the previous batch (stateful=True) has one "
            "state for each sample of the whole batch, so the batch must not be split. Received: "
            f"{', '.join(names)} with {split} on {model.distribute_strategy.num_replicas_in_sync} "
            "replica(s). Use gradient_accumulation_steps=1 on one replica, or stateful=False."
        )


def refuse_divided_loss(model: keras.Model) -> None:
    """Raises for a model whose loss is known to change with the split of the batch."""
    for cls in type(model).__mro__:
        divisor = _DIVIDED_BY.get(_keras.saving.registered_name(cls))
        # A subclass may compute a loss that can be split.
        if divisor and vars(cls).get("compute_loss") is type(model).compute_loss:
            raise errors.UnsupportedModelError(
                f"The loss of {cls.__name__} divides by {divisor}, so that of micro-batches and "
                "replicas would differ from that of the whole batch. Received: a split batch. Use "
                "gradient_accumulation_steps=1 on one replica, or a subclass with a "
                "`compute_loss` that divides by a constant."
            )


def warn_of_what_is_not_exact(model: keras.Model, known: frozenset[str]) -> frozenset[str]:
    """Warns of layers and losses whose update changes when the batch is split.

    Args:
        model: the model, compiled.
        known: what was warned of before.

    Returns:
        All that has been warned of.
    """
    return _warn(_messages(model), known)


def warn_of_changed_state(
    model: keras.Model, assigned: Iterable[keras.Variable], known: frozenset[str]
) -> frozenset[str]:
    """Warns of variables of layers that every micro-batch changes.

    Random numbers and metrics are meant to change, and `BatchNormalization` is known before.

    Args:
        model: the model.
        assigned: what the forward pass of a micro-batch assigns.
        known: what was warned of before.

    Returns:
        All that has been warned of.
    """
    ids = {id(variable) for variable in assigned}
    paths = [
        variable.path
        for layer in [model, *_keras.layers.all_layers(model)]
        if not isinstance(layer, keras.layers.BatchNormalization)
        for variable in _keras.layers.own_weights(layer)
        if id(variable) in ids
    ]
    if not paths:
        return known
    return _warn(
        [
            "The forward pass changes variables of layers. In a split batch, every micro-batch "
            "does, from its samples alone; of several replicas, floats become the mean and "
            f"integers are those of the first. Received: {', '.join(paths)}. What counts updates "
            "belongs in a callback, or after `super().train_step(data)`."
        ],
        known,
    )


def _warn(messages: list[str], known: frozenset[str]) -> frozenset[str]:
    for message in messages:
        if message in known:
            continue
        warnings.warn(f'{message} See docs/contract.md, "What is not exact".', stacklevel=2)
    return known.union(messages)


def _messages(model: keras.Model) -> list[str]:
    found = []
    layers = _keras.layers.all_layers(model)
    normalizations = [
        x.name for x in layers if isinstance(x, keras.layers.BatchNormalization) and x.trainable
    ]
    if normalizations:
        found.append(
            "BatchNormalization normalizes each micro-batch with its own statistics, so the update "
            f"is not exactly that of the whole batch. Received: {', '.join(normalizations)}. Use "
            "larger micro-batches, freeze these layers (trainable=False), or normalize each sample "
            "alone (LayerNormalization, GroupNormalization)."
        )
    losses = _keras.losses.losses_that_couple_samples(model)
    if losses:
        found.append(
            "A loss couples the samples of a batch, so the loss of micro-batches differs from "
            f"that of the whole batch. Received: {', '.join(losses)}. Use larger "
            "micro-batches, or Dice and Tversky with the axes of a sample, such as axis=(1, 2, 3)."
        )
    tables = [x.name for x in layers if isinstance(x, keras.layers.Embedding) and x.trainable]
    if tables and model.jit_compile:
        found.append(
            "With jit_compile=True, the rows of an embedding's gradient that share an index are "
            "added up before the optimizer squares them; Keras squares each row. Only SGD without "
            f"clipping makes the same update either way. Received: {', '.join(tables)}. Use "
            "jit_compile=False."
        )
    return found
