"""What benchmark.py says about the measured rows: tables, and where tfbig loses."""

from __future__ import annotations

import collections
import statistics
from typing import Any

from benchmarks import peers
from benchmarks.markdown import Table
from benchmarks.rows import OF_TFBIG, ROWS, Row


def ratios(rows: list[Row]) -> list[float | None]:
    """Time of each row divided by that of plain Keras at the micro-batch, in the same order.

    None for a row without numbers, or where plain Keras has none.
    """
    bases: dict[tuple[str, int], float | None] = {}
    for row in rows:
        k = row.task.gradient_accumulation_steps
        if row.name == ("micro" if k > 1 else "whole"):
            bases[row.group] = row.summary().get("seconds")
    return [
        seconds / base
        if (seconds := row.summary().get("seconds")) and (base := bases.get(row.group))
        else None
        for row in rows
    ]


def floors(rows: list[Row]) -> list[tuple[float, float] | None]:
    """Milliseconds of the products of a sample, and how many times as long each row takes.

    TensorFlow measures the floor. Rows of other frameworks have the median of those of TensorFlow's
    rows of the same model and number of micro-batches, or None if there are none.
    """
    measured = collections.defaultdict(list)
    for row in rows:
        if floor := row.summary().get("floor_milliseconds"):
            measured[row.group].append(floor)
    found: list[tuple[float, float] | None] = []
    for row in rows:
        s = row.summary()
        if "floor_ratio" in s:
            found.append((s["floor_milliseconds"], s["floor_ratio"]))
        elif s and row.group in measured:
            floor = statistics.median(measured[row.group])
            found.append((floor, 1e3 * s["seconds"] / row.task.batch_size / floor))
        else:
            found.append(None)
    return found


