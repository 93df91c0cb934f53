"""An update after the exchange: divide, decide, apply."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._update import acceptance, accumulators
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.loss_scale import LossScaleState
from tfbig._update.variable_update import VariableUpdate

__all__ = (
    "Update",
    "apply_to_weights",
    "assign_without_gradients",
    "build_optimizer",
    "check_optimizer",
    "finish",
    "gradients_of_loss",
    "is_reported",
    "tell_loss_scale",
)


@dataclasses.dataclass
class Update:
    """What an update did; the same on every replica.

    Attributes:
        loss: float scalar, the loss of the effective batch.
        values: structure of float scalars, further means over the effective batch.
        is_finite: bool scalar; False if the update was skipped for a gradient
            that is not finite. None where nothing checks, because there is no
            loss scale.
        is_applied: bool scalar; False if the update was skipped, for whatever
            reason. None where none is.
        is_repeated: bool scalar; True if the update was skipped and its batch will
            be run again. None where none is.
        gradient_norm: float scalar, the global norm of the gradient before
            clipping, or None.
        samples: int32 scalar, samples of the effective batch.
        logs: logs of the last micro-batch.
        noise_moments: see `AccumulatedGradients`.
    """

    loss: _types.Tensor
    values: _types.Structure
    is_finite: _types.Tensor | None
    is_applied: _types.Tensor | None
    is_repeated: _types.Tensor | None
    gradient_norm: _types.Tensor | None
    samples: _types.Tensor
    logs: _types.Structure
    noise_moments: _types.Tensor


def apply_to_weights(
    optimizer: keras.optimizers.Optimizer,
    batch: AccumulatedGradients,
    loss_scale: LossScaleState | None,
    needs_norm: bool,
    guard: acceptance.UpdateGuard | None = None,
) -> Update:
    """Applies the optimizer, or skips the update, and assigns what the forward passes changed.

    Args:
        optimizer: the optimizer.
        batch: what all replicas accumulated, after the exchange.
        loss_scale: see `exchange_and_apply.apply_gradients`.
        needs_norm: whether the global norm of the gradient is wanted.
        guard: what may leave the update out, or None.
    """
    gradients = gradients_of_loss(batch)
    norm = global_norm(gradients) if needs_norm else None
    flags = None if loss_scale is None else _finite_flags(gradients)
    states = acceptance.assigned(loss_scale, guard)
    with _keras.variables.assigned_locally([*optimizer.variables, *batch.variables, *states]):
        decision = acceptance.decide(batch, flags, norm, loss_scale, guard)
        if decision.is_applied is None:
            # The optimizer's counter would not depend on the gradients otherwise.
            with tf.control_dependencies([batch.weight]):
                _apply(optimizer, gradients, batch.variables)
        else:
            _apply_if(decision.is_applied, optimizer, gradients, batch.variables)
        if loss_scale is not None:
            tell_loss_scale(loss_scale, flags)
    return finish(batch, decision, norm)


def finish(
    batch: AccumulatedGradients, decision: acceptance.Decision, norm: _types.Tensor | None
) -> Update:
    """Assigns what the forward passes changed, after the optimizer was applied or skipped.

    Args:
        batch: what all replicas accumulated, after the exchange.
        decision: what became of the update.
        norm: see `Update.gradient_norm`.
    """
    loss, values = _means(batch)
    with _keras.variables.assigned_locally([u.variable for u in batch.state]):
        _assign_state(batch.state, decision, loss)
    return Update(
        loss=loss,
        values=values,
        is_finite=decision.is_finite,
        is_applied=decision.is_applied,
        is_repeated=decision.is_repeated,
        gradient_norm=norm,
        samples=batch.samples,
        logs=batch.logs,
        noise_moments=batch.noise_moments,
    )


def tell_loss_scale(loss_scale: LossScaleState, flags: _types.Tensor) -> None:
    """Tells the loss scale which gradients were finite, the same on every replica."""

    def tell(strategy: _types.Strategy, flags: _types.Tensor) -> None:
        flags = strategy.experimental_local_results(flags)[0]
        loss_scale.update(tf.reduce_all(flags), flags)

    if _keras.optimizer.updates_in_replica_context():
        loss_scale.update(tf.reduce_all(flags), flags)
    else:
        tf.distribute.get_replica_context().merge_call(tell, args=(flags,))


def assign_without_gradients(batch: AccumulatedGradients) -> Update:
    """The `Update` of an evaluation: losses and metrics, no optimizer.

    Args:
        batch: what all replicas accumulated, after the exchange.
    """
    return finish(batch, acceptance.Decision(), None)


def is_reported(update: Update) -> _types.Tensor:
    """Whether the update's loss counts in the loss metric."""
    if update.is_applied is None:
        # Not a constant: a count of losses would go up when the data have ended.
        with tf.control_dependencies([] if tf.executing_eagerly() else [update.loss]):
            return tf.identity(True)
    is_reported = update.is_applied | tf.math.is_finite(update.loss)
    return is_reported if update.is_repeated is None else is_reported & ~update.is_repeated


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
    for part in (optimizer, *_keras.optimizer.parts_of(optimizer)):
        for name, remedy in remedies.items():
            value = getattr(part, name, None)
            if value is not None:
                raise errors.InvalidOptionError(
                    f"`optimizer.{name}` must be None: tfbig does it once per update of the whole "
                    f"effective batch. Received: {name}={value}. {remedy}."
                )


