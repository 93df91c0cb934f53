"""What a search has found: as a table, as shares of importance, and as a page."""

import base64
import contextlib
import datetime
import html
import importlib.util
import io
import os
import pathlib
import uuid
import warnings
from typing import Any

import optuna
from optuna import distributions
from optuna.trial import TrialState

import tfbig
from tfbig import errors
from tfbig.tuners import _hyperparameters as hps
from tfbig.tuners import _progress, _space, _study

__all__ = ("dataframe", "importance", "write")


# --- Trials ------------------------------------------------------------------


def _rows(tuner):
    """A dictionary for each trial: what all trials have, and `values` by hyperparameter."""
    oracle = tuner.oracle
    frozen_trials = oracle._trials.by_slot()
    for trial_id, trial in oracle.trials.items():
        if (frozen := frozen_trials.get(int(trial_id))) is None:
            continue  # It began between the two looks.
        is_complete = frozen.state == TrialState.COMPLETE
        yield {
            "trial": trial_id,
            "status": _progress.status_of(trial),
            "scores": frozen.values if is_complete else [None] * len(oracle.directions),
            "best_step": trial.best_step if is_complete else None,
            "epochs": max(frozen.intermediate_values, default=None),
            "duration": frozen.duration.total_seconds() if frozen.duration else None,
            "message": (trial.message or "").strip(),
            "values": trial.hyperparameters.values,
            "frozen": frozen,
        }


def _names(rows):
    """Names of hyperparameters that trials have, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row["values"]))


def _score_names(oracle):
    names = [o.name for o in oracle._objectives]
    return ["score"] if len(names) == 1 else names


def dataframe(tuner):
    """The trials of a search as a `pandas.DataFrame`; see `Tuner.to_dataframe`."""
    try:
        import pandas as pd
    except ImportError:
        raise errors.InvalidOptionError(
            "to_dataframe() needs pandas, not installed here. pip install pandas"
        ) from None
    rows = list(_rows(tuner))
    columns = {name: [row[name] for row in rows] for name in ("trial", "status")}
    for i, name in enumerate(_score_names(tuner.oracle)):
        columns[name] = pd.Series([row["scores"][i] for row in rows], dtype="float64")
    for name in ("best_step", "epochs"):
        columns[name] = pd.Series([row[name] for row in rows], dtype="Int64")
    columns["duration"] = pd.Series([row["duration"] for row in rows], dtype="float64")
    for name in _names(rows):
        values = [row["values"].get(name, pd.NA) for row in rows]
        kinds = {type(v) for v in values}
        # Elsewhere pandas would turn integers into floats, and None into NaN.
        is_plain = len(kinds) == 1 and kinds <= {bool, int, float, str}
        series = pd.Series(values, dtype=None if is_plain else object)
        columns[f"hp {name}" if name in columns else name] = series
    return pd.DataFrame(columns)


# --- A study to draw and to weigh ----------------------------------------------


def _distribution(hp, values):
    """An Optuna distribution over real values, as wide as those that occurred."""
    if isinstance(hp, hps.Int | hps.Float) and all(type(v) in (int, float) for v in values):
        low, high = min(hp.min_value, *values), max(hp.max_value, *values)
        is_log = hp.sampling == "log" and low > 0
        is_whole = isinstance(hp, hps.Int) and all(type(v) is int for v in values)
        kind = distributions.IntDistribution if is_whole else distributions.FloatDistribution
        return kind(low, high, log=is_log)
    choices = list(dict.fromkeys(map(_category, [*_choices(hp), *values])))
    return distributions.CategoricalDistribution(choices)


def _choices(hp):
    return hp.values if isinstance(hp, hps.Choice | hps.Boolean) else ()


def _category(value):
    """A value as a text: by Optuna's ==, 1 and True are the same."""
    return value if isinstance(value, str) else repr(value)


def _labels(hyperparameters):
    """Hyperparameters that are searched, and a name for each that no other has."""
    searched = [hp for hp in hyperparameters.space if not isinstance(hp, hps.Fixed)]
    names = [hp.name for hp in searched]
    for hp in searched:
        # The same name may stand under two conditions, with different ranges.
        is_single = names.count(hp.name) == 1
        parameter = None if is_single else _space.parameter_of(hp)
        yield hp, hp.name if parameter is None else parameter.name


def _study_of(tuner, rows):
    """A copy of the study in memory whose parameters are called, and are, as users know them."""
    oracle = tuner.oracle
    params_of: dict[str, dict[str, Any]] = {row["trial"]: {} for row in rows}
    distributions_of: dict[str, dict[str, Any]] = {row["trial"]: {} for row in rows}
    known = hps.HyperParameters()
    for hp, label in _labels(oracle.hyperparameters):
        having = []
        for row in rows:
            known.values = row["values"]
            if hp.name in known.values and known._conditions_are_active(hp.conditions):
                having.append(row)
        if not having:
            continue
        distribution = _distribution(hp, [row["values"][hp.name] for row in having])
        is_text = isinstance(distribution, distributions.CategoricalDistribution)
        for row in having:
            value = row["values"][hp.name]
            params_of[row["trial"]][label] = _category(value) if is_text else value
            distributions_of[row["trial"]][label] = distribution
    study = optuna.create_study(directions=oracle.directions)
    study.set_metric_names([o.name for o in oracle._objectives])
    by_id = {row["trial"]: row["frozen"] for row in rows}
    for slot in range(max(map(int, by_id), default=-1) + 1):
        trial_id = oracle._trial_id(slot)
        frozen = by_id.get(trial_id)
        if frozen is None or not frozen.state.is_finished():
            # Keeps the numbers of those that come after it.
            made = optuna.trial.create_trial(state=TrialState.FAIL)
        else:
            is_complete = frozen.state == TrialState.COMPLETE
            made = optuna.trial.create_trial(
                state=frozen.state,
                values=frozen.values if is_complete else None,
                params=params_of[trial_id],
                distributions=distributions_of[trial_id],
                intermediate_values=frozen.intermediate_values,
                system_attrs={f"constraints:{k}": v for k, v in frozen.constraints.items()},
            )
        study.add_trial(made)
    return study


