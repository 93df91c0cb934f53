"""Plots of the objective over the values of hyperparameters."""

import html
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from optuna import distributions

from tfbig.tuners import _figures, _progress, _record, _results, _scales, _svg
from tfbig.tuners._figures import Figure, needs

__all__ = ("ParameterPlots",)

# How much is drawn at most, so that the page stays small and can be surveyed.
_MOST_SLICES, _MOST_POINTS = 24, 400
_MOST_PAIRED, _MOST_AXES, _MOST_LINES = 4, 12, 300
_CELLS = 24

_MISSING = "not active"


def _scale(one: _results.Searched, values: Iterable[object]) -> _scales.Scale:
    """An axis for a hyperparameter: its range, or the categories that occurred."""
    d = one.distribution
    if isinstance(d, distributions.CategoricalDistribution):
        found = set(values)
        return _scales.Categories([str(c) for c in d.choices if c in found])
    assert isinstance(d, distributions.FloatDistribution | distributions.IntDistribution)
    is_whole = isinstance(d, distributions.IntDistribution)
    return _scales.Numbers(d.low, d.high, d.log, is_whole=is_whole)


class ParameterPlots:
    """Draws plots over hyperparameters; each method raises `NothingToDraw` if it cannot.

    Args:
        search: The search.
        shares: Returns the importance of hyperparameters for an objective; empty if it is not
            known.
    """

    def __init__(self, search: _figures.Search, shares: Callable[[int], dict[str, float]]) -> None:
        self._search = search
        self._shares = shares

    def _varied(self, i: int) -> list[_results.Searched]:
        """The hyperparameters that have had several values, the most important first."""
        shares = self._shares(i)
        varied = [one for one in self._search.searched if len(set(one.values.values())) > 1]
        return sorted(varied, key=lambda one: -shares.get(one.label, -1.0))

    def _needed(self, i: int) -> list[_results.Searched]:
        """As `_varied`; raises if there are none."""
        needs(self._search.searched, "there is no hyperparameter to search")
        varied = self._varied(i)
        needs(varied, "no hyperparameter has had several values")
        return varied

    def slices(self, i: int) -> Figure:
        needs(self._search.record.rows, "there is no trial yet")
        varied = self._needed(i)
        y = self._search.values_scale(i)
        name, charts = self._search.names[i], []
        notes: list[str] = []
        for one in varied[:_MOST_SLICES]:
            active = [row for row in self._search.record.rows if row.trial in one.values]
            rows, notes = _figures.thinned(active, _MOST_POINTS, self._search.ranks[i])
            has_lane = any(self._search.value(row, i) is None for row in rows)
            x = _scale(one, one.values.values())
            chart = _svg.Chart(x, y, (one.label, name), has_lane=has_lane)
            for row in rows:
                at = one.values[row.trial]
                title = self._with(row, (one,))
                kind = self._search.kind(row)
                chart.point(at, self._search.value(row, i), kind, title)
            charts.append(chart.render(f"{name} by {one.label}"))
        if len(varied) > _MOST_SLICES:
            notes.append(f"Shows {_MOST_SLICES} of {len(varied)} hyperparameters.")
        return Figure(self._titled("Slices", i), charts, notes)

    def _titled(self, title: str, i: int) -> str:
        return title if self._search.record.is_single else f"{title} of {self._search.names[i]}"

    def _with(self, row: _record.Row, shown: Iterable[_results.Searched]) -> str:
        values = ", ".join(f"{o.label}={_progress.shown(o.values[row.trial])}" for o in shown)
        return f"{self._search.titles[row.trial]}; {html.escape(values)}"

    # --- Pairs of hyperparameters ---

    def _pairs(self, i: int) -> tuple[list[tuple[_results.Searched, _results.Searched]], list[str]]:
        needs(self._search.complete, "no trial is complete yet")
        varied = self._needed(i)
        needs(len(varied) > 1, "it needs two hyperparameters")
        pairs = list(itertools.combinations(varied[:_MOST_PAIRED], 2))
        if len(varied) <= _MOST_PAIRED:
            return pairs, []
        by = "most important" if self._shares(i) else "first"
        note = f"Pairs of the {_MOST_PAIRED} {by} of {len(varied)} hyperparameters."
        return pairs, [note]

    def _pair_chart(
        self, x: _results.Searched, y: _results.Searched
    ) -> tuple[_svg.Chart, _scales.Scale, _scales.Scale]:
        across, down = _scale(x, x.values.values()), _scale(y, y.values.values())
        return _svg.Chart(across, down, (x.label, y.label), (410, 300)), across, down

    def contours(self, i: int) -> Figure:
        pairs, notes = self._pairs(i)
        ranks, charts = self._search.ranks[i], []
        for x, y in pairs:
            chart, across, down = self._pair_chart(x, y)
            both = [r for r in self._search.complete if r.trial in x.values and r.trial in y.values]
            rows, _ = _figures.thinned(both, _MOST_POINTS, ranks)
            if not rows:
                continue
            places = np.array(
                [
                    (across.position(x.values[r.trial]), down.position(y.values[r.trial]))
                    for r in rows
                ]
            )
            chart.put_behind(
                _surface(chart, across, down, places, np.array([ranks[r.trial] for r in rows]))
            )
            for row in rows:
                title = self._with(row, (x, y))
                chart.point(x.values[row.trial], y.values[row.trial], "dot", title)
            charts.append(chart.render(f"{x.label} and {y.label}"))
        needs(charts, "no complete trial has two hyperparameters")
        notes.append(
            "Colors are the ranks of the trials nearby, weighted by their distance; where there "
            "are few trials, they say little."
        )
        return Figure(self._titled("Contours", i), charts, notes)

    def ranks(self, i: int) -> Figure:
        pairs, notes = self._pairs(i)
        ranks, charts = self._search.ranks[i], []
        for x, y in pairs:
            chart, _, _ = self._pair_chart(x, y)
            both = [
                r
                for r in self._search.record.rows
                if r.trial in x.values and r.trial in y.values and r.status != _record.RUNNING
            ]
            rows, _ = _figures.thinned(both, _MOST_POINTS, ranks)
            # The best on top.
            for row in sorted(rows, key=lambda r: -ranks.get(r.trial, 2.0)):
                rank = ranks.get(row.trial)
                title = self._with(row, (x, y))
                fill = None if rank is None else _svg.color(rank)
                chart.point(
                    x.values[row.trial], y.values[row.trial], self._search.kind(row), title, fill
                )
            charts.append(chart.render(f"{x.label} and {y.label}"))
        return Figure(self._titled("Ranks", i), charts, notes)

    def coordinates(self) -> Figure:
        needs(self._search.complete, "no trial is complete yet")
        varied, ranks, notes = self._needed(0), self._search.ranks[0], []
        if len(varied) > _MOST_AXES:
            notes.append(f"Shows {_MOST_AXES} of {len(varied)} hyperparameters.")
        ended = [r for r in self._search.record.rows if r.status != _record.RUNNING]
        rows, left_out = _figures.thinned(ended, _MOST_LINES, ranks)
        lines = _Lines(self._search, varied[:_MOST_AXES], rows)
        chart = lines.render()
        if lines.without_value:
            notes.append(
                f"At \N{EN DASH}, a trial has no value, or the hyperparameter is {_MISSING}."
            )
        return Figure("Parallel coordinates", [chart], notes + left_out, "wide")


