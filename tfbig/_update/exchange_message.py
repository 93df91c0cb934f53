"""What replicas send each other in an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tfbig import _types

__all__ = ("Message", "Scalars")


@dataclasses.dataclass(frozen=True)
class Scalars:
    """The scalars of a message, all of one dtype. They travel as one vector.

    Attributes:
        loss: sum of weight times loss.
        weight: sum of the weights of the micro-batches.
        active_replicas: 1 if the replica had samples; summed, how many replicas had.
        samples: number of samples.
        stop: 1 if the replica's worker asks to stop; summed, how many ask.
        values: sums of weight times each further value.
        logs: each value of the logs, of a replica without samples zero.
        noise_moments: vector, see `noise_scale.moments`.
    """

    loss: _types.Tensor
    weight: _types.Tensor
    active_replicas: _types.Tensor
    samples: _types.Tensor
    stop: _types.Tensor
    values: list[_types.Tensor]
    logs: list[_types.Tensor]
    noise_moments: _types.Tensor

    def pack(self) -> _types.Tensor:
        """All of them as a vector."""
        return tf.concat([tf.stack(tf.nest.flatten(self._single())), self.noise_moments], 0)

    def unpack(self, vector: _types.Tensor) -> Scalars:
        """The scalars of a vector such as `pack` returns."""
        single, scalars = self._single(), iter(tf.unstack(vector))
        received = tf.nest.map_structure(lambda _: next(scalars), single)
        moments = list(scalars)
        return Scalars(
            **received, noise_moments=tf.stack(moments) if moments else self.noise_moments
        )

    def _single(self) -> dict[str, _types.Structure]:
        """Those that are no vector, by name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["noise_moments"]
        return fields


@dataclasses.dataclass(frozen=True)
class Message:
    """What a replica sends; summed over the replicas, what each receives.

    Attributes:
        gradients: one for each variable on which the loss depends.
        scalars: the scalars.
        state: a tensor for each `VariableUpdate` that is exchanged.
    """

    gradients: list[_types.Gradient]
    scalars: Scalars
    state: list[_types.Tensor]

    def pack(self) -> list[_types.Gradient]:
        """All of it, as a list of tensors; what is known last comes first."""
        return [self.scalars.pack(), *self.state, *self.gradients]

    def unpack(self, tensors: Sequence[_types.Gradient]) -> Message:
        """A list such as `pack` returns, by name."""
        received = iter(tensors)
        return Message(
            scalars=self.scalars.unpack(next(received)),
            state=[next(received) for _ in self.state],
            gradients=[next(received) for _ in self.gradients],
        )
