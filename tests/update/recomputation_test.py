"""Recomputation of activations changes memory and time, and no number."""

import collections
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks import models
from keras import layers

import tfbig
from tests.conftest import make_strategy
from tfbig._keras import memory

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Of a layer that is not used, which plain Keras says too.
    pytest.mark.filterwarnings("ignore:Gradients do not exist for variables"),
]

# Recomputing is the same operations in the same order; only XLA fuses them otherwise.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 11, (22, 5))
TOKENS[:, 3:] *= RNG.integers(0, 2, (22, 1))  # Padding.
TARGETS = RNG.integers(0, 11, (22, 5))


@keras.saving.register_keras_serializable("recomputation_test")
class Block(layers.Layer):
    """Attention and a dense layer, with all that a layer may do besides compute."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.width = width
        self.attention = layers.MultiHeadAttention(2, width // 2, dropout=0.1)
        self.dropout = layers.Dropout(0.3)
        self.normalization = layers.BatchNormalization()
        self.dense = layers.Dense(width, "gelu", activity_regularizer="l2", kernel_regularizer="l2")
        self.calls = self.add_weight(trainable=False, initializer="zeros", name="calls")

    def build(self, shape):
        self.attention.build(shape, shape)
        self.normalization.build(shape)
        self.dense.build(shape)

    def call(self, x, mask=None):
        # No `training` is handed on: the layers inside take it from the call around them.
        y = x + self.dropout(self.attention(x, x))
        y = self.dense(self.normalization(y))
        self.add_loss(0.01 * keras.ops.mean(y**2))
        self.calls.assign(self.calls + 1)
        return x + y

    def get_config(self):
        return super().get_config() | {"width": self.width}


class Lookup(layers.Layer):
    """An embedding inside of a layer: its gradient is that of the rows looked up."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(11, 4)
        self.unused = layers.Dense(2)

    def build(self, shape):
        self.embedding.build(shape)
        self.unused.build((None, 2))

    def call(self, x):
        return self.embedding(x)


def blocks(**options):
    x = keras.Input((5,), dtype="int32")
    h = layers.Embedding(11, 4, mask_zero=True)(x)
    shared = Block(4, name="shared")
    h = shared(Block(4, name="frozen", trainable=False)(shared(h)))
    return tfbig.Model(x, layers.Dense(11)(h), **options)


def lookup(**options):
    x = keras.Input((5,), dtype="int32")
    return tfbig.Model(x, layers.Dense(11)(Lookup()(x)), **options)


def recurrent(**options):
    x = keras.Input((5,), dtype="int32")
    h = layers.Embedding(11, 4, mask_zero=True)(x)
    h = layers.GRU(4, return_sequences=True, dropout=0.2)(h)
    return tfbig.Model(x, layers.Dense(11)(h), **options)


def dense(**options):
    x = keras.Input((5,), dtype="int32")
    h = layers.Embedding(11, 4)(x)
    for _ in range(2):
        inner = [layers.Dense(8, "gelu"), layers.Dropout(0.2), layers.Dense(4)]
        h = layers.LayerNormalization()(h + keras.Sequential(inner)(h))
    return tfbig.Model(x, layers.Dense(11)(h), **options)


