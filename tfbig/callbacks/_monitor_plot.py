"""The page of plots of a `TrainingMonitor`."""

import math
import os
from collections.abc import Sequence
from typing import Any

from tfbig.callbacks import _goodput_file, _monitor_file

__all__ = ("draw",)

# Title, columns, and whether the axis is logarithmic; drawn if there are numbers.
_PANELS = (
    ("loss", ("loss",), False),
    ("loss scale", ("loss_scale",), True),
    ("skipped updates", ("skipped_updates",), False),
    ("gradient norm", ("grad_norm",), True),
    ("gradient noise scale, samples", ("gradient_noise_scale",), True),
    ("samples per second", ("samples_per_second",), False),
    ("tokens per second", ("tokens_per_second",), False),
    ("share of what the devices could compute", ("mfu", "hfu"), False),
    ("seconds of an update", ("update_seconds", "input_seconds"), False),
    ("bubble: share for which stages wait", ("bubble",), False),
    ("learning rate", ("learning_rate",), False),
    ("peak memory, MiB", ("device_mib", "host_mib", "state_mib"), False),
)

# Of the shares of the wall time, in their order; the time lost stands out from what counts.
_COLORS = (
    *("#2ca02c", "#1f77b4", "#d62728", "#9467bd", "#17becf", "#ff7f0e", "#8c564b", "#c7c7c7"),
)

# Smaller shares are not drawn.
_SEEN = 0.002

_WIDTH, _HEIGHT, _COLUMNS = 4.5, 2.6, 3


def draw(
    rows: Sequence[_monitor_file.Row],
    path: str | os.PathLike[str],
    goodput: Sequence[_monitor_file.Row] = (),
) -> None:
    """Draws the columns of the rows over the updates.

    Args:
        rows: the rows of a `TrainingMonitor`.
        path: path of the file, a PNG whatever its name.
        goodput: the rows of its goodput.
    """
    # Not pyplot, which would open a window and count among the user's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def numbers(name: str) -> list[tuple[int, float]]:
        pairs = [(row["update"], row.get(name)) for row in rows]
        return [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]

    panels = [
        (title, drawn, is_logarithmic)
        for title, names, is_logarithmic in _PANELS
        if (drawn := {name: found for name in names if (found := numbers(name))})
    ]
    number = len(panels) + bool(goodput)
    height = math.ceil(number / _COLUMNS)
    figure = Figure(figsize=(_WIDTH * _COLUMNS, _HEIGHT * height), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, drawn, is_logarithmic) in enumerate(panels):
        axes = figure.add_subplot(height, _COLUMNS, i + 1)
        for name, pairs in drawn.items():
            label = {"update_seconds": "all", "input_seconds": "waiting for data"}.get(name, name)
            axes.plot(*zip(*pairs, strict=True), marker="." if len(pairs) < 30 else "", label=label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if is_logarithmic and all(y > 0 for pairs in drawn.values() for _, y in pairs):
            axes.set_yscale("log")
        elif len(drawn) > 1:
            axes.set_ylim(bottom=0)
        if len(drawn) > 1:
            axes.legend(fontsize=8)
        if i >= number - _COLUMNS:
            axes.set_xlabel("update")
    if goodput:
        _draw_shares(figure.add_subplot(height, _COLUMNS, number), goodput)
    figure.savefig(path, dpi=100, format="png")


def _draw_shares(axes: Any, rows: Sequence[_monitor_file.Row]) -> None:  # Any: of Matplotlib.
    """Where the wall time went so far, stacked."""
    # A single row is drawn from the beginning.
    updates = [0, *(row["update"] for row in rows)]
    shown = [n for n in _goodput_file.SHARES if any(row[n] >= _SEEN for row in rows)]
    values = [[rows[0][name], *(row[name] for row in rows)] for name in shown]
    colors = [_COLORS[_goodput_file.SHARES.index(name)] for name in shown]
    last = rows[-1]
    labels = [f"{n} {last[n]:.0%}" for n in shown]
    axes.stackplot(updates, values, labels=labels, colors=colors)
    axes.set_title("share of the wall time so far", fontsize=10)
    axes.set_ylim(0, 1)
    axes.set_xlabel("update")
    axes.legend(fontsize=7, loc="upper right", reverse=True)
