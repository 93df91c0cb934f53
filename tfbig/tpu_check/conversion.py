"""Copies operations into another graph, in which variables are values."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import tensorflow as tf

from tfbig import errors
from tfbig.tpu_check import program as _program
from tfbig.tpu_check._types import FuncGraph

__all__ = ("Value", "Variable", "assigned_in", "converted", "copied", "value_of")


class Variable:
    """Stands for the handle of a variable while operations are copied.

    Attributes:
        value: The value that the variable has at this point of the program.
    """

    def __init__(self, value: tf.Tensor) -> None:
        self.value = value


# What stands for a tensor of the program in the graph of copies.
Value: TypeAlias = tf.Tensor | Variable

_ASSIGNMENTS: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "AssignVariableOp": lambda _, value: value,
    "AssignAddVariableOp": tf.add,
    "AssignSubVariableOp": tf.subtract,
}
_SCATTERS: dict[str, Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "ResourceScatterAdd": tf.tensor_scatter_nd_add,
    "ResourceScatterSub": tf.tensor_scatter_nd_sub,
    "ResourceScatterUpdate": tf.tensor_scatter_nd_update,
}
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_CONDITIONALS = ("If", "StatelessIf", "Case", "StatelessCase")
_LOOPS = ("While", "StatelessWhile")


def value_of(tensor: tf.Tensor, known: dict[str, Value]) -> Value:
    """Returns what stands for a tensor.

    Args:
        tensor: A tensor of the program, or a constant outside it.
        known: What stands for tensors, by their names; extended by what is copied.
    """
    if tensor.name not in known:
        op = tensor.op
        outputs = converted(op, [value_of(t, known) for t in op.inputs])
        known.update(zip((t.name for t in op.outputs), outputs, strict=True))
    return known[tensor.name]


def assigned_in(operations: Iterable[tf.Operation], handles: Sequence[tf.Tensor]) -> set[str]:
    """Returns the names of the handles whose variables operations assign, in functions too."""
    aliases: dict[str, set[str]] = {t.name: {t.name} for t in handles}
    found: set[str] = set()
    for op in operations:
        if op.type == "Identity" and op.inputs[0].name in aliases:
            aliases[op.outputs[0].name] = aliases[op.inputs[0].name]
        elif op.type in _ASSIGNMENTS or op.type in _SCATTERS:
            found |= aliases.get(op.inputs[0].name, set())
        for graph in _program.functions_of(op):
            inner = assigned_in(_program.living(graph), graph.inputs)
            for outer, name in zip(_arguments(op), (t.name for t in graph.inputs), strict=True):
                if name in inner:
                    found |= aliases.get(outer.name, set())
    return found


def _arguments(op: tf.Operation) -> Sequence[tf.Tensor]:
    """Returns the arguments of the functions that an operation calls."""
    arguments: Sequence[tf.Tensor] = op.inputs[1:] if op.type in _CONDITIONALS else op.inputs
    return arguments


def converted(op: tf.Operation, inputs: list[Value]) -> list[Value]:
    """Returns the outputs of an operation's copy, in which variables are values."""
    if op.type in _CALLS:
        return _call(_program.function_of(op, "f"), inputs)
    if op.type in _CONDITIONALS:
        return _conditional(op, inputs)
    if op.type in _LOOPS:
        return _loop(op, inputs)
    if op.type == "TPUReplicateMetadata":
        return []  # It marks the beginning of the program, and computes nothing.
    variable = next((v for v in inputs if isinstance(v, Variable)), None)
    return copied(op, inputs) if variable is None else _on_variable(op, variable, inputs)


def _on_variable(op: tf.Operation, variable: Variable, inputs: list[Value]) -> list[Value]:
    """Applies an operation on a variable to the value that stands for the variable."""
    if op.type == "Identity":
        return [variable]
    if op.type == "ReadVariableOp":
        return [variable.value]
    if op.type == "VariableShape":
        return [tf.shape(variable.value, op.get_attr("out_type"))]
    if op.type == "ResourceGather":
        return [tf.gather(variable.value, inputs[1], batch_dims=op.get_attr("batch_dims"))]
    if op.type in _ASSIGNMENTS:
        variable.value = _ASSIGNMENTS[op.type](variable.value, inputs[1])
        return []
    if op.type in _SCATTERS:
        indices, updates = tf.expand_dims(inputs[1], -1), inputs[2]
        variable.value = _SCATTERS[op.type](variable.value, indices, updates)
        return []
    raise errors.UnsupportedModelError(
        "A lowered program may only read, assign, gather from and scatter to variables. "
        f"Received: operation {op.name!r} ({op.type}). Have build() return a model whose layers "
        "use variables in these ways, or only trace it."
    )


def _call(graph: FuncGraph, inputs: Sequence[Value]) -> list[Value]:
    """Copies the operations of a function into the current graph; returns its outputs."""
    known = {t.name: value for t, value in zip(graph.inputs, inputs, strict=True)}
    for op in _program.living(graph):
        if op.type == "Placeholder" and op.outputs[0].name in known:
            continue
        outputs = converted(op, [value_of(t, known) for t in op.inputs])
        known.update(zip((t.name for t in op.outputs), outputs, strict=True))
    return [value_of(t, known) for t in graph.outputs]


