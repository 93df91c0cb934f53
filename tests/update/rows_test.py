"""Which rows of a table's gradient the whole batch has, read off the graph.

`exactness_test.py` trains with the most usual kinds. Here are more shapes of programs, each with
what must be found; and the arithmetic on rows.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import tfbig
from tests.conftest import make_strategy
from tfbig import _keras
from tfbig._update import batch_dependence, table_rows
from tfbig._update.table_rows import Rows

TOKENS = tf.TensorSpec([None, 5], tf.int32)


def classified(look_ups, spec=TOKENS, size=11):
    """What becomes of the rows of a table that `look_ups(table, x)` looks up."""
    table = tf.Variable(np.ones((size, 3), "float32"))
    assigned = tf.Variable(0)
    found = []

    def probe(x):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(r**2) for r in tf.nest.flatten(look_ups(table, x))])
        dependences = batch_dependence.Dependences(
            x, captured=lambda t: True, assigned=[assigned.handle]
        )
        found.append(table_rows.classify(tape.gradient(loss, table), dependences))

    tf.function(probe, autograph=False).get_concrete_function(spec)
    return found[0]


def take(table, indices):
    return ops.take(tf.convert_to_tensor(table), indices, axis=0)


KEPT, SHARED, DISTINCT = (Rows.KEPT,), (Rows.SHARED,), (Rows.DISTINCT,)
OF_ANY_LENGTH = (Rows.SHARED_OF_ANY_LENGTH,)


@pytest.mark.parametrize(
    ("look_ups", "expected"),
    [
        # One for each sample.
        (lambda t, x: take(t, x), KEPT),
        (lambda t, x: tf.gather(t, x), KEPT),
        (lambda t, x: take(t, x[:, 1:-1]), KEPT),
        (lambda t, x: take(t, x[:, 0]), KEPT),
        (lambda t, x: take(t, ops.maximum(x - 3, 0)), KEPT),
        (lambda t, x: take(t, ops.transpose(x)), KEPT),
        (lambda t, x: take(t, ops.reshape(x, [-1])), KEPT),
        (lambda t, x: take(t, ops.reshape(ops.expand_dims(x, -1), [-1, 5, 1])), KEPT),
        (lambda t, x: take(t, ops.reshape(x, [ops.shape(x)[0], -1])), KEPT),
        (lambda t, x: take(t, ops.concatenate([x, x[:, :2]], axis=1)), KEPT),
        (lambda t, x: take(t, ops.concatenate([x, x + 1], axis=0)), KEPT),
        (lambda t, x: take(t, ops.stack([x, x], axis=0)), KEPT),
        (lambda t, x: take(t, ops.where(x > 2, x, 0)), KEPT),
        (lambda t, x: take(t, x + ops.arange(5)), KEPT),
        (lambda t, x: take(t, x + ops.arange(5)[None]), KEPT),
        (lambda t, x: take(t, ops.pad(x, [[0, 0], [1, 0]])), KEPT),
        (lambda t, x: take(t, ops.roll(x, 1, axis=1)), KEPT),
        (lambda t, x: take(t, ops.argmax(ops.one_hot(x, 7), axis=-1)), KEPT),
        (lambda t, x: take(t, ops.max(x, axis=1)), KEPT),
        (lambda t, x: take(t, ops.cumsum(x, axis=1) % 11), KEPT),
        (lambda t, x: take(t, ops.top_k(x, 2)[1]), KEPT),
        (lambda t, x: take(t, ops.split(x, 5, axis=1)[0]), KEPT),
        (lambda t, x: take(t, tf.split(x, [2, 3], axis=1)[1]), KEPT),
        (lambda t, x: take(t, x[..., :2]), KEPT),
        (lambda t, x: take(t, x[..., 0]), KEPT),
        (lambda t, x: take(t, x[..., None]), KEPT),
        (lambda t, x: take(t, x[0:]), KEPT),
        (lambda t, x: take(t, tf.tile(x, [2, 1])), KEPT),
        (lambda t, x: take(t, ops.zeros_like(tf.reshape(x[:, 0], [tf.shape(x)[0]]))), KEPT),
        (lambda t, x: take(t, ops.sort(x, axis=1)), KEPT),
        (lambda t, x: take(t, ops.take(x, [1, 3], axis=1)), KEPT),
        (lambda t, x: take(t, ops.take(np.arange(11)[::-1].copy(), x)), KEPT),
        (lambda t, x: take(t, tf.strings.to_hash_bucket_fast(tf.as_string(x), 11)), KEPT),
        # In a function of its own.
        (lambda t, x: tf.function(lambda i: take(t, i), autograph=False)(x), KEPT),
        (lambda t, x: tf.function(lambda: take(t, ops.arange(5)), autograph=False)(), SHARED),
        # As many for each sample as there are positions: rows of their own.
        (lambda t, x: take(t, ops.broadcast_to(ops.arange(5), ops.shape(x))), KEPT),
        (lambda t, x: take(t, tf.tile(tf.range(5)[None], [tf.shape(x)[0], 1])), KEPT),
        (lambda t, x: take(t, ops.zeros_like(x) + ops.arange(5)), KEPT),
        (lambda t, x: take(t, tf.fill([tf.shape(x)[0], 2], 3)), KEPT),
        # The same, however many samples there are.
        (lambda t, x: take(t, ops.arange(5)), SHARED),
        (lambda t, x: take(t, ops.arange(ops.shape(x)[1])), SHARED),
        (lambda t, x: take(t, np.ones((4, 4), "int32")), SHARED),
        (lambda t, x: take(t, ops.arange(4)[:, None] + ops.arange(4)[None]), SHARED),
        (lambda t, x: take(t, tf.constant([1, 2])), SHARED),
        # A set.
        (lambda t, x: tf.gather(t, tf.unique(tf.reshape(x, [-1]))[0]), DISTINCT),
        # Several.
        (lambda t, x: (take(t, x), take(t, x[:, :1])), KEPT),
        (lambda t, x: (take(t, x), take(t, ops.arange(5))), {Rows.KEPT, Rows.SHARED}),
        (lambda t, x: (take(t, ops.arange(5)), take(t, ops.arange(3))), (Rows.SHARED,) * 2),
    ],
)
def test_look_ups(look_ups, expected):
    found = classified(look_ups)
    assert found == expected or (isinstance(expected, set) and set(found) == expected)


@pytest.mark.parametrize(
    ("look_ups", "operation"),
    [
        # Which row it is depends on how many samples are before, or on all of them.
        (lambda t, x: take(t, ops.arange(ops.shape(x)[0])), "Range"),
        (lambda t, x: take(t, x + ops.max(x)), "Max"),
        (lambda t, x: take(t, ops.cumsum(x, axis=0) % 11), "Cumsum"),
        (lambda t, x: take(t, ops.argmax(x, axis=0)), "ArgMax"),
        (lambda t, x: take(t, ops.mod(ops.shape(x)[0] + x, 11)), "AddV2"),
        (lambda t, x: take(t, tf.gather(x, [0, 1])), "GatherV2"),
        # Two of a set may become one.
        (lambda t, x: take(t, tf.unique(tf.reshape(x, [-1]))[0] % 2), "FloorMod"),
        (lambda t, x: take(t, x[:2]), "StridedSlice"),
        (lambda t, x: take(t, ops.reshape(x, [5, -1])), "Reshape"),
        # Two orders of the samples meet.
        (lambda t, x: take(t, ops.concatenate([x, x], 0) - ops.concatenate([x + 1, x], 0)), "Sub"),
        # Entries of several samples become one row.
        (lambda t, x: take(t, ops.reshape(x, [-1, 4])), "Reshape"),
        (
            lambda t, x: take(t, ops.reshape(ops.reshape(ops.transpose(x), [-1]), [-1, 5])),
            "Reshape",
        ),
        # As many as there are samples, but of the first ones.
        (lambda t, x: take(t, tf.slice(tf.reshape(x, [-1]), [0], [tf.shape(x)[0]])), "Slice"),
        # A fraction of the number of samples.
        (
            lambda t, x: take(
                t, tf.fill([tf.cast(tf.cast(tf.size(x), tf.float32) * 0.15, tf.int32)], 3)
            ),
            "Cast",
        ),
        (lambda t, x: take(t, tf.roll(x, tf.shape(x)[0], axis=1)), "Roll"),
        (
            lambda t, x: take(t, tf.pad(x, [[0, 0], [1, 0]], constant_values=tf.shape(x)[0])),
            "PadV2",
        ),
        # Of two kinds, in a function of their own.
        (
            lambda t, x: tf.function(
                lambda i: ops.sum(take(t, i)) + ops.sum(take(t, ops.arange(5))), autograph=False
            )(x),
            "ConcatV2",
        ),
        # Another time, others.
        (lambda t, x: take(t, tf.random.uniform([3], 0, 11, tf.int32)), "RandomUniformInt"),
        # Not known.
        (lambda t, x: take(t, tf.numpy_function(lambda v: v, [x], tf.int32)), "PyFunc"),
        (lambda t, x: take(t, tf.boolean_mask(x, x > 1)), "Where"),
    ],
)
def test_look_ups_that_cannot_be_followed(look_ups, operation):
    found = classified(look_ups)
    assert isinstance(found, batch_dependence.Mixed), found
    assert operation in found.operation


def test_variable_that_the_forward_pass_assigns_is_no_constant():
    counter = tf.Variable(0)
    found = []

    def probe(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(take(table, counter + tf.range(2)) ** 2)
        for assigned in ([], [counter.handle]):
            known = batch_dependence.Dependences(x, captured=lambda t: True, assigned=assigned)
            found.append(table_rows.classify(tape.gradient(loss, table), known))

    table = tf.Variable(np.ones((9, 3), "float32"))
    with pytest.raises(RuntimeError, match="non-persistent"):
        tf.function(probe, autograph=False).get_concrete_function(TOKENS)
    assert found == [SHARED]


@pytest.mark.parametrize("ragged_rank", [1])
def test_ragged_tokens_are_kept(ragged_rank):
    spec = tf.RaggedTensorSpec([None, None], tf.int32, ragged_rank)
    assert classified(lambda t, x: take(t, x.flat_values), spec) == KEPT
    assert classified(lambda t, x: take(t, x.to_tensor()), spec) == KEPT


def test_words_are_kept():
    vectorize = keras.layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=4)
    assert classified(lambda t, x: take(t, vectorize(x)), tf.TensorSpec([None], tf.string)) == KEPT


def test_columns_of_a_sparse_batch():
    spec = tf.SparseTensorSpec([None, 11], tf.float32)
    assert classified(lambda t, x: ops.matmul(x, tf.convert_to_tensor(t)), spec) == DISTINCT
    assert classified(lambda t, x: take(t, x.indices[:, 1]), spec) == KEPT
    for column in (0, -2):
        found = classified(lambda t, x, c=column: take(t, x.indices[:, c]), spec)
        assert isinstance(found, batch_dependence.Mixed)


def slices(values, indices, size=4):
    values = np.asarray(values, "float32")[:, np.newaxis]
    return tf.IndexedSlices(
        values, tf.constant(indices, tf.int64), tf.constant([size, 1], tf.int64)
    )


def test_rows_of_one_key_are_added_up():
    rows, size = (Rows.KEPT, Rows.SHARED, Rows.DISTINCT), 4
    # Of two replicas: tokens 3 and 3; positions of which two look up row 1; columns 2 and 0.
    parts = [([3, 3], [1, 1, 0], [2, 0]), ([3, 2], [1, 1, 0], [2, 3])]
    keys = [table_rows.keys(tf.constant(i), k, rows, size) for p in parts for k, i in enumerate(p)]
    key = tf.concat(keys, 0)
    values = np.float32(10.0) ** np.arange(-7, 7)
    summed = table_rows.add_up(slices(values, key), rows, size, replicas=2)
    found = sorted(zip(np.ravel(summed.values), np.ravel(summed.indices), strict=True))
    v = values
    expected = [(v[0], 3), (v[1], 3), (v[7], 3), (v[8], 2)]
    expected += [(v[2] + v[9], 1), (v[3] + v[10], 1), (v[4] + v[11], 0)]
    expected += [(v[5] + v[12], 2), (v[6], 0), (v[13], 3)]
    np.testing.assert_allclose(found, sorted(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ([0, 1, 2], [0, 1, 2], True),
        ([2, 2, 1], [2, 2, 1], True),
        ([0, 1, 2], [0, 1], True),  # Each index has one position.
        ([2, 2, 1], [2, 2], False),
    ],
)
def test_positions_of_several_lengths_are_refused_where_they_mean_other_things(first, second, fits):
    keys = [table_rows.keys(tf.constant(i), 0, SHARED, 4) for i in (first, second)]
    gradient = slices(np.ones(len(first) + len(second)), tf.concat(keys, 0))
    if fits:
        summed = table_rows.add_up(gradient, SHARED, 4, replicas=2)
        assert np.sum(summed.values) == len(first) + len(second)
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match=_keras.graph_errors.LENGTHS_DIFFER):
        table_rows.add_up(gradient, SHARED, 4, replicas=2)


@pytest.mark.parametrize(
    ("message", "error", "remedy"),
    [
        (
            _keras.graph_errors.LENGTHS_DIFFER,
            tfbig.errors.UnsupportedModelError,
            "Pad the sequences",
        ),
        (
            "Serialized sparse should have at least 1 serialized tensor, but has a zero dimension",
            tfbig.errors.UnsupportedStrategyError,
            "drop_remainder=True",
        ),
    ],
)
def test_errors_of_the_graph_are_explained(message, error, remedy):
    model = tfbig.Sequential([keras.layers.Dense(1)])
    found = _keras.graph_errors.error_of(f"Graph execution error: {message}", model)
    assert isinstance(found, error)
    assert remedy in str(found)


class Sampled(keras.layers.Layer):
    """Looks up a table by the order of the samples, which a split changes."""

    def build(self, shape):
        self.table = self.add_weight(shape=(20, shape[-1]), name="table")

    def call(self, x):
        return x * ops.take(self.table, ops.arange(ops.shape(x)[0]), axis=0)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_table_that_cannot_be_followed_is_warned_of(strategy):
    with make_strategy(strategy).scope():
        model = tfbig.Sequential(
            [keras.Input((3,)), Sampled(name="sampled"), keras.layers.Dense(1)], micro_batch_size=2
        )
        model.compile("adam", "mse")
    x, y = np.ones((8, 3)), np.ones((8, 1))
    with pytest.warns(UserWarning, match=r"The look-ups of '.*table' cannot be followed \(Range\)"):
        model.fit(x, y, batch_size=8, verbose=0)
    model.fit(x, y, batch_size=8, verbose=0)


class InFunction(keras.layers.Layer):
    """Looks up a table in a function of its own."""

    def build(self, shape):
        self.table = self.add_weight(shape=(9, 3), name="table")

    @tf.function(autograph=False)
    def call(self, x):
        return ops.mean(ops.take(self.table, x, axis=0), axis=1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("is_eager", [False, True])
def test_look_up_in_a_function_is_followed(is_eager):
    def trained(cls, **options):
        keras.utils.set_random_seed(0)
        tokens = keras.Input((5,), dtype="int32")
        model = cls([tokens, InFunction(), keras.layers.Dense(1)], **options)
        model.compile(keras.optimizers.Adam(0.05), "mse", run_eagerly=is_eager)
        x = np.random.default_rng(0).integers(0, 9, (6, 5))
        model.fit(x, np.ones((6, 1)), batch_size=6, epochs=2, verbose=0)
        return model

    model, plain = trained(tfbig.Sequential, micro_batch_size=2), trained(keras.Sequential)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_rows_of_a_custom_gradient_are_warned_of():
    class Own(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(4, 1), name="table")

        def call(self, x):
            @tf.custom_gradient
            def first(table):
                def gradient(upstream):
                    rows = tf.reduce_sum(upstream)[tf.newaxis, tf.newaxis]
                    return tf.IndexedSlices(rows, tf.constant([0]), tf.constant([4, 1]))

                return table[0, 0], gradient

            return x * first(tf.convert_to_tensor(self.table))

    model = tfbig.Sequential([keras.Input((2,)), Own()], micro_batch_size=2)
    model.compile("adam", "mse")
    with pytest.warns(UserWarning, match="a gradient of its own"):
        model.fit(np.ones((6, 2)), np.ones((6, 2)), batch_size=6, verbose=0)


class Padded(keras.layers.Layer):
    """Tokens and positions of ragged sentences, padded to the longest that is there, masked."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens, self.positions = (keras.layers.Embedding(9, 3) for _ in range(2))

    def build(self, shape):
        self.tokens.build(None)
        self.positions.build(None)

    def call(self, x):
        x = x.to_tensor()
        h = ops.tanh(self.tokens(x) + self.positions(ops.arange(ops.shape(x)[1])))
        mask = ops.cast(x > 0, h.dtype)[..., None]
        return ops.sum(h * mask, axis=1) / ops.sum(mask, axis=1)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_positions_of_micro_batches_of_different_lengths(optimizer, strategy):
    rng = np.random.default_rng(0)
    lengths = [1, 1, 1, 1, 4, 4, 3, 4, 4, 2]
    x = tf.RaggedTensor.from_row_lengths(rng.integers(1, 9, sum(lengths)), lengths)
    y = rng.normal(size=(10, 3))

    def trained(base, **options):
        class Net(base):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.inner = Padded()

            def call(self, x):
                return self.inner(x)

        keras.utils.set_random_seed(1)
        model = Net(**options)
        model.compile(keras.optimizers.get(optimizer), "mse")
        model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(10), epochs=3, verbose=0)
        return model.get_weights()

    expected = trained(keras.Model)
    with make_strategy(strategy).scope():
        result = trained(tfbig.Model, gradient_accumulation_steps=3)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
