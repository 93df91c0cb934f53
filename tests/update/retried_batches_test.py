"""`retry`: a batch that overflows is trained on at a lower scale, as if that had been the first."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests import job
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import errors

SIZE = 6
UPDATES = 5
# The scale at first, and what gradients may be; it must be halved about eight times.
SCALE, LIMIT = 2.0**20, 2.0**12

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "adam": lambda: keras.optimizers.Adam(0.02),
}


@keras.saving.register_keras_serializable(package="retried_batches_test")
class Overflow(keras.layers.Layer):
    """The identity, whose gradient overflows as it would in half precision."""

    def call(self, x):
        @tf.custom_gradient
        def identity(x):
            return tf.identity(x), lambda dy: tf.where(tf.abs(dy) > LIMIT, dy * np.inf, dy)

        return identity(x)


def layers(dtype=None):
    return [
        keras.Input((3,)),
        keras.layers.Dense(4, "tanh", dtype=dtype),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1, dtype=dtype),
        *([] if dtype else [Overflow()]),
    ]


def net(strategy, settings, optimizer="sgd", compile_options=None, dtype=None, **options):
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        inputs, *rest = layers(dtype)
        if make_strategy(strategy).num_replicas_in_sync > 1 or options:
            # Its statistics are those of micro-batches.
            rest = [x for x in rest if not isinstance(x, keras.layers.BatchNormalization)]
        model = tfbig.Sequential([inputs, *rest], loss_scale=settings, **options)
        model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"], **(compile_options or {}))
    return model


def data(updates=UPDATES):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(updates * SIZE, 3))
    return x, x.sum(-1, keepdims=True)


def fit(model, x, y, **options):
    options = {"batch_size": SIZE, "shuffle": False, "verbose": 0} | options
    return model.fit(x, y, **options).history


def plain(model, optimizer):
    """Plain Keras, with the initial weights of a model."""
    keras.utils.set_random_seed(1)
    own = {type(layer) for layer in model.layers}
    inputs, *rest = layers()
    found = keras.Sequential([inputs, *(x for x in rest if type(x) in own)])
    found.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"])
    return found


@in_turn(
    {
        "strategy, options": {
            "whole": ("default", {}),
            "mirrored": ("mirrored_2", {"gradient_accumulation_steps": 3}),
            "divided state": ("mirrored_2", {"shard": "optimizer"}),
            "divided weights": ("mirrored_2", {"shard": "weights"}),
            "executions": ("mirrored_2", {"compile_options": {"steps_per_execution": 3}}),
            "automatic": ("default", {"micro_batch_size": "auto"}),
            "eager": ("mirrored_2", {"compile_options": {"run_eagerly": True}}),
        },
        "optimizer": list(OPTIMIZERS),
    },
    slow=["divided weights", "eager"],
)
@pytest.mark.usefixtures("float64")
def test_no_batch_is_lost_and_metrics_count_each_once(strategy, options, optimizer):
    x, y = data()
    settings = tfbig.DynamicLossScale(initial_scale=SCALE, retry=True)
    model = net(strategy, settings, optimizer, **options)
    expected = plain(model, optimizer)
    wanted = fit(expected, x, y, epochs=2)
    history = fit(model, x, y, epochs=2)
    assert model.skipped_updates == 0
    assert model.loss_scale < SCALE / 4
    assert int(model.optimizer.iterations.numpy()) == 2 * UPDATES
    pairs = [
        *zip(model.get_weights(), expected.get_weights(), strict=True),
        *((history[name], wanted[name]) for name in ("loss", "mae")),
    ]
    for found, other in pairs:
        # Rounding in float64.
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-10)


def test_float16_trains_to_the_bit_as_from_the_lower_scale():
    x, y = data()
    model = net("default", tfbig.DynamicLossScale(2.0**24, retry=True), dtype="mixed_float16")
    fit(model, x[:SIZE], y[:SIZE])
    lower = model.loss_scale
    assert lower < 2.0**20
    assert model.skipped_updates == 0
    other = net("default", tfbig.DynamicLossScale(lower), dtype="mixed_float16")
    fit(other, x[:SIZE], y[:SIZE])
    for one in (model, other):
        one.train_on_batch(x[SIZE:], y[SIZE:])
    assert model.skipped_updates == other.skipped_updates
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    states = [one.loss_scale_state.variables() for one in (model, other)]
    for a, b in zip(*states, strict=True):
        if "hysteresis" not in a.name:
            np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize(
    ("retry", "skipped"),
    [(True, 1), (20, 1), (3, 2), pytest.param(False, 2, marks=pytest.mark.slow)],
)
def test_a_batch_that_is_given_up_costs_one_skip(retry, skipped, float64):
    x, y = data(2)
    x[0, 0] = np.nan
    model = net("default", tfbig.DynamicLossScale(SCALE, retry=retry))
    before = model.get_weights()
    history = fit(model, x[:SIZE], y[:SIZE])
    assert model.loss_scale == SCALE / 2
    assert model.skipped_updates == 1
    assert history["skipped_updates"] == [1]
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    # A finite batch, which needs more than three retries.
    fit(model, x[SIZE:], y[SIZE:])
    assert model.skipped_updates == skipped
    if skipped == 2:
        assert model.loss_scale == SCALE / 4
    else:
        assert model.loss_scale < SCALE / 2**5
        assert int(model.loss_scale_state.finite_updates.numpy()) == 1


def test_a_skip_that_leaves_the_scale_is_not_retried(float64):
    x, y = data(2)
    model = net("default", tfbig.DynamicLossScale(SCALE, retry=True, hysteresis=2))
    fit(model, x[:SIZE], y[:SIZE])
    assert (model.skipped_updates, model.loss_scale) == (1, SCALE)
    fit(model, x[SIZE:], y[SIZE:])
    assert model.skipped_updates == 1
    assert model.loss_scale < SCALE


def test_updates_that_are_given_up_end_training(float64):
    x, y = data()
    x[:, 0] = np.inf
    settings = tfbig.DynamicLossScale(SCALE, retry=2, max_consecutive_skips=3)
    with pytest.raises(errors.LossScaleError, match=r"^3 updates in a row"):
        fit(net("default", settings), x, y)


def test_it_is_saved_with_the_model_and_adds_nothing_to_its_state(tmp_path):
    settings = tfbig.DynamicLossScale(2.0**6, retry=3)
    model = net("default", settings)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded._scale_settings == settings
    without = net("default", tfbig.DynamicLossScale(2.0**6))
    names = [
        [name for name, _ in tf.train.list_variables(tf.train.Checkpoint(model=m).save(path))]
        for m, path in ((model, str(tmp_path / "a")), (without, str(tmp_path / "b")))
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("retry", [0, -1, 1.5, None, "always"])
def test_bad_values(retry):
    with pytest.raises(errors.InvalidOptionError, match="`retry` must be a bool or an integer"):
        tfbig.DynamicLossScale(retry=retry)


def test_a_scale_that_cannot_be_lowered():
    with pytest.raises(errors.InvalidOptionError, match="`retry` must be False for a scale that"):
        tfbig.DynamicLossScale(1.0, max_scale=1.0, retry=True)


def test_a_train_step_of_ones_own_is_refused():
    class Own(tfbig.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    x, y = data(1)
    model = Own(layers(), loss_scale=tfbig.DynamicLossScale(retry=True))
    model.compile("sgd", "mse")
    with pytest.raises(errors.InvalidOptionError, match="`retry` of DynamicLossScale runs tfbig's"):
        fit(model, x, y)
    share = tfbig.accumulate_gradients(
        lambda batch: tf.reduce_mean(model(batch[0])), model.trainable_variables, (x, y)
    )
    with pytest.raises(errors.InvalidOptionError, match="retry=False"):
        tfbig.apply_gradients(model.optimizer, share, loss_scale=model.loss_scale_state)


@pytest.mark.slow
def test_two_workers_run_a_batch_again_together(tmp_path):
    done = job.run("retry", tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    one, other = job.results(tmp_path)
    assert one == other
    assert one["skipped"] == 0
    keras.config.set_floatx("float64")
    try:
        x, y = data()
        model = net("default", None, gradient_accumulation_steps=2)
        expected = plain(model, "sgd")
        fit(expected, x, y)
        for found, wanted in zip(one["weights"], expected.get_weights(), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
    finally:
        keras.config.set_floatx("float32")