def _function(
    graph: FuncGraph, inputs: Sequence[Value], assigned: Sequence[int]
) -> tf.types.experimental.ConcreteFunction:
    """Makes a concrete function of values; it returns outputs other than handles, then new values.

    Args:
        graph: Graph of the original function.
        inputs: What stands for its arguments.
        assigned: Indices of the inputs whose variables are assigned.
    """

    def call(*values: tf.Tensor) -> list[tf.Tensor]:
        inner = [
            Variable(value) if isinstance(outer, Variable) else value
            for outer, value in zip(inputs, values, strict=True)
        ]
        outputs = [v for v in _call(graph, inner) if not isinstance(v, Variable)]
        # TensorFlow would not count an unchanged input among the function's outputs.
        return [tf.identity(v) for v in outputs + [inner[i].value for i in assigned]]

    specs = [tf.TensorSpec(value.shape, value.dtype) for value in map(_tensor, inputs)]
    return tf.function(call, autograph=False).get_concrete_function(*specs)


def _tensor(value: Value) -> tf.Tensor:
    return value.value if isinstance(value, Variable) else value


def _assigned_indices(graphs: Iterable[FuncGraph], inputs: Sequence[Value]) -> list[int]:
    """Returns the indices of the inputs that are variables which one of the functions assigns."""
    found: set[int] = set()
    for graph in graphs:
        names = assigned_in(_program.living(graph), graph.inputs)
        found |= {i for i, t in enumerate(graph.inputs) if t.name in names}
    return [i for i in sorted(found) if isinstance(inputs[i], Variable)]


def _update(inputs: Sequence[Value], assigned: Sequence[int], values: Iterable[tf.Tensor]) -> None:
    """Gives variables among the inputs new values."""
    for i, value in zip(assigned, values, strict=True):
        variable = inputs[i]
        assert isinstance(variable, Variable)  # `_assigned_indices` returns no others.
        variable.value = value


def _conditional(op: tf.Operation, inputs: list[Value]) -> list[Value]:
    graphs, (index, *inputs) = _program.functions_of(op), inputs
    assigned = _assigned_indices(graphs, inputs)
    branches = [_function(graph, inputs, assigned) for graph in graphs]
    types = [t.dtype for t in branches[0].outputs]
    shapes = [t.shape for t in branches[0].outputs]
    arguments = {"input": list(map(_tensor, inputs)), "Tout": types, "output_shapes": shapes}
    if op.type.endswith("Case"):
        results = tf.raw_ops.Case(branch_index=index, branches=branches, **arguments)
    else:
        then, otherwise = branches
        results = tf.raw_ops.If(cond=index, then_branch=then, else_branch=otherwise, **arguments)
    # Without results TensorFlow returns an operation.
    outputs: list[tf.Tensor] = results if isinstance(results, list) else []
    _update(inputs, assigned, outputs[len(outputs) - len(assigned) :])
    return outputs[: len(outputs) - len(assigned)]


def _loop(op: tf.Operation, inputs: list[Value]) -> list[Value]:
    body, condition = (_program.function_of(op, name) for name in ("body", "cond"))
    assigned = _assigned_indices([body], inputs)
    step = _function(body, inputs, assigned)
    # A loop carries all of its inputs; in place of handles, the current values of variables.
    is_variable = [isinstance(v, Variable) for v in inputs]

    def carried(*values: tf.Tensor) -> list[tf.Tensor]:
        results = list(step(*values))
        own: Iterator[tf.Tensor] = iter(results[: len(results) - len(assigned)])
        new = dict(zip(assigned, results[len(results) - len(assigned) :], strict=True))
        return [
            new.get(i, value) if is_variable[i] else next(own) for i, value in enumerate(values)
        ]

    tensors = list(map(_tensor, inputs))
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in tensors]
    results = tf.raw_ops.While(
        input=tensors,
        cond=_function(condition, inputs, []),
        body=tf.function(carried, autograph=False).get_concrete_function(*specs),
        output_shapes=[t.shape for t in tensors],
        parallel_iterations=op.get_attr("parallel_iterations"),
    )
    _update(inputs, assigned, [results[i] for i in assigned])
    return [v if isinstance(v, Variable) else r for v, r in zip(inputs, results, strict=True)]


def copied(op: tf.Operation, inputs: Sequence[Value]) -> list[Value]:
    """Copies an operation without variables into the current graph; returns its outputs."""
    # Attributes with a leading underscore say where an operation was to run.
    attributes = {k: v for k, v in op.node_def.attr.items() if not k.startswith("_")}
    copy = tf.compat.v1.get_default_graph().create_op(
        op.type, inputs, [t.dtype for t in op.outputs], name=op.name, attrs=attributes
    )
    outputs: list[Value] = copy.outputs
    return outputs