def _surface(
    chart: _svg.Chart,
    x: _scales.Scale,
    y: _scales.Scale,
    places: np.ndarray,
    ranks: np.ndarray,
) -> str:
    """Colors behind a chart: at each place, the mean of the ranks nearby."""
    columns, lines = (len(s.texts) if isinstance(s, _scales.Categories) else _CELLS for s in (x, y))
    width, height = (chart.right - chart.left) / columns, (chart.bottom - chart.top) / lines
    centers = np.stack(
        np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(lines) + 0.5) / lines), -1
    )
    distances = ((centers[:, :, None, :] - places) ** 2).sum(-1) + 1e-4
    weights = distances**-1.5
    means = (weights * ranks).sum(-1) / weights.sum(-1)
    items = []
    for line in range(lines):
        top = chart.bottom - (line + 1) * height
        colors = [_svg.color(float(v)) for v in means[line]]
        start = 0
        for color, same in itertools.groupby(colors):
            count = len(list(same))
            items.append(
                f'<path fill="{color}" d="M{chart.left + start * width:.1f} {top:.1f}'
                f'h{count * width + 0.3:.1f}v{height + 0.3:.1f}h-{count * width + 0.3:.1f}z"/>'
            )
            start += count
    return f'<g class="surface">{"".join(items)}</g>'


