"""The plots of a search, as HTML."""

import functools
import html
from collections.abc import Iterator

import optuna

from tfbig import errors
from tfbig.tuners import (
    _figures,
    _parameter_plots,
    _progress,
    _record,
    _results,
    _scales,
    _svg,
    _timeline,
)
from tfbig.tuners._figures import Figure, needs

__all__ = ("figures", "legend")

# How much is drawn at most, so that the page stays small.
_MOST_POINTS = 1000
_MOST_BEST_CURVES, _MOST_PRUNED_CURVES, _MOST_STEPS = 10, 30, 200
_MOST_FRONTS = 6

# The time that fANOVA takes grows with the square of the number of trials.
_MOST_COMPARED = 250

_WORDS = {"violated": "constraint violated"}


class _Plots:
    """Draws the plots of a search; each method raises `NothingToDraw` if it cannot."""

    def __init__(self, search: _figures.Search) -> None:
        self._search = search
        self._record = search.record
        self._names = search.names

    def _needs_complete(self) -> None:
        needs(self._search.complete, "no trial is complete yet")

    @functools.cached_property
    def study(self) -> optuna.Study:
        rows = _figures.evenly(self._search.complete, _MOST_COMPARED)
        return _results.study_of(self._record, self._search.searched, rows)

    @functools.cache  # noqa: B019  # As long as the page is written.
    def _shares(self, i: int) -> dict[str, float]:
        return _results.shares_in(self.study, i)

    def shares(self, i: int) -> dict[str, float]:
        """The importance for an objective; empty if it is not known."""
        try:
            return self._shares(i)
        except Exception:  # The figure of the importance says why.
            return {}

    def front(self) -> Figure:
        self._needs_complete()
        count, best = len(self._names), set(self._record.best_trials)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        ranks = self._search.ranks[0]
        kept, notes = _figures.thinned(self._search.complete, _MOST_POINTS, ranks)
        rows = list({row.trial: row for row in [*kept, *self._record.best]}.values())
        charts = []
        for i, j in pairs[:_MOST_FRONTS]:
            x, y = self._search.values_scale(i), self._search.values_scale(j)
            size = (610, 380) if len(pairs) == 1 else (410, 300)
            chart = _svg.Chart(x, y, (self._names[i], self._names[j]), size)
            for row in sorted(rows, key=lambda row: row.trial in best):
                kind = "best" if row.trial in best else self._search.kind(row)
                title = self._search.titles[row.trial]
                chart.point(row.scores[i], row.scores[j], kind, title)
            charts.append(chart.render("Pareto front"))
        if len(pairs) > _MOST_FRONTS:
            notes.append(f"Shows {_MOST_FRONTS} of {len(pairs)} pairs of objectives.")
        notes.insert(0, f"The front has {len(best)} trials.")
        return Figure("Pareto front", charts, notes)

    def history(self, i: int) -> Figure:
        needs(self._record.rows, "there is no trial yet")
        rows, notes = _figures.thinned(self._record.rows, _MOST_POINTS, self._search.ranks[i])
        x = _scales.Numbers(0, len(self._record.rows) - 1, margin=0.02, is_whole=True)
        y = self._search.values_scale(i)
        has_lane = any(self._search.value(row, i) is None for row in rows)
        chart = _svg.Chart(x, y, ("trial", self._names[i]), (860, 320), has_lane)
        best: list[tuple[float, float]] = []
        known = None
        for row in self._search.complete:
            value = self._record.sign(i) * row.scores[i]
            if not row.is_feasible or (known is not None and value >= known):
                continue
            across, down = chart.at(int(row.trial), row.scores[i])
            best += [(across, best[-1][1])] if best else []
            best.append((across, down))
            known = value
        if best:
            best.append((chart.at(int(self._record.rows[-1].trial), 0)[0], best[-1][1]))
            chart.line(best, "so-far", "best so far")
        for row in rows:
            value_or_none = self._search.value(row, i)
            title = self._search.titles[row.trial]
            if not row.scores and value_or_none is not None:
                title += f", last {_progress.shown(value_or_none)}"
            chart.point(int(row.trial), value_or_none, self._search.kind(row), title)
        return Figure(
            f"Optimization history{self._of(i)}",
            [chart.render(f"Optimization history{self._of(i)}")],
            notes + _beyond(y),
        )

    def _of(self, i: int) -> str:
        return "" if self._record.is_single else f" of {self._names[i]}"

    def importance(self, i: int) -> Figure:
        needs(len(self._search.complete) > 1, "it needs at least 2 complete trials")
        try:
            shares = self._shares(i)
        except errors.InvalidOptionError as e:
            raise _figures.NothingToDraw(str(e).rstrip(".")) from None
        needs(shares, "there is no hyperparameter that all complete trials have")
        note = "The share of each hyperparameter in the variance (fANOVA)"
        count = len(self._search.complete)
        note += f", from {_MOST_COMPARED} of {count} trials." if count > _MOST_COMPARED else "."
        return Figure(f"Importance for {self._names[i]}", [_bars(shares)], [note])

    def rungs(self) -> Figure:
        reported = [row for row in self._record.rows if row.frozen.intermediate_values]
        needs(self._record.is_single, "with several objectives, epochs are not reported")
        needs(reported, "no trial reported values after its epochs")
        best = [r for r in self._record.best if r.frozen.intermediate_values][:_MOST_BEST_CURVES]
        pruned = [row for row in reported if row.status == _record.PRUNED]
        shown_pruned = pruned[-_MOST_PRUNED_CURVES:]
        running = [row for row in reported if row.status == _record.RUNNING][-_MOST_BEST_CURVES:]
        # The best on top.
        rows = [*shown_pruned, *running, *reversed(best)]
        if not rows:
            rows = reported[-_MOST_BEST_CURVES:]
        curves = [sorted(row.frozen.intermediate_values.items()) for row in rows]
        last = max(max(step for step, _ in curve) for curve in curves)
        y = _scales.numbers_for(value for curve in curves for _, value in curve)
        first = min(curve[0][0] for curve in curves)
        x = _scales.Numbers(first, last, margin=0.01, is_whole=True)
        chart = _svg.Chart(x, y, ("epoch", self._names[0]), (860, 320))
        ends = []
        for row, curve in zip(rows, curves, strict=True):
            step = max(1, len(curve) // _MOST_STEPS)
            kept = [*curve[:-1:step], curve[-1]]
            points = [chart.at(at, value) for at, value in kept if value == value]
            if not points:
                continue
            title = self._search.titles[row.trial]
            fill = ""
            if row in best:
                fill = f"stroke:{_svg.color(best.index(row) / max(len(best), 1))}"
            chart.line(points, row.status, title, fill)
            if row.status == _record.PRUNED or len(points) == 1:
                start = _svg.mark(*points[-1], row.status)
                ends.append(f"{start}<title>{title}</title></path>")
        # No line covers them.
        for end in ends:
            chart.add(end)
        left = len(reported) - len(rows)
        note = f"Shows the {len(best)} best trials"
        if pruned:
            note += f", {len(shown_pruned)} of {len(pruned)} pruned ones"
        if running:
            note += f", {len(running)} running"
        note += f"; {left} are left out." if left else "."
        title = "Rungs: the objective after each epoch"
        return Figure(title, [chart.render(title)], [note, *_beyond(y)])


def _beyond(scale: _scales.Numbers) -> list[str]:
    if not scale.beyond:
        return []
    return [f"Values far from most others ({scale.beyond}) are drawn at the edge of the axis."]


def _bars(shares: dict[str, float]) -> str:
    height, left = 22, 190
    items = []
    for i, (name, share) in enumerate(shares.items()):
        y = i * height
        short = name if len(name) <= 28 else name[:27] + "…"
        items.append(
            f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{html.escape(short)}'
            f"<title>{html.escape(name)}</title></text>"
            f'<rect class="bar" x="{left}" y="{y + 3}" width="{max(share * 260, 1):.1f}" '
            f'height="{height - 6}"><title>{html.escape(name)}: {share:.4f}</title></rect>'
            f'<text x="{left + share * 260 + 6:.1f}" y="{y + 15}">{share:.2f}</text>'
        )
    return _svg.svg(520, height * len(shares) + 4, "Importance", items)


def legend(record: _record.Record) -> str:
    """What the marks and colors of the plots mean."""
    kinds = [*record.counts()]
    if any(not row.is_feasible for row in record.rows):
        kinds.append("violated")
    if not record.is_single:
        kinds.append("best")
    marks = "".join(
        f'<span><svg viewBox="0 0 12 12" class="mark">{_svg.mark(6, 6, kind)}</path></svg> '
        f"{'Pareto front' if kind == 'best' else _WORDS.get(kind, kind)}</span>"
        for kind in kinds
    )
    boxes = "".join(f'<i style="background:{_svg.color(i / 8)}"></i>' for i in range(8))
    return (
        f'<p class="legend">{marks}<span>best {boxes} worst</span>'
        "<span>Point at a mark for its trial; click it to find the trial in the table.</span></p>"
    )


def figures(record: _record.Record) -> Iterator[str]:
    """The plots as HTML; instead of one that is left out, the reason."""
    search = _figures.Search(record, _results.searched_in(record))
    plots = _Plots(search)
    drawn: list[tuple[str, _figures.Draw]] = []
    if not record.is_single:
        drawn.append(("Pareto front", plots.front))
    values = _parameter_plots.ParameterPlots(search, plots.shares)
    for i, name in enumerate(record.objectives):
        of = "" if record.is_single else f" of {name}"
        drawn += [
            (f"Optimization history{of}", functools.partial(plots.history, i)),
            (f"Importance for {name}", functools.partial(plots.importance, i)),
            (f"Slices{of}", functools.partial(values.slices, i)),
            (f"Contours{of}", functools.partial(values.contours, i)),
            (f"Ranks{of}", functools.partial(values.ranks, i)),
        ]
    drawn += [
        ("Parallel coordinates", values.coordinates),
        ("Rungs: the objective after each epoch", plots.rungs),
        ("Timeline of processes", functools.partial(_timeline.timeline, search)),
    ]
    for title, draw in drawn:
        try:
            yield draw().render()
            continue
        except _figures.NothingToDraw as e:
            why = str(e)
        except Exception as e:
            # A page that lacks a plot is better than no page.
            why = f"it could not be drawn ({type(e).__name__}{f': {e}' if str(e) else ''})"
        yield (
            f'<figure class="left-out"><figcaption>{html.escape(title)}</figcaption>'
            f"<p>Left out: {html.escape(why)}.</p></figure>"
        )
