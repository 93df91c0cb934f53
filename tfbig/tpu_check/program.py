"""A core's program: the graph that `TPUStrategy.run` traced, with everything inside it."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig.tpu_check._types import Array, FuncGraph

__all__ = ("Place", "Program", "function_of", "functions_of", "living", "trace")

# The attribute with which `tf.distribute.TPUStrategy` marks the operations of a program.
_MARK = "_tpu_replicate"


@dataclasses.dataclass(frozen=True)
class Place:
    """An operation, and where it is.

    Attributes:
        op: The operation.
        enclosing: The loops, conditionals and calls around it, the outermost first.
    """

    op: tf.Operation
    enclosing: tuple[tf.Operation, ...] = ()

    @property
    def loops(self) -> list[tf.Operation]:
        """The loops around it, the outermost first."""
        return [op for op in self.enclosing if op.type.endswith("While")]

    @property
    def conditionals(self) -> list[tf.Operation]:
        """The conditionals around it, the outermost first."""
        return [op for op in self.enclosing if op.type.endswith(("If", "Case"))]


class Program:
    """The program that every core runs for one update.

    Args:
        graph: Graph in which `strategy.run` was called once.
        layers: Layers, whose names appear in the names of operations.
        variables: The variables that the program may use.
        logs: Names of the values that it returns.

    Attributes:
        cores: The number of cores that run it.
        places: All operations that take part, including those in loops, conditionals and
            functions.
        inputs: Operations that stand for the values of each core: data and variables.
        outputs: Operations that stand for what each core returns.
        logs: Names of the outputs.
        data: Names of the tensors that stand for the parts of the batch.
        synchronized: Those of `inputs` that are statistics of layers that exchange in their
            forward pass, such as BatchNormalization(synchronized=True).

    Raises:
        UnsupportedStrategyError: If the graph has no program for a TPU.
    """

    def __init__(
        self,
        graph: FuncGraph,
        layers: Sequence[_types.Layer] = (),
        variables: Iterable[_types.KerasVariable] = (),
        logs: Iterable[str] = (),
    ) -> None:
        self._layers: dict[str, str] = {layer.name: type(layer).__name__ for layer in layers}
        self.inputs: list[tf.Operation] = [
            op for op in graph.get_operations() if op.type == "TPUReplicatedInput"
        ]
        self.outputs: list[tf.Operation] = [
            op for op in graph.get_operations() if op.type == "TPUReplicatedOutput"
        ]
        self.logs = list(logs)
        self._captured: dict[str, tf.Tensor] = {
            inner.name: outer for outer, inner in graph.captures
        }
        self.data: list[str] = [t.name for t in graph.inputs if t.name not in self._captured]
        self._variables = {id(v.value._packed_var._handle): v for v in variables}
        statistics = {
            id(variable)
            for layer in layers
            if getattr(layer, "synchronized", False)
            for variable in layer.non_trainable_variables
        }
        self.synchronized = [op for op in self.inputs if id(self.variable_of(op)) in statistics]
        self.places: list[Place] = []
        for op in living(graph):
            if _MARK in op.node_def.attr:
                self._add(Place(op))
        if not self.places:
            raise errors.UnsupportedStrategyError(
                "The graph contains no program for a TPU. Trace `strategy.run` of a TPUStrategy."
            )
        metadata = next(op for op in graph.get_operations() if op.type == "TPUReplicateMetadata")
        self.cores: int = metadata.get_attr("num_replicas")

    def _add(self, place: Place) -> None:
        self.places.append(place)
        for graph in functions_of(place.op):
            for op in living(graph):
                self._add(Place(op, (*place.enclosing, place.op)))

    @property
    def operations(self) -> list[tf.Operation]:
        """The operations outside functions, in order."""
        return [place.op for place in self.places if not place.enclosing]

    def variable_of(self, op: tf.Operation) -> _types.KerasVariable | None:
        """Returns the variable that one of `inputs` stands for; None if it is unknown."""
        return self._variables.get(id(self._captured.get(op.inputs[0].name)))

    def constant(self, tensor: tf.Tensor) -> Array | None:
        """Returns the value of a tensor outside the program, or None if it is unknown."""
        captured = self._captured.get(tensor.name)
        value: Array | None = tf.get_static_value(tensor) if captured is None else captured.numpy()
        return value

    def layer_of(self, op: tf.Operation) -> str | None:
        """Returns the name and class of an operation's layer, for a message; or None."""
        for part in reversed(op.name.split("/")):
            # TensorFlow appends a number to the name of a layer that is called twice.
            for name in (part, re.sub(r"_\d+$", "", part)):
                if name in self._layers:
                    return f"layer {name!r} ({self._layers[name]})"
        return None

    def user_of(self, op: tf.Operation) -> str | None:
        """Returns the first layer that uses an operation's results, for a message; or None."""
        waiting = [op]
        for op in waiting:
            for user in [user for t in op.outputs for user in t.consumers()]:
                layer = self.layer_of(user)
                if layer is not None:
                    return layer
                if user not in waiting:
                    waiting.append(user)
        return None

    def describe(self, op: tf.Operation) -> str:
        """Names an operation, its type and its layer, for a message."""
        return f"operation {op.name!r} ({op.type}) in {self.layer_of(op) or 'no layer'}"


