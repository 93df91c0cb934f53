"""Which values of a program differ between the cores, and which were exchanged.

Cores differ in their data, their number and the variables that each holds for itself (those of
metrics). What is computed of them differs too, until it is exchanged: a sum over the cores is
the same on each.
"""

import tensorflow as tf

from tfbig.tpu_check import program as _program

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

_DIFFERS, _EXCHANGED = 1, 2

# Their results depend on shapes alone, which are the same everywhere.
_OF_SHAPES = frozenset({"OnesLike", "Rank", "Shape", "ShapeN", "Size", "ZerosLike"})


class Differences:
    """What is known of the tensors of a program.

    Args:
        program: `Program`.
    """

    def __init__(self, program):
        self._marks = {}
        self._variables = {}
        for op in program.inputs:
            is_mirrored = op.get_attr("is_mirrored_variable")
            self._mark(op.outputs[0], 0 if is_mirrored else _DIFFERS)
            if is_mirrored:
                self._variables[_key(op.outputs[0])] = op
        # Loops carry marks back to where they were looked at, so it is done until none is new.
        self._grew = True
        while self._grew:
            self._grew = False
            for place in program.places:
                self._visit(place.op)

    def differs(self, tensor):
        """Whether the value of a tensor may differ between the cores."""
        return bool(self._marks.get(_key(tensor), 0) & _DIFFERS)

    def is_exchanged(self, tensor):
        """Whether a tensor is made of what the cores have exchanged."""
        return bool(self._marks.get(_key(tensor), 0) & _EXCHANGED)

    def variable_of(self, handle):
        """The `TPUReplicatedInput` of the mirrored variable behind a handle, or None."""
        return self._variables.get(_key(handle))

    def _mark(self, tensor, marks):
        key = _key(tensor)
        before = self._marks.get(key)
        if before is None or before | marks != before:
            self._marks[key] = (before or 0) | marks
            self._grew = True

    def _of(self, tensors):
        marks = 0
        for tensor in tensors:
            marks |= self._marks.get(_key(tensor), 0)
        return marks

    def _pass(self, source, target):
        """Marks what a tensor of a function, or of its caller, stands for."""
        self._mark(target, self._of([source]))
        variable = self._variables.get(_key(source))
        if variable is not None and _key(target) not in self._variables:
            self._variables[_key(target)] = variable
            self._grew = True

    def _visit(self, op):
        if op.type in ("While", "StatelessWhile"):
            self._visit_loop(op)
        elif op.type in ("If", "StatelessIf", "Case", "StatelessCase"):
            self._visit_conditional(op)
        elif op.type in ("PartitionedCall", "StatefulPartitionedCall"):
            self._visit_call(op, _program.function_of(op, "f"), op.inputs, 0)
        elif op.type in COLLECTIVES:
            marks = _EXCHANGED | (0 if _is_among_all(op) else _DIFFERS)
            self._mark_all(op.outputs, marks)
        elif op.type in _OF_SHAPES:
            self._mark_all(op.outputs, 0)
        elif op.type == "Placeholder":
            pass  # An argument of a function: the caller marks it.
        elif op.type in ("Identity", "IdentityN"):
            for source, target in zip(op.inputs, op.outputs, strict=True):
                self._pass(source, target)
        else:
            marks = self._of(op.inputs)
            if "Random" in op.type and "Stateless" not in op.type:
                marks |= _DIFFERS  # Drawn from a generator of the core.
            self._mark_all(op.outputs, marks)

    def _mark_all(self, tensors, marks):
        for tensor in tensors:
            self._mark(tensor, marks)

    def _visit_call(self, op, graph, arguments, more):
        """Passes arguments in and results out; `more` are marks of all results."""
        for outer, inner in zip(arguments, graph.inputs, strict=True):
            self._pass(outer, inner)
        for inner, outer in zip(graph.outputs, op.outputs, strict=True):
            self._pass(inner, outer)
            self._mark(outer, more)

    def _visit_conditional(self, op):
        for graph in _program.functions_of(op):
            self._visit_call(op, graph, op.inputs[1:], self._of(op.inputs[:1]) & _DIFFERS)

    def _visit_loop(self, op):
        body, condition = (_program.function_of(op, name) for name in ("body", "cond"))
        for graph in (body, condition):
            for outer, inner in zip(op.inputs, graph.inputs, strict=True):
                self._pass(outer, inner)
        more = self._of(condition.outputs) & _DIFFERS
        for result, inner, outer in zip(body.outputs, condition.inputs, op.outputs, strict=True):
            self._pass(result, inner)
            self._pass(inner, outer)
            self._mark(outer, more)
        for result, inner in zip(body.outputs, body.inputs, strict=True):
            self._pass(result, inner)


def _is_among_all(op):
    """Whether a collective leaves every core with the same."""
    if op.type == "CollectivePermute":
        return False
    # `TPUStrategy` sends by AllToAll what it has stacked once for each core.
    groups = tf.get_static_value(op.inputs[1]) if len(op.inputs) > 1 else None
    return groups is None or len(groups) == 1


def _key(tensor):
    return id(tensor.graph), tensor.name
