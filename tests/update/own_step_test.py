"""A `train_step` of one's own: what it uses holds, and what has no effect in it is refused."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.conftest import make_strategy
from tfbig import errors

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 4)), RNG.normal(size=(12, 2))

# Float64 sums in another order differ by some 1e-16 of values near 1.
TOLERANCE = 1e-10

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "adam": lambda: keras.optimizers.Adam(0.02),
}
with_optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)
on_strategies = pytest.mark.parametrize("name", ["default", "mirrored_2"])


def sequential(cls, **options):
    def dense(units, seed, **kwargs):
        initializer = keras.initializers.GlorotUniform(seed)
        return keras.layers.Dense(units, kernel_initializer=initializer, **kwargs)

    layers = [keras.Input((4,)), dense(5, 1, activation="tanh"), dense(2, 2)]
    return cls(layers, **options)


def fit(model, **kwargs):
    settings = {"batch_size": 6, "epochs": 2, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, **settings | kwargs)


def assert_same(model, other, atol=TOLERANCE):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@contextlib.contextmanager
def untrained(model):
    """Asserts that nothing within it changes weights or optimizer."""

    def state():
        return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]

    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    before = state()
    yield
    for a, b in zip(state(), before, strict=True):
        np.testing.assert_array_equal(a, b)


# --- Steps that users write --------------------------------------------------


def plain_step(self, data):
    """As in the guides of Keras."""
    x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
    with tf.GradientTape() as tape:
        loss = self.compute_loss(x, y, self(x, training=True))
        scaled = self.optimizer.scale_loss(loss)
    variables = self.trainable_variables
    self.optimizer.apply(tape.gradient(scaled, variables), variables)
    return {"loss": loss}


class Plain(tfbig.Sequential):
    train_step = plain_step


class PlainTwin(keras.Sequential):
    train_step = plain_step


class Calling(tfbig.Sequential):
    """Calls tfbig's step."""

    def train_step(self, data):
        return super().train_step(data) | {"one": tf.ones(())}


class OfHalves(tfbig.Sequential):
    """Passes on what `passed` names."""

    passed: tuple = ()

    def train_step(self, data):
        def loss(micro_batch):
            x, y = micro_batch
            return self.compute_loss(x, y, self(x, training=True))

        splits = ("gradient_accumulation_steps", "micro_batch_size")
        scale = {"loss_scale": self.loss_scale_state} if "loss_scale" in self.passed else {}
        share = tfbig.accumulate_gradients(
            loss,
            self.trainable_variables,
            data,
            **{name: getattr(self, name) for name in splits if name in self.passed},
            **scale,
        )
        further = ("log_grad_norm", "exchange_dtype", "exchange_bucket_bytes")
        update = tfbig.apply_gradients(
            self.optimizer,
            share,
            **{name: getattr(self, name) for name in further if name in self.passed},
            **scale,
        )
        return {"loss": update.loss}


def of_halves(*passed):
    return type("OfHalves", (OfHalves,), {"passed": passed})


OPTIONS = {
    "gradient_accumulation_steps": 3,
    "micro_batch_size": 2,
    "loss_scale": 8.0,
    "log_grad_norm": True,
    "exchange_dtype": "bfloat16",
    "exchange_bucket_bytes": 2**20,
    "log_gradient_noise_scale": True,
    "recompute": True,
    "head_chunk_size": 4,
    "attention_chunk_size": 4,
}
# Those that the two halves take.
NOT_OF_HALVES = "log_gradient_noise_scale", "recompute", "head_chunk_size", "attention_chunk_size"
OF_HALVES = [n for n in OPTIONS if n not in NOT_OF_HALVES]
each_option = pytest.mark.parametrize("option", OPTIONS)


def given(option):
    split = {"gradient_accumulation_steps": 2} if option == "log_gradient_noise_scale" else {}
    return split | {option: OPTIONS[option]}


RUNS = {
    "fit": lambda model: fit(model),
    "train_on_batch": lambda model: model.train_on_batch(X, Y),
}


@each_option
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_an_option_without_effect_is_refused(option, run_eagerly, run):
    model = sequential(Plain, **given(option))
    model.compile(keras.optimizers.Adam(0.1), "mse", run_eagerly=run_eagerly)
    with (
        untrained(model),
        pytest.raises(
            errors.UnsupportedModelError,
            match=rf"Plain has a `train_step`.*{option}={OPTIONS[option]!r}.*super\(\)\.train_step",
        ),
    ):
        RUNS[run](model)


