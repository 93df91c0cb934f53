"""A replica context of TensorFlow adds up and gathers; here it also scatters.

`tf.distribute` hands every replica the whole sum. What is divided over the replicas needs only
its part of it, at half of the traffic.
"""

from __future__ import annotations

import collections
import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf
from tensorflow.python.distribute import collective_util as _collective_util
from tensorflow.python.distribute import cross_device_ops as _cross_device_ops
from tensorflow.python.ops import gen_collective_ops as _collective_ops

from tfbig import _types, errors
from tfbig._keras.collective_keys import next_keys
from tfbig._keras.devices import STRATEGIES, devices_of
from tfbig._keras.gradients import let_go_with_graph
from tfbig._keras.graph_errors import EXCHANGES_DIFFER
from tfbig._keras.independence import run_independently

__all__ = (
    "UnderWay",
    "all_gather",
    "all_reduce",
    "check_same",
    "exchange_on",
    "local_replicas",
    "parts_of",
    "reduce_scatter",
    "replica_id",
    "strategy_of_replica",
    "sum_on",
    "while_loop",
)

# Between processes, a collective is one message to each other process, which gRPC copies several
# times, one copy after another, into memory that the operating system gives and takes back each
# time. In parts of this size the copies of several overlap, and their memory is used again: an
# update of two workers takes 0.7 to 0.8 times the time. With 1 or 4 MiB it is much the same.
_PART_BYTES = 2 * 2**20

# However small a bucket is: each part is a few operations of the graph.
_SMALLEST_PART_BYTES = 64 * 2**10


