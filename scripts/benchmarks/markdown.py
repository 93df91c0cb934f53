"""The tables of benchmark.py as Markdown, for docs/benchmarks.md."""

from __future__ import annotations

import dataclasses
import pathlib

from benchmarks.provenance import Provenance


@dataclasses.dataclass
class Table:
    """A table of texts.

    Attributes:
        title: What the numbers are.
        heads: The heads of the columns.
        lines: As many cells each as there are heads; a column of numbers is aligned to the right.
    """

    title: str
    heads: tuple[str, ...]
    lines: list[tuple[str, ...]]


def write(
    path: pathlib.Path | str, provenance: Provenance, tables: list[Table], notes: list[str]
) -> None:
    """Writes where the numbers come from, the tables and the notes."""
    parts = ["\n".join(f"- {line}" for line in provenance.lines())]
    parts += [part for table in tables for part in (f"{table.title}:", _formatted(table))]
    if notes:
        parts.append("\n".join(f"- {_escaped(note)}" for note in notes))
    pathlib.Path(path).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _formatted(table: Table) -> str:
    columns = zip(*table.lines, strict=True)
    rulers = ["---:" if all(map(_is_number, column)) else "---" for column in columns]
    lines = [table.heads, tuple(rulers), *table.lines]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] == "-"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")
