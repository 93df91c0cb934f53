"""Models of any width that the tests of `tfbig.mup` train."""

import keras
import numpy as np

import tfbig

L = keras.layers


def mlp(width, optimizer=None, cls=keras.Model, **options):
    """Two hidden layers; (features, outputs) = (6, 3)."""
    inputs = keras.Input((6,))
    hidden = L.Dense(width, "tanh", name="first")(inputs)
    hidden = L.Dense(width, "tanh", name="second")(hidden)
    model = cls(inputs, L.Dense(3, name="last")(hidden), **options)
    if optimizer is not None:
        model.compile(optimizer, "mse", jit_compile=False)
    return model


def parametrized(optimizer, cls=keras.Model, width=16, **options):
    """Four times as wide as the base; weights drawn anew from one seed."""
    keras.utils.set_random_seed(7)
    return tfbig.mup.parametrize(mlp(width, optimizer, cls, **options), base=mlp(4), delta=mlp(8))


def decoder(width, heads, optimizer=None, output="glorot_uniform"):
    """A decoder of two blocks; tokens `(batch, 24)` of 32 kinds."""
    inputs = keras.Input((24,), dtype="int32")
    hidden = L.Embedding(32, width, embeddings_initializer=keras.initializers.RandomNormal(0, 1))(
        inputs
    )
    for _ in range(2):
        normed = L.LayerNormalization()(hidden)
        attention = L.MultiHeadAttention(heads, width // heads)
        hidden = L.Add()([hidden, attention(normed, normed, use_causal_mask=True)])
        normed = L.LayerNormalization()(hidden)
        inner = L.Dense(2 * width, "gelu")(normed)
        hidden = L.Add()([hidden, L.Dense(width)(inner)])
    hidden = L.LayerNormalization()(hidden)
    model = keras.Model(inputs, L.Dense(32, kernel_initializer=output)(hidden))
    if optimizer is not None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, jit_compile=False)
    return model


def batch(samples=24):
    """Features `(samples, 6)` and targets `(samples, 3)`."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(samples, 6))
    return x, np.sin(x @ rng.normal(size=(6, 3)))


def weights_of(model):
    return [v.numpy() for v in model.trainable_variables]
