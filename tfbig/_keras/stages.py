"""Keras places no layer on a device of its own; here layers lie on stages, and computing follows.

A stage is a device, or under a strategy one for each replica. A layer that belongs to one computes
there, and its variables lie there. Everything else, such as losses, gradients, and what an
optimizer makes of them, is computed where its largest input is: TensorFlow would bring it all to
the first device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

import keras
import tensorflow as tf
from keras.src.ops.operation import Operation
from tensorflow.python.distribute import numpy_dataset as _numpy_dataset

from tfbig import _types
from tfbig._keras import collectives, memory, variables
from tfbig._keras.thread import current, holding
from tfbig._keras.variable_identity import VariableIdentity

__all__ = (
    "Stage",
    "being_made_on",
    "beside",
    "chosen_index",
    "following",
    "forget",
    "in_flight_of",
    "move",
    "placed_call",
    "placing",
    "put",
    "stage_of",
    "taking_turns",
    "within",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A part of a model, and the devices that are responsible for it; equal to itself alone.

    Attributes:
        index: its number, from 0.
        devices: full names, one for each replica of this process.
        in_flight: micro-batches that run at the same time.
    """

    index: int
    devices: tuple[str, ...]
    in_flight: int

    def device(self) -> str:
        """The device of the replica in whose context this is; elsewhere that of the first."""
        strategy = collectives.strategy_of_replica()
        if strategy is None or len(self.devices) == 1:
            return self.devices[0]
        return self.devices[collectives.replica_id() - min(collectives.local_replicas(strategy))]

    # What TensorFlow asks of a value beside which a variable is to be made.
    @property
    def _devices(self) -> tuple[str, ...]:
        return self.devices


# --- What belongs to a stage ------------------------------------------------------------


def stage_of(owner: Operation | _types.KerasVariable) -> Stage | None:
    """The stage that a layer, an operation or a variable was put on; None for none."""
    stage: Stage | None = getattr(owner, "_tfbig_stage", None)
    return stage


def put(owner: Operation | _types.KerasVariable, stage: Stage) -> None:
    """Puts a layer, an operation or a variable on a stage; see `move` for a variable's value."""
    # Past Keras, which would look for what it tracks.
    object.__setattr__(owner, "_tfbig_stage", stage)


def chosen_index(owner: Operation) -> int | None:
    """The number of the stage within which a layer or an operation was made; None for none."""
    index: int | None = getattr(owner, "_tfbig_chosen_stage", None)
    return index


def forget(owner: Operation | _types.KerasVariable) -> None:
    """Takes `put` back; what was chosen is still known."""
    with contextlib.suppress(AttributeError):
        object.__delattr__(owner, "_tfbig_stage")


def in_flight_of(variables: Iterable[_types.KerasVariable]) -> int | None:
    """Micro-batches that run at the same time on the stages of variables; None without stages."""
    return next((s.in_flight for s in map(stage_of, variables) if s is not None), None)


# --- Where layers and variables are made ---------------------------------------------------


@contextlib.contextmanager
def within(stage: Stage) -> Iterator[None]:
    """Within it, layers and operations that are made belong to a stage, and so do variables."""
    with holding("stage", stage), being_made_on(stage):
        yield


@contextlib.contextmanager
def being_made_on(stage: Stage) -> Iterator[None]:
    """Within it, variables are made on a stage's devices."""

    def create(next_creator: _types.AnyFunction, **kwargs: object) -> _types.Variable:
        if tf.distribute.has_strategy():
            beside: object = stage
            if isinstance(tf.distribute.get_strategy(), tf.distribute.OneDeviceStrategy):
                beside = _numpy_dataset.SingleDevice(stage.devices[0])
            return next_creator(**kwargs | {"colocate_with": beside})
        with tf.device(stage.devices[0]):
            return next_creator(**kwargs)

    with tf.variable_creator_scope(create):
        yield


def move(variable: _types.KerasVariable, stage: Stage | None, strategy: _types.Strategy) -> None:
    """Makes a variable anew on a stage's devices, or on the replicas', with its present value."""
    (value,) = variables.values_of([variable])
    old, identity = variables.copies_of(variable), VariableIdentity.of(variables.native(variable))
    with strategy.scope(), identity.named(), contextlib.ExitStack() as stack:
        if stage is not None:
            stack.enter_context(being_made_on(stage))
        variable._initialize(value)
    identity.give(variables.copies_of(variable))
    if stage is None:
        forget(variable)
    else:
        put(variable, stage)
    memory.empty(old)


_init_of_keras = Operation.__init__


@functools.wraps(_init_of_keras)
def _init(self: Operation, name: str | None = None) -> None:
    # Keras looks at the arguments of this function.
    _init_of_keras(self, name=name)
    stage = current("stage")
    if stage is not None:
        put(self, stage)
        object.__setattr__(self, "_tfbig_chosen_stage", stage.index)


Operation.__init__ = _init


# --- Where layers compute -------------------------------------------------------------------


