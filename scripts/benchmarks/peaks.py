"""Memory and time of updates that do the same in two ways, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

__all__ = ("measure",)


def measure(updates: list[Callable[[], object]], repetitions: int) -> list[tuple[float, float]]:
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
