"""Between processes, an exchange goes in parts, of which several are under way.

Here in one process, where nothing asserts anything between its exchanges; see `_goes_in_parts`.
The jobs of several workers exchange in parts too.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.conftest import make_strategy
from tests.update.buckets_test import train
from tests.update.exchange_test import operations, samples, traced_update
from tfbig._keras import collective_keys, collectives
from tfbig._update import replicas
from tfbig.distribute import _rows
from tfbig.distribute._pieces import Piece

STRATEGY = "mirrored_2"
COLLECTIVES = {"CollectiveReduceV2", "CollectiveGatherV2", "CollectiveAllToAllV2"}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(collectives, "_PART_BYTES", 16)
    monkeypatch.setattr(collectives, "_goes_in_parts", lambda: not tf.executing_eagerly())


def on_replicas(function):
    """A function that returns the list of what `function(replica)` returns, for each replica."""
    strategy = make_strategy(STRATEGY)

    @tf.function(autograph=False)
    def program():
        return strategy.run(lambda: function(collectives.replica_id()))

    return lambda: per_replica(strategy, program())


def per_replica(strategy, results):
    values = [strategy.experimental_local_results(r) for r in tf.nest.flatten(results)]
    return [[np.asarray(v) for v in of_replica] for of_replica in zip(*values, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("bucket_bytes", [1, 40, 10**6])
def test_tensors_are_summed(small_parts, dtype, bucket_bytes):
    sizes = [3, 1, 0, 17, 4]

    def summed(replica):
        tensors = [tf.cast(tf.range(n) * (replica + 1), dtype) for n in sizes]
        rows = tf.IndexedSlices(tf.ones([1 + replica, 2]), tf.zeros([1 + replica], tf.int32))
        sums = replicas.all_reduce_sum([*tensors, rows, tf.constant(2.0)], bucket_bytes)
        sums[-2] = tf.reduce_sum(sums[-2].values)
        return [tf.cast(s, tf.float32) for s in sums]

    for result in on_replicas(summed)():
        expected = [np.arange(n) * 3.0 for n in sizes]
        for found, wanted in zip(result, [*expected, 6.0, 4.0], strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket_bytes", [1, 40, 10**6])
def test_rows_are_scattered_and_gathered(small_parts, dtype, bucket_bytes):
    dtype = tf.as_dtype(dtype)
    # The second variable lies on the second replica alone.
    pieces = [[Piece(0, 9, (9,)), Piece(9, 13, (4,))], [None, Piece(0, 6, (2, 3))]]
    rows = _rows.Rows(pieces, [(13,), (2, 3)])

    def exchanged(replica):
        tensors = [tf.range(13.0) * (replica + 1), tf.ones([2, 3]) * (replica + 1)]
        own = rows.scatter(
            [tf.cast(t, dtype) for t in tensors], bucket_bytes, tf.identity, dtype, tf.float32
        )
        gathered = dict(rows.gather(own, bucket_bytes, tf.float32))
        return [gathered[0], gathered[1]]

    for first, second in on_replicas(exchanged)():
        np.testing.assert_array_equal(first, np.arange(13) * 3.0)
        np.testing.assert_array_equal(second, np.full((2, 3), 3.0))


def test_an_exchange_whose_result_only_one_replica_uses_runs_on_both(small_parts):
    def used_by_the_first(replica):
        (total,) = replicas.all_reduce_sum([tf.fill([9], 1.0 + replica)])
        return total if replica == 0 else tf.zeros([9])

    (first,), (second,) = on_replicas(used_by_the_first)()
    np.testing.assert_array_equal(first, np.full(9, 3.0))
    np.testing.assert_array_equal(second, np.zeros(9))


def test_exchanges_in_a_loop_over_updates(small_parts):
    strategy = make_strategy(STRATEGY)

    def update(k, total):
        return replicas.all_reduce_sum([total + tf.cast(k + collectives.replica_id(), total.dtype)])

    @tf.function(autograph=False)
    def program():
        def body(k, total):
            (summed,) = strategy.run(update, args=(k, total))
            return k + 1, strategy.experimental_local_results(summed)[0]

        return tf.while_loop(lambda k, _: k < 3, body, (tf.constant(0), tf.zeros([9])))[1]

    expected = np.zeros(9)
    for k in range(3):
        expected = 2 * expected + 2 * k + 1
    np.testing.assert_array_equal(program(), expected)


def test_functions_that_run_at_once_do_not_meet(small_parts):
    """Functions with the same exchanges, which nothing orders, called by one; again and again."""
    # More than there are keys.
    with make_strategy(STRATEGY).scope():
        factors = [tf.Variable(1.0 + k) for k in range(20)]

    def function(factor):
        def exchanged(value):
            return replicas.all_reduce_sum([value * factor])[0]

        return tf.function(exchanged, autograph=False)

    functions = [function(f) for f in factors]

    def at_once(replica):
        return [f(tf.fill([40], 1.0 + replica)) for f in functions]

    run = on_replicas(at_once)
    for _ in range(20):
        for result in run():
            np.testing.assert_array_equal([r[0] for r in result], 3 * np.arange(1, 21))
            assert all((r == r[0]).all() for r in result)


def test_a_function_that_is_called_twice_by_another(small_parts):
    with make_strategy(STRATEGY).scope():
        weights = tf.Variable(tf.ones([40]))

    def update(value):
        (summed,) = replicas.all_reduce_sum([value * weights])
        with tf.control_dependencies([weights.assign_add(summed)]):
            return tf.identity(summed)

    update = tf.function(update, autograph=False)

    def twice(replica):
        return [update(tf.fill([40], 1.0 + replica)), update(tf.fill([40], 1.0))]

    run = on_replicas(twice)
    expected = 1.0
    for _ in range(5):
        for first, second in run():
            np.testing.assert_array_equal(first, np.full(40, 3 * expected))
            np.testing.assert_array_equal(second, np.full(40, 8 * expected))
        expected *= 12


def test_a_function_without_weights_that_another_calls_several_times(small_parts):
    """Its calls have the same keys, and nothing in them tells which is first."""
    summed = tf.function(lambda value: replicas.all_reduce_sum([value])[0], autograph=False)

    def several(replica):
        return [summed(tf.fill([40], (1.0 + replica) * 10**k)) for k in range(4)]

    run = on_replicas(several)
    for _ in range(20):
        for result in run():
            np.testing.assert_array_equal([r[0] for r in result], [3, 30, 300, 3000])
            assert all((r == r[0]).all() for r in result)


def test_functions_of_other_shapes_take_turns(small_parts):
    def function(size):
        return on_replicas(lambda r: replicas.all_reduce_sum([tf.fill([size], 1.0 + r)])[0])

    functions = {size: function(size) for size in (3, 5, 8, 21)}
    for size, _ in itertools.product(functions, range(3)):
        for (result,) in functions[size]():
            np.testing.assert_array_equal(result, np.full(size, 3.0))


def test_keys_come_back(small_parts):
    """Else, TensorFlow would keep a record of each part of each update."""

    def keys(replica):
        launcher, operation = collectives._launcher(), collectives._collective_ops
        kinds = [operation.collective_reduce_v2, operation.collective_gather_v2]
        found = [
            collective_keys.next_keys(launcher, kind, tf.zeros([size]))
            for kind in kinds
            for size in (3, 3, 5)
        ]
        return [tf.stack([group, instance]) for group, instance in found]

    run = on_replicas(keys)
    calls = [[tuple(map(tuple, result)) for result in run()] for _ in range(40)]
    assert all(first == second for first, second in calls)
    calls = [first for first, _ in calls]
    # In a call, and in those before and after it, no two are the same.
    nearby = [key for call in calls[:16] for key in call]
    assert len(set(nearby)) == len(nearby)
    assert {key for call in calls for key in call} == set(nearby)


def waits_for(operation):
    """The collectives before which an operation does not begin."""
    found, seen, left = set(), set(), [operation]
    while left:
        op = left.pop()
        for before in [*op.control_inputs, *(i.op for i in op.inputs)]:
            if before.name not in seen:
                seen.add(before.name)
                left.append(before)
                if before.type in COLLECTIVES:
                    found.add(before.name)
    return found


def test_the_check_begins_when_there_is_something_to_send(small_parts):
    """It would else begin for an update for which there is no data."""
    strategy = make_strategy(STRATEGY)

    @tf.function(autograph=False)
    def program(value):
        return strategy.run(lambda v: replicas.all_reduce_sum([tf.sqrt(v)]), args=(value,))

    graph = program.get_concrete_function(tf.TensorSpec([9])).graph
    checks = [op for op in graph.get_operations() if op.type == "CollectiveGatherV2"]
    assert len(checks) == 2
    for check in checks:
        (own,) = [i.op for i in check.inputs[0].op.inputs]
        assert [op.type for op in own.control_inputs] == ["Sqrt"]


@pytest.mark.parametrize(("bucket_bytes", "expected"), [(16, [0, 1, 2, 3]), (32, [0, 0, 1, 1])])
def test_so_many_parts_are_under_way(small_parts, bucket_bytes, expected):
    strategy = make_strategy(STRATEGY)

    def one(replica):
        launcher = collectives._launcher()
        return collectives._summed(launcher, [tf.fill([16], 1.0 + replica)], bucket_bytes)

    @tf.function(autograph=False)
    def program():
        return strategy.run(lambda: one(collectives.replica_id()))

    graph = program.get_concrete_function().graph
    parts = [op for op in graph.get_operations() if op.type == "CollectiveReduceV2"]
    # Without the strategy's ordering token.
    assert {len(op.inputs) for op in parts} == {4}
    # Of each replica; a later part waits for those before it that the one it follows waited for.
    waits = [len(waits_for(op)) for op in parts]
    assert waits == expected * 2
    for (result,) in per_replica(strategy, program()):
        np.testing.assert_array_equal(result, np.full(16, 3.0))


def test_what_goes_in_a_part():
    parts = list(collectives._parts([3, 0, 9, 1, 2], 4))
    assert parts == [[(0, 0, 3), (2, 0, 1)], [(2, 1, 5)], [(2, 5, 9)], [(3, 0, 1), (4, 0, 2)]]
    assert not list(collectives._parts([0], 4))


@pytest.mark.parametrize(
    ("bucket_bytes", "most", "expected"),
    [
        (1, None, (16 * 2**10, 1)),
        (2**16, None, (16 * 2**10, 1)),
        (2**20, None, (2**18, 1)),
        (2**20, 2, (2**17, 2)),
        (2**20, 64, (2**14, 16)),
        (2**25, None, (2**19, 16)),
        (2**25, 2, (2**19, 2)),
    ],
)
def test_a_part_is_not_as_small_as_a_bucket_may_be(monkeypatch, bucket_bytes, most, expected):
    """Its length in float32, and how many are under way: each part is a few operations."""
    monkeypatch.setattr(collectives, "_goes_in_parts", lambda: True)
    assert collectives.parts_of(bucket_bytes, tf.float32, most) == expected
    length, under_way = collectives.parts_of(bucket_bytes, tf.bfloat16, most)
    assert (length, under_way) == (2 * expected[0], expected[1])


@pytest.mark.parametrize("shard", [None, "optimizer"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(keras.optimizers.SGD, {}), (keras.optimizers.Adam, {"loss_scale": 64.0})],
)
def test_training_in_parts_changes_no_bit(request, optimizer, options, shard):
    whole = train(STRATEGY, optimizer, shard=shard, **options)
    request.getfixturevalue("small_parts")
    parts = train(STRATEGY, optimizer, shard=shard, **options)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_replicas_of_one_process_do_not_exchange_in_parts():
    with make_strategy(STRATEGY).scope():
        model = tfbig.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        model.compile("sgd", "mse")
    graph = traced_update(model, *samples(8))
    tokens = [len(op.input) for _, op in operations(graph) if op.op in COLLECTIVES]
    assert tokens
    assert set(tokens) == {5}
