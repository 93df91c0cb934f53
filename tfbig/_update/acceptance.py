"""Whether an update is applied: what loss scale and guard say of it, the same on all replicas."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import tensorflow as tf

from tfbig import _types
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.loss_scale import LossScaleState

__all__ = ("Decision", "UpdateGuard", "assigned", "decide")


class UpdateGuard(Protocol):
    """Leaves updates out for what is known of them before they are applied.

    `tfbig.callbacks.SpikeGuard` gives a model one while it trains.

    Attributes:
        needs_norm: whether it looks at the norm of the gradient.
    """

    needs_norm: bool

    def variables(self) -> list[_types.KerasVariable]:
        """The variables that it assigns."""

    def accepts(
        self,
        loss: _types.Tensor,
        norm: _types.Tensor | None,
        is_finite: _types.Tensor | None,
    ) -> _types.Tensor:
        """Whether the update may be applied, a bool scalar; and remembers it. In replica context.

        What it is told is the same on all replicas, and so must be what it returns.

        Args:
            loss: float scalar, the loss of the effective batch.
            norm: float scalar, the global norm of the gradient before clipping; None unless it
                `needs_norm`.
            is_finite: bool scalar, whether all gradients are finite; if not, the update is skipped
                for that, and the guard should take no notice of it. None where nothing checks.
        """


@dataclasses.dataclass
class Decision:
    """What becomes of an update; the same on every replica.

    Attributes:
        flags: bool vector, for each gradient, whether all its values are finite; None where nothing
            checks, because there is no loss scale.
        is_applied: bool scalar; None if the update is applied in any case.
        is_repeated: bool scalar, whether the update is skipped and the same batch run again; None
            if none ever is.
    """

    flags: _types.Tensor | None = None
    is_applied: _types.Tensor | None = None
    is_repeated: _types.Tensor | None = None

    @property
    def is_finite(self) -> _types.Tensor | None:
        """Bool scalar, whether all gradients are finite; None where nothing checks."""
        return None if self.flags is None else tf.reduce_all(self.flags)


def decide(
    batch: AccumulatedGradients,
    flags: _types.Tensor | None,
    norm: _types.Tensor | None,
    loss_scale: LossScaleState | None,
    guard: UpdateGuard | None,
) -> Decision:
    """Decides on an update. In replica context; nothing is exchanged.

    Args:
        batch: what all replicas accumulated, after the exchange.
        flags: see `Decision`.
        norm: the global norm of the gradient before clipping, or None.
        loss_scale: the loss scale, or None.
        guard: what may leave the update out, or None.
    """
    decision = Decision(flags)
    decision.is_applied = is_finite = decision.is_finite
    if loss_scale is not None:
        decision.is_repeated = loss_scale.is_repeated(is_finite)
    if guard is not None:
        loss = tf.math.divide_no_nan(batch.loss, batch.weight)
        decision.is_applied = guard.accepts(loss, norm, is_finite)
    return decision


def assigned(
    loss_scale: LossScaleState | None, guard: UpdateGuard | None
) -> list[_types.KerasVariable]:
    """The variables that the loss scale and the guard assign."""
    of_scale = [] if loss_scale is None else loss_scale.assigned_variables()
    return [*of_scale, *([] if guard is None else guard.variables())]
