"""The second half of an update: exchange, divide, decide, apply."""

from __future__ import annotations

import keras

from tfbig import _keras, errors
from tfbig._update import (
    acceptance,
    apply,
    exchange,
    gathered_weights,
    half_precision_exchange,
    own_step,
    replicas,
    retried_batches,
    sharded_state,
    sharded_update,
)
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.loss_scale import LossScaleState
from tfbig._update.stop_request import StopRequest

__all__ = ("apply_gradients", "exchange_and_apply")


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    accumulated: AccumulatedGradients,
    loss_scale: LossScaleState | None = None,
    log_grad_norm: bool = False,
    exchange_dtype: str | None = None,
    exchange_bucket_bytes: int = replicas.BUCKET_BYTES,
    update_guard: acceptance.UpdateGuard | None = None,
) -> apply.Update:
    """Exchanges what the replicas accumulated and applies the optimizer once.

    The second half of an update; `tfbig.accumulate_gradients` is the first. Call it in replica
    context, which is where `train_step` runs, once for each optimizer. The gradient that the
    optimizer clips and applies is that of the whole effective batch, the same on every replica.

    Args:
        optimizer: `keras.optimizers.Optimizer`. Built, or it is built on the variables of
            `accumulated`.
        accumulated: What `accumulate_gradients` returned on this replica.
        loss_scale: The `loss_scale_state` of a model with
            `DynamicLossScalingMixin`, the same as for `accumulate_gradients`, or
            None. With it, an update with a non-finite gradient on any replica is
            skipped on all.
        log_grad_norm: Whether to compute the global norm of the gradient.
        exchange_dtype: "bfloat16" or "float16": what gradients are cast to while
            replicas exchange them. None exchanges them as they are, and is exact. Not with
            divided weights.
        exchange_bucket_bytes: Gradients are exchanged in buckets of so many bytes, one after
            another. Defaults to 32 MiB.
        update_guard: The `update_guard` of a model, which a `tfbig.callbacks.SpikeGuard` gives it,
            or None. Of several optimizers, pass it with one.

    Returns:
        An `Update`: `loss`, `is_finite`, `is_applied`, `gradient_norm`.

    Raises:
        InvalidOptionError: If an option is not valid.
    """
    apply.check_optimizer(optimizer)
    if loss_scale is not None and loss_scale.is_retrying:
        raise errors.InvalidOptionError(retried_batches.NEEDS_TFBIG_STEP)
    apply.build_optimizer(optimizer, accumulated.variables)
    exchange_dtype = half_precision_exchange.checked_dtype(exchange_dtype)
    has_divided = any(gathered_weights.is_divided(v) for v in accumulated.variables)
    if exchange_dtype is not None and has_divided:
        raise errors.InvalidOptionError(
            "`exchange_dtype` does not go with divided weights, since gradients are added up over "
            f"the replicas in each micro-batch. Received: exchange_dtype={exchange_dtype!r} and "
            "shard='weights'. Leave it out, or use shard='optimizer'."
        )
    bucket_bytes = replicas.checked_bucket_bytes(exchange_bucket_bytes)
    own_step.applies(
        loss_scale,
        log_grad_norm,
        exchange_dtype,
        bucket_bytes,
        is_sharded=sharded_state.is_divided(optimizer) or replicas.count() == 1,
        is_guarded=update_guard is not None,
    )
    return exchange_and_apply(
        optimizer,
        accumulated,
        loss_scale,
        needs_norm=log_grad_norm,
        exchange_dtype=exchange_dtype,
        bucket_bytes=bucket_bytes,
        guard=update_guard,
    )


def exchange_and_apply(
    optimizer: keras.optimizers.Optimizer,
    local: AccumulatedGradients,
    loss_scale: LossScaleState | None,
    *,
    needs_norm: bool,
    exchange_dtype: str | None,
    bucket_bytes: int,
    stop_request: StopRequest | None = None,
    guard: acceptance.UpdateGuard | None = None,
) -> apply.Update:
    """Sums what the replicas accumulated, and applies or skips the update on all of them.

    Where the optimizer's state lies decides which way the gradients take.

    Args:
        optimizer: the optimizer.
        local: what this replica accumulated.
        loss_scale: see `apply_gradients`.
        needs_norm: whether the global norm of the gradient is wanted.
        exchange_dtype: see `apply_gradients`.
        bucket_bytes: see `apply_gradients`.
        stop_request: see `exchange.all_reduce_accumulated`.
        guard: what may leave the update out, or None.
    """
    needs_norm = needs_norm or (guard is not None and guard.needs_norm)
    state = sharded_state.state_of(optimizer)
    if state is not None and local.variables:
        return sharded_update.exchange_and_apply(
            state,
            local,
            loss_scale,
            needs_norm=needs_norm,
            exchange_dtype=exchange_dtype,
            bucket_bytes=bucket_bytes,
            stop_request=stop_request,
            guard=guard,
        )
    if any(gathered_weights.is_divided(v) for v in local.variables):
        raise errors.UnsupportedModelError(
            "Divided weights need an optimizer whose state is divided as they are. Received: "
            f"{type(optimizer).__name__}, which is not. Give the model shard='weights', and let it "
            "hold the optimizer."
        )
    with _keras.stages.following(_keras.stages.in_flight_of(local.variables) is not None):
        batch = exchange.all_reduce_accumulated(local, exchange_dtype, stop_request, bucket_bytes)
        return apply.apply_to_weights(optimizer, batch, loss_scale, needs_norm, guard)
