"""The plot of a `CoordinateCheck`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfbig.mup._coordinate_check import Coordinates

__all__ = ("draw",)


def draw(rows: Sequence[Coordinates], path: str | os.PathLike[str]) -> None:
    """Draws sizes and changes over the width.

    Args:
        rows: the measurements.
        path: path of the file, a PNG whatever its name.
    """
    # Not pyplot, which would open a window and count among the user's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    updates = sorted({row.update for row in rows})
    layers = list(dict.fromkeys(row.layer for row in rows))
    figure = Figure(figsize=(3.2 * len(updates), 6), layout="constrained")
    FigureCanvasAgg(figure)
    for column, update in enumerate(updates):
        for line, of in enumerate(("size", "change")):
            axes = figure.add_subplot(2, len(updates), line * len(updates) + column + 1)
            for layer in layers:
                points = [
                    (row.width, getattr(row, of))
                    for row in rows
                    if (row.layer, row.update) == (layer, update) and getattr(row, of) > 0
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=layer)
            axes.set_title(f"{of}, {update} updates", fontsize=10)
            axes.set_xscale("log", base=2)
            if axes.lines:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            if line:
                axes.set_xlabel("width")
            if not column and not line:
                axes.legend(fontsize=7)
    figure.savefig(path, dpi=100, format="png")
