"""Operations copied into another graph, in which variables are values."""

from typing import Any

import tensorflow as tf

from tfbig import errors
from tfbig.tpu_check import program as _program

__all__ = ("Variable", "assigned_in", "converted", "copied", "value_of")

_ASSIGNMENTS: dict[str, Any] = {
    "AssignVariableOp": lambda _, value: value,
    "AssignAddVariableOp": tf.add,
    "AssignSubVariableOp": tf.subtract,
}
_SCATTERS = {
    "ResourceScatterAdd": tf.tensor_scatter_nd_add,
    "ResourceScatterSub": tf.tensor_scatter_nd_sub,
    "ResourceScatterUpdate": tf.tensor_scatter_nd_update,
}
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_CONDITIONALS = ("If", "StatelessIf", "Case", "StatelessCase")
_LOOPS = ("While", "StatelessWhile")


class Variable:
    """What stands for the handle of a variable while operations are copied."""

    def __init__(self, value):
        self.value = value


def value_of(tensor, known):
    """What stands for a tensor; `known` has it by name, or it is a constant outside."""
    if tensor.name not in known:
        op = tensor.op
        outputs = converted(op, [value_of(t, known) for t in op.inputs])
        known.update(zip((t.name for t in op.outputs), outputs, strict=True))
    return known[tensor.name]


def assigned_in(operations, handles):
    """Names of those handles whose variables operations assign, in functions too."""
    aliases = {t.name: {t.name} for t in handles}
    found = set()
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


def _arguments(op):
    """What the functions of an operation are called with."""
    return op.inputs[1:] if op.type in _CONDITIONALS else op.inputs


def converted(op, inputs):
    """Outputs of the copy of an operation, in which variables are values."""
    if op.type in _CALLS:
        return _called(_program.function_of(op, "f"), inputs)
    if op.type in _CONDITIONALS:
        return _conditional(op, inputs)
    if op.type in _LOOPS:
        return _loop(op, inputs)
    if op.type == "TPUReplicateMetadata":
        return []  # It begins the program, and computes nothing.
    variable = next((v for v in inputs if isinstance(v, Variable)), None)
    return copied(op, inputs) if variable is None else _on_variable(op, variable, inputs)


def _on_variable(op, variable, inputs):
    """What an operation on a variable does to the value that stands for it."""
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
        "A variable can be read, assigned, gathered from and scattered to where a program is "
        f"lowered. Received: operation {op.name!r} ({op.type}). Have build() return a model "
        "whose layers use variables so, or only trace it."
    )


def _called(graph, inputs):
    """Outputs of a function of TensorFlow, whose operations are copied into the current graph."""
    known = {t.name: value for t, value in zip(graph.inputs, inputs, strict=True)}
    for op in _program.living(graph):
        if op.type == "Placeholder" and op.outputs[0].name in known:
            continue
        outputs = converted(op, [value_of(t, known) for t in op.inputs])
        known.update(zip((t.name for t in op.outputs), outputs, strict=True))
    return [value_of(t, known) for t in graph.outputs]


def _function(graph, inputs, assigned):
    """A concrete function of values. Returns outputs that are no handles, then new values.

    Args:
        graph: FuncGraph.
        inputs: list of tensors and `Variable`.
        assigned: list of ints, indices of inputs whose variables are assigned.
    """

    def call(*values):
        inner = [
            Variable(value) if isinstance(outer, Variable) else value
            for outer, value in zip(inputs, values, strict=True)
        ]
        outputs = [v for v in _called(graph, inner) if not isinstance(v, Variable)]
        # An output that is an input as it is would be none of the function's own.
        return [tf.identity(v) for v in outputs + [inner[i].value for i in assigned]]

    specs = [tf.TensorSpec(value.shape, value.dtype) for value in map(_tensor, inputs)]
    return tf.function(call, autograph=False).get_concrete_function(*specs)


def _tensor(value):
    return value.value if isinstance(value, Variable) else value


def _assigned_indices(graphs, inputs):
    """Which of the inputs of functions are variables that one of them assigns."""
    found = set()
    for graph in graphs:
        names = assigned_in(_program.living(graph), graph.inputs)
        found |= {i for i, t in enumerate(graph.inputs) if t.name in names}
    return [i for i in sorted(found) if isinstance(inputs[i], Variable)]


def _conditional(op, inputs):
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
    results = results if isinstance(results, list) else []
    for i, value in zip(assigned, results[len(results) - len(assigned) :], strict=True):
        inputs[i].value = value
    return results[: len(results) - len(assigned)]


def _loop(op, inputs):
    body, condition = (_program.function_of(op, name) for name in ("body", "cond"))
    assigned = _assigned_indices([body], inputs)
    step = _function(body, inputs, assigned)
    # A loop carries all of its inputs; of handles, the values that they have by then.
    is_variable = [isinstance(v, Variable) for v in inputs]

    def carried(*values):
        results = list(step(*values))
        own = iter(results[: len(results) - len(assigned)])
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
    for i in assigned:
        inputs[i].value = results[i]
    return [v if isinstance(v, Variable) else r for v, r in zip(inputs, results, strict=True)]


def copied(op, inputs):
    # Those with an underscore say where an operation was to run.
    attributes = {k: v for k, v in op.node_def.attr.items() if not k.startswith("_")}
    return (
        tf.compat.v1.get_default_graph()
        .create_op(op.type, inputs, [t.dtype for t in op.outputs], name=op.name, attrs=attributes)
        .outputs
    )
