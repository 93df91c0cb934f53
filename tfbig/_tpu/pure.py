"""The program of a core as a function without variables: they are arguments, and results.

TensorFlow lowers a program for a TPU that is not there only if it is one. So its operations are
copied, one after the other: what reads a variable gets the value that it has by then, what
assigns one changes that value, and loops and conditionals hand such values in and out.
"""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbig import errors
from tfbig._tpu import program as _program
from tfbig._tpu.differences import COLLECTIVES

__all__ = ("Argument", "PureFunction", "Result")

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


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a core's program.

    Attributes:
        name: str, path of the variable, or what TensorFlow calls the input.
        kind: "data"; "variable"; or "core", what is the same in each update and differs between
            the cores, such as their numbers.
        spec: `tf.TensorSpec`, of one core.
        values: list of arrays, one for each core: the initial values of a variable. None for
            data, and for a variable that is none of the model's.
        index: int, of data: which part of the batch. None for the rest.
    """

    name: str
    kind: str
    spec: tf.TensorSpec
    values: list | None = None
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A result of a core's program.

    Attributes:
        name: str, path of the variable, or name of the value in the logs.
        argument: int, index of the argument that it replaces in the next update; None for logs.
    """

    name: str
    argument: int | None


class PureFunction:
    """The program of a core, from values to values.

    Args:
        program: `Program`.

    Attributes:
        arguments: list of `Argument`.
        results: list of `Result`: what is logged, then the variables that are assigned.
    """

    def __init__(self, program):
        self.arguments = [_argument(program, op) for op in program.inputs]
        self._program = program
        self._inputs = [op.outputs[0] for op in program.inputs]
        self._operations = program.operations
        self._logged = [op.inputs[0] for op in program.outputs]
        assigned = _assigned(self._operations, self._inputs)
        self._assigned = [i for i, tensor in enumerate(self._inputs) if tensor.name in assigned]
        self.results = [Result(name, None) for name in program.logs]
        self.results += [Result(self.arguments[i].name, i) for i in self._assigned]

    def __call__(self, *values):
        """Adds the program's operations to the current graph.

        Args:
            *values: tensors, one for each argument.

        Returns:
            List of tensors, one for each result.
        """
        steps = self.steps(*values)
        try:
            op, inputs = next(steps)
            while True:
                op, inputs = steps.send(_copy(op, inputs))
        except StopIteration as done:
            return done.value

    def together(self, copies):
        """The programs of all cores in one graph, where exchanges are sums of what each gives.

        Args:
            copies: list of lists of tensors: the arguments of each core.

        Returns:
            List of lists of tensors: the results of each core.

        Raises:
            UnsupportedModelError: If the cores exchange something else than sums, or inside of
                a loop or a conditional.
        """
        for place in self._program.places:
            if place.op.type in COLLECTIVES and place.enclosing:
                raise errors.UnsupportedModelError(
                    "Only what is exchanged outside of loops and conditionals can be imitated. "
                    f"Received: {self._program.describe(place.op)}."
                )
        cores = [self.steps(*values) for values in copies]
        sent: list[Any] = [None] * len(cores)
        while True:
            waiting, results = [], []
            for core, value in zip(cores, sent, strict=True):
                try:
                    waiting.append(core.send(value))
                except StopIteration as done:
                    results.append(done.value)
            if results:
                return results
            op = waiting[0][0]
            if op.type != "CrossReplicaSum":
                raise errors.UnsupportedModelError(
                    f"Only sums can be imitated. Received: {self._program.describe(op)}."
                )
            total = tf.add_n([inputs[0] for _, inputs in waiting])
            sent = [[total]] * len(cores)

    def steps(self, *values):
        """A generator that yields each exchange and its inputs, is sent its outputs, and returns
        the results: the program between its exchanges."""
        known = {}
        for tensor, value in zip(self._inputs, values, strict=True):
            is_variable = tensor.dtype == tf.resource
            known[tensor.name] = _Variable(value) if is_variable else value
        for op in self._operations:
            inputs = [_value(t, known) for t in op.inputs]
            outputs = (yield op, inputs) if op.type in COLLECTIVES else _converted(op, inputs)
            known.update(zip((t.name for t in op.outputs), outputs, strict=True))
        variables = [known[self._inputs[i].name].value for i in self._assigned]
        return [_value(t, known) for t in self._logged] + variables


class _Variable:
    """What stands for the handle of a variable while operations are copied."""

    def __init__(self, value):
        self.value = value


