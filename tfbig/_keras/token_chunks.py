"""Tokens, the leading dimensions of a tensor, in chunks of one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfbig import _types


@dataclasses.dataclass(frozen=True)
class TokenChunks:
    """How tokens are cut into chunks.

    Attributes:
        shape: static leading dimensions, None where they are not known.
        dimensions: int32 vector, the leading dimensions.
        number: chunks, an integer or an int32 scalar.
        length: tokens of a chunk, an integer or an int32 scalar.
        tokens: all of them, an integer or an int32 scalar.
    """

    shape: tuple[int | None, ...]
    dimensions: _types.Tensor
    number: int | _types.Tensor
    length: int | _types.Tensor
    tokens: int | _types.Tensor

    @classmethod
    def of(cls, inputs: _types.Tensor, size: int) -> TokenChunks:
        """How the tokens of inputs `(..., features)` are cut into chunks of at most `size`."""
        shape = inputs.shape[:-1]
        dimensions = tf.shape(inputs)[:-1]
        tokens = shape.num_elements() if shape.is_fully_defined() else tf.reduce_prod(dimensions)
        number = -(-tokens // size)
        number = max(number, 1) if isinstance(number, int) else tf.maximum(number, 1)
        return cls(tuple(shape), dimensions, number, -(-tokens // number), tokens)

    def cut(self, tensor: _types.Tensor) -> _types.Tensor:
        """`(number, length, ...)`, padded with zeros."""
        if not tensor.shape[: len(self.shape)].is_compatible_with(self.shape):
            raise ValueError(
                "Targets must have a value for each token of the last layer's inputs. Received: "
                f"targets of shape {tuple(tensor.shape)} for inputs of shape "
                f"({', '.join(map(str, self.shape))}, features)."
            )
        inner = tensor.shape[len(self.shape) :]
        flat = tf.reshape(tensor, [self.tokens, *inner])
        padding = self.number * self.length - self.tokens
        if not (isinstance(padding, int) and padding == 0):
            flat = tf.pad(flat, [[0, padding], *([0, 0] for _ in inner)])
        return tf.reshape(flat, [self.number, self.length, *inner])

    def zeros(self, example: _types.Tensor) -> _types.Tensor:
        """Zeros for all tokens; `example` has the shape of those of a chunk."""
        inner = example.shape[1:]
        zeros = tf.zeros(tf.concat([self.dimensions, inner], 0), example.dtype)
        return tf.ensure_shape(zeros, [*self.shape, *inner])

    def _join(self, tensor: _types.Tensor, example: _types.Tensor) -> _types.Tensor:
        """What `cut` was made of; `example` has the shape of a chunk of it."""
        inner = example.shape[1:]
        flat = tf.reshape(tensor, [self.number * self.length, *inner])[: self.tokens]
        whole = tf.reshape(flat, tf.concat([self.dimensions, inner], 0))
        return tf.ensure_shape(whole, [*self.shape, *inner])

    def for_each(
        self,
        compute: Callable[
            ..., tuple[Sequence[_types.Tensor], Sequence[Callable[[], _types.Tensor]]]
        ],
        elements: Sequence[_types.Tensor],
        joined: Sequence[_types.Tensor],
        added: Sequence[_types.Tensor] = (),
    ) -> tuple[list[_types.Tensor], list[_types.Tensor]]:
        """Results of all chunks, one chunk after another: some joined, others added up.

        Args:
            compute: function of a chunk of each element; returns results `(length, ...)` to be
                joined, and functions that compute others to be added up, one after another.
            elements: what `cut` returned.
            joined: examples of the results to be joined, of a chunk.
            added: tensors of the shapes and dtypes of the others.
        """
        arrays = [
            tf.TensorArray(
                e.dtype, self.number, element_shape=[*elements[0].shape[1:2], *e.shape[1:]]
            )
            for e in joined
        ]
        # As wide as the gradients of micro-batches are added up.
        totals = [
            tf.zeros(a.shape, tf.float64 if a.dtype == tf.float64 else tf.float32) for a in added
        ]

        def body(
            i: _types.Tensor, arrays: list[tf.TensorArray], totals: list[_types.Tensor]
        ) -> tuple[_types.Tensor, list[tf.TensorArray], list[_types.Tensor]]:
            parts, rest = compute(*(e[i] for e in elements))
            written = [a.write(i, part) for a, part in zip(arrays, parts, strict=True)]
            sums: list[_types.Tensor] = []
            for total, term in zip(totals, rest, strict=True):
                with tf.control_dependencies(sums[-1:]):
                    sums.append(total + tf.cast(term(), total.dtype))
            return i + 1, written, sums

        _, arrays, totals = tf.while_loop(
            lambda i, *_: i < self.number,
            body,
            (tf.constant(0), arrays, totals),
            parallel_iterations=1,
        )
        whole = [self._join(a.stack(), e) for a, e in zip(arrays, joined, strict=True)]
        return whole, [tf.cast(t, a.dtype) for t, a in zip(totals, added, strict=True)]
