"""What a search has found, as a table, as importance and as a page; and what a notebook shows."""

import builtins
import dataclasses
import html.parser
import importlib.util
import itertools
import os
import re
import sys
import types

import keras_tuner
import optuna
import pytest

from tfbig import errors, tuners
from tfbig.tuners import (
    _plots,
    _record,
    _report,
    _results,
    _scales,
    _svg,
    _trial_callbacks,
    _trials,
)

MARKUP = "<script>alert('&')</script>"
FAILED, PRUNED = 3, 5


class Search(tuners.OptunaSearch):
    """Trains nothing: the objective is nearly all `x`."""

    def run_trial(self, trial, **kwargs):
        del kwargs
        hp = trial.hyperparameters
        x = hp.Float("x", 0.1, 10.0, sampling="log", default=5.0)
        hp.Float("stepped", 0.0, 1.0, step=0.1)
        hp.Float("mirrored", 0.1, 1.0, sampling="reverse_log")
        hp.Choice("kernel", [(3, 3), (5, 5)])
        hp.Choice("text", [None, MARKUP, "plain"], default=MARKUP)
        if hp.Boolean("deep", default=True):
            hp.Int("depth", 2, 5, parent_name="deep", parent_values=[True])
        hp.Fixed("fixed", 7)
        index = int(trial.trial_id)
        if index == FAILED:
            raise keras_tuner.errors.FailedTrialError(f"out of {MARKUP}")
        for step in (1, 2, 3):
            self.oracle.report(trial.trial_id, {"loss": x + 1 / step}, step)
            if index == PRUNED and step == 2:
                raise _trial_callbacks.TrialPruned
        return {"loss": x + 1 / 3}


class Front(tuners.OptunaSearch):
    def run_trial(self, trial, **kwargs):
        del kwargs
        x = trial.hyperparameters.Float("x", 0.0, 1.0, default=0.5)
        self.oracle.update_trial(trial.trial_id, {"a": x, "b": (1 - x) ** 2})


def objective(name):
    return keras_tuner.Objective(name, "min")


def search(kind, directory, objectives, max_trials):
    tuner = kind(
        objective=objectives, max_trials=max_trials, seed=0, directory=directory, project_name="s"
    )
    tuner.oracle.verbose = 0
    tuner.search()
    return tuner


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of one objective with trials that ended in different ways."""
    return search(Search, tmp_path_factory.mktemp("search"), objective("loss"), 12)


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    objectives = [objective("a"), objective("b")]
    return search(Front, tmp_path_factory.mktemp("front"), objectives, 8)


@pytest.fixture(scope="module")
def page(searched, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    searched.report(path)
    assert os.listdir(path.parent) == ["report.html"]
    return path.read_text()


def without(monkeypatch, *names):
    """As if modules were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in names else find_spec(name, *a)
    )


# --- to_dataframe ---


def test_a_dataframe_has_all_trials_with_their_real_values(searched):
    pd = pytest.importorskip("pandas")
    frame = searched.to_dataframe()
    trials = searched.oracle.trials
    names = ["x", "stepped", "mirrored", "kernel", "text", "deep", "depth", "fixed"]
    fixed = ["trial", "status", "score", "best_step", "epochs", "duration"]
    assert list(frame.columns[:6]) == fixed
    assert set(frame.columns[6:]) == set(names)
    assert list(frame.trial) == list(trials)
    assert frame.status[FAILED] == "infeasible"
    assert frame.status[PRUNED] == "pruned"
    assert frame.epochs[PRUNED] == 2
    assert frame.epochs[0] == 3
    assert frame.best_step.isna().sum() == 2
    assert (frame.duration >= 0).all()
    assert frame.x.dtype == float
    for i, trial in enumerate(trials.values()):
        values = trial.hyperparameters.values
        for name in names:
            value = frame[name][i]
            if name in values:
                assert value == values[name]
                assert (value is None) == (values[name] is None)
            else:
                assert value is pd.NA
        assert frame.score[i] == trial.score or (pd.isna(frame.score[i]) and trial.score is None)
    assert {type(v) for v in frame.kernel} == {tuple}
    assert {type(v) for v in frame.depth} == {int, type(pd.NA)}


