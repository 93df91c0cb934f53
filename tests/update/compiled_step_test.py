"""jit_compile="auto" on a CPU: XLA compiles each micro-batch of a model that it makes faster."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig._update import train_step, xla_on_cpu

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # A layer of the decoder counts its calls.
    pytest.mark.filterwarnings("ignore:The forward pass changes variables"),
]

# XLA adds up in another order.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
LENGTH, VOCABULARY, WIDTH = 5, 11, 8
TOKENS = RNG.integers(1, VOCABULARY, (22, LENGTH))
TOKENS[:, 3:] *= RNG.integers(0, 2, (22, 1))  # Padding.
TARGETS = RNG.integers(0, VOCABULARY, (22, LENGTH))
IMAGES, LABELS = RNG.normal(size=(22, 8, 8, 3)), RNG.integers(0, 4, 22)
WEIGHTS = RNG.uniform(0.1, 2, (22, LENGTH))

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.1),
}


@pytest.fixture
def compiled(monkeypatch):
    """How often a step was traced in which each micro-batch is compiled."""
    found = []
    monkeypatch.setattr(train_step, "_say_that_each_is_compiled", lambda: found.append(True))
    return found


@pytest.fixture
def of_any_size(monkeypatch):
    """The smallest of models are worth compiling."""
    monkeypatch.setattr(xla_on_cpu, "_LEAST_WORK", 0)


class Positions(layers.Layer):
    """Adds the first rows of a table; counts its calls, and adds a loss of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.table = layers.Embedding(LENGTH, WIDTH)
        self.calls = self.add_weight(trainable=False, initializer="zeros", name="calls")

    def call(self, x):
        y = x + self.table(ops.arange(ops.shape(x)[1]))
        self.calls.assign(self.calls + 1)
        self.add_loss(0.01 * ops.mean(y**2))
        return y


def decoder(rate=0.0):
    tokens = keras.Input((LENGTH,), dtype="int64")
    x = Positions()(layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(tokens))
    x += layers.Dropout(rate)(layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True))
    x = layers.LayerNormalization()(x)
    x += layers.Dense(WIDTH, "gelu", kernel_regularizer="l2")(x)
    return tokens, layers.Dense(VOCABULARY)(x)


def encoder(rate=0.0):
    images = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 4, 4)(images)
    x = layers.Reshape((4, 4))(x)
    x += layers.Dropout(rate)(layers.MultiHeadAttention(2, 2)(x, x))
    return images, layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.Dense(1024, "relu")(x)))


DATA = {
    "decoder": (decoder, TOKENS, TARGETS, WEIGHTS),
    "encoder": (encoder, IMAGES, LABELS, WEIGHTS[:, 0]),
}


def trained(cls, name, optimizer="sgd", rate=0.0, jit_compile="auto", epochs=2, **options):
    build, x, y, sample_weight = DATA[name]
    keras.utils.set_random_seed(3)
    model = cls(*build(rate), **options)
    model.compile(
        OPTIMIZERS[optimizer](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile,
    )
    history = model.fit(x, y, 9, epochs, verbose=0, shuffle=False, sample_weight=sample_weight)
    return model, history.history


def assert_same(one, other):
    (model, history), (expected, expected_history) = one, other
    for a, b in [
        *zip(model.weights, expected.weights, strict=True),
        *zip(model.optimizer.variables, expected.optimizer.variables, strict=True),
    ]:
        if "calls" in a.path or "seed" in a.path:
            continue
        np.testing.assert_allclose(a, b, TOLERANCE, TOLERANCE, err_msg=a.path)
    for key, values in expected_history.items():
        np.testing.assert_allclose(history[key], values, TOLERANCE, TOLERANCE, err_msg=key)


# --- Numbers ------------------------------------------------------------------


@in_turn(
    {
        "name": ["decoder", "encoder"],
        "optimizer": ["sgd", "adamw"],
        "options": {
            "K3": {"gradient_accumulation_steps": 3, "log_grad_norm": True},
            "K4": {"gradient_accumulation_steps": 4},
            "b2": {"micro_batch_size": 2},
        },
    }
)
def test_makes_the_update_of_plain_keras(compiled, of_any_size, name, optimizer, options):
    result = trained(tfbig.Model, name, optimizer, **options)
    assert compiled
    assert_same(result, trained(keras.Model, name, optimizer, jit_compile=False))


def test_draws_from_the_same_seeds_as_an_uncompiled_step(compiled, of_any_size, monkeypatch):
    monkeypatch.setattr(xla_on_cpu, "_MOST_RANDOM_ALONE", 1)
    options = {"rate": 0.3, "gradient_accumulation_steps": 3}
    one = trained(tfbig.Model, "decoder", **options)
    again = trained(tfbig.Model, "decoder", **options)
    assert len(compiled) == 2
    other = trained(tfbig.Model, "decoder", jit_compile=False, **options)
    assert len(compiled) == 2
    assert_same(one, again)
    one, again, other = (
        [v.numpy() for v in model.variables if "seed" in v.path] for model, _ in (one, again, other)
    )
    # How often was drawn.
    assert one[0][1] == 2 * 3 * 3
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, other)


