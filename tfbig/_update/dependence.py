"""The ways in which a tensor may depend on the batch; see `batch_dependence`."""

import dataclasses
import enum
from typing import Any, TypeAlias

__all__ = (
    "CONSTANT",
    "DISTINCT",
    "MEAN",
    "SPARSE_INDICES",
    "Coupled",
    "Dependence",
    "Mixed",
    "Samples",
    "Shifted",
    "Sizes",
    "Total",
)


class _Kind(enum.Enum):
    CONSTANT = enum.auto()
    DISTINCT = enum.auto()
    # The indices of a `tf.SparseTensor`: the first column counts samples, the others are joined.
    SPARSE_INDICES = enum.auto()


CONSTANT = _Kind.CONSTANT
DISTINCT = _Kind.DISTINCT
SPARSE_INDICES = _Kind.SPARSE_INDICES


@dataclasses.dataclass(frozen=True)
class Samples:
    """Joined along an axis.

    Attributes:
        axis: the axis.
        order: what put the samples into another order than that of the batch, in which
            they meet only others of that order; None if they stand in that of the batch.
        is_same: whether all samples have the same value, as a mask of positions.
    """

    axis: int = 0
    order: str | None = None
    is_same: bool = dataclasses.field(default=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Integers, such as a shape.

    Attributes:
        grows: of the shape of the tensor, which of them are multiples of the number of samples;
            a bool, or nested tuples of them.
    """

    # Any: mypy knows tuples of one depth only.
    grows: Any


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Neither: the samples meet, or an operation is not known.

    Attributes:
        operation: type of the first operation of that kind.
    """

    operation: str


@dataclasses.dataclass(frozen=True)
class Total(Mixed):
    """Added up over the samples.

    Attributes:
        is_mean: whether it is the mean over them: for two batches as one, that of both, which
            count by their numbers of samples. Otherwise, it is the sum of both.
    """

    is_mean: bool


MEAN = Total("Mean", is_mean=True)


@dataclasses.dataclass(frozen=True)
class Shifted(Mixed):
    """Joined along an axis, but for a mean over all samples that is added to each."""


@dataclasses.dataclass(frozen=True)
class Coupled(Mixed):
    """Neither a sum nor a mean: it takes all samples at once, as a product of two means does."""


Dependence: TypeAlias = _Kind | Samples | Sizes | Mixed
