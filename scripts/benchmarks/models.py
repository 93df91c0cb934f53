"""The models that benchmark.py measures, in Keras, and data for them.

`with_torch.py` has the same ones in PyTorch. Keras is imported where it is used,
since this module also runs in environments without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

    # Inputs and outputs of a functional model.
    Ends = tuple[keras.KerasTensor, keras.KerasTensor]

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


def data(name: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` random samples for a model: inputs and classes."""
    random = np.random.default_rng(0)
    if name in ("gpt", "deep"):
        text = random.integers(TOKENS, size=(n, LENGTH + 1), dtype="int64")
        return text[:, :-1], text[:, 1:]
    shape = {"mlp": (NARROW,), "wide": (WIDE,)}.get(name, (PIXELS, PIXELS, COLOURS))
    # Drawn in float32: memory is measured by its peak, and a copy in float64 would hide what
    # training needs.
    x = random.standard_normal((n, *shape), dtype="float32")
    return x, random.integers(CLASSES, size=n)


def _dense(units: int, depth: int = 4) -> Ends:
    from keras import Input, layers

    inputs = x = Input((units,))
    for _ in range(depth):
        x = layers.Dense(units, activation="relu")(x)
    return inputs, layers.Dense(CLASSES)(x)


def mlp() -> Ends:
    """A million parameters: so small that the overhead of a step shows."""
    return _dense(NARROW)


def wide() -> Ends:
    """17 million parameters: with few samples the update takes longer than the gradient."""
    return _dense(WIDE)


def cnn() -> Ends:
    """Convolutions over 64x64 pixels in three colours, 3.9 million parameters."""
    from keras import Input, layers

    inputs = x = Input((PIXELS, PIXELS, COLOURS))
    for filters in FILTERS[:-1]:
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(FILTERS[-1], 3, padding="same", activation="relu")(x)
    return inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))


def _position_embedding() -> keras.Layer:
    from keras import Layer

    class PositionEmbedding(Layer):
        """Adds a learned vector for each position."""

        def build(self, shape: tuple[int | None, ...]) -> None:
            self.embeddings = self.add_weight(shape=shape[1:], initializer="random_normal")

        def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
            return x + self.embeddings

    return PositionEmbedding()


def _block(causal: bool) -> keras.Layer:
    from keras import Layer, layers

    class Block(Layer):
        """A pre-LN transformer block as in GPT-2 and ViT, without dropout.

        It is one layer, as in model libraries, so that it is recomputed as one.
        """

        def __init__(self) -> None:
            super().__init__()
            self.norm1 = layers.LayerNormalization(epsilon=EPSILON)
            self.attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
            self.norm2 = layers.LayerNormalization(epsilon=EPSILON)
            self.dense1 = layers.Dense(4 * WIDTH, activation="gelu")
            self.dense2 = layers.Dense(WIDTH)

        def build(self, shape: tuple[int | None, ...]) -> None:
            self.norm1.build(shape)
            self.attention.build(shape, shape)
            self.norm2.build(shape)
            self.dense1.build(shape)
            self.dense2.build((*shape[:-1], 4 * WIDTH))

        def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
            y = self.norm1(x)
            x += self.attention(y, y, use_causal_mask=causal)
            return x + self.dense2(self.dense1(self.norm2(x)))

    return Block()


def _blocks(x: keras.KerasTensor, causal: bool, blocks: int = BLOCKS) -> keras.KerasTensor:
    from keras import layers

    for _ in range(blocks):
        x = _block(causal)(x)
    return layers.LayerNormalization(epsilon=EPSILON)(x)


def gpt(blocks: int = BLOCKS) -> Ends:
    """A decoder of 64 tokens, 3.7 million parameters, which predicts each next token."""
    from keras import Input, layers

    inputs = Input((LENGTH,), dtype="int64")
    x = _position_embedding()(layers.Embedding(TOKENS, WIDTH)(inputs))
    return inputs, layers.Dense(TOKENS)(_blocks(x, causal=True, blocks=blocks))


def deep() -> Ends:
    """The decoder with 24 blocks, 19 million parameters: worth recomputing."""
    return gpt(DEEP)


def vit() -> Ends:
    """A vision transformer over 64 patches, averaged at the end, 3.2 million parameters."""
    from keras import Input, layers

    inputs = Input((PIXELS, PIXELS, COLOURS))
    x = layers.Conv2D(WIDTH, PATCH, strides=PATCH)(inputs)
    x = _position_embedding()(layers.Reshape((-1, WIDTH))(x))
    x = layers.GlobalAveragePooling1D()(_blocks(x, causal=False))
    return inputs, layers.Dense(CLASSES)(x)


MODELS = {"mlp": mlp, "wide": wide, "cnn": cnn, "gpt": gpt, "vit": vit, "deep": deep}
