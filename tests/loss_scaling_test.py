"""Loss scaling: one non-finite value anywhere, and all replicas skip that update, to the bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.combinations import in_turn

from .conftest import make_strategy

# A share of 6 samples makes 3 micro-batches of equal, 4 of unequal size.
SHARE = 6


def net(
    strategy="default",
    dtype=None,
    layers=(),
    optimizer=lambda: keras.optimizers.Adam(0.01),
    compile_options=None,
    **options,
):
    """A compiled multilayer perceptron, `layers` between its two dense ones."""
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        dense = [keras.layers.Dense(n, dtype=dtype) for n in (4, 1)]
        between = [layer() for layer in layers]
        model = tfbig.Sequential([keras.Input((3,)), dense[0], *between, dense[1]], **options)
        model.compile(optimizer(), "mse", **(compile_options or {}))
    return model


def batches(pattern, strategy="default", seed=0):
    """Batches one after another: "g" is a good one, "b" one with an inf in a sample of it."""
    size = SHARE * make_strategy(strategy).num_replicas_in_sync
    random = np.random.default_rng(seed)
    x = random.normal(size=(len(pattern), size, 3)).astype("float32")
    y = random.normal(size=(len(pattern), size, 1)).astype("float32")
    for k, kind in enumerate(pattern):
        if kind == "b":
            x[k, k % size] = np.inf
    return x, y


def fit(model, x, y, **kwargs):
    """Fits batches `(updates, batch, ...)`, returns the logs after each execution."""
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(logs)
    )
    flat = (np.reshape(v, (-1, v.shape[-1])) for v in (x, y))
    options = {"shuffle": False, "verbose": 0, "callbacks": [record]} | kwargs
    history = model.fit(*flat, batch_size=x.shape[1], **options)
    assert np.isfinite(history.history["loss"]).all()
    return seen


def state(model):
    """The copies on all replicas of all that training moves, but the loss scale and metrics."""
    metrics = {id(v) for v in model.metrics_variables}
    variables = [v for v in model.variables if id(v) not in metrics]
    copies = model.distribute_strategy.experimental_local_results
    return [c.numpy() for v in [*variables, *model.optimizer.variables] for c in copies(v.value)]


def scale_state(model):
    return {name: v.numpy() for name, v in vars(model.loss_scale_state).items() if is_variable(v)}


def is_variable(value):
    return isinstance(value, keras.Variable)


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_replicas_agree(model):
    copies = model.distribute_strategy.experimental_local_results
    for variable in [*model.weights, *model.optimizer.variables]:
        first, *rest = copies(variable.value)
        for other in rest:
            np.testing.assert_array_equal(first, other, err_msg=variable.path)


def normalization():
    return keras.layers.BatchNormalization()


def dropout():
    return keras.layers.Dropout(0.5, seed=3)


@in_turn(
    {
        "strategy": ["mirrored_2", "mirrored_4"],
        "steps": [1, 3, 4],
        "dtype, loss_scale": {
            "float32": (None, "dynamic"),
            # 2**15 overflows float16 with these data before anything is injected.
            "mixed_float16": ("mixed_float16", tfbig.DynamicLossScale(initial_scale=2.0**10)),
        },
        "layers": {"plain": (), "state": (normalization, dropout)},
    }
)
def test_one_non_finite_value_skips_exactly_that_update(strategy, steps, dtype, loss_scale, layers):
    model = net(strategy, dtype, layers, gradient_accumulation_steps=steps, loss_scale=loss_scale)
    x, y = batches("g", strategy)
    fit(model, x, y)
    for replica in range(make_strategy(strategy).num_replicas_in_sync):
        count = replica + 1
        bad = x.copy()
        # Over all `steps`, each replica gets both, and in another micro-batch.
        value = (np.inf, np.nan)[(replica + steps) % 2]
        bad[0, replica * SHARE + (replica + steps) % SHARE, 0] = value
        before, scale = state(model), model.loss_scale
        (logs,) = fit(model, bad, y)
        assert_same(state(model), before)
        assert model.loss_scale == logs["loss_scale"] == scale / 2
        assert model.skipped_updates == logs["skipped_updates"] == count
        assert model.optimizer.iterations.numpy() == count

        weights = model.get_weights()
        fit(model, x, y)
        assert not np.array_equal(model.get_weights()[0], weights[0])
        assert all(np.isfinite(v).all() for v in state(model))
        assert_replicas_agree(model)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2", "mirrored_4"])
def test_a_skipped_update_leaves_no_trace_in_later_ones(strategy):
    def optimizer():
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.01])
        return keras.optimizers.AdamW(schedule, use_ema=True, ema_overwrite_frequency=2)

    options = {"gradient_accumulation_steps": 2, "loss_scale": "dynamic"}
    x, y = batches("gbgbbg", strategy)
    good = [0, 2, 5]
    one, other = (net(strategy, None, [normalization], optimizer, **options) for _ in range(2))
    fit(one, x, y)
    fit(other, x[good], y[good])
    # The scales differ by powers of two, which change no bit.
    assert one.loss_scale == other.loss_scale / 8
    assert_same(state(one), state(other))
    assert one.optimizer.iterations.numpy() == 3


def test_the_reported_loss_is_that_of_the_finite_batches():
    model = net(loss_scale="dynamic", optimizer=lambda: keras.optimizers.SGD(0.0))
    x, y = batches("gbg")
    losses = [model.evaluate(x[k], y[k], verbose=0) for k in (0, 2)]
    # Keras adds up in float32.
    assert fit(model, x, y)[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


FACTORS = {"backoff_factor": 0.25, "growth_factor": 3.0, "growth_interval": 1}
MOVES = {
    "growth": ({"growth_interval": 2, "max_scale": 16.0}, "gggggg", [4, 8, 8, 16, 16, 16]),
    "reset": ({"growth_interval": 2}, "gbgg", [4, 2, 2, 4]),
    "floor": ({"min_scale": 1.0}, "bbbb", [2, 1, 1, 1]),
    "factors": (FACTORS, "bg", [1, 3]),
    "hysteresis": ({"hysteresis": 2}, "bbb", [4, 2, 1]),
    "regained": ({"hysteresis": 2, "growth_interval": 2}, "bbggbb", [4, 2, 2, 4, 4, 2]),
    "fixed": (4.0, "bgbg", [4, 4, 4, 4]),
    "small": (0.5, "bg", [0.5, 0.5]),
}


@in_turn(
    {"loss_scale, pattern, scales": MOVES, "strategy": ["default", "mirrored_2", "mirrored_4"]}
)
def test_the_scale_moves_as_its_settings_say(strategy, loss_scale, pattern, scales):
    if isinstance(loss_scale, dict):
        loss_scale = tfbig.DynamicLossScale(initial_scale=4.0, **loss_scale)
    model = net(strategy, loss_scale=loss_scale)
    logs = fit(model, *batches(pattern, strategy))
    assert [entry["loss_scale"] for entry in logs] == scales
    skips = [pattern[: k + 1].count("b") for k in range(len(pattern))]
    assert [entry["skipped_updates"] for entry in logs] == skips
    assert model.optimizer.iterations.numpy() == pattern.count("g")


class SecondOverflows(keras.layers.Layer):
    """A dense layer whose kernel, and nothing else, has a NaN gradient for inputs above 100."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 1), name="kernel")

    def call(self, x):
        @tf.custom_gradient
        def overflowing(kernel):
            factor = tf.where(tf.reduce_max(tf.abs(x)) > 100.0, np.nan, 1.0)
            return tf.identity(kernel), lambda gradient: gradient * factor

        return tf.matmul(x, overflowing(tf.convert_to_tensor(self.kernel)))


