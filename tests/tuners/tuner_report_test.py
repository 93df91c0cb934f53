"""What a search has found, as a table, as importance and as a page; and what a notebook shows."""

import base64
import builtins
import importlib.util
import os
import re
import sys
import types

import keras_tuner
import pytest

from tfbig import errors, tuners
from tfbig.tuners import _trial_callbacks

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
            raise keras_tuner.errors.FailedTrialError
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
    tuner = search(Search, tmp_path_factory.mktemp("search"), objective("loss"), 12)
    message = f"Traceback:\n  a line\nFailedTrialError: out of {MARKUP}\n"
    tuner.oracle.get_trial(f"{FAILED:04d}").message = message
    return tuner


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
    "Parallel coordinates",
    "Rungs: the objective after each epoch",
]


def images(page):
    """Titles of the images in a page, each of which is a PNG."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', page)
    assert len(found) == page.count("<img")
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for _, data in found)
    return [title for title, _ in found]


def test_a_report_has_all_plots_in_itself(page):
    pytest.importorskip("matplotlib")
    assert images(page) == ONE_OBJECTIVE
    assert "Left out" not in page
    for outside in ("http:", "https:", "<script", "<link", "url(", "@import"):
        assert outside not in page


def test_a_report_says_what_was_searched_and_found(page, searched):
    for text in ("loss (min)", "Search", "tpe", "12 of 12: 10 complete, 1 infeasible, 1 pruned"):
        assert text in page
    (best,) = searched.oracle.get_best_trials(1)
    assert f"<h3>Trial {best.trial_id}: loss {best.score:.6g}</h3>" in page
    assert page.count('<tr class="best">') == 1
    assert f'<tr class="best"><td>{best.trial_id}</td>' in page
    for trial_id in searched.oracle.trials:
        assert f"<td>{trial_id}</td>" in page


def test_what_users_named_is_escaped(page):
    assert MARKUP not in page
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page
    assert "<td>FailedTrialError: out of &lt;script&gt;" in page


def test_a_report_of_several_objectives_has_their_front(front, tmp_path):
    pytest.importorskip("matplotlib")
    front.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    expected = ["Pareto front", "Parallel coordinates"]
    for name in "ab":
        expected += [f"Optimization history of {name}", f"Importance for {name}"]
        expected += [f"Slices of {name}"]
    assert sorted(images(page)) == sorted(expected)
    assert page.count("Left out") == 1  # The rungs.
    assert page.count('<tr class="best">') == len(front.get_pareto_trials()) > 1


def test_a_report_of_no_trial_says_so(tmp_path):
    tuner = Search(objective=objective("loss"), directory=tmp_path)
    tuner.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "none yet" in page
    assert "no trial is complete yet" in page
    assert "<img" not in page


def test_a_report_without_extras_says_what_to_install(searched, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    with monkeypatch.context() as patch:
        without(patch, "sklearn")
        searched.report(path)
        assert "pip install tfbig[sklearn]" in path.read_text()
        assert images(path.read_text()) == [t for t in ONE_OBJECTIVE if "Importance" not in t]
    without(monkeypatch, "matplotlib")
    searched.report(path)
    page = path.read_text()
    assert "pip install tfbig[plots]" in page
    assert "<img" not in page
    assert "Best values" in page


@pytest.mark.parametrize(
    "storage",
    ["postgresql://user:s3cret@host/db", "postgresql://host/db?user=user&password=s3cret"],
)
def test_a_report_never_has_the_password(searched, tmp_path, monkeypatch, storage):
    without(monkeypatch, "matplotlib")
    monkeypatch.setattr(searched.oracle, "_storage", storage)
    failed = searched.oracle.get_trial(f"{FAILED:04d}")
    monkeypatch.setattr(failed, "message", f"cannot connect to {storage}")
    searched.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "host/db" in page
    assert "s3cret" not in page


def test_a_report_that_cannot_be_written_leaves_the_old_one(searched, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    without(monkeypatch, "matplotlib")

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
    matplotlib = pytest.importorskip("optuna.visualization.matplotlib")

    def fail(*args, **kwargs):
        raise RuntimeError("no <font>")

    monkeypatch.setattr(matplotlib, "plot_slice", fail)
    searched.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert images(page) == [t for t in ONE_OBJECTIVE if t != "Slices"]
    assert "RuntimeError: no &lt;font&gt;" in page


def test_a_report_leaves_matplotlib_as_it_was(searched, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figure = pyplot.figure()
    before = dict(matplotlib.rcParams), pyplot.get_fignums()
    searched.report(tmp_path / "report.html")
    assert (dict(matplotlib.rcParams), pyplot.get_fignums()) == before
    assert pyplot.gcf() is figure
    pyplot.close(figure)


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
