"""Charts as SVG, which a page contains as text: no library, no network, and hovers of its own."""

import html
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from tfbig.tuners import _scales

__all__ = ("Chart", "color", "mark")

# Pixels.
Point: TypeAlias = tuple[float, float]

# The average width of a letter in the 11 px font of labels.
_LETTER = 6.0
# The longest label of a tick, in pixels.
_LONGEST = 84.0
# The height of the lane of points without a value: three rows, so that failed, infeasible and other
# trials with the same value do not cover each other.
_LANE = 33
_LANE_ROWS = {"infeasible": 0.2, "failed": 0.8}
_NO_VALUE = "no value"

# From the best to the worst; also told apart by those who do not see all colors, and in print.
_COLORS = ("#2d1160", "#4b2991", "#7b2d8e", "#a8327d", "#d0416f", "#ee605e", "#f98e60", "#fbbe7c")


def color(place: float) -> str:
    """A color for a place from 0, the best, to 1, the worst."""
    return _COLORS[min(int(place * len(_COLORS)), len(_COLORS) - 1)]


def mark(x: float, y: float, kind: str, attributes: str = "") -> str:
    """The start of the mark of a trial of some status, without its end tag.

    Marks differ in shape, not only in color.
    """
    start = f'<path class="{kind}"{attributes} d="M'
    if kind == "pruned":
        return f'{start}{x:.1f} {y - 3.5:.1f}l4 7h-8z">'
    if kind == "infeasible":
        return f'{start}{x:.1f} {y - 4:.1f}l4 4-4 4-4-4z">'
    if kind == "failed":
        return f'{start}{x - 3:.1f} {y - 3:.1f}l6 6m0-6l-6 6">'
    return f'{start}{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0-6 0">'


