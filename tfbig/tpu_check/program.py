"""The program of a core: the graph that `TPUStrategy.run` traced, with all that is inside of it."""

import dataclasses
import re

import keras
import tensorflow as tf

from tfbig import _keras, errors

__all__ = ("Place", "Program", "function_of", "functions_of", "living", "trace")

# What `tf.distribute.TPUStrategy` marks operations of the program with.
_MARK = "_tpu_replicate"


@dataclasses.dataclass(frozen=True)
class Place:
    """An operation, and where it stands.

    Attributes:
        op: `tf.Operation`.
        enclosing: tuple of `tf.Operation`: the loops, conditionals and calls that it is inside
            of, the outermost first.
    """

    op: tf.Operation
    enclosing: tuple = ()

    @property
    def loops(self):
        """List of the loops around it, the outermost first."""
        return [op for op in self.enclosing if op.type.endswith("While")]

    @property
    def conditionals(self):
        """List of the conditionals around it, the outermost first."""
        return [op for op in self.enclosing if op.type.endswith(("If", "Case"))]


class Program:
    """The program that every core runs for one update.

    Args:
        graph: FuncGraph in which `strategy.run` was called once.
        layers: list of layers, of whose names the names of operations are made.
        variables: list of Keras variables, those that the program may use.
        logs: list of str, names of what is returned.

    Attributes:
        places: list of `Place`: all operations that take part, those of loops, conditionals and
            functions included.
        inputs: list of `tf.Operation` that stand for the values which each core has for itself:
            data and variables.
        outputs: list of `tf.Operation` that stand for what each core returns.
        logs: list of str, names of the outputs.
        data: list of str, names of the tensors that stand for the parts of the batch.
        synchronized: list of `tf.Operation`, those of `inputs` that are statistics of layers which
            exchange in their forward pass, as BatchNormalization(synchronized=True) does.
    """

    def __init__(self, graph, layers=(), variables=(), logs=()):
        self._layers = {layer.name: type(layer).__name__ for layer in layers}
        self.inputs = [op for op in graph.get_operations() if op.type == "TPUReplicatedInput"]
        self.outputs = [op for op in graph.get_operations() if op.type == "TPUReplicatedOutput"]
        self.logs = list(logs)
        self._captured = {inner.name: outer for outer, inner in graph.captures}
        self.data = [t.name for t in graph.inputs if t.name not in self._captured]
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
                "There is no program for a TPU in the graph. Trace `strategy.run` of a TPUStrategy."
            )

    def _add(self, place):
        self.places.append(place)
        for graph in functions_of(place.op):
            for op in living(graph):
                self._add(Place(op, (*place.enclosing, place.op)))

    @property
    def operations(self):
        """List of the `tf.Operation` outside of functions, in order."""
        return [place.op for place in self.places if not place.enclosing]

    def variable_of(self, op):
        """The Keras variable that one of `inputs` stands for; None if it is not known."""
        return self._variables.get(id(self._captured.get(op.inputs[0].name)))

    def constant(self, tensor):
        """Value of a tensor outside of the program, or None if it is not known."""
        if tensor.name in self._captured:
            return self._captured[tensor.name].numpy()
        return tf.get_static_value(tensor)

    def layer_of(self, op):
        """Name and class of the layer that an operation belongs to, for a message; or None."""
        for part in reversed(op.name.split("/")):
            # TensorFlow numbers what is called twice.
            for name in (part, re.sub(r"_\d+$", "", part)):
                if name in self._layers:
                    return f"layer {name!r} ({self._layers[name]})"
        return None

    def user_of(self, op):
        """The layer that is the first to use what an operation makes, for a message; or None."""
        waiting = [op]
        for op in waiting:
            for user in [user for t in op.outputs for user in t.consumers()]:
                layer = self.layer_of(user)
                if layer is not None:
                    return layer
                if user not in waiting:
                    waiting.append(user)
        return None

    def describe(self, op):
        """Names an operation, its type and its layer, for a message."""
        return f"operation {op.name!r} ({op.type}) of {self.layer_of(op) or 'no layer'}"


def functions_of(op):
    """The graphs of the functions that an operation calls: branches, bodies and conditions."""
    names = []
    for attribute in op.op_def.attr:
        if attribute.type == "func":
            names.append(op.get_attr(attribute.name).name)
        elif attribute.type == "list(func)":
            names += [function.name for function in op.get_attr(attribute.name)]
    return [_function(op, name) for name in names if name]


def function_of(op, attribute):
    """The graph of the function that an attribute of an operation names."""
    return _function(op, op.get_attr(attribute).name)


def _function(op, name):
    graph = op.graph
    # Where a function is registered depends on who traced it.
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            if not hasattr(function, "graph"):
                # Such as keras.losses.CTC has.
                raise errors.UnsupportedModelError(
                    "Functions of TensorFlow's old kind (Defun) cannot be looked into. Received: "
                    f"{name!r} in operation {op.name!r} ({op.type})."
                )
            return function.graph
        graph = getattr(graph, "outer_graph", None)
    raise LookupError(f"Function {name!r} is not in the graph.")


def living(graph):
    """What results or effects of a graph depend on, in order; TensorFlow drops the rest."""
    wanted = [t.op for t in graph.outputs] + list(graph.control_outputs)
    living = set()
    while wanted:
        op = wanted.pop()
        if op not in living:
            living.add(op)
            wanted += [t.op for t in op.inputs] + list(op.control_inputs)
    return [op for op in graph.get_operations() if op in living]


def trace(model, share):
    """Traces one update of a model, as each core of its strategy does it.

    Args:
        model: compiled model, made in the scope of a `TPUStrategy`.
        share: structure of `tf.TensorSpec`: what a core is given of a batch.

    Returns:
        A `Program`.
    """
    strategy = model.distribute_strategy
    model.check_train_step()
    with strategy.scope():
        _keras.building.build_for(model, _keras.padding.data_of(share))
        # No variable can be made while a TPU's program is traced.
        model.optimizer.build(model.trainable_variables)

    train_step = model._checked_train_step()

    @tf.function(autograph=False)
    def update(*data):
        # Values that are no one replica's are given to each.
        return strategy.run(train_step, args=(keras.tree.pack_sequence_as(share, data),))

    specs = keras.tree.flatten(share)
    with strategy.scope():
        concrete = update.get_concrete_function(*specs)
    logs = concrete.structured_outputs
    return Program(
        concrete.graph,
        layers=_keras.layers.all_layers(model),
        variables=_variables(model),
        # As TensorFlow flattens a dictionary.
        logs=sorted(logs) if isinstance(logs, dict) else (),
    )


def _variables(model):
    """All variables of a model that an update may use."""
    states = [s for s in (model.loss_scale_state, model.noise_scale_state) if s is not None]
    own = [v for s in states for v in s.variables()]
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables, *own]