def document(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as --json holds them."""
    written: list[dict[str, Any]] = []
    for row, ratio, floor in zip(rows, ratios(rows), floors(rows), strict=True):
        model, k = row.group
        head: dict[str, Any] = {"model": model, "gradient_accumulation_steps": k, "row": row.title}
        head["effective_batch"] = row.task.batch_size
        if row.skipped or row.error:
            head |= {"skipped": row.skipped} if row.skipped else {"error": row.error}
            written.append(head)
        else:
            of_floor = dict(zip(("floor_milliseconds", "floor_ratio"), floor or (), strict=False))
            written.append(head | row.summary() | of_floor | {"ratio": ratio, "runs": row.runs})
    return written


_OF_PEERS = "for PyTorch and JAX, that of TensorFlow's rows"

_HEADS = (
    *("model", "K", "row", "samples/s", "min-max", "ratio"),
    *("CPU ms", "floor ms", "x floor"),
    *("first s", "start s", "peak MiB", "growth"),
)


def _lines(rows: list[Row]) -> list[tuple[str, ...]]:
    return [_cells(*of_row) for of_row in zip(rows, ratios(rows), floors(rows), strict=True)]


def _cells(row: Row, ratio: float | None, floor: tuple[float, float] | None) -> tuple[str, ...]:
    """A line of the table; of a row without numbers the reason follows the name."""
    head = (row.task.model, str(row.task.gradient_accumulation_steps), row.title)
    s = row.summary()
    if not s:
        return (*head, "-", row.skipped or f"failed: {row.error}")
    return (
        *head,
        f"{s['samples_per_second']:.1f}",
        f"{s['samples_per_second_min']:.1f}-{s['samples_per_second_max']:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{1e3 * s['cpu_seconds'] / row.task.batch_size:.3g}",
        *(("-", "-") if floor is None else (f"{floor[0]:.3g}", f"{floor[1]:.2f}")),
        f"{s['first_update_seconds']:.2f}",
        f"{s['start_seconds']:.2f}",
        f"{s['peak_mib']:.0f}",
        f"{s['growth_mib']:.0f}",
    )


def _print_rows(rows: list[Row]) -> None:
    columns = "{:<6}{:>4}  {:<42}{:>10} {:>17}{:>7}{:>8}{:>10}{:>9}{:>9}{:>8}{:>10}{:>8}"
    print(columns.format(*_HEADS))
    for row, cells in zip(rows, _lines(rows), strict=True):
        if row.summary():
            print(columns.format(*cells))
        else:
            *head, reason = cells
            print(columns.format(*head, *[""] * (len(_HEADS) - len(head))).rstrip() + f"  {reason}")


# The tables with a column for each number of micro-batches: title, key, format.
_OVER_K = (
    ("Growth of the peak memory, MiB", "growth_mib", ".0f"),
    ("Samples per second", "samples_per_second", ".1f"),
    ("Seconds before the first update (start)", "start_seconds", ".2f"),
)


def _tables_over_k(rows: list[Row]) -> list[Table]:
    """One table for each number; none if there is one number of micro-batches only."""
    counts = sorted({row.task.gradient_accumulation_steps for row in rows})
    if len(counts) < 2:
        return []
    tables = []
    for title, key, form in _OVER_K:
        cells: dict[tuple[str, str], dict[int, str]] = {}
        for row in rows:
            if row.summary():
                line = cells.setdefault((row.task.model, ROWS[row.name]), {})
                line[row.task.gradient_accumulation_steps] = format(row.summary()[key], form)
        lines = [(*head, *(line.get(k, "-") for k in counts)) for head, line in cells.items()]
        tables.append(Table(title, ("model", "row", *(f"K={k}" for k in counts)), lines))
    return tables


def _print_over_k(table: Table) -> None:
    print(f"\n{table.title}")
    for model, name, *numbers in (table.heads, *table.lines):
        print(f"{model:<6}  {name:<42}" + "".join(f"{number:>10}" for number in numbers))


def tables(rows: list[Row]) -> list[Table]:
    """The same tables as `show` prints."""
    lines = [(*cells, *[""] * (len(_HEADS) - len(cells))) for cells in _lines(rows)]
    title = (
        "Medians; K micro-batches per update, memory in MiB, ratio of time to plain Keras; per "
        "sample, CPU time and the floor, which is the time of the matrix products and convolutions "
        "of a micro-batch alone"
    )
    if any(row.name in peers.PEERS for row in rows):
        title += f" ({_OF_PEERS})"
    return [Table(title, _HEADS, lines), *_tables_over_k(rows)]


# What is compared, where more is worse, and the words for it.
_WORSE = {
    "seconds": "slower than",
    "growth_mib": "larger than",
    "first_update_seconds": "later at the first update than",
}


def losses(rows: list[Row]) -> list[str]:
    """One sentence for each row of tfbig that is beaten in something.

    Rows are compared with those of the same model and number of micro-batches. Medians less than
    1 % apart count as equal.
    """
    found = []
    for row in rows:
        if row.name not in OF_TFBIG or not (own := row.summary()):
            continue
        others = {
            other.title: other.summary()
            for other in rows
            if other.group == row.group and other.name not in OF_TFBIG
        }
        said = []
        for key, words in _WORSE.items():
            worse = {
                title: own[key] / s[key]
                for title, s in others.items()
                if s and own[key] >= 1.01 * s[key]
            }
            if worse:
                pairs = ", ".join(f"'{title}' ({ratio:.2f}x)" for title, ratio in worse.items())
                said.append(f"{words} {pairs}")
        if said:
            model, k = row.group
            found.append(f"{model}, K={k}, '{row.title}': {'; '.join(said)}")
    return found


def show(rows: list[Row]) -> None:
    """Prints everything."""
    print(
        "ratio: time, to plain Keras at the micro-batch. first: from the call of `fit` to the end "
        "of\nthe first update; start: how much longer than a later one that takes. growth: of the "
        "peak\nmemory, over imports and data. CPU ms, floor ms: per sample, CPU time of all "
        "threads, and\ntime of the matrix products and convolutions of a micro-batch alone, in the "
        f"same process\n({_OF_PEERS}); x floor: how many times as long\nthe row takes.\n"
    )
    _print_rows(rows)
    for table in _tables_over_k(rows):
        _print_over_k(table)
    found = losses(rows)
    if found:
        print("\nWhere tfbig loses:")
        print("\n".join(f"  {line}" for line in found))
    elif any(row.name in OF_TFBIG and row.summary() for row in rows):
        print("\ntfbig loses nowhere.")
