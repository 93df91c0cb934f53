"""A Keras variable has a copy on every replica; a `ShardedVariable` has a piece of it on each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from tensorflow.python.ops.resource_variable_ops import ResourceVariable, UninitializedVariable

from tfbig import _types
from tfbig._keras import collectives, control_flow, memory, workers_together
from tfbig._keras.copies import copies_of
from tfbig._keras.thread import current, holding
from tfbig._keras.variable_identity import VariableIdentity
from tfbig._keras.workers_together import Span

__all__ = (
    "Gathering",
    "ShardedVariable",
    "ShardedWeight",
    "bytes_on_a_replica",
    "divide",
    "initialized_by",
    "is_dividing",
    "make_whole",
)


class ShardedVariable(keras.Variable):  # type: ignore[misc]  # Keras has no types.
    """A variable of which every replica has a piece, and no replica has all.

    Its shape is that of the whole. In replica context, its value is the replica's piece, and
    assignments assign that; elsewhere, value and assignments are of the whole, which all workers
    must read together.

    `divide` makes it of a variable that is there.
    """

    _spans: Sequence[Span | None]
    _strategy: _types.Strategy
    _identity: VariableIdentity
    # By the number of the replica, for those of this process.
    _parts: dict[int, _types.Variable]

    def _give_pieces(
        self,
        spans: Sequence[Span | None],
        strategy: _types.Strategy,
        value: _types.Array,
        identity: VariableIdentity,
    ) -> None:
        self._spans, self._strategy, self._identity = spans, strategy, identity
        flat = np.reshape(value, [-1])
        self._parts = {}
        for replica, device in collectives.local_replicas(strategy).items():
            span = spans[replica]
            if span is not None:
                piece = flat[span.begin : span.end].reshape(span.shape)
                # Past the strategy, which would make a copy for each replica.
                with tf.init_scope(), tf.device(device), identity.named():
                    self._parts[replica] = ResourceVariable(
                        piece, trainable=self.trainable, name=self.name, dtype=self._dtype
                    )
        identity.give(self._parts.values())

    @property
    def strategy(self) -> _types.Strategy:
        """The strategy of the replicas that have the pieces."""
        return self._strategy

    @property
    def spans(self) -> Sequence[Span | None]:
        """The elements that each replica has; None where it has none."""
        return self._spans

    @property
    def key(self) -> str:
        """What optimizers know the variable by."""
        return self._identity.key

    @property
    def pieces(self) -> dict[int, _types.Variable]:
        """The pieces of this process's replicas, by the numbers of these."""
        return self._parts

    @property
    def is_over_workers(self) -> bool:
        """Whether it is divided over the replicas of several processes."""
        replicas = int(self._strategy.num_replicas_in_sync)
        return len(collectives.local_replicas(self._strategy)) < replicas

    # --- Values -------------------------------------------------------------------

    @property
    def _own(self) -> _types.Variable | None:
        """In the context of a replica of the strategy, its piece; None elsewhere."""
        if collectives.strategy_of_replica() is not self._strategy:
            return None
        replica = collectives.replica_id()
        if replica not in self._parts:
            raise RuntimeError(f"Replica {replica} has no piece of {self.path}.")
        return self._parts[replica]

    @property
    def value(self) -> _types.Tensor:
        if in_stateless_scope():
            mapped = get_stateless_scope().state_mapping.get(id(self))
            if mapped is not None:
                return self._maybe_autocast(mapped)
        own = self._own
        return self._maybe_autocast(self._whole() if own is None else own)

    def _whole(self) -> _types.Tensor:
        """All of it, outside of the replicas. Every worker must call it."""
        if tf.executing_eagerly():
            return tf.convert_to_tensor(self.numpy())
        if isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy):
            gathered = self._strategy.run(lambda: self.gathered(self.own_piece()))
            return self._strategy.experimental_local_results(gathered)[0]
        parts = [tf.reshape(self._parts[r], [-1]) for r in sorted(self._parts)]
        return tf.reshape(tf.concat(parts, 0), self.shape)

    def numpy(self) -> _types.Array:
        """All of it. Every worker must call it."""
        if isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy):
            workers_together.check_reading(self)
            held = [(self._span(r), part.numpy().reshape([-1])) for r, part in self._parts.items()]
            return workers_together.joined(
                self._strategy, held, self.shape, tf.as_dtype(self._dtype)
            )
        whole = np.empty([math.prod(self.shape)], tf.as_dtype(self._dtype).as_numpy_dtype)
        for replica, part in self._parts.items():
            span = self._span(replica)
            whole[span.begin : span.end] = part.numpy().reshape([-1])
        return whole.reshape(self.shape)

    def __array__(self, dtype: Any = None) -> _types.Array:  # Any: what NumPy takes for a dtype.
        whole = self.numpy()
        return whole if dtype is None else whole.astype(dtype)

    def _span(self, replica: int) -> Span:
        span = self._spans[replica]
        assert span is not None
        return span

    # --- Exchange with the other replicas -------------------------------------------

    def own_piece(self) -> _types.Tensor:
        """The piece of the replica in whose context this is; of no elements if it has none."""
        own = self._parts.get(collectives.replica_id())
        return tf.zeros([0], self._dtype) if own is None else tf.identity(own)

    def gathered(self, piece: _types.Tensor) -> _types.Tensor:
        """All of the variable, of which each replica passes its piece. In replica context."""
        rows = collectives.all_gather(_filled_up(tf.reshape(piece, [-1]), self._longest()))
        size = math.prod(self.shape)
        if math.prod(rows.shape) > size:
            # The last pieces may be shorter than the others.
            rows = tf.reshape(rows, [-1])[:size]
        return tf.reshape(rows, self.shape)

    def scattered(self, whole: _types.Tensor) -> _types.Tensor:
        """This replica's piece of what all replicas pass, added up. In replica context."""
        replicas, length = len(self._spans), self._longest()
        rows = tf.reshape(
            _filled_up(tf.reshape(whole, [-1]), replicas * length), [replicas, length]
        )
        row = collectives.reduce_scatter(rows, whole.dtype)
        span = self._spans[collectives.replica_id()]
        return row[:0] if span is None else tf.reshape(row[: span.end - span.begin], span.shape)

    def _longest(self) -> int:
        return max(span.end - span.begin for span in self._spans if span is not None)

    # --- Assignments --------------------------------------------------------------

    def assign(self, value: _types.Tensor) -> _types.Tensor:
        if self._own is None:
            return super().assign(value)
        self.update_own("update", value)
        return value

    def update_own(self, kind: str, value: _types.Gradient | float) -> None:
        """Assigns the piece of the replica in whose context this is.

        Args:
            kind: "update", "add" or "sub".
            value: of the shape of the piece; or rows of it.
        """
        own = self._own
        assert own is not None
        if isinstance(value, tf.IndexedSlices):
            rows = tf.IndexedSlices(tf.cast(value.values, own.dtype), value.indices)
            getattr(own, f"scatter_{kind}")(rows)
        else:
            name = "assign" if kind == "update" else f"assign_{kind}"
            getattr(own, name)(tf.cast(value, own.dtype))

    def _direct_assign(self, value: _types.Tensor) -> None:
        flat = tf.reshape(tf.cast(value, self._dtype), [-1])
        for replica, part in self._parts.items():
            span = self._span(replica)
            part.assign(tf.reshape(flat[span.begin : span.end], span.shape))

    # --- Files, and what is printed -----------------------------------------------

    @property
    def _shared_name(self) -> str:
        return str(self.path)

    def _serialize_to_tensors(self) -> dict[str, _types.Tensor]:
        # The name under which a variable that is not divided is written.
        return {"VARIABLE_VALUE": tf.convert_to_tensor(self.numpy())}

    def _restore_from_tensors(self, restored_tensors: dict[str, _types.Tensor]) -> None:
        self._direct_assign(restored_tensors["VARIABLE_VALUE"])

    def _copy_trackable_to_cpu(self, object_map: dict[object, object]) -> None:
        object_map[self] = tf.Variable(self.numpy())

    def _trackable_children(
        self, save_type: str = "checkpoint", **kwargs: object
    ) -> dict[str, object]:
        if save_type != "savedmodel":
            return {}
        # What functions read.
        return {f"piece_{replica}": part for replica, part in self._parts.items()}

    def _export_to_saved_model_graph(
        self, object_map: dict[object, object], *args: object, **kwargs: object
    ) -> list[object]:
        # Without a value, which is in the files of variables: this runs in a graph.
        object_map[self] = UninitializedVariable(
            shape=self.shape, dtype=self._dtype, trainable=False, name=self.name
        )
        return []

    def _write_object_proto(self, proto: Any, options: object) -> None:  # Any: of TensorFlow.
        del options
        described = proto.variable
        described.SetInParent()
        described.name = self.name
        described.trainable = False
        described.dtype = tf.as_dtype(self._dtype).as_datatype_enum
        described.shape.CopyFrom(tf.TensorShape(self.shape).as_proto())

    def __repr__(self) -> str:
        # Without the value, for which all workers would be needed.
        return f"<ShardedVariable path={self.path}, shape={self.shape}, dtype={self.dtype}>"


