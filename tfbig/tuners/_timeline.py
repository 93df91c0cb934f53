"""Which process ran which trial, and when."""

import dataclasses
import datetime
import html
import itertools
from collections.abc import Iterable, Iterator

from tfbig.tuners import _figures, _record, _scales, _svg
from tfbig.tuners._figures import Figure, needs

__all__ = ("timeline",)

_WIDTH, _LEFT, _LANE = 1100, 190, 18

# With more processes, those that followed one another share a lane.
_MOST_PROCESSES = 24
_MOST_LANES = 48
_MOST_BARS = 3000

# A pause of all processes that is longer than this part of the time that they worked is cut out.
_LONGEST_PAUSE = 0.15


@dataclasses.dataclass(frozen=True)
class _Bar:
    row: _record.Row
    process: str
    began: float
    ended: float


class _Clock:
    """The time of a search, without the pauses in which no process worked.

    Args:
        bars: When processes worked.

    Attributes:
        pauses: Where a pause was cut out, in seconds of this clock, and how long it was.
        length: The time that is left, in seconds.
        began: When the search began, in seconds since the epoch.
    """

    def __init__(self, bars: Iterable[_Bar]) -> None:
        busy: list[list[float]] = []
        for began, ended in sorted((bar.began, bar.ended) for bar in bars):
            if busy and began <= busy[-1][1]:
                busy[-1][1] = max(busy[-1][1], ended)
            else:
                busy.append([began, ended])
        worked = sum(ended - began for began, ended in busy)
        longest = max(worked * _LONGEST_PAUSE, 1.0)
        self.began = busy[0][0]
        self.pauses: list[tuple[float, float]] = []
        # When a part begins, and how much was cut out before it.
        self._parts = [(busy[0][0], 0.0)]
        cut = 0.0
        for (_, before), (after, _) in itertools.pairwise(busy):
            if after - before > longest:
                kept = longest / 4
                self.pauses.append((before - self.began - cut + kept / 2, after - before))
                cut += after - before - kept
                self._parts.append((after, cut))
        self.length = max(busy[-1][1] - self.began - cut, 1e-3)

    def seconds(self, moment: float) -> float:
        """A moment as seconds of this clock."""
        cut = next(cut for start, cut in reversed(self._parts) if moment >= start)
        return moment - self.began - cut


def timeline(search: _figures.Search) -> Figure:
    """A lane for each process, with a bar for each trial that it ran."""
    bars = sorted(_bars(search.record.rows), key=lambda bar: bar.began)
    needs(bars, "no trial has begun")
    clock = _Clock(bars)
    lanes, notes = _lanes(bars)
    unit, word = _unit(clock.length)
    left_out = max(0, len(bars) - _MOST_BARS)
    if left_out:
        notes.append(f"Shows the last {_MOST_BARS} runs; {left_out} are left out.")
    shown = {id(bar) for bar in bars[-_MOST_BARS:]}
    scale = _scales.Numbers(0, clock.length / unit, margin=0)
    bottom = 6 + _LANE * len(lanes)
    items = []
    for place, text in scale.ticks(9):
        x = _across(place)
        items.append(f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>')
        items.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
    for number, (name, lane) in enumerate(lanes):
        y = 6 + _LANE * number
        short = name if len(name) <= 30 else "…" + name[-29:]
        full = f"<title>{html.escape(name)}</title>" if short != name else ""
        at = f'x="{_LEFT - 8}" y="{y + 13}"'
        items.append(f'<text {at} text-anchor="end">{html.escape(short)}{full}</text>')
        for bar in lane:
            if id(bar) not in shown:
                continue
            start, end = (
                _across(scale.position(clock.seconds(t) / unit)) for t in (bar.began, bar.ended)
            )
            took = f"{search.titles[bar.row.trial]}; {bar.ended - bar.began:.1f} s"
            items.append(
                f'<rect class="run {search.kind(bar.row)}" x="{start:.1f}" y="{y + 2}" '
                f'width="{max(end - start - 0.4, 0.8):.1f}" height="{_LANE - 4}">'
                f"<title>{took}</title></rect>"
            )
    for moment, length in clock.pauses:
        x = _across(scale.position(moment / unit))
        items.append(
            f'<path class="pause" d="M{x:.1f} 2V{bottom}"><title>pause of '
            f"{_span(length)}</title></path>"
        )
    start_of = datetime.datetime.fromtimestamp(clock.began).astimezone()
    items.append(
        f'<text class="name" x="{(_LEFT + _WIDTH) / 2}" y="{bottom + 32}" '
        f'text-anchor="middle">{word} since {start_of.isoformat(" ", "seconds")}</text>'
    )
    if clock.pauses:
        total = _span(sum(length for _, length in clock.pauses))
        notes.append(f"At the dashed lines, {total} in which no process worked are cut out.")
    if not all(bar.process for bar in bars):
        notes.append("Older searches did not record which process ran a trial.")
    title = "Timeline of processes"
    return Figure(title, [_svg.svg(_WIDTH, bottom + 38, title, items)], notes, "wide")


def _across(place: float) -> float:
    return _LEFT + place * (_WIDTH - _LEFT - 20)


def _bars(rows: Iterable[_record.Row]) -> Iterator[_Bar]:
    now = datetime.datetime.now().timestamp()
    for row in rows:
        for run in row.runs:
            ended = now if run.ended is None else run.ended
            # Clocks of several machines need not agree.
            yield _Bar(row, run.process, run.began, max(run.began, ended))


def _name(process: str) -> str:
    if not process:
        return "not recorded"
    machine, pid, *_ = process.split("|")
    return f"{machine.split('/')[0]}, process {pid}"


def _lanes(bars: list[_Bar]) -> tuple[list[tuple[str, list[_Bar]]], list[str]]:
    """The bars of each lane with its name, and what is to be said about them."""
    by_process: dict[str, list[_Bar]] = {}
    for bar in bars:
        by_process.setdefault(bar.process, []).append(bar)
    unknown = by_process.pop("", [])
    named = [(_name(process), lane) for process, lane in by_process.items()]
    notes = []
    if len(named) > _MOST_PROCESSES:
        packed = _packed([group for _, group in named])
        named = [(f"several processes, {i + 1}", lane) for i, lane in enumerate(packed)]
        notes.append("Processes that followed one another share a lane.")
    named += [("not recorded", lane) for lane in _packed([[bar] for bar in unknown])]
    if len(named) > _MOST_LANES:
        notes.append(f"Shows {_MOST_LANES} of {len(named)} lanes.")
    return named[:_MOST_LANES], notes


def _packed(groups: list[list[_Bar]]) -> list[list[_Bar]]:
    """Lanes of bars that do not overlap; groups stay together."""
    lanes: list[list[_Bar]] = []
    for group in groups:
        began = group[0].began
        lane = next((lane for lane in lanes if lane[-1].ended <= began), None)
        if lane is None:
            lanes.append(list(group))
        else:
            lane += group
    return lanes


def _unit(seconds: float) -> tuple[float, str]:
    for unit, word in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return unit, word
    return 1.0, "seconds"


def _span(seconds: float) -> str:
    unit, word = _unit(seconds)
    return f"{seconds / unit:.3g} {word}"
