"""Tensors that are divided over the replicas travel in rows, one for each replica.

A row holds a replica's pieces one after another. What is scattered is a matrix of all rows, of
which every replica receives its own, added up; what is gathered is each replica's row. Both go in
parts of some elements of the rows, each after one that was sent before it, so that the copies which
an exchange makes take the memory of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from tfbig import _keras, _types
from tfbig.distribute._pieces import Piece

__all__ = ("Rows",)

# With two parts under way, two workers take the memory that they take with a whole bucket; with
# four, up to a byte more per parameter of a large model, and about the same time.
_MOST_UNDER_WAY = 2


class Rows:
    """The rows of some variables.

    Args:
        pieces: for each variable, the `Piece` of each replica, or None where it has none.
        shapes: the shape of each variable.
    """

    def __init__(
        self, pieces: Sequence[Sequence[Piece | None]], shapes: Sequence[Sequence[int]]
    ) -> None:
        self.pieces = pieces
        self.shapes = shapes
        self.replicas = len(pieces[0]) if pieces else 0
        self._starts: list[list[int]] = []
        widths = []
        for r in range(self.replicas):
            position, starts = 0, []
            for of_variable in pieces:
                starts.append(position)
                piece = of_variable[r]
                position += 0 if piece is None else piece.size
            self._starts.append(starts)
            widths.append(position)
        # A shorter row is filled up.
        self.width = max(widths, default=0)

    def scatter(
        self,
        tensors: Sequence[_types.Tensor],
        bucket_bytes: int,
        sent: Callable[[_types.Tensor], _types.Tensor],
        sent_as: _types.DType,
        summed_as: _types.DType,
    ) -> dict[int, _types.Tensor]:
        """Adds up tensors over all replicas. In replica context.

        The last elements go first, as a backward pass makes the gradients of the last layers first.

        Args:
            tensors: a tensor of each variable's shape.
            bucket_bytes: bytes of what a replica sends at a time.
            sent: function of elements of a tensor that returns what is sent of them.
            sent_as: dtype of what is sent.
            summed_as: dtype in which it is added up.

        Returns:
            For each variable of which this replica has a piece, by its index, the piece of the
            sum, of the dtype `summed_as`.
        """
        own = _keras.collectives.replica_id()
        found: dict[int, list[_types.Tensor]] = {}
        _keras.collectives.check_same(f"scattered: {sent_as.name} {self.shapes}", tensors[-1:])
        spans, under_way = self._spans(bucket_bytes, sent_as)
        for begin, end in reversed(spans):
            with under_way.turn():
                # One copy: consecutive elements of a tensor are a view of it.
                vectors = [
                    vector
                    for r in range(self.replicas)
                    for vector in self._filled_up(
                        [
                            sent(tf.reshape(tf.identity(tensors[i]), [-1])[a:b])
                            for i, a, b in self._elements(r, begin, end)
                        ],
                        end - begin,
                        sent_as,
                    )
                ]
                matrix = tf.reshape(_joined(vectors), [self.replicas, end - begin])
            row = _keras.collectives.reduce_scatter(matrix, summed_as, is_part=True)
            under_way.add(row)
            self._take_apart(row, self._elements(own, begin, end), found)
        return {i: self._shaped(i, own, found[i][::-1]) for i in sorted(found)}

    def gather(
        self, tensors: dict[int, _types.Tensor], bucket_bytes: int, dtype: _types.DType
    ) -> Iterator[tuple[int, _types.Tensor]]:
        """Gathers the pieces of all replicas. In replica context.

        Args:
            tensors: this replica's piece of each variable, by its index.
            bucket_bytes: bytes of what is gathered at a time.
            dtype: dtype of all tensors.

        Yields:
            The index of a variable and all of it, as soon as it has arrived.
        """
        own = _keras.collectives.replica_id()
        # For each variable, what has arrived of it: the first element, and a vector.
        arrived: dict[int, list[tuple[int, _types.Tensor]]] = {}
        exchange = f"gathered: {dtype.name} {self.shapes}"
        _keras.collectives.check_same(exchange, list(tensors.values()))
        spans, under_way = self._spans(bucket_bytes, dtype)
        for begin, end in spans:
            with under_way.turn():
                vectors = [
                    tf.reshape(tf.identity(tensors[i]), [-1])[a - first : b - first]
                    for i, a, b in self._elements(own, begin, end)
                    for first in [self._piece(i, own).begin]
                ]
                row = _joined(self._filled_up(vectors, end - begin, dtype))
            matrix = _keras.collectives.all_gather(row, is_part=True)
            under_way.add(matrix)
            gathered = tf.reshape(matrix, [-1])
            for r in range(self.replicas):
                position = r * (end - begin)
                for i, a, b in self._elements(r, begin, end):
                    part = gathered[position : position + b - a]
                    arrived.setdefault(i, []).append((a, part))
                    position += b - a
            for i in [i for i, parts in arrived.items() if self._is_complete(i, parts)]:
                parts = [part for _, part in sorted(arrived.pop(i), key=lambda found: found[0])]
                yield i, tf.reshape(_joined(parts), self.shapes[i])

    def _spans(
        self, bucket_bytes: int, dtype: _types.DType
    ) -> tuple[list[tuple[int, int]], _keras.collectives.UnderWay]:
        """The first element of each part of a row, and the one after its last."""
        # What a replica sends at a time consists of all rows.
        row_bytes = bucket_bytes // max(1, self.replicas)
        length, most = _keras.collectives.parts_of(row_bytes, dtype, _MOST_UNDER_WAY)
        spans = [(k, min(k + length, self.width)) for k in range(0, self.width, length)]
        return spans, _keras.collectives.UnderWay(most)

    def _elements(self, replica: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Which elements lie in a part of a row: a variable, the first and the one after the last.

        Elements count from the beginning of the variable.
        """
        found = []
        for i, start in enumerate(self._starts[replica]):
            piece = self.pieces[i][replica]
            if piece is None:
                continue
            a, b = max(begin - start, 0), min(end - start, piece.size)
            if a < b:
                found.append((i, piece.begin + a, piece.begin + b))
        return found

    def _filled_up(
        self, parts: list[_types.Tensor], length: int, dtype: _types.DType
    ) -> list[_types.Tensor]:
        """Vectors of a dtype with zeros after them, such that they have so many elements."""
        missing = length - sum(part.shape[0] for part in parts)
        parts = [tf.cast(part, dtype) for part in parts]
        return [*parts, tf.zeros([missing], dtype)] if missing else parts

    def _take_apart(
        self,
        row: _types.Tensor,
        elements: list[tuple[int, int, int]],
        found: dict[int, list[_types.Tensor]],
    ) -> None:
        position = 0
        for i, a, b in elements:
            found.setdefault(i, []).append(row[position : position + b - a])
            position += b - a

    def _piece(self, i: int, replica: int) -> Piece:
        piece = self.pieces[i][replica]
        assert piece is not None
        return piece

    def _shaped(self, i: int, replica: int, parts: list[_types.Tensor]) -> _types.Tensor:
        return tf.reshape(_joined(parts), self._piece(i, replica).shape)

    def _is_complete(self, i: int, parts: list[tuple[int, _types.Tensor]]) -> bool:
        there: int = sum(part.shape[0] for _, part in parts)
        return there == math.prod(self.shapes[i])


def _joined(vectors: list[_types.Tensor]) -> _types.Tensor:
    return vectors[0] if len(vectors) == 1 else tf.concat(vectors, 0)