class Gathering(Protocol):
    """What gives weights their values while a replica's micro-batches run."""

    def value_of(self, weight: ShardedWeight) -> _types.Tensor:
        """All of a weight."""

    def source_of(self, weight: ShardedWeight) -> _types.Tensor:
        """What a layer that recomputes is a function of in place of a weight."""

    def values_of(
        self, weights: Sequence[_types.KerasVariable], sources: Sequence[_types.Tensor]
    ) -> list[_types.Tensor]:
        """All of the weights of a layer.

        Args:
            weights: its variables, divided or not.
            sources: what `source_of` returned for those that are divided, and the values of the
                others.
        """

    def reach(self, tensors: Sequence[_types.Tensor | None]) -> None:
        """Says that a layer begins, in the forward or backward pass, with these tensors."""

    def note_reading(self, weight: ShardedWeight, dtype: _types.DType) -> None:
        """Says that a layer that recomputes reads a weight, cast to this dtype."""


class ShardedWeight(ShardedVariable):
    """A weight of which every replica has a piece; whoever reads it gathers all of it.

    Only where an optimizer updates the pieces, its value is the piece. Assignments are of the whole
    everywhere else.
    """

    @property
    def value(self) -> _types.Tensor:
        if not in_stateless_scope():
            return self._maybe_autocast(self.read())
        mapped = get_stateless_scope().state_mapping.get(id(self))
        if mapped is None:
            return self._maybe_autocast(self.read())
        value = self._maybe_autocast(mapped)
        gathering: Gathering | None = current("gathering")
        if gathering is not None:
            gathering.note_reading(self, value.dtype)
        return value

    def read(self) -> _types.Tensor:
        """What its value is where no scope says otherwise."""
        gathering: Gathering | None = current("gathering")
        if gathering is not None:
            return gathering.value_of(self)
        if in_symbolic_scope():
            # Keras asks for shapes.
            return tf.zeros(self.shape, self._dtype)
        if self._own_strategy() is None:
            return self._whole()
        return self.own_piece() if self._is_updated() else self.gathered_outside()

    def gathered_outside(self) -> _types.Tensor:
        """All of it, gathered before the conditionals and loops that read it. In replica context.

        Within them, replicas would wait for ever for one that takes another branch. In one process
        they would even in the same loop, see `collectives.while_loop`.
        """
        if tf.executing_eagerly():
            return self.gathered(self.own_piece())
        with control_flow.graph_outside().as_default():
            return self.gathered(self.own_piece())

    def _own_strategy(self) -> _types.Strategy | None:
        strategy = collectives.strategy_of_replica()
        return strategy if strategy is self._strategy else None

    def _is_updated(self) -> bool:
        return id(self) in (current("own_pieces") or ())

    def assign(self, value: _types.Tensor) -> _types.Tensor:
        if in_stateless_scope() or self._own_strategy() is None:
            return keras.Variable.assign(self, value)
        span = self._spans[collectives.replica_id()]
        if span is not None:
            flat = tf.reshape(tf.cast(value, self._dtype), [-1])
            self.update_own("update", tf.reshape(flat[span.begin : span.end], span.shape))
        return value