class _Lines:
    """Parallel coordinates: a vertical axis for each hyperparameter, a line for each trial.

    Args:
        search: The search.
        axes: The hyperparameters.
        rows: The trials.

    Attributes:
        without_value: Where the axes are on which a trial that was drawn has no value.
    """

    TOP, HEIGHT, BELOW = 34, 230, 30
    GAP = 120

    def __init__(
        self,
        search: _figures.Search,
        axes: Sequence[_results.Searched],
        rows: Sequence[_record.Row],
    ) -> None:
        self._search = search
        self._axes = axes
        self._rows = rows
        self._lefts = [70 + self.GAP * i for i in range(len(search.names) + len(axes))]
        self.without_value: set[float] = set()

    def render(self) -> str:
        count = len(self._search.names)
        objectives = [self._search.values_scale(i) for i in range(count)]
        scales = [*objectives, *(_scale(a, a.values.values()) for a in self._axes)]
        names = [*self._search.names, *(a.label for a in self._axes)]
        items = []
        ranks = self._search.ranks[0]
        for row in sorted(self._rows, key=lambda r: -ranks.get(r.trial, 2.0)):
            values: list[object] = [self._search.value(row, i) for i in range(count)]
            values += [axis.values.get(row.trial) for axis in self._axes]
            has = [v is not None for v in values[:count]]
            has += [row.trial in axis.values for axis in self._axes]
            points = [
                (left, self._down(scale.position(value)) if known else self._floor)
                for left, scale, value, known in zip(self._lefts, scales, values, has, strict=True)
            ]
            self.without_value |= {
                x for (x, _), known in zip(points, has, strict=True) if not known
            }
            path = "L".join(f"{x:g} {y:.1f}" for x, y in points)
            rank = ranks.get(row.trial)
            style = "" if rank is None else f' style="stroke:{_svg.color(rank)}"'
            kind = "line" if rank is None else "line ranked"
            items.append(
                f'<path class="{kind} {row.status}"{style} d="M{path}">'
                f"<title>{self._search.titles[row.trial]}</title></path>"
            )
        for left, scale, name in zip(self._lefts, scales, names, strict=True):
            items += self._axis(left, scale, name)
        width = self._lefts[-1] + 70
        return _svg.svg(
            width, self.TOP + self.HEIGHT + self.BELOW + 8, "Parallel coordinates", items
        )

    @property
    def _floor(self) -> float:
        return self.TOP + self.HEIGHT + 18

    def _down(self, place: float) -> float:
        return self.TOP + (1 - place) * self.HEIGHT

    def _axis(self, left: float, scale: _scales.Scale, name: str) -> Iterable[str]:
        bottom = self.TOP + self.HEIGHT
        short = name if len(name) <= 18 else name[:17] + "…"
        yield f'<path class="axis" d="M{left} {self.TOP}V{bottom}"/>'
        yield (
            f'<text class="name" x="{left}" y="16" text-anchor="middle">{html.escape(short)}'
            f"<title>{html.escape(name)}</title></text>"
        )
        for place, text in scale.ticks(6):
            y, cut = self._down(place), text if len(text) <= 14 else text[:13] + "…"
            yield (
                f'<text class="over" x="{left + 4}" y="{y + 4:.1f}">{html.escape(cut)}'
                f"<title>{html.escape(text)}</title></text>"
            )
        if left in self.without_value:
            yield (
                f'<text class="over" x="{left + 4}" y="{self._floor + 4:.1f}">&ndash;'
                f"<title>{_MISSING}, or no value</title></text>"
            )
