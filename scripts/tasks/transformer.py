"""The transformers of the tasks: Keras layers with rotary positions."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

# Logits and softmax are at least float32, whatever the rest computes in.
_PRECISE = {"float16": "float32", "bfloat16": "float32"}


def decoder(
    vocabulary: int, length: int, width: int, depth: int
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Inputs and outputs of a GPT-like decoder with tied embeddings.

    Args:
        vocabulary: Number of different tokens; token 0 is padding, at the end of a window.
        length: Tokens of a window.
        width: Of the vector of a token; a multiple of 32.
        depth: Blocks.

    Returns:
        Tokens `(batch, length)`, and logits `(batch, length, vocabulary)` of the next ones. The
        logits carry the mask of padding, so that losses and metrics leave it out.
    """
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    embedding = TiedEmbedding(
        vocabulary,
        width,
        mask_zero=True,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
        reverse_dtype=keras.config.floatx(),
        name="embedding",
    )
    x = embedding(tokens)
    for i in range(depth):
        x = Block(depth, causal=True, name=f"block_{i}")(x)
    x = layers.LayerNormalization(center=False, name="norm")(x)
    return tokens, embedding(x, reverse=True)


@keras.saving.register_keras_serializable("tfbig_scripts")
class TiedEmbedding(layers.ReversibleEmbedding):
    """An embedding whose reverse, from vectors to logits, keeps the mask."""

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        # Keras 3.15 looks for padding among vectors, too, as if they were tokens.
        is_reverse = keras.backend.is_float_dtype(inputs.dtype)
        return mask if is_reverse else super().compute_mask(inputs, mask)


@keras.saving.register_keras_serializable("tfbig_scripts")
class Block(layers.Layer):
    """Self-attention and two dense layers, each after a norm and with a shortcut.

    Attention takes no mask. With `causal`, padding stands after the text, where no earlier token
    sees it; without, there is no padding.

    Args:
        depth: Blocks of the model: the more, the smaller their first additions to the shortcut.
        causal: Whether a position sees only itself and those before it.
        head: Width of an attention head.
    """

    def __init__(self, depth, causal, head=32, **options):
        super().__init__(**options)
        self.depth, self.causal, self.head = depth, causal, head
        self.supports_masking = True

    def build(self, shape: tuple[Any, ...]) -> None:
        width = shape[-1]
        random = keras.initializers.RandomNormal

        def dense(units: int, stddev: float, name: str, **options: Any) -> layers.Dense:
            return layers.Dense(
                units,
                kernel_initializer=random(stddev=stddev),
                use_bias=False,
                dtype=self.dtype_policy,
                name=name,
                **options,
            )

        inner, last = width**-0.5, (2 * self.depth * width) ** -0.5
        self.norm1 = layers.LayerNormalization(center=False, dtype=self.dtype_policy, name="norm1")
        self.attention = dense(3 * width, inner, "attention")
        self.attention_out = dense(width, last, "attention_out")
        self.norm2 = layers.LayerNormalization(center=False, dtype=self.dtype_policy, name="norm2")
        self.dense1 = dense(4 * width, inner, "dense1", activation="gelu")
        self.dense2 = dense(width, last / 2, "dense2")
        for layer in (self.norm1, self.attention, self.attention_out, self.norm2, self.dense1):
            layer.build(shape)
        self.dense2.build((*shape[:-1], 4 * width))

    def call(self, x: Any) -> Any:
        x = x + self.attention_out(self._attend(self.attention(self.norm1(x))))
        return x + self.dense2(self.dense1(self.norm2(x)))

    def _attend(self, x: Any) -> Any:
        length, width = x.shape[1], x.shape[2] // 3
        x = ops.reshape(x, (-1, length, 3, width // self.head, self.head))
        query, key, value = (x[:, :, i] for i in range(3))
        query, key = _rotate(query), _rotate(key)
        scores = ops.einsum("blhd,bmhd->bhlm", query, key) * self.head**-0.5
        scores = ops.cast(scores, _PRECISE.get(self.compute_dtype, self.compute_dtype))
        if self.causal:
            is_before = ops.arange(length)[:, None] >= ops.arange(length)
            scores = ops.where(is_before, scores, -1e9)
        weights = ops.softmax(scores)
        attended = ops.einsum("bhlm,bmhd->blhd", ops.cast(weights, self.compute_dtype), value)
        return ops.reshape(attended, (-1, length, width))

    def compute_output_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return shape

    def get_config(self) -> dict[str, Any]:
        own = {"depth": self.depth, "causal": self.causal, "head": self.head}
        return super().get_config() | own


def _rotate(x: Any) -> Any:
    """Rotates each head's vectors by angles that grow with the position.

    Reference: Su et al. 2021, "RoFormer" (arXiv:2104.09864).
    """
    length, half = x.shape[1], x.shape[3] // 2
    frequency = 10_000.0 ** (-ops.arange(half, dtype="float32") / half)
    angle = ops.arange(length, dtype="float32")[:, None, None] * frequency
    cos, sin = ops.cast(ops.cos(angle), x.dtype), ops.cast(ops.sin(angle), x.dtype)
    first, second = x[..., :half], x[..., half:]
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
