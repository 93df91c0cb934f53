"""The models that benchmark.py measures, in Keras, and data for them.

`benchmark_torch.py` has the same ones in PyTorch. NumPy is all that this file imports at
first, as it is read in environments that have no Keras.
"""

import numpy as np

CLASSES = 10
PIXELS, COLOURS = 64, 3  # Images are (PIXELS, PIXELS, COLOURS).
FILTERS = (32, 64, 128, 256, 512, 512)

# Both transformers: BLOCKS of attention and two dense layers, 3.2 million parameters.
WIDTH, HEADS, BLOCKS = 256, 4, 4
EPSILON = 1e-5  # Of LayerNormalization.
TOKENS, LENGTH = 1024, 64  # Of the decoder.
DEEP = 24  # Blocks of `deep`.
PATCH = 8  # Pixels of a side, for the ViT: as many patches as the decoder has tokens.

NARROW, WIDE = 512, 2048  # Units of `mlp`, and of `wide`.


def data(name, n):
    """`n` samples for a model: what goes in, and the classes, both without meaning."""
    random = np.random.default_rng(0)
    if name in ("gpt", "deep"):
        text = random.integers(TOKENS, size=(n, LENGTH + 1), dtype="int64")
        return text[:, :-1], text[:, 1:]
    shape = {"mlp": (NARROW,), "wide": (WIDE,)}.get(name, (PIXELS, PIXELS, COLOURS))
    # In float32 from the start: a copy in float64 would hide what training needs, as
    # memory is measured by its peak.
    x = random.standard_normal((n, *shape), dtype="float32")
    return x, random.integers(CLASSES, size=n)


def _dense(units, depth=4):
    from keras import Input, layers

    inputs = x = Input((units,))
    for _ in range(depth):
        x = layers.Dense(units, activation="relu")(x)
    return inputs, layers.Dense(CLASSES)(x)


def mlp():
    """A million parameters: small, so that what surrounds the computation shows."""
    return _dense(NARROW)


def wide():
    """17 million parameters: for few samples the update takes longer than the gradient."""
    return _dense(WIDE)


def cnn():
    """Convolutions of 64x64 pixels in three colours, 3.9 million parameters."""
    from keras import Input, layers

    inputs = x = Input((PIXELS, PIXELS, COLOURS))
    for filters in FILTERS[:-1]:
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(FILTERS[-1], 3, padding="same", activation="relu")(x)
    return inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))


def _position_embedding():
    from keras import Layer

    class PositionEmbedding(Layer):
        """Adds a learned vector for each position."""

        def build(self, shape):
            self.embeddings = self.add_weight(shape=shape[1:], initializer="random_normal")

        def call(self, x):
            return x + self.embeddings

    return PositionEmbedding()


def _block(causal):
    from keras import Layer, layers

    class Block(Layer):
        """A pre-LN transformer block, as those of GPT-2 and ViT, without dropout.

        One layer, as in model libraries, so that it is recomputed as one.
        """

        def __init__(self):
            super().__init__()
            self.norm1 = layers.LayerNormalization(epsilon=EPSILON)
            self.attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
            self.norm2 = layers.LayerNormalization(epsilon=EPSILON)
            self.dense1 = layers.Dense(4 * WIDTH, activation="gelu")
            self.dense2 = layers.Dense(WIDTH)

        def build(self, shape):
            self.norm1.build(shape)
            self.attention.build(shape, shape)
            self.norm2.build(shape)
            self.dense1.build(shape)
            self.dense2.build((*shape[:-1], 4 * WIDTH))

        def call(self, x):
            y = self.norm1(x)
            x += self.attention(y, y, use_causal_mask=causal)
            return x + self.dense2(self.dense1(self.norm2(x)))

    return Block()


def _blocks(x, causal, blocks=BLOCKS):
    from keras import layers

    for _ in range(blocks):
        x = _block(causal)(x)
    return layers.LayerNormalization(epsilon=EPSILON)(x)


def gpt(blocks=BLOCKS):
    """A decoder of 64 tokens, 3.7 million parameters; each token is a sample's label."""
    from keras import Input, layers

    inputs = Input((LENGTH,), dtype="int64")
    x = _position_embedding()(layers.Embedding(TOKENS, WIDTH)(inputs))
    return inputs, layers.Dense(TOKENS)(_blocks(x, causal=True, blocks=blocks))


def deep():
    """The decoder with 24 blocks, 19 million parameters: what recomputation is for."""
    return gpt(DEEP)


def vit():
    """A vision transformer of 64 patches and their mean, 3.2 million parameters."""
    from keras import Input, layers

    inputs = Input((PIXELS, PIXELS, COLOURS))
    x = layers.Conv2D(WIDTH, PATCH, strides=PATCH)(inputs)
    x = _position_embedding()(layers.Reshape((-1, WIDTH))(x))
    x = layers.GlobalAveragePooling1D()(_blocks(x, causal=False))
    return inputs, layers.Dense(CLASSES)(x)


MODELS = {"mlp": mlp, "wide": wide, "cnn": cnn, "gpt": gpt, "vit": vit, "deep": deep}
