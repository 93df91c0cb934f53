"""What the engine says of a tensor holds: computed for a joined batch, and for its two parts."""

import numpy as np
import pytest
import tensorflow as tf

from tfbig._update.batch_dependence import CONSTANT, Coupled, Dependences, Mixed, Samples, Total
from tfbig._update.dependence import Sizes

SPEC = tf.TensorSpec([None, 3, 4], tf.float32)
TABLE = np.arange(20, dtype="float32").reshape(10, 2)


def rows(x):
    return tf.reshape(x, [-1, 12])


def places(x):
    return tf.cast(tf.argmax(x, 2), tf.int32)


def positions(x):
    """A mask that is the same for all samples."""
    return tf.broadcast_to([1.0, 1.0, 0.0], tf.shape(x)[:2])


def words(x):
    return tf.strings.split(tf.strings.as_string(x[:, 0, 0]), ".")


def numbered(text):
    return tf.strings.to_hash_bucket_fast(text, 99)


# Joined along an axis, in the order of the batch.
JOINED = {
    "entry by entry": lambda x: tf.exp(x) * 2 + tf.where(x > 0, x, -x),
    "cast": lambda x: tf.cast(x, tf.float64),
    "matmul": lambda x: tf.matmul(rows(x), tf.ones((12, 2))),
    "batch matmul": lambda x: tf.matmul(x, x, transpose_b=True),
    "bias": lambda x: tf.nn.bias_add(rows(x), tf.ones(12)),
    "sum": lambda x: tf.reduce_sum(x, -1) + tf.reduce_max(x, [2]),
    "sum that keeps axes": lambda x: tf.reduce_mean(x, [1, 2], keepdims=True),
    "argmax": lambda x: tf.argmax(x, 1),
    "cumulative sum": lambda x: tf.cumsum(x, 1),
    "reversed and rolled": lambda x: tf.roll(tf.reverse(x, [1]), 1, 2),
    "softmax": tf.nn.softmax,
    "largest": lambda x: tf.math.top_k(x, 2).values,
    "one-hot": lambda x: tf.one_hot(places(x), 4),
    "index": lambda x: x[:, 1],
    "new axis": lambda x: x[:, None, ..., 0],
    "every other": lambda x: x[:, ::2, -2:],
    "slice": lambda x: tf.slice(x, [0, 1, 0], [-1, 2, 3]),
    "padding": lambda x: tf.pad(x, [[0, 0], [1, 1], [0, 2]]),
    "mirrored": lambda x: tf.pad(x, [[0, 0], [1, 1], [0, 0]], "REFLECT"),
    "cross-entropy": lambda x: (
        tf.raw_ops.SoftmaxCrossEntropyWithLogits(features=rows(x), labels=tf.exp(rows(x))).loss
    ),
    "cross-entropy of tokens": lambda x: tf.nn.sparse_softmax_cross_entropy_with_logits(
        places(x), x
    ),
    "dense layer of several axes": lambda x: tf.tensordot(x, tf.ones((4, 5)), 1),
    "einsum": lambda x: tf.einsum("abc,cd->bad", x, tf.ones((4, 5))),
    "einsum in each sample": lambda x: tf.einsum("abc,adc->abd", x, x),
    "cross-entropy of classes": lambda x: tf.nn.sparse_softmax_cross_entropy_with_logits(
        places(x)[:, 0], rows(x)
    ),
    "look-up": lambda x: tf.gather(tf.constant(TABLE), places(x)),
    "look-up of several indices": lambda x: tf.gather_nd(TABLE, places(x)[..., None]),
    "gather along another axis": lambda x: tf.gather(x, [2, 0], axis=1),
    "gather in each sample": lambda x: tf.gather(x, places(x) % 3, batch_dims=1),
    "stack": lambda x: tf.stack([x, 2 * x], 1),
    "stack in front": lambda x: tf.stack([x, 2 * x]),
    "concatenation": lambda x: tf.concat([x, x], 2),
    "fill": lambda x: tf.fill([tf.shape(x)[0], 2], 3.0),
    "broadcast": lambda x: tf.broadcast_to(tf.ones((1, 2)), [tf.shape(x)[0], 2]),
    "broadcast of samples": lambda x: tf.broadcast_to(x[:, :1], [tf.shape(x)[0], 5, 4]),
    "repeated in each sample": lambda x: tf.tile(x, [1, 2, 1]),
    "repeated for each sample": lambda x: tf.tile([[1.0, 2.0]], [tf.shape(x)[0], 1]),
    "rows": lambda x: tf.reshape(x, [-1, 4]),
    "rows of a known number": lambda x: tf.reshape(x, [tf.shape(x)[0], 2, 6]),
    "flat": lambda x: tf.reshape(x, [-1]),
    "transposed": lambda x: tf.transpose(x, [2, 0, 1]),
    "axes of size one": lambda x: tf.squeeze(tf.expand_dims(x, 0), [0]),
    "words": lambda x: numbered(words(x).flat_values),
    "words of each sample": lambda x: numbered(words(x).to_tensor(shape=[None, 3])),
    "unstacked": lambda x: tf.unstack(x, axis=1)[2],
    "split": lambda x: tf.split(x, 2, axis=2)[1],
    "split unevenly": lambda x: tf.split(x, [1, 2], axis=1)[1],
}

