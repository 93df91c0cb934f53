"""What is not the same for a cut batch, whatever tfbig does: refused, or said once."""

import warnings

import keras

from tfbig import _keras, errors

__all__ = ("refuse_divided_loss", "refuse_stateful_layers", "warn_of_what_is_not_exact")

# Registered name of a class -> what the loss of a batch is divided by, inside of `compute_loss`.
_DIVIDED_BY = {
    "keras_hub>RetinaNetObjectDetector": "the anchors of all samples that hold an object"
}


def refuse_stateful_layers(model: keras.Model, split: object) -> None:
    """Raises for layers that go on with the state of the batch before.

    Args:
        model: `keras.Model`, built.
        split: what splits its batches, for the message.
    """
    names = [x.name for x in _keras.layers.all_layers(model) if getattr(x, "stateful", False)]
    if names:
        raise errors.UnsupportedModelError(
            "A layer that goes on with the state of the batch before (stateful=True) has one state "
            "for each sample of the whole batch, so the batch must not be split. Received: "
            f"{', '.join(names)} with {split} on {model.distribute_strategy.num_replicas_in_sync} "
            "replica(s). Use gradient_accumulation_steps=1 on one replica, or stateful=False."
        )


def refuse_divided_loss(model: keras.Model) -> None:
    """Raises for a model of which it is known that no cut has the loss of the whole batch."""
    for cls in type(model).__mro__:
        divisor = _DIVIDED_BY.get(_keras.saving.registered_name(cls))
        # A subclass may compute a loss that can be split.
        if divisor and vars(cls).get("compute_loss") is type(model).compute_loss:
            raise errors.UnsupportedModelError(
                f"The loss of {cls.__name__} divides by {divisor}, so micro-batches and replicas "
                "would have another loss than the whole batch. Received: a batch that is split. "
                "Use gradient_accumulation_steps=1 on one replica, or a subclass with a "
                "`compute_loss` that divides by a constant."
            )


def warn_of_what_is_not_exact(model: keras.Model) -> None:
    """Warns of layers and losses whose update of a cut batch is another one."""
    for message in _messages(model):
        warnings.warn(f'{message} See docs/contract.md, "What is not exact".', stacklevel=2)


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
            f"A loss couples the samples of a batch, so that of the micro-batches is another one "
            f"than that of the whole batch. Received: {', '.join(losses)}. Use larger "
            "micro-batches, or Dice and Tversky with the axes of a sample, such as axis=(1, 2, 3)."
        )
    tables = [x.name for x in layers if isinstance(x, keras.layers.Embedding) and x.trainable]
    if tables and model.jit_compile:
        found.append(
            "With jit_compile=True, the rows that an embedding's gradient has for one index are "
            "added up before the optimizer squares them; Keras squares each row. SGD without "
            f"clipping makes the same update of both. Received: {', '.join(tables)}. Use "
            "jit_compile=False."
        )
    return found
