"""The bars of benchmark.py's table as a PNG."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from benchmarks.rows import OF_TFBIG, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = {
    "samples/s": ("samples_per_second", "samples_per_second_min", "samples_per_second_max"),
    "first update, s": ("first_update_seconds", None, None),
    "growth of peak memory, MiB": ("growth_mib", None, None),
}


def draw(rows: list[Row], path: pathlib.Path | str) -> bool:
    """Draws the measured rows: a line of diagrams for each model.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.summary()]
    models = list(dict.fromkeys(row.task.model for row in rows))
    if not models:
        return False
    own = {model: [row for row in rows if row.task.model == model] for model in models}
    heights = [0.8 + 0.25 * len(own[model]) for model in models]
    figure, grid = pyplot.subplots(
        len(models),
        len(_COLUMNS),
        figsize=(14, sum(heights) + 0.4),
        squeeze=False,
        sharey="row",
        height_ratios=heights,
        layout="constrained",
    )
    for model, line in zip(models, grid, strict=True):
        for (title, keys), axes in zip(_COLUMNS.items(), line, strict=True):
            _bars(axes, own[model], *keys)
            axes.set_title(f"{model}: {title}", fontsize=10)
        line[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _bars(axes: Axes, rows: list[Row], key: str, low: str | None, high: str | None) -> None:
    labels = [f"{row.title}, K={row.task.gradient_accumulation_steps}" for row in rows]
    values = [row.summary()[key] for row in rows]
    spread = None
    if low is not None and high is not None:
        spread = [
            [v - row.summary()[low] for v, row in zip(values, rows, strict=True)],
            [row.summary()[high] - v for v, row in zip(values, rows, strict=True)],
        ]
    colours = ["C1" if row.name in OF_TFBIG else "C0" for row in rows]
    bars = axes.barh(labels, values, xerr=spread, color=colours, ecolor="black", capsize=2)
    axes.bar_label(bars, fmt="{:,.1f}", padding=4, fontsize=8)
    axes.margins(x=0.15)
    axes.tick_params(labelsize=8)