def test_a_dataframe_has_a_column_for_each_objective(front):
    pytest.importorskip("pandas")
    frame = front.to_dataframe()
    assert list(frame.columns) == [
        *("trial", "status", "a", "b", "best_step", "epochs", "duration", "x")
    ]
    assert list(frame.a) == list(frame.x)


def test_a_dataframe_without_pandas_says_what_to_install(searched, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(errors.InvalidOptionError, match="pip install pandas"):
        searched.to_dataframe()


# --- importance ---


def test_importance_is_a_share_for_each_hyperparameter(searched):
    shares = searched.importance()
    # Not `depth`, which not all have, and nothing that is not searched.
    assert set(shares) == {"x", "stepped", "mirrored", "kernel", "text", "deep"}
    assert next(iter(shares)) == "x"
    assert shares["x"] > 0.5
    # As a sum of floats.
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    assert searched.importance() == shares


def test_importance_is_of_one_objective(front):
    assert front.importance() == front.importance("b") == {"x": 1}
    with pytest.raises(errors.InvalidOptionError, match="one of a, b"):
        front.importance("c")


def test_importance_of_fewer_than_two_trials_is_empty(tmp_path):
    assert search(Search, tmp_path, objective("loss"), 1).importance() == {}


def test_importance_without_sklearn_says_what_to_install(searched, monkeypatch):
    without(monkeypatch, "sklearn")
    with pytest.raises(errors.InvalidOptionError, match=r"pip install tfbig\[sklearn\]"):
        searched.importance()


# --- report ---

ONE_OBJECTIVE = [
    "Optimization history",
    "Importance for loss",
    "Slices",
    "Contours",
    "Ranks",
    "Parallel coordinates",
    "Rungs: the objective after each epoch",
    "Timeline of processes",
]


class Page(html.parser.HTMLParser):
    """A page that is read as a browser does.

    Attributes:
        figures: The titles of the figures, and the text of each.
        rows: The cells of the table of trials, with the header.
        tags: All tags.
        hovers: The texts that a pointer over a mark shows.
    """

    VOID = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.figures, self.rows, self.tags, self.hovers = {}, [], [], []
        self._open, self._title, self._in_table = [], None, False
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self._in_table = attrs.get("class") == "trials"
        if tag == "tr" and self._in_table:
            self.rows.append([])
        if tag in ("td", "th") and self._in_table:
            self.rows[-1].append("")
        if tag == "figcaption":
            self._title = ""

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "figcaption":
            self.figures[self._title] = ""
        if tag == "figure":
            self._title = None
        if tag == "table":
            self._in_table = False

    def handle_data(self, data):
        if self._open[-1:] == ["figcaption"]:
            self._title += data
        elif self._title is not None:
            self.figures[self._title] += data
        if self._open[-1:] == ["title"] and "svg" in self._open:
            self.hovers.append(data)
        if self._in_table and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def drawn(self):
        """The titles of the figures that are not left out."""
        return [title for title, text in self.figures.items() if "Left out" not in text]


def page_of(tuner, tmp_path):
    tuner.report(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def changed(record, *rows, **changes):
    """A record with other trials."""
    return dataclasses.replace(record, rows=list(rows), best_trials=[], **changes)


def test_a_report_has_all_plots_in_itself(page):
    assert Page(page).drawn() == ONE_OBJECTIVE
    assert "Left out" not in page
    # One script, of the page's own, and nothing that a browser would load.
    assert page.count("<script") == 1
    for outside in ("http:", "https:", "<link", "<img", "url(", "@import", " src=", " href="):
        assert outside not in page
    assert "default-src 'none'" in page


def test_a_report_says_what_was_searched_and_found(page, searched):
    for text in ("loss (min)", "Search", "tpe", "12 of 12: 10 complete, 1 pruned, 1 infeasible"):
        assert text in page
    (best,) = searched.oracle.get_best_trials(1)
    assert f"<h3>Trial {best.trial_id}: loss {best.score:.6g}</h3>" in page
    assert page.count('<tr class="best">') == 1
    assert f'<tr class="best"><td>{best.trial_id}</td>' in page
    header, *rows = Page(page).rows
    assert [row[0] for row in rows] == list(searched.oracle.trials)
    assert {"x", "kernel", "depth"} <= set(header)
    # What never changes has no column.
    assert "fixed" not in header
    assert "fixed=7" in page


def test_a_tuple_is_shown_as_one(page):
    header, *rows = Page(page).rows
    assert {row[header.index("kernel")] for row in rows} <= {"(3, 3)", "(5, 5)"}
    assert ">(3, 3)</text>" in page
    assert ">3, 3<" not in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((3, 3), "(3, 3)"),
        ((1,), "(1,)"),
        ((0.1 + 0.2, ("a", None)), "(0.3, ('a', None))"),
        ([1, 2], "[1, 2]"),
        ("a", "a"),
        (1e-7, "1e-07"),
        (None, "None"),
    ],
)
def test_values_are_shown_in_few_characters(value, text):
    assert tuners._progress.shown(value) == text