@each_option
@on_strategies
def test_an_option_that_the_halves_are_not_given_is_refused(option, name):
    others = [n for n in OF_HALVES if n != option]
    with make_strategy(name).scope():
        model = sequential(of_halves(*others), **given(option))
        model.compile(keras.optimizers.Adam(0.1), "mse")
    with (
        untrained(model),
        pytest.raises(errors.UnsupportedModelError, match=f"{option}={OPTIONS[option]!r}"),
    ):
        fit(model)


@pytest.mark.parametrize("option", OF_HALVES)
def test_an_option_that_the_halves_are_given_holds(option):
    model = sequential(of_halves(*OF_HALVES), **{option: OPTIONS[option]})
    model.compile(keras.optimizers.Adam(0.1), "mse")
    fit(model)
    assert model.optimizer.iterations.numpy() == 4


def test_a_scale_must_be_given_to_both_halves():
    class Half(tfbig.Sequential):
        def train_step(self, data):
            share = tfbig.accumulate_gradients(
                lambda d: tf.reduce_mean((self(d[0]) - d[1]) ** 2),
                self.trainable_variables,
                data,
                loss_scale=self.loss_scale_state,
            )
            return {"loss": tfbig.apply_gradients(self.optimizer, share).loss}

    model = sequential(Half, loss_scale=8.0)
    model.compile("sgd", "mse")
    with untrained(model), pytest.raises(errors.UnsupportedModelError, match=r"loss_scale=8\.0"):
        fit(model)


# There is no attention in the model.
@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "attention_chunk_size"])
def test_a_step_that_calls_that_of_tfbig_uses_all(option):
    model = sequential(Calling, **given(option))
    model.compile("sgd", "mse")
    assert "one" in fit(model).history


@with_optimizers
def test_a_step_that_calls_that_of_tfbig_is_exact(optimizer, float64):
    split = sequential(Calling, micro_batch_size=2, loss_scale=8.0)
    plain = sequential(keras.Sequential)
    for model in (split, plain):
        model.compile(OPTIMIZERS[optimizer](), "mse")
        fit(model, batch_size=5)
    assert_same(split, plain)


CLASSES = RNG.integers(0, 3, 12)


def one_hot(data):
    """Smoothed targets in place of classes, as for mixed-up images."""
    return data[0], 0.9 * tf.one_hot(data[1], 3, dtype="float64") + 0.03


def shifted(data):
    """The features and the target of each sample, of what the dataset has together."""
    return data[:, :4], tf.one_hot(tf.cast(data[:, 4], "int32"), 3, dtype="float64")


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("name", ["default", "mirrored_2"])
@pytest.mark.parametrize(
    ("passed_on", "data", "loss"),
    [
        # Of classes, the loss cannot be computed.
        (one_hot, (X, CLASSES), "categorical_crossentropy"),
        # It can, but "accuracy" would be another.
        (one_hot, (X, CLASSES), "binary_crossentropy"),
        (shifted, (np.concatenate([X, CLASSES[:, np.newaxis]], 1),), "categorical_crossentropy"),
    ],
)
def test_a_step_may_pass_on_other_data(passed_on, data, loss, name, run_eagerly, float64):
    def model_of(cls, **options):
        class PassingOn(cls):
            def train_step(self, data):
                return super().train_step(passed_on(data))

            def test_step(self, data):
                return super().test_step(passed_on(data))

        initializer = keras.initializers.GlorotUniform(1)
        x = keras.Input((4,))
        y = keras.layers.Dense(3, "softmax", kernel_initializer=initializer)(x)
        model = PassingOn(x, y, **options)
        model.compile(
            keras.optimizers.Adam(0.02), loss, metrics=["accuracy"], run_eagerly=run_eagerly
        )
        return model

    plain = model_of(keras.Model)
    with make_strategy(name).scope():
        split = model_of(tfbig.Model, gradient_accumulation_steps=2)
    arguments = {"batch_size": 5, "epochs": 2, "shuffle": False, "verbose": 0}
    expected, found = (model.fit(*data, **arguments).history for model in (plain, split))
    assert list(found) == list(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=TOLERANCE)
    assert_same(split, plain)
    np.testing.assert_allclose(
        split.evaluate(*data, verbose=0), plain.evaluate(*data, verbose=0), rtol=0, atol=TOLERANCE
    )