# The same for every batch.
SAME = {
    "positions": lambda x: tf.range(x.shape[1]),
    "mean of ones": lambda x: tf.reduce_mean(tf.ones_like(x)) + tf.reduce_mean(positions(x)),
    "rank": lambda x: tf.rank(x) + 1,
    "size of another axis": lambda x: tf.shape(x)[1],
    "mask": lambda x: tf.linalg.band_part(tf.ones((3, 3)), -1, 0),
}

# Integers, of which some are multiples of the number of samples.
SIZES = {
    "shape": tf.shape,
    "number of samples": lambda x: tf.shape(x)[0],
    "number of entries": tf.size,
    "sum of ones": lambda x: tf.reduce_sum(tf.ones_like(x)),
    "sums of positions": lambda x: tf.reduce_sum(positions(x), 0),
    "multiple": lambda x: tf.shape(x)[0] * 4,
    "product": lambda x: tf.reduce_prod(tf.shape(x)),
    "packed": lambda x: tf.stack([tf.shape(x)[0], 7]),
    "concatenated": lambda x: tf.concat([tf.shape(x)[:1], [5, 6]], 0),
    "gathered": lambda x: tf.gather(tf.shape(x), [2, 0]),
    "new axis": lambda x: tf.squeeze(tf.expand_dims(tf.shape(x), 0)),
    "laid out anew": lambda x: tf.reshape(tf.shape(x), [3, 1]),
}

# The samples meet, or stand in another order.
NEITHER = {
    "sum over samples": lambda x: tf.reduce_sum(x, 0),
    "cumulative over samples": lambda x: tf.cumsum(x, 0),
    "products of samples": lambda x: tf.matmul(rows(x), rows(x), transpose_a=True),
    "all but the first": lambda x: x[1:],
    "every other sample": lambda x: x[::2],
    "one sample": lambda x: x[0],
    "slice of samples": lambda x: tf.slice(x, [1, 0, 0], [-1, -1, -1]),
    "reversed samples": lambda x: tf.reverse(x, [0]),
    "rolled samples": lambda x: tf.roll(x, 1, 0),
    "padded samples": lambda x: tf.pad(x, [[1, 0], [0, 0], [0, 0]]),
    "chosen samples": lambda x: tf.gather(x, [0, 1]),
    "half of them": lambda x: tf.shape(x)[0] // 2,
    "square of their number": lambda x: tf.reduce_prod([tf.shape(x)[0], tf.shape(x)[0]]),
    "their number and more": lambda x: tf.shape(x)[0] + 1,
    "columns of samples": lambda x: tf.reshape(x, [3, -1]),
    "softmax over samples": lambda x: tf.nn.softmax(tf.transpose(x[:, :, 0])),
    "sorted samples": lambda x: tf.sort(x, 0),
    "samples twice": lambda x: tf.concat([x, x], 0),
    "repeated batch": lambda x: tf.tile(x, [2, 1, 1]),
    "random": lambda x: x + tf.random.normal(tf.shape(x)),
    "a constant for each": lambda x: tf.concat([x[:, 0], tf.ones((5, 4))], 0),
    "an unknown operation": lambda x: tf.linalg.svd(x, compute_uv=False),
}


def samples(x):
    return tf.cast(tf.shape(x)[0], x.dtype)


