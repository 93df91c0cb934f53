"""One micro-batch: forward, loss x scale, backward, add to the totals."""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import accumulators, denominators, noise_scale, table_rows
from tfbig._update.loss_trace import LossTrace
from tfbig._update.micro_batch_loss import LossFunction, MicroBatchLoss

__all__ = ("MicroBatchStep", "Totals", "zero_unless")

# What the loop over micro-batches carries: a dictionary, which `tf.while_loop` takes.
# Any: tensors, in structures that differ from name to name.
Totals: TypeAlias = dict[str, Any]


def zero_unless(counts: _types.Tensor, value: _types.Tensor) -> _types.Tensor:
    """A value, or zeros of its shape: what does not count may not even be a number."""
    return tf.where(counts, value, tf.zeros_like(value))


class MicroBatchStep:
    """Adds a micro-batch to the totals of those before it.

    Args:
        loss_fn: function of a micro-batch.
        variables: trainable variables whose gradients are wanted.
        trace: what is known of the loss function.
        dtype: dtype of the totals other than gradients.
        is_whole_batch: whether the micro-batch is the whole batch.
        whole_batch: denominators of the effective batch; None where they are not needed.
        loss_scale: float32 scalar, or None.
        is_uniform: bool scalar, whether all micro-batches are of one size; None if nobody asks.
        measures_noise: whether to collect what the gradient noise scale needs.
        compiled: whether XLA compiles the step.

    Attributes:
        connected: indices of the variables that have a gradient; known once the step is traced.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        variables: list[keras.Variable],
        trace: LossTrace,
        dtype: _types.DType,
        *,
        is_whole_batch: bool,
        whole_batch: denominators.Denominators | None,
        loss_scale: _types.Tensor | None,
        is_uniform: _types.Tensor | None,
        measures_noise: bool,
        compiled: bool,
    ) -> None:
        self.loss_fn = loss_fn
        self.variables = variables
        self.trace = trace
        self.dtype = dtype
        self.is_whole_batch = is_whole_batch
        self.whole_batch = whole_batch
        self.loss_scale = loss_scale
        self.is_uniform = is_uniform
        self.measures_noise = measures_noise
        self.compiled = compiled
        self.connected = set(trace.connected)

    def start(self) -> Totals:
        """The totals before the first micro-batch."""
        zero = tf.zeros((), self.dtype)
        return {
            "gradients": [
                self._start_of(v, rows)
                for v, rows in zip(self.variables, self.trace.rows, strict=True)
            ],
            "loss": zero,
            "values": keras.tree.map_structure(lambda _: zero, self.trace.values),
            "weight": zero,
            "state": [tf.convert_to_tensor(v.value) for v in self.trace.state],
            "logs": keras.tree.map_structure(
                lambda spec: tf.zeros(spec.shape, spec.dtype), self.trace.logs
            ),
            "noise_moments": noise_scale.no_moments(self.dtype, self.measures_noise),
        }

    def _start_of(
        self, variable: keras.Variable, rows: tuple[table_rows.Rows, ...]
    ) -> accumulators.Accumulator:
        """The accumulator of a variable's gradient."""
        with _keras.stages.beside(variable):
            return accumulators.start(variable, rows)

    def finish(self, totals: Totals) -> Totals:
        """Hook: the totals after the last micro-batch."""
        return totals

    def __call__(
        self, micro_batch: _types.Structure, size: _types.Tensor, totals: Totals
    ) -> Totals:
        """The totals with a micro-batch of `size` samples added."""
        # What the losses of the micro-batch are means over.
        samples = tf.ones((), self.dtype) if self.is_whole_batch else tf.cast(size, self.dtype)
        result, loss, gradients, state = self._differentiate(micro_batch, samples, totals["state"])
        weight = self._weight(result, samples)
        values = result.values
        if self.trace.has_weight:
            # A mean over nothing, such as the tokens of empty samples, is no number.
            counts = tf.not_equal(weight, 0)
            loss, values = keras.tree.map_structure(
                lambda value: zero_unless(counts, value), (loss, values)
            )
            gradients = self._zero_unless(counts, gradients)
        with tf.control_dependencies([] if tf.executing_eagerly() else [loss]):
            # With `exchange_dtype`, the exchange begins with it: not before there is data.
            total_weight = totals["weight"] + weight
        moments = totals["noise_moments"]
        if self.measures_noise:
            moments += noise_scale.moments(
                gradients, size, self.loss_scale, self.dtype, self.compiled
            )
        return {
            "gradients": self._add(totals, gradients, weight),
            "loss": totals["loss"] + weight * loss,
            "values": keras.tree.map_structure(
                lambda total, value: total + weight * tf.cast(value, self.dtype),
                totals["values"],
                values,
            ),
            "weight": total_weight,
            "state": state,
            "logs": keras.tree.map_structure(tf.convert_to_tensor, result.logs),
            "noise_moments": moments,
        }

    def _zero_unless(
        self, counts: _types.Tensor, gradients: list[_types.Gradient | None]
    ) -> list[_types.Gradient | None]:
        """The gradients of a micro-batch, or zeros if it does not count."""
        found = []
        for variable, gradient in zip(self.variables, gradients, strict=True):
            with _keras.stages.beside(variable):
                found.append(
                    accumulators.map_values(lambda value: zero_unless(counts, value), gradient)
                )
        return found

    def _add(
        self, totals: Totals, gradients: list[_types.Gradient | None], weight: _types.Tensor
    ) -> list[accumulators.Accumulator]:
        """The totals of gradients with those of a micro-batch added."""
        is_first = tf.equal(totals["weight"], 0)
        return accumulators.add(totals["gradients"], gradients, weight, self.is_uniform, is_first)

    def _differentiate(
        self, micro_batch: _types.Structure, samples: _types.Tensor, state: list[_types.Tensor]
    ) -> tuple[MicroBatchLoss, _types.Tensor, list[_types.Gradient | None], list[_types.Tensor]]:
        """Forward and backward pass: the result, the loss, its scaled gradients, the new state."""
        values = _keras.variables.VariableValues(zip(self.trace.state, state, strict=True))
        with tf.GradientTape() as tape:
            self._watch(tape)
            with _keras.losses.intercepted_losses(self._reducer(samples)), values:
                result = self.loss_fn(micro_batch)
            loss = scaled_loss = tf.cast(result.loss, self.dtype)
            if self.loss_scale is not None:
                scaled_loss = loss * tf.cast(self.loss_scale, self.dtype)
        gradients = self._gradients(tape, scaled_loss, self._weight(result, samples))
        self.connected.update(i for i, g in enumerate(gradients) if g is not None)
        self._warn_of_unseen_rows(gradients)
        # While tracing, TensorFlow may not know the shape of what is assigned; a loop must.
        state = [tf.ensure_shape(values.get_current_value(v), v.shape) for v in self.trace.state]
        return result, loss, gradients, state

    def _watch(self, tape: tf.GradientTape) -> None:
        """Hook: has the tape watch what is no variable."""

    def _gradients(
        self, tape: tf.GradientTape, loss: _types.Tensor, weight: _types.Tensor
    ) -> list[_types.Gradient | None]:
        """The gradients of a micro-batch's scaled loss, which counts `weight`."""
        del weight
        gradients: list[_types.Gradient | None] = tape.gradient(
            loss, [_keras.variables.native(v) for v in self.variables]
        )
        return gradients

    def _reducer(self, samples: _types.Tensor) -> denominators.LossReducer | None:
        if self.is_whole_batch:
            return None
        return denominators.LossReducer(self.whole_batch, samples, self.trace.kinds)

    def _weight(self, result: MicroBatchLoss, samples: _types.Tensor) -> _types.Tensor:
        """What the micro-batch counts in the effective batch."""
        if self.trace.has_weight:
            return tf.cast(result.weight, self.dtype)
        if self.is_uniform is not None:
            return tf.where(self.is_uniform, tf.ones_like(samples), samples)
        return samples

    def _warn_of_unseen_rows(self, gradients: list[_types.Gradient | None]) -> None:
        """Warns of rows that nothing in the graph of the forward pass told of."""
        if self.compiled:
            return
        for variable, gradient, has_rows in zip(
            self.variables, gradients, self.trace.has_rows, strict=True
        ):
            if isinstance(gradient, tf.IndexedSlices) and not has_rows:
                table_rows.warn_of_added_rows(variable.path, "a gradient of its own")
