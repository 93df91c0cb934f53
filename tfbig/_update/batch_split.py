"""How a replica's share of the effective batch is split into micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from tfbig import _integers, _types, errors

__all__ = ("BatchSplit", "Segments", "Size", "bounds")

# A number of samples or micro-batches: an int where shapes are static, else an int32 scalar.
Size: TypeAlias = int | _types.Tensor

# Two runs of micro-batches, each of a size and so many.
Segments: TypeAlias = tuple[tuple[Size, Size], tuple[Size, Size]]


def bounds(segments: Segments, k: _types.Tensor) -> tuple[_types.Tensor, Size]:
    """Where a micro-batch begins, and its size.

    Args:
        segments: what `BatchSplit.segments` returned.
        k: int32 scalar, the number of the micro-batch, from 0.
    """
    (large, larges), (small, _) = segments
    begin = tf.where(k < larges, k * large, large * larges + (k - larges) * small)
    return begin, tf.where(k < larges, large, small)


@dataclasses.dataclass(frozen=True)
class BatchSplit:
    """How many micro-batches, or how large.

    Exactly one of the two is given.

    Args:
        gradient_accumulation_steps: Micro-batches per replica and update. Their
            sizes differ by at most one sample. A share of fewer samples than
            this is split into single samples.
        micro_batch_size: Samples per micro-batch and replica. The last may be
            smaller.
    """

    gradient_accumulation_steps: int | None = None
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        # As given by the user.
        steps: object = self.gradient_accumulation_steps
        size: object = self.micro_batch_size
        if (steps is None) == (size is None):
            raise errors.InvalidOptionError(
                "Exactly one of `gradient_accumulation_steps` and `micro_batch_size` must be "
                f"given. Received: gradient_accumulation_steps={steps!r}, "
                f"micro_batch_size={size!r}."
            )
        if steps is not None:
            steps = _integers.checked(
                "gradient_accumulation_steps", steps, "Use 1 to turn accumulation off."
            )
            object.__setattr__(self, "gradient_accumulation_steps", steps)
        elif size == "auto":
            raise errors.InvalidOptionError(
                "`micro_batch_size` must be a number of samples here; only models take 'auto'. "
                "Received: micro_batch_size='auto'. Pass `model.micro_batch_size`, for example."
            )
        else:
            size = _integers.checked(
                "micro_batch_size", size, "Pass the samples that fit into memory."
            )
            object.__setattr__(self, "micro_batch_size", size)

    def __str__(self) -> str:
        if self.micro_batch_size is not None:
            return f"micro_batch_size={self.micro_batch_size}"
        return f"gradient_accumulation_steps={self.gradient_accumulation_steps}"

    @property
    def never_splits(self) -> bool:
        """Whether a share is never split."""
        return self.gradient_accumulation_steps == 1

    def may_split(self, batch_size: int | None) -> bool:
        """Whether a batch may come to more than one micro-batch on a replica.

        Args:
            batch_size: samples of the batch; None if not known.
        """
        if self.never_splits or batch_size == 1:
            return False
        size = self.micro_batch_size
        return size is None or batch_size is None or size < batch_size

    def segments(self, samples: Size) -> Segments:
        """`samples` samples as two runs of micro-batches of equal size.

        Returns:
            `((size, count), (size, count))`; int32 scalars, or ints for an int.
            The first micro-batches have the first size, the rest the second.
        """
        is_static = isinstance(samples, int)
        at_most: Callable[[Size, Size], Size] = min if is_static else tf.minimum
        at_least: Callable[[Size, Size], Size] = max if is_static else tf.maximum

        def size(value: Size) -> Size:
            # Clamped to [1, samples]: XLA compiles also what does not run.
            return at_most(at_least(value, 1), samples)

        if self.micro_batch_size is not None:
            large, rest = self.micro_batch_size, samples % self.micro_batch_size
            return (size(large), samples // large), (size(rest), at_most(rest, 1))
        assert self.gradient_accumulation_steps is not None
        count = at_least(at_most(self.gradient_accumulation_steps, samples), 1)
        small, larger = samples // count, samples % count
        return (size(small + 1), larger), (size(small), at_most(count - larger, samples))

    def of_one_size(self, samples: Size) -> tuple[int, int] | None:
        """The size of all micro-batches, and how many there are.

        Returns:
            Two ints; None where the sizes are not known or differ.
        """
        if not isinstance(samples, int):
            return None
        # Of an int, the segments are of ints.
        segments = [(int(size), int(count)) for size, count in self.segments(samples) if count]
        return segments[0] if len(segments) == 1 else None
