"""What the loss function of a step returns for a micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from tfbig import _types

__all__ = ("LossFunction", "MicroBatchLoss")


@dataclasses.dataclass
class MicroBatchLoss:
    """The loss of a micro-batch, and what else is reported of it.

    Attributes:
        loss: float scalar.
        weight: float scalar: what the mean over the micro-batch was divided by,
            if not by its samples (tokens, say); else None.
        values: structure of float scalars, reported as means over the effective
            batch.
        logs: structure of scalars; those of the last micro-batch are reported.
    """

    loss: _types.Tensor
    weight: _types.Tensor | None = None
    values: _types.Structure = dataclasses.field(default_factory=list)
    logs: _types.Structure = dataclasses.field(default_factory=dict)


# Takes a micro-batch: a structure of tensors `(samples, ...)`.
LossFunction: TypeAlias = Callable[[_types.Structure], MicroBatchLoss]