@on_strategies
def test_an_optimizer_is_built_where_it_is_first_applied(name, float64):
    class Half(tfbig.Sequential):
        def train_step(self, data):
            share = tfbig.accumulate_gradients(
                lambda data: keras.ops.mean((self(data[0]) - data[1]) ** 2),
                self.trainable_variables,
                data,
                micro_batch_size=2,
            )
            return {"loss": tfbig.apply_gradients(self.own, share).loss}

    with make_strategy(name).scope():
        model = sequential(Half)
        model.compile()
        model.own = keras.optimizers.Adam(0.02)
    fit(model)
    plain = sequential(keras.Sequential)
    plain.compile(keras.optimizers.Adam(0.02), "mse")
    fit(plain)
    assert_same(model, plain)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_loss_that_makes_variables_is_refused(steps):
    class Half(tfbig.Sequential):
        def train_step(self, data):
            def loss(data):
                x, y = data
                outputs = self(x, training=True)
                # Here, the metrics do not know of targets that are integers.
                self.compute_metrics(x, tf.cast(y, "int32")[:, :1], outputs)
                return keras.ops.mean((outputs - y) ** 2)

            share = tfbig.accumulate_gradients(
                loss, self.trainable_variables, data, gradient_accumulation_steps=steps
            )
            return {"loss": tfbig.apply_gradients(self.optimizer, share).loss}

    class Picky(keras.metrics.Metric):
        def update_state(self, y_true, y_pred, sample_weight=None):
            if y_true.shape[-1] != 1:
                raise ValueError("y_true must be a class.")

        def result(self):
            return 0.0

    model = sequential(Half)
    model.compile("sgd", metrics=[Picky(), "accuracy"])
    with pytest.raises(errors.UnsupportedModelError, match=r"must not make variables.*accuracy"):
        fit(model)


@with_optimizers
@on_strategies
def test_without_options_a_step_is_as_in_keras(optimizer, name, float64):
    models = []
    for cls in (Plain, PlainTwin):
        keras.backend.clear_session()
        with make_strategy(name).scope():
            model = sequential(cls)
            model.compile(OPTIMIZERS[optimizer](), "mse")
        fit(model)
        models.append(model)
    assert models[0].optimizer.iterations.numpy() == 4
    assert_same(*models)


def test_a_step_in_a_function_of_the_users_is_traced_once():
    class Inner(tfbig.Sequential):
        inner = None

        def train_step(self, data):
            if self.inner is None:
                self.inner = tf.function(super().train_step, reduce_retracing=True)
            return self.inner(data)

    model = sequential(Inner, micro_batch_size=2)
    model.compile("sgd", "mse", run_eagerly=True)
    fit(model, batch_size=6)
    model.log_grad_norm = True
    model.train_on_batch(X, Y)


# --- float16 -----------------------------------------------------------------


@pytest.fixture
def float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def test_auto_is_refused_where_it_would_scale_nothing(float16):
    model = sequential(Plain)
    model.compile("sgd", "mse")
    with (
        untrained(model),
        pytest.raises(
            errors.UnsupportedModelError, match=r"loss_scale='auto'.*With loss_scale=None, Keras"
        ),
    ):
        fit(model)


@pytest.mark.parametrize("auto_scale_loss", [True, False])
def test_keras_scales_where_tfbig_does_not(float16, auto_scale_loss):
    model = sequential(Plain, loss_scale=None)
    twin = sequential(PlainTwin)
    for m in (model, twin):
        m.compile(keras.optimizers.SGD(0.1), "mse", auto_scale_loss=auto_scale_loss)
        is_wrapped = isinstance(m.optimizer, keras.optimizers.LossScaleOptimizer)
        assert is_wrapped == auto_scale_loss
        fit(m)
    assert model.loss_scale is None
    assert_same(model, twin, atol=0)


@pytest.mark.parametrize("cls", [Calling, of_halves()])
def test_steps_of_tfbig_refuse_the_scale_of_keras(float16, cls):
    model = sequential(cls, loss_scale=None)
    model.compile("sgd", "mse")
    with (
        untrained(model),
        pytest.raises(errors.InvalidOptionError, match=r"must not be wrapped.*auto_scale_loss"),
    ):
        fit(model)
    model.compile("sgd", "mse", auto_scale_loss=False)
    fit(model)


def test_loss_scale_is_one_that_is_applied(float16):
    assert sequential(tfbig.extend(PlainTwin)).loss_scale is None
    assert sequential(tfbig.Sequential).loss_scale == 2.0**15


# --- `extend` leaves a step alone --------------------------------------------


