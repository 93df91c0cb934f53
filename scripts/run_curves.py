"""curves.png of a run."""

import importlib.util
import math


def can_draw():
    """Whether matplotlib is there, without which a run leaves no pictures."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(recorder, task, title, path):
    """Plots the history of a run.

    Args:
        recorder: `Recorder` with at least one epoch.
        task: `Task`, which says what is plotted and what was to be reached.
        title: str.
        path: Where the PNG goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = len(task.curves) + bool(recorder.scales)
    figure, axes = pyplot.subplots(1, panels, figsize=(4.4 * panels, 3.8), layout="constrained")
    epochs = [logs["epoch"] + 1 for logs in recorder.epochs]
    marker = "o" if len(epochs) == 1 else None
    for axis, name in zip(axes, task.curves, strict=False):
        for prefix, label in (("", "training"), ("val_", "validation")):
            if prefix + name in recorder.epochs[-1]:
                values = [logs.get(prefix + name, math.nan) for logs in recorder.epochs]
                axis.plot(epochs, values, label=label, marker=marker)
        axis.set(title=_words(name), xlabel="epoch")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    last = recorder.epochs[-1][task.measure]
    judged = axes[task.curves.index(task.measure.removeprefix("val_"))]
    judged.axhline(task.bar, color="tab:gray", linestyle=":")
    judged.annotate(
        f"validation {last:.4f}, bar {task.bar:.4g}",
        (epochs[-1], last),
        xytext=(0, 14 if task.lower_is_better else -14),
        textcoords="offset points",
        ha="right",
    )
    if recorder.scales:
        _plot_scale(axes[-1], recorder.scales)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _words(name):
    return name.replace("_", " ").capitalize()


def _plot_scale(axis, scales):
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
    # A scale that never moved would otherwise fill the axis with nothing.
    axis.set_ylim(min(values) / 4, max(values) * 4)
    title = f"Loss scale (x: {skipped[-1]} skipped)" if skips else "Loss scale (no skipped update)"
    axis.set(title=title, xlabel="update")
    axis.grid(alpha=0.3)