def test_long_messages_are_collapsed(page, searched, tmp_path):
    header, *rows = Page(page).rows
    text = rows[FAILED][header.index("message")]
    assert "Traceback" in text
    assert f"FailedTrialError: out of {MARKUP}" in text
    assert page.count("<details>") == 1
    assert re.search(r"<details><summary>[^\n]*FailedTrialError: out of &lt;script", page)
    # Of a message of any length, the page has the beginning and the end.
    record = _results.record_of(searched)
    row = dataclasses.replace(record.rows[FAILED], message="first" + "x" * 10**6 + "\nlast")
    _report.write_record(changed(record, row), tmp_path / "long.html")
    long = (tmp_path / "long.html").read_text()
    assert len(long) < 100_000
    assert "first" in long
    assert "last</pre>" in long
    assert "characters are left out" in long


def test_what_users_named_is_escaped(page):
    assert MARKUP not in page
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page


def test_trials_without_a_value_are_in_the_plots(page):
    hovers = Page(page).hovers
    # In the history and in each slice.
    for trial, status in ((FAILED, "infeasible"), (PRUNED, "pruned")):
        found = [h for h in hovers if h.startswith(f"trial {trial:04d}, {status}")]
        assert len(found) >= 6
    # A pruned one with the last value that it reported.
    assert any(re.match(r"trial 0005, pruned, last [\d.]+$", h) for h in hovers)
    assert 'class="infeasible"' in page
    assert 'class="pruned"' in page
    assert "no value" in page


def test_a_pointer_over_a_mark_shows_its_trial(page, searched):
    (best,) = searched.oracle.get_best_trials(1)
    hovers = Page(page).hovers
    title = f"trial {best.trial_id}, complete: loss {best.score:.6g}"
    assert hovers.count(title) >= 3  # History, coordinates and rungs.
    x = best.hyperparameters.values["x"]
    assert f"{title}; x={x:.6g}" in hovers


def test_a_report_of_several_objectives_has_their_front(front, tmp_path):
    page = page_of(front, tmp_path)
    expected = ["Pareto front", "Parallel coordinates", "Timeline of processes"]
    for name in "ab":
        expected += [f"Optimization history of {name}", f"Importance for {name}"]
        expected += [f"Slices of {name}"]
    assert sorted(Page(page).drawn()) == sorted(expected)
    # One hyperparameter makes no pairs, and epochs are not reported.
    assert page.count("Left out") == 5
    assert page.count('<tr class="best">') == len(front.get_pareto_trials()) > 1
    assert _results.record_of(front).best_trials == [t.trial_id for t in front.get_pareto_trials()]


