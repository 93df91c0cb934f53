"""The axes of a plot: where a value lies, and which ticks there are."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np

from tfbig.tuners import _progress, _tuner_types

__all__ = ("Categories", "Numbers", "Scale", "Tick", "numbers_for")

# A position from 0 to 1, and a label.
Tick: TypeAlias = tuple[float, str]

# Beyond these, differences overflow.
_LARGEST, _MOST_DECADES = 1e300, 300

# Positive values that differ by more than this factor are shown on a logarithmic axis.
_LOG_FROM = 50


class Scale(Protocol):
    """An axis."""

    def position(self, value: _tuner_types.Value) -> float:
        """Where a value lies, from 0 to 1."""

    def ticks(self, most: int) -> list[Tick]:
        """Not many more ticks than `most`."""


class Numbers:
    """An axis of numbers.

    Args:
        low: The value at its start.
        high: The value at its end.
        is_log: Whether it is logarithmic.
        margin: The part of the axis that is left free at both ends.
        is_whole: Whether there is nothing between whole numbers.

    Attributes:
        beyond: How many of the values that it was made for lie beyond its ends.
        is_empty: Whether there are no values to show, and so no ticks.
    """

    def __init__(
        self,
        low: float,
        high: float,
        is_log: bool = False,
        margin: float = 0.04,
        is_whole: bool = False,
    ) -> None:
        self._is_log = is_log and low > 0
        self._least_step = 1.0 if is_whole else 0.0
        self.beyond = 0
        self.is_empty = False
        start, end = self._inner(low), self._inner(high)
        # Ticks of a narrower axis could not be told apart.
        if not end - start > max(1e-290, 1e-13 * max(abs(start), abs(end))):
            around = 0.5 if self._is_log else abs(start) * 0.1 or 0.5
            start, end = start - around, end + around
        free = (end - start) * margin
        self._start, self._end = start - free, end + free

    def _inner(self, value: float) -> float:
        value = min(max(float(value), -_LARGEST), _LARGEST)
        return math.log10(value) if self._is_log else value

    def position(self, value: _tuner_types.Value) -> float:
        if self._is_log and value <= 0:
            return 0.0
        found = (self._inner(value) - self._start) / (self._end - self._start)
        return min(max(found, 0.0), 1.0)

    def ticks(self, most: int) -> list[Tick]:
        if self.is_empty:
            return []
        values = self._decades(most) if self._is_log else self._steps(most)
        inside = [(v, self._inner(v)) for v in values]
        return [
            (self.position(v), _progress.shown(v))
            for v, inner in inside
            if self._start <= inner <= self._end
        ]

    def _steps(self, most: int) -> list[float]:
        rough = max((self._end - self._start) / max(most, 1), self._least_step)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * 0.999)
        first = math.ceil(self._start / step)
        count = int((self._end - self._start) / step) + 1
        digits = 1 - math.floor(math.log10(step))
        found = [round((first + i) * step, digits) if digits < 300 else 0.0 for i in range(count)]
        # Whole numbers without a point, and no -0.
        return [int(v) if v == int(v) and abs(v) < 1e6 else v for v in found]

    def _decades(self, most: int) -> list[float]:
        first, last = math.floor(self._start), math.ceil(self._end)
        powers = range(max(first, -_MOST_DECADES), min(last, _MOST_DECADES) + 1)
        if self._end - self._start < 0.5:
            # A log axis over less than half a decade is nearly linear.
            is_whole = self._least_step > 0
            linear = Numbers(10**self._start, 10**self._end, margin=0, is_whole=is_whole)
            return linear._steps(most)
        inside = [p for p in powers if self._start <= p <= self._end]
        if len(inside) >= 3 or most < 3:
            return [10.0**p for p in inside[:: max(1, math.ceil(len(inside) / max(most, 1)))]]
        wanted = (1, 2, 5) if self._end - self._start < 2 else (1, 3)
        return [n * 10.0**p for p in powers for n in wanted]


def numbers_for(values: Iterable[float]) -> Numbers:
    """An axis on which most values can be told apart, also if a few are far away.

    Args:
        values: Those that are finite count.
    """
    found = np.clip([v for v in values if math.isfinite(v)], -_LARGEST, _LARGEST)
    if not found.size:
        scale = Numbers(0, 1)
        scale.is_empty = True
        return scale
    low, high = float(found.min()), float(found.max())
    is_log = low > 0 and high / low > _LOG_FROM
    inner = np.log10(found) if is_log else found / 4
    first, last = np.quantile(inner, [0.1, 0.9])
    reach = 3 * (last - first)
    if reach > 0:
        kept = found[(inner >= first - reach) & (inner <= last + reach)]
        low, high = float(kept.min()), float(kept.max())
    scale = Numbers(low, high, is_log)
    scale.beyond = int(((found < low) | (found > high)).sum())
    return scale


class Categories:
    """An axis of texts.

    Args:
        texts: All of them, in order.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self._places = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}

    def position(self, value: _tuner_types.Value) -> float:
        return self._places[value]

    def ticks(self, most: int) -> list[Tick]:
        step = max(1, math.ceil(len(self.texts) / max(most, 1)))
        return [(self._places[text], text) for text in self.texts[::step]]
