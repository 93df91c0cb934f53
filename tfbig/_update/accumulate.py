"""The first half of an update, for a `train_step` that a user writes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._update import inexact, own_step
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.batch_split import BatchSplit
from tfbig._update.loss_scale import LossScaleState
from tfbig._update.micro_batch_loss import MicroBatchLoss
from tfbig._update.micro_batches import MicroBatches

__all__ = ("accumulate_gradients",)

# A loss, or a loss and further values, of a micro-batch.
_UserLoss: TypeAlias = (
    "Callable[[_types.Structure], _types.Tensor | tuple[_types.Tensor, dict[str, _types.Tensor]]]"
)


def accumulate_gradients(
    loss_fn: _UserLoss,
    variables: Iterable[keras.Variable],
    data: _types.Structure,
    *,
    gradient_accumulation_steps: int | None = None,
    micro_batch_size: int | None = None,
    loss_scale: LossScaleState | None = None,
    compiled: bool = False,
) -> AccumulatedGradients:
    """Runs a loss function on the micro-batches of this replica's share.

    The first half of an update, for a `train_step` that a user writes alone;
    `tfbig.apply_gradients` is the second. The micro-batches run one after another
    in one `tf.while_loop`; nothing is exchanged and no variable is assigned
    before `apply_gradients`, which also writes back what the forward pass made of
    non-trainable Keras variables (moving statistics, seeds, metrics).

    Args:
        loss_fn: Function of a micro-batch, which has the structure of `data`.
            Returns a float scalar, or a pair of it and a dictionary of further
            float scalars that are to be reported. Scalars are taken as means over
            the samples of the micro-batch; Keras losses called inside know their
            own denominators.
        variables: List of trainable variables. Built, as everything that
            `loss_fn` uses.
        data: Structure of tensors of shape `(samples, ...)`.
        gradient_accumulation_steps: Micro-batches per replica and update.
        micro_batch_size: Samples per replica and micro-batch. Exactly one of
            the two may be given; neither means one micro-batch.
        loss_scale: The `loss_scale_state` of a model with
            `tfbig.DynamicLossScalingMixin`, or None.
        compiled: Whether XLA compiles the loop.

    Returns:
        An object to pass to `tfbig.apply_gradients`.

    Raises:
        InvalidOptionError: If an option is not valid.
        UnsupportedModelError: If the loss cannot be split exactly.

    Example:

    >>> w = keras.Variable([1.0, 2.0])
    >>> optimizer = keras.optimizers.SGD(1.0)
    >>> optimizer.build([w])
    >>> x = tf.constant([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    >>> accumulated = tfbig.accumulate_gradients(
    ...     lambda x: tf.reduce_mean(tf.linalg.matvec(x, w)), [w], x, micro_batch_size=2
    ... )
    >>> update = tfbig.apply_gradients(optimizer, accumulated)
    >>> float(update.loss), w.numpy().tolist()
    (3.0, [-2.0, 2.0])
    """
    variables = list(variables)
    if not variables:
        raise errors.InvalidOptionError(
            "`variables` must be a list of one trainable variable or more. Received: none of them. "
            "A model has no variables before it is built."
        )
    if gradient_accumulation_steps is None and micro_batch_size is None:
        gradient_accumulation_steps = 1
    split = BatchSplit(gradient_accumulation_steps, micro_batch_size)
    is_staged = _keras.stages.in_flight_of(variables) is not None
    own_step.accumulates(split, loss_scale, is_staged)

    def micro_batch_loss(micro_batch: _types.Structure) -> MicroBatchLoss:
        result = loss_fn(micro_batch)
        loss, values = result if isinstance(result, tuple | list) else (result, {})
        return MicroBatchLoss(tf.convert_to_tensor(loss), values=values)

    micro_batches = MicroBatches(micro_batch_loss, data, split, variables, compiled=compiled)
    inexact.warn_of_what_the_trace_of_a_loss_shows(
        own_step.current_model(), micro_batches.trace, is_whole_batch=micro_batches.is_whole_batch
    )
    scale = None if loss_scale is None else loss_scale.loss_scale.value
    return micro_batches.accumulate(scale, micro_batches.exchanged_counts())
