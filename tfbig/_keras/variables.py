"""Keras assigns variables at once, and a TPU exchanges the values; here both can be held back."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state

from tfbig import _types
from tfbig._keras.collectives import replica_id
from tfbig._keras.copies import copies_of, native
from tfbig._keras.devices import is_tpu
from tfbig._keras.sharded_variable import ShardedVariable, ShardedWeight

__all__ = (
    "VariableValues",
    "assign_all",
    "assign_held",
    "assigned_locally",
    "copies_of",
    "devices_of",
    "held_values_of",
    "is_created",
    "is_of_metric_or_generator",
    "is_over_workers",
    "is_summed",
    "native",
    "own_copy",
    "own_pieces_of",
    "updated",
    "values_of",
    "view_of",
)


class VariableValues(keras.StatelessScope):  # type: ignore[misc]  # Keras has no types.
    """A scope in which assignments to Keras variables change nothing outside.

    An assignment inside a `tf.while_loop` or an XLA program thereby becomes a value that can be
    carried, averaged over the replicas, or dropped.

    Args:
        values: pairs of a variable and the value that it has within the scope.

    Attributes:
        assigned: the variables that were assigned, in order.
    """

    def __init__(self, values: Iterable[tuple[_types.KerasVariable, _types.Tensor]] = ()) -> None:
        super().__init__(state_mapping=list(values), collect_losses=True)
        self.assigned: list[_types.KerasVariable] = []

    def get_current_value(self, variable: _types.KerasVariable) -> _types.Tensor:
        value = super().get_current_value(variable)
        if value is None and isinstance(variable, ShardedWeight):
            return variable.read()
        # Keras takes regularized weights from the scope, and expects all of them in it.
        return variable._value if value is None else value

    def add_update(self, update: tuple[_types.KerasVariable, _types.Tensor]) -> None:
        super().add_update(update)
        if not any(update[0] is v for v in self.assigned):
            self.assigned.append(update[0])

    def __exit__(self, *args: object, **kwargs: object) -> None:
        # The regular exit would initialize variables of an outer eager scope.
        global_state.set_global_attribute("stateless_scope", self.original_scope)


def is_created(variable: _types.KerasVariable) -> bool:
    """Whether a variable exists; one that is made within `VariableValues` does not."""
    return variable._value is not None


def is_summed(variable: _types.KerasVariable) -> bool:
    """Whether a metric's variable is a sum over the replicas, as most are."""
    return bool(variable.aggregation == "sum" and variable.dtype.startswith(("float", "bfloat")))


def is_of_metric_or_generator(variable: _types.KerasVariable) -> bool:
    """Whether a variable was made by a metric, or is the state of a generator of random numbers."""
    is_state = variable.name == "seed_generator_state" and variable.shape == (2,)
    return bool(variable.synchronization == "on_read" or is_state)


@contextlib.contextmanager
def assigned_locally(variables: Iterable[_types.KerasVariable]) -> Iterator[None]:
    """Within it, each core of a TPU assigns what it is given to its own copy of the variables.

    For values that are the same on all cores, such as those after the exchange. TPUStrategy would
    exchange them again, as the variable's aggregation says: `iterations` by an AllToAll, even
    inside the conditional that loss scaling needs.
    """
    copied = [native(v) for v in variables] if is_tpu(tf.distribute.get_strategy()) else []
    kept = [v._aggregation for v in copied]
    for variable in copied:
        variable._aggregation = tf.VariableAggregation.NONE
    try:
        yield
    finally:
        for variable, aggregation in zip(copied, kept, strict=True):
            variable._aggregation = aggregation


def own_copy(variable: _types.KerasVariable | _types.Variable) -> _types.Variable:
    """The copy of the replica in whose context this is; what it is assigned stays there.

    Of a variable that is divided, the piece.
    """
    if isinstance(variable, ShardedVariable):
        return variable.pieces[replica_id()]
    copies = copies_of(variable)
    if len(copies) == 1:
        return copies[0]
    context = tf.distribute.get_replica_context()
    extended = context.strategy.extended
    return copies[extended._get_local_replica_id(context._replica_id_in_sync_group)]


def devices_of(variable: _types.KerasVariable | _types.Variable) -> tuple[str, ...]:
    """The devices on which the copies of this process's replicas lie, in their order."""
    return tuple(str(copy.device) for copy in copies_of(variable))


