"""A replica context of TensorFlow adds up and gathers; here it also scatters.

`tf.distribute` hands every replica the whole sum. What is divided over the replicas needs only
its part of it, at half of the traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf
from tensorflow.python.distribute import collective_util as _collective_util
from tensorflow.python.distribute import cross_device_ops as _cross_device_ops
from tensorflow.python.ops import gen_collective_ops as _collective_ops

from tfbig import _types
from tfbig._keras.devices import STRATEGIES, devices_of
from tfbig._keras.gradients import let_go_with_graph

__all__ = (
    "all_gather",
    "all_reduce",
    "exchange_on",
    "local_replicas",
    "reduce_scatter",
    "replica_id",
    "strategy_of_replica",
    "sum_on",
    "while_loop",
)


def replica_id() -> int:
    """The number of the replica whose context this is, known while it is traced."""
    return int(tf.distribute.get_replica_context()._replica_id_in_sync_group)


def strategy_of_replica() -> _types.Strategy | None:
    """The strategy in whose replica context this is; None outside of one."""
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return None
    return tf.distribute.get_strategy()


def local_replicas(strategy: _types.Strategy) -> dict[int, str]:
    """The replicas of this process: their numbers, and the devices that they run on."""
    is_known = isinstance(strategy, STRATEGIES)
    # The default strategy names no devices.
    devices = strategy.extended.worker_devices if is_known else devices_of(strategy)
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        first = strategy.cluster_resolver.task_id * len(devices)
        return {first + i: device for i, device in enumerate(devices)}
    return dict(enumerate(devices))


def while_loop(
    is_left: Callable[..., _types.Tensor],
    body: Callable[..., tuple[_types.Structure, ...]],
    start: tuple[_types.Structure, ...],
) -> tuple[_types.Structure, ...]:
    """A `tf.while_loop` in which collectives may stand. All replicas must run it as often.

    In a graph.

    TensorFlow lowers a loop into its graph, and tells iterations by the name of the loop: a
    collective would wait for ever for that of another replica of this process, whose loop has
    another name. Here it stays a function, in which there is nothing to tell.
    """
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    results: tuple[_types.Structure, ...]
    results = tf.while_loop(is_left, body, start, parallel_iterations=1)
    if len(local_replicas(tf.distribute.get_strategy())) > 1:
        for operation in graph.get_operations()[before:]:
            if operation.type in ("StatelessWhile", "While"):
                is_lowered = tf.compat.v1.AttrValue(b=False)
                operation._set_attr("_lower_using_switch_merge", is_lowered)
    return results


def reduce_scatter(rows: _types.Tensor, summed_as: _types.DType) -> _types.Tensor:
    """Adds up a matrix over all replicas; each receives the row of its number.

    In replica context, where every replica must call it. Nothing of the others' rows arrives.

    Args:
        rows: `(replicas, elements)`, a floating-point dtype.
        summed_as: dtype in which the values are added up.

    Returns:
        `(elements,)`, of the dtype `summed_as`.
    """
    replicas, elements = rows.shape
    if tf.executing_eagerly():
        # Replicas run one after another there, and the first would wait for the others.
        return all_reduce([tf.cast(rows, summed_as)])[0][replica_id()]
    if _is_on_gpu() and rows.dtype == summed_as:
        scattered = _run(
            _collective_ops.collective_reduce_scatter_v2, rows, merge_op="Add", final_op="Id"
        )
        return tf.ensure_shape(tf.reshape(scattered, [-1]), [elements])
    # There is no kernel for the CPU: each sends every other one its row, and adds what it receives.
    received = _with_known_dtype(_collective_ops.collective_all_to_all_v2, rows)
    received = tf.ensure_shape(received, [replicas, elements])
    return tf.reduce_sum(tf.cast(received, summed_as), axis=0)


def all_reduce(values: Sequence[_types.Gradient]) -> list[_types.Gradient]:
    """The sum of each value over all replicas, in one exchange. In replica context.

    Args:
        values: Tensors and `tf.IndexedSlices`, as many and of the same dtypes on every replica.
    """
    sums = list(tf.distribute.get_replica_context().all_reduce("SUM", list(values)))
    if all(isinstance(v, tf.Tensor) for v in values):
        # TensorFlow gives it a gradient, which nothing here takes.
        let_go_with_graph(sums)
    return sums


def all_gather(row: _types.Tensor) -> _types.Tensor:
    """The rows of all replicas, in their order. In replica context.

    Args:
        row: `(elements,)`, as many on each replica.

    Returns:
        `(replicas, elements)`.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    gathered = _with_known_dtype(_collective_ops.collective_gather_v2, row[tf.newaxis])
    return tf.ensure_shape(gathered, [replicas, *row.shape])


