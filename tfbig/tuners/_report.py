"""The report on a search, an HTML page."""

import datetime
import html
import os
import pathlib
import uuid
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import optuna

import tfbig
from tfbig import errors
from tfbig.tuners import _agreement, _plots, _progress, _results, _study
from tfbig.tuners._oracle import StudyOracle

if TYPE_CHECKING:
    from tfbig.tuners import _tuner_results

__all__ = ("write",)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: left; }
tr.best { background: #e8f5e9; font-weight: 600; }
img { max-width: 100%; }
"""


def _storage(oracle: StudyOracle) -> str:
    if oracle._storage is None:
        return f"{_study.FILE} in {oracle._project_dir}"
    if oracle._storage == _study.MEMORY:
        return "memory"
    # The part after "?" may contain a password, too.
    return _study.shown(oracle._storage).partition("?")[0]


def _searched(
    tuner: "_tuner_results.TunerResults", rows: list[_results.Row]
) -> Iterator[tuple[str, str]]:
    """What was searched, as pairs of names and values."""
    oracle = tuner.oracle
    statuses = [row["status"] for row in rows]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    settings = oracle._settings()
    yield "Objective", settings.pop("objective")
    yield "Tuner", type(tuner).__name__
    del settings[_agreement.KIND]
    yield from ((name.capitalize(), value) for name, value in settings.items())
    yield "Seed", str(oracle.seed)
    yield "Trials", f"{len(rows)} of {oracle.max_trials or 'no bound'}: {counts or 'none yet'}"
    yield "Storage", _storage(oracle)
    yield "Written", datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    yield "Software", f"tfbig {tfbig.__version__}, Optuna {optuna.__version__}"


def _trials_table(
    tuner: "_tuner_results.TunerResults", rows: list[_results.Row], best: Collection[str]
) -> str:
    names = _results.names_in(rows)
    header = ["trial", "status", *_results.score_names(tuner.oracle), "epochs", "seconds", *names]
    has_messages = any(row["message"] for row in rows)
    lines: list[list[object]] = []
    for row in rows:
        values = [_progress.shown(v) if v is not None else "" for v in row["scores"]]
        seconds = "" if row["duration"] is None else f"{row['duration']:.1f}"
        cells: list[object] = [row["trial"], row["status"], *values, row["epochs"] or "", seconds]
        cells += [_progress.shown(row["values"][n]) if n in row["values"] else "" for n in names]
        if has_messages:
            # The last line of a traceback; that of a database driver may contain the whole URL.
            message = row["message"].rpartition("\n")[2]
            cells.append(_study.without_secrets(message, tuner.oracle._storage))
        lines.append(cells)
    marked = {i for i, row in enumerate(rows) if row["trial"] in best}
    return _progress.html_table(header + ["message"] * has_messages, lines, marked)


def _page(tuner: "_tuner_results.TunerResults") -> str:
    rows = list(_results.rows_of(tuner))
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
    with _results.quiet():
        study = _results.study_of(tuner, rows)
        parts += _plots.figures(study, oracle._objectives.names)
    parts += ["<h2>Trials</h2>", _trials_table(tuner, rows, {t.trial_id for t in best})]
    parts.append(
        "<p>Seconds are from the start of a trial to its end, including interruptions.</p>"
    )
    title = html.escape(f"Search {tuner.project_name}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
        f"\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def write(tuner: "_tuner_results.TunerResults", path: str | os.PathLike[str]) -> None:
    """Writes a report on a search; see `Tuner.report`."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise errors.InvalidOptionError(
            f"`path` must be a file. Received: path={str(path)!r}, which is a directory."
        )
    page = _page(tuner)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Readers, and other processes that write the file, never see part of a page.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # Names and messages may contain half of a surrogate pair.
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