def updated(tensor: _types.Tensor, kind: str, value: _types.Gradient | float) -> _types.Tensor:
    """What an assignment makes of a tensor.

    Args:
        tensor: the tensor.
        kind: "update", "add" or "sub", as in the names of TensorFlow's `scatter_add`.
        value: of its shape, or rows of it.
    """
    if isinstance(value, tf.IndexedSlices):
        scatter = getattr(tf, f"tensor_scatter_nd_{kind}")
        values = tf.cast(value.values, tensor.dtype)
        return scatter(tensor, value.indices[:, tf.newaxis], values)
    value = tf.cast(value, tensor.dtype)
    if kind == "update":
        return value
    return tensor + value if kind == "add" else tensor - value


def values_of(
    variables: Iterable[_types.KerasVariable | _types.Variable],
) -> list[_types.Array]:
    """NumPy values of variables that are the same on all replicas.

    For variables that are summed over the replicas, such as those of metrics, the sum. All of a
    variable that is divided over the replicas, for which every worker must call this.
    """
    return [_value_of(variable) for variable in variables]


def is_over_workers(variable: _types.KerasVariable | _types.Variable) -> bool:
    """Whether a variable is divided over several processes, so that none has all of it."""
    return isinstance(variable, ShardedVariable) and variable.is_over_workers


def view_of(variable: _types.KerasVariable | _types.Variable) -> _types.Array:
    """What `values_of` returns for a variable, for reading at once.

    On CPU it is no copy, unless the variable is divided or summed. It may change with the variable.
    """
    if isinstance(variable, ShardedVariable) or _parts(variable) > 1:
        return _value_of(variable)
    return _view(copies_of(variable)[0])


def own_pieces_of(variable: ShardedVariable) -> Iterator[tuple[int, _types.Array]]:
    """What this process has of a variable that is divided; nothing is exchanged.

    Yields:
        The index of the first element, in row-major order, and a vector of the elements, for
        reading at once: it may change with the variable.
    """
    for replica, piece in variable.pieces.items():
        span = variable.spans[replica]
        assert span is not None
        yield span.begin, _view(piece).reshape([-1])


def _view(variable: _types.Variable) -> _types.Array:
    # `numpy()` copies into memory that is new each time, which takes longer than copying does.
    return np.asarray(variable.read_value())


def held_values_of(
    variables: Iterable[_types.KerasVariable | _types.Variable],
) -> list[list[_types.Array]]:
    """For each variable, what the replicas of this process hold; nothing is exchanged.

    A list of the pieces of a variable that is divided; of one that is the same on all replicas, its
    value alone.
    """
    return [[part[0].numpy() for part in _held(v)] for v in variables]


def assign_held(
    variables: Iterable[_types.KerasVariable | _types.Variable],
    values: Iterable[Sequence[_types.Array]],
) -> None:
    """Assigns what `held_values_of` returned."""
    for variable, held in zip(variables, values, strict=True):
        for copies, value in zip(_held(variable), held, strict=True):
            for copy in copies:
                copy.assign(value)


def _held(
    variable: _types.KerasVariable | _types.Variable,
) -> list[Sequence[_types.Variable]]:
    """The `tf.Variable`s of a variable in this process, those that are equal in one list."""
    if isinstance(variable, ShardedVariable):
        return [[piece] for piece in variable.pieces.values()]
    return [copies_of(variable)]


def _value_of(variable: _types.KerasVariable | _types.Variable) -> _types.Array:
    if isinstance(variable, ShardedVariable):
        return variable.numpy()
    value: _types.Array = copies_of(variable)[0].numpy()
    parts = _parts(variable)
    return value * parts if parts > 1 else value


def assign_all(
    variables: Iterable[_types.KerasVariable | _types.Variable],
    values: Iterable[_types.Array | float],
) -> None:
    """Assigns what `values_of` returned; nothing is exchanged with other workers."""
    for variable, value in zip(variables, values, strict=True):
        if isinstance(variable, ShardedVariable):
            variable.assign(value)
            continue
        for copy in copies_of(variable):
            copy.assign(value / _parts(variable) if _parts(variable) > 1 else value)


def _parts(variable: _types.KerasVariable | _types.Variable) -> int:
    """How many replicas hold a part of the variable's sum; 1 if it is not summed."""
    is_distributed = isinstance(native(variable), tf.distribute.DistributedValues)
    if not is_distributed or not is_summed(variable):
        return 1
    return int(native(variable).distribute_strategy.num_replicas_in_sync)
