"""`exchange_dtype`: gradients travel in half precision, all else in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.conftest import make_strategy
from tests.update.exchange_test import fit, net, samples

DTYPES = ["bfloat16", "float16"]
# Half a unit in the last place: 8 and 11 bits of mantissa.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture
def exchanged(monkeypatch):
    """Dtypes and number of elements of all that replica 0 exchanges, in order."""
    seen = []
    original = tf.distribute.ReplicaContext.all_reduce

    def all_reduce(self, reduce_op, value, options=None):
        if self._replica_id == 0:
            leaves = tf.nest.flatten(value, expand_composites=True)
            seen.append(sorted({v.dtype.name for v in leaves}))
        return original(self, reduce_op, value, options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", all_reduce)
    return seen


def gradient_of_update(**options):
    """The gradient that SGD applied to the kernel, for a gradient with a loss scale or none."""
    model = net("mirrored_2", optimizer=lambda: keras.optimizers.SGD(1.0), **options)
    kernel = model.layers[-1].kernel
    before = kernel.numpy()
    fit(model, *samples(30), batch_size=30)
    return before - kernel.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_alone_are_cast(dtype, exchanged):
    exact = gradient_of_update(micro_batch_size=4)
    assert exchanged == [["float32"]]
    exchanged.clear()
    got = gradient_of_update(micro_batch_size=4, exchange_dtype=dtype)
    # What they are divided by goes before them, and the rest after them.
    assert exchanged == [["float32"], [dtype], ["float32"]]
    # Each of two parts is rounded, and their sum.
    np.testing.assert_allclose(got, exact, rtol=3 * ROUNDING[dtype])
    assert np.any(got != exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_embeddings(dtype, exchanged):
    def train(**options):
        keras.utils.set_random_seed(1)
        with make_strategy("mirrored_2").scope():
            layers = [keras.layers.Embedding(7, 3), keras.layers.Flatten(), keras.layers.Dense(1)]
            model = tfbig.Sequential([keras.Input((4,), dtype="int32"), *layers], **options)
            model.compile(keras.optimizers.SGD(1.0), "mse")
        before = model.layers[0].embeddings.numpy()
        x = np.random.default_rng(0).integers(0, 7, (16, 4))
        fit(model, x, np.ones((16, 1)))
        return before - model.layers[0].embeddings.numpy()

    got = train(exchange_dtype=dtype, micro_batch_size=3)
    # TensorFlow gathers rows by their bits, for which float16 stands.
    assert exchanged == [["float32"], sorted({dtype, "float16", "int64"}), ["float32"]]
    exact = train(micro_batch_size=3)
    # Of some ten rows that are looked up, each rounded.
    np.testing.assert_allclose(got, exact, rtol=0, atol=10 * ROUNDING[dtype] * abs(exact).max())
    assert np.any(got != exact)


def test_one_replica_exchanges_nothing():
    x, y = samples(16)
    results = []
    for dtype in (None, "bfloat16"):
        model = net("default", micro_batch_size=3, exchange_dtype=dtype)
        fit(model, x, y)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_overflow_is_an_error():
    model = net("mirrored_2", micro_batch_size=2, exchange_dtype="float16")
    x, y = samples(8)
    with pytest.raises(OverflowError, match=r"not finite after the exchange in float16.*bfloat16"):
        fit(model, x, 1e6 * y)
    model = net("mirrored_2", micro_batch_size=2, exchange_dtype="bfloat16")
    fit(model, x, 1e6 * y)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_overflow_is_skipped_with_a_loss_scale():
    model = net(
        "mirrored_2",
        micro_batch_size=2,
        exchange_dtype="float16",
        loss_scale=tfbig.DynamicLossScale(initial_scale=2.0**20),
    )
    before = model.get_weights()
    x, y = samples(8)
    fit(model, x, y)
    assert (model.skipped_updates, model.loss_scale) == (1, 2.0**19)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    # It backs off until gradients fit.
    fit(model, x, y, epochs=12)
    assert int(model.optimizer.iterations.numpy()) > 0
    assert model.loss_scale < 2.0**19


@pytest.mark.parametrize("dtype", ["int32", "float64", "float32", "half precision", 3.5, "int8"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"`exchange_dtype` must be 'bfloat16', 'float16' or None"):
        net("default", exchange_dtype=dtype)


def test_option_is_kept():
    model = net("default", exchange_dtype=tf.bfloat16)
    assert model.exchange_dtype == "bfloat16"
    assert type(model).from_config(model.get_config()).exchange_dtype == "bfloat16"
    model.exchange_dtype = None
    assert model.exchange_dtype is None


def test_own_train_step():
    strategy = make_strategy("mirrored_2")
    with strategy.scope():
        w = keras.Variable(np.full((3, 1), 0.1, "float32"))
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([w])
    x, y = (v.astype("float32") for v in samples(8))

    @tf.function
    def step(x, y):
        def on_replica(x, y):
            share = tfbig.accumulate_gradients(
                lambda d: tf.reduce_mean((d[0] @ w - d[1]) ** 2), [w], (x, y), micro_batch_size=3
            )
            tfbig.apply_gradients(optimizer, share, exchange_dtype="bfloat16")

        strategy.run(on_replica, args=(x, y))

    before = w.numpy()
    step(tf.constant(x), tf.constant(y))
    gradient = 2 * x.T @ (x @ before - y) / 8
    np.testing.assert_allclose(before - w.numpy(), gradient, rtol=3 * ROUNDING["bfloat16"])
