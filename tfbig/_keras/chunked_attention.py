"""Keras's attention on TensorFlow holds the weights of all pairs of tokens; here those of a few.

Keras has flash attention for other backends. Here its own function computes the outputs of some
queries at a time, forward and again in the backward pass (Rabe & Staats 2021, without their online
softmax: the keys are not cut).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.backend.tensorflow import nn
from tensorflow.python.eager import record as _record

from tfbig import _types, errors
from tfbig._keras.gradients import custom_gradient
from tfbig._keras.layers import all_layers
from tfbig._keras.thread import current

__all__ = ("ChunkedAttention", "holding_all_weights")

_attention_of_all = nn._dot_product_attention_xla


@dataclasses.dataclass
class ChunkedAttention:
    """How attention is computed while a thread holds this as "chunked_attention".

    Attributes:
        size: how many queries at a time.
        calls: how often attention was traced or run.
    """

    size: int
    calls: int = 0


def holding_all_weights(model: keras.Model) -> list[str]:
    """The names of Keras's attention layers that need all weights at once, since they drop some."""
    kinds = keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention
    found = [x for x in all_layers(model) if isinstance(x, kinds)]
    return [x.name for x in found if getattr(x, "_dropout", getattr(x, "dropout", 0.0)) > 0]


def _attention(
    query: _types.Tensor,
    key: _types.Tensor,
    value: _types.Tensor,
    bias: _types.Tensor | None,
    mask: _types.Tensor | None,
    is_causal: bool,
    scale: _types.Tensor | float,
) -> _types.Tensor:
    """The function of Keras that this module replaces: `(batch, queries, heads, features)`."""
    context: ChunkedAttention | None = current("chunked_attention")
    if context is None:
        return _attention_of_all(query, key, value, bias, mask, is_causal, scale)
    context.calls += 1
    if bias is not None:
        raise errors.UnsupportedModelError(
            "With `attention_chunk_size`, attention takes a mask and no bias, which would be as "
            "large as the weights. Received: keras.ops.dot_product_attention with a bias. Leave "
            "the option out."
        )
    queries = query.shape[1]
    if queries is not None and queries <= context.size:
        return _attention_of_all(query, key, value, None, mask, is_causal, scale)
    scale = tf.cast(scale, backend.result_type(query.dtype, "float32"))
    return _Chunks.of(query, mask, is_causal, context.size).attention(query, key, value, scale)


nn._dot_product_attention_xla = _attention


def _refused_in_chunks(softmax: _types.AnyFunction) -> _types.AnyFunction:
    """What Keras's layers call with all weights, where they do not leave these to `_attention`."""

    @functools.wraps(softmax)
    def refused(self: _types.Layer, *args: Any, **kwargs: Any) -> _types.Tensor:  # Any: Keras's.
        if current("chunked_attention") is not None:
            raise errors.UnsupportedModelError(
                "With `attention_chunk_size`, attention layers must neither return their weights "
                "nor attend to several axes, for which Keras computes all weights at once. "
                f"Received: {self.name}. Call it without return_attention_scores=True and on "
                "inputs of three dimensions, or leave the option out."
            )
        return softmax(self, *args, **kwargs)

    return refused


