"""The plots of a search, as HTML."""

import base64
import html
import importlib.util
import io
from typing import Any

import optuna
from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import _results

__all__ = ("figures",)


class _NothingToDraw(Exception):  # noqa: N818
    """Why a plot is left out."""


def _plots(study, names):
    """Pairs of a title and a function that draws with matplotlib and returns what it drew on."""
    import numpy as np
    from matplotlib import ticker

    draw: Any = optuna.visualization.matplotlib
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    reported = [t for t in study.get_trials(deepcopy=False) if t.intermediate_values]
    has_params = any(t.params for t in complete)

    def needs(condition, why):
        if not condition:
            raise _NothingToDraw(why)

    def needs_complete():
        needs(complete, "no trial is complete yet")

    def history(target, name):
        needs_complete()
        return draw.plot_optimization_history(study, target=target, target_name=name)

    def slices(target, name):
        needs_complete()
        needs(has_params, "there is no hyperparameter to search")
        axes = draw.plot_slice(study, target=target, target_name=name)
        for axis in np.ravel(axes):
            axis.tick_params(axis="x", labelrotation=30)
            # Of a logarithmic axis they would stand upon each other.
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        return axes

    def weights(i):
        needs(len(complete) > 1, "it needs at least 2 complete trials")
        try:
            shares = _results.shares_in(study, i)
        except errors.InvalidOptionError as e:
            raise _NothingToDraw(str(e).rstrip(".")) from None
        needs(shares, "there is no hyperparameter that all complete trials have")
        return _draw_shares(shares)

    def coordinates():
        needs_complete()
        needs(has_params, "there is no hyperparameter to search")
        axes = draw.plot_parallel_coordinate(study, target_name=names[0])
        count = len(names) + len({name for t in complete for name in t.params})
        axes.figure.set_size_inches(max(6.4, 1.8 * count), 5)
        return axes

    def rungs():
        needs(len(names) == 1, "of several objectives no values are reported in between")
        needs(reported, "no trial reported values after its epochs")
        axes = draw.plot_intermediate_values(study)
        axes.set(xlabel="epoch", ylabel=names[0])
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if len(reported) > 20 and (legend := axes.get_legend()) is not None:
            legend.remove()
        return axes

    def front():
        needs_complete()
        needs(len(names) <= 3, f"there are {len(names)} objectives, and it can show 3")
        return draw.plot_pareto_front(study, target_names=names)

    if len(names) > 1:
        yield "Pareto front", front
    for i, name in enumerate(names):
        target = None if len(names) == 1 else lambda trial, i=i: trial.values[i]
        of = "" if len(names) == 1 else f" of {name}"
        yield f"Optimization history{of}", lambda t=target, n=name: history(t, n)
        yield f"Importance for {name}", lambda i=i: weights(i)
        yield f"Slices{of}", lambda t=target, n=name: slices(t, n)
    yield "Parallel coordinates", coordinates
    yield "Rungs: the objective after each epoch", rungs


def _draw_shares(shares):
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6.4, 1 + 0.4 * len(shares)))
    bars = axes.barh(list(reversed(shares)), list(reversed(shares.values())))
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlabel="share of the variance (fANOVA)", xlim=(0, 1.1))
    return axes


def _png(draw):
    """What a function draws, as the bytes of a PNG."""
    import matplotlib
    import numpy as np
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    # Optuna sets a style for all figures of the process; a notebook would show each.
    with matplotlib.rc_context(), pyplot.ioff():
        try:
            axes = np.ravel(draw())
            # The page has its own titles.
            axes[0].set_title("")
            axes[0].figure.suptitle("")
            data = io.BytesIO()
            axes[0].figure.savefig(data, format="png", dpi=100, bbox_inches="tight")
        finally:
            for number in set(pyplot.get_fignums()) - before:
                pyplot.close(number)
    return data.getvalue()


def figures(study, names):
    """The plots as HTML; where there is none, a sentence that says why."""
    if importlib.util.find_spec("matplotlib") is None:
        yield "<p>The plots are left out: they need matplotlib. pip install tfbig[plots]</p>"
        return
    for title, draw in _plots(study, names):
        title = html.escape(title)
        try:
            data = base64.b64encode(_png(draw)).decode()
            shown = f'<img alt="{title}" src="data:image/png;base64,{data}">'
        except _NothingToDraw as e:
            shown = f"<p>Left out: {html.escape(str(e))}.</p>"
        except Exception as e:
            # A page without one plot is worth more than none.
            why = f"it could not be drawn ({type(e).__name__}: {e})"
            shown = f"<p>Left out: {html.escape(why)}.</p>"
        yield f"<h3>{title}</h3>\n{shown}"