def functions_of(op: tf.Operation) -> list[FuncGraph]:
    """Returns the graphs of the functions that an operation calls: branches, bodies, conditions."""
    names = []
    for attribute in op.op_def.attr:
        if attribute.type == "func":
            names.append(op.get_attr(attribute.name).name)
        elif attribute.type == "list(func)":
            names += [function.name for function in op.get_attr(attribute.name)]
    return [_function(op, name) for name in names if name]


def function_of(op: tf.Operation, attribute: str) -> FuncGraph:
    """Returns the graph of the function in an attribute of an operation."""
    return _function(op, op.get_attr(attribute).name)


def _function(op: tf.Operation, name: str) -> FuncGraph:
    graph = op.graph
    # Which of the graphs registers a function depends on who traced it.
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            if not hasattr(function, "graph"):
                # keras.losses.CTC calls such a function.
                raise errors.UnsupportedModelError(
                    "TensorFlow's legacy functions (Defun) cannot be inspected. Received: "
                    f"{name!r} in operation {op.name!r} ({op.type})."
                )
            return function.graph
        graph = getattr(graph, "outer_graph", None)
    raise LookupError(f"Function {name!r} is not in the graph.")


def living(graph: FuncGraph) -> list[tf.Operation]:
    """Returns the operations that results or effects depend on, in order.

    TensorFlow drops the others.
    """
    wanted = [t.op for t in graph.outputs] + list(graph.control_outputs)
    found = set()
    while wanted:
        op = wanted.pop()
        if op not in found:
            found.add(op)
            wanted += [t.op for t in op.inputs] + list(op.control_inputs)
    return [op for op in graph.get_operations() if op in found]


def trace(model: keras.Model, share: _types.Structure) -> Program:
    """Traces one update of a model, as each core of its strategy runs it.

    Args:
        model: A compiled model, made in the scope of a `TPUStrategy`.
        share: Structure of `tf.TensorSpec` of the part of the batch that a core gets.
    """
    strategy = model.distribute_strategy
    model.check_train_step()
    with strategy.scope():
        _keras.building.build_for(model, _keras.padding.data_of(share))
        # No variable can be created while a TPU's program is traced.
        model.optimizer.build(model.trainable_variables)

    train_step = model._checked_train_step()

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types.
    def update(*data: tf.Tensor) -> _types.Structure:
        # Every replica gets a value that does not belong to one replica.
        return strategy.run(train_step, args=(keras.tree.pack_sequence_as(share, data),))

    specs = keras.tree.flatten(share)
    with strategy.scope():
        concrete = update.get_concrete_function(*specs)
    logs = concrete.structured_outputs
    return Program(
        concrete.graph,
        layers=_keras.layers.all_layers(model),
        variables=_variables(model),
        # TensorFlow flattens a dictionary in this order.
        logs=sorted(logs) if isinstance(logs, dict) else (),
    )


def _variables(model: keras.Model) -> list[_types.KerasVariable]:
    """Returns all variables of a model that an update may use."""
    states = [s for s in (model.loss_scale_state, model.noise_scale_state) if s is not None]
    own = [v for s in states for v in s.variables()]
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables, *own]