def exchange_on(devices: tuple[str, ...], strategy: _types.Strategy) -> _types.AnyFunction:
    """What exchanges between further devices of the replicas, one of each.

    The strategy's own exchange would bring all to the replicas' first devices. To be called first
    in cross-replica context, for the same groups of devices in the same order on all workers.

    Args:
        devices: full names, one for each replica of this process.
        strategy: the strategy of the replicas.

    Returns:
        A function of the index of a replica of this process, which returns the launcher of its
        collectives.
    """
    known: dict[tuple[str, ...], _types.AnyFunction] = vars(strategy.extended).setdefault(
        "_tfbig_exchanges", {}
    )
    if devices not in known:
        operations = _cross_device_ops.CollectiveAllReduce(
            devices=devices,
            # Not the number of these devices, which are those of this process alone.
            group_size=strategy.num_replicas_in_sync,
            options=_collective_util.Options(),
            collective_keys=strategy.extended._collective_keys,
        )
        known[devices] = operations._launchers.__getitem__
    return known[devices]


def sum_on(devices: tuple[str, ...], tensors: Sequence[_types.Gradient]) -> list[_types.Gradient]:
    """Sums tensors over all replicas, on further devices of theirs. In replica context.

    Args:
        devices: as of `exchange_on`.
        tensors: those of this replica, on its device of these.
    """
    strategy = tf.distribute.get_strategy()
    index = replica_id() - min(local_replicas(strategy))
    launcher = exchange_on(devices, strategy)(index)
    dense = [t for t in tensors if not isinstance(t, tf.IndexedSlices)]
    sums = iter(launcher.batch_all_reduce([dense]) if dense else [])
    return [
        launcher.all_reduce_indexed_slices(t) if isinstance(t, tf.IndexedSlices) else next(sums)
        for t in tensors
    ]


def _with_known_dtype(operation: _types.AnyFunction, tensor: _types.Tensor) -> _types.Tensor:
    """Runs a collective that moves values; those of bfloat16, which it does not know, as bits."""
    if tensor.dtype == tf.bfloat16:
        moved = _run(operation, tf.bitcast(tensor, tf.float16))
        return tf.bitcast(moved, tf.bfloat16)
    return _run(operation, tensor)


def _is_on_gpu() -> bool:
    devices = tf.distribute.get_strategy().extended.worker_devices
    return all("GPU" in device for device in devices)


def _run(operation: _types.AnyFunction, tensor: _types.Tensor, **options: str) -> _types.Tensor:
    """Runs a collective among all replicas.

    With the keys and the ordering token of the strategy's own collectives, which it then neither
    overtakes nor is taken for.
    """
    if tf.executing_eagerly():
        return tf.distribute.get_replica_context().all_gather(tensor, axis=0)
    strategy = tf.distribute.get_strategy()
    own = strategy.extended
    launchers = (getattr(own, "_collective_ops", None) or own._cross_device_ops)._launchers
    launcher = launchers[own._get_local_replica_id(replica_id())]
    token = launcher._get_ordering_token()
    with tf.device(launcher._device):
        return operation(
            tf.identity(tensor),
            group_size=strategy.num_replicas_in_sync,
            group_key=launcher._group_key,
            instance_key=launcher._next_instance_key(),
            ordering_token=[] if token is None else [token],
            **options,
        )
