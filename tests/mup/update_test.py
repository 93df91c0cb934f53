"""Updates of a parametrized model, in float64 against updates by hand; and with all of tfbig."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.conftest import make_strategy
from tests.mup.models import batch, mlp, parametrized, weights_of

OPTIMIZERS = keras.optimizers
pytestmark = pytest.mark.usefixtures("float64")

# Weights of `mlp` that are 4 times as wide as in the base: first, second, last; kernel and bias.
SGD_RATES = [4, 4, 1, 4, 1 / 4, 1]
ADAM_RATES = [1, 1, 1 / 4, 1, 1 / 4, 1]
ADAM_GRADIENTS = [4, 4, 4, 4, 1, 1]


def gradients(model, values, x, y):
    """Gradients of the mean squared error at given weights, by NumPy."""
    w1, b1, w2, b2, w3, b3 = values
    first = np.tanh(x @ w1 + b1)
    second = np.tanh(first @ w2 + b2)
    error = 2 * (second @ w3 + b3 - y) / y.size
    d_second = (error @ w3.T) * (1 - second**2)
    d_first = (d_second @ w2.T) * (1 - first**2)
    pairs = [(x, d_first), (first, d_second), (second, error)]
    return [g for inputs, d in pairs for g in (inputs.T @ d, d.sum(0))]


def trained(model, updates=3, **kwargs):
    x, y = batch()
    model.fit(x, y, batch_size=len(x), epochs=updates, shuffle=False, verbose=0, **kwargs)
    return weights_of(model)


def assert_same(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# Keras rounds the numbers of optimizers and schedules to float32: those here are powers of two.


def test_sgd_with_momentum_and_schedule():
    schedule = OPTIMIZERS.schedules.PolynomialDecay(0.125, 4, 0.0)
    model = parametrized(OPTIMIZERS.SGD(schedule, momentum=0.875))
    values, momenta = weights_of(model), [0.0] * 6
    x, y = batch()
    for rate in (0.125, 0.09375, 0.0625):
        pairs = zip(momenta, gradients(model, values, x, y), SGD_RATES, strict=True)
        momenta = [0.875 * m - rate * scale * g for m, g, scale in pairs]
        values = [v + m for v, m in zip(values, momenta, strict=True)]
    assert_same(trained(model), values)


@pytest.mark.parametrize("decay", [0.0, 0.125], ids=["adam", "adamw"])
def test_adam_and_weight_decay(decay):
    # An epsilon as large as gradients, so that what multiplies it counts.
    model = parametrized(
        OPTIMIZERS.AdamW(2**-6, weight_decay=decay, beta_1=0.875, beta_2=0.96875, epsilon=2**-10)
    )
    values, means, squares = weights_of(model), [0.0] * 6, [0.0] * 6
    x, y = batch()
    for t in (1, 2, 3):
        found = [g * c for g, c in zip(gradients(model, values, x, y), ADAM_GRADIENTS, strict=True)]
        means = [m + 0.125 * (g - m) for m, g in zip(means, found, strict=True)]
        squares = [s + 0.03125 * (g**2 - s) for s, g in zip(squares, found, strict=True)]
        rate = 2**-6 * np.sqrt(1 - 0.96875**t) / (1 - 0.875**t)
        # Weight decay knows no width.
        values = [
            v * (1 - 2**-6 * decay) - rate * scale * m / (np.sqrt(s) + 2**-10)
            for v, m, s, scale in zip(values, means, squares, ADAM_RATES, strict=True)
        ]
    assert_same(trained(model), values)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_clipping_measures_in_units_that_keep_their_size(clip):
    limit = 0.01
    model = parametrized(OPTIMIZERS.SGD(0.1, **{clip: limit}))
    values = weights_of(model)
    found = gradients(model, values, *batch())
    units = np.array(ADAM_GRADIENTS if clip == "clipvalue" else np.sqrt(SGD_RATES), "float64")
    measured = [g * u for g, u in zip(found, units, strict=True)]
    norms = [np.sqrt(np.sum(g**2)) for g in measured]
    if clip == "clipvalue":
        clipped = [np.clip(g, -limit, limit) for g in measured]
    elif clip == "clipnorm":
        clipped = [g * min(1, limit / n) for g, n in zip(measured, norms, strict=True)]
    else:
        clipped = [g * min(1, limit / np.sqrt(np.sum(np.square(norms)))) for g in measured]
    assert not np.allclose(clipped[2], measured[2])
    expected = [
        v - 0.1 * scale * g / u
        for v, scale, g, u in zip(values, SGD_RATES, clipped, units, strict=True)
    ]
    assert_same(trained(model, updates=1), expected)


def make_optimizer(name):
    return {
        "sgd": lambda: OPTIMIZERS.SGD(0.1, momentum=0.5, nesterov=True, global_clipnorm=0.05),
        "adamw": lambda: OPTIMIZERS.AdamW(0.02, clipnorm=0.02),
        "muon": lambda: OPTIMIZERS.Muon(0.02),
        "adagrad": lambda: OPTIMIZERS.Adagrad(0.1, clipvalue=0.01),
    }[name]()


each_optimizer = pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "adagrad"])
each_in_ordinary_runs = pytest.mark.parametrize(
    "name",
    ["sgd", "muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adamw", "adagrad"))],
)


@each_optimizer
def test_accumulation_and_loss_scale_change_nothing(name):
    plain = trained(parametrized(make_optimizer(name)))
    # 24 samples, in 5 + 5 + 5 + 5 + 4.
    model = parametrized(
        make_optimizer(name), tfbig.Model, micro_batch_size=5, loss_scale="dynamic"
    )
    # Muon: matrices of a gradient's rounding errors are made orthogonal, too.
    assert_same(trained(model), plain, 1e-8 if name == "muon" else 1e-10)


@each_in_ordinary_runs
def test_replicas_change_nothing(name, mirrored):
    plain = trained(parametrized(make_optimizer(name)))
    with mirrored.scope():
        model = parametrized(
            make_optimizer(name), tfbig.Model, gradient_accumulation_steps=2, loss_scale="dynamic"
        )
    assert_same(trained(model), plain, 1e-8 if name == "muon" else 1e-10)


def test_plain_keras_on_replicas(mirrored):
    plain = trained(parametrized(OPTIMIZERS.Adam(0.02)))
    with mirrored.scope():
        model = parametrized(OPTIMIZERS.Adam(0.02))
    assert_same(trained(model), plain)


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("sgd", "optimizer"),
        ("adamw", "weights"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("adamw", "optimizer"),
                ("adagrad", "optimizer"),
                ("sgd", "weights"),
                ("adagrad", "weights"),
            ]
        ),
    ],
)
def test_divided_state_changes_nothing(name, shard, mirrored):
    plain = trained(parametrized(make_optimizer(name)))
    with mirrored.scope():
        model = parametrized(make_optimizer(name), tfbig.Model, shard=shard)
    assert_same([np.asarray(v) for v in trained(model)], plain)


def with_a_table(optimizer, cls=keras.Model, **options):
    """A parametrized model with an embedding, whose gradient is rows; and its data."""

    def build(width):
        inputs = keras.Input((4,), dtype="int32")
        hidden = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(9, width)(inputs))
        model = cls(inputs, keras.layers.Dense(1)(hidden), **options)
        model.compile(optimizer if width == 16 else "sgd", "mse", jit_compile=False)
        return model

    keras.utils.set_random_seed(7)
    model = tfbig.mup.parametrize(build(16), base=build(4), delta=build(8))
    rng = np.random.default_rng(0)
    return model, rng.integers(0, 9, (8, 4)), rng.normal(size=(8, 1))


def test_rows_of_a_table():
    """Rows are multiplied, too."""
    model, x, y = with_a_table(OPTIMIZERS.SGD(0.1))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - y))
    found = tape.gradient(loss, [v.value for v in model.trainable_variables])
    pairs = zip(weights_of(model), found, [4, 1 / 4, 1], strict=True)
    expected = [v - 0.1 * scale * tf.convert_to_tensor(g).numpy() for v, g, scale in pairs]
    model.train_on_batch(x, y)
    assert_same(weights_of(model), expected)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_rows_of_a_table_are_clipped_where_the_state_is_divided(clip, mirrored):
    plain, x, y = with_a_table(OPTIMIZERS.SGD(0.1, **{clip: 0.01}))
    plain.train_on_batch(x, y)
    with mirrored.scope():
        divided, *_ = with_a_table(
            OPTIMIZERS.SGD(0.1, **{clip: 0.01}), tfbig.Model, shard="optimizer"
        )
    divided.train_on_batch(x, y)
    assert_same(weights_of(divided), weights_of(plain))


@pytest.mark.parametrize("cls", [keras.Model, tfbig.Model])
def test_training_goes_on_after_loading(cls, tmp_path):
    path = tmp_path / "model.keras"
    whole = parametrized(OPTIMIZERS.Adam(0.02), cls)
    trained(whole, 2)
    whole.save(path)
    loaded = keras.models.load_model(path)
    assert tfbig.mup.scales(loaded) == tfbig.mup.scales(whole)
    assert int(loaded.optimizer.iterations.numpy()) == 2
    assert_same(trained(loaded, 2), trained(whole, 2))


def test_loaded_without_compile_and_compiled_later(tmp_path):
    path = tmp_path / "model.keras"
    model = parametrized(OPTIMIZERS.SGD(0.1))
    model.save(path)
    loaded = keras.models.load_model(path, compile=False)
    loaded.compile(OPTIMIZERS.SGD(0.1), "mse", jit_compile=False)
    assert_same(trained(loaded), trained(model))


def test_weights_and_optimizer_saved_alone(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = parametrized(OPTIMIZERS.Adam(0.02))
    trained(model, 2)
    model.save_weights(path)
    # Built by the same program, with other first values.
    other = tfbig.mup.parametrize(mlp(16, OPTIMIZERS.Adam(0.02)), base=mlp(4), delta=mlp(8))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    assert_same(trained(other, 2), trained(model, 2))


def test_checkpoint_of_tensorflow(tmp_path):
    model = parametrized(OPTIMIZERS.Adam(0.02))
    trained(model, 2)
    saved = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    other = tfbig.mup.parametrize(mlp(16, OPTIMIZERS.Adam(0.02)), base=mlp(4), delta=mlp(8))
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other).restore(saved).expect_partial()
    assert_same(trained(other, 2), trained(model, 2))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
def test_a_file_that_does_not_hold_widths_is_warned_of(tmp_path, recwarn):
    with pytest.warns(UserWarning, match=r"does not hold the widths of tfbig.mup"):
        parametrized(OPTIMIZERS.Adam(0.02)).save(tmp_path / "model.h5")
    recwarn.clear()
    mlp(16).save(tmp_path / "plain.h5")
    assert not [w for w in recwarn if "widths" in str(w.message)]


@pytest.mark.parametrize("cls", [keras.Model, tfbig.Model])
def test_clone_begins_anew_and_is_parametrized(cls):
    model = parametrized(OPTIMIZERS.Adam(0.02), cls)
    keras.utils.set_random_seed(3)
    clone = keras.models.clone_model(model)
    keras.utils.set_random_seed(3)
    plain = mlp(16, cls=cls)
    scales = tfbig.mup.scales(model)
    assert tfbig.mup.scales(clone, OPTIMIZERS.Adam()) == scales
    for cloned, new, scale in zip(clone.weights, plain.weights, scales.values(), strict=True):
        np.testing.assert_allclose(cloned, new.numpy() * scale.initial, atol=1e-12)


def test_extended_model_keeps_its_widths():
    plain = trained(parametrized(OPTIMIZERS.Adam(0.02)))
    model = tfbig.extend(parametrized(OPTIMIZERS.Adam(0.02)), micro_batch_size=4)
    assert_same(trained(model), plain)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("is_first", [True, False])
def test_stages_change_nothing(name, is_first):
    """Variables are moved to the devices of their stages, before or after."""

    def make():
        return getattr(OPTIMIZERS, name)(0.02)

    options = {"pipeline": tfbig.distribute.Pipeline(["CPU:0", "CPU:1"])}
    options["gradient_accumulation_steps"] = 3
    if is_first:
        model = tfbig.extend(parametrized(make()), **options)
    else:
        keras.utils.set_random_seed(7)  # As `parametrized` does.
        model = tfbig.extend(mlp(16, make()), **options)
        tfbig.mup.parametrize(model, base=mlp(4), delta=mlp(8))
    assert_same(trained(model), trained(parametrized(make())))


def test_equivalence_of_a_cut_batch():
    model = parametrized(
        OPTIMIZERS.Adam(0.02, global_clipnorm=0.1), tfbig.Model, gradient_accumulation_steps=3
    )
    assert tfbig.check_equivalence(model, *batch()).is_equivalent


def test_optimizer_stays_the_users_own():
    optimizer = OPTIMIZERS.Adam(0.02)
    before = optimizer.get_config()
    model = parametrized(optimizer)
    assert model.optimizer is optimizer
    assert optimizer.get_config() == before
    trained(model, 1)
    optimizer.learning_rate = 0.0
    still = weights_of(model)
    assert_same(trained(model, 1), still, 0)


def test_other_models_are_left_alone():
    """One process trains both: those without widths as Keras does, to the bit."""

    def plain():
        keras.utils.set_random_seed(2)
        return trained(mlp(16, OPTIMIZERS.Adam(0.02, global_clipnorm=0.1)))

    before = plain()
    trained(parametrized(OPTIMIZERS.Adam(0.02)))
    assert_same(plain(), before, 0)


def test_half_precision_scales_the_loss_once():
    strategy = make_strategy("default")
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with strategy.scope():
            model = parametrized(OPTIMIZERS.Adam(0.02))
            wrapped = model.optimizer
            assert isinstance(wrapped, OPTIMIZERS.LossScaleOptimizer)
            assert list(tfbig.mup.scales(model).values())[2].learning_rate == 0.25
            before = weights_of(model)
            after = trained(model, 1)
    finally:
        keras.config.set_dtype_policy("float32")
    # The first update of Adam is as large as its learning rate.
    sizes = [np.max(np.abs(a - b)) for a, b in zip(after, before, strict=True)]
    np.testing.assert_allclose(sizes, 0.02 * np.array(ADAM_RATES), rtol=0.02)
