"""The loop over the micro-batches of a replica's share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import batch_split
from tfbig._update.batch_split import BatchSplit, Size

__all__ = ("Step", "fold")

# Of a micro-batch, its size and what is carried; returns what is carried on.
Step: TypeAlias = Callable[[_types.Structure, _types.Tensor, _types.Structure], _types.Structure]

# The first sample and the size of the micro-batch of an index.
_Bounds: TypeAlias = Callable[[_types.Tensor], tuple[Size, Size]]


def fold(
    split: BatchSplit,
    data: _types.Structure,
    step: Step,
    carry: _types.Structure,
    *,
    static_sizes: bool = False,
    unrolled: bool = False,
    valid_samples: _types.Tensor | None = None,
    in_flight: int = 1,
    early: Callable[[_types.Structure], _types.Structure] | None = None,
) -> _types.Structure:
    """Calls `carry = step(micro_batch, size, carry)` for each micro-batch.

    One `tf.while_loop`, whatever the number of micro-batches. Micro-batches run
    strictly one after another, since two at a time would need the memory of two; unless several are
    `in_flight`.

    Args:
        split: How the data is split.
        data: Nested structure of tensors, `(samples, ...)` each. May hold no sample.
        step: What is called.
        carry: Structure of tensors.
        static_sizes: Whether sizes must be constants for XLA. Then there are
            two loops, one for each size.
        unrolled: Whether to lay the micro-batches out one after another, for
            ops that may not stand in a loop. Needs `gradient_accumulation_steps`
            and as many samples.
        valid_samples: int32 scalar, how many of the samples, the first of them, are no
            padding; needs `static_sizes`. None for all.
        in_flight: How many micro-batches may run at the same time, on stages of a model. Not with
            `static_sizes`.
        early: Function of what is carried; returns what of it is handed on as soon as the last
            micro-batch has made it, not when all of it is made. None for nothing. Not with
            `static_sizes` or several `in_flight`.
    """
    if unrolled:
        return _unrolled(split, data, step, carry)
    if valid_samples is not None:
        return _fold_valid(split, data, step, carry, valid_samples)
    samples = _keras.batches.batch_size(data)
    segments = split.segments(samples)
    (_, larges), (_, smalls) = segments
    if static_sizes:
        # Inside the loop the sizes are computed anew from shapes, which XLA
        # knows; a value from outside would not be a constant there.
        def first(k: _types.Tensor) -> tuple[Size, Size]:
            (large, _), _ = split.segments(_keras.batches.batch_size(data))
            return k * large, large

        def second(k: _types.Tensor) -> tuple[Size, Size]:
            (large, larges), (small, _) = split.segments(_keras.batches.batch_size(data))
            return large * larges + k * small, small

        carry = _loop_of_static_sizes(data, step, carry, larges, first)
        return _loop_of_static_sizes(data, step, carry, smalls, second)

    if (static := split.of_one_size(samples)) is not None:
        size, count = static
        # Shapes that are known make for fewer operations, and so for a faster start.
        of_one_size = functools.partial(_bounds_of_one_size, begin=0, size=size)
        return _loop(data, step, carry, count, of_one_size, in_flight, early)

    bounds = functools.partial(batch_split.bounds, segments)
    return _loop(data, step, carry, larges + smalls, bounds, in_flight, early)


def _unrolled(
    split: BatchSplit, data: _types.Structure, step: Step, carry: _types.Structure
) -> _types.Structure:
    """The micro-batches one after another, without a loop."""
    samples, steps = _keras.batches.batch_size(data), split.gradient_accumulation_steps
    assert steps is not None
    tf.debugging.assert_greater_equal(
        samples,
        steps,
        "A model with synchronized layers needs at least `gradient_accumulation_steps` "
        "samples on every replica in every batch. Use drop_remainder=True, or fewer steps.",
    )
    for k in range(steps):
        begin, end = k * samples // steps, (k + 1) * samples // steps
        carry = step(_keras.batches.slice_samples(data, begin, end - begin), end - begin, carry)
    return carry


def _fold_valid(
    split: BatchSplit,
    data: _types.Structure,
    step: Step,
    carry: _types.Structure,
    valid_samples: _types.Tensor,
) -> _types.Structure:
    """The micro-batches of the samples that are no padding.

    What is left over when they are split into micro-batches of the sizes of a full batch goes one
    by one: a micro-batch of another size would be another program.
    """
    samples = _keras.batches.batch_size(data)
    counts = {size: count for size, count in split.segments(samples) if count}
    counts[1] = samples
    begin = 0
    for size, count in counts.items():
        # How many there are may change from batch to batch, their size may not.
        count = tf.minimum(count, (valid_samples - begin) // size)
        bounds = functools.partial(_bounds_of_one_size, begin=begin, size=size)
        carry = _loop_of_static_sizes(data, step, carry, count, bounds)
        begin += count * size
    return carry


def _bounds_of_one_size(k: _types.Tensor, begin: Size, size: Size) -> tuple[Size, Size]:
    return begin + k * size, size


def _loop_of_static_sizes(
    data: _types.Structure, step: Step, carry: _types.Structure, count: Size, bounds: _Bounds
) -> _types.Structure:
    # Where a loop hands on to the next what is constant and unchanged, TensorFlow's XLA
    # bridge may lose the body of that.
    if not (isinstance(count, int) and count == 0):
        carry = tf.nest.map_structure(tf.stop_gradient, carry)
    return _loop(data, step, carry, count, bounds)


def _loop(
    data: _types.Structure,
    step: Step,
    carry: _types.Structure,
    count: Size,
    bounds: _Bounds,
    in_flight: int = 1,
    early: Callable[[_types.Structure], _types.Structure] | None = None,
) -> _types.Structure:
    """So many micro-batches, one after another."""
    if isinstance(count, int) and count == 0:
        return carry

    def body(k: _types.Tensor, carry: _types.Structure) -> tuple[_types.Tensor, _types.Structure]:
        begin, size = bounds(k)
        return k + 1, step(_keras.batches.slice_samples(data, begin, size), size, carry)

    start = (tf.constant(0), carry)

    def is_left(k: _types.Tensor, _: _types.Structure) -> _types.Tensor:
        return k < count

    if in_flight > 1:
        return _keras.pipelined_loop.while_loop(is_left, body, start, in_flight)[1]
    if early is not None:
        return _keras.pipelined_loop.while_loop_with_early_results(
            is_left, body, start, lambda k, carry: [k, early(carry)]
        )[1]
    return tf.while_loop(is_left, body, start, parallel_iterations=1)[1]
