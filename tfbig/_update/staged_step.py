"""One micro-batch of a model whose layers lie on stages."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfbig import _keras, _types
from tfbig._keras.stages import Stage
from tfbig._update import accumulators
from tfbig._update.micro_batch_step import MicroBatchStep, Totals

__all__ = ("StagedStep",)


class StagedStep(MicroBatchStep):
    """A `MicroBatchStep` that keeps the gradient of a variable on the variable's device.

    Each stage takes forward and backward passes in turn: with n micro-batches in flight, stage s
    begins one once it has done the backward pass of the one n - s before. So backward passes go
    first, and the later a stage is, the fewer micro-batches it holds. Reference: Narayanan et al.
    2019, "PipeDream", where this order is called 1F1B.

    To be traced in a `_keras.stages.following`.

    Args:
        **kwargs: as of `MicroBatchStep`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: those of `MicroBatchStep`.
        super().__init__(*args, **kwargs)
        found = (_keras.stages.stage_of(v) for v in self.variables)
        self.stages = list(dict.fromkeys(s for s in found if s is not None))
        self.clock = _keras.stage_clock.wanted() if self.stages else None
        self.passes: _keras.stage_clock.Passes | None = None

    def start(self) -> Totals:
        """The totals before the first micro-batch."""
        turns = []
        for stage in self.stages:
            with tf.device(stage.device()):
                turns.append([tf.zeros(())] * max(1, stage.in_flight - stage.index))
        times = tf.TensorArray(tf.float64, 0, dynamic_size=True, infer_shape=False)
        timed = {} if self.clock is None else {"times": (tf.constant(0), times)}
        return super().start() | {"turns": turns} | timed

    def finish(self, totals: Totals) -> Totals:
        """The totals after the last micro-batch, on the devices of the variables."""
        ends = []
        for variable, total in zip(self.variables, totals["gradients"], strict=True):
            with _keras.stages.beside(variable):
                ends.append(tf.nest.map_structure(_identity, total))
        if self.clock is not None and self.passes is not None:
            self.clock.add(self.passes.share(totals["times"][1].stack()))
        return totals | {"gradients": ends}

    def __call__(
        self, micro_batch: _types.Structure, size: _types.Tensor, totals: Totals
    ) -> Totals:
        """The totals with a micro-batch of `size` samples added."""
        first = {}
        for stage, waiting in zip(self.stages, totals["turns"], strict=True):
            with tf.device(stage.device()):
                first[stage] = tf.identity(waiting[0])
        self.passes = None if self.clock is None else _keras.stage_clock.Passes(first)
        with _keras.stages.taking_turns(first), _keras.stage_clock.timing(self.passes):
            new = super().__call__(micro_batch, size, totals)
        if self.clock is not None:
            k, times = totals["times"]
            new |= {"times": (k + 1, times.write(k, self._times))}
        turns = []
        for stage, waiting in zip(self.stages, totals["turns"], strict=True):
            with tf.device(stage.device()), tf.control_dependencies(self._backward_passes[stage]):
                turns.append([*waiting[1:], tf.identity(first[stage])])
        return new | {"turns": turns}

    def _gradients(
        self, tape: tf.GradientTape, loss: _types.Tensor, weight: _types.Tensor
    ) -> list[_types.Gradient | None]:
        # A tape leaves gradients on no device.
        natives = [_keras.variables.own_copy(v) for v in self.variables]
        boundaries = [] if self.passes is None else self.passes.boundaries()
        gradients: list[_types.Gradient | None] = tf.compat.v1.gradients(
            loss, [*natives, *boundaries], colocate_gradients_with_ops=True
        )
        found, of_boundaries = gradients[: len(natives)], gradients[len(natives) :]
        self._backward_passes: dict[Stage, list[_types.Tensor]] = {s: [] for s in self.stages}
        for variable, gradient in zip(self.variables, found, strict=True):
            stage = _keras.stages.stage_of(variable)
            if gradient is not None and stage is not None:
                self._backward_passes[stage].append(accumulators.values(gradient))
        if self.passes is not None:
            values = {
                id(v): accumulators.values(g)
                for v, g in zip(self.variables, found, strict=True)
                if g is not None
            }
            self._times = self.passes.times(of_boundaries, values)
        return found

    def _add(
        self, totals: Totals, gradients: list[_types.Gradient | None], weight: _types.Tensor
    ) -> list[accumulators.Accumulator]:
        sums: list[accumulators.Accumulator] = []
        for variable, total, gradient in zip(
            self.variables, totals["gradients"], gradients, strict=True
        ):
            with _keras.stages.beside(variable):
                sums += accumulators.add([total], [gradient], weight)
        return sums


def _identity(value: _types.Structure) -> _types.Structure:
    # A tensor array is a handle, whose tensors stay where they are.
    return tf.identity(value) if tf.is_tensor(value) else value