def test_leaves_a_whole_batch_to_keras(compiled, of_any_size):
    options = {"rate": 0.3, "log_grad_norm": True}
    one = trained(tfbig.Model, "decoder", **options)
    assert not compiled
    assert_same(one, trained(keras.Model, "decoder", rate=0.3, jit_compile=False))


def test_skips_what_is_not_finite(compiled, of_any_size):
    keras.utils.set_random_seed(3)
    model = tfbig.Model(*encoder(), gradient_accumulation_steps=3, loss_scale=1024.0)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.get_weights()
    x = IMAGES[:9].copy()
    x[4] = np.inf
    model.train_on_batch(x, LABELS[:9])
    assert compiled
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    model.train_on_batch(IMAGES[:9], LABELS[:9])
    assert any((a != b).any() for a, b in zip(model.get_weights(), before, strict=True))


# --- Indices out of range -------------------------------------------------------


@pytest.mark.parametrize("where", ["tokens", "targets"])
def test_refuses_indices_out_of_range(compiled, of_any_size, where):
    model, _ = trained(tfbig.Model, "decoder", epochs=1, gradient_accumulation_steps=3)
    assert compiled
    before = model.get_weights()
    data = {"tokens": TOKENS[:9].copy(), "targets": TARGETS[:9].copy()}
    data[where][7, 1] = VOCABULARY
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"indices are out of range: .* \[\d 11 11\]"
    ):
        model.train_on_batch(data["tokens"], data["targets"])
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


# --- Which models ---------------------------------------------------------------


class Peek(layers.Layer):
    """Does something with values on their way."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_shape(self, shape):
        return shape


def dense(function=lambda x: x, length=LENGTH):
    inputs = keras.Input((length, WIDTH))
    x = Peek(function)(layers.Dense(WIDTH)(inputs))
    return inputs, layers.GlobalAveragePooling1D()(layers.Dense(1)(x))


def printing(x):
    tf.print("")
    return x


def asserting(x):
    tf.debugging.assert_less(x, tf.constant(1e9, x.dtype))
    return x


def slicing(x):
    """Takes as many rows as a value says, which XLA would have to know when it compiles."""
    count = tf.cast(tf.reduce_max(x) > -1e9, tf.int32)
    return x + tf.reduce_sum(x[:, :count], 1, keepdims=True)


def looping(x):
    return tf.while_loop(lambda i, _: i < 2, lambda i, x: (i + 1, x * 0.5), (0, x))[1]


KEPT = {
    "print": lambda: dense(printing),
    "assertion": lambda: dense(asserting),
    "slice": lambda: dense(slicing),
    "loop": lambda: dense(looping),
    "python": lambda: dense(
        lambda x: tf.ensure_shape(tf.py_function(lambda v: v, [x], x.dtype), x.shape)
    ),
    "half": lambda: dense(lambda x: ops.cast(ops.cast(x, "float16"), x.dtype)),
    "large_products": lambda: _of_width(700),
    "long": lambda: _attention_of(257),
    "long_with_dropout": lambda: _attention_of(97, dropout=0.1, layers_alike=2),
    "dropout_alone": lambda: _attention_of(8, dropout=0.1),
    "cumulative": lambda: dense(lambda x: x + tf.cumsum(tf.ones((1025, 1), x.dtype))[-1, 0]),
    "recurrent": lambda: _with_layer(layers.LSTM(4)),
    "convolutional": lambda: _with_layer(layers.Conv1D(64, 3)),
}


def _of_width(width):
    inputs = keras.Input((LENGTH, WIDTH))
    x = layers.Dense(width)(inputs)
    for _ in range(3):
        x = layers.Dense(width, "relu")(x)
    return inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(x))


def _attention_of(tokens, dropout=0.0, layers_alike=1):
    inputs = keras.Input((LENGTH, WIDTH))
    x = layers.Reshape((-1, 2))(layers.Dense(2 * tokens)(inputs)[:, 0])
    for _ in range(layers_alike):
        x = layers.MultiHeadAttention(1, 2, dropout=dropout)(x, x)
    return inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(x))


def _with_layer(layer):
    inputs = keras.Input((LENGTH, WIDTH))
    return inputs, layers.Dense(1)(layers.Flatten()(layer(inputs)))


def train_a_batch(build, *, strategy="one_device", compile_options=None, **options):
    x, y = RNG.normal(size=(6, LENGTH, WIDTH)), RNG.normal(size=(6, 1))
    with make_strategy(strategy).scope():
        model = tfbig.Model(*build(), **{"gradient_accumulation_steps": 3} | options)
        model.compile("sgd", "mse", **compile_options or {})
    model.train_on_batch(x, y)
    return model


@pytest.mark.parametrize("name", KEPT)
def test_leaves_alone_what_xla_does_not_do_alike(compiled, of_any_size, name):
    train_a_batch(KEPT[name])
    assert not compiled


def test_leaves_batches_of_any_length_alone(compiled, of_any_size):
    model = tfbig.Model(*dense(length=None), gradient_accumulation_steps=3)
    model.compile("sgd", "mse")
    batches = [(RNG.normal(size=(6, n, WIDTH)), RNG.normal(size=(6, 1))) for n in (4, 5)]
    specs = tf.TensorSpec([None, None, WIDTH], tf.float64), tf.TensorSpec([None, 1], tf.float64)
    data = tf.data.Dataset.from_generator(lambda: batches, output_signature=specs)
    data = data.apply(tf.data.experimental.assert_cardinality(2))
    model.fit(data, verbose=0, shuffle=False)
    assert not compiled


def test_compiles_a_model_of_dense_layers(compiled, of_any_size):
    train_a_batch(dense)
    assert compiled


@pytest.mark.parametrize(
    "build",
    [
        lambda: _attention_of(256),
        lambda: _attention_of(96, dropout=0.1, layers_alike=2),
        lambda: _of_width(100),
    ],
)
def test_compiles_what_is_not_too_large(compiled, of_any_size, build):
    train_a_batch(build)
    assert compiled


def test_leaves_a_small_model_alone(compiled):
    train_a_batch(dense)
    assert not compiled


@pytest.mark.parametrize(
    "settings",
    [
        {"compile_options": {"jit_compile": False}},
        {"compile_options": {"jit_compile": True}},
        {"compile_options": {"run_eagerly": True}},
        {"recompute": True},
        {"pipeline": tfbig.distribute.Pipeline(["CPU:0", "CPU:1"])},
        {"strategy": "mirrored_2"},
    ],
    ids=str,
)
def test_leaves_alone_what_is_asked_for_otherwise(compiled, of_any_size, settings):
    train_a_batch(dense, **settings)
    assert not compiled


class TokensAndPositions(layers.Layer):
    """Looks up both in one table."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(VOCABULARY, WIDTH)

    def call(self, x):
        return self.table(x) + self.table(ops.arange(LENGTH))