class Draws(layers.Layer):
    """Draws from the generator that all layers share, whose state is no variable of the layer."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), dtype=x.dtype)


def shared_generator(**options):
    x = keras.Input((5,), dtype="int32")
    h = layers.Embedding(11, 4)(x)
    inner = keras.Sequential([layers.Dense(4), Draws(name="first"), layers.Dense(4)])
    return tfbig.Model(x, layers.Dense(11)(Draws(name="second")(inner(h))), **options)


def train(build, name="default", compile_kwargs=None, **options):
    """Trains from the same start; returns weights, moments, history and the model."""
    keras.utils.set_random_seed(1)
    with make_strategy(name).scope():
        model = build(**options)
        model.compile(
            keras.optimizers.AdamW(0.01, weight_decay=0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **compile_kwargs or {},
        )
    history = model.fit(TOKENS, TARGETS, batch_size=11, epochs=3, shuffle=False, verbose=0)
    states = [*model.variables, *model.optimizer.variables]
    values = [_first(v).numpy() for v in states]
    return values, history.history, model


def _first(variable):
    return getattr(variable.value, "values", [variable.value])[0]


def assert_same(got, want, tolerance=TOLERANCE):
    for a, b in zip(got[0], want[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    assert got[1].keys() == want[1].keys()
    for name, values in want[1].items():
        np.testing.assert_allclose(got[1][name], values, rtol=tolerance, atol=tolerance)


JIT, EAGERLY = {"jit_compile": True}, {"run_eagerly": True}


@pytest.mark.filterwarnings("ignore:The forward pass changes variables")
@pytest.mark.parametrize(
    ("build", "name", "compile_kwargs"),
    [
        (blocks, "default", {}),
        pytest.param(blocks, "default", JIT, marks=pytest.mark.slow),
        pytest.param(blocks, "default", EAGERLY, marks=pytest.mark.slow),
        pytest.param(blocks, "mirrored_2", {}, marks=pytest.mark.slow),
        pytest.param(blocks, "mirrored_2", JIT, marks=pytest.mark.slow),
        (lookup, "default", {}),
        (lookup, "default", JIT),
        (recurrent, "default", {}),
    ],
    ids=lambda v: v.__name__ if callable(v) else "-".join(v) if isinstance(v, dict) else v,
)
def test_training_is_the_same(build, name, compile_kwargs):
    options = {"micro_batch_size": 3, "compile_kwargs": compile_kwargs}
    assert_same(train(build, name, recompute=True, **options), train(build, name, **options))


@keras.saving.register_keras_serializable("recomputation_test")
class Probabilities(layers.Layer):
    """Ends in a softmax of Keras, or of TensorFlow."""

    def __init__(self, softmax, **kwargs):
        super().__init__(**kwargs)
        self.softmax = softmax
        self.dense = layers.Dense(11)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.softmax(self.dense(x))


@pytest.mark.parametrize(
    ("softmax", "is_eager"),
    # Keras knows that of TensorFlow by its operation, which is not known eagerly.
    [(keras.ops.softmax, False), (keras.ops.softmax, True), (tf.nn.softmax, False)],
    ids=["Keras", "eager", "TensorFlow"],
)
def test_probabilities_that_round_to_zero_have_the_gradient_of_their_logits(softmax, is_eager):
    def trained(cls, **options):
        x = keras.Input((5,), dtype="int32")
        h = layers.Dense(4, "sigmoid")(layers.Embedding(11, 4)(x))
        model = cls(x, Probabilities(softmax)(h), **options)
        rng = np.random.default_rng(1)
        model.set_weights([30 * rng.normal(size=w.shape) for w in model.get_weights()])
        optimizer = keras.optimizers.Adam(0.1)
        loss = "sparse_categorical_crossentropy"
        model.compile(optimizer, loss, metrics=[loss], run_eagerly=is_eager)
        history = model.fit(TOKENS, TARGETS, batch_size=11, shuffle=False, verbose=0).history
        return model.get_weights(), history

    found = trained(tfbig.Model, micro_batch_size=3, recompute=True)
    expected = trained(keras.Model)
    # Clipped to the epsilon of Keras, no loss is larger than 16.
    assert expected[1]["loss"][0] > 17
    assert_same(found, expected)


def test_generator_that_layers_share():
    names = ["first", "second"]
    split = {"micro_batch_size": 3}
    assert_same(train(shared_generator, recompute=names, **split), train(shared_generator, **split))


def test_whole_batch_is_recomputed_too():
    assert_same(train(blocks, recompute=True), train(blocks))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(precision):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(precision)
    # To the bit. (Keras cannot add up losses of half precision, which `blocks` has; in a loop
    # over time, TensorFlow adds gradients up in half precision in one case, float32 in the other.)
    kwargs = {"micro_batch_size": 3}
    assert_same(train(dense, recompute=True, **kwargs), train(dense, **kwargs), tolerance=0)


class Mixed(layers.Layer):
    """Computes in half precision, and a layer inside in float32."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.half = layers.Dense(6, "tanh")
        self.whole = layers.Dense(6, "tanh", dtype="float32")

    def call(self, x):
        return self.whole(self.half(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Dense(6, "tanh", dtype="bfloat16"),
        lambda: layers.Dense(6, "tanh", dtype="float64"),
        lambda: Mixed(dtype="mixed_bfloat16"),
    ],
    ids=["half", "double", "mixed"],
)
def test_layers_of_other_dtypes_than_the_model(make):
    keras.config.set_floatx("float32")

    def trained(recompute):
        keras.utils.set_random_seed(1)
        inner = [make(), make(), layers.Dense(3, dtype="float64")]
        model = tfbig.Sequential(
            [keras.Input((6,)), *inner], micro_batch_size=3, recompute=recompute
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x = np.random.default_rng(0).normal(size=(12, 6))
        model.fit(x, x[:, :3], batch_size=6, shuffle=False, verbose=0)
        return model.get_weights()

    for a, b in zip(trained(True), trained(None), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_run_twice_only_where_they_are_meant():
    calls = collections.Counter()

    class Counted(layers.Dense):
        def call(self, x):
            calls[self.name] += 1
            return super().call(x)

    def build(**options):
        x = keras.Input((4,))
        inner = keras.Sequential([Counted(4, name="a"), Counted(4, name="b")], name="inner")
        return tfbig.Model(x, Counted(1, name="c")(inner(x)), **options)

    def calls_of(**options):
        model = build(micro_batch_size=2, **options)
        model.compile("sgd", "mse")
        x, y = np.ones((4, 4)), np.ones((4, 1))
        model.train_on_batch(x, y)
        calls.clear()
        model.train_function = None
        model.train_on_batch(x, y)
        trained = dict(calls)
        calls.clear()
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
        evaluated = dict(calls)
        return trained, evaluated

    once, evaluated = calls_of()
    names = ("a", "b", "c")

    def extra(recompute):
        trained, same = calls_of(recompute=recompute)
        assert same == evaluated
        return [trained[name] - once[name] for name in names]

    assert extra(True) == [1, 1, 1]
    assert extra(["a", "c"]) == [1, 0, 1]
    # As one: the layers inside of a layer that is recomputed are not again.
    assert extra(["inner", "a"]) == [1, 1, 0]
    assert extra(lambda layer: layer.name == "b") == [0, 1, 0]


def test_option_is_kept():
    model = blocks(recompute=["shared"])
    model.compile("sgd", "mse")
    assert keras.models.clone_model(model).recompute == ["shared"]
    assert type(model).from_config(model.get_config()).recompute == ["shared"]
    model.recompute = lambda layer: layer.name == "frozen"
    assert type(model).from_config(model.get_config()).recompute == ["frozen"]
    model.recompute = [model.get_layer("shared")]
    assert type(model).from_config(model.get_config()).recompute == ["shared"]
    with pytest.raises(ValueError, match="'nowhere'"):
        model.recompute = ["nowhere"]
    assert type(model).from_config(model.get_config()).recompute == ["shared"]
    model.recompute = None
    assert type(model).from_config(model.get_config()).recompute is None
    assert tfbig.extend(blocks(), recompute=True).recompute is True


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        ("shared", "must be True, a list"),
        (3, "must be True, a list"),
        ([1], "must be True, a list"),
        (["shard"], "'shard'.*shared"),
        ([layers.Dense(1, name="other")], "'other'"),
        (lambda layer: False, "at least one layer"),
    ],
)
def test_unknown_layers_are_refused(recompute, message):
    with pytest.raises(ValueError, match=message):
        blocks(recompute=recompute)


