"""Memory and time of updates that do the same in two ways, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeAlias

__all__ = ("COLUMNS", "Measured", "in_columns", "measure")

# MiB at the peak of an update, and its seconds.
Measured: TypeAlias = tuple[float, float]

# The names of what `in_columns` returns.
COLUMNS = ("at once, MiB", "in chunks, MiB", "ratio", "ratio of time")


def in_columns(whole: Measured, chunked: Measured, digits: int) -> tuple[str, ...]:
    """The cells of a row that compares an update made at once with one in chunks.

    Args:
        whole: of the first.
        chunked: of the second.
        digits: of the ratio of the peaks, after the point.
    """
    return (
        f"{whole[0]:.0f}",
        f"{chunked[0]:.0f}",
        f"{chunked[0] / whole[0]:.{digits}f}",
        f"{chunked[1] / whole[1]:.2f}",
    )


def measure(updates: list[Callable[[], object]], repetitions: int) -> list[Measured]:
    """MiB at the peak and median seconds of updates, made in turn.

    Args:
        updates: functions that make an update, each made once already.
        repetitions: updates to take the time of.

    Returns:
        For each, what TensorFlow's allocator counts at the peak of an update beyond what was there
        before, and its time.
    """
    from tfbig._keras import memory

    meter = memory.Meter(["CPU:0"])
    peaks = [meter(update) / 2**20 for update in updates]
    seconds: list[list[float]] = [[] for _ in updates]
    for _ in range(repetitions):
        for taken, update in zip(seconds, updates, strict=True):
            start = time.perf_counter()
            update()
            taken.append(time.perf_counter() - start)
    return list(zip(peaks, map(statistics.median, seconds), strict=True))
