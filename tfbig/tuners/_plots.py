"""The plots of a search, as HTML."""

import base64
import functools
import html
import importlib.util
import io
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from tfbig import errors
from tfbig.tuners import _results

__all__ = ("figures",)

# matplotlib's axes, one or an array of them; it is imported only if it is installed.
_Axes: TypeAlias = Any
_Draw: TypeAlias = Callable[[], _Axes]
_Target: TypeAlias = Callable[[FrozenTrial], float] | None


class _NothingToDraw(Exception):  # noqa: N818
    """Says why a plot is left out."""


def _plots(study: optuna.Study, names: list[str]) -> Iterator[tuple[str, _Draw]]:
    """Pairs of a title and a function that draws with matplotlib and returns the axes."""
    plots = _Plots(study, names)
    if len(names) > 1:
        yield "Pareto front", plots.front
    for i, name in enumerate(names):
        of = "" if len(names) == 1 else f" of {name}"
        yield f"Optimization history{of}", functools.partial(plots.history, i)
        yield f"Importance for {name}", functools.partial(plots.importance, i)
        yield f"Slices{of}", functools.partial(plots.slices, i)
    yield "Parallel coordinates", plots.coordinates
    yield "Rungs: the objective after each epoch", plots.rungs


def _needs(condition: object, why: str) -> None:
    if not condition:
        raise _NothingToDraw(why)


class _Plots:
    """Draws the plots of a study; each method raises `_NothingToDraw` if it cannot.

    Args:
        study: From `_results.study_of`.
        names: The names of the objectives.
    """

    def __init__(self, study: optuna.Study, names: list[str]) -> None:
        self._study = study
        self._names = names
        # Untyped, as matplotlib's axes are.
        self._optuna: Any = optuna.visualization.matplotlib
        self._complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self._has_params = any(t.params for t in self._complete)

    def _needs_complete(self) -> None:
        _needs(self._complete, "no trial is complete yet")

    def _target(self, i: int) -> _Target:
        """How Optuna finds the value of an objective; None if there is only one."""
        return None if len(self._names) == 1 else lambda trial: trial.values[i]

    def history(self, i: int) -> _Axes:
        self._needs_complete()
        return self._optuna.plot_optimization_history(
            self._study, target=self._target(i), target_name=self._names[i]
        )

    def slices(self, i: int) -> _Axes:
        import numpy as np
        from matplotlib import ticker

        self._needs_complete()
        _needs(self._has_params, "there is no hyperparameter to search")
        axes = self._optuna.plot_slice(
            self._study, target=self._target(i), target_name=self._names[i]
        )
        for axis in np.ravel(axes):
            axis.tick_params(axis="x", labelrotation=30)
            # On a logarithmic axis, minor labels would overlap.
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        return axes

    def importance(self, i: int) -> _Axes:
        _needs(len(self._complete) > 1, "it needs at least 2 complete trials")
        try:
            shares = _results.shares_in(self._study, i)
        except errors.InvalidOptionError as e:
            raise _NothingToDraw(str(e).rstrip(".")) from None
        _needs(shares, "there is no hyperparameter that all complete trials have")
        return _draw_shares(shares)

    def coordinates(self) -> _Axes:
        self._needs_complete()
        _needs(self._has_params, "there is no hyperparameter to search")
        axes = self._optuna.plot_parallel_coordinate(self._study, target_name=self._names[0])
        count = len(self._names) + len({name for t in self._complete for name in t.params})
        axes.figure.set_size_inches(max(6.4, 1.8 * count), 5)
        return axes

    def rungs(self) -> _Axes:
        from matplotlib import ticker

        reported = [t for t in self._study.get_trials(deepcopy=False) if t.intermediate_values]
        _needs(len(self._names) == 1, "with several objectives, epochs are not reported")
        _needs(reported, "no trial reported values after its epochs")
        axes = self._optuna.plot_intermediate_values(self._study)
        axes.set(xlabel="epoch", ylabel=self._names[0])
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if len(reported) > 20 and (legend := axes.get_legend()) is not None:
            legend.remove()
        return axes

    def front(self) -> _Axes:
        self._needs_complete()
        count = len(self._names)
        _needs(count <= 3, f"there are {count} objectives, and it can show 3")
        return self._optuna.plot_pareto_front(self._study, target_names=self._names)


def _draw_shares(shares: dict[str, float]) -> _Axes:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6.4, 1 + 0.4 * len(shares)))
    bars = axes.barh(list(reversed(shares)), list(reversed(shares.values())))
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlabel="share of the variance (fANOVA)", xlim=(0, 1.1))
    return axes


def _png(draw: _Draw) -> bytes:
    """What a function draws, as a PNG."""
    import matplotlib
    import numpy as np
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    # Optuna sets a style for all figures of the process, and a notebook would show each figure.
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


def figures(study: optuna.Study, names: list[str]) -> Iterator[str]:
    """The plots as HTML; instead of one that is left out, the reason."""
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
            # A page that lacks a plot is better than no page.
            why = f"it could not be drawn ({type(e).__name__}: {e})"
            shown = f"<p>Left out: {html.escape(why)}.</p>"
        yield f"<h3>{title}</h3>\n{shown}"