# The mean of those of two batches, which count by their samples.
MEANS = {
    "mean": tf.reduce_mean,
    "mean over samples": lambda x: tf.reduce_mean(x, 0),
    "sum over their number": lambda x: tf.reduce_sum(x * x) / samples(x),
    "sum over their number, twice": lambda x: tf.reduce_sum(x) / (2 * samples(x)),
    "weighted mean": lambda x: tf.reduce_sum(x * tf.ones_like(x)) / tf.reduce_sum(tf.ones_like(x)),
    "mean of some positions": lambda x: (
        tf.reduce_sum(x[..., 0] * positions(x)) / tf.reduce_sum(positions(x))
    ),
    "scaled": lambda x: 1 - tf.reduce_mean(tf.exp(x)) * 3 / 2,
    "sum of means": lambda x: tf.reduce_sum([tf.reduce_mean(x), -tf.reduce_mean(x**2), 0.5]),
    "sum of means of entries": lambda x: tf.reduce_sum(tf.reduce_mean(x, 0)[1:]),
    "mean that is added to each": lambda x: tf.reduce_mean(2 * (x - tf.reduce_mean(x, 0))[:, 1]),
    "mean of a product": lambda x: tf.matmul(rows(x), rows(x), transpose_a=True) / samples(x),
    "dense layers": lambda x: tf.reduce_mean(tf.tanh(tf.einsum("abc,cd->abd", x, tf.ones((4, 5))))),
    "another scale": lambda x: tf.stop_gradient(tf.cast(tf.reduce_mean(x), "float64")[None]),
}

# The sum of those of two batches.
SUMS = {
    "sum": tf.reduce_sum,
    "sum over samples": lambda x: tf.reduce_sum(x, 0),
    "sum of sums": lambda x: tf.reduce_sum(x) - 2 * tf.reduce_sum(x**2),
    "products of samples": lambda x: tf.matmul(rows(x), rows(x), transpose_a=True),
    "products with transposed": lambda x: tf.matmul(tf.transpose(rows(x)), tf.exp(rows(x))),
    "einsum over samples": lambda x: tf.einsum("abc,abd->cd", x, x),
}

# Neither the sum nor the mean.
COUPLED = {
    "product of means": lambda x: tf.reduce_sum(tf.reduce_mean(x, 0) * tf.reduce_mean(x**2, 0)),
    "square root of a mean": lambda x: tf.sqrt(tf.reduce_mean(x**2)),
    "quotient of sums": lambda x: tf.reduce_sum(x**2) / tf.reduce_sum(tf.cast(x > 0, x.dtype)),
    "sum and mean": lambda x: tf.reduce_sum(x) + tf.reduce_mean(x),
    "mean, divided by their number": lambda x: tf.reduce_mean(x) / samples(x),
    "variance": lambda x: tf.reduce_mean(tf.math.reduce_variance(x, 0)),
    "normalized": lambda x: tf.reduce_mean(tf.nn.relu(x - tf.reduce_mean(x, 0))),
    "normalized by moments": lambda x: tf.reduce_mean(
        tf.nn.batch_normalization(x, *tf.nn.moments(x, [0]), None, None, 1e-3) ** 3
    ),
    "all pairs": lambda x: tf.reduce_mean(tf.matmul(rows(x), rows(x), transpose_b=True)),
    "pairs of different halves": lambda x: tf.reduce_mean(
        tf.matmul(tf.concat([rows(x), -2 * rows(x)], 0), tf.transpose(rows(x)))
    ),
    "distances": lambda x: tf.reduce_mean(tf.abs(rows(x)[:, None] - rows(x)[None])),
    "einsum of pairs": lambda x: tf.reduce_mean(tf.einsum("abc,dbc->ad", x, x)),
    "cross-entropy of pairs": lambda x: tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.range(tf.shape(x)[0]), tf.matmul(rows(x), rows(x), transpose_b=True)
        )
    ),
    "pairs but for each with itself": lambda x: tf.reduce_mean(
        tf.exp(tf.matmul(rows(x), rows(x), transpose_b=True) - 9 * tf.eye(tf.shape(x)[0]))
    ),
}

# It may be either, and is not taken to be coupled.
UNKNOWN = {
    "largest": tf.reduce_max,
    "sum and constant": lambda x: tf.reduce_sum(x) + 1,
    "sum of what a mean was added to": lambda x: tf.reduce_sum(x - tf.reduce_mean(x)),
    "number of the positive": lambda x: tf.reduce_sum(tf.cast(x > 0, tf.int32)) + 1,
    "integer part": lambda x: tf.cast(tf.reduce_mean(x), tf.int32),
    "mean that is repeated for each": lambda x: tf.reduce_mean(x) * tf.ones_like(x[:, 0, 0]),
    "zeros": lambda x: tf.raw_ops.ZerosLike(x=tf.reduce_mean(x, 0) ** 2),
    "bounds": lambda x: x[:, : tf.cast(tf.reduce_mean(x) ** 2, tf.int32)],
    "diagonal of all pairs": lambda x: tf.linalg.diag_part(
        tf.matmul(rows(x), rows(x), transpose_b=True)
    ),
    "an unknown operation of a mean": lambda x: tf.linalg.svd(
        tf.reduce_mean(x, 0), compute_uv=False
    ),
}


