"""What must hold for a program that TPUs compile and run together.

Each check yields errors that name an operation and its layer. A program without errors may still
fail to compile, or be wrong: the checks only look at its graph.
"""

import functools
import importlib.resources
from collections.abc import Iterator

import tensorflow as tf

from tfbig import errors
from tfbig.tpu_check.differences import COLLECTIVES, Differences
from tfbig.tpu_check.program import Place, Program

__all__ = (
    "CollectiveError",
    "DriftError",
    "DynamicShapeError",
    "HostOperationError",
    "PredicateError",
    "ProgramError",
    "UnknownOperationError",
    "check",
    "findings",
)


class ProgramError(errors.UnsupportedModelError):
    """The program of an update cannot run on a TPU."""


class DynamicShapeError(ProgramError):
    """A shape is unknown before the program runs."""


class HostOperationError(ProgramError):
    """An operation needs the host, because it calls Python or handles strings."""


class UnknownOperationError(ProgramError):
    """The TPU compiler does not know an operation."""


class CollectiveError(ProgramError):
    """Cores exchange too often, or in an illegal position."""


class DriftError(ProgramError):
    """A variable that must be the same on all cores is assigned a value that differs."""


class PredicateError(ProgramError):
    """Cores may take different branches where they must take the same one."""


# Index vectors of the gradients of broadcasts: the compiler computes them.
_COMPUTED_BY_THE_COMPILER = frozenset({"BroadcastGradientArgs"})

_PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})

# Marks of the program's beginning and of the arguments of functions, which are not compiled.
_NOT_COMPILED = frozenset({"Placeholder", "TPUReplicateMetadata"})

_CONTROL_FLOW = ("While", "If", "Case", "PartitionedCall")


def check(program: Program) -> None:
    """Raises the first of the `findings` of a program."""
    for error in findings(program):
        raise error


def findings(program: Program) -> list[ProgramError]:
    """Returns everything that is wrong with a program."""
    found = [
        *_host_operations(program),
        *_unknown_operations(program),
        *_dynamic_shapes(program),
    ]
    if program.cores == 1:
        # It differs from no other core, and waits for none.
        return found
    differences = Differences(program)
    return [
        *found,
        *_misplaced_collectives(program),
        *_repeated_collectives(program, differences),
        *_predicates(program, differences),
        *_drifts(program, differences),
    ]


def _dynamic_shapes(program: Program) -> Iterator[ProgramError]:
    """Finds operations that make a dynamic shape from static ones."""
    for place in program.places:
        op = place.op
        # An argument of a function takes its shape from the caller; calls of Python are an error
        # of their own.
        if op.type in _COMPUTED_BY_THE_COMPILER | _PYTHON | {"Placeholder"}:
            continue
        unknown = [t for t in op.outputs if not _is_static(t)]
        if unknown and all(map(_is_static, op.inputs)):
            yield DynamicShapeError(
                "Every shape in a TPU program must be known before it runs. Received: "
                f"{_shape(unknown[0])} from {program.describe(op)}. Pad to a fixed length, or "
                "mask instead of selecting."
            )


def _is_static(tensor: tf.Tensor) -> bool:
    # Handles and lists have no shape of their own.
    return tensor.dtype in (tf.resource, tf.variant) or bool(tensor.shape.is_fully_defined())


def _shape(tensor: tf.Tensor) -> str:
    return "an unknown rank" if tensor.shape.rank is None else f"shape {tuple(tensor.shape)}"


def _host_operations(program: Program) -> Iterator[ProgramError]:
    for place in program.places:
        if place.op.type in _PYTHON:
            yield HostOperationError(
                "A TPU cannot call Python. Received: "
                f"{program.describe(place.op)}. Write it in TensorFlow or keras.ops, or move it "
                "to the input pipeline (dataset.map)."
            )
    string_operations = _string_operations(program)
    # Splitting the batch handles strings, too. If no string is in a layer, the last operation
    # before the first layer says most.
    in_layers = [op for op in string_operations if program.layer_of(op)]
    for op in in_layers or string_operations[-1:]:
        user = None if program.layer_of(op) else program.user_of(op)
        where = program.describe(op) + (f", for {user}" if user else "")
        yield HostOperationError(
            f"A TPU cannot handle strings. Received: a string in {where}. Convert strings to "
            "numbers in the input pipeline (dataset.map)."
        )


@functools.cache
def _known_operations() -> frozenset[str]:
    """Returns the names of the operations that TensorFlow compiles for TPUs."""
    text = importlib.resources.files(__package__).joinpath("operations.txt").read_text()
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))


def _unknown_operations(program: Program) -> Iterator[ProgramError]:
    known = _known_operations() | _NOT_COMPILED | _PYTHON
    string_operations = set(_string_operations(program))
    for place in program.places:
        if place.op.type not in known and place.op not in string_operations:
            yield UnknownOperationError(
                "A TPU program must consist of operations that the TPU compiler knows. Received: "
                f"{program.describe(place.op)}. Move it to the input pipeline (dataset.map), or "
                "write it with other operations."
            )


