"""`attention_chunk_size`: the weights of attention for a few tokens at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from tfbig import _integers, _keras, errors

__all__ = ("checked", "in_chunks")


def checked(size: object) -> int | None:
    """Returns the option, checked."""
    if size is None:
        return None
    remedy = "Pass the tokens for which attention is computed at a time, or None for all."
    return _integers.checked("attention_chunk_size", size, remedy)


@contextlib.contextmanager
def in_chunks(model: keras.Model, size: int | None) -> Iterator[None]:
    """The context in which a forward pass is traced.

    Raises:
        UnsupportedModelError: If attention layers need all weights at once, or if there is no
            attention in the forward pass.
    """
    if size is None:
        yield
        return
    names = _keras.chunked_attention.holding_all_weights(model)
    if names:
        raise errors.UnsupportedModelError(
            "With `attention_chunk_size`, attention layers must not have dropout, for which Keras "
            f"computes all weights at once. Received: dropout in {', '.join(names)}. Use dropout=0 "
            "and a Dropout layer after the attention, or leave the option out."
        )
    attention = _keras.chunked_attention.ChunkedAttention(size)
    with _keras.thread.holding("chunked_attention", attention):
        yield
    if not attention.calls:
        raise errors.UnsupportedModelError(
            "`attention_chunk_size` has no effect: it is for attention by "
            "keras.ops.dot_product_attention, as in MultiHeadAttention and GroupQueryAttention. "
            f"Received: attention_chunk_size={size} for {type(model).__name__}, whose forward pass "
            "does not call it. Leave the option out."
        )
