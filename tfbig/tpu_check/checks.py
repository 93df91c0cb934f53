"""What must hold for a program that TPUs are to compile and to run together.

Each check yields errors that name operation and layer. A program without any may still fail to
compile, or be wrong: only its graph is looked at.
"""

import functools
import importlib.resources

import tensorflow as tf

from tfbig import errors
from tfbig.tpu_check.differences import COLLECTIVES, Differences

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
    """The program of an update cannot be a TPU's."""


class DynamicShapeError(ProgramError):
    """A shape is not known before the program runs."""


class HostOperationError(ProgramError):
    """An operation needs the host: Python, or strings."""


class UnknownOperationError(ProgramError):
    """The compiler for TPUs knows no such operation."""


class CollectiveError(ProgramError):
    """Cores exchange too often, or where they may not."""


class DriftError(ProgramError):
    """A variable that is to be the same on all cores is assigned what differs between them."""


class PredicateError(ProgramError):
    """Cores may take different branches where they must take the same."""


# Index vectors of the gradients of broadcasts: the compiler computes them.
_COMPUTED_BY_THE_COMPILER = frozenset({"BroadcastGradientArgs"})

_PYTHON = frozenset({"EagerPyFunc", "PyFunc", "PyFuncStateless"})

# What marks the program's beginning and the arguments of functions is not compiled.
_NOT_COMPILED = frozenset({"Placeholder", "TPUReplicateMetadata"})

_CONTROL_FLOW = ("While", "If", "Case", "PartitionedCall")


def check(program):
    """Raises the first of the `findings` of a program."""
    for error in findings(program):
        raise error


def findings(program):
    """All that is wrong with a program.

    Args:
        program: `Program`.

    Returns:
        List of `ProgramError`.
    """
    differences = Differences(program)
    return [
        *_host_operations(program),
        *_unknown_operations(program),
        *_dynamic_shapes(program),
        *_misplaced_collectives(program),
        *_repeated_collectives(program, differences),
        *_predicates(program, differences),
        *_drifts(program, differences),
    ]


def _dynamic_shapes(program):
    """Operations that make a dynamic shape of static ones; not those that take it on."""
    for place in program.places:
        op = place.op
        # Arguments of functions take shapes on; calls of Python are refused anyway.
        if op.type in _COMPUTED_BY_THE_COMPILER | _PYTHON | {"Placeholder"}:
            continue
        unknown = [t for t in op.outputs if not _is_static(t)]
        if unknown and all(map(_is_static, op.inputs)):
            yield DynamicShapeError(
                "Every shape of a TPU's program must be known before it runs. Received: "
                f"{_shape(unknown[0])} from {program.describe(op)}. Pad to a fixed length, or "
                "mask, instead of selecting."
            )


def _is_static(tensor):
    # Handles and lists have no shape of their own.
    return tensor.dtype in (tf.resource, tf.variant) or tensor.shape.is_fully_defined()


def _shape(tensor):
    return "an unknown rank" if tensor.shape.rank is None else f"shape {tuple(tensor.shape)}"


def _host_operations(program):
    for place in program.places:
        if place.op.type in _PYTHON:
            yield HostOperationError(
                "A TPU cannot call Python. Received: "
                f"{program.describe(place.op)}. Write it in TensorFlow or keras.ops, or move it "
                "into the input pipeline (dataset.map)."
            )
    of_strings = _of_strings(program)
    # What cuts the batch touches them too; a layer says more, and else what comes before one.
    for op in [op for op in of_strings if program.layer_of(op)] or of_strings[-1:]:
        user = None if program.layer_of(op) else program.user_of(op)
        place = program.describe(op) + (f", for {user}" if user else "")
        yield HostOperationError(
            f"A TPU knows no strings. Received: a string in {place}. Turn strings into numbers in "
            "the input pipeline (dataset.map)."
        )


@functools.cache
def _known_operations():
    """Names of the operations that TensorFlow compiles for TPUs."""
    text = importlib.resources.files(__package__).joinpath("operations.txt").read_text()
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))


def _unknown_operations(program):
    known = _known_operations() | _NOT_COMPILED | _PYTHON
    of_strings = set(_of_strings(program))
    for place in program.places:
        if place.op.type not in known and place.op not in of_strings:
            yield UnknownOperationError(
                "A TPU's program is made of operations that its compiler knows. Received: "
                f"{program.describe(place.op)}. Move it into the input pipeline (dataset.map), or "
                "write it with others."
            )