def _string_operations(program: Program) -> list[tf.Operation]:
    """Returns the operations on strings, except for assertions, which XLA drops."""
    asserted = _only_asserted(program)
    return [
        place.op
        for place in program.places
        if place.op not in asserted
        and not place.op.type.endswith(("Assert", *_CONTROL_FLOW))
        and any(t.dtype == tf.string for t in (*place.op.inputs, *place.op.outputs))
    ]


def _only_asserted(program: Program) -> set[tf.Operation]:
    """Returns the operations that only assertions use."""
    users: dict[tf.Operation, set[tf.Operation]] = {}
    for place in program.places:
        for tensor in place.op.inputs:
            users.setdefault(tensor.op, set()).add(place.op)
    found: set[tf.Operation] = set()
    for place in reversed(program.places):
        using = users.get(place.op)
        if using and all(u.type == "Assert" or u in found for u in using):
            found.add(place.op)
    return found


def collectives(program: Program) -> list[Place]:
    """Returns where the operations are in which cores wait for each other."""
    return [place for place in program.places if place.op.type in COLLECTIVES]


def exchanged_bytes(op: tf.Operation) -> int:
    """Returns the bytes that a core contributes to a collective."""
    tensor = op.inputs[0]
    return int((tensor.shape.num_elements() or 0) * tensor.dtype.size)


def _misplaced_collectives(program: Program) -> Iterator[ProgramError]:
    for place in collectives(program):
        op = place.op
        if place.loops:
            yield CollectiveError(
                "Cores must exchange once per update, after the loop over micro-batches. "
                f"Received: {program.describe(op)} inside the loop {place.loops[-1].name!r}."
            )
        if place.conditionals:
            yield CollectiveError(
                "Cores must not exchange inside a conditional: they would wait for cores that take "
                f"the other branch. Received: {program.describe(op)} inside "
                f"{place.conditionals[-1].name!r}."
            )
        if op.type != "CrossReplicaSum":
            yield CollectiveError(
                f"Cores must only exchange sums and means. Received: {program.describe(op)}."
            )


def _repeated_collectives(program: Program, differences: Differences) -> Iterator[ProgramError]:
    for place in collectives(program):
        tensor = place.op.inputs[0]
        if _is_only_assigned_to(place.op.outputs[0], program.synchronized):
            continue  # The mean of statistics that the layer's own exchange made equal already.
        if differences.is_exchanged(tensor) and not differences.differs(tensor):
            yield CollectiveError(
                "Each value must be exchanged once. Received: "
                f"{program.describe(place.op)}, whose input is the same on all cores already, "
                "because it was exchanged before: a sum multiplies it by the number of cores, and "
                "a mean does nothing."
            )


def _is_only_assigned_to(tensor: tf.Tensor, handles: list[tf.Operation]) -> bool:
    """Returns whether a tensor, and what is computed from it, is only assigned to variables.

    Args:
        tensor: A tensor.
        handles: The handles of the variables.
    """
    waiting, seen, is_assigned = [tensor], set(), False
    while waiting:
        tensor = waiting.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        for op in tensor.consumers():
            if op.type == "AssignVariableOp" and op.inputs[0].op in handles:
                is_assigned = True
            elif op.op_def.is_stateful or op.type.endswith(_CONTROL_FLOW) or not op.outputs:
                return False
            elif op.type == "IdentityN":
                waiting += [o for i, o in zip(op.inputs, op.outputs, strict=True) if i is tensor]
            else:
                waiting += op.outputs
    return is_assigned


def _assignments(
    program: Program, differences: Differences
) -> Iterator[tuple[Place, tf.Operation]]:
    """Yields each operation that writes a mirrored variable, and the variable's input."""
    for place in program.places:
        op = place.op
        if op.type.endswith(_CONTROL_FLOW) or op.type in ("Identity", "ReadVariableOp"):
            continue
        if op.op_def.is_stateful and "Gather" not in op.type:
            for tensor in op.inputs:
                variable = differences.variable_of(tensor)
                if variable is not None:
                    yield place, variable


def _predicates(program: Program, differences: Differences) -> Iterator[ProgramError]:
    """Finds conditionals with effects whose predicate may differ between the cores."""
    relevant = {op for place, _ in _assignments(program, differences) for op in place.conditionals}
    relevant |= {op for place in collectives(program) for op in place.conditionals}
    for op in sorted(relevant, key=lambda op: str(op.name)):
        if differences.differs(op.inputs[0]):
            yield PredicateError(
                "All cores must take the same branch where variables are assigned, so the branch "
                "must be decided after the exchange. Received: "
                f"{program.describe(op)}, whose predicate is computed from a core's own values."
            )


def _drifts(program: Program, differences: Differences) -> Iterator[ProgramError]:
    seen = set()
    for place, variable in _assignments(program, differences):
        if variable in seen or not any(map(differences.differs, place.op.inputs)):
            continue
        seen.add(variable)
        yield DriftError(
            "A variable must be assigned the same value on all cores, computed from exchanged "
            f"values. Received: variable {variable.name.removesuffix('/handle')!r}, to which "
            f"{program.describe(place.op)} assigns a value that differs between the cores: the "
            "value, or the gradient that it is computed from, was not exchanged."
        )
