"""Which values of a program differ between the cores, and which were exchanged.

Cores differ in their data, in their number, and in the variables that each keeps for itself (those
of metrics). So does everything computed from these, until it is exchanged: a sum over the cores is
the same on every core.
"""

from collections.abc import Iterable, Sequence

import tensorflow as tf

from tfbig.tpu_check import program as _program
from tfbig.tpu_check._types import FuncGraph
from tfbig.tpu_check.program import Program

__all__ = ("COLLECTIVES", "Differences")

# Operations in which cores wait for each other.
COLLECTIVES = frozenset(
    {
        "AllToAll",
        "CollectivePermute",
        "CrossReplicaSum",
        "XlaAllReduce",
        "XlaReduceScatter",
    }
)

# Marks of a tensor, as bits.
_DIFFERS, _EXCHANGED = 1, 2

# Their results depend on shapes alone, which are the same everywhere.
_OF_SHAPES = frozenset({"OnesLike", "Rank", "Shape", "ShapeN", "Size", "ZerosLike"})

# A tensor's name is unique within its graph only.
_Key = tuple[int, str]


class Differences:
    """What is known about the tensors of a program.

    Args:
        program: The program.
    """

    def __init__(self, program: Program) -> None:
        self._marks: dict[_Key, int] = {}
        self._variables: dict[_Key, tf.Operation] = {}
        for op in program.inputs:
            is_mirrored = op.get_attr("is_mirrored_variable")
            self._mark(op.outputs[0], 0 if is_mirrored else _DIFFERS)
            if is_mirrored:
                self._variables[_key(op.outputs[0])] = op
        # A loop carries marks back to operations already visited, so repeat until none is new.
        self._grew = True
        while self._grew:
            self._grew = False
            for place in program.places:
                self._visit(place.op)

    def differs(self, tensor: tf.Tensor) -> bool:
        """Returns whether the value of a tensor may differ between the cores."""
        return bool(self._marks.get(_key(tensor), 0) & _DIFFERS)

    def is_exchanged(self, tensor: tf.Tensor) -> bool:
        """Returns whether a tensor is computed from what the cores exchanged."""
        return bool(self._marks.get(_key(tensor), 0) & _EXCHANGED)

    def variable_of(self, handle: tf.Tensor) -> tf.Operation | None:
        """Returns the `TPUReplicatedInput` of the mirrored variable behind a handle, or None."""
        return self._variables.get(_key(handle))

    def _mark(self, tensor: tf.Tensor, marks: int) -> None:
        key = _key(tensor)
        before = self._marks.get(key)
        if before is None or before | marks != before:
            self._marks[key] = (before or 0) | marks
            self._grew = True

    def _mark_all(self, tensors: Iterable[tf.Tensor], marks: int) -> None:
        for tensor in tensors:
            self._mark(tensor, marks)

    def _marks_of(self, tensors: Iterable[tf.Tensor]) -> int:
        marks = 0
        for tensor in tensors:
            marks |= self._marks.get(_key(tensor), 0)
        return marks

    def _pass(self, source: tf.Tensor, target: tf.Tensor) -> None:
        """Marks a tensor of a function, or of its caller, like the one that it stands for."""
        self._mark(target, self._marks_of([source]))
        variable = self._variables.get(_key(source))
        if variable is not None and _key(target) not in self._variables:
            self._variables[_key(target)] = variable
            self._grew = True

    def _visit(self, op: tf.Operation) -> None:
        if op.type in ("While", "StatelessWhile"):
            self._visit_loop(op)
        elif op.type in ("If", "StatelessIf", "Case", "StatelessCase"):
            self._visit_conditional(op)
        elif op.type in ("PartitionedCall", "StatefulPartitionedCall"):
            self._visit_call(op, _program.function_of(op, "f"), op.inputs, 0)
        elif op.type in COLLECTIVES:
            marks = _EXCHANGED | (0 if _includes_all_cores(op) else _DIFFERS)
            self._mark_all(op.outputs, marks)
        elif op.type in _OF_SHAPES:
            self._mark_all(op.outputs, 0)
        elif op.type == "Placeholder":
            pass  # An argument of a function: the caller marks it.
        elif op.type in ("Identity", "IdentityN"):
            for source, target in zip(op.inputs, op.outputs, strict=True):
                self._pass(source, target)
        else:
            marks = self._marks_of(op.inputs)
            if "Random" in op.type and "Stateless" not in op.type:
                marks |= _DIFFERS  # Each core draws from its own generator.
            self._mark_all(op.outputs, marks)

    def _visit_call(
        self, op: tf.Operation, graph: FuncGraph, arguments: Sequence[tf.Tensor], marks: int
    ) -> None:
        """Passes arguments in and results out, and adds marks to all results."""
        for outer, inner in zip(arguments, graph.inputs, strict=True):
            self._pass(outer, inner)
        for inner, outer in zip(graph.outputs, op.outputs, strict=True):
            self._pass(inner, outer)
            self._mark(outer, marks)

    def _visit_conditional(self, op: tf.Operation) -> None:
        for graph in _program.functions_of(op):
            marks = self._marks_of(op.inputs[:1]) & _DIFFERS
            self._visit_call(op, graph, op.inputs[1:], marks)

    def _visit_loop(self, op: tf.Operation) -> None:
        body, condition = (_program.function_of(op, name) for name in ("body", "cond"))
        for graph in (body, condition):
            for outer, inner in zip(op.inputs, graph.inputs, strict=True):
                self._pass(outer, inner)
        marks = self._marks_of(condition.outputs) & _DIFFERS
        for result, inner, outer in zip(body.outputs, condition.inputs, op.outputs, strict=True):
            self._pass(result, inner)
            self._pass(inner, outer)
            self._mark(outer, marks)
        for result, inner in zip(body.outputs, body.inputs, strict=True):
            self._pass(result, inner)


def _includes_all_cores(op: tf.Operation) -> bool:
    """Returns whether a collective leaves the same value on every core."""
    if op.type == "CollectivePermute":
        return False
    # `TPUStrategy` stacks a value once for each core and sends it by AllToAll.
    groups = tf.get_static_value(op.inputs[1]) if len(op.inputs) > 1 else None
    return groups is None or len(groups) == 1


def _key(tensor: tf.Tensor) -> _Key:
    return id(tensor.graph), tensor.name
