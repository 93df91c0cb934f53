"""One micro-batch of a model whose weights are divided over the replicas."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import accumulators
from tfbig._update.gathered_weights import GatheredWeights, is_divided
from tfbig._update.micro_batch_loss import MicroBatchLoss
from tfbig._update.micro_batch_step import MicroBatchStep, Totals, zero_unless

__all__ = ("GatheredStep",)


class GatheredStep(MicroBatchStep):
    """A `MicroBatchStep` that gathers divided weights, and scatters their gradients.

    Of a divided weight, the total is this replica's piece of the gradient of all replicas'
    micro-batches so far; of a table that is looked up by rows, this replica's rows.

    Args:
        **kwargs: as of `MicroBatchStep`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: those of `MicroBatchStep`.
        super().__init__(*args, **kwargs)
        # Read once: all micro-batches see the same weights.
        self.pieces = {id(v): v.own_piece() for v in self.trace.divided}
        self.with_rows = {
            id(v) for v, rows in zip(self.variables, self.trace.rows, strict=True) if rows
        }
        self.is_scattered = [
            id(v) in self.pieces and id(v) not in self.with_rows for v in self.variables
        ]

    def start(self) -> Totals:
        """The totals before the first micro-batch."""
        totals = super().start()
        return totals | {
            "gradients": [
                tf.zeros(self.pieces[id(v)].shape, accumulators.dtype_for(v.dtype))
                if is_scattered
                else total
                for v, is_scattered, total in zip(
                    self.variables, self.is_scattered, totals["gradients"], strict=True
                )
            ]
        }

    def counting(
        self,
        micro_batch: _types.Structure,
        size: _types.Tensor,
        totals: Totals,
        counts: _types.Tensor,
    ) -> Totals:
        """The totals with a micro-batch added, unless it does not count.

        Args:
            micro_batch: the micro-batch.
            size: its samples.
            totals: the totals before.
            counts: bool scalar.
        """
        self._counts = counts
        new = self(micro_batch, size, totals)

        def kept(after: _types.Tensor, before: _types.Tensor) -> _types.Tensor:
            return tf.where(counts, after, before)

        same = ("state", "logs")
        return new | {name: tf.nest.map_structure(kept, new[name], totals[name]) for name in same}

    def always(self, micro_batch: _types.Structure, size: _types.Tensor, totals: Totals) -> Totals:
        """The totals with a micro-batch added."""
        return self.counting(micro_batch, size, totals, tf.constant(True))

    def _weight(self, result: MicroBatchLoss, samples: _types.Tensor) -> _types.Tensor:
        weight = super()._weight(result, samples)
        return tf.where(self._counts, weight, tf.zeros_like(weight))

    def _differentiate(
        self, micro_batch: _types.Structure, samples: _types.Tensor, state: list[_types.Tensor]
    ) -> tuple[MicroBatchLoss, _types.Tensor, list[_types.Gradient | None], list[_types.Tensor]]:
        pieces = {key: tf.identity(piece) for key, piece in self.pieces.items()}
        self._gathered = GatheredWeights(pieces, self.with_rows, self.trace.narrow_dtypes)
        with _keras.thread.holding("gathering", self._gathered):
            result, loss, gradients, state = super()._differentiate(micro_batch, samples, state)
        result = dataclasses.replace(
            result, values=keras.tree.map_structure(self._if_it_counts, result.values)
        )
        return result, self._if_it_counts(loss), gradients, state

    def _if_it_counts(self, value: _types.Tensor) -> _types.Tensor:
        return zero_unless(self._counts, value)

    def _zero_unless(
        self, counts: _types.Tensor, gradients: list[_types.Gradient | None]
    ) -> list[_types.Gradient | None]:
        own = super()._zero_unless(counts, gradients)
        # What is scattered is of the micro-batches of all replicas.
        pairs = zip(self.is_scattered, gradients, own, strict=True)
        return [whole if is_scattered else mine for is_scattered, whole, mine in pairs]

    def _watch(self, tape: tf.GradientTape) -> None:
        self._gathered.watch = tape.watch
        tape.watch(list(self._gathered.pieces.values()))

    def _gradients(
        self, tape: tf.GradientTape, loss: _types.Tensor, weight: _types.Tensor
    ) -> list[_types.Gradient | None]:
        self._gathered.weight = weight
        wanted = [i for i in range(len(self.variables)) if self._may_have_gradient(i)]
        sources = [self._gathered.gradient_source_of(self.variables[i]) for i in wanted]
        found = dict(zip(wanted, tape.gradient(loss, sources), strict=True))
        return [found.get(i) for i in range(len(self.variables))]

    def _may_have_gradient(self, i: int) -> bool:
        # A weight that is gathered with no effect on the loss would have one of zeros.
        return not is_divided(self.variables[i]) or i in self.trace.connected

    def _add(
        self, totals: Totals, gradients: list[_types.Gradient | None], weight: _types.Tensor
    ) -> list[accumulators.Accumulator]:
        own = [
            None if is_scattered else accumulators.map_values(self._if_it_counts, gradient)
            for gradient, is_scattered in zip(gradients, self.is_scattered, strict=True)
        ]
        sums = super()._add(totals, own, weight)
        for i, gradient in enumerate(gradients):
            if self.is_scattered[i] and gradient is not None:
                # It is weighted already, and that of all replicas.
                sums[i] = totals["gradients"][i] + gradient
        return sums