class MakesVariable(layers.Layer):
    def call(self, x):
        return x * tf.Variable(1.0, dtype=x.dtype)


class DrawsAnew(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)


class HasLoss(layers.Layer):
    def call(self, x):
        self.add_loss(keras.losses.MeanSquaredError()(x, 2 * x))
        return x


class ForeignVariable(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = [tf.Variable(2.0, dtype="float64")]

    def call(self, x):
        return x * self.hidden[0]


class Gate(layers.Layer):
    """Multiplies its input by a tensor in an object, of which `tf.nest` knows nothing."""

    def call(self, x, box=None):
        return x * (box or self.box).gate


class Gated(tfbig.Model):
    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how, self.dense, self.gate = how, layers.Dense(4), Gate(name="gate")

    def call(self, x):
        h = self.dense(x)
        box = types.SimpleNamespace(gate=tf.constant(2.0, h.dtype) if self.how == "constant" else h)
        if self.how == "argument":
            return self.gate(x, box=box) + h
        self.gate.box = box
        return self.gate(x) + h


def fit_gated(how, recompute, **kwargs):
    keras.utils.set_random_seed(0)
    model = Gated(how, recompute=recompute, micro_batch_size=4)
    model.compile("sgd", "mse", **kwargs)
    model.fit(RNG.normal(size=(8, 4)), np.ones((8, 4)), verbose=0)
    return model


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("how", ["attribute", "argument"])
def test_a_tensor_that_is_no_argument_is_refused(how, jit_compile):
    # Its gradient would be lost; and later, another may be in its place.
    message = "gate'.*not among its arguments"
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=message):
        fit_gated(how, ["gate"], jit_compile=jit_compile)


def test_a_constant_is_no_argument():
    assert int(fit_gated("constant", ["gate"]).optimizer.iterations.numpy()) == 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: MakesVariable(name="bad"), "'.*bad': it makes a variable"),
        (lambda: DrawsAnew(name="bad"), "'.*bad': it draws other numbers"),
        (lambda: HasLoss(name="bad"), "'.*bad': it computes a Keras loss"),
        (lambda: ForeignVariable(name="bad"), "'.*bad': it uses a tf.Variable"),
        (
            lambda: keras.Sequential(
                [layers.Reshape((2, 2)), layers.GRU(2, stateful=True, name="bad")]
            ),
            "'.*bad': it continues from the state",
        ),
    ],
)
def test_layer_that_cannot_be_recomputed_is_named(layer, message):
    x = keras.Input((4,), batch_size=2)
    built = layer()

    def train_one():
        model = tfbig.Model(x, layers.Dense(1)(built(x)), recompute=[built], micro_batch_size=2)
        model.compile("sgd", "mse")
        model.train_on_batch(np.ones((2, 4)), np.ones((2, 1)))

    with pytest.raises(tfbig.errors.UnsupportedModelError, match=message):
        train_one()


def test_activations_take_less_memory():
    def peak(size, recompute):
        keras.utils.set_random_seed(0)
        inputs, outputs = models.gpt()
        model = tfbig.Model(inputs, outputs, micro_batch_size=size, recompute=recompute)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, jit_compile=False)
        x, y = models.data("gpt", 2 * size)

        def update():
            return model.fit(x, y, batch_size=2 * size, verbose=0)

        update()
        return memory.Meter(["CPU:0"])(update)

    def per_sample(recompute):
        return (peak(12, recompute) - peak(4, recompute)) / 8

    # What is left is what goes from block to block, and one block.
    assert per_sample(None) > 2 * per_sample(True) > 0
