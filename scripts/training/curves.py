"""curves.png of a run."""

from __future__ import annotations

import importlib.util
import math
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tasks.task import Task

    from training.history import Recorder


def can_draw() -> bool:
    """Whether matplotlib is installed, without which a run leaves no pictures."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(recorder: Recorder, task: Task, title: str, path: pathlib.Path) -> None:
    """Plots the history of a run.

    Args:
        recorder: Has at least one epoch.
        task: Says what is plotted, and the bar.
        title: Of the whole picture.
        path: Where the PNG goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = len(task.curves) + bool(recorder.scales)
    figure, axes = pyplot.subplots(1, panels, figsize=(4.4 * panels, 3.8), layout="constrained")
    for axis, name in zip(axes, task.curves, strict=False):
        _plot_curve(axis, name, recorder)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    _mark_bar(axes[task.curves.index(task.measure.removeprefix("val_"))], recorder, task)
    if recorder.scales:
        _plot_scale(axes[-1], recorder.scales)
    _save(figure, title, path)


def _save(figure: Figure, title: str, path: pathlib.Path) -> None:
    from matplotlib import pyplot

    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_curve(axis: Axes, name: str, recorder: Recorder) -> None:
    """Training and validation of one number of the logs."""
    from matplotlib import ticker

    epochs = [logs["epoch"] + 1 for logs in recorder.epochs]
    marker = "o" if len(epochs) == 1 else None
    for prefix, label in (("", "training"), ("val_", "validation")):
        if prefix + name in recorder.epochs[-1]:
            values = [logs.get(prefix + name, math.nan) for logs in recorder.epochs]
            axis.plot(epochs, values, label=label, marker=marker)
    axis.set(title=_words(name), xlabel="epoch")
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def _mark_bar(axis: Axes, recorder: Recorder, task: Task) -> None:
    last = recorder.epochs[-1]
    value = last[task.measure]
    axis.axhline(task.bar, color="tab:gray", linestyle=":")
    axis.annotate(
        f"validation {value:.4f}, bar {task.bar:.4g}",
        (last["epoch"] + 1, value),
        xytext=(0, 14 if task.lower_is_better else -14),
        textcoords="offset points",
        ha="right",
    )


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _plot_scale(axis: Axes, scales: list[tuple[int, float, int]]) -> None:
    tried, values, skipped = zip(*scales, strict=True)
    axis.step(tried, values, where="post", color="tab:green")
    pairs = zip(skipped, (0, *skipped[:-1]), strict=True)
    skips = [i for i, (now, before) in enumerate(pairs) if now > before]
    axis.plot(
        [tried[i] for i in skips],
        [values[i] for i in skips],
        "x",
        color="tab:red",
    )
    axis.set_yscale("log", base=2)
    # The limits of a scale that never moved would otherwise coincide.
    axis.set_ylim(min(values) / 4, max(values) * 4)
    title = f"Loss scale (x: {skipped[-1]} skipped)" if skips else "Loss scale (no skipped update)"
    axis.set(title=title, xlabel="update")
    axis.grid(alpha=0.3)
