"""How a variable is divided over the replicas: which elements lie where."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

from tfbig import _types

__all__ = ("Piece", "balanced_owners", "in_chunks", "on_one_replica")

# A variable with fewer rows per replica is divided between elements, not between rows: rounding up
# to whole rows would leave some replicas with much more than others.
_FEWEST_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a replica has of a variable: consecutive elements, in row-major order.

    Attributes:
        begin: the first element.
        end: the element after the last.
        shape: the shape that they have as a tensor: `(rows, ...)` if the piece consists of whole
            rows of the variable, its first axis; else `(elements,)`.
        row_size: elements of a row of the piece.
    """

    begin: int
    end: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.end - self.begin

    @property
    def row_size(self) -> int:
        """Number of elements of a row of the piece; 1 if it does not consist of rows."""
        return math.prod(self.shape[1:])

    def of(self, tensor: _types.Tensor) -> _types.Tensor:
        """The piece of a tensor of the variable's shape."""
        if self.size == math.prod(tensor.shape):
            return tf.reshape(tensor, self.shape)
        return tf.reshape(tf.reshape(tensor, [-1])[self.begin : self.end], self.shape)

    def of_rows(self, rows: tf.IndexedSlices) -> tf.IndexedSlices:
        """The rows of the piece among rows of the variable, under their indices in the piece.

        Rows of a variable that is divided between elements become elements.
        """
        width = math.prod(rows.values.shape[1:])
        values, indices = rows.values, tf.cast(rows.indices, tf.int64)
        if self.row_size != width:
            # Each row becomes as many rows of one element.
            indices = indices[:, tf.newaxis] * width + tf.range(width, dtype=tf.int64)
            indices, width = tf.reshape(indices, [-1]), 1
        # Rows of one element may be a vector, as the piece is.
        values = tf.reshape(values, [-1, *self.shape[1:]])
        first, last = self.begin // width, self.end // width
        is_own = (indices >= first) & (indices < last)
        return tf.IndexedSlices(
            tf.boolean_mask(values, is_own),
            tf.boolean_mask(indices, is_own) - first,
            tf.constant(self.shape, tf.int64),
        )


def in_chunks(shape: Sequence[int], replicas: int) -> list[Piece | None]:
    """Divides a variable into as many equal parts as there are replicas.

    The last ones may be smaller, or None. For updates that treat each element by itself.
    """
    shape = tuple(shape)
    size, row = math.prod(shape), math.prod(shape[1:])
    is_in_rows = size > 0 and len(shape) >= 1 and shape[0] >= _FEWEST_ROWS * replicas
    unit = row if is_in_rows else 1
    chunk = -(-(size // unit) // replicas) * unit
    inner = shape[1:] if is_in_rows else ()
    pieces: list[Piece | None] = []
    for i in range(replicas):
        begin, end = min(i * chunk, size), min((i + 1) * chunk, size)
        is_whole = end - begin == size
        of_piece = shape if is_whole else ((end - begin) // unit, *inner)
        pieces.append(Piece(begin, end, of_piece) if begin < end else None)
    return pieces


def on_one_replica(shape: Sequence[int], replicas: int, owner: int) -> list[Piece | None]:
    """Gives a variable to one replica, for updates that look at all of it."""
    whole = Piece(0, math.prod(shape), tuple(shape))
    return [whole if i == owner else None for i in range(replicas)]


def balanced_owners(sizes: Sequence[int], replicas: int) -> list[int]:
    """An owner for each variable, such that the replicas own about as many bytes.

    The largest first, each to the replica that has least.

    Args:
        sizes: bytes of each variable.
        replicas: number of replicas.
    """
    loads, owners = [0] * replicas, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners
