"""What a model that was trained leaves behind in its process: nothing."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import ops

import tfbig
from tests.conftest import make_strategy
from tfbig._keras import recomputation, variables

TOKENS = np.random.default_rng(0).integers(0, 50, (8, 6))


def trained(strategy, options):
    """A weak reference to a model of attention that was fitted, evaluated and let go of."""
    with strategy.scope():
        inputs = keras.Input((6,), dtype="int32")
        x = layers.Embedding(50, 8)(inputs)
        x = x + layers.MultiHeadAttention(2, 4)(x, x)
        model = tfbig.Model(inputs, layers.Dense(50)(x), gradient_accumulation_steps=2, **options)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(TOKENS, TOKENS, batch_size=8, verbose=0)
    model.evaluate(TOKENS, TOKENS, verbose=0)
    return weakref.ref(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": True},
        {"head_chunk_size": 4},
        {"attention_chunk_size": 4},
        {"recompute": True, "head_chunk_size": 4, "attention_chunk_size": 4},
        {"shard": "weights"},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_a_model_that_was_trained_leaves_nothing_behind(strategy, options):
    strategy = make_strategy(strategy)
    gc.collect()
    registered = set(ops.gradient_registry.list())
    model = trained(strategy, options)
    gc.collect()
    assert model() is None
    assert set(ops.gradient_registry.list()) == registered


def test_the_gradients_of_a_graph_are_there_as_long_as_the_graph():
    """The backward pass is traced when the forward pass is done and forgotten."""
    layer = layers.Dense(3, kernel_initializer="ones")
    layer.build((None, 2))

    @tf.function
    def forward(x):
        with recomputation.recomputed([layer]), variables.VariableValues():
            return tf.reduce_sum(layer(x) ** 2)

    x = tf.constant([[1.0, 2.0]])
    forward(x)
    gc.collect()
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = forward(x)
    np.testing.assert_allclose(tape.gradient(value, x), [[18.0, 18.0]])
