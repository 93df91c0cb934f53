"""Collectives in the text of a compiled program, HLO, and where they stand."""

import dataclasses
import re

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
# ` = SHAPE opcode(`; the shape of a tuple has spaces and comments.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(")
_CALLED = re.compile(
    r"(body|condition|branch_computations|true_computation|false_computation|calls|to_apply"
    r"|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
# What these begin with `-start` returns the operands too: (operands, results, ...).
_WITH_OPERANDS = ("all-gather-start", "collective-permute-start")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation in which cores wait for each other.

    Attributes:
        name: str, that of the instruction.
        kind: str, such as "all-reduce".
        arrays: int, how many arrays it exchanges in one go.
        bytes: int, of what it returns on each core.
        inside: tuple of "loop" and "conditional": what it stands inside of.
    """

    name: str
    kind: str
    arrays: int
    bytes: int
    inside: tuple


def collectives(text):
    """List of the `Collective` of a program, given as text."""
    computations, called, entry = _parsed(text)
    # What a computation stands inside of, the entry inside of nothing.
    inside: dict[str, frozenset] = {entry: frozenset()}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        for callee, kind in called.get(name, ()):
            around = inside[name] | ({kind} if kind else frozenset())
            if callee not in inside or around - inside[callee]:
                inside[callee] = around | inside.get(callee, frozenset())
                waiting.append(callee)
    found = []
    for computation in inside.keys() & computations.keys():
        for name, kind, shape in computations[computation]:
            arrays, size = _size(shape)
            where = tuple(sorted(inside[computation]))
            found.append(Collective(name, kind, arrays, size, where))
    return found


def _parsed(text):
    """Collectives and callees of each computation, and the name of the entry."""
    computations: dict[str, list] = {}
    called: dict[str, list] = {}
    entry = current = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            entry = current if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode = match.groups()
            # What begins apart from its end is counted where it begins.
            kind = opcode.removesuffix("-start")
            if kind in _KINDS:
                if opcode in _WITH_OPERANDS:
                    shape = _results(shape)
                computations.setdefault(current, []).append((name, kind, shape))
            for _, several, one in _CALLED.findall(line):
                around = {"while": "loop", "conditional": "conditional"}.get(opcode, "")
                for callee in re.findall(r"[\w.\-]+", several or one):
                    called.setdefault(current, []).append((callee, around))
    return computations, called, entry


def _results(shape):
    """The second part of a tuple's shape; the shape itself if it is no tuple."""
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


def _size(shape):
    """Number of arrays in a shape, and their bytes."""
    sizes = []
    for dtype, dimensions in _ARRAY.findall(shape):
        count = 1
        for dimension in filter(None, dimensions.split(",")):
            count *= int(dimension)
        bits = 8 if dtype == "pred" else int(re.sub(r"^\D+|\D.*$", "", dtype) or 8)
        sizes.append(count * bits // 8)
    return len(sizes), sum(sizes)
