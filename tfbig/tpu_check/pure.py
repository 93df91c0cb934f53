"""The program of a core as a function without variables: they are arguments, and results.

TensorFlow lowers a program for a TPU that is not there only if it is one. So its operations are
copied, one after the other: what reads a variable gets the value that it has by then, what
assigns one changes that value, and loops and conditionals hand such values in and out.
"""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbig import errors
from tfbig.tpu_check import conversion
from tfbig.tpu_check.differences import COLLECTIVES

__all__ = ("Argument", "PureFunction", "Result")


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
        assigned = conversion.assigned_in(self._operations, self._inputs)
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
                op, inputs = steps.send(conversion.copied(op, inputs))
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
            known[tensor.name] = conversion.Variable(value) if is_variable else value
        for op in self._operations:
            inputs = [conversion.value_of(t, known) for t in op.inputs]
            outputs = (
                (yield op, inputs) if op.type in COLLECTIVES else conversion.converted(op, inputs)
            )
            known.update(zip((t.name for t in op.outputs), outputs, strict=True))
        variables = [known[self._inputs[i].name].value for i in self._assigned]
        return [conversion.value_of(t, known) for t in self._logged] + variables


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
