"""One update: unscale, clip, apply or skip."""

import dataclasses

import keras
import tensorflow as tf

from tfbig import _keras, errors
from tfbig._update import accumulators, exchange, own_step

__all__ = ("Update", "apply_gradients")


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
        moments: see `AccumulatedGradients`.
        stop: float scalar, how many replicas ask to stop; or None.
    """

    loss: tf.Tensor
    values: list | dict
    is_finite: tf.Tensor | None
    gradient_norm: tf.Tensor | None
    samples: tf.Tensor
    logs: dict
    moments: tf.Tensor
    stop: tf.Tensor | None = None


def global_norm(gradients):
    """Global norm of a list of gradients, None among them left out."""
    return tf.linalg.global_norm([tf.convert_to_tensor(g) for g in gradients if g is not None])


def _finite_flags(gradients):
    """Vector of booleans, one a gradient: whether all its values are finite."""
    flags = [
        tf.constant(True) if g is None else tf.reduce_all(tf.math.is_finite(accumulators.values(g)))
        for g in gradients
    ]
    return tf.stack(flags)


def _divide(gradient, divisor):
    return accumulators.map_values(
        lambda v: tf.math.divide_no_nan(v, tf.cast(divisor, v.dtype)), gradient
    )


def apply_gradients(
    optimizer, accumulated, loss_scale=None, log_grad_norm=False, exchange_dtype=None
):
    """Exchanges what the replicas accumulated and applies the optimizer once.

    The second half of an update; `tfbig.accumulate_gradients` is the first. To be
    called in replica context, which is where `train_step` runs, once for each
    optimizer. The gradient that the optimizer clips and applies is that of the
    whole effective batch, the same on every replica.

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

    Returns:
        An `Update`: `loss`, `is_finite`, `gradient_norm`.
    """
    check_optimizer(optimizer)
    exchange_dtype = exchange.checked_dtype(exchange_dtype)
    own_step.applies(loss_scale, log_grad_norm, exchange_dtype)
    batch = exchange.all_reduce_accumulated(accumulated, exchange_dtype)
    loss = tf.math.divide_no_nan(batch.loss, batch.weight)
    values = tf.nest.map_structure(lambda v: tf.math.divide_no_nan(v, batch.weight), batch.values)
    # Two divisions: the scale is a power of two as a rule, and dividing by it
    # alone is exact.
    gradients = [_divide(g, batch.weight) for g in batch.gradients]
    if batch.loss_scale is not None:
        gradients = [_divide(g, batch.loss_scale) for g in gradients]
    measures_noise = batch.moments.shape[0] != 0
    norm = global_norm(gradients) if log_grad_norm or measures_noise else None

    finite = None
    assigned = [*optimizer.variables, *batch.variables, *(c.variable for c in batch.state)]
    with _keras.variables.exchanged_already(
        assigned + (loss_scale.variables() if loss_scale else [])
    ):
        if loss_scale is None:
            # The optimizer's counter does not depend on the gradients otherwise.
            with tf.control_dependencies([batch.weight]):
                _apply(optimizer, gradients, batch.variables)
        else:
            flags = _finite_flags(gradients)
            finite = tf.reduce_all(flags)
            _apply_if_finite(optimizer, gradients, batch.variables, loss_scale, flags)
        _assign_state(batch.state, finite, loss)
    return Update(loss, values, finite, norm, batch.samples, batch.logs, batch.moments, batch.stop)


def without_gradients(accumulated):
    """The `Update` of an evaluation: losses and metrics, no optimizer."""
    batch = exchange.all_reduce_accumulated(accumulated)
    with _keras.variables.exchanged_already([c.variable for c in batch.state]):
        _assign_state(batch.state, None, None)
    return Update(
        tf.math.divide_no_nan(batch.loss, batch.weight),
        tf.nest.map_structure(lambda v: tf.math.divide_no_nan(v, batch.weight), batch.values),
        None,
        None,
        batch.samples,
        batch.logs,
        batch.moments,
    )


def _apply(optimizer, gradients, variables):
    with _keras.optimizer.aggregated_gradients():
        optimizer.apply_gradients(zip(gradients, variables, strict=True))


def _apply_if_finite(optimizer, gradients, variables, loss_scale, flags):
    def decide(strategy, flags, gradients):
        # The gradients are those of the whole batch, so the replicas agree.
        flags = strategy.experimental_local_results(flags)[0]
        finite = tf.reduce_all(flags)

        def apply():
            strategy.extended.call_for_each_replica(_apply, args=(optimizer, gradients, variables))

        # merge_call may not run inside a cond in replica context (tf.distribute
        # raises), and the optimizer needs one, so the branch is taken out here.
        tf.cond(finite, apply, lambda: None)
        loss_scale.update(finite, flags)

    if _keras.optimizer.needs_no_merge_call():
        tf.cond(tf.reduce_all(flags), lambda: _apply(optimizer, gradients, variables), lambda: None)
        loss_scale.update(tf.reduce_all(flags), flags)
    else:
        tf.distribute.get_replica_context().merge_call(decide, args=(flags, gradients))


def _assign_state(state, finite, loss):
    """Writes non-trainable state back; a skipped update leaves it as it was.

    Metrics count every batch whose loss is finite, skipped or not.
    """
    for change in state:
        after = change.after
        if finite is not None:
            keep = finite | tf.math.is_finite(loss) if change.is_metric else finite
            after = tf.where(keep, after, change.before)
        _keras.variables.native(change.variable).assign(after)


def is_reported(update):
    """Whether the update's loss counts in the loss metric."""
    if update.is_finite is None:
        return tf.constant(True)
    return update.is_finite | tf.math.is_finite(update.loss)


def check_optimizer(optimizer):
    """Raises for an optimizer that accumulates or scales by itself."""
    if isinstance(optimizer, _keras.optimizer.LossScaleOptimizer):
        raise errors.InvalidOptionError(
            "`optimizer` must not be wrapped in `LossScaleOptimizer`: tfbig scales the loss. "
            "Pass the inner optimizer, and to the model "
            f"`loss_scale=tfbig.DynamicLossScale(initial_scale={optimizer.initial_scale}, "
            f"growth_interval={optimizer.dynamic_growth_steps})`. If "
            "Keras wrapped it, pass auto_scale_loss=False to `compile`."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return
    for name in ("gradient_accumulation_steps", "loss_scale_factor"):
        value = getattr(optimizer, name, None)
        if value is not None:
            remedy = {
                "gradient_accumulation_steps": "Give it to the model instead",
                "loss_scale_factor": "Give `loss_scale` to the model instead",
            }[name]
            raise errors.InvalidOptionError(
                f"`optimizer.{name}` must be None: tfbig does it once per update of the whole "
                f"effective batch. Received: {name}={value}. {remedy}."
            )