def found(function, **options):
    """The function, compiled; and how its result depends on the batch."""
    concrete = tf.function(function, autograph=False).get_concrete_function(SPEC)
    dependences = Dependences(concrete.inputs[0], captured=lambda tensor: True, **options)
    return concrete, dependences.of(concrete.outputs[0])


@pytest.fixture
def batches():
    """Two batches of different sizes, and both as one."""
    rng = np.random.default_rng(0)
    parts = [tf.constant(rng.normal(size=(n, 3, 4)), tf.float32) for n in (2, 3)]
    return [*parts, tf.concat(parts, 0)]


ALL = {
    f"{kind}, {name}": function
    for kind, functions in {
        "joined": JOINED,
        "same": SAME,
        "mean": MEANS,
        "sum": SUMS,
        "coupled": COUPLED,
    }.items()
    for name, function in functions.items()
}


@pytest.mark.parametrize("name", ALL)
def test_what_a_function_computes_that_is_called(name):
    _, outside = found(ALL[name])
    _, inside = found(tf.function(ALL[name], autograph=False))
    assert inside == outside


@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined(name, batches):
    function, dependence = found(JOINED[name])
    assert isinstance(dependence, Samples)
    assert dependence.order is None
    first, second, both = map(function, batches)
    # Products of matrices of other sizes may be added up in another order.
    np.testing.assert_allclose(tf.concat([first, second], dependence.axis), both, rtol=1e-6)


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same(name, batches):
    function, dependence = found(SAME[name])
    assert dependence is CONSTANT
    first, second, both = map(function, batches)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, both)


@pytest.mark.parametrize("name", SIZES)
def test_what_grows(name, batches):
    function, dependence = found(SIZES[name])
    assert isinstance(dependence, Sizes)
    first, second, both = (function(x).numpy() for x in batches)
    np.testing.assert_array_equal(np.where(dependence.grows, first + second, first), both)


@pytest.mark.parametrize("name", NEITHER)
def test_what_is_neither(name):
    _, dependence = found(NEITHER[name])
    is_reordered = isinstance(dependence, Samples) and dependence.order is not None
    assert is_reordered or isinstance(dependence, Mixed), dependence


@pytest.mark.parametrize("name", MEANS | SUMS)
def test_what_is_added_up(name, batches):
    function, dependence = found((MEANS | SUMS)[name])
    assert isinstance(dependence, Total)
    assert dependence.is_mean == (name in MEANS)
    first, second, both = map(function, batches)
    # Of two samples, and of three.
    expected = (2 * first + 3 * second) / 5 if dependence.is_mean else first + second
    np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", COUPLED)
def test_what_is_coupled(name, batches):
    function, dependence = found(COUPLED[name])
    assert isinstance(dependence, Coupled)
    first, second, both = (function(x).numpy() for x in batches)
    for combination in (first + second, (2 * first + 3 * second) / 5):
        assert abs(both - combination) > 1e-4


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_to_be_coupled(name):
    _, dependence = found(UNKNOWN[name])
    assert type(dependence) is Mixed


def test_random_numbers_for_each_sample_are_joined_if_asked_for():
    def noisy(x):
        return tf.nn.experimental.stateless_dropout(x, 0.5, tf.cast(x[0, 0, :2], tf.int32))

    for function in (noisy, NEITHER["random"]):
        assert type(found(function)[1]) is Mixed
        assert found(function, are_draws_joined=True)[1] == Samples()

    def same_for_all(x):
        return x * tf.random.uniform([])

    assert type(found(same_for_all, are_draws_joined=True)[1]) is Mixed


def test_one_of_several_results_may_be_known():
    @tf.function(autograph=False)
    def function(x):
        return tf.unstack(x, axis=1)

    concrete = function.get_concrete_function(SPEC)
    (unstacked,) = [op for op in concrete.graph.get_operations() if op.type == "Unpack"]
    first, second, _ = unstacked.outputs
    known = {first.name: CONSTANT}
    dependences = Dependences(concrete.inputs[0], captured=lambda tensor: True, known=known)
    assert dependences.of(first) is CONSTANT
    assert dependences.of(second) == Samples()
