"""Arrays of which each worker has a part, read by all workers together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from tfbig import _types, errors
from tfbig._keras import collectives

if TYPE_CHECKING:
    from tfbig._keras.sharded_variable import ShardedVariable

__all__ = ("Span", "check_reading", "chief_alone", "joined", "of_chief")

# Bytes that workers exchange at a time.
_PART_BYTES = 4 * 2**20


class Span(Protocol):
    """Which elements of a variable a replica has, in row-major order."""

    @property
    def begin(self) -> int:
        """The first element."""

    @property
    def end(self) -> int:
        """The element after the last."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that they have as a tensor."""


class _Elements(NamedTuple):
    """A `Span`."""

    begin: int
    end: int
    shape: tuple[int, ...]


def joined(
    strategy: _types.Strategy,
    held: Sequence[tuple[Span, _types.Array]],
    shape: Sequence[int],
    dtype: _types.DType,
) -> _types.Array:
    """An array of which each worker holds some elements, and no two the same.

    Each sends its elements and zeros for the others', as integers of the same bits: the sum has the
    bits of every element.

    Args:
        strategy: the strategy of the workers.
        held: elements that this worker holds, and their values.
        shape: shape of the array.
        dtype: its dtype.
    """
    sent_as = {2: np.int32, 4: np.int32, 8: np.int64}[dtype.size]
    bits = {2: np.int16, 4: np.int32, 8: np.int64}[dtype.size]
    size = math.prod(shape)
    whole = np.empty([size], dtype.as_numpy_dtype)
    step = _PART_BYTES // np.dtype(sent_as).itemsize
    for begin in range(0, size, step):
        end = min(begin + step, size)
        sent = np.zeros([end - begin], sent_as)
        for span, piece in held:
            a, b = max(begin, span.begin), min(end, span.end)
            if a < b:
                values = piece[a - span.begin : b - span.begin]
                sent[a - begin : b - begin] = np.ascontiguousarray(values).view(bits)
        summed = _sum_over_workers(strategy, sent)
        whole[begin:end] = summed.astype(bits).view(dtype.as_numpy_dtype)
    return whole.reshape(shape)


def of_chief(strategy: _types.Strategy, value: _types.Array) -> _types.Array:
    """What worker 0 passes, on all workers."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return value
    all_of_it = _Elements(0, value.size, value.shape)
    held = [(all_of_it, value.reshape([-1]))] if strategy.cluster_resolver.task_id == 0 else []
    return joined(strategy, held, value.shape, tf.as_dtype(value.dtype))


# For each strategy and dtype, the function that adds up a vector over the workers.
_SUMS: dict[tuple[int, str], Callable[[_types.Tensor], _types.Tensor]] = {}


def _sum_over_workers(strategy: _types.Strategy, vector: _types.Array) -> _types.Array:
    key = id(strategy), vector.dtype.name
    if key not in _SUMS:

        def summed(vector: _types.Tensor) -> _types.Tensor:
            def of_replica(vector: _types.Tensor) -> _types.Tensor:
                context = tf.distribute.get_replica_context()
                # Of several replicas of a worker, one sends.
                first = min(collectives.local_replicas(strategy))
                sent = vector if collectives.replica_id() == first else tf.zeros_like(vector)
                # An argument of a function is on no device, and an exchange needs one.
                return context.all_reduce("SUM", tf.identity(sent))

            sums = strategy.run(of_replica, args=(vector,))
            return strategy.experimental_local_results(sums)[0]

        _SUMS[key] = tf.function(summed, autograph=False, reduce_retracing=True)
    result: _types.Array = _SUMS[key](tf.convert_to_tensor(vector)).numpy()
    return result


# --- What the chief does alone ------------------------------------------------------

# Who acts on the chief alone, and the function that asks the other workers to take part.
_alone: list[tuple[str, Callable[[ShardedVariable], bool] | None]] = []


@contextlib.contextmanager
def chief_alone(who: str, ask: Callable[[ShardedVariable], bool] | None = None) -> Iterator[None]:
    """Within it, reading a variable of several workers raises instead of waiting for them.

    Args:
        who: what runs on the chief alone, for the message.
        ask: function that asks the other workers to take part in reading a variable, and returns
            whether they will; None if they do not listen.
    """
    _alone.append((who, ask))
    try:
        yield
    finally:
        _alone.pop()


def check_reading(variable: ShardedVariable) -> None:
    """Raises if other workers will not take part in reading a variable.

    Raises:
        UnsupportedStrategyError: If the chief acts alone, and the others do not listen.
    """
    if not _alone:
        return
    who, ask = _alone[-1]
    if ask is None or not ask(variable):
        raise errors.UnsupportedStrategyError(
            f"All workers must take part in reading {variable.path}, which is divided over them. "
            f"Received: {who} on the chief alone. Do it at the end of an epoch, or on all workers, "
            "each with files of its own."
        )