def _of_strings(program):
    """Operations on strings, but for messages of assertions, which XLA leaves out."""
    asserted = _only_asserted(program)
    return [
        place.op
        for place in program.places
        if place.op not in asserted
        and not place.op.type.endswith(("Assert", *_CONTROL_FLOW))
        and any(t.dtype == tf.string for t in (*place.op.inputs, *place.op.outputs))
    ]


def _only_asserted(program):
    """Operations that nothing but assertions use."""
    users: dict[tf.Operation, set] = {}
    for place in program.places:
        for tensor in place.op.inputs:
            users.setdefault(tensor.op, set()).add(place.op)
    found = set()
    for place in reversed(program.places):
        using = users.get(place.op)
        if using and all(u.type == "Assert" or u in found for u in using):
            found.add(place.op)
    return found


def collectives(program):
    """List of the `Place` of each operation in which cores wait for each other."""
    return [place for place in program.places if place.op.type in COLLECTIVES]


def exchanged_bytes(op):
    """Bytes that a core gives into a collective operation."""
    tensor = op.inputs[0]
    return (tensor.shape.num_elements() or 0) * tensor.dtype.size


def _misplaced_collectives(program):
    for place in collectives(program):
        op = place.op
        if place.loops:
            yield CollectiveError(
                "Cores must exchange once per update, after the loop over micro-batches. "
                f"Received: {program.describe(op)} inside of the loop {place.loops[-1].name!r}."
            )
        if place.conditionals:
            yield CollectiveError(
                "No exchange may stand inside of a conditional: cores that do not take the branch "
                f"would be waited for. Received: {program.describe(op)} inside of "
                f"{place.conditionals[-1].name!r}."
            )
        if op.type != "CrossReplicaSum":
            yield CollectiveError(
                "Cores exchange sums and means, and nothing else. Received: "
                f"{program.describe(op)}."
            )


def _repeated_collectives(program, differences):
    for place in collectives(program):
        tensor = place.op.inputs[0]
        if _ends_in(place.op.outputs[0], program.synchronized):
            continue  # A mean of what the layer's own exchange has made the same already.
        if differences.is_exchanged(tensor) and not differences.differs(tensor):
            yield CollectiveError(
                "Each value must be exchanged once. Received: "
                f"{program.describe(place.op)} of what is the same on all cores already, since it "
                "was exchanged before: a sum multiplies it by their number, a mean does nothing."
            )


def _ends_in(tensor, handles):
    """Whether a tensor has no use but to be assigned to these variables, computed with or not."""
    waiting, seen, ends = [tensor], set(), False
    while waiting:
        tensor = waiting.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        for op in tensor.consumers():
            if op.type == "AssignVariableOp" and op.inputs[0].op in handles:
                ends = True
            elif op.op_def.is_stateful or op.type.endswith(_CONTROL_FLOW) or not op.outputs:
                return False
            elif op.type == "IdentityN":
                waiting += [o for i, o in zip(op.inputs, op.outputs, strict=True) if i is tensor]
            else:
                waiting += op.outputs
    return ends


def _assignments(program, differences):
    """Pairs of `Place` and mirrored variable for each operation that writes one."""
    for place in program.places:
        op = place.op
        if op.type.endswith(_CONTROL_FLOW) or op.type in ("Identity", "ReadVariableOp"):
            continue
        if op.op_def.is_stateful and "Gather" not in op.type:
            for tensor in op.inputs:
                variable = differences.variable_of(tensor)
                if variable is not None:
                    yield place, variable


def _predicates(program, differences):
    """Conditionals with effects whose predicate is not known to be the same on all cores."""
    matter = {op for place, _ in _assignments(program, differences) for op in place.conditionals}
    matter |= {op for place in collectives(program) for op in place.conditionals}
    for op in sorted(matter, key=lambda op: op.name):
        if differences.differs(op.inputs[0]):
            yield PredicateError(
                "All cores must take the same branch where variables are assigned, so it must be "
                "decided after the exchange. Received: "
                f"{program.describe(op)}, whose predicate is computed from what a core has for "
                "itself."
            )


def _drifts(program, differences):
    seen = set()
    for place, variable in _assignments(program, differences):
        if variable in seen or not any(map(differences.differs, place.op.inputs)):
            continue
        seen.add(variable)
        yield DriftError(
            "A variable must be assigned the same on all cores, of what was exchanged. Received: "
            f"variable {variable.name.removesuffix('/handle')!r}, assigned by "
            f"{program.describe(place.op)} what differs between the cores: it, or the gradient "
            "that it is made of, was not exchanged."
        )
