"""The one exchange between the replicas in an update."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import (
    empty_batch,
    exchange_message,
    half_precision_exchange,
    replicas,
)
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.stop_request import StopRequest

__all__ = ("all_reduce_accumulated", "all_reduce_counts")


def all_reduce_counts(counts: _types.Tensor | None) -> _types.Tensor | None:
    """Sums what `MicroBatches.counts` returned over all replicas."""
    return None if counts is None else replicas.all_reduce_sum([counts])[0]


def all_reduce_accumulated(
    local: AccumulatedGradients,
    exchange_dtype: str | None = None,
    stop_request: StopRequest | None = None,
    bucket_bytes: int = replicas.BUCKET_BYTES,
) -> AccumulatedGradients:
    """Sums what the replicas accumulated, in one exchange. In replica context.

    Args:
        local: what this replica accumulated.
        exchange_dtype: dtype to which gradients are cast for the exchange, or None. With it, what
            they are divided by is exchanged before them, and the rest after them.
        stop_request: travels with the gradients, so that all workers know of it after the same
            update; or None.
        bucket_bytes: the gradients are sent in buckets of so many bytes, one after another.

    Returns:
        That of the whole batch, the same on every replica.
    """
    batch = local
    stop = None if stop_request is None else stop_request.sent()
    if replicas.count() > 1:
        message = _message(local, stop)
        stages = [
            _keras.stages.stage_of(variable)
            for variable, gradient in zip(local.variables, local.gradients, strict=True)
            if gradient is not None
        ]
        if any(stages):
            summed = _all_reduce_by_stage(message, stages, bucket_bytes)
        else:
            summed = _all_reduce(
                message, exchange_dtype, bucket_bytes, is_checked=local.loss_scale is None
            )
        batch = _received(local, summed)
        stop = summed.scalars.stop
    if stop_request is not None:
        stop_request.receive(stop)
    return batch.with_rows_added_up(replicas.count())


def _message(local: AccumulatedGradients, stop: _types.Tensor | None) -> exchange_message.Message:
    """What this replica sends."""
    dtype = local.loss.dtype
    context = tf.distribute.get_replica_context()
    has_samples = tf.cast(local.samples > 0, dtype)
    is_first = tf.cast(tf.equal(context.replica_id_in_sync_group, 0), dtype)
    return exchange_message.Message(
        gradients=[g for g in local.gradients if g is not None],
        scalars=exchange_message.Scalars(
            loss=local.loss,
            weight=local.weight,
            active_replicas=has_samples,
            samples=tf.cast(local.samples, dtype),
            stop=tf.zeros((), dtype) if stop is None else tf.cast(stop, dtype),
            values=tf.nest.flatten(local.values),
            logs=[has_samples * tf.cast(v, dtype) for v in tf.nest.flatten(local.logs)],
            noise_moments=local.noise_moments,
        ),
        state=[
            update.contribution(has_samples, is_first, dtype)
            for update in local.state
            if update.is_exchanged
        ],
    )


def _all_reduce(
    message: exchange_message.Message,
    exchange_dtype: str | None,
    bucket_bytes: int,
    is_checked: bool,
) -> exchange_message.Message:
    """The sum of the messages of all replicas."""
    if exchange_dtype is None:
        # Of one dtype, the widest, so that all go in one package.
        dtype = message.scalars.loss.dtype
        message = dataclasses.replace(
            message, gradients=[_cast(g, dtype) for g in message.gradients]
        )
        return message.unpack(replicas.all_reduce_sum(message.pack(), bucket_bytes))
    gradients = half_precision_exchange.sum_gradients(
        exchange_dtype,
        message.gradients,
        replicas.all_reduce_sum([message.scalars.weight])[0],
        bucket_bytes,
        # With a loss scale, an update that overflows is skipped.
        is_checked=is_checked,
    )
    # Not in half precision, and known after the gradients.
    rest = dataclasses.replace(message, gradients=[])
    summed = rest.unpack(replicas.all_reduce_sum(rest.pack()))
    return dataclasses.replace(summed, gradients=gradients)


def _all_reduce_by_stage(
    message: exchange_message.Message,
    stages: list[_keras.stages.Stage | None],
    bucket_bytes: int,
) -> exchange_message.Message:
    """The sum of the messages of all replicas, of which each stage exchanges its gradients.

    Args:
        message: what this replica sends.
        stages: the stage of each gradient.
        bucket_bytes: see `all_reduce_accumulated`.
    """
    rest = dataclasses.replace(message, gradients=[])
    summed = rest.unpack(replicas.all_reduce_sum(rest.pack()))
    gradients = list(message.gradients)
    for stage in dict.fromkeys(stages):
        own = [i for i, other in enumerate(stages) if other is stage]
        sums = replicas.all_reduce_sum([gradients[i] for i in own], bucket_bytes, stage)
        for i, gradient in zip(own, sums, strict=True):
            gradients[i] = gradient
    return dataclasses.replace(summed, gradients=gradients)


def _received(
    local: AccumulatedGradients, summed: exchange_message.Message
) -> AccumulatedGradients:
    """What all replicas accumulated, from the sum of their messages."""
    scalars, active_replicas = summed.scalars, summed.scalars.active_replicas
    gradients, state = iter(summed.gradients), iter(summed.state)
    return dataclasses.replace(
        local,
        gradients=[None if g is None else _cast(next(gradients), g.dtype) for g in local.gradients],
        weight=empty_batch.refuse_without_active_replicas(scalars.weight, active_replicas),
        loss=scalars.loss,
        values=tf.nest.pack_sequence_as(local.values, scalars.values),
        samples=tf.cast(scalars.samples, tf.int32),
        state=[
            update.with_sum(next(state), active_replicas, replicas.count())
            if update.is_exchanged
            else update
            for update in local.state
        ],
        logs=tf.nest.pack_sequence_as(local.logs, [v / active_replicas for v in scalars.logs]),
        noise_moments=scalars.noise_moments,
    )


def _cast(gradient: _types.Gradient, dtype: _types.DType) -> _types.Gradient:
    return gradient if isinstance(gradient, tf.IndexedSlices) else tf.cast(gradient, dtype)
