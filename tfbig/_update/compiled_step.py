"""A micro-batch of which XLA compiles the forward and the backward pass, and TensorFlow the loop.

A program for each micro-batch fuses what lies between the matrix products. Other than a compiled
loop, it hands over the rows of an embedding's gradient as Keras has them.
"""

from __future__ import annotations

import tensorflow as tf

from tfbig import _types
from tfbig._update import compiled_checks
from tfbig._update.micro_batch_loss import MicroBatchLoss
from tfbig._update.micro_batch_step import MicroBatchStep

__all__ = ("CompiledStep",)


class CompiledStep(MicroBatchStep):
    """A step whose forward and backward pass are an XLA program for each size of micro-batch."""

    def _differentiate(
        self, micro_batch: _types.Structure, samples: _types.Tensor, state: list[_types.Tensor]
    ) -> tuple[MicroBatchLoss, _types.Tensor, list[_types.Gradient | None], list[_types.Tensor]]:
        def run(
            micro_batch: _types.Structure, samples: _types.Tensor, state: list[_types.Tensor]
        ) -> tuple[_types.Structure, dict[str, _types.Tensor]]:
            result, *rest = super(CompiledStep, self)._differentiate(micro_batch, samples, state)
            # A program returns tensors, and no object.
            return (vars(result), *rest), compiled_checks.ranges_of_look_ups()

        program = tf.function(run, jit_compile=True, autograph=False)
        found, ranges = program(micro_batch, samples, state)
        # Nothing that is out of range may get into an update.
        with tf.control_dependencies(compiled_checks.assertions(ranges)):
            found = tf.nest.map_structure(_identity, found)
        result, loss, gradients, state = found
        return MicroBatchLoss(**result), loss, gradients, state


def _identity(value: _types.Gradient | None) -> _types.Gradient | None:
    return value if value is None else tf.identity(value)
