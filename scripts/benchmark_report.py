"""What benchmark.py says about rows that were measured: tables, and where tfbig loses."""

import benchmark_rows


def ratios(rows):
    """Time of each row by that of plain Keras at the micro-batch, in the order of the rows.

    None for a row without numbers, or where plain Keras has none.
    """
    bases = {}
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


def _print_rows(rows):
    columns = "{:<6}{:>4}  {:<42}{:>10} {:>17}{:>7}{:>9}{:>8}{:>10}{:>8}"
    heads = ("model", "K", "row", "samples/s", "min-max", "ratio", "first s", "start s")
    print(columns.format(*heads, "peak MiB", "growth"))
    for row, ratio in zip(rows, ratios(rows), strict=True):
        head = (*row.group, row.title)
        s = row.summary()
        if not s:
            said = row.skipped or f"failed: {row.error}"
            print(columns.format(*head, "-", *[""] * 6).rstrip() + f"  {said}")
            continue
        print(
            columns.format(
                *head,
                f"{s['samples_per_second']:.1f}",
                f"{s['samples_per_second_min']:.1f}-{s['samples_per_second_max']:.1f}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{s['first_update_seconds']:.2f}",
                f"{s['start_seconds']:.2f}",
                f"{s['peak_mib']:.0f}",
                f"{s['growth_mib']:.0f}",
            )
        )


def _print_over_k(rows, title, key, form):
    """A table of one number: a line for each row, a column for each number of micro-batches."""
    counts = sorted({row.task.gradient_accumulation_steps for row in rows})
    cells = {}
    for row in rows:
        if row.summary():
            line = cells.setdefault((row.task.model, benchmark_rows.ROWS[row.name]), {})
            line[row.task.gradient_accumulation_steps] = format(row.summary()[key], form)
    print(f"\n{title}\n{'model':<6}  {'row':<42}" + "".join(f"{f'K={k}':>10}" for k in counts))
    for (model, name), line in cells.items():
        print(f"{model:<6}  {name:<42}" + "".join(f"{line.get(k, '-'):>10}" for k in counts))


# What is compared, so that more is worse; and what one says of it.
_WORSE = {
    "seconds": "slower than",
    "growth_mib": "larger than",
    "first_update_seconds": "later at the first update than",
}


def losses(rows):
    """Sentences, one for each row of tfbig that another one is better than in something.

    Rows are compared with the others of the same model and number of micro-batches. Medians
    that are less than 1 % apart count as equal.
    """
    found = []
    for row in rows:
        if row.name not in benchmark_rows.OF_TFBIG or not (own := row.summary()):
            continue
        others = {
            other.title: other.summary()
            for other in rows
            if other.group == row.group and other.name not in benchmark_rows.OF_TFBIG
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


def show(rows):
    """Prints everything."""
    print(
        "ratio: time, to plain Keras at the micro-batch. first: from the call of `fit` to the end "
        "of\nthe first update; start: what that takes longer than a later one. growth: of the "
        "peak\nmemory, over imports and data.\n"
    )
    _print_rows(rows)
    if len({row.task.gradient_accumulation_steps for row in rows}) > 1:
        _print_over_k(rows, "Growth of the peak memory, MiB", "growth_mib", ".0f")
        _print_over_k(rows, "Samples per second", "samples_per_second", ".1f")
        _print_over_k(rows, "Seconds before the first update (start)", "start_seconds", ".2f")
    found = losses(rows)
    if found:
        print("\nWhere tfbig loses:")
        print("\n".join(f"  {line}" for line in found))
    elif any(row.name in benchmark_rows.OF_TFBIG and row.summary() for row in rows):
        print("\ntfbig loses nowhere.")
