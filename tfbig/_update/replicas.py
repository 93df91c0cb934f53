"""The replicas of a strategy, and the sum over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from tfbig import _integers, _keras, _types

__all__ = ("BUCKET_BYTES", "all_reduce_sum", "checked_bucket_bytes", "count", "count_of")

# Enough that the latency of a link does not matter, little beside a model that fills a device.
BUCKET_BYTES = 32 * 2**20


def checked_bucket_bytes(value: object) -> int:
    """Returns the option `exchange_bucket_bytes`, checked."""
    return _integers.checked(
        "exchange_bucket_bytes", value, "Pass the bytes of a bucket, such as 32 * 2**20."
    )


def count() -> int:
    """Number of replicas of the current strategy."""
    number: int = tf.distribute.get_strategy().num_replicas_in_sync
    return number


def count_of(model: keras.Model) -> int:
    """Number of replicas of a model's strategy."""
    number: int = model.distribute_strategy.num_replicas_in_sync
    return number


def all_reduce_sum(
    tensors: Sequence[_types.Gradient],
    bucket_bytes: int = BUCKET_BYTES,
    stage: _keras.stages.Stage | None = None,
) -> list[_types.Gradient]:
    """Sums each tensor over all replicas, in one exchange. In replica context.

    The exchange copies what it sends and what it receives, so it goes in buckets, each after the
    one before it: the copies take the memory of a bucket, not that of the model. The last tensors
    go first, as a backward pass makes the gradients of the last layers first.

    Args:
        tensors: Tensors and `tf.IndexedSlices`, as many and of the same dtypes on every replica.
        bucket_bytes: Bytes of a bucket; a larger tensor has a bucket of its own. Where an exchange
            goes in parts, no more are under way, even of such a tensor.
        stage: The stage on whose devices the tensors are; None for the replicas' own devices.
    """
    if count() == 1:
        return list(tensors)
    kinds = [_kind(tensor) for tensor in tensors]
    _keras.collectives.check_same(f"summed: {kinds}, {bucket_bytes}", tensors[-1:])
    summed: list[_types.Gradient] = []
    received: list[_types.Tensor] = []
    for k, bucket in enumerate(_buckets(tensors[::-1], bucket_bytes)):
        with tf.control_dependencies(received), tf.name_scope(f"bucket_{k}"):
            # The outputs of a loop are on no device, and an exchange between workers needs one.
            sent = [tf.identity(t) for t in bucket]
        if stage is None:
            sums = _keras.collectives.all_reduce(sent, bucket_bytes)
        else:
            sums = _keras.collectives.sum_on(stage.devices, sent, bucket_bytes)
        received = [] if tf.executing_eagerly() else tf.nest.flatten(sums, expand_composites=True)
        summed += sums
    return summed[::-1]


def _buckets(
    tensors: Sequence[_types.Gradient], bucket_bytes: int
) -> Iterator[list[_types.Gradient]]:
    """The tensors in order, in lists of at most `bucket_bytes`, or of one tensor."""
    bucket: list[_types.Gradient] = []
    left = bucket_bytes
    for tensor in tensors:
        size = _bytes(tensor)
        if bucket and size > left:
            yield bucket
            bucket, left = [], bucket_bytes
        bucket.append(tensor)
        left -= size
    if bucket:
        yield bucket


def _kind(tensor: _types.Gradient) -> str:
    """What is the same on all replicas; how many rows there are need not be."""
    if isinstance(tensor, tf.IndexedSlices):
        return f"rows of {tensor.dtype.name}"
    return f"{tensor.dtype.name} {tensor.shape}"


def _bytes(tensor: _types.Gradient) -> int:
    """The size of a tensor; of rows, whose number only the batch tells, that of one each."""
    values = tensor.values if isinstance(tensor, tf.IndexedSlices) else tensor
    number: int = math.prod(n or 1 for n in values.shape)
    return number * int(values.dtype.size)
