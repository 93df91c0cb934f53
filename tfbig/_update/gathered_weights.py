"""Weights that no replica has all of, while its micro-batches run.

A weight is gathered where a layer reads it, and dropped when nothing needs it any more: a layer
that recomputes gathers it again in the backward pass. Its gradient is scattered as soon as it is
there, so that a replica adds up the gradient of its piece alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._keras.sharded_variable import Gathering, ShardedWeight
from tfbig._update import accumulators

__all__ = ("GatheredWeights", "Gathering", "WeightStandIns", "in_prediction", "is_divided")


def is_divided(variable: _types.KerasVariable) -> bool:
    """Whether a weight is divided over the replicas."""
    return isinstance(variable, ShardedWeight)


@contextlib.contextmanager
def in_prediction(
    weights: Iterable[_types.KerasVariable], layers: Sequence[_types.Layer]
) -> Iterator[None]:
    """Within it, a replica that only calls a model gathers its weights layer by layer.

    Args:
        weights: the weights of the model.
        layers: those of its layers that gather when they begin.
    """
    divided = [v for v in weights if is_divided(v)]
    strategy = _keras.collectives.strategy_of_replica()
    if not divided or divided[0].strategy is not strategy or tf.executing_eagerly():
        yield
        return
    gathered = GatheredWeights({id(v): v.own_piece() for v in divided})
    with (
        _keras.variables.VariableValues() as values,
        _keras.thread.holding("gathering", gathered),
        _keras.recomputation.recomputed(layers),
    ):
        yield
    # What a layer assigns when it predicts, such as a counter.
    for variable in values.assigned:
        variable.assign(values.get_current_value(variable))


class WeightStandIns:
    """Tensors of a weight's shape, in a trace that tells what a loss function does.

    Args:
        variables: those whose gradients are wanted.

    Attributes:
        read: the divided weights that were read, in order.
    """

    def __init__(self, variables: Iterable[keras.Variable]) -> None:
        self.read: list[ShardedWeight] = []
        self._read_as: dict[int, set[_types.DType]] = {}
        self._tensors: dict[int, _types.Tensor] = {}
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        # Not where they are read, which may be inside a loop.
        for variable in variables:
            if is_divided(variable):
                self._make(variable)

    def tensors(self) -> list[_types.Tensor]:
        """All that are there."""
        return list(self._tensors.values())

    def gradient_sources(self, variables: Iterable[keras.Variable]) -> list[_types.Tensor]:
        """What gradients are taken of, for divided weights and others."""
        return [
            self._tensors[id(v)] if is_divided(v) else _keras.variables.native(v) for v in variables
        ]

    def narrow_dtypes(self) -> dict[int, _types.DType]:
        """The dtypes of fewer bytes to which all layers that read a weight cast it.

        By the identity of the weight; of those that layers read that recompute.
        """
        return {
            id(weight): dtype
            for weight in self.read
            for dtype in self._read_as.get(id(weight), ())
            if len(self._read_as[id(weight)]) == 1 and dtype.size < tf.as_dtype(weight._dtype).size
        }

    def are_needed_for(self, tensors: Iterable[_types.Tensor]) -> bool:
        """Whether one of these tensors of the trace depends on a divided weight."""
        if self._graph is None:
            return bool(self.read)
        sources = {t.op.name for t in self._tensors.values()}
        seen: set[str] = set()
        left = [t.op for t in tensors if tf.is_tensor(t) and t.graph is self._graph]
        while left:
            operation = left.pop()
            if operation.name in sources:
                return True
            if operation.name not in seen:
                seen.add(operation.name)
                left += [t.op for t in operation.inputs]
        return False

    def source_of(self, weight: ShardedWeight) -> _types.Tensor:
        """See `Gathering`."""
        return self.value_of(weight)

    def value_of(self, weight: ShardedWeight) -> _types.Tensor:
        """See `Gathering`."""
        if self._graph is not None and _keras.control_flow.is_within(self._graph):
            raise _read_within(weight)
        if not any(weight is v for v in self.read):
            self.read.append(weight)
        return self._make(weight)

    def values_of(
        self, weights: Sequence[_types.KerasVariable], sources: Sequence[_types.Tensor]
    ) -> list[_types.Tensor]:
        """See `Gathering`."""
        del weights
        return list(sources)

    def reach(self, tensors: Sequence[_types.Tensor | None]) -> None:
        """See `Gathering`."""

    def note_reading(self, weight: ShardedWeight, dtype: _types.DType) -> None:
        """See `Gathering`."""
        self._read_as.setdefault(id(weight), set()).add(dtype)

    def _make(self, weight: ShardedWeight) -> _types.Tensor:
        if id(weight) not in self._tensors:
            with tf.init_scope() if self._graph is None else self._graph.as_default():
                self._tensors[id(weight)] = tf.zeros(weight.shape, weight.dtype)
        return self._tensors[id(weight)]


class GatheredWeights:
    """The weights of one micro-batch: gathered when a layer begins, or else when they are read.

    A gather waits for the inputs of the layer before the one that needs it: it is under way while
    that layer computes, and no more than two layers' weights are there at a time.

    Args:
        pieces: this replica's piece of each divided weight that is read, by its identity.
        with_rows: identities of the weights whose gradient has rows. They are gathered once, and
            their rows are not scattered.
        dtypes: see `WeightStandIns.narrow_dtypes`; others travel as they are.

    Attributes:
        weight: float scalar, what the micro-batch counts in the effective batch; to be set before
            gradients are computed.
        watch: has a tape watch a tensor.
    """

    def __init__(
        self,
        pieces: dict[int, _types.Tensor],
        with_rows: Set[int] = frozenset(),
        dtypes: Mapping[int, _types.DType] = MappingProxyType({}),
    ) -> None:
        self.pieces = pieces
        self.with_rows = with_rows
        self.dtypes = dtypes
        self.weight: _types.Tensor | None = None
        self.watch: Callable[[_types.Tensor], None] = lambda _: None
        self._graph = tf.compat.v1.get_default_graph()
        self._whole: dict[int, _types.Tensor] = {}
        # Of the layer before the present one, and of the present one.
        self._before: list[_types.Tensor] = []
        # One after another: each takes buffers while it is under way.
        self._last_gathered: list[_types.Tensor] = []
        self._last_scattered: list[_types.Tensor] = []
        self._reached: list[_types.Tensor] = []

    def reach(self, tensors: Sequence[_types.Tensor | None]) -> None:
        """See `Gathering`."""
        self._before, self._reached = self._reached, [t for t in tensors if t is not None]

    def source_of(self, weight: ShardedWeight) -> _types.Tensor:
        """What its gradient is taken of: its piece; of a table with rows, all of it."""
        if id(weight) in self.with_rows:
            return self.value_of(weight)
        return self.pieces[id(weight)]

    def value_of(self, weight: ShardedWeight) -> _types.Tensor:
        """See `Gathering`."""
        if _keras.control_flow.is_within(self._graph):
            # In prediction alone: in training, the trace before has refused it.
            return weight.gathered_outside()
        if id(weight) not in self._whole:
            if tf.compat.v1.get_default_graph() is not self._graph:
                raise _read_within(weight)
            whole = self._gathered(weight, self.pieces[id(weight)], weight._dtype)
            if id(weight) in self.with_rows:
                # The gradient's rows are those of the whole table.
                whole = tf.stop_gradient(whole)
                self.watch(whole)
            self._whole[id(weight)] = whole
        return self._whole[id(weight)]

    def values_of(
        self, weights: Sequence[_types.KerasVariable], sources: Sequence[_types.Tensor]
    ) -> list[_types.Tensor]:
        """See `Gathering`."""
        if _keras.control_flow.is_within(self._graph):
            return [
                self.value_of(v) if is_divided(v) else source
                for v, source in zip(weights, sources, strict=True)
            ]
        return [
            self._gathered(v, source, self.dtypes.get(id(v), v._dtype))
            if is_divided(v) and id(v) not in self.with_rows
            else source
            for v, source in zip(weights, sources, strict=True)
        ]

    def note_reading(self, weight: ShardedWeight, dtype: _types.DType) -> None:
        """See `Gathering`."""
        assert self.dtypes.get(id(weight), dtype) == dtype, "layers read as in the trace"

    def gradient_source_of(self, variable: keras.Variable) -> _types.Tensor | _types.Variable:
        """What the gradient of a variable, divided or not, is taken of."""
        return (
            self.source_of(variable) if is_divided(variable) else _keras.variables.native(variable)
        )

    def _gathered(
        self, weight: ShardedWeight, piece: _types.Tensor, sent_as: _types.DType | str
    ) -> _types.Tensor:
        """All of a weight, as a function of the piece."""

        @_keras.gradients.custom_gradient
        def gathered(piece: _types.Tensor) -> tuple[_types.Tensor, _types.AnyFunction]:
            with tf.control_dependencies([*self._before, *self._last_gathered]):
                # Cast before it travels or after, its elements are the same.
                whole = weight.gathered(tf.cast(tf.identity(piece), sent_as))
            self._last_gathered = [whole]
            return tf.cast(whole, weight._dtype), lambda gradient: self._scattered(weight, gradient)

        return gathered(piece)

    def _scattered(self, weight: ShardedWeight, gradient: _types.Gradient) -> _types.Tensor:
        """This replica's piece of the gradient of all replicas' micro-batches."""
        if self.weight is None:
            raise errors.UnsupportedModelError(
                "With divided weights, gradients must not be computed inside of the loss, such as "
                "for a gradient penalty: those of weights would be added up over the replicas. "
                f"Received: a gradient through {weight.path}. Use shard='optimizer'."
            )
        dtype = accumulators.dtype_for(weight.dtype)
        gradient = tf.ensure_shape(tf.cast(tf.convert_to_tensor(gradient), dtype), weight.shape)
        # Not before: a float16 gradient would overflow sooner. A weight of zero is that of a
        # micro-batch that does not count, whatever its gradient.
        weighted = tf.math.multiply_no_nan(gradient, tf.cast(self.weight, dtype))
        with tf.control_dependencies(self._last_scattered):
            piece = weight.scattered(tf.identity(weighted))
        self._last_scattered = [piece]
        return piece


def _read_within(weight: ShardedWeight) -> errors.UnsupportedModelError:
    return errors.UnsupportedModelError(
        "In training, a divided weight must be read outside of conditionals and loops, or in those "
        f"of a layer. Received: {weight.path}, read in one. Use shard='optimizer', or make the "
        "conditional or loop a layer."
    )
