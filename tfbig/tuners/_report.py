"""The report on a search, an HTML page."""

import datetime
import functools
import html
import importlib.resources
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import optuna

import tfbig
from tfbig import errors
from tfbig.tuners import _plots, _progress, _record, _results, _study, _tuner_types

if TYPE_CHECKING:
    from tfbig.tuners import _tuner_results

__all__ = ("write", "write_record")

# A longer text is shown at the click of its beginning; of a much longer one, the middle is left
# out.
_LONGEST_CELL = 40
_LONGEST_MESSAGE = 4000

# Nothing is loaded from anywhere, whatever a name or a message contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def _escaped(value: object) -> str:
    return html.escape(str(value))


def _table(kind: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    lines = (f"<tr><th>{_escaped(k)}</th><td>{_escaped(v)}</td></tr>" for k, v in rows)
    return f'<table class="{kind}">\n' + "\n".join(lines) + "\n</table>"


def _constants(record: _record.Record) -> _tuner_types.Values:
    """The hyperparameters that have the same value in all trials."""
    if len(record.rows) < 2:
        return {}
    found: _tuner_types.Values = {}
    for name in _results.names_in(record.rows):
        texts = {repr(row.values[name]) if name in row.values else None for row in record.rows}
        if len(texts) == 1:
            found[name] = record.rows[0].values[name]
    return found


def _searched(record: _record.Record) -> Iterator[tuple[str, str]]:
    """What was searched, as pairs of names and values."""
    settings = dict(record.settings)
    goals = (
        f"{name} ({d[:3]})" for name, d in zip(record.objectives, record.directions, strict=True)
    )
    yield "Objective", settings.pop("objective", ", ".join(goals))
    yield "Searched by", record.searched_by
    seed = settings.pop("seed", "")
    yield from ((name.capitalize(), value) for name, value in settings.items() if value)
    yield "Seed", seed
    counts = ", ".join(f"{count} {status}" for status, count in record.counts().items())
    most = f" of {record.max_trials}" if record.max_trials else ""
    yield "Trials", f"{len(record.rows)}{most}: {counts or 'none yet'}"
    if constants := _constants(record):
        told = ", ".join(f"{k}={_progress.shown(v)}" for k, v in constants.items())
        yield "The same in all trials", told
    yield "Storage", record.place
    yield "Written", datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    yield "Software", f"tfbig {tfbig.__version__}, Optuna {optuna.__version__}"


# --- The best trials ---


def _best(record: _record.Record) -> Iterator[str]:
    if not record.best:
        yield "<p>No trial is complete and feasible yet.</p>"
    elif record.is_single:
        row = record.best[0]
        score = _progress.shown(row.scores[0])
        yield f"<h3>Trial {row.trial}: {_escaped(record.objectives[0])} {score}</h3>"
        shown = [(name, _progress.shown(value)) for name, value in row.values.items()]
        yield _table("best-values", shown)
    else:
        yield f"<p>The Pareto front has {len(record.best)} trials.</p>"
        names = _results.names_in(record.best)
        header = ["trial", *record.objectives, *names]
        lines = [
            [row.trial, *map(_progress.shown, row.scores), *(_value(row, n) for n in names)]
            for row in record.best
        ]
        yield '<div class="scroll front">' + _progress.html_table(header, lines) + "</div>"


def _value(row: _record.Row, name: str) -> str:
    return _progress.shown(row.values[name]) if name in row.values else ""


# --- The table of trials ---


def _message(text: str) -> str:
    """A message without most of a long one."""
    left_out = len(text) - _LONGEST_MESSAGE
    if left_out <= 0:
        return text
    first, last = _LONGEST_MESSAGE // 4, -3 * _LONGEST_MESSAGE // 4
    return f"{text[:first]}\n\n[{left_out} characters are left out]\n\n{text[last:]}"


def _collapsed(text: str, summary: str) -> str:
    """A text that is shown at a click, if it is long."""
    if len(text) <= _LONGEST_CELL and "\n" not in text:
        return _escaped(text)
    return (
        f"<details><summary>{_escaped(summary[:200])}</summary>"
        f"<pre>{_escaped(text)}</pre></details>"
    )


def _cell(content: str, kind: str = "", value: object = None) -> str:
    sorted_by = "" if value is None else f' data-value="{_escaped(value)}"'
    named = f' class="{kind}"' if kind else ""
    return f"<td{named}{sorted_by}>{content}</td>"


def _cells(
    record: _record.Record, row: _record.Row, names: Sequence[str], storage: str | None
) -> Iterator[str]:
    yield _cell(row.trial)
    violated = "" if row.is_feasible else ", constraint violated"
    yield _cell(row.status + violated, row.status)
    for i in range(len(record.objectives)):
        # Six digits may not tell two scores apart.
        score = row.scores[i] if row.scores else None
        yield _cell("" if score is None else _progress.shown(score), value=score)
    yield _cell("" if row.epochs is None else str(row.epochs))
    yield _cell("" if row.duration is None else f"{row.duration:.1f}")
    # A database driver's message may contain the whole URL.
    message = _study.without_secrets(row.message, storage)
    yield _cell(_collapsed(_message(message), message.rpartition("\n")[2]), "message")
    for name in names:
        text = _value(row, name)
        value = row.values.get(name)
        yield _cell(_collapsed(text, text), value=value if type(value) is float else None)


def _trials(record: _record.Record, storage: str | None) -> str:
    constants = _constants(record)
    names = [name for name in _results.names_in(record.rows) if name not in constants]
    has_messages = any(row.message for row in record.rows)
    before = ["trial", "status", *_results.score_names(record), "epochs", "seconds"]
    header = [*before, *["message"] * has_messages, *names]
    best = set(record.best_trials[:1] if record.is_single else record.best_trials)
    lines = []
    for row in record.rows:
        cells = list(_cells(record, row, names, storage))
        if not has_messages:
            del cells[len(before)]
        kind = ' class="best"' if row.trial in best else ""
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    heads = "".join(f"<th><button>{_escaped(name)}</button></th>" for name in header)
    example = header[2].replace(" ", "") + "<0.5"
    return (
        '<div class="filter" hidden><input type="search" aria-label="Filter" '
        f'placeholder="Filter: a text, or {_escaped(example)}"><span class="count"></span>'
        "<small>Several words must all hold: <code>status=complete units&gt;=32</code>. "
        "Click a column to sort by it.</small></div>\n"
        f'<div class="scroll"><table class="trials"><thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>\n<p>Seconds are from the start of a trial to its end, "
        "including interruptions.</p>"
    )


# --- The page ---


@functools.cache
def _resource(name: str) -> str:
    return importlib.resources.files("tfbig.tuners").joinpath(name).read_text(encoding="utf-8")


def _page(record: _record.Record, storage: str | None) -> str:
    with _results.quiet():
        plots = list(_plots.figures(record))
    parts = [
        "<h2>What was searched</h2>",
        _table("facts", _searched(record)),
        "<h2>Best values</h2>",
        *_best(record),
        "<h2>Plots</h2>",
        _plots.legend(record),
        *plots,
        "<h2>Trials</h2>",
        _trials(record, storage),
    ]
    title = _escaped(f"Search {record.name}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{_resource('_report.css')}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{_resource('_report.js')}</script>\n</body>\n</html>\n"
    )


def write(tuner: "_tuner_results.TunerResults", path: str | os.PathLike[str]) -> None:
    """Writes a report on the search of a tuner; see `Tuner.report`."""
    _refuse_directory(path)
    write_record(_results.record_of(tuner), path, tuner.oracle._storage)


def write_record(
    record: _record.Record, path: str | os.PathLike[str], storage: str | None = None
) -> None:
    """Writes a report on a search.

    Args:
        record: The search.
        path: The file; an existing one is replaced atomically.
        storage: The URL of its database, whose passwords are left out of messages.
    """
    _refuse_directory(path)
    path = pathlib.Path(path)
    page = _page(record, storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Readers, and other processes that write the file, never see part of a page.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # Names and messages may contain half of a surrogate pair.
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_directory(path: str | os.PathLike[str]) -> None:
    if os.path.isdir(path):
        raise errors.InvalidOptionError(
            f"`path` must be a file. Received: path={str(path)!r}, which is a directory."
        )