class Chart:
    """A chart with two axes.

    Args:
        x: The horizontal axis.
        y: The vertical axis.
        labels: What the axes show.
        size: Width and height in pixels.
        has_lane: Whether there is a lane at the bottom for points without a value.
    """

    def __init__(
        self,
        x: _scales.Scale,
        y: _scales.Scale,
        labels: tuple[str, str],
        size: tuple[int, int] = (410, 280),
        has_lane: bool = False,
    ) -> None:
        self._x, self._y = x, y
        self._size = size
        self._behind: list[str] = []
        self._items: list[str] = []
        width, height = size
        self._y_ticks = y.ticks(max(2, height // 45))
        beside = [text for _, text in self._y_ticks] + [_NO_VALUE] * has_lane
        self.left = 30 + max(map(_wide, beside), default=0)
        self.right, self.top = width - 12.0, 10.0
        self._x_ticks, self._is_turned = self._fitting(self.right - self.left)
        under = 38 + (0.6 * self._longest_x() if self._is_turned else 0)
        self.bottom = height - under - has_lane * _LANE
        self._frame(labels, has_lane)

    def _fitting(self, room: float) -> tuple[list[_scales.Tick], bool]:
        """Horizontal ticks whose labels do not overlap, and whether labels are turned."""
        for most in (7, 6, 5, 4, 3, 2):
            ticks = self._x.ticks(most)
            if isinstance(self._x, _scales.Categories):
                ticks = self._x.ticks(max(1, int(room / 14)))
            if self._are_apart(ticks, room):
                return ticks, False
            if isinstance(self._x, _scales.Categories):
                return ticks, True
        return ticks[:1], False

    def _are_apart(self, ticks: list[_scales.Tick], room: float) -> bool:
        """Whether no label of horizontal ticks is nearer than a few pixels to the next."""
        middles = [self._middle(self.left + place * room, text) for place, text in ticks]
        labels = zip(middles, (text for _, text in ticks), strict=True)
        return all(
            b - a >= (_wide(left) + _wide(right)) / 2 + 8
            for (a, left), (b, right) in itertools.pairwise(labels)
        )

    def _middle(self, x: float, text: str) -> float:
        """Where the middle of a label under an axis is, which may not leave the chart."""
        return min(x, self._size[0] - _wide(text) / 2)

    def _longest_x(self) -> float:
        return max(_wide(text) for _, text in self._x_ticks)

    # --- The frame ---

    def _frame(self, labels: tuple[str, str], has_lane: bool) -> None:
        frame = self._behind
        for place, text in self._y_ticks:
            y = self._down(place)
            frame.append(
                f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right:.1f}"/>'
                + _label(self.left - 5, y + 4, text, "end")
            )
        low = self.bottom + has_lane * _LANE
        for place, text in self._x_ticks:
            x = self._across(place)
            frame.append(f'<path class="grid" d="M{x:.1f} {self.top}V{low:.1f}"/>')
            turned = f' transform="rotate(-35 {x:.1f} {low + 14:.1f})"' if self._is_turned else ""
            anchor = "end" if self._is_turned else "middle"
            if not self._is_turned:
                x = self._middle(x, text)
            frame.append(_label(x, low + 15, text, anchor, turned))
        if has_lane:
            middle = self.bottom + _LANE / 2 + 4
            frame.append(_label(self.left - 5, middle, _NO_VALUE, "end"))
            frame.append(
                f'<path class="lane" d="M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}"/>'
            )
        middle = (self.left + self.right) / 2
        frame.append(_name(middle, self._size[1] - 4, labels[0], "", self.right - self.left))
        y = (self.top + self.bottom) / 2
        turn = f' transform="rotate(-90 12 {y:.1f})"'
        frame.append(_name(12, y, labels[1], turn, self.bottom - self.top))

    def _across(self, place: float) -> float:
        return self.left + place * (self.right - self.left)

    def _down(self, place: float) -> float:
        return self.bottom - place * (self.bottom - self.top)

    def at(self, x: object, y: object) -> Point:
        """Where a point lies."""
        return self._across(self._x.position(x)), self._down(self._y.position(y))

    # --- What it shows ---

    def add(self, item: str) -> None:
        """Adds an element."""
        self._items.append(item)

    def put_behind(self, item: str) -> None:
        """Adds an element behind all others."""
        self._behind.insert(0, item)

    def point(
        self, x: object, y: object | None, kind: str, title: str, fill: str | None = None
    ) -> None:
        """Adds the mark of a trial.

        Args:
            x: Its value on the horizontal axis.
            y: Its value on the vertical axis; None for the lane of points without one, in which
                each status has its row.
            kind: The status of the trial.
            title: What a pointer over it shows, escaped.
            fill: A color instead of that of the status.
        """
        style = f' style="fill:{fill}"' if fill else ""
        at = self.bottom + _LANE * _LANE_ROWS.get(kind, 0.5)
        if y is not None:
            at = self._down(self._y.position(y))
        across = self._across(self._x.position(x))
        self.add(f"{mark(across, at, kind, style)}<title>{title}</title></path>")

    def line(self, points: Sequence[Point], kind: str, title: str = "", style: str = "") -> None:
        """Adds a line through points in pixels."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        shown = f"<title>{title}</title>" if title else ""
        style = f' style="{style}"' if style else ""
        self.add(f'<path class="line {kind}"{style} d="M{path}">{shown}</path>')

    def render(self, title: str) -> str:
        """The chart as an element of a page."""
        width, height = self._size
        return svg(width, height, title, [*self._behind, *self._items])


def svg(width: float, height: float, title: str, items: Iterable[str]) -> str:
    """An SVG element, which is never drawn larger than this, or than the page is wide."""
    # The style sheet knows no attributes of elements.
    style = f"--width:{width:g}px;max-width:{width:g}px"
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="{style}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(items)}</svg>'
    )


def _wide(text: str) -> float:
    """How wide the label of a tick is, in pixels."""
    return min(len(text) * _LETTER, _LONGEST)


def _label(x: float, y: float, text: str, anchor: str, attributes: str = "") -> str:
    most = int(_LONGEST / _LETTER)
    short = text if len(text) <= most else text[: most - 1] + "…"
    full = f"<title>{html.escape(text)}</title>" if short != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>'
        f"{html.escape(short)}{full}</text>"
    )


def _name(x: float, y: float, text: str, attributes: str, room: float) -> str:
    most = max(int(room / (_LETTER + 0.5)), 4)
    short = text if len(text) <= most else text[: most - 1] + "…"
    full = f"<title>{html.escape(text)}</title>" if short != text else ""
    return (
        f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="middle"{attributes}>'
        f"{html.escape(short)}{full}</text>"
    )
