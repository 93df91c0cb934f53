"""Weights that are divided over the replicas from the start."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig.distribute import _pieces

__all__ = ("check_strategy", "divide", "is_large", "sharded_weights")

# Smaller weights, such as biases, stay whole: to gather them would take longer than it saves.
SMALLEST = 2**14


@contextlib.contextmanager
def sharded_weights(strategy: _types.Strategy) -> Iterator[None]:
    """Within it, the weights of layers are divided over the replicas as they are made.

    No replica ever has all weights of a model that is built in it, but one weight at a time. Each
    has 1/N of every large weight, in equal chunks; a layer gathers its weights when it computes.
    Weights of fewer than 16,384 elements stay whole. The scope of the strategy is entered as well.

    A model with divided weights is trained with ``shard="weights"``, which divides what was made
    elsewhere, too.

    Args:
        strategy: a `tf.distribute.MirroredStrategy`, or a
            `tf.distribute.MultiWorkerMirroredStrategy` with one replica per worker. On one replica
            there is nothing to divide.

    Raises:
        UnsupportedStrategyError: If the strategy is another.

    Example:

    >>> strategy = tfbig.distribute.get_strategy("mirrored")
    >>> with tfbig.distribute.sharded_weights(strategy):
    ...     x = keras.Input((32,))
    ...     model = tfbig.Model(x, keras.layers.Dense(10)(x), shard="weights")
    ...     model.compile("adam", "mse")
    """
    check_strategy(strategy)
    with strategy.scope():
        if strategy.num_replicas_in_sync == 1:
            yield
            return
        with _keras.sharded_variable.initialized_by(
            is_large, functools.partial(divide, strategy=strategy), strategy
        ):
            yield


def check_strategy(strategy: _types.Strategy) -> None:
    """Raises for a strategy under which weights cannot be divided."""
    if _keras.devices.is_tpu(strategy):
        raise errors.UnsupportedStrategyError(
            "Weights cannot be divided under TPUStrategy: all cores of a TPU run one program, in "
            "which no core has a piece of its own. Use shard=None."
        )
    local = len(_keras.collectives.local_replicas(strategy))
    is_multi_worker = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if is_multi_worker and local > 1 and strategy.num_replicas_in_sync > local:
        raise errors.UnsupportedStrategyError(
            "shard='weights' with several workers needs one replica per worker: where a worker has "
            f"several, it has not been tried. Received: {local} replicas per worker. Start a "
            "worker for each device, or use shard='optimizer'."
        )


def is_large(variable: _types.KerasVariable) -> bool:
    """Whether a weight is large enough to be divided."""
    dtype = tf.as_dtype(variable.dtype)
    return bool(dtype.is_floating) and math.prod(variable.shape) >= SMALLEST


def divide(variable: _types.KerasVariable, value: _types.Array, strategy: _types.Strategy) -> None:
    """Divides a weight into equal chunks.

    Args:
        variable: the weight.
        value: array of its shape.
        strategy: the strategy of the replicas.
    """
    pieces = _pieces.in_chunks(variable.shape, strategy.num_replicas_in_sync)
    _keras.sharded_variable.divide(variable, pieces, strategy, value, is_weight=True)
