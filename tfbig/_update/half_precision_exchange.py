"""Gradients that are exchanged in half precision: the option `exchange_dtype`."""

from __future__ import annotations

import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._update import accumulators, replicas

__all__ = ("assertion_of", "checked_dtype", "narrowed", "sum_gradients")


def checked_dtype(value: object) -> str | None:
    """Returns the option `exchange_dtype`, checked: "float16", "bfloat16" or None."""
    if value is None:
        return None
    try:
        name = tf.as_dtype(value).name
    except TypeError:
        name = None
    if name not in ("float16", "bfloat16"):
        raise errors.InvalidOptionError(
            "`exchange_dtype` must be 'bfloat16', 'float16' or None, which exchanges gradients as "
            f"they are. Received: exchange_dtype={value!r}."
        )
    return str(name)


def sum_gradients(
    dtype: str,
    gradients: list[_types.Gradient],
    weight: _types.Tensor,
    bucket_bytes: int,
    is_checked: bool,
) -> list[_types.Gradient]:
    """Sums gradients over the replicas in half precision.

    They are divided by the weight before the exchange, since sums over many samples might
    overflow, and multiplied by it afterwards.

    Args:
        dtype: "float16" or "bfloat16".
        gradients: gradients, float32 or wider.
        weight: float scalar, the weight of the whole batch.
        bucket_bytes: see `replicas.all_reduce_sum`.
        is_checked: whether to assert that the sums are finite.
    """
    narrow = [accumulators.map_values(lambda v: narrowed(v, weight, dtype), g) for g in gradients]
    # Rows are gathered, not added, and TensorFlow does not gather bfloat16.
    sent = [_rows_as(tf.float16, g) for g in narrow]
    sums = [_rows_as(dtype, g) for g in replicas.all_reduce_sum(sent, bucket_bytes)]
    if is_checked:
        sums = _asserted_finite(sums)
    return [_widened(s, weight, g.dtype) for s, g in zip(sums, gradients, strict=True)]


def assertion_of(is_finite: _types.Tensor) -> tf.Operation:
    """Asserts that gradients were finite after the exchange, the same on every replica."""
    return tf.debugging.Assert(is_finite, [_keras.graph_errors.OVERFLOW])


def narrowed(values: _types.Tensor, weight: _types.Tensor, dtype: str) -> _types.Tensor:
    """Values in half precision, divided by the weight of the whole batch."""
    return tf.cast(tf.math.divide_no_nan(values, tf.cast(weight, values.dtype)), dtype)


def _widened(
    gradient: _types.Gradient, weight: _types.Tensor, dtype: _types.DType
) -> _types.Gradient:
    return accumulators.map_values(
        lambda values: tf.cast(values, dtype) * tf.cast(weight, dtype), gradient
    )


def _rows_as(dtype: _types.DType | str, gradient: _types.Gradient) -> _types.Gradient:
    """The bits of a table's rows as another dtype; other gradients unchanged."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    return accumulators.map_values(lambda values: tf.bitcast(values, dtype), gradient)


def _asserted_finite(sums: list[_types.Gradient]) -> list[_types.Gradient]:
    finite = [tf.reduce_all(tf.math.is_finite(accumulators.values(g))) for g in sums]
    with tf.control_dependencies([assertion_of(tf.reduce_all(finite))]):
        return [accumulators.map_values(tf.identity, g) for g in sums]
