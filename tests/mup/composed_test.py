"""Models that are put together from others: with a clone inside, and from layers of KerasHub."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.mup.models import batch, mlp
from tests.mup.update_test import SGD_RATES, assert_same, trained, weights_of

OPTIMIZERS = keras.optimizers
pytestmark = pytest.mark.usefixtures("float64")


# --- A teacher that is a clone ----------------------------------------------------------


class Taught(keras.Model):
    """Adds to its loss how far it is from an earlier self, which it clones when it is made."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.student = mlp(width)
        self.teacher = keras.models.clone_model(self.student)
        self.teacher.trainable = False
        self.build((None, 6))

    def build(self, shape):
        self.built = True

    def call(self, x):
        found = self.student(x)
        self.add_loss(keras.ops.mean((found - self.teacher(x)) ** 2))
        return found


class Accumulating(tfbig.GradientAccumulationMixin, Taught):
    pass


def taught(optimizer, cls=Taught, width=16, **options):
    def build(width):
        keras.utils.set_random_seed(7)
        model = cls(width, **(options if width == 16 else {}))
        model.teacher.set_weights(model.student.get_weights())
        model.compile(optimizer if width == 16 else "sgd", "mse", jit_compile=False)
        return model

    return tfbig.mup.build(build, width, base_width=4)


def test_clone_inside_a_model_is_as_wide_as_the_original():
    model = taught(OPTIMIZERS.SGD(0.125))
    assert_same(model.teacher.get_weights(), model.student.get_weights(), 0)
    named = tfbig.mup.scales(model)
    assert list(named)[::6] == ["first/kernel", "first/kernel #2"]
    found = list(named.values())
    assert len(found) == 12
    assert found[:6] == found[6:]
    assert [scale.learning_rate for scale in found[:6]] == SGD_RATES


def test_update_of_a_model_with_a_clone_inside():
    model = taught(OPTIMIZERS.SGD(0.125))
    x, y = batch()
    before = weights_of(model)
    with tf.GradientTape() as tape:
        found = model.student(x)
        loss = tf.reduce_mean((found - y) ** 2) + tf.reduce_mean((found - model.teacher(x)) ** 2)
    gradients = tape.gradient(loss, model.student.trainable_variables)
    pairs = zip(before, gradients, SGD_RATES, strict=True)
    expected = [v - 0.125 * rate * g.numpy() for v, g, rate in pairs]
    teacher = model.teacher.get_weights()
    assert_same(trained(model, updates=1), expected)
    assert_same(model.teacher.get_weights(), teacher, 0)


@pytest.mark.parametrize("name", ["SGD", pytest.param("Adam", marks=pytest.mark.slow)])
def test_split_batches_of_a_model_with_a_clone_inside(name):
    optimizer = getattr(OPTIMIZERS, name)
    plain = trained(taught(optimizer(2**-6)))
    model = taught(optimizer(2**-6), Accumulating, micro_batch_size=5)
    assert_same(trained(model), plain)


# --- Decoders of KerasHub ---------------------------------------------------------------

TOKENS, LENGTH, SAMPLES = 30, 8, 12


def decoder(width):
    hub = pytest.importorskip("keras_hub")
    inputs = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Embedding(TOKENS, width)(inputs)
    hidden = keras.layers.Add()([hidden, hub.layers.PositionEmbedding(LENGTH)(hidden)])
    # Heads of four units, as many as the width has room for.
    hidden = hub.layers.TransformerDecoder(2 * width, width // 4, normalize_first=True)(hidden)
    return keras.Model(inputs, keras.layers.Dense(TOKENS)(hidden))


def llama(width):
    hub = pytest.importorskip("keras_hub")
    backbone = hub.models.LlamaBackbone(
        vocabulary_size=TOKENS,
        num_layers=1,
        num_query_heads=width // 4,
        num_key_value_heads=width // 8,
        hidden_dim=width,
        intermediate_dim=2 * width,
    )
    return hub.models.LlamaCausalLM(backbone, preprocessor=None)


def wide(build, optimizer):
    """Four times as wide as the base."""
    keras.utils.set_random_seed(7)
    model = tfbig.mup.build(build, 32, base_width=8)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    return model


def fitted(model, updates):
    tokens = np.random.default_rng(0).integers(1, TOKENS, size=(SAMPLES, LENGTH))
    data = tokens, np.roll(tokens, -1, axis=1)
    model.fit(*data, batch_size=SAMPLES, epochs=updates, shuffle=False, verbose=0)
    return weights_of(model)


# By kind of weight: what updates of SGD are multiplied by, and what first values are, if their
# initializer knows no width.
RATES = {"vector": 4, "hidden": 1, "output": 1 / 4}
INITIAL = {"vector": 1, "hidden": 1 / 2, "output": 1 / 4}


@pytest.mark.parametrize(
    ("build", "counts"),
    [
        # Tables of tokens and positions, and biases and norms; the matrices of attention and of the
        # dense layers; the last layer. Its bias is the same at every width.
        pytest.param(decoder, [12, 6, 1], id="decoder"),
        # One table and three norms; three dense layers.
        pytest.param(llama, [4, 7, 1], id="llama"),
    ],
)
def test_widths_of_layers_of_kerashub(build, counts):
    scales = [s for s in tfbig.mup.scales(wide(build, "sgd")).values() if s.kind != "fixed"]
    kinds = [scale.kind for scale in scales]
    assert [kinds.count(kind) for kind in RATES] == counts
    assert [scale.learning_rate for scale in scales] == [RATES[kind] for kind in kinds]
    if build is llama:
        assert [scale.initial for scale in scales] == [INITIAL[kind] for kind in kinds]


def test_update_of_a_decoder_of_kerashub():
    model = wide(decoder, OPTIMIZERS.SGD(0.125))
    tokens = np.random.default_rng(0).integers(1, TOKENS, size=(SAMPLES, LENGTH))
    before = weights_of(model)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model.loss(np.roll(tokens, -1, axis=1), model(tokens)))
    gradients = tape.gradient(loss, model.trainable_variables)
    expected = [
        v - 0.125 * scale.learning_rate * tf.convert_to_tensor(g).numpy()
        for v, scale, g in zip(before, tfbig.mup.scales(model).values(), gradients, strict=True)
    ]
    assert_same(fitted(model, updates=1), expected)


@pytest.mark.parametrize("name", ["SGD", pytest.param("Adam", marks=pytest.mark.slow)])
def test_split_batches_of_a_decoder_of_kerashub(name):
    optimizer = getattr(OPTIMIZERS, name)
    plain = fitted(wide(decoder, optimizer(2**-6)), updates=2)
    model = tfbig.extend(wide(decoder, optimizer(2**-6)), micro_batch_size=5)
    assert_same(fitted(model, updates=2), plain)
