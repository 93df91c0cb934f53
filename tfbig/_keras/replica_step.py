"""Keras gives a batch whole to each replica and averages their logs; here both are of one batch."""

import functools
from collections.abc import Callable
from typing import TypeVar

import keras
import tensorflow as tf

from tfbig import _types
from tfbig._keras.batches import batch_size, is_distributed, of_one_size, slice_samples
from tfbig._keras.thread import holding
from tfbig._keras.variables import is_summed

# A step: a function of a replica's share of a batch, which returns logs.
Step = TypeVar("Step", bound=_types.AnyFunction)


def returns_global_logs(step: Step) -> Step:
    """Marks a step whose logs are those of all replicas, on every replica."""
    vars(step)["returns_global_logs"] = True
    return step


def has_global_logs(step: _types.AnyFunction) -> bool:
    """Whether a step is marked with `returns_global_logs`."""
    return bool(getattr(step, "returns_global_logs", False))


def share_of_replica(data: _types.Structure) -> _types.Structure:
    """The part of a global batch that this replica trains on. In replica context."""
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync
    if replicas == 1:
        return data
    data = of_one_size(data)
    size = batch_size(data)
    index = tf.cast(context.replica_id_in_sync_group, tf.int32)
    if isinstance(size, int) and size % replicas == 0:
        # The shape is then static, which a TPU needs.
        return slice_samples(data, index * (size // replicas), size // replicas)
    # The first replicas get more, as from a distributed dataset. The placeholder hides the size:
    # a share that is known to be empty while tracing would leave out what other replicas do.
    size = tf.compat.v1.placeholder_with_default(tf.cast(size, tf.int32), [])
    begin, end = ((i * size + replicas - 1) // replicas for i in (index, index + 1))
    return slice_samples(data, begin, end - begin)


def leaving_out_empty_shares(
    model: keras.Model, step: Callable[[_types.Structure], _types.Logs]
) -> Callable[[_types.Structure], _types.Logs]:
    """A `test_step` of a user's own in which a replica without samples counts in no metric.

    A mean over no samples is no number, and would be the result of the whole evaluation.
    """

    @functools.wraps(step)
    def left_out(data: _types.Structure) -> _types.Logs:
        if tf.distribute.get_replica_context().num_replicas_in_sync == 1:
            return step(data)
        before = [
            [(v, tf.identity(v.value)) for v in metric.variables]
            for metric in model.metrics
            if metric.variables and all(is_summed(v) for v in metric.variables)
        ]
        logs = step(data)
        is_empty = tf.equal(batch_size(data), 0)
        for pairs in before:
            is_number = [tf.reduce_all(tf.math.is_finite(v.value)) for v, _ in pairs]
            is_left_out = is_empty & ~tf.reduce_all(is_number)
            for variable, value in pairs:
                variable.assign(tf.where(is_left_out, value, variable.value))
        return logs

    return left_out


def _timed(clock: object, step: _types.AnyFunction, data: _types.Structure) -> _types.Structure:
    """Runs a step with a `StageClock`, in the thread of the replica."""
    with holding("stage_clock", clock):
        return step(data)


def run(
    model: keras.Model,
    replica_step: Callable[[_types.Structure], _types.Structure],
    data: _types.Structure,
    is_share: bool = False,
) -> _types.Structure:
    """Runs a step on all replicas and returns its logs, combined into those of the whole batch.

    Args:
        model: the model that the step trains or evaluates.
        replica_step: function of a replica's share of `data`.
        data: a batch, or a distributed value.
        is_share: whether `data` is what another step returned on each replica, and not a batch.
    """
    strategy = model.distribute_strategy
    timed_step = functools.partial(_timed, model.stage_clock, replica_step)
    if strategy.num_replicas_in_sync == 1:
        return strategy.run(timed_step, args=(data,))
    is_global = has_global_logs(replica_step) and all(is_summed(v) for v in model.metrics_variables)

    is_cut = is_share or is_distributed(data)

    def step(data: _types.Structure) -> _types.Structure:
        data = data if is_cut else share_of_replica(data)
        logs = timed_step(data)
        if is_global or not logs:
            return logs
        dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        # Those of no samples may be no numbers.
        counts = tf.constant(True) if is_share else tf.greater(batch_size(data), 0)
        values = [tf.cast(v, dtype) for v in tf.nest.flatten(logs)]
        values = [tf.where(counts, v, tf.zeros_like(v)) for v in values]
        *totals, number = tf.distribute.get_replica_context().all_reduce(
            "SUM", [*values, tf.cast(counts, dtype)]
        )
        return tf.nest.pack_sequence_as(logs, [total / number for total in totals])

    logs = tf.nest.map_structure(
        lambda v: strategy.experimental_local_results(v)[0], strategy.run(step, args=(data,))
    )
    if isinstance(logs, dict) and not is_global:
        results = model.get_metrics_result()
        logs |= {k: v for k, v in results.items() if k in logs}
    return logs