class Adversarial(keras.Model):
    """Two networks, two optimizers and no `call`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.made, self.judged = sequential(keras.Sequential), sequential(keras.Sequential)

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def train_step(self, data):
        x, y = data
        logs = {}
        for name, network, optimizer in (
            ("made", self.made, self.g_optimizer),
            ("judged", self.judged, self.d_optimizer),
        ):
            with tf.GradientTape() as tape:
                logs[name] = tf.reduce_mean((network(x) - y) ** 2)
            variables = network.trainable_variables
            optimizer.apply(tape.gradient(logs[name], variables), variables)
        return logs

    def test_step(self, data):
        return {"judged": tf.reduce_mean((self.judged(data[0]) - data[1]) ** 2)}

    def predict_step(self, data):
        return self.made(data[0] if isinstance(data, tuple) else data)


WAYS_TO_EXTEND = {
    "model": lambda cls: tfbig.extend(cls()),
    "class": lambda cls: tfbig.extend(cls)(),
    "mixins": lambda cls: type(
        "Both", (tfbig.GradientAccumulationMixin, tfbig.DynamicLossScalingMixin, cls), {}
    )(),
}
ways_to_extend = pytest.mark.parametrize("way", WAYS_TO_EXTEND)


@ways_to_extend
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_step_without_call_trains_as_before(way, run_eagerly, float64):
    histories, models = [], [Adversarial(), WAYS_TO_EXTEND[way](Adversarial)]
    for model in models:
        model.compile(keras.optimizers.Adam(0.02), keras.optimizers.SGD(0.1))
        model.run_eagerly = run_eagerly
        histories.append(fit(model, batch_size=5, validation_data=(X, Y)).history)
    assert list(histories[0]) == ["judged", "made", "val_judged"]
    assert histories[0] == histories[1]
    assert_same(*models, atol=0)
    assert models[1].evaluate(X, Y, verbose=0) == models[0].evaluate(X, Y, verbose=0)
    plain, extended = (m.predict(X, verbose=0) for m in models)
    np.testing.assert_array_equal(extended, plain)


def test_extending_a_compiled_model_keeps_its_optimizers(float64):
    plain, model = Adversarial(), Adversarial()
    for m in (plain, model):
        m.compile(keras.optimizers.Adam(0.02), keras.optimizers.SGD(0.1))
        fit(m)
    model = tfbig.extend(model)
    for m in (plain, model):
        fit(m)
    assert_same(model, plain, atol=0)
    assert model.d_optimizer.iterations.numpy() == 8


@ways_to_extend
def test_keras_goes_on_to_scale_the_loss_of_a_step(way, float16):
    class OfLayers(PlainTwin):
        def __new__(cls, *args, **kwargs):
            return super().__new__(cls)

        def __init__(self, layers=None, **kwargs):
            super().__init__(sequential(keras.Sequential).layers, **kwargs)

    plain, model = OfLayers(), WAYS_TO_EXTEND[way](OfLayers)
    for m in (plain, model):
        m.compile("sgd", "mse")
        assert isinstance(m.optimizer, keras.optimizers.LossScaleOptimizer)
        fit(m)
    assert_same(model, plain, atol=0)
    # Also of a model that was compiled before.
    again = tfbig.extend(plain)
    assert again.optimizer is plain.optimizer
    fit(again)
    fit(model)
    assert_same(again, model, atol=0)
    with pytest.raises(errors.UnsupportedModelError, match="loss_scale='dynamic'"):
        fit(tfbig.extend(plain, loss_scale="dynamic"))


def test_jit_compile_is_warned_of():
    class Net(tfbig.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = keras.ops.mean((self(x) - y) ** 2)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    model = Net([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", jit_compile=True)
    with pytest.warns(UserWarning, match="jit_compile=True has no effect"):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


def test_gradients_in_a_graph_that_orders_nothing():
    """As `wrap_function` makes it, and other frameworks that build graphs."""
    weight = tf.Variable([[2.0]])

    def loss(data):
        x, y = data
        return tf.reduce_mean((x @ weight - y) ** 2)

    def gradient(x, y):
        return tfbig.accumulate_gradients(loss, [weight], (x, y), micro_batch_size=2).loss

    spec = tf.TensorSpec([None, 1])
    program = tf.compat.v1.wrap_function(gradient, [spec, spec])
    x = tf.reshape(tf.range(5.0), (5, 1))
    # The sum of the losses of five samples.
    assert float(program(x, x)) == pytest.approx(30.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="as many samples"):
        program(x, x[:3])
