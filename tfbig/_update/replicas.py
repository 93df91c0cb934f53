"""The replicas of a strategy, and the sum over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

if TYPE_CHECKING:
    from collections.abc import Sequence

    import keras

    from tfbig import _types

__all__ = ("all_reduce_sum", "count", "count_of")


def count() -> int:
    """Number of replicas of the current strategy."""
    number: int = tf.distribute.get_strategy().num_replicas_in_sync
    return number


def count_of(model: keras.Model) -> int:
    """Number of replicas of a model's strategy."""
    number: int = model.distribute_strategy.num_replicas_in_sync
    return number


def all_reduce_sum(tensors: Sequence[_types.Gradient]) -> list[_types.Gradient]:
    """Sums each tensor over all replicas, in one exchange. In replica context."""
    if count() == 1 or not tensors:
        return list(tensors)
    # The outputs of a loop are on no device, and an exchange between workers needs one.
    tensors = [tf.identity(t) for t in tensors]
    return list(tf.distribute.get_replica_context().all_reduce("SUM", tensors))
