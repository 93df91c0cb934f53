"""Collectives in the text of a compiled program (HLO), and where they are."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

__all__ = ("Collective", "collectives")

_KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)

# `ENTRY %main.37 (...) -> ... {` and `%region_1.2 (...) -> ... {`.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# ` = SHAPE opcode(`; the shape of a tuple contains spaces and comments.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(")
_CALLED = re.compile(
    r"(body|condition|branch_computations|true_computation|false_computation|calls|to_apply"
    r"|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
# These return their operands as well: (operands, results, ...).
_WITH_OPERANDS = ("all-gather-start", "collective-permute-start")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation in which cores wait for each other.

    Attributes:
        name: The instruction's name.
        kind: Such as "all-reduce".
        arrays: Number of arrays that it exchanges at once.
        bytes: Bytes that it returns on each core.
        inside: What encloses it: any of "loop" and "conditional".
    """

    name: str
    kind: str
    arrays: int
    bytes: int
    inside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A collective as the text has it.

    Attributes:
        name: The instruction's name.
        kind: Such as "all-reduce".
        shape: The text of what it returns.
    """

    name: str
    kind: str
    shape: str


@dataclasses.dataclass
class _Module:
    """What the text of a program says.

    Attributes:
        entry: Name of the computation that runs first.
        collectives: Collectives by computation.
        calls: Pairs of a callee and what it becomes part of ("loop", "conditional" or ""), by
            computation.
    """

    entry: str = ""
    collectives: dict[str, list[_Instruction]] = dataclasses.field(default_factory=dict)
    calls: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, given as text."""
    module = _parse(text)
    enclosing = _enclosing(module.entry, module.calls)
    found = []
    for computation in enclosing.keys() & module.collectives.keys():
        inside = tuple(sorted(enclosing[computation]))
        for instruction in module.collectives[computation]:
            arrays, size = _size(instruction.shape)
            found.append(Collective(instruction.name, instruction.kind, arrays, size, inside))
    return found


def _enclosing(
    entry: str, calls: Mapping[str, Iterable[tuple[str, str]]]
) -> dict[str, frozenset[str]]:
    """Returns what encloses each computation that the entry reaches; nothing encloses the entry."""
    enclosing: dict[str, frozenset[str]] = {entry: frozenset()}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        for callee, kind in calls.get(name, ()):
            around = enclosing[name] | ({kind} if kind else frozenset())
            if callee not in enclosing or around - enclosing[callee]:
                enclosing[callee] = around | enclosing.get(callee, frozenset())
                waiting.append(callee)
    return enclosing


def _parse(text: str) -> _Module:
    module = _Module()
    current = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            module.entry = current if match[1] else module.entry
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode = match.groups()
            # An asynchronous collective counts where it starts.
            kind = opcode.removesuffix("-start")
            if kind in _KINDS:
                if opcode in _WITH_OPERANDS:
                    shape = _results(shape)
                module.collectives.setdefault(current, []).append(_Instruction(name, kind, shape))
            for _, several, one in _CALLED.findall(line):
                around = {"while": "loop", "conditional": "conditional"}.get(opcode, "")
                for callee in re.findall(r"[\w.\-]+", several or one):
                    module.calls.setdefault(current, []).append((callee, around))
    return module


def _results(shape: str) -> str:
    """Returns the second part of a tuple's shape; the shape itself if it is not a tuple."""
    if not shape.startswith("("):
        return shape
    parts, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1] if len(parts) > 1 else shape


def _size(shape: str) -> tuple[int, int]:
    """Returns the number of arrays in a shape, and their bytes."""
    sizes = []
    for dtype, dimensions in _ARRAY.findall(shape):
        count = 1
        for dimension in filter(None, dimensions.split(",")):
            count *= int(dimension)
        bits = 8 if dtype == "pred" else int(re.sub(r"^\D+|\D.*$", "", dtype) or 8)
        sizes.append(count * bits // 8)
    return len(sizes), sum(sizes)
