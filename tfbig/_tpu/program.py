"""The program of a core: the graph that `TPUStrategy.run` traced, with all that is inside of it."""

import dataclasses
import re

import keras
import tensorflow as tf

from tfbig import _keras, errors

__all__ = ("Place", "Program", "trace")

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

    Attributes:
        places: list of `Place`: all operations that take part, those of loops, conditionals and
            functions included.
        inputs: list of `tf.Operation` that stand for the values which each core has for itself:
            data and variables.
    """

    def __init__(self, graph, layers=()):
        self._layers = {layer.name: type(layer).__name__ for layer in layers}
        self.inputs = [op for op in graph.get_operations() if op.type == "TPUReplicatedInput"]
        self.places: list[Place] = []
        for op in _living(graph):
            if _MARK in op.node_def.attr:
                self._add(Place(op))
        if not self.places:
            raise errors.UnsupportedStrategyError(
                "There is no program for a TPU in the graph. Trace `strategy.run` of a TPUStrategy."
            )

    def _add(self, place):
        self.places.append(place)
        for graph in functions_of(place.op):
            for op in _living(graph):
                self._add(Place(op, (*place.enclosing, place.op)))

    def layer_of(self, op):
        """Name and class of the layer that an operation belongs to, for a message; or None."""
        for part in reversed(op.name.split("/")):
            # TensorFlow numbers what is called twice.
            for name in (part, re.sub(r"_\d+$", "", part)):
                if name in self._layers:
                    return f"layer {name!r} ({self._layers[name]})"
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
    return [_function(op.graph, name) for name in names if name]


def function_of(op, attribute):
    """The graph of the function that an attribute of an operation names."""
    return _function(op.graph, op.get_attr(attribute).name)


def _function(graph, name):
    # Where a function is registered depends on who traced it.
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            return function.graph
        graph = getattr(graph, "outer_graph", None)
    raise LookupError(f"Function {name!r} is not in the graph.")


def _living(graph):
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
    with strategy.scope():
        _keras.build_for(model, _keras.data_of(share))
        # No variable can be made while a TPU's program is traced.
        model.optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def update(*data):
        # Values that are no one replica's are given to each.
        return strategy.run(model.train_step, args=(keras.tree.pack_sequence_as(share, data),))

    specs = keras.tree.flatten(share)
    with strategy.scope():
        return Program(update.get_concrete_function(*specs).graph, _keras.all_layers(model))
