"""The second half of an update: exchange, divide, decide, apply."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from tfbig import _keras, errors
from tfbig._update import accumulators, exchange, half_precision_exchange, own_step, replicas

if TYPE_CHECKING:
    from tfbig import _types
    from tfbig._update.accumulated_gradients import AccumulatedGradients
    from tfbig._update.variable_update import VariableUpdate
    from tfbig.loss_scaling import LossScaleState

__all__ = (
    "Update",
    "apply_gradients",
    "apply_to_weights",
    "assign_without_gradients",
    "check_optimizer",
    "is_reported",
)


@dataclasses.dataclass
class Update:
    """What an update did; the same on every replica.

    Attributes:
        loss: float scalar, the loss of the effective batch.
        values: structure of float scalars, further means over the effective batch.
        is_finite: bool scalar; False if the update was skipped. None where
            nothing checks, because there is no loss scale.
        gradient_norm: float scalar, the global norm of the gradient before
            clipping, or None.
        samples: int32 scalar, samples of the effective batch.
        logs: logs of the last micro-batch.
        noise_moments: see `AccumulatedGradients`.
    """

    loss: _types.Tensor
    values: _types.Structure
    is_finite: _types.Tensor | None
    gradient_norm: _types.Tensor | None
    samples: _types.Tensor
    logs: _types.Structure
    noise_moments: _types.Tensor


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    accumulated: AccumulatedGradients,
    loss_scale: LossScaleState | None = None,
    log_grad_norm: bool = False,
    exchange_dtype: str | None = None,
    exchange_bucket_bytes: int = replicas.BUCKET_BYTES,
) -> Update:
    """Exchanges what the replicas accumulated and applies the optimizer once.

    The second half of an update; `tfbig.accumulate_gradients` is the first. Call it in replica
    context, which is where `train_step` runs, once for each optimizer. The gradient that the
    optimizer clips and applies is that of the whole effective batch, the same on every replica.

    Args:
        optimizer: `keras.optimizers.Optimizer`. Must have been built on the
            variables of `accumulated`, or be called first outside of a
            `tf.function`.
        accumulated: What `accumulate_gradients` returned on this replica.
        loss_scale: The `loss_scale_state` of a model with
            `DynamicLossScalingMixin`, the same as for `accumulate_gradients`, or
            None. With it, an update with a non-finite gradient on any replica is
            skipped on all.
        log_grad_norm: Whether to compute the global norm of the gradient.
        exchange_dtype: "bfloat16" or "float16": what gradients are cast to while
            replicas exchange them. None exchanges them as they are, and is exact.
        exchange_bucket_bytes: Gradients are exchanged in buckets of so many bytes, one after
            another. Defaults to 32 MiB.

    Returns:
        An `Update`: `loss`, `is_finite`, `gradient_norm`.
    """
    check_optimizer(optimizer)
    exchange_dtype = half_precision_exchange.checked_dtype(exchange_dtype)
    bucket_bytes = replicas.checked_bucket_bytes(exchange_bucket_bytes)
    own_step.applies(loss_scale, log_grad_norm, exchange_dtype, bucket_bytes)
    batch = exchange.all_reduce_accumulated(accumulated, exchange_dtype, bucket_bytes=bucket_bytes)
    return apply_to_weights(optimizer, batch, loss_scale, log_grad_norm)


def apply_to_weights(
    optimizer: keras.optimizers.Optimizer,
    batch: AccumulatedGradients,
    loss_scale: LossScaleState | None,
    needs_norm: bool,
) -> Update:
    """Applies the optimizer, or skips the update, and assigns what the forward passes changed.

    Args:
        optimizer: the optimizer.
        batch: what all replicas accumulated, after the exchange.
        loss_scale: see `apply_gradients`.
        needs_norm: whether the global norm of the gradient is wanted.
    """
    loss, values = _means(batch)
    gradients = _gradients_of_loss(batch)
    norm = global_norm(gradients) if needs_norm else None
    with _keras.variables.assigned_locally(_assigned(optimizer, batch, loss_scale)):
        if loss_scale is None:
            is_finite = None
            # The optimizer's counter would not depend on the gradients otherwise.
            with tf.control_dependencies([batch.weight]):
                _apply(optimizer, gradients, batch.variables)
        else:
            flags = _finite_flags(gradients)
            is_finite = tf.reduce_all(flags)
            _apply_if_finite(optimizer, gradients, batch.variables, loss_scale, flags)
        _assign_state(batch.state, is_finite, loss)
    return Update(loss, values, is_finite, norm, batch.samples, batch.logs, batch.noise_moments)


def assign_without_gradients(batch: AccumulatedGradients) -> Update:
    """The `Update` of an evaluation: losses and metrics, no optimizer.

    Args:
        batch: what all replicas accumulated, after the exchange.
    """
    loss, values = _means(batch)
    with _keras.variables.assigned_locally([u.variable for u in batch.state]):
        _assign_state(batch.state, None, loss)
    return Update(loss, values, None, None, batch.samples, batch.logs, batch.noise_moments)


def is_reported(update: Update) -> _types.Tensor:
    """Whether the update's loss counts in the loss metric."""
    if update.is_finite is None:
        # Not a constant: a count of losses would go up when the data have ended.
        with tf.control_dependencies([] if tf.executing_eagerly() else [update.loss]):
            return tf.identity(True)
    return update.is_finite | tf.math.is_finite(update.loss)