@in_turn(
    {"steps_per_execution": [4, 1], "strategy": ["default", "mirrored_2", "mirrored_4"]},
)
def test_too_many_skips_end_in_an_error_that_names_the_variable(strategy, steps_per_execution):
    def model():
        return net(
            strategy,
            layers=[lambda: SecondOverflows(name="second")],
            compile_options={"steps_per_execution": steps_per_execution},
            loss_scale="dynamic",
            gradient_accumulation_steps=2,
        )

    x, y = batches("g" * 132, strategy)
    x[3:] *= 1e4
    failing, reference = model(), model()
    with pytest.raises(
        tfbig.errors.LossScaleError, match=r"^100 updates in a row.* 'sequential\w*/second/kernel'"
    ):
        fit(failing, x, y)
    fit(reference, x[:3], y[:3])
    assert_same(state(failing), state(reference))
    assert failing.skipped_updates == 100
    # The error is one of training, not of the model: it goes on with good data.
    fit(failing, x[:3], y[:3])
    assert failing.optimizer.iterations.numpy() == 6


def test_a_finite_update_forgives_the_skips_before_it():
    model = net(loss_scale=tfbig.DynamicLossScale(max_consecutive_skips=3))
    fit(model, *batches("bbgbbgbb"))
    assert model.skipped_updates == 6
    with pytest.raises(tfbig.errors.LossScaleError, match=r"^3 updates"):
        fit(model, *batches("b"))