def test_a_report_of_no_trial_says_so(tmp_path):
    tuner = Search(objective=objective("loss"), directory=tmp_path)
    page = page_of(tuner, tmp_path)
    assert "none yet" in page
    assert "no trial is complete yet" in page
    assert Page(page).drawn() == []


def test_a_report_of_one_trial(tmp_path):
    found = Page(page_of(search(Search, tmp_path, objective("loss"), 1), tmp_path))
    assert found.drawn() == ["Optimization history", *ONE_OBJECTIVE[-2:]]
    assert len(found.rows) == 2


def test_a_report_of_failed_trials_only(searched, tmp_path):
    record = _results.record_of(searched)
    failed = record.rows[FAILED]
    rows = [dataclasses.replace(failed, trial=row.trial, values=row.values) for row in record.rows]
    _report.write_record(changed(record, *rows), tmp_path / "report.html")
    found = Page((tmp_path / "report.html").read_text())
    assert found.drawn() == ["Optimization history", "Slices", "Timeline of processes"]
    assert sum(h.startswith("trial 0007, infeasible") for h in found.hovers) >= 8


@pytest.mark.filterwarnings("error")
def test_values_of_any_size_can_be_drawn(searched, tmp_path):
    record = _results.record_of(searched)
    values = itertools.cycle([1e308, -1e308, 1e-300, 3.0, 0.0])
    rows = [
        dataclasses.replace(row, scores=[next(values)] if row.scores else []) for row in record.rows
    ]
    _report.write_record(changed(record, *rows), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert Page(page).drawn() == ONE_OBJECTIVE
    assert not re.search(r"[\"\s](nan|inf)[\"\s]", page)


def test_a_report_needs_no_library_of_plots(searched, tmp_path, monkeypatch):
    without(monkeypatch, "matplotlib", "sklearn")
    page = page_of(searched, tmp_path)
    assert "pip install tfbig[sklearn]" in page
    assert Page(page).drawn() == [t for t in ONE_OBJECTIVE if "Importance" not in t]
    assert "Best values" in page


@pytest.mark.parametrize(
    "storage",
    ["postgresql://user:s3cret@host/db", "postgresql://host/db?user=user&password=s3cret"],
)
def test_a_report_never_has_the_password(searched, tmp_path, monkeypatch, storage):
    read = _results.record_of

    def with_message(tuner):
        record = read(tuner)
        row = dataclasses.replace(record.rows[FAILED], message=f"cannot connect to {storage}")
        record.rows[FAILED] = row
        return record

    monkeypatch.setattr(_results, "record_of", with_message)
    monkeypatch.setattr(searched.oracle, "_storage", storage)
    page = page_of(searched, tmp_path)
    assert page.count("host/db") >= 2
    assert "s3cret" not in page


def many(record, count):
    """A record of many trials, in which all occurs."""
    return dataclasses.replace(
        record,
        rows=[
            dataclasses.replace(record.rows[i % len(record.rows)], trial=f"{i:04d}")
            for i in range(count)
        ],
    )


def test_a_report_of_many_trials_stays_small(searched, tmp_path, monkeypatch):
    # Importance has a bound of its own.
    without(monkeypatch, "sklearn")
    sizes = []
    for count in (1000, 2000):
        _report.write_record(many(_results.record_of(searched), count), tmp_path / "report.html")
        sizes.append((tmp_path / "report.html").stat().st_size)
    assert sizes[0] < 3_000_000
    page = (tmp_path / "report.html").read_text()
    assert "Shows the 500 best trials and some of the others; 1000 are left out." in page
    assert len(Page(page).rows) == 2001
    # The table grows, and the plots do not.
    assert sizes[1] < 1.6 * sizes[0]


def test_the_importance_of_many_trials_is_that_of_some(searched, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(_plots, "_MOST_COMPARED", 5)
    plots = "".join(_plots.figures(_results.record_of(searched)))
    assert "from 5 of 10 trials" in plots


def test_curves_are_those_of_the_best_and_of_the_pruned(searched):
    plots = list(_plots.figures(many(_results.record_of(searched), 600)))
    (rungs,) = (p for p in plots if "Rungs" in p)
    assert rungs.count('class="line') == 10 + 30
    # One in twelve is infeasible, and has no curve; one is pruned.
    assert "Shows the 10 best trials, 30 of 50 pruned ones; 510 are left out." in rungs


# --- The timeline ---


def runs(*spans, process="host/boot/ns|{}|1|x"):
    return [_record.Run(process.format(pid), began, ended) for pid, began, ended in spans]


def timeline_of(record, *lists):
    rows = [
        dataclasses.replace(record.rows[0], trial=f"{i:04d}", runs=found)
        for i, found in enumerate(lists)
    ]
    (plot,) = (p for p in _plots.figures(changed(record, *rows)) if "Timeline" in p)
    return plot


def test_the_study_knows_which_process_ran_a_trial_and_when(searched):
    record = _results.record_of(searched)
    for row in record.rows:
        (run,) = row.runs
        assert run.process == searched.oracle._ledger.owner
        start = row.frozen.datetime_start.timestamp()
        end = row.frozen.datetime_complete.timestamp()
        # The trial exists before it runs, and ends after it.
        assert start <= run.began <= run.ended <= end + 0.01
    plot = timeline_of(record, *(row.runs for row in record.rows))
    assert f"process {os.getpid()}" in plot
    assert plot.count('class="run') == 12


def test_a_trial_that_several_processes_ran_has_a_bar_for_each(searched):
    record = _results.record_of(searched)
    plot = timeline_of(record, runs((7, 0, 10), (8, 20, 30)), runs((8, 5, 15)))
    assert plot.count("host, process 7") == plot.count("host, process 8") == 1
    assert plot.count('class="run') == 3
    assert "trial 0000, complete: loss" in plot
    assert "; 10.0 s" in plot


def test_pauses_of_a_search_are_cut_out(searched):
    record = _results.record_of(searched)
    plot = timeline_of(record, runs((7, 0, 1000)), runs((8, 10**6, 10**6 + 1000)))
    assert "At the dashed lines, 11.6 days" in plot
    assert plot.count('class="pause"') == 1
    widths = list(map(float, re.findall(r'class="run[^>]* width="([\d.]+)"', plot)))
    assert len(widths) == 2
    assert min(widths) > 300


def test_many_processes_share_lanes(searched):
    record = _results.record_of(searched)
    plot = timeline_of(record, *(runs((i, i * 10, i * 10 + 9)) for i in range(100)))
    assert "Processes that followed one another share a lane." in plot
    assert plot.count('text-anchor="end"') == 1


def test_a_trial_of_an_older_search_has_a_bar_without_a_process(searched):
    record = _results.record_of(searched)
    frozen = record.rows[0].frozen
    names = [name for name in frozen.user_attrs if name.startswith(_trials.RUN)]
    assert names
    older = optuna.trial.create_trial(value=1.0)
    older.user_attrs = {k: v for k, v in frozen.user_attrs.items() if k not in names}
    row = _record._row(older)
    assert row.runs[0].process == ""
    assert "not recorded" in timeline_of(record, row.runs)


# --- Axes ---


@pytest.mark.parametrize(
    ("low", "high", "is_log"),
    [
        *((0, 1, False), (-1e300, 1e300, False), (5, 5, False), (0, 0, False), (3, 3, True)),
        *((1e-5, 1e-1, True), (1, 2, True), (8, 512, True), (1e-300, 1e300, True)),
        *((0.1, 0.1 + 1e-12, False), (1e15, 1e15 + 2, False), (5e-324, 1e-320, False)),
    ],
)
def test_ticks_are_few_and_inside(low, high, is_log):
    scale = _scales.Numbers(low, high, is_log)
    ticks = scale.ticks(6)
    assert len(ticks) <= 13
    assert all(0 <= place <= 1 for place, _ in ticks)
    assert [place for place, _ in ticks] == sorted({place for place, _ in ticks})
    assert 0 <= scale.position(low) <= scale.position(high) <= 1


def test_ticks_are_round_numbers():
    assert [text for _, text in _scales.Numbers(0, 1).ticks(6)] == [
        *("0", "0.2", "0.4", "0.6", "0.8", "1")
    ]
    assert [t for _, t in _scales.Numbers(1e-5, 1e-1, True).ticks(6)] == [
        *("1e-05", "0.0001", "0.001", "0.01", "0.1")
    ]


def test_a_few_values_far_away_do_not_hide_the_others():
    values = [0.1 * i for i in range(20)] + [1e9, -5.0]
    scale = _scales.numbers_for(values)
    assert scale.beyond == 1 or scale.beyond == 2
    assert scale.position(1.9) - scale.position(0.0) > 0.5
    assert scale.position(1e9) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 3, "123"),
        (0, 1, "01"),
        (7, 7, "7"),
        (1, 6, "123456"),
        (0, 12, ["0", "5", "10"]),
    ],
)
@pytest.mark.parametrize("is_log", [False, True])
def test_there_are_no_ticks_between_whole_numbers(low, high, expected, is_log):
    ticks = _scales.Numbers(low, high, is_log, is_whole=True).ticks(6)
    assert all(text.isdecimal() for _, text in ticks)
    if not is_log:
        assert [text for _, text in ticks] == list(expected)