@contextlib.contextmanager
def placing(owner: Operation) -> Iterator[None]:
    """Within it, what a layer or an operation computes is on the device of its stage, if any."""
    stage = stage_of(owner)
    if stage is None:
        yield
        return
    turn = (current("turns") or {}).get(stage)
    # Operations of a function wait for the function.
    is_here = turn is not None and turn.graph is tf.compat.v1.get_default_graph()
    with (
        tf.device(stage.device()),
        tf.control_dependencies([turn] if is_here else []),
        being_made_on(stage),
    ):
        yield


def taking_turns(
    turns: Mapping[Stage, _types.Tensor],
) -> contextlib.AbstractContextManager[None]:
    """A context in which the layers of a stage compute only once the tensor of it is there."""
    return holding("turns", turns)


def _placed(call: _types.AnyFunction) -> _types.AnyFunction:
    @functools.wraps(call)
    def placed(self: Operation, *args: object, **kwargs: object) -> _types.Structure:
        stage = stage_of(self)
        if stage is None:
            return call(self, *args, **kwargs)
        passes = current("passes")
        with placing(self):
            if passes is None:
                return call(self, *args, **kwargs)
            run = functools.partial(call, self, *args, **kwargs)
            return passes.call(self, stage, run, (args, kwargs))

    return placed


# A layer builds itself, and casts its inputs, before it is called as an operation.
keras.Layer.__call__ = _placed(keras.Layer.__call__)
placed_call = Operation.__call__ = _placed(Operation.__call__)


# --- Where everything else is computed --------------------------------------------------------


def beside(variable: _types.KerasVariable) -> contextlib.AbstractContextManager[object]:
    """A context of operations on the device of a variable, if that is on a stage."""
    stage = stage_of(variable)
    return contextlib.nullcontext() if stage is None else tf.device(stage.device())


@contextlib.contextmanager
def following(is_staged: bool) -> Iterator[None]:
    """Within it, operations that nobody places are on the device of their largest input.

    Args:
        is_staged: whether there are stages; otherwise, and eagerly, nothing changes.
    """
    if not is_staged or tf.executing_eagerly():
        yield
        return
    with tf.compat.v1.get_default_graph().device(_Follower()):
        yield


# They run on several devices: their bodies' operations are placed one by one.
_CONTROL_FLOW = frozenset(
    [
        *("Case", "If", "PartitionedCall", "StatefulPartitionedCall", "StatelessCase"),
        *("StatelessIf", "StatelessWhile", "While"),
    ]
)

# An unknown dimension is that of a batch or of a sequence.
_UNKNOWN_DIMENSION = 128


class _Follower:
    """Finds the device of an operation by its inputs; see `tf.Graph.device`."""

    def __init__(self) -> None:
        # Of each graph: how many tensors it takes from outside, and these by the identity of the
        # tensors that stand for them.
        self._captured: dict[int, tuple[int, dict[int, _types.Tensor]]] = {}
        # Under a strategy, the device of what nobody places.
        strategy = collectives.strategy_of_replica()
        replicas = {} if strategy is None else collectives.local_replicas(strategy)
        self._default = replicas.get(collectives.replica_id()) if replicas else None

    def __call__(self, operation: tf.Operation) -> str:
        device: str = operation.device
        if device or operation.type in _CONTROL_FLOW:
            return device
        best, rank = "", (-1.0, False)
        for tensor in operation.inputs:
            found = self._device_of(tensor)
            # Of two as large, the one that somebody has placed.
            if found and (_size(tensor), found != self._default) > rank:
                best, rank = found, (_size(tensor), found != self._default)
        return best

    def _device_of(self, tensor: _types.Tensor) -> str:
        if not hasattr(tensor, "graph"):
            # A variable's handle is where the variable is; other values lie anywhere.
            return str(tensor.device) if tensor.dtype == tf.resource else ""
        device: str = tensor.op.device
        if tensor.op.type in ("ReadVariableOp", "ResourceGather") and not device:
            # TensorFlow reads a variable outside of all contexts of devices.
            return self._device_of(tensor.op.inputs[0])
        if tensor.op.type == "Placeholder":
            # Under a strategy it has the replica's device, whatever it stands for.
            outer = self._captured_by(tensor.graph).get(id(tensor))
            return device if outer is None else self._device_of(outer)
        return device

    def _captured_by(self, graph: tf.Graph) -> dict[int, _types.Tensor]:
        captures = getattr(graph, "captures", ())
        number, known = self._captured.get(id(graph), (-1, {}))
        if number != len(captures):
            known = {id(inner): outer for outer, inner in captures}
            self._captured[id(graph)] = len(captures), known
        return known


def _size(tensor: _types.Tensor) -> float:
    """Elements of a tensor; a variable outweighs all."""
    if tensor.dtype == tf.resource:
        return float("inf")
    if tensor.shape.rank is None:
        return _UNKNOWN_DIMENSION
    size = 1
    for dimension in tensor.shape:
        size *= _UNKNOWN_DIMENSION if dimension is None else dimension
    return size