def test_leaves_a_table_that_is_looked_up_twice_alone(compiled, of_any_size):
    tokens = keras.Input((LENGTH,), dtype="int64")
    x = TokensAndPositions()(tokens)
    model = tfbig.Model(tokens, layers.Dense(VOCABULARY)(x), gradient_accumulation_steps=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    model.train_on_batch(TOKENS, TARGETS)
    assert not compiled


def test_leaves_a_head_in_chunks_alone(compiled, of_any_size):
    trained(tfbig.Model, "decoder", gradient_accumulation_steps=3, head_chunk_size=2)
    assert not compiled


def test_leaves_batches_of_many_sizes_alone(compiled, of_any_size):
    model = tfbig.Model(*dense(), micro_batch_size=2)
    model.compile("sgd", "mse")
    x, y = RNG.normal(size=(12, LENGTH, WIDTH)), RNG.normal(size=(12, 1))
    schedule = tfbig.callbacks.BatchSizeSchedule({0: 4, 1: 8})
    model.fit(x, y, callbacks=[schedule], verbose=0)
    assert not compiled


def test_jit_compile_can_be_set_after_compile(compiled, of_any_size):
    model, _ = trained(tfbig.Model, "decoder", "adamw", gradient_accumulation_steps=3)
    assert len(compiled) == 1
    model.jit_compile = False
    model.fit(TOKENS, TARGETS, 9, verbose=0)
    assert len(compiled) == 1
    assert model.get_compile_config()["jit_compile"] is False
    model.jit_compile = "auto"
    model.fit(TOKENS, TARGETS, 9, verbose=0)
    assert len(compiled) == 2
    assert model.get_compile_config()["jit_compile"] == "auto"
    model.jit_compile = True
    with pytest.warns(UserWarning, match="rows of an embedding's gradient"):
        model.fit(TOKENS, TARGETS, 9, verbose=0)


def test_saves_that_jit_compile_is_auto(tmp_path):
    model = train_a_batch(lambda: _with_layer(layers.Dense(2)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config()["jit_compile"] == "auto"
    assert loaded.jit_compile is False
    explicit = train_a_batch(
        lambda: _with_layer(layers.Dense(2)), compile_options={"jit_compile": False}
    )
    assert explicit.get_compile_config()["jit_compile"] is False


def test_says_so_once(of_any_size, caplog):
    train_step._say_that_each_is_compiled.cache_clear()
    with caplog.at_level("INFO", "tfbig"):
        for _ in range(2):
            train_a_batch(dense)
    assert [r.getMessage() for r in caplog.records if "jit_compile='auto'" in r.getMessage()] == [
        "tfbig: jit_compile='auto' has XLA compile each micro-batch, which is faster here; "
        "jit_compile=False does not"
    ]
