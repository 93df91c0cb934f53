"""`attention_chunk_size`: attention for a few tokens at a time changes no number."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import _keras, errors
from tfbig.distribute import Pipeline

pytestmark = pytest.mark.usefixtures("float64")

# The order of sums differs, nothing else.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
# No other dimension has this size.
SAMPLES, LENGTH, VOCABULARY, WIDTH = 22, 7, 13, 8
TOKENS = RNG.integers(1, VOCABULARY, (SAMPLES, LENGTH))
TOKENS[:, 3:] *= RNG.integers(0, 2, (SAMPLES, 1))  # Padding.
NEXT = RNG.integers(0, VOCABULARY, (SAMPLES, LENGTH))
SHORT = RNG.normal(size=(SAMPLES, 4, WIDTH))


# --- Programs ----------------------------------------------------------------------------


def decoder(cls, length=LENGTH, mask_zero=False, attention=None, **options):
    x = keras.Input((length,), dtype="int32")
    h = layers.Embedding(VOCABULARY, WIDTH, mask_zero=mask_zero)(x)
    attend = attention or (lambda h: layers.MultiHeadAttention(2, 3)(h, h, use_causal_mask=True))
    h = layers.LayerNormalization()(h + attend(h))
    return cls(x, layers.Dense(VOCABULARY)(h), **options)


def padded(cls, **options):
    return decoder(cls, mask_zero=True, **options)


def of_any_length(cls, **options):
    return decoder(cls, length=None, mask_zero=True, **options)


def grouped(cls, **options):
    def attend(h):
        return layers.GroupQueryAttention(2, 4, 2)(h, h)

    return decoder(cls, attention=attend, **options)


def crossed(cls, **options):
    """Queries are as many as keys in neither direction."""
    x, short = keras.Input((LENGTH,), dtype="int32"), keras.Input((4, WIDTH))
    h = layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(x)
    short_of_long = layers.MultiHeadAttention(2, 3, value_dim=5)(short, h)
    h = layers.MultiHeadAttention(2, 3)(h, short_of_long)
    return cls([x, short], layers.Dense(VOCABULARY)(h), **options)


class Attention(layers.Layer):
    """With a temperature that is learned, a mask of keys alone, and one head for all of them."""

    def build(self, shape):
        self.temperature = self.add_weight(initializer="ones", name="temperature")
        self.dense = layers.Dense(3 * 2 * 4)
        self.dense.build(shape)

    def call(self, x):
        q, k, v = ops.split(ops.reshape(self.dense(x), (-1, LENGTH, 6, 4)), 3, axis=2)
        mask = (ops.arange(LENGTH) != 2)[None, None, None]
        y = ops.dot_product_attention(q, k, v, mask=mask, scale=0.5 / self.temperature)
        return ops.reshape(y, (-1, LENGTH, 8))


def learned_scale(cls, **options):
    return decoder(cls, attention=lambda h: Attention()(h), **options)


PROGRAMS = {
    f.__name__: f for f in (decoder, padded, of_any_length, grouped, crossed, learned_scale)
}
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.1),
}


def inputs_of(program):
    return [TOKENS, SHORT] if program is crossed else TOKENS


def trained(cls, program, optimizer="sgd", strategy="default", compile_options=None, **options):
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        model = program(cls, **options)
        model.compile(
            OPTIMIZERS[optimizer](),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=["accuracy"],
            **compile_options or {},
        )
    x = inputs_of(program)
    history = model.fit(x, NEXT, 9, epochs=2, shuffle=False, verbose=0).history
    history["evaluate"] = model.evaluate(x, NEXT, 9, verbose=0)
    return model, history


def assert_same(one, other, program):
    (model, history), (expected, expected_history) = one, other
    for a, b in [
        *zip(model.weights, expected.weights, strict=True),
        *zip(model.optimizer.variables, expected.optimizer.variables, strict=True),
    ]:
        np.testing.assert_allclose(a, b, TOLERANCE, TOLERANCE, err_msg=a.path)
    assert np.isfinite(expected_history["loss"]).all()
    for key, values in expected_history.items():
        np.testing.assert_allclose(history[key], values, TOLERANCE, TOLERANCE, err_msg=key)
    x = inputs_of(program)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), expected.predict(x, verbose=0), TOLERANCE, TOLERANCE
    )


# --- Numbers -----------------------------------------------------------------------------

SETTINGS = {
    "whole": {},
    "micro_batches": {"gradient_accumulation_steps": 3, "log_grad_norm": True},
    "xla": {"compile_options": {"jit_compile": True}, "micro_batch_size": 4},
    "eager": {"compile_options": {"run_eagerly": True}},
    "recomputed": {"recompute": True, "gradient_accumulation_steps": 2},
    "mirrored": {"strategy": "mirrored_2", "gradient_accumulation_steps": 2},
    "several_steps": {"compile_options": {"steps_per_execution": 2}, "micro_batch_size": 5},
}


@in_turn({"settings": SETTINGS, "program": PROGRAMS})
def test_trains_as_plain_keras(settings, program):
    # In an XLA program, Adam sees the rows of an embedding's gradient added up.
    optimizer = "sgd" if settings is SETTINGS["xla"] else "adamw"
    # 7 tokens are chunks of 3, 3 and 1, or of 4 and 3.
    size = 5 if program is of_any_length else 3
    result = trained(tfbig.Model, program, optimizer, attention_chunk_size=size, **settings)
    assert_same(result, trained(keras.Model, program, optimizer), program)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"pipeline": Pipeline(["CPU:0", "CPU:1"])}, id="stages"),
        pytest.param(
            {"shard": "weights", "strategy": "mirrored_2"}, id="shards", marks=pytest.mark.slow
        ),
    ],
)
def test_layers_elsewhere(settings):
    options = {"gradient_accumulation_steps": 3, "attention_chunk_size": 3} | settings
    result = trained(tfbig.Model, padded, **options)
    assert_same(result, trained(keras.Model, padded), padded)


@pytest.mark.parametrize("rows", [1, LENGTH])
def test_mask_of_a_shape_that_is_not_known(rows):
    tensors = [tf.constant(RNG.normal(size=(2, LENGTH, 3, 4))) for _ in range(3)]
    mask = tf.constant(RNG.integers(0, 2, (2, 1, rows, LENGTH)).astype(bool))

    @tf.function(input_signature=[tf.TensorSpec([None] * 4, t.dtype) for t in (*tensors, mask)])
    def attention(q, k, v, mask):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            y = ops.dot_product_attention(q, k, v, mask=mask)
        return y, tape.gradient(y, [q, k, v], tf.cos(y))

    whole = attention(*tensors, mask)
    context = _keras.chunked_attention.ChunkedAttention(3)
    chunked = tf.function(attention.python_function, input_signature=attention.input_signature)
    with _keras.thread.holding("chunked_attention", context):
        found = chunked(*tensors, mask)
    assert context.calls == 1
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(whole), strict=True):
        np.testing.assert_allclose(a, b, TOLERANCE, TOLERANCE)


def test_gradient_of_a_gradient():
    """As for a gradient penalty."""

    class Penalized(tfbig.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            embedding = self.layers[1].embeddings
            with tf.GradientTape() as tape:
                again = self(x, training=training)
                norm = ops.mean(again**2)
            gradient = tf.convert_to_tensor(tape.gradient(norm, embedding.value))
            return loss + ops.mean(gradient**2)

    one = trained(Penalized, decoder, attention_chunk_size=3)
    assert_same(one, trained(Penalized, decoder), decoder)
    unpenalized = trained(tfbig.Model, decoder)[0]
    assert np.abs(one[0].get_weights()[0] - unpenalized.get_weights()[0]).max() > 1e-6


# --- Memory ------------------------------------------------------------------------------


def graphs_of(graph):
    yield graph
    for function in graph._functions.values():
        if getattr(function, "graph", None) is not None:
            yield from graphs_of(function.graph)


def pairs_of_tokens(program):
    """The operations of a program that hold a number for each pair of tokens."""
    return {
        operation.name
        for graph in graphs_of(program)
        for operation in graph.get_operations()
        for t in operation.outputs
        if t.dtype.is_floating and t.shape.rank and t.shape.as_list().count(LENGTH) > 1
    }


@pytest.mark.parametrize("recompute", [None, True])
def test_weights_of_all_pairs_are_never_there(recompute):
    found = {}
    for size in (None, 3):
        options = {"attention_chunk_size": size, "recompute": recompute}
        model, _ = trained(tfbig.Model, decoder, gradient_accumulation_steps=3, **options)
        data = tf.TensorSpec([9, LENGTH], tf.int32), tf.TensorSpec([9, LENGTH], tf.int64)
        programs = {
            "train": tf.function(model.train_step).get_concrete_function(data),
            "evaluate": tf.function(model.test_step).get_concrete_function(data),
            "predict": tf.function(model.predict_step).get_concrete_function(data[:1]),
        }
        found[size] = {k: pairs_of_tokens(v.graph) for k, v in programs.items()}
    assert all(found[None].values())
    assert not any(found[3].values())


# --- Refusals ----------------------------------------------------------------------------


def dropping(cls, **options):
    def attend(h):
        return layers.MultiHeadAttention(2, 3, dropout=0.1, name="drops")(h, h)

    return decoder(cls, attention=attend, **options)


def biased(cls, **options):
    class Biased(layers.Layer):
        def call(self, h):
            q = ops.reshape(h, (-1, LENGTH, 2, 4))
            bias = ops.ones((1, 1, LENGTH, LENGTH))
            return ops.reshape(ops.dot_product_attention(q, q, q, bias=bias), (-1, LENGTH, 8))

    return decoder(cls, attention=lambda h: Biased()(h), **options)


def returning(cls, layer, **options):
    """One layer returns its weights, and another would be computed in chunks."""

    def attend(h):
        h = layers.MultiHeadAttention(2, 3)(h, h)
        return layer(h, h, return_attention_scores=True)[0]

    return decoder(cls, attention=attend, **options)


def returning_weights(cls, **options):
    return returning(cls, layers.MultiHeadAttention(2, 3, name="returns"), **options)


def returning_grouped_weights(cls, **options):
    return returning(cls, layers.GroupQueryAttention(2, 4, 2, name="returns"), **options)


def of_two_axes(cls, **options):
    def attend(h):
        h = layers.MultiHeadAttention(2, 3)(h, h)
        h = layers.Reshape((LENGTH, 2, WIDTH // 2))(h)
        h = layers.MultiHeadAttention(2, 3, attention_axes=(1, 2), name="two_axes")(h, h)
        return layers.Reshape((LENGTH, WIDTH))(h)

    return decoder(cls, attention=attend, **options)


def without(cls, **options):
    return decoder(cls, attention=layers.Dense(WIDTH), **options)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (dropping, "must not have dropout, .* Received: dropout in drops. Use dropout=0"),
        (biased, "takes a mask and no bias"),
        (returning_weights, "neither return their weights nor .* Received: returns. Call it"),
        (returning_grouped_weights, "neither return their weights nor .* Received: returns."),
        (of_two_axes, "nor attend to several axes, .* Received: two_axes. Call it"),
        (without, "`attention_chunk_size` has no effect: .* Leave the option out"),
    ],
)
@pytest.mark.parametrize("run", ["fit", "predict"])
def test_what_cannot_be_computed_in_chunks_is_refused(program, message, run):
    model = program(tfbig.Model, attention_chunk_size=3)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.get_weights()
    with pytest.raises(errors.UnsupportedModelError, match=message):
        model.fit(TOKENS, NEXT, verbose=0) if run == "fit" else model.predict(TOKENS, verbose=0)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_change_after_a_prediction_holds_in_the_next_one():
    model = tfbig.Sequential([keras.Input((LENGTH,)), layers.Dense(2)])
    model.predict(TOKENS, verbose=0)
    model.attention_chunk_size = 2
    with pytest.raises(errors.UnsupportedModelError, match="has no effect"):
        model.predict(TOKENS, verbose=0)