def _argument(program, op):
    """The argument that an input of a program becomes."""
    tensor = op.outputs[0]
    if tensor.dtype == tf.resource:
        return _argument_of_variable(program, op)
    source = op.inputs[0]
    spec = tf.TensorSpec(tensor.shape, tensor.dtype)
    if source.name in program.data:
        return Argument(source.op.name, "data", spec, index=program.data.index(source.name))
    values = [program.constant(t) for t in op.inputs]
    if any(v is None for v in values):
        raise errors.UnsupportedModelError(
            "What cores are given besides data and variables must be known before the program "
            f"runs. Received: {program.describe(source.op)}."
        )
    return Argument(op.name, "core", spec, values)


def _argument_of_variable(program, op):
    variable = program.variable_of(op)
    if variable is not None:
        copies = tf.distribute.get_strategy().experimental_local_results(variable.value)
        spec = tf.TensorSpec(variable.shape, variable.dtype)
        return Argument(variable.path, "variable", spec, [c.numpy() for c in copies])
    (data,) = op.outputs[0]._handle_data.shape_and_type
    spec = tf.TensorSpec(data.shape, data.dtype)
    return Argument(op.name.removesuffix("/handle"), "variable", spec)


def _value(tensor, known):
    if tensor.name not in known:
        # A constant that stands outside of the program.
        op = tensor.op
        outputs = _converted(op, [_value(t, known) for t in op.inputs])
        known.update(zip((t.name for t in op.outputs), outputs, strict=True))
    return known[tensor.name]


def _assigned(operations, handles):
    """Names of those handles whose variables operations assign, in functions too."""
    aliases = {t.name: {t.name} for t in handles}
    found = set()
    for op in operations:
        if op.type == "Identity" and op.inputs[0].name in aliases:
            aliases[op.outputs[0].name] = aliases[op.inputs[0].name]
        elif op.type in _ASSIGNMENTS or op.type in _SCATTERS:
            found |= aliases.get(op.inputs[0].name, set())
        for graph in _program.functions_of(op):
            inner = _assigned(_program.living(graph), graph.inputs)
            for outer, name in zip(_arguments(op), (t.name for t in graph.inputs), strict=True):
                if name in inner:
                    found |= aliases.get(outer.name, set())
    return found


def _arguments(op):
    """What the functions of an operation are called with."""
    return op.inputs[1:] if op.type in _CONDITIONALS else op.inputs


def _converted(op, inputs):
    """Outputs of the copy of an operation, in which variables are values."""
    if op.type in _CALLS:
        return _called(_program.function_of(op, "f"), inputs)
    if op.type in _CONDITIONALS:
        return _conditional(op, inputs)
    if op.type in _LOOPS:
        return _loop(op, inputs)
    if op.type == "TPUReplicateMetadata":
        return []  # It begins the program, and computes nothing.
    variable = next((v for v in inputs if isinstance(v, _Variable)), None)
    return _copy(op, inputs) if variable is None else _on_variable(op, variable, inputs)


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
        outputs = _converted(op, [_value(t, known) for t in op.inputs])
        known.update(zip((t.name for t in op.outputs), outputs, strict=True))
    return [_value(t, known) for t in graph.outputs]


def _function(graph, inputs, assigned):
    """A concrete function of values. Returns outputs that are no handles, then new values.

    Args:
        graph: FuncGraph.
        inputs: list of tensors and `_Variable`.
        assigned: list of ints, indices of inputs whose variables are assigned.
    """

    def call(*values):
        inner = [
            _Variable(value) if isinstance(outer, _Variable) else value
            for outer, value in zip(inputs, values, strict=True)
        ]
        outputs = [v for v in _called(graph, inner) if not isinstance(v, _Variable)]
        # An output that is an input as it is would be none of the function's own.
        return [tf.identity(v) for v in outputs + [inner[i].value for i in assigned]]

    specs = [tf.TensorSpec(value.shape, value.dtype) for value in map(_tensor, inputs)]
    return tf.function(call, autograph=False).get_concrete_function(*specs)


def _tensor(value):
    return value.value if isinstance(value, _Variable) else value


def _assigned_indices(graphs, inputs):
    """Which of the inputs of functions are variables that one of them assigns."""
    found = set()
    for graph in graphs:
        names = _assigned(_program.living(graph), graph.inputs)
        found |= {i for i, t in enumerate(graph.inputs) if t.name in names}
    return [i for i in sorted(found) if isinstance(inputs[i], _Variable)]


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
    is_variable = [isinstance(v, _Variable) for v in inputs]

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
    return [v if isinstance(v, _Variable) else r for v, r in zip(inputs, results, strict=True)]


def _copy(op, inputs):
    # Those with an underscore say where an operation was to run.
    attributes = {k: v for k, v in op.node_def.attr.items() if not k.startswith("_")}
    return (
        tf.compat.v1.get_default_graph()
        .create_op(op.type, inputs, [t.dtype for t in op.outputs], name=op.name, attrs=attributes)
        .outputs
    )
