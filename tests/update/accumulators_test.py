"""What gradients are added up in."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.conftest import make_strategy
from tfbig._update import accumulators
from tfbig._update.table_rows import Rows

TOTALS = [np.full((2, 3), 10.0, "float32"), np.full(3, 20.0, "float32")]
GRADIENTS = [np.full((2, 3), 1.0, "float16"), np.full(3, 2.0, "float16")]


@pytest.mark.parametrize(
    ("are_alike", "is_first", "expected"),
    [
        (None, None, [13.0, 26.0]),
        (False, False, [13.0, 26.0]),
        (False, True, [13.0, 26.0]),
        (True, False, [11.0, 22.0]),  # No multiplication.
        (True, True, [1.0, 2.0]),  # Nor an addition.
    ],
)
@pytest.mark.parametrize("is_eager", [True, False])
def test_adding(are_alike, is_first, expected, is_eager):
    def add(totals, gradients, weight, *flags):
        return accumulators.add([*totals, totals[0]], [*gradients, None], weight, *flags)

    flags = [None if f is None else tf.constant(f) for f in (are_alike, is_first)]
    add = add if is_eager else tf.function(add)
    *sums, same = add(
        [tf.constant(t) for t in TOTALS],
        [tf.constant(g) for g in GRADIENTS],
        tf.constant(3.0),
        *flags,
    )
    for got, total, value in zip(sums, TOTALS, expected, strict=True):
        assert got.dtype == "float32"
        np.testing.assert_array_equal(got, np.full_like(total, value))
    np.testing.assert_array_equal(same, TOTALS[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradient_accumulation_steps": 4}, [True] * 4),
        ({"gradient_accumulation_steps": 3}, [False] * 3),  # 3, 3 and 2 samples.
        ({"micro_batch_size": 4}, [True] * 2),
        ({"micro_batch_size": 5}, [False] * 2),
        ({"micro_batch_size": 9}, [True]),
    ],
)
def test_micro_batches_of_one_size_are_not_multiplied(options, expected, monkeypatch):
    add, seen = accumulators.add, []

    def recorded(totals, gradients, weight, are_alike, is_first):
        seen.append(bool(are_alike))
        assert bool(is_first) == (len(seen) == 1)
        return add(totals, gradients, weight, are_alike, is_first)

    monkeypatch.setattr(accumulators, "add", recorded)
    model = tfbig.Sequential([keras.Input((2,)), keras.layers.Dense(1)], **options)
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=8, verbose=0)
    assert seen == expected


class Sizes(keras.layers.Layer):
    """Notes the static size of each micro-batch that it is traced for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x):
        self.seen.append(x.shape[0])
        return x


@pytest.mark.parametrize(
    ("strategy", "options", "drop_remainder", "expected"),
    [
        ("default", {"gradient_accumulation_steps": 4}, True, 2),
        ("mirrored_2", {"gradient_accumulation_steps": 4}, True, 1),
        ("default", {"micro_batch_size": 4}, True, 4),
        ("mirrored_2", {"micro_batch_size": 4}, True, 4),
        ("default", {"micro_batch_size": 9}, True, 8),
        ("default", {"gradient_accumulation_steps": 3}, True, None),  # 3, 3 and 2 samples.
        ("default", {"micro_batch_size": 5}, True, None),
        ("default", {"gradient_accumulation_steps": 4}, False, None),
        ("mirrored_2", {"micro_batch_size": 4}, False, None),
    ],
)
def test_micro_batches_of_a_known_size_are_static(strategy, options, drop_remainder, expected):
    data = tf.data.Dataset.from_tensor_slices((np.ones((16, 2)), np.ones((16, 1))))
    with make_strategy(strategy).scope():
        sizes = Sizes()
        model = tfbig.Sequential([keras.Input((2,)), sizes, keras.layers.Dense(1)], **options)
        model.compile("sgd", "mse", jit_compile=False)
    model.fit(data.batch(8, drop_remainder=drop_remainder), shuffle=False, verbose=0)
    assert sizes.seen[-1] == expected


def test_rows_are_weighted_always():
    rows_of_samples = (Rows.KEPT,)
    total = accumulators.start(tf.Variable(np.zeros((4, 2), "float32")), rows_of_samples)
    for _ in range(2):
        rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([3]), tf.constant([4, 2]))
        (total,) = accumulators.add(
            [total], [rows], tf.constant(5.0), tf.constant(True), tf.constant(False)
        )
    variable = tf.Variable(np.zeros((4, 2), "float32"))
    result = accumulators.result(total, variable, rows_of_samples)
    np.testing.assert_array_equal(result.values, np.full((2, 2), 5.0))
    np.testing.assert_array_equal(result.indices, [3, 3])


def test_replicas_of_different_known_sizes_count_their_samples():
    keras.utils.set_random_seed(0)
    x, y = np.random.default_rng(0).normal(size=(2, 6, 2))
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "tanh")])
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential(
            [keras.Input((2,)), keras.layers.Dense(2, "tanh")], gradient_accumulation_steps=2
        )
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=False)
    model.set_weights(plain.get_weights())
    plain.compile(keras.optimizers.SGD(0.5), "mse")
    plain.train_on_batch(x, y)

    def share(values):
        parts = [values[:4], values[4:]]
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )

    strategy = model.distribute_strategy
    data = share(x), share(y)
    tf.function(lambda *batch: strategy.run(model.train_step, [batch]))(*data)
    for got, expected in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