for _layer in (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention):
    _layer._masked_softmax = _refused_in_chunks(_layer._masked_softmax)


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunks:
    """How queries are cut into chunks of one length.

    Attributes:
        queries: how many there are, an integer or an int32 scalar.
        number: of chunks, an integer or an int32 scalar.
        length: queries of a chunk.
        mask: bool, of four dimensions, padded to whole chunks where it differs between queries; or
            None.
        is_causal: whether a query sees no later keys.
    """

    queries: int | _types.Tensor
    number: int | _types.Tensor
    length: int
    mask: _types.Tensor | None
    is_causal: bool

    @classmethod
    def of(
        cls, query: _types.Tensor, mask: _types.Tensor | None, is_causal: bool, size: int
    ) -> _Chunks:
        queries = query.shape[1]
        if queries is None:
            queries = tf.shape(query)[1]
            chunks = cls(queries, -(-queries // size), size, None, is_causal)
        else:
            number = -(-queries // size)
            chunks = cls(queries, number, -(-queries // number), None, is_causal)
        if mask is None:
            return chunks
        return dataclasses.replace(chunks, mask=chunks._whole_mask(tf.convert_to_tensor(mask)))

    def _whole_mask(self, mask: _types.Tensor) -> _types.Tensor:
        mask = mask[(None,) * (4 - mask.shape.rank)]
        if mask.shape[2] == 1:
            return mask
        if mask.shape[2] is None:
            # It may have a single row for all queries.
            shape = tf.shape(mask)
            mask = tf.broadcast_to(mask, [shape[0], shape[1], self.queries, shape[3]])
        return self._padded(mask, 2)

    def _padded(self, tensor: _types.Tensor, axis: int) -> _types.Tensor:
        """A tensor with zeros for the queries that the last chunk lacks."""
        lacking = self.number * self.length - self.queries
        if isinstance(lacking, int) and lacking == 0:
            return tensor
        return tf.pad(tensor, [[0, lacking if i == axis else 0] for i in range(4)])

    def _chunk(self, tensor: _types.Tensor, index: _types.Tensor, axis: int) -> _types.Tensor:
        """A chunk of a padded tensor."""
        begin = [index * self.length if i == axis else 0 for i in range(4)]
        chunk = tf.slice(tensor, begin, [self.length if i == axis else -1 for i in range(4)])
        shape = tensor.shape.as_list()
        return tf.ensure_shape(chunk, [*shape[:axis], self.length, *shape[axis + 1 :]])

    def _mask_of(self, index: _types.Tensor, keys: _types.Tensor) -> _types.Tensor | None:
        """The mask of a chunk."""
        mask = self.mask
        if mask is not None and mask.shape[2] != 1:
            mask = self._chunk(mask, index, 2)
        if not self.is_causal:
            return mask
        rows = index * self.length + tf.range(self.length)
        is_earlier = (rows[:, tf.newaxis] >= tf.range(keys))[tf.newaxis, tf.newaxis]
        return is_earlier if mask is None else mask & is_earlier

    def _rows(
        self,
        index: _types.Tensor,
        query: _types.Tensor,
        key: _types.Tensor,
        value: _types.Tensor,
        scale: _types.Tensor,
    ) -> _types.Tensor:
        """The outputs of the queries of a chunk."""
        mask = self._mask_of(index, tf.shape(key)[1])
        return _attention_of_all(query, key, value, None, mask, False, scale)

    def attention(
        self,
        query: _types.Tensor,
        key: _types.Tensor,
        value: _types.Tensor,
        scale: _types.Tensor,
    ) -> _types.Tensor:
        """The outputs of all queries; the backward pass computes the weights again."""

        @custom_gradient
        def function(
            query: _types.Tensor, key: _types.Tensor, value: _types.Tensor, scale: _types.Tensor
        ) -> tuple[_types.Tensor, _types.AnyFunction]:
            padded = self._padded(query, 1)
            with _record.stop_recording():
                chunks = tf.map_fn(
                    lambda i: self._rows(i, self._chunk(padded, i, 1), key, value, scale),
                    tf.range(self.number),
                    fn_output_signature=tf.TensorSpec(
                        [query.shape[0], self.length, query.shape[2], value.shape[3]], value.dtype
                    ),
                    parallel_iterations=1,
                )

            def gradient(upstream: _types.Tensor) -> list[_types.Tensor]:
                return self._gradients(padded, key, value, scale, self._padded(upstream, 1))

            return self._joined(chunks, query), gradient

        return function(query, key, value, scale)

    def _gradients(
        self,
        query: _types.Tensor,
        key: _types.Tensor,
        value: _types.Tensor,
        scale: _types.Tensor,
        upstream: _types.Tensor,
    ) -> list[_types.Tensor]:
        """The gradients by queries, keys, values and scale; `query` and `upstream` are padded."""

        def body(
            index: _types.Tensor, of_queries: tf.TensorArray, *sums: _types.Tensor
        ) -> tuple[_types.Tensor, tf.TensorArray, *tuple[_types.Tensor, ...]]:
            sources = [self._chunk(query, index, 1), key, value, scale]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                outputs = self._rows(index, *sources)
            of_chunk, *rest = tape.gradient(outputs, sources, self._chunk(upstream, index, 1))
            added = [a + tf.cast(b, a.dtype) for a, b in zip(sums, rest, strict=True)]
            return index + 1, of_queries.write(index, of_chunk), *added

        of_queries = tf.TensorArray(query.dtype, size=self.number)
        # Sums of many chunks, wider than half precision.
        zeros = [tf.zeros_like(t, _wide(t.dtype)) for t in (key, value, scale)]
        _, of_queries, *sums = tf.while_loop(
            lambda index, *_: index < self.number,
            body,
            (tf.constant(0), of_queries, *zeros),
            parallel_iterations=1,
        )
        rest = [tf.cast(t, u.dtype) for t, u in zip(sums, (key, value, scale), strict=True)]
        return [self._joined(of_queries.stack(), query), *rest]

    def _joined(self, chunks: _types.Tensor, query: _types.Tensor) -> _types.Tensor:
        """`(number, batch, length, heads, features)` as `(batch, queries, heads, features)`."""
        tensor = tf.transpose(chunks, [1, 0, 2, 3, 4])
        shape = tf.shape(tensor)
        whole = tf.reshape(tensor, [shape[0], -1, shape[3], shape[4]])[:, : self.queries]
        known = self.queries if isinstance(self.queries, int) else None
        return tf.ensure_shape(whole, [query.shape[0], known, query.shape[2], chunks.shape[4]])


def _wide(dtype: _types.DType) -> _types.DType:
    return dtype if dtype.size >= tf.float32.size else tf.float32