def test_a_wide_chart_is_not_enlarged():
    small = _svg.svg(500, 100, "t", ())
    assert 'style="--width:500px;max-width:500px"' in small
    assert "min-width: min(1000px, var(--width))" in _report._resource("_report.css")


def labels_below(chart):
    """The left and right end of each label under the horizontal axis, as it is drawn."""
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="middle">([^<]*)', chart)
    lowest = max(float(y) for _, y, _ in found)
    return [
        (float(x) - len(text) * _svg._LETTER / 2, float(x) + len(text) * _svg._LETTER / 2)
        for x, y, text in found
        if float(y) == lowest
    ]


@pytest.mark.parametrize("last", ["(1, 2)", "(16, 32, 64, 128, 256, 512, 1024)", "x" * 200])
def test_a_long_last_label_covers_no_other(last):
    scale = _scales.Categories(["None", "(16, 32)", last])
    chart = _svg.Chart(scale, _scales.Numbers(0, 1), ("sizes", "y")).render("t")
    ends = labels_below(chart)
    assert len(ends) == 3
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
    assert ends[-1][1] <= 410


def test_trials_without_a_value_have_a_row_for_each_status():
    chart = _svg.Chart(
        _scales.Categories(["a", "b"]), _scales.Numbers(0, 1), ("x", "y"), has_lane=True
    )
    for kind in ("failed", "infeasible", "running"):
        chart.point("a", None, kind, kind)
    drawn = chart.render("t")
    lows = [
        float(re.search(rf'class="{kind}" d="M[\d.]+ ([\d.]+)', drawn)[1])
        for kind in ("infeasible", "running", "failed")
    ]
    assert lows == sorted(lows)
    # A mark is 8 pixels high.
    assert all(b - a > 5 for a, b in itertools.pairwise(lows))