def by_keras_file(model, make, folder):
    del make
    model.save(folder / "model.keras")
    with model.distribute_strategy.scope():
        return keras.saving.load_model(folder / "model.keras")


def by_save_weights(model, make, folder):
    model.save_weights(folder / "model.weights.h5")
    resumed = make()
    with resumed.distribute_strategy.scope():
        resumed.optimizer.build(resumed.trainable_variables)
    resumed.load_weights(folder / "model.weights.h5")
    return resumed


def by_checkpoint(model, make, folder):
    path = tf.train.Checkpoint(model=model).save(folder / "checkpoint")
    resumed = make()
    with resumed.distribute_strategy.scope():
        resumed.optimizer.build(resumed.trainable_variables)
    tf.train.Checkpoint(model=resumed).restore(path).assert_existing_objects_matched()
    return resumed


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [
        pytest.param("default", (normalization,), id="default"),
        pytest.param("mirrored_2", (dropout,), id="mirrored_2-random", marks=pytest.mark.slow),
        pytest.param("default", (dropout,), id="default-random"),
        pytest.param("mirrored_2", (normalization,), id="mirrored_2", marks=pytest.mark.slow),
        pytest.param("mirrored_4", (dropout,), id="mirrored_4-random"),
    ],
)
@pytest.mark.parametrize("way", [by_keras_file, by_save_weights, by_checkpoint])
def test_resumed_training_ends_as_the_uninterrupted(strategy, way, layers, tmp_path):
    settings = tfbig.DynamicLossScale(growth_interval=4, hysteresis=2)

    def make():
        return net(strategy, None, layers, gradient_accumulation_steps=2, loss_scale=settings)

    # Cut within a growth interval, after one of two skips that hysteresis allows.
    x, y = batches("gbggbgggg", strategy)
    whole, first = make(), make()
    fit(whole, x, y)
    fit(first, x[:4], y[:4])
    resumed = way(first, make, tmp_path)
    assert scale_state(resumed) == scale_state(first)
    assert resumed.skipped_updates == 1
    assert_same(state(resumed), state(first))
    fit(resumed, x[4:], y[4:])
    assert_same(state(resumed), state(whole))
    assert scale_state(resumed) == scale_state(whole)
    assert whole.loss_scale == settings.initial_scale  # One back-off, one growth.


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("float32", None),
        ("mixed_bfloat16", None),
        ("bfloat16", None),
        ("mixed_float16", 2.0**15),
        ("float16", 2.0**15),
    ],
)
def test_auto_scales_where_the_policy_computes_in_float16(dtype, scale):
    model = net(dtype=dtype)
    assert model.loss_scale == scale
    logs = fit(model, *batches("g"))[0]
    assert {"loss_scale", "skipped_updates"} & set(logs) == (
        {"loss_scale", "skipped_updates"} if scale else set()
    )


