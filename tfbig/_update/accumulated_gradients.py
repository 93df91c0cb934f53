"""What the first half of an update hands to the second."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from tfbig import _types
from tfbig._update import accumulators, table_rows
from tfbig._update.table_rows import Rows
from tfbig._update.variable_update import VariableUpdate

__all__ = ("AccumulatedGradients",)


@dataclasses.dataclass
class AccumulatedGradients:
    """What a replica accumulated from its share of the batch; exchanged, from all of the batch.

    The gradient of the loss is `gradients / weight / loss_scale`, the loss `loss / weight`.

    Attributes:
        variables: the trainable variables.
        gradients: for each variable, the sum over micro-batches of weight times gradient of the
            scaled loss, float32 or wider; None where the loss does not depend on it. For a
            table that is looked up, `tf.IndexedSlices`, whose indices are keys (see
            `table_rows`) before the exchange, and indices of the table after it.
        rows: for each variable, the `Rows` of the parts of its gradient.
        weight: float scalar, sum of the weights of the micro-batches: samples, or another unit
            that gradients, loss and values share.
        loss_scale: float32 scalar by which the loss was multiplied, or None.
        loss: float scalar, sum of weight times (unscaled) loss.
        values: structure of float scalars, summed as the loss is.
        samples: int32 scalar.
        state: what the forward passes assigned.
        logs: structure of scalars, those of the last micro-batch; exchanged, their mean over the
            replicas.
        noise_moments: float vector, the sum of `noise_scale.moments` over the micro-batches; of
            no elements if the noise scale is not wanted.
    """

    variables: list[keras.Variable]
    gradients: list[_types.Gradient | None]
    rows: list[tuple[Rows, ...]]
    weight: _types.Tensor
    loss_scale: _types.Tensor | None
    loss: _types.Tensor
    values: _types.Structure
    samples: _types.Tensor
    state: list[VariableUpdate]
    logs: _types.Structure
    noise_moments: _types.Tensor

    def times(self, unit: _types.Tensor) -> AccumulatedGradients:
        """The same with weights that were counted in this unit, an integer scalar."""

        def times(value: _types.Tensor) -> _types.Tensor:
            return value * tf.cast(unit, value.dtype)

        return dataclasses.replace(
            self,
            gradients=[accumulators.map_values(times, g) for g in self.gradients],
            weight=times(self.weight),
            loss=times(self.loss),
            values=tf.nest.map_structure(times, self.values),
        )

    def with_rows_added_up(self, replicas: int) -> AccumulatedGradients:
        """The same with tables' gradients as the whole batch has them, under their indices.

        Args:
            replicas: number of replicas over which the gradients were summed.
        """

        def added_up(
            gradient: _types.Gradient | None, rows: tuple[Rows, ...], variable: keras.Variable
        ) -> _types.Gradient | None:
            if not isinstance(gradient, tf.IndexedSlices):
                return gradient
            summed = table_rows.add_up(gradient, rows, variable.shape[0], replicas)
            # An exchange forgets the shape, which optimizers such as Muon ask for while tracing.
            shape = tf.constant(variable.shape.as_list(), tf.int64)
            values = tf.ensure_shape(summed.values, [None, *variable.shape[1:]])
            return tf.IndexedSlices(values, summed.indices, shape)

        gradients = map(added_up, self.gradients, self.rows, self.variables)
        return dataclasses.replace(self, gradients=list(gradients))

    def tensors(self) -> list[_types.Tensor]:
        """All tensors, to be handed from one graph to another."""
        leaves = tf.nest.flatten(self._tensor_fields(), expand_composites=True)
        return [t for t in leaves if t is not None]

    def with_tensors(self, tensors: Iterable[_types.Tensor]) -> AccumulatedGradients:
        """The same with others in place of the tensors that `tensors` returned."""
        fields, rest = self._tensor_fields(), iter(tensors)
        leaves = tf.nest.flatten(fields, expand_composites=True)
        fields = tf.nest.pack_sequence_as(
            fields, [t if t is None else next(rest) for t in leaves], expand_composites=True
        )
        state = [
            dataclasses.replace(update, before=before, after=after)
            for update, (before, after) in zip(self.state, fields.pop("state"), strict=True)
        ]
        return dataclasses.replace(self, state=state, **fields)

    # Any: tensors, in structures of their own.
    def _tensor_fields(self) -> dict[str, Any]:
        """What consists of tensors; the rest is the same in every graph."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["variables"], fields["rows"]
        return fields | {"state": [(u.before, u.after) for u in self.state]}