def test_settings_that_are_not_used_are_left_out(page):
    facts = page[page.index('class="facts"') : page.index("Best values")]
    assert "<th>Sampler</th>" in facts
    assert "<td></td>" not in facts


def test_only_axes_that_a_trial_lacks_have_a_place_for_it(page):
    lines = page[page.index("Parallel coordinates</figcaption>") :]
    lines = lines[: lines.index("</figure>")]
    # The objective, which failed trials lack, and `depth`, which not all have.
    assert lines.count("&ndash;") == 2
    assert "At \N{EN DASH}, a trial has no value" in lines


def test_no_curve_covers_the_end_of_a_pruned_one(page):
    rungs = page[page.index("Rungs: the objective after each epoch</figcaption>") :]
    rungs = rungs[: rungs.index("</svg>")]
    assert rungs.rindex('class="line') < rungs.index('<path class="pruned"')


def test_labels_that_would_overlap_are_turned_and_cut():
    scale = _scales.Categories([f"a long name of a category {i}" for i in range(8)])
    chart = _svg.Chart(scale, _scales.Numbers(0, 1), ("x", "y")).render("t")
    assert chart.count("rotate(-35") == 8
    assert "a long name of a category 7</title>" in chart
    few = _svg.Chart(_scales.Categories(["a", "b"]), _scales.Numbers(0, 1), ("x", "y"))
    assert "rotate(-35" not in few.render("t")