def parts_of(bucket_bytes: int, dtype: _types.DType, most: int | None = None) -> tuple[int, int]:
    """The length of the parts of an exchange, and how many are under way. In replica context.

    Args:
        bucket_bytes: how many bytes are under way.
        dtype: dtype of what is exchanged.
        most: how many parts are under way at most.

    Returns:
        Elements, and parts; all of a bucket and 1 where exchanges do not go in parts.
    """
    if not _goes_in_parts():
        return max(1, bucket_bytes // dtype.size), 1
    smallest = min(_SMALLEST_PART_BYTES, _PART_BYTES)
    length = max(1, min(_PART_BYTES, max(bucket_bytes // (most or 1), smallest)) // dtype.size)
    fitting = max(1, bucket_bytes // (length * dtype.size))
    return length, fitting if most is None else min(most, fitting)


def check_same(exchange: str, tensors: Sequence[_types.Gradient]) -> None:
    """Fails on all replicas if their exchanges in parts differ. In replica context.

    Otherwise, they would wait for ever for parts that the others do not send.

    Args:
        exchange: says what is exchanged, the same on all replicas.
        tensors: what this replica sends. The check begins when they are there, not before it is
            known that there is data for another update.
    """
    if not _goes_in_parts():
        return
    with tf.control_dependencies(tf.nest.flatten(list(tensors), expand_composites=True)):
        own = tf.constant([zlib.crc32(exchange.encode()) - 2**31])
    received = _run(_launcher(), _collective_ops.collective_gather_v2, own, is_part=True)
    is_same = tf.reduce_all(tf.equal(received, own))
    run_independently(tf.raw_ops.Assert(condition=is_same, data=[EXCHANGES_DIFFER]))


class UnderWay:
    """The exchanges that are under way, of which there are only so many at a time.

    The copies that an exchange makes then take the memory of these.

    Args:
        most: how many there are at a time.
    """

    def __init__(self, most: int) -> None:
        self._received: collections.deque[_types.Tensor] = collections.deque(maxlen=most)

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Within it, what is sent next waits until there are fewer."""
        is_full = len(self._received) == self._received.maxlen
        waits: contextlib.AbstractContextManager[object]
        waits = tf.control_dependencies([self._received[0]] if is_full else [])
        return waits

    def add(self, received: _types.Tensor) -> None:
        """Counts an exchange as under way until what it brings is there."""
        if not tf.executing_eagerly():
            self._received.append(received)


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
                _check_device(operation)
                is_lowered = tf.compat.v1.AttrValue(b=False)
                operation._set_attr("_lower_using_switch_merge", is_lowered)
    return results


def _check_device(loop: tf.Operation) -> None:
    """Raises if a loop that stays a function reads what lies on another device.

    TensorFlow would fail to place it. Variables have a copy on each device, look-up tables none.
    """
    own = tf.DeviceSpec.from_string(_launcher()._device)
    for tensor in loop.inputs:
        device = tensor.dtype == tf.resource and _device_of_captured(tensor)
        if device and not _is_same_device(tf.DeviceSpec.from_string(device), own):
            raise errors.UnsupportedModelError(
                "Where several replicas of one process exchange in each micro-batch, a layer can "
                "only read what lies on the device of its replica. Received: a resource on "
                f"{device}, such as the table of StringLookup, IntegerLookup or "
                f"TextVectorization, read on {own.to_string()}. Look up in the dataset, "
                "`dataset.map(lambda x, y: (layer(x), y))`, or use shard='optimizer'."
            )


def _is_same_device(a: tf.DeviceSpec, b: tf.DeviceSpec) -> bool:
    return (a.device_type, a.device_index) == (b.device_type, b.device_index)


def _device_of_captured(tensor: _types.Tensor) -> str | None:
    """The device of what a function captures from outside, as far as that is known."""
    while hasattr(tensor, "graph") and not hasattr(tensor, "numpy"):
        captures = {id(inner): outer for outer, inner in getattr(tensor.graph, "captures", [])}
        if id(tensor) not in captures:
            return None
        tensor = captures[id(tensor)]
    return str(tensor.device)


def reduce_scatter(
    rows: _types.Tensor, summed_as: _types.DType, is_part: bool = False
) -> _types.Tensor:
    """Adds up a matrix over all replicas; each receives the row of its number.

    In replica context, where every replica must call it. Nothing of the others' rows arrives.

    Args:
        rows: `(replicas, elements)`, a floating-point dtype.
        summed_as: dtype in which the values are added up.
        is_part: whether it is one of the parts of an exchange, see `parts_of`.

    Returns:
        `(elements,)`, of the dtype `summed_as`.
    """
    if tf.executing_eagerly():
        # Replicas run one after another there, and the first would wait for the others.
        context = tf.distribute.get_replica_context()
        return context.all_reduce("SUM", tf.cast(rows, summed_as))[replica_id()]
    if _is_on_gpu() and rows.dtype == summed_as:
        scattered = _run(
            _launcher(),
            _collective_ops.collective_reduce_scatter_v2,
            rows,
            merge_op="Add",
            final_op="Id",
        )
        return tf.ensure_shape(tf.reshape(scattered, [-1]), rows.shape[1:])
    # There is no kernel for the CPU: each sends every other one its row, and adds what it receives.
    received = _with_known_dtype(_collective_ops.collective_all_to_all_v2, rows, is_part)
    received = tf.ensure_shape(received, rows.shape)
    # In half of the time that `tf.reduce_sum` takes over the first dimension.
    return tf.add_n(tf.unstack(tf.cast(received, summed_as)))


def all_reduce(values: Sequence[_types.Gradient], bucket_bytes: int) -> list[_types.Gradient]:
    """The sum of each value over all replicas, in one exchange. In replica context.

    Args:
        values: Tensors and `tf.IndexedSlices`, as many and of the same dtypes on every replica.
        bucket_bytes: between processes, at most so many bytes are under way.
    """
    if _goes_in_parts():
        return _summed(_launcher(), values, bucket_bytes)
    sums = list(tf.distribute.get_replica_context().all_reduce("SUM", list(values)))
    if all(isinstance(v, tf.Tensor) for v in values):
        # TensorFlow gives it a gradient, which nothing here takes.
        let_go_with_graph(sums)
    return sums


def all_gather(row: _types.Tensor, is_part: bool = False) -> _types.Tensor:
    """The rows of all replicas, in their order. In replica context.

    Args:
        row: `(elements,)`, as many on each replica.
        is_part: whether it is one of the parts of an exchange, see `parts_of`.

    Returns:
        `(replicas, elements)`.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    gathered = _with_known_dtype(_collective_ops.collective_gather_v2, row[tf.newaxis], is_part)
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


def sum_on(
    devices: tuple[str, ...], tensors: Sequence[_types.Gradient], bucket_bytes: int
) -> list[_types.Gradient]:
    """Sums tensors over all replicas, on further devices of theirs. In replica context.

    Args:
        devices: as of `exchange_on`.
        tensors: those of this replica, on its device of these.
        bucket_bytes: at most so many bytes are under way.
    """
    strategy = tf.distribute.get_strategy()
    index = replica_id() - min(local_replicas(strategy))
    launcher = exchange_on(devices, strategy)(index)
    return _summed(launcher, tensors, bucket_bytes)


def _summed(
    launcher: _types.Launcher, values: Sequence[_types.Gradient], bucket_bytes: int
) -> list[_types.Gradient]:
    """The sum of each value over all replicas; tensors of one dtype are exchanged together."""
    sums: dict[int, _types.Gradient] = {}
    of_dtype: dict[_types.DType, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, tf.IndexedSlices):
            sums[i] = launcher.all_reduce_indexed_slices(value)
        elif not value.shape.is_fully_defined():
            sums[i] = launcher.all_reduce(value)
        else:
            of_dtype.setdefault(value.dtype, []).append(i)
    with tf.device(launcher._device):
        for group in of_dtype.values():
            totals = _summed_in_parts(launcher, [values[i] for i in group], bucket_bytes)
            sums |= dict(zip(group, totals, strict=True))
    return [sums[i] for i in range(len(values))]


def _summed_in_parts(
    launcher: _types.Launcher, tensors: list[_types.Tensor], bucket_bytes: int
) -> list[_types.Tensor]:
    """The sum of tensors of one dtype; a part is sent as soon as all of it is there."""
    length, most = parts_of(bucket_bytes, tensors[0].dtype)
    under_way = UnderWay(most)
    received: list[list[_types.Tensor]] = [[] for _ in tensors]
    for part in _parts([t.shape.num_elements() for t in tensors], length):
        with under_way.turn():
            vector = tf.concat([tf.reshape(tensors[i], [-1])[a:b] for i, a, b in part], 0)
        summed = _run(
            launcher,
            _collective_ops.collective_reduce_v2,
            vector,
            is_part=True,
            merge_op="Add",
            final_op="Id",
            communication_hint=launcher._options.implementation.value.lower(),
            timeout_seconds=launcher._options.timeout_seconds or 0,
        )
        under_way.add(summed)
        pieces = tf.split(summed, [b - a for _, a, b in part])
        for (i, _, _), piece in zip(part, pieces, strict=True):
            received[i].append(piece)
    return [
        tf.reshape(tf.concat(found, 0), tensor.shape) if found else tensor
        for tensor, found in zip(tensors, received, strict=True)
    ]


def _parts(sizes: Sequence[int], length: int) -> Iterator[list[tuple[int, int, int]]]:
    """What goes in each part of so many elements: a tensor, the first and the one after the last.

    Args:
        sizes: the number of elements of each tensor.
        length: that of a part; the last one may be shorter.
    """
    part: list[tuple[int, int, int]] = []
    left = length
    for i, size in enumerate(sizes):
        begin = 0
        while begin < size:
            end = min(size, begin + left)
            part.append((i, begin, end))
            left -= end - begin
            begin = end
            if not left:
                yield part
                part, left = [], length
    if part:
        yield part


def _with_known_dtype(
    operation: _types.AnyFunction, tensor: _types.Tensor, is_part: bool
) -> _types.Tensor:
    """Runs a collective that moves values; those of bfloat16, which it does not know, as bits."""
    launcher = _launcher()
    if tensor.dtype == tf.bfloat16:
        moved = _run(launcher, operation, tf.bitcast(tensor, tf.float16), is_part)
        return tf.bitcast(moved, tf.bfloat16)
    return _run(launcher, operation, tensor, is_part)


def _is_on_gpu() -> bool:
    devices = tf.distribute.get_strategy().extended.worker_devices
    return all("GPU" in device for device in devices)


def _goes_in_parts() -> bool:
    """Whether exchanges go in parts, of which several are under way: between processes.

    Not if these have several replicas each. TensorFlow traces them one after another, up to the
    strategy's next own exchange, and has assertions of one wait for those of the one before it.
    """
    strategy = tf.distribute.get_strategy()
    if tf.executing_eagerly() or _is_on_gpu():
        return False
    is_between_processes = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return is_between_processes and len(local_replicas(strategy)) == 1


def _launcher() -> _types.Launcher:
    """What runs the strategy's own collectives."""
    own = tf.distribute.get_strategy().extended
    launchers = (getattr(own, "_collective_ops", None) or own._cross_device_ops)._launchers
    return launchers[own._get_local_replica_id(replica_id())]


def _run(
    launcher: _types.Launcher,
    operation: _types.AnyFunction,
    tensor: _types.Tensor,
    is_part: bool = False,
    **options: str | float,
) -> _types.Tensor:
    """Runs a collective among all replicas.

    With the keys of the strategy's own collectives and their ordering token, so that they run one
    by one, in the same order on all replicas. Parts have keys of their own, and do not wait for
    each other.
    """
    if tf.executing_eagerly():
        return tf.distribute.get_replica_context().all_gather(tensor, axis=0)
    is_part = is_part and _goes_in_parts()
    with tf.device(launcher._device):
        if is_part:
            token, keys = None, next_keys(launcher, operation, tensor)
        else:
            token = launcher._get_ordering_token()
            keys = launcher._group_key, launcher._next_instance_key()
        received = operation(
            tf.identity(tensor),
            tf.distribute.get_strategy().num_replicas_in_sync,
            *keys,
            ordering_token=[] if token is None else [token],
            **options,
        )
    if is_part:
        # All replicas run it, whether they use what it returns or not.
        run_independently(received.op)
    return received