def check_optimizer(optimizer: _types.Optimizer) -> None:
    """Raises for an optimizer that accumulates or scales by itself."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise errors.InvalidOptionError(
            "`optimizer` must not be wrapped in `LossScaleOptimizer`: tfbig scales the loss. "
            "Pass the inner optimizer, and to the model "
            f"`loss_scale=tfbig.DynamicLossScale(initial_scale={optimizer.initial_scale}, "
            f"growth_interval={optimizer.dynamic_growth_steps})`. If "
            "Keras wrapped it, pass auto_scale_loss=False to `compile`."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return
    remedies = {
        "gradient_accumulation_steps": "Give it to the model instead",
        "loss_scale_factor": "Give `loss_scale` to the model instead",
    }
    for name, remedy in remedies.items():
        value = getattr(optimizer, name, None)
        if value is not None:
            raise errors.InvalidOptionError(
                f"`optimizer.{name}` must be None: tfbig does it once per update of the whole "
                f"effective batch. Received: {name}={value}. {remedy}."
            )


def global_norm(gradients: list[_types.Gradient | None]) -> _types.Tensor:
    """Global norm of a list of gradients, without those that are None."""
    return tf.linalg.global_norm([tf.convert_to_tensor(g) for g in gradients if g is not None])


def _means(batch: AccumulatedGradients) -> tuple[_types.Tensor, _types.Structure]:
    """The loss of the effective batch, and the further values."""

    def mean(total: _types.Tensor) -> _types.Tensor:
        return tf.math.divide_no_nan(total, batch.weight)

    return mean(batch.loss), tf.nest.map_structure(mean, batch.values)


def _gradients_of_loss(batch: AccumulatedGradients) -> list[_types.Gradient | None]:
    """The gradients of the effective batch's loss: the sums over weight and loss scale."""
    # Two divisions: the scale is a power of two as a rule, and dividing by it
    # alone is exact.
    gradients = [_divide(g, batch.weight) for g in batch.gradients]
    if batch.loss_scale is not None:
        gradients = [_divide(g, batch.loss_scale) for g in gradients]
    return gradients


def _divide(gradient: _types.Gradient | None, divisor: _types.Tensor) -> _types.Gradient | None:
    return accumulators.map_values(
        lambda v: tf.math.divide_no_nan(v, tf.cast(divisor, v.dtype)), gradient
    )


def _finite_flags(gradients: list[_types.Gradient | None]) -> _types.Tensor:
    """Vector of booleans: for each gradient, whether all its values are finite."""
    flags = [
        tf.constant(True) if g is None else tf.reduce_all(tf.math.is_finite(accumulators.values(g)))
        for g in gradients
    ]
    return tf.stack(flags)


def _assigned(
    optimizer: keras.optimizers.Optimizer,
    batch: AccumulatedGradients,
    loss_scale: LossScaleState | None,
) -> list[_types.KerasVariable]:
    """The variables that an update assigns."""
    state = [update.variable for update in batch.state]
    scale = [] if loss_scale is None else loss_scale.variables()
    return [*optimizer.variables, *batch.variables, *state, *scale]


def _apply(
    optimizer: keras.optimizers.Optimizer,
    gradients: list[_types.Gradient | None],
    variables: list[keras.Variable],
) -> None:
    with _keras.optimizer.without_exchange():
        optimizer.apply_gradients(zip(gradients, variables, strict=True))


def _apply_if_finite(
    optimizer: keras.optimizers.Optimizer,
    gradients: list[_types.Gradient | None],
    variables: list[keras.Variable],
    loss_scale: LossScaleState,
    flags: _types.Tensor,
) -> None:
    """Applies the optimizer if all flags are set, and tells the loss scale."""

    def decide(
        strategy: _types.Strategy,
        flags: _types.Tensor,
        gradients: list[_types.Gradient | None],
    ) -> None:
        # The gradients are those of the whole batch, so the replicas agree.
        flags = strategy.experimental_local_results(flags)[0]
        finite = tf.reduce_all(flags)

        def apply() -> None:
            strategy.extended.call_for_each_replica(_apply, args=(optimizer, gradients, variables))

        # merge_call may not run inside a cond in replica context (tf.distribute
        # raises), and the optimizer needs one, so the branch is taken out here.
        tf.cond(finite, apply, lambda: None)
        loss_scale.update(finite, flags)

    if _keras.optimizer.updates_in_replica_context():
        tf.cond(tf.reduce_all(flags), lambda: _apply(optimizer, gradients, variables), lambda: None)
        loss_scale.update(tf.reduce_all(flags), flags)
    else:
        tf.distribute.get_replica_context().merge_call(decide, args=(flags, gradients))


def _assign_state(
    state: list[VariableUpdate], is_finite: _types.Tensor | None, loss: _types.Tensor
) -> None:
    """Writes non-trainable state back; a skipped update leaves it as it was.

    Metrics count every batch whose loss is finite, skipped or not.
    """
    for update in state:
        after = update.after
        if is_finite is not None:
            keep = is_finite | tf.math.is_finite(loss) if update.is_metric else is_finite
            after = tf.where(keep, after, update.before)
        _keras.variables.native(update.variable).assign(after)
