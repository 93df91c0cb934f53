"""What all figures of a report have in common."""

import dataclasses
import functools
import html
from collections.abc import Callable, Sequence

from tfbig.tuners import _progress, _record, _results, _scales

__all__ = ("Figure", "NothingToDraw", "Search", "evenly", "needs", "thinned")


class NothingToDraw(Exception):  # noqa: N818
    """Says why a figure is left out."""


def needs(condition: object, why: str) -> None:
    """Raises `NothingToDraw` unless a condition holds."""
    if not condition:
        raise NothingToDraw(why)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Charts under one title.

    Attributes:
        title: The title.
        charts: SVG elements.
        notes: What a reader should know, as sentences.
        kind: "wide" for a chart that needs the width of the page; otherwise "".
    """

    title: str
    charts: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)
    kind: str = ""

    def render(self) -> str:
        """The figure as an element of a page."""
        notes = f'<p class="note">{html.escape(" ".join(self.notes))}</p>' if self.notes else ""
        return (
            f'<figure class="{self.kind}"><figcaption>{html.escape(self.title)}</figcaption>'
            f'<div class="charts">{"".join(self.charts)}</div>{notes}</figure>'
        )


class Search:
    """A search, as figures show it.

    Args:
        record: The search.
        searched: Its hyperparameters.

    Attributes:
        record: The search.
        searched: Its hyperparameters.
        names: The names of its objectives.
        complete: The trials that have a value.
    """

    def __init__(self, record: _record.Record, searched: list[_results.Searched]) -> None:
        self.record = record
        self.searched = searched
        self.names = record.objectives
        self.complete = [row for row in record.rows if row.scores]

    def value(self, row: _record.Row, objective: int) -> float | None:
        """The value of an objective; of a trial that was stopped, the last one it reported."""
        if row.scores:
            return row.scores[objective]
        reported = row.frozen.intermediate_values
        if not self.record.is_single or row.status != _record.PRUNED or not reported:
            return None
        last = reported[max(reported)]
        return last if last == last else None

    def kind(self, row: _record.Row) -> str:
        """The class of the mark of a trial."""
        return row.status if row.is_feasible or not row.scores else "violated"

    @functools.cached_property
    def titles(self) -> dict[str, str]:
        """By trial, what a pointer over its mark shows, escaped."""
        return {row.trial: html.escape(self._title(row)) for row in self.record.rows}

    def _title(self, row: _record.Row) -> str:
        status = row.status if row.is_feasible else "complete, but a constraint is violated"
        scores = zip(self.names, row.scores, strict=False)
        told = ", ".join(f"{name} {_progress.shown(score)}" for name, score in scores)
        return f"trial {row.trial}, {status}{': ' if told else ''}{told}"

    @functools.cached_property
    def ranks(self) -> list[dict[str, float]]:
        """For each objective, the place of complete trials by id: 0 for the best, 1 the worst."""
        found = []
        for i in range(len(self.names)):
            values = sorted({self.record.sign(i) * row.scores[i] for row in self.complete})
            places = {value: n / max(len(values) - 1, 1) for n, value in enumerate(values)}
            found.append(
                {row.trial: places[self.record.sign(i) * row.scores[i]] for row in self.complete}
            )
        return found

    def values_scale(self, objective: int) -> _scales.Numbers:
        """An axis for the values of an objective."""
        values = (self.value(row, objective) for row in self.record.rows)
        return _scales.numbers_for(v for v in values if v is not None)


def thinned(
    rows: Sequence[_record.Row], most: int, ranks: dict[str, float]
) -> tuple[list[_record.Row], list[str]]:
    """So many of the trials at most, in order: the best, and some of the others.

    Args:
        rows: The trials.
        most: How many there may be.
        ranks: See `Search.ranks`.

    Returns:
        The trials, and a sentence if some are left out.
    """
    if len(rows) <= most:
        return list(rows), []
    best = sorted((r for r in rows if r.trial in ranks), key=lambda r: ranks[r.trial])[: most // 2]
    kept = {row.trial for row in best}
    others = [row for row in rows if row.trial not in kept]
    kept |= {row.trial for row in evenly(others, most - len(best))}
    left = len(rows) - len(kept)
    return (
        [row for row in rows if row.trial in kept],
        [f"Shows the {len(best)} best trials and some of the others; {left} are left out."],
    )


def evenly(rows: Sequence[_record.Row], most: int) -> list[_record.Row]:
    """So many trials at most, spread over all of them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


# Draws a figure, or raises `NothingToDraw`.
Draw = Callable[[], Figure]
