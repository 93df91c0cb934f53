"""Batches of one size, as TPUs need them: through `fit` on CPU, where the numbers are compared."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests.conftest import make_strategy
from tfbig import _keras, tpu_check

pytestmark = pytest.mark.usefixtures("float64")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(27, 6)), RNG.normal(size=(27, 2))
WEIGHT = RNG.uniform(0.5, 2.0, size=27)


@pytest.fixture
def as_on_tpu(monkeypatch):
    monkeypatch.setattr(_keras.trainer, "is_tpu", lambda strategy: True)


def build(strategy="mirrored_2", **options):
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        inner = [layers.Dense(8, "tanh", kernel_regularizer="l2"), layers.Dense(2)]
        model = tfbig.Sequential([keras.Input((6,)), *inner], **options)
        model.compile(
            keras.optimizers.Adam(0.02, global_clipnorm=0.5),
            "mse",
            metrics=["mae"],
            weighted_metrics=["mse"],
        )
    return model


def fit(model, data=(X, Y), weight=None, batch_size=8, **kwargs):
    x, y = data
    history = model.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=batch_size,
        epochs=2,
        shuffle=False,
        verbose=0,
        **kwargs,
    )
    return history.history


def assert_same(got, want):
    for a, b in zip(
        [*got.variables, *got.optimizer.variables],
        [*want.variables, *want.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-10, atol=1e-10)


# The last batch is of 3 samples; of 8, a replica gets 4, so the second has none of it.
@pytest.mark.parametrize(
    ("strategy", "options", "weight"),
    [
        ("mirrored_2", {"micro_batch_size": 2}, None),
        ("mirrored_2", {"gradient_accumulation_steps": 3}, WEIGHT),
        ("mirrored_2", {}, None),
        ("one_device", {"micro_batch_size": 5}, WEIGHT),
        ("one_device", {"gradient_accumulation_steps": 4, "loss_scale": 8.0}, None),
        ("one_device", {}, None),
    ],
)
def test_filled_batches_change_nothing(strategy, options, weight, monkeypatch):
    want = build(strategy, **options)
    logs = fit(want, weight=weight, validation_data=(X[:11], Y[:11]))
    monkeypatch.setattr(_keras.trainer, "is_tpu", lambda strategy: True)
    got = build(strategy, **options)
    found = fit(got, weight=weight, validation_data=(X[:11], Y[:11]))
    assert_same(got, want)
    assert int(got.optimizer.iterations.numpy()) == 8
    for name, values in logs.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


@pytest.mark.usefixtures("as_on_tpu")
def test_what_fills_a_batch_is_no_part_of_its_statistics():
    def build_with(**options):
        with make_strategy("mirrored_2").scope():
            inner = [layers.BatchNormalization(**options), layers.Dense(2)]
            model = tfbig.Sequential([keras.Input((6,)), *inner], gradient_accumulation_steps=2)
            model.compile("sgd", "mse")
        return model

    single = pytest.warns(UserWarning, match="statistics of single samples")
    with (
        single,
        pytest.raises(
            tfbig.errors.UnsupportedModelError,
            match="needs batches of one size",
        ),
    ):
        fit(build_with(synchronized=True))
    with pytest.warns(UserWarning, match="statistics of single samples"):
        fit(build_with())


@pytest.mark.usefixtures("as_on_tpu")
def test_inputs_without_targets():
    class Distance(tfbig.Model):
        def __init__(self):
            super().__init__(gradient_accumulation_steps=2)
            self.dense = layers.Dense(2)

        def call(self, x):
            a, b = x
            distance = keras.ops.mean(keras.ops.square(self.dense(a) - b))
            self.add_loss(distance)
            return distance

    models = []
    for data in (tf.data.Dataset.from_tensor_slices(((X[:24], Y[:24]),)), None):
        keras.utils.set_random_seed(1)
        models.append(Distance())
        models[-1].compile("sgd")
        x = [X[:24], Y[:24]] if data is None else data.batch(8)
        size = {"batch_size": 8} if data is None else {}
        models[-1].fit(x, shuffle=False, verbose=0, **size)
    assert_same(*models)
    assert np.any(models[0].dense.bias.numpy())


@pytest.mark.usefixtures("as_on_tpu")
def test_batches_have_one_size():
    model, shapes = build(), []
    step = model.train_step

    def train_step(data):
        shapes.append([tuple(v.shape) for v in tf.nest.flatten(data)])
        return step(data)

    train_step.returns_global_logs = True
    model.train_step = train_step
    fit(model)
    filled = [(4, 6), (4, 2), (4,)]
    assert shapes == [filled] * len(shapes)
    # Nothing need be filled where all batches are full.
    shapes.clear()
    model.train_function = None
    fit(model, (X[:24], Y[:24]))
    assert shapes == [[(4, 6), (4, 2)]] * len(shapes)


@pytest.mark.usefixtures("as_on_tpu")
def test_train_on_batch_has_shapes_that_are_known():
    model = build(micro_batch_size=2)
    want = build(micro_batch_size=2)
    want.fit(X[:8], Y[:8], batch_size=8, verbose=0)
    model.train_on_batch(X[:8], Y[:8])
    assert_same(model, want)
    with pytest.raises(tfbig.errors.InvalidOptionError, match=r"batch_size=7\. Use 6 or 8"):
        model.train_on_batch(X[:7], Y[:7])


@pytest.mark.usefixtures("as_on_tpu")
@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        ((X, Y), 7, "must be divisible by the number of cores, which is 2. Received: batch_size=7"),
        ((X, Y), 1, r"Received: batch_size=1\. Use 2\."),
        (
            (
                tf.data.Dataset.from_tensor_slices((X, Y)).group_by_window(
                    lambda *_: tf.constant(0, tf.int64), lambda _, d: d.batch(5), window_size=5
                ),
                None,
            ),
            None,
            "must be known before training",
        ),
        (
            (
                tf.data.Dataset.from_tensor_slices(
                    (tf.RaggedTensor.from_row_lengths(X[:6, 0], [1, 2, 1, 2]), Y[:4])
                ).batch(2),
                None,
            ),
            None,
            "must be dense tensors of fixed shapes",
        ),
    ],
)
def test_batches_that_a_tpu_cannot_have(data, batch_size, message):
    with pytest.raises(tfbig.errors.TfbigError, match=message):
        fit(build(), data, batch_size=batch_size)


def test_size_is_not_found_on_a_tpu(monkeypatch):
    monkeypatch.setattr(_keras.devices, "is_tpu", lambda strategy: True)
    with pytest.raises(tfbig.errors.UnsupportedStrategyError, match="is not supported on TPUs"):
        fit(build("one_device", micro_batch_size="auto"))


def test_too_many_skips_are_noticed_without_assertions(monkeypatch):
    """As on a TPU, whose programs have no assertions."""
    monkeypatch.setattr(_keras.devices, "is_tpu", lambda strategy: True)
    monkeypatch.setattr(tf.debugging, "assert_less", lambda *args: None)
    scale = tfbig.DynamicLossScale(max_consecutive_skips=3)
    model = build("one_device", gradient_accumulation_steps=2, loss_scale=scale)
    x = X.copy()
    x[8:] = np.nan  # Two updates are finite; of those that follow, none.
    with pytest.raises(tfbig.errors.LossScaleError, match="4 updates in a row"):
        model.fit(x, Y, batch_size=4, shuffle=False, verbose=0)
    assert np.all(np.isfinite(model.get_weights()[0]))


def test_a_padded_batch_as_a_tpu_gets_it():
    strategy = tpu_check.made_up_strategy(tpu_check.Slice.parse("v5e:2x2"))
    with strategy.scope():
        model = tfbig.Sequential(
            [keras.Input((6,)), layers.Dense(2)], gradient_accumulation_steps=2, loss_scale=8.0
        )
        model.compile("sgd", "mse", metrics=["mae"])
    share = (tf.TensorSpec([8, 6], "float64"), tf.TensorSpec([8, 2], "float64"))
    program = tpu_check.trace(model, _keras.padding.PaddedBatch(share, tf.TensorSpec([8], "int32")))
    assert tpu_check.findings(program) == []
    # Micro-batches of four samples, and what is left of a smaller batch.
    assert len({place.loops[0] for place in program.places if place.loops}) == 2