def divide(
    variable: _types.KerasVariable,
    spans: Sequence[Span | None],
    strategy: _types.Strategy,
    value: _types.Array,
    is_weight: bool = False,
) -> None:
    """Makes a variable a `ShardedVariable`: each replica of this process gets its piece of a value.

    Args:
        variable: the variable, which keeps its identity.
        spans: the elements that each replica has; None where it has none.
        strategy: the strategy of the replicas.
        value: array of the variable's shape.
        is_weight: whether to make it a `ShardedWeight`, whose pieces must be equal chunks.
    """
    # Its copies go before the pieces are made.
    whole = getattr(variable, "_value", None)
    variable._value = None
    if whole is None:
        identity = VariableIdentity(f"sharded_{id(variable)}", tf.get_current_name_scope())
    else:
        identity = VariableIdentity.of(whole)
        memory.empty(copies_of(whole))
    variable.__class__ = ShardedWeight if is_weight else ShardedVariable
    variable._give_pieces(spans, strategy, value, identity)


@contextlib.contextmanager
def initialized_by(
    is_divided: Callable[[_types.KerasVariable], bool],
    divide: Callable[[_types.KerasVariable, _types.Array], None],
    strategy: _types.Strategy,
) -> Iterator[None]:
    """Within it, this thread divides trainable variables when they are made.

    Args:
        is_divided: function of a variable without value: whether to divide it.
        divide: function of the variable and its initial value.
        strategy: the strategy whose workers get the chief's value.
    """

    def initialize(
        variable: _types.KerasVariable, initializer: Callable[..., _types.Tensor]
    ) -> bool:
        if not variable.trainable or not is_divided(variable):
            return False
        with tf.init_scope():
            value = initializer(tuple(variable.shape), dtype=variable._dtype)
            value = workers_together.of_chief(strategy, tf.convert_to_tensor(value).numpy())
            divide(variable, value)
        return True

    with holding("initialize", initialize):
        yield