def test_a_report_that_cannot_be_written_leaves_the_old_one(searched, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        searched.report(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
    with pytest.raises(errors.InvalidOptionError, match="directory"):
        searched.report(tmp_path)


def test_a_plot_that_raises_is_left_out(searched, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no <font>")

    monkeypatch.setattr(_plots._parameter_plots.ParameterPlots, "slices", fail)
    page = page_of(searched, tmp_path)
    assert Page(page).drawn() == [t for t in ONE_OBJECTIVE if t != "Slices"]
    assert "RuntimeError: no &lt;font&gt;" in page


# --- The table of a notebook ---


@pytest.fixture
def notebook(monkeypatch):
    """As if in a notebook; `shown` has a list of tables for each display."""
    shell = types.SimpleNamespace(kernel=object(), execution_count=1)
    fake = types.SimpleNamespace(get_ipython=lambda: shell, shown=[], shell=shell)

    def display(table, display_id):
        assert display_id
        tables = [table]
        fake.shown.append(tables)
        return types.SimpleNamespace(update=tables.append)

    fake.display = types.SimpleNamespace(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
    return fake


def run(directory, max_trials):
    Search(objective=objective("loss"), max_trials=max_trials, seed=0, directory=directory).search()


def test_a_notebook_shows_one_table_for_a_search(notebook, tmp_path, capsys):
    run(tmp_path, 4)
    assert capsys.readouterr().out == ""
    (tables,) = notebook.shown
    assert len(tables) == 2 * 4  # At the begin of a trial, and at its end.
    assert "<td>0000</td><td>running</td>" in tables[0]
    assert "0 of 4 trials have ended" in tables[0]
    assert "4 of 4 trials have ended" in tables[-1]
    assert "<td>0003</td><td>infeasible</td>" in tables[-1]
    assert tables[-1].count('<tr class="best">') == 1
    assert MARKUP not in tables[-1]


def test_the_table_keeps_the_best_beside_the_last(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(tuners._progress, "_SHOWN_TRIALS", 2)
    run(tmp_path, 5)
    ids = re.findall(r"<td>(\d{4})</td>", notebook.shown[0][-1])
    assert ids[-2:] == ["0003", "0004"]
    assert len(ids) <= 3
    assert notebook.shown[0][-1].count('<tr class="best">') == 1


def test_another_cell_has_its_own_table(notebook, tmp_path):
    run(tmp_path, 1)
    notebook.shell.execution_count = 2
    run(tmp_path, 2)
    first, second = notebook.shown
    assert "0001" not in first[-1]
    assert "0001" in second[-1]


def test_a_terminal_has_lines(notebook, tmp_path, capsys):
    notebook.shell.kernel = None
    run(tmp_path, 1)
    assert notebook.shown == []
    assert capsys.readouterr().out.startswith("trial 0000 of 1: complete")


def test_ipython_is_not_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert not name.startswith("IPython")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    run(tmp_path, 1)
    assert capsys.readouterr().out.startswith("trial 0000")
