"""What a split batch cannot compute exactly, whatever tfbig does: refused, or warned of once."""

import contextlib
import warnings
from collections.abc import Iterable

import keras

from tfbig import _keras, errors
from tfbig._update import loss_trace, replicas

__all__ = (
    "not_warned_of",
    "refuse_divided_loss",
    "refuse_stateful_layers",
    "warn_of_what_is_not_exact",
    "warn_of_what_the_trace_of_a_loss_shows",
    "warn_of_what_the_trace_shows",
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
            f"{', '.join(names)} with {split} on {replicas.count_of(model)} "
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


def warn_of_what_the_trace_shows(
    model: keras.Model,
    trace: loss_trace.LossTrace,
    known: frozenset[str],
    *,
    is_whole_batch: bool,
) -> frozenset[str]:
    """Warns of what only the trace tells to be another update than that of Keras.

    Args:
        model: the model.
        trace: that of a micro-batch.
        known: what was warned of before.
        is_whole_batch: whether the micro-batch is the whole batch.

    Returns:
        All that has been warned of.
    """
    messages = _added_rows(trace)
    if not is_whole_batch:
        messages += _changed_state(model, trace)
    # What couples samples by its name is warned of with its name.
    is_known = _keras.losses.losses_that_couple_samples(model) or _trained_normalizations(model)
    if trace.coupled_by and not is_known:
        messages.append(_coupled_loss(trace.coupled_by))
    return _warn(messages, known)


def warn_of_what_the_trace_of_a_loss_shows(
    model: keras.Model | None, trace: loss_trace.LossTrace, *, is_whole_batch: bool
) -> None:
    """Warns of what changes with the split of the batch in a user's own step.

    Args:
        model: the model whose step it is; None if it is none of tfbig's.
        trace: that of a micro-batch.
        is_whole_batch: whether the micro-batch is the whole batch.
    """
    messages = [_coupled_loss(trace.coupled_by)] if trace.coupled_by else []
    if not is_whole_batch:
        messages += _changed_state(model, trace)
    _warn([*messages, *_added_rows(trace)], frozenset())


def _changed_state(model: keras.Model | None, trace: loss_trace.LossTrace) -> list[str]:
    """What to say of variables that every micro-batch changes, those of a loss object among them.

    Random numbers and metrics are meant to change. `BatchNormalization` is known before, and
    `stateful=True` is refused where the batch is split.
    """
    known = set()
    if model is not None:
        layers = _keras.layers.all_layers(model)
        kind = keras.layers.BatchNormalization
        weights = [_keras.layers.own_weights(x) for x in layers if isinstance(x, kind)]
        states = [getattr(x, "states", []) for x in layers if getattr(x, "stateful", False)]
        known = {id(v) for v in keras.tree.flatten([weights, states, model.metrics_variables])}
    paths = [
        variable.path
        for variable in trace.state
        if id(variable) not in known and not _keras.variables.is_of_metric_or_generator(variable)
    ]
    # A `tf.Variable` has no path, and need not be an attribute of a layer.
    paths += trace.assignments
    if not paths:
        return []
    return [
        "The forward pass changes variables. In a split batch, every micro-batch does, from its "
        "samples alone; of several replicas, floats become the mean and integers are those of the "
        f"first. Received: {', '.join(paths)}. What counts updates belongs in a callback, or after "
        "`super().train_step(data)`."
    ]


def _added_rows(trace: loss_trace.LossTrace) -> list[str]:
    """What to say of tables that an XLA program looks up."""
    if not trace.added_rows:
        return []
    return [
        "In an XLA program (jit_compile=True, compiled=True, or on a TPU), the rows of an "
        "embedding's gradient that share an index are added up before the optimizer squares them; "
        "Keras squares each row. Only SGD without clipping makes the same update either way. "
        f"Received: {', '.join(trace.added_rows)}. Use jit_compile=False where there is no TPU."
    ]


def _coupled_loss(operations: Iterable[str]) -> str:
    return (
        "The loss is not a mean over the samples, so the loss of micro-batches, or of the samples "
        "of one replica, differs from that of the whole batch. Received: "
        f"{', '.join(sorted(operations))}, which adds samples up, computes with sums or means over "
        "them, as batch normalization does, or compares them. Instead of a sum, return a mean; or "
        "one value for each sample, from a loss with reduction='sum' or to `add_loss`. If the loss "
        "divides by a number that the data alone determines, such as that of valid tokens, return "
        "this number from `loss_denominator`. Otherwise, use larger micro-batches."
    )


def not_warned_of() -> contextlib.AbstractContextManager[None]:
    """A context in which this thread does not warn, since its results are compared anyway."""
    return _keras.thread.holding("silent", True)


def _warn(messages: list[str], known: frozenset[str]) -> frozenset[str]:
    if _keras.thread.current("silent"):
        return known
    for message in messages:
        if message in known:
            continue
        warnings.warn(f'{message} See docs/contract.md, "What is not exact".', stacklevel=2)
    return known.union(messages)


def _messages(model: keras.Model) -> list[str]:
    found = []
    if normalizations := _trained_normalizations(model):
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
    return found


def _trained_normalizations(model: keras.Model) -> list[str]:
    """Names of the layers that normalize with the statistics of a batch."""
    layers = _keras.layers.all_layers(model)
    kind = keras.layers.BatchNormalization
    return [x.name for x in layers if isinstance(x, kind) and x.trainable]