def is_dividing() -> bool:
    """Whether variables that this thread makes are divided."""
    return current("initialize") is not None


_initialize_of_keras = keras.Variable._initialize_with_initializer


def _initialize_with_initializer(
    self: _types.KerasVariable, initializer: Callable[..., _types.Tensor]
) -> None:
    if isinstance(initializer, keras.initializers.Initializer):
        vars(self)["_tfbig_initializer"] = initializer
    initialize = current("initialize")
    if initialize is None or type(self) is not keras.Variable or not initialize(self, initializer):
        _initialize_of_keras(self, initializer)


keras.Variable._initialize_with_initializer = _initialize_with_initializer


def initializer_of(variable: _types.KerasVariable) -> keras.initializers.Initializer | None:
    """The initializer that made a variable's first value; None for another function or a value."""
    return vars(variable).get("_tfbig_initializer")


def make_whole(variable: ShardedVariable) -> None:
    """Takes `divide` back: every replica gets all of the variable."""
    value, strategy, identity = variable.numpy(), variable._strategy, variable._identity
    memory.empty(variable.pieces.values())
    del variable._spans, variable._strategy, variable._identity, variable._parts
    variable.__class__ = keras.Variable
    with strategy.scope(), identity.named():
        variable._initialize(tf.constant(value))
    identity.give(copies_of(variable))


def _filled_up(vector: _types.Tensor, length: int) -> _types.Tensor:
    """A vector with zeros after it, such that it has so many elements."""
    missing = length - vector.shape[0]
    return tf.pad(vector, [[0, missing]]) if missing else vector


def bytes_on_a_replica(variables: Iterable[_types.KerasVariable], strategy: _types.Strategy) -> int:
    """Bytes of variables on the replica of this process that has most of them."""
    pieces = dict.fromkeys(collectives.local_replicas(strategy), 0)
    copied = 0
    for variable in variables:
        element = int(tf.as_dtype(variable.dtype).size)
        if isinstance(variable, ShardedVariable):
            for replica, part in variable.pieces.items():
                pieces[replica] += math.prod(part.shape) * element
        else:
            copied += math.prod(variable.shape) * element
    return copied + max(pieces.values())