@pytest.mark.parametrize("strategy", ["default", "mirrored_2", "mirrored_4"])
def test_loss_scale_can_be_set(strategy):
    model = net(strategy, loss_scale="dynamic")
    x, y = batches("b", strategy)
    assert fit(model, x, y)[0]["loss_scale"] == 2.0**14
    model.loss_scale = 8.0
    assert (model.loss_scale, model.skipped_updates) == (8.0, 0)
    logs = fit(model, x, y)[0]
    assert (logs["loss_scale"], logs["skipped_updates"]) == (8.0, 1)
    model.loss_scale = None
    assert (model.loss_scale, model.skipped_updates) == (None, 0)
    x, y = batches("g", strategy)
    assert set(fit(model, x, y)[0]) == {"loss"}
    model.loss_scale = tfbig.DynamicLossScale(initial_scale=2.0, growth_interval=1)
    assert fit(model, x, y)[0]["loss_scale"] == 4.0


@in_turn(
    {
        "strategy": ["default", "mirrored_2", "mirrored_4"],
        "steps": [1, 3],
        "loss_scale": [None, 64.0],
    }
)
def test_grad_norm_is_that_of_the_whole_batch_before_clipping(strategy, steps, loss_scale):
    model = net(
        strategy,
        optimizer=lambda: keras.optimizers.SGD(0.0, global_clipnorm=1e-3),
        gradient_accumulation_steps=steps,
        loss_scale=loss_scale,
        log_grad_norm=True,
    )
    x, y = batches("g", strategy)
    w1, b1, w2, b2 = (w.astype("float64") for w in model.get_weights())
    hidden = x[0] @ w1 + b1
    error = 2 * (hidden @ w2 + b2 - y[0]) / len(y[0])
    back = error @ w2.T
    gradients = [x[0].T @ back, back.sum(0), hidden.T @ error, error.sum(0)]
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    # The model computes in float32.
    assert fit(model, x, y)[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    model.log_grad_norm = False
    assert "grad_norm" not in fit(model, x, y)[0]


@pytest.mark.parametrize("strategy", ["default", "mirrored_2", "mirrored_4"])
def test_mixed_float16_compiled_by_xla_in_executions_of_several_updates(strategy):
    settings = tfbig.DynamicLossScale(initial_scale=2.0**10)
    x, y = batches("gbggbg", strategy)
    models = []
    for options in ({"jit_compile": True, "steps_per_execution": 3}, {}):
        model = net(
            strategy,
            "mixed_float16",
            compile_options=options,
            optimizer=lambda: keras.optimizers.SGD(0.1),
            gradient_accumulation_steps=3,
            loss_scale=settings,
        )
        logs = fit(model, x, y)
        assert (logs[-1]["loss_scale"], logs[-1]["skipped_updates"]) == (2.0**8, 2)
        assert model.optimizer.iterations.numpy() == 4
        assert_replicas_agree(model)
        models.append(model)
    for one, other in zip(*(m.get_weights() for m in models), strict=True):
        # XLA rounds to float16 elsewhere: 2**-11 of updates of 0.1 x a gradient below 4, x 4.
        np.testing.assert_allclose(one, other, rtol=0, atol=4 * 0.4 * 2**-11)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2", "mirrored_4"])
def test_gradients_that_underflow_in_float16_train_with_the_scale(strategy):
    def tiny(y, y_pred):
        return 1e-8 * tf.reduce_mean((y - y_pred) ** 2, -1)

    def updates(dtype, loss_scale):
        model = net(
            strategy,
            dtype,
            optimizer=lambda: keras.optimizers.SGD(1e6),
            gradient_accumulation_steps=3,
            loss_scale=loss_scale,
        )
        with model.distribute_strategy.scope():
            model.compile(model.optimizer, tiny)
        before = model.get_weights()
        fit(model, *batches("g", strategy))
        return [a - b for a, b in zip(model.get_weights(), before, strict=True)]

    exact = updates("float32", None)
    assert not any(u.any() for u in updates("mixed_float16", None))
    for update, wanted in zip(updates("mixed_float16", "auto"), exact, strict=True):
        assert wanted.any()
        # float16 has 11 bits; a gradient is a sum of products of several rounded numbers.
        np.testing.assert_allclose(update, wanted, rtol=0, atol=2**-8 * np.abs(wanted).max())