def build_optimizer(optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]) -> None:
    """Builds an optimizer that is not built, in a step, which may be traced."""
    if not getattr(optimizer, "built", True):
        _keras.building.create_in_step(lambda: optimizer.build(variables))


def global_norm(gradients: list[_types.Gradient | None]) -> _types.Tensor:
    """Global norm of a list of gradients, without those that are None."""
    return tf.linalg.global_norm([tf.convert_to_tensor(g) for g in gradients if g is not None])


def _means(batch: AccumulatedGradients) -> tuple[_types.Tensor, _types.Structure]:
    """The loss of the effective batch, and the further values."""

    def mean(total: _types.Tensor) -> _types.Tensor:
        return tf.math.divide_no_nan(total, batch.weight)

    return mean(batch.loss), tf.nest.map_structure(mean, batch.values)


def gradients_of_loss(batch: AccumulatedGradients) -> list[_types.Gradient | None]:
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
    """Vector of booleans: for each gradient, whether all its values are finite. True of none."""
    flags = [
        tf.constant(True) if g is None else tf.reduce_all(tf.math.is_finite(accumulators.values(g)))
        for g in gradients
    ]
    return tf.stack(flags or [tf.constant(True)])


def _apply(
    optimizer: keras.optimizers.Optimizer,
    gradients: list[_types.Gradient | None],
    variables: list[keras.Variable],
) -> None:
    if not variables:
        return  # Keras leaves the optimizer out, too.
    # Under a strategy, a thread of its own runs it, in no context of another.
    is_staged = _keras.stages.in_flight_of(variables) is not None
    with _keras.optimizer.without_exchange(), _keras.stages.following(is_staged):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))


def _apply_if(
    condition: _types.Tensor,
    optimizer: keras.optimizers.Optimizer,
    gradients: list[_types.Gradient | None],
    variables: list[keras.Variable],
) -> None:
    """Applies the optimizer if the condition holds, which is the same on every replica."""

    def branch(
        strategy: _types.Strategy,
        condition: _types.Tensor,
        gradients: list[_types.Gradient | None],
    ) -> None:
        def apply() -> None:
            strategy.extended.call_for_each_replica(_apply, args=(optimizer, gradients, variables))

        # merge_call may not run inside a cond in replica context (tf.distribute
        # raises), and the optimizer needs one, so the branch is taken out here.
        condition = strategy.experimental_local_results(condition)[0]
        tf.cond(condition, apply, lambda: None)

    if _keras.optimizer.updates_in_replica_context():
        tf.cond(condition, lambda: _apply(optimizer, gradients, variables), lambda: None)
    else:
        tf.distribute.get_replica_context().merge_call(branch, args=(condition, gradients))


def _assign_state(
    state: list[VariableUpdate], decision: acceptance.Decision, loss: _types.Tensor
) -> None:
    """Writes non-trainable state back; a skipped update leaves it as it was.

    Metrics count every batch whose loss is finite, skipped or not, but once.
    """
    is_applied, is_repeated = decision.is_applied, decision.is_repeated
    for update in state:
        after = update.after
        if is_applied is not None:
            keep = is_applied
            if update.is_metric:
                keep |= tf.math.is_finite(loss)
                keep = keep if is_repeated is None else keep & ~is_repeated
            after = tf.where(keep, after, update.before)
        _keras.variables.native(update.variable).assign(after)
