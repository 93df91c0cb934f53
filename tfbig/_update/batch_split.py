"""How a replica's share of the effective batch is split into micro-batches."""

import dataclasses

import tensorflow as tf

from tfbig import _keras, errors

__all__ = ("BatchSplit", "fold")


def positive_integer(name, value, remedy):
    """Returns `value`, or raises if it is not an integer >= 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise errors.InvalidOptionError(
            f"`{name}` must be an integer >= 1. Received: {name}={value!r}. {remedy}"
        )
    return value.__index__()


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

    def __post_init__(self):
        steps, size = self.gradient_accumulation_steps, self.micro_batch_size
        if (steps is None) == (size is None):
            raise errors.InvalidOptionError(
                "Exactly one of `gradient_accumulation_steps` and `micro_batch_size` must be "
                f"given. Received: gradient_accumulation_steps={steps!r}, "
                f"micro_batch_size={size!r}."
            )
        if steps is not None:
            steps = positive_integer(
                "gradient_accumulation_steps", steps, "Use 1 to turn accumulation off."
            )
            object.__setattr__(self, "gradient_accumulation_steps", steps)
        elif size == "auto":
            raise errors.InvalidOptionError(
                "`micro_batch_size='auto'` is an option of models. Received: it for a share of "
                "data. Pass a number of samples, such as `model.micro_batch_size`."
            )
        else:
            size = positive_integer(
                "micro_batch_size", size, "Pass the samples that fit into memory."
            )
            object.__setattr__(self, "micro_batch_size", size)

    def __str__(self):
        if self.micro_batch_size is not None:
            return f"micro_batch_size={self.micro_batch_size}"
        return f"gradient_accumulation_steps={self.gradient_accumulation_steps}"

    @property
    def is_whole(self):
        """Whether a share is never split."""
        return self.gradient_accumulation_steps == 1

    def segments(self, samples):
        """The split of `samples` samples into two runs of micro-batches of equal size.

        Returns:
            `((size, count), (size, count))`; int32 scalars, or ints for an int.
            The first micro-batches have the first size, the rest the second.
        """
        is_static = isinstance(samples, int)
        at_most, at_least = (min, max) if is_static else (tf.minimum, tf.maximum)

        def size(value):
            # Never none and never all too many: XLA compiles also what does not run.
            return at_most(at_least(value, 1), samples)

        if self.micro_batch_size is not None:
            large, rest = self.micro_batch_size, samples % self.micro_batch_size
            return (size(large), samples // large), (size(rest), at_most(rest, 1))
        count = at_least(at_most(self.gradient_accumulation_steps, samples), 1)
        small, larger = samples // count, samples % count
        return (size(small + 1), larger), (size(small), at_most(count - larger, samples))


def fold(split, data, step, carry, *, static_sizes=False, unrolled=False, counted=None):
    """Calls `carry = step(micro_batch, size, carry)` for each micro-batch.

    One `tf.while_loop`, whatever the number of micro-batches. Micro-batches run
    strictly one after another: two at a time would need the memory of two.

    Args:
        split: A `BatchSplit`.
        data: Nested structure of tensors, `(samples, ...)` each. May hold no sample.
        step: Function of `(micro_batch, size, carry)`.
        carry: Structure of tensors.
        static_sizes: Whether sizes must be constants for XLA. Then there are
            two loops, one for each size.
        unrolled: Whether to lay the micro-batches out one after another, for
            ops that may not stand in a loop. Needs `gradient_accumulation_steps`
            and as many samples.
        counted: int32 scalar, how many of the samples count, the first of them; needs
            `static_sizes`. None for all. What is left when so many are split into
            micro-batches of these sizes goes one by one: a micro-batch of another size
            would be another program.
    """
    samples = _keras.data.batch_size(data)
    if unrolled:
        steps = split.gradient_accumulation_steps
        tf.debugging.assert_greater_equal(
            samples,
            steps,
            "A model with synchronized layers needs at least `gradient_accumulation_steps` "
            "samples on every replica in every batch. Use drop_remainder=True, or fewer steps.",
        )
        for k in range(steps):
            begin, end = k * samples // steps, (k + 1) * samples // steps
            carry = step(_keras.data.samples_of(data, begin, end - begin), end - begin, carry)
        return carry

    def loop(carry, count, bounds):
        if isinstance(count, int) and count == 0:
            return carry

        def body(k, carry):
            begin, size = bounds(k)
            return k + 1, step(_keras.data.samples_of(data, begin, size), size, carry)

        if static_sizes:
            # Where a loop hands on to the next what is constant and unchanged, TensorFlow's XLA
            # bridge may lose the body of that.
            carry = tf.nest.map_structure(tf.stop_gradient, carry)
        start = (tf.constant(0), carry)
        return tf.while_loop(lambda k, _: k < count, body, start, parallel_iterations=1)[1]

    if counted is not None:
        begin = 0
        counts = {size: count for size, count in split.segments(samples) if count}
        counts[1] = samples
        for size, count in counts.items():
            # How many there are may change from batch to batch, their size may not.
            count = tf.minimum(count, (counted - begin) // size)
            carry = loop(carry, count, lambda k, begin=begin, size=size: (begin + k * size, size))
            begin += count * size
        return carry

    (large, larges), (small, smalls) = split.segments(samples)
    if static_sizes:
        # Inside the loop the sizes are computed anew from shapes, which XLA
        # knows; a value from outside would not be a constant there.
        def first(k):
            (large, _), _ = split.segments(_keras.data.batch_size(data))
            return k * large, large

        def second(k):
            (large, larges), (small, _) = split.segments(_keras.data.batch_size(data))
            return large * larges + k * small, small

        return loop(loop(carry, larges, first), smalls, second)

    def bounds(k):
        begin = tf.where(k < larges, k * large, large * larges + (k - larges) * small)
        return begin, tf.where(k < larges, large, small)

    return loop(carry, larges + smalls, bounds)
