"""A core's program as a function without variables: they are arguments and results instead.

TensorFlow can only lower a program for an absent TPU if the program is such a function. So this
module copies its operations one by one: reading a variable gives the value that it has at that
point, assigning to it changes that value, and loops and conditionals carry such values in and out.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import TypeAlias

import tensorflow as tf

from tfbig import errors
from tfbig.tpu_check import conversion
from tfbig.tpu_check._types import Array
from tfbig.tpu_check.differences import COLLECTIVES
from tfbig.tpu_check.program import Program

__all__ = ("Argument", "PureFunction", "Result")

# A program between its exchanges: it yields each exchange and its inputs, is sent the exchange's
# outputs, and returns the program's results.
Steps: TypeAlias = Generator[
    tuple[tf.Operation, list[conversion.Value]], list[conversion.Value] | None, list[tf.Tensor]
]


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a core's program.

    Attributes:
        name: Path of the variable, or TensorFlow's name of the input.
        kind: "data"; "variable"; or "core", a value that is the same in every update and differs
            between the cores, such as a core's number.
        spec: Shape and dtype on one core.
        values: One array per core: the initial values of a variable. None for data, and for a
            variable that does not belong to the model.
        index: For data, which part of the batch it is. None for the rest.
    """

    name: str
    kind: str
    spec: tf.TensorSpec
    values: list[Array] | None = None
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A result of a core's program.

    Attributes:
        name: Path of the variable, or name of the value in the logs.
        argument: Index of the argument that it replaces in the next update; None for logs.
    """

    name: str
    argument: int | None


class PureFunction:
    """A core's program, from values to values.

    Args:
        program: The program.

    Attributes:
        arguments: The arguments, in order.
        results: The logged values, then the variables that are assigned.
    """

    def __init__(self, program: Program) -> None:
        self.arguments = [_argument(program, op) for op in program.inputs]
        self._program = program
        self._inputs = [op.outputs[0] for op in program.inputs]
        self._operations = program.operations
        self._logged = [op.inputs[0] for op in program.outputs]
        assigned = conversion.assigned_in(self._operations, self._inputs)
        self._assigned = [i for i, tensor in enumerate(self._inputs) if tensor.name in assigned]
        self.results = [Result(name, None) for name in program.logs]
        self.results += [Result(self.arguments[i].name, i) for i in self._assigned]

    def __call__(self, *values: tf.Tensor) -> list[tf.Tensor]:
        """Adds the program's operations to the current graph.

        Args:
            *values: One tensor per argument.

        Returns:
            One tensor per result.
        """
        steps = self.steps(*values)
        try:
            op, inputs = next(steps)
            while True:
                op, inputs = steps.send(conversion.copied(op, inputs))
        except StopIteration as done:
            results: list[tf.Tensor] = done.value
            return results

    def together(self, copies: Sequence[Sequence[tf.Tensor]]) -> list[list[tf.Tensor]]:
        """Adds the programs of all cores to one graph, in which an exchange is a sum.

        Args:
            copies: The arguments of each core.

        Returns:
            The results of each core.

        Raises:
            UnsupportedModelError: If the cores exchange anything but sums, or exchange inside a
                loop or a conditional.
        """
        for place in self._program.places:
            if place.op.type in COLLECTIVES and place.enclosing:
                raise errors.UnsupportedModelError(
                    "Only exchanges outside loops and conditionals can be simulated. "
                    f"Received: {self._program.describe(place.op)}."
                )
        cores = [self.steps(*values) for values in copies]
        sent: list[list[conversion.Value] | None] = [None] * len(cores)
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
            # With one core, TensorFlow also has it broadcast to itself.
            if op.type != "CrossReplicaSum" and len(cores) > 1:
                raise errors.UnsupportedModelError(
                    f"Only sums can be simulated. Received: {self._program.describe(op)}."
                )
            total = tf.add_n([inputs[0] for _, inputs in waiting])
            sent = [[total]] * len(cores)

    def steps(self, *values: tf.Tensor) -> Steps:
        """Runs the program up to each exchange, which it leaves to the caller.

        Args:
            *values: One tensor per argument.

        Returns:
            A generator that yields each exchange and its inputs, is sent the exchange's outputs,
            and returns the results.
        """
        known: dict[str, conversion.Value] = {}
        for tensor, value in zip(self._inputs, values, strict=True):
            is_variable = tensor.dtype == tf.resource
            known[tensor.name] = conversion.Variable(value) if is_variable else value
        for op in self._operations:
            inputs = [conversion.value_of(t, known) for t in op.inputs]
            outputs = (
                (yield op, inputs) if op.type in COLLECTIVES else conversion.converted(op, inputs)
            )
            known.update(zip((t.name for t in op.outputs), outputs or (), strict=True))
        variables = [known[self._inputs[i].name].value for i in self._assigned]
        return [conversion.value_of(t, known) for t in self._logged] + variables


def _argument(program: Program, op: tf.Operation) -> Argument:
    """Returns the argument that an input of a program becomes."""
    tensor = op.outputs[0]
    if tensor.dtype == tf.resource:
        return _variable_argument(program, op)
    source = op.inputs[0]
    spec = tf.TensorSpec(tensor.shape, tensor.dtype)
    if source.name in program.data:
        return Argument(source.op.name, "data", spec, index=program.data.index(source.name))
    constants = [program.constant(t) for t in op.inputs]
    values = [v for v in constants if v is not None]
    if len(values) < len(constants):
        raise errors.UnsupportedModelError(
            "The inputs of a core, other than data and variables, must be known before the "
            f"program runs. Received: {program.describe(source.op)}."
        )
    return Argument(op.name, "core", spec, values)


def _variable_argument(program: Program, op: tf.Operation) -> Argument:
    variable = program.variable_of(op)
    if variable is not None:
        copies = tf.distribute.get_strategy().experimental_local_results(variable.value)
        spec = tf.TensorSpec(variable.shape, variable.dtype)
        return Argument(variable.path, "variable", spec, [c.numpy() for c in copies])
    (data,) = op.outputs[0]._handle_data.shape_and_type
    spec = tf.TensorSpec(data.shape, data.dtype)
    return Argument(op.name.removesuffix("/handle"), "variable", spec)