def _importance(study, objective=0):
    """Shares by name, the largest first; an empty dictionary where there is nothing to compare.

    Raises:
        InvalidOptionError: If scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise errors.InvalidOptionError(
            "The importance of hyperparameters needs scikit-learn, not installed here. "
            "pip install tfbig[sklearn]"
        )
    # Only these are weighed; a trial that ended otherwise may lack parameters.
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 2:
        return {}
    common = set.intersection(*(set(t.params) for t in complete))
    if not common:
        return {}
    shares = optuna.importance.get_param_importances(
        study,
        # The same trials have the same importance.
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        params=sorted(common),
        target=lambda trial: trial.values[objective],
    )
    return {name: float(share) for name, share in shares.items()}


def importance(tuner, objective=None):
    """What part of the objective's variance each hyperparameter has; see `Tuner.importance`."""
    names = [o.name for o in tuner.oracle._objectives]
    if objective is not None and objective not in names:
        raise errors.InvalidOptionError(
            f"`objective` must be one of {', '.join(names)}. Received: objective={objective!r}."
        )
    with _quiet():
        study = _study_of(tuner, list(_rows(tuner)))
        return _importance(study, 0 if objective is None else names.index(objective))


@contextlib.contextmanager
def _quiet():
    """Neither Optuna nor matplotlib has anything to say that a user could act on."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


# --- Plots -------------------------------------------------------------------


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
            shares = _importance(study, i)
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


def _figures(study, names):
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


# --- The page ----------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: left; }
tr.best { background: #e8f5e9; font-weight: 600; }
img { max-width: 100%; }
"""


def _storage(oracle):
    if oracle._storage is None:
        return f"{_study.FILE} in {oracle._project_dir}"
    if oracle._storage == _study.MEMORY:
        return "memory"
    # What follows "?" may hold a password too.
    return _study.shown(oracle._storage).partition("?")[0]


def _searched(tuner, rows):
    """What was searched, as pairs of names and texts."""
    oracle = tuner.oracle
    statuses = [row["status"] for row in rows]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    settings = oracle._settings()
    yield "Objective", settings.pop("objective")
    yield "Tuner", type(tuner).__name__
    del settings["way to search"]
    yield from ((name.capitalize(), value) for name, value in settings.items())
    yield "Seed", str(oracle.seed)
    yield "Trials", f"{len(rows)} of {oracle.max_trials or 'no bound'}: {counts or 'none yet'}"
    yield "Storage", _storage(oracle)
    yield "Written", datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    yield "Software", f"tfbig {tfbig.__version__}, Optuna {optuna.__version__}"


def _trials_table(tuner, rows, best):
    names = _names(rows)
    header = ["trial", "status", *_score_names(tuner.oracle), "epochs", "seconds", *names]
    has_messages = any(row["message"] for row in rows)
    lines = []
    for row in rows:
        values = [_progress.shown(v) if v is not None else "" for v in row["scores"]]
        seconds = "" if row["duration"] is None else f"{row['duration']:.1f}"
        cells = [row["trial"], row["status"], *values, row["epochs"] or "", seconds]
        cells += [_progress.shown(row["values"][n]) if n in row["values"] else "" for n in names]
        if has_messages:
            # The last line of a traceback; a driver's may hold the whole URL.
            message = row["message"].rpartition("\n")[2]
            cells.append(_study.without_secrets(message, tuner.oracle._storage))
        lines.append(cells)
    marked = {i for i, row in enumerate(rows) if row["trial"] in best}
    return _progress.html_table(header + ["message"] * has_messages, lines, marked)


def _page(tuner):
    rows = list(_rows(tuner))
    oracle = tuner.oracle
    is_single = len(oracle.directions) == 1
    best = oracle.get_best_trials(1 if is_single else len(rows))
    parts = ["<h2>What was searched</h2>", _progress.html_table(None, _searched(tuner, rows))]
    parts.append("<h2>Best values</h2>")
    if not best:
        parts.append("<p>No trial is complete and feasible yet.</p>")
    for trial in best:
        title = f"Trial {trial.trial_id}: {oracle.objective_names} {_progress.shown(trial.score)}"
        values = [(k, _progress.shown(v)) for k, v in trial.hyperparameters.values.items()]
        parts += [f"<h3>{html.escape(title)}</h3>", _progress.html_table(None, values)]
    parts += ["<h2>Plots</h2>"]
    with _quiet():
        study = _study_of(tuner, rows)
        parts += _figures(study, [o.name for o in oracle._objectives])
    parts += ["<h2>Trials</h2>", _trials_table(tuner, rows, {t.trial_id for t in best})]
    parts.append("<p>Seconds are those from a trial's begin to its end, with any interruption.</p>")
    title = html.escape(f"Search {tuner.project_name}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
        f"\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def write(tuner, path):
    """Writes a page about a search; see `Tuner.report`."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise errors.InvalidOptionError(
            f"`path` must be the name of a file. Received: {str(path)!r}, which is a directory."
        )
    page = _page(tuner)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reader, or a second process that writes it, finds a whole page.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # A name or a message may hold half of a surrogate pair.
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
