"""Searches that somebody looks at: read-only, from the command line, and while they run."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time

import keras_tuner
import optuna
import pytest

from tfbig import errors, tuners
from tfbig.tuners import __main__ as command
from tfbig.tuners import _ledger, _read_only, _record, _study, _watch

SECRET = "s3cret"


class Search(tuners.OptunaSearch):
    """Trains nothing: the loss is `x`, and the third trial fails."""

    def run_trial(self, trial, **kwargs):
        del kwargs
        x = trial.hyperparameters.Float("x", 0.5, 10.0, default=5.0)
        trial.hyperparameters.Choice("kernel", [(3, 3), (5, 5)])
        if trial.trial_id == "0002":
            raise keras_tuner.errors.FailedTrialError("out of memory")
        return {"loss": x, "time": -x}


def tuner_of(directory, max_trials=5, names=("loss",), **kwargs):
    objectives = [keras_tuner.Objective(name, "min") for name in names]
    tuner = Search(
        objective=objectives if len(names) > 1 else objectives[0],
        max_trials=max_trials,
        seed=0,
        directory=directory,
        project_name=kwargs.pop("project_name", "p"),
        **kwargs,
    )
    tuner.oracle.verbose = 0
    return tuner


def close(tuner):
    """As if the process of a search had ended: its connections are closed."""
    if tuner.oracle._opened is not None:
        tuner.oracle.study._storage._backend.engine.dispose()
        tuner.oracle._ledger._engine.dispose()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a project whose search is over."""
    directory = tmp_path_factory.mktemp("finished")
    tuner = tuner_of(directory)
    tuner.search()
    close(tuner)
    assert os.listdir(directory / "p") == [_study.FILE]
    return directory / "p"


@pytest.fixture
def elsewhere():
    """A directory that all users may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield pathlib.Path(directory)


@contextlib.contextmanager
def unwritable(directory):
    """Nobody may write in a directory, not even root."""
    for path in [*directory.rglob("*"), directory]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o755)


def contents(directory):
    """What every file of a directory holds, and when it was written."""
    found = {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.rglob("*.*")}
    # Those who read a log note that in its index.
    return {p: None if p.endswith("-shm") else found[p] for p in found}


@contextlib.contextmanager
def unchanged(directory):
    before = contents(directory)
    yield
    assert contents(directory) == before


def run(capsys, *arguments):
    """The exit code, the output and the error of a command."""
    code = command.main([str(a) for a in arguments])
    output, error = capsys.readouterr()
    return code, output, error


# --- What a study says ---


def test_a_record_needs_no_program(finished):
    record = _read_only.open_study(str(finished)).record()
    assert record.name == "p"
    assert record.objectives == ["loss"]
    assert record.directions == ["minimize"]
    assert record.max_trials == 5
    assert record.settings["sampler"] == "tpe"
    assert record.counts() == {"complete": 4, "infeasible": 1}
    assert [hp.name for hp in record.space.space] == ["x", "kernel"]
    assert record.rows[0].values["kernel"] == (3, 3)
    scores = [row.scores[0] for row in record.best]
    assert scores == sorted(scores)


@pytest.mark.parametrize("form", ["directory", "file", "url"])
def test_a_study_is_found_and_not_changed(finished, form, capsys):
    file = finished / _study.FILE
    where = {"directory": finished, "file": file, "url": f"sqlite:///{file}"}[form]
    with unchanged(finished):
        code, output, error = run(capsys, "best", where)
    assert (code, error) == (0, "")
    assert output.startswith("trial 000")
    assert "kernel: (" in output


@pytest.mark.parametrize("state", ["closed", "open", "killed", "log only"])
@pytest.mark.parametrize("can_write", [True, False])
def test_a_study_is_read_in_any_state_without_a_change(elsewhere, state, can_write, capsys):
    tuner = tuner_of(elsewhere / "running", 3)
    tuner.search()
    if state == "closed":
        close(tuner)
    project = elsewhere / "running" / "p"
    expected = [_study.FILE] if state == "closed" else ["-shm", "-wal", ""]
    assert sorted(os.listdir(project)) == sorted(
        name if name == _study.FILE else _study.FILE + name for name in expected
    )
    if state in ("killed", "log only"):
        project = pathlib.Path(shutil.copytree(project, elsewhere / "copy" / "p"))
        if state == "log only":
            (project / f"{_study.FILE}-shm").unlink()
    # The log has what the file lacks.
    if state != "closed":
        log = project / f"{_study.FILE}-wal"
        assert log.stat().st_size > 0
    arguments = "report", project, "--output", elsewhere / "report.html"
    os.chmod(elsewhere, 0o777)
    with unchanged(project), unwritable(project) if not can_write else contextlib.nullcontext():
        code, output, error = run(capsys, "best", project, "--num", "9")
        assert (code, error, output.count("trial ")) == (0, "", 2)
        assert run(capsys, *arguments)[0] == 0
    close(tuner)


def test_a_tuner_shows_the_results_of_a_search_that_it_may_not_write(elsewhere, capsys):
    made = tuner_of(elsewhere)
    made.search()
    best = made.get_best_hyperparameters()[0].values
    close(made)
    os.chmod(elsewhere, 0o777)
    with unchanged(elsewhere / "p"), unwritable(elsewhere / "p"):
        tuner = tuner_of(elsewhere)
        assert tuner.get_best_hyperparameters()[0].values == best
        tuner.results_summary()
        assert "5 trials: 4 complete, 1 infeasible" in capsys.readouterr().out
        tuner.report(elsewhere / "report.html")
        assert "4 complete" in (elsewhere / "report.html").read_text()
        assert tuner.remaining_trials == 0
        with pytest.raises(errors.StorageUnavailableError, match="cannot be written"):
            tuner.search()
        # What would be noted when a search resumes with another pruner is not.
        assert tuner_of(elsewhere, pruner="median").get_best_hyperparameters()[0].values == best
        different = tuner_of(elsewhere, names=("loss", "time"))
        with pytest.raises(errors.StudyError, match="different search"):
            different.results_summary()


# --- Errors in one line ---


def broken(directory):
    (directory / _study.FILE).write_bytes(b"SQLite format 3\0" + b"\7" * 5000)


def text(directory):
    (directory / _study.FILE).write_text("not a database")


def empty(directory):
    (directory / _study.FILE).write_bytes(b"")


def other_tables(directory):
    with contextlib.closing(sqlite3.connect(directory / _study.FILE)) as connection:
        connection.execute("CREATE TABLE a (b)")
        connection.commit()


def study_of_optuna(directory):
    optuna.create_study(storage=f"sqlite:///{directory / _study.FILE}", study_name="o")


def half_of_it(directory):
    tuner = tuner_of(directory, 2, project_name=".")
    tuner.search()
    close(tuner)
    with open(directory / _study.FILE, "r+b") as file:
        file.truncate(30_000)


def other_json(directory):
    tuner = tuner_of(directory, 2, project_name=".")
    tuner.search()
    close(tuner)
    with contextlib.closing(sqlite3.connect(directory / _study.FILE)) as connection:
        connection.execute("UPDATE tfbig_facts SET text = '{' WHERE name = 'settings'")
        connection.commit()


def nothing(directory):
    del directory


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, "has no study.db"),
        (empty, "holds no search of tfbig"),
        (text, "not a database"),
        (broken, "cannot be used"),
        (half_of_it, "malformed"),
        (other_tables, "holds no search of tfbig"),
        (study_of_optuna, "holds no search of tfbig"),
        (other_json, "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["best", "watch", "report"])
def test_what_is_no_study_is_an_error_of_one_line(tmp_path, make, words, name, capsys):
    make(tmp_path)
    options = ["--output", tmp_path / "report.html"] if name == "report" else []
    code, output, error = run(capsys, name, tmp_path, *options)
    assert code == 2
    assert output == "" or name == "watch"
    assert error.startswith("tfbig.tuners: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("no/such/path", "no/such/path does not exist"),
        ("sqlite:///no/such/path", "does not exist"),
        ("sqlite://", "not a file"),
        (f"nonsense://user:{SECRET}@host/db", "nonsense"),
        (f"mysql://user:{SECRET}@host/db", "driver is not installed"),
        (f"postgresql+psycopg://user:{SECRET}@127.0.0.1:1/db", "cannot be used"),
        (f"postgresql+psycopg://127.0.0.1:1/db?user=u&password={SECRET}", "cannot be used"),
    ],
)
def test_what_cannot_be_opened_is_an_error_without_the_password(where, words, capsys):
    if "psycopg" in where:
        pytest.importorskip("psycopg")
    code, output, error = run(capsys, "best", where)
    assert (code, output) == (2, "")
    assert error.count("\n") == 1
    assert words in error
    assert SECRET not in error


def test_a_directory_of_projects_is_an_error_that_names_them(finished, capsys):
    code, _, error = run(capsys, "best", finished.parent)
    assert code == 2
    assert f"Did you mean {finished}?" in error


def test_of_several_searches_in_a_database_one_is_named(tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/all.db"
    for name in ("first", "second"):
        tuner_of(tmp_path, 1, storage=url, project_name=name).search()
    code, _, error = run(capsys, "best", url)
    assert code == 2
    assert "several searches. Its searches: 'first', 'second'." in error
    code, _, error = run(capsys, "best", tmp_path / "all.db", "--name", "third")
    assert code == 2
    assert "no search 'third'" in error
    assert run(capsys, "best", url, "--name", "second")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [(), ("best",), ("nonsense", "x"), ("best", "x", "--num", "0"), ("watch", "x", "--interval=0")],
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        command.main(list(arguments))
    assert e.value.code == 2
    assert capsys.readouterr().err


# --- best ---


def test_the_best_as_json(finished, capsys):
    code, output, _ = run(capsys, "best", finished, "--json", "--num", 2)
    assert code == 0
    first, second = json.loads(output)
    assert first["scores"]["loss"] <= second["scores"]["loss"]
    assert first["values"]["x"] == first["scores"]["loss"]
    assert first["values"]["kernel"] in ([3, 3], [5, 5])


def test_json_has_no_infinite_numbers():
    value = command._plain({"a": (float("inf"), [1.5, None, float("nan")])})
    assert value == {"a": ["inf", [1.5, None, "nan"]]}


def test_of_several_objectives_the_front_is_printed(tmp_path, capsys):
    tuner_of(tmp_path, names=("loss", "time")).search()
    _, output, _ = run(capsys, "best", tmp_path / "p")
    assert output.count("trial ") == 4
    assert "loss, time" in output
    assert run(capsys, "best", tmp_path / "p", "--num", 1)[1].count("trial ") == 1


def test_a_search_without_a_result_has_a_code_of_its_own(tmp_path, capsys):
    assert tuner_of(tmp_path).oracle.study
    assert run(capsys, "best", tmp_path / "p")[0] == 1
    code, output, error = run(capsys, "best", tmp_path / "p", "--json")
    assert (code, json.loads(output)) == (1, [])
    assert "no trial is complete" in error


# --- report ---


def test_the_report_is_that_of_the_tuner(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, output, _ = run(capsys, "report", finished)
    assert code == 0
    assert "report.html: 5 trials of 'p'" in output
    page = (tmp_path / "report.html").read_text()
    assert "5 of 5: 4 complete, 1 infeasible" in page
    tuner_of(finished.parent).report(tmp_path / "of_tuner.html")
    ends = [(tmp_path / n).read_text().partition("<h2>Best")[2] for n in os.listdir(tmp_path)]
    assert ends[0] == ends[1]


def test_a_report_that_cannot_be_written_is_an_error_of_one_line(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "report.html"):
        code, _, error = run(capsys, "report", finished, "--output", output)
        assert code == 2
        assert error.count("\n") == 1


# --- watch ---


def test_watching_a_finished_search_ends_at_once(finished, capsys):
    with unchanged(finished):
        code, output, _ = run(capsys, "watch", finished)
    assert code == 0
    first, status, last = output.splitlines()
    assert first == f"Search 'p' in {finished / _study.FILE}"
    assert status.startswith("5 of 5 trials have ended, 0 running, 0 processes alive, best loss")
    assert last == "No process works on the search."


def watched(directory, **kwargs):
    """A watch and what it prints."""
    out = io.StringIO()
    reopen = lambda: _read_only.open_study(str(directory))  # noqa: E731
    return _watch.Watch(reopen, 0.01, out, **kwargs), out


def test_watching_a_search_prints_each_trial_that_ends(tmp_path):
    tuner = tuner_of(tmp_path, 5)
    oracle = tuner.oracle
    oracle.begin_search()
    watch, out = watched(tmp_path / "p")

    def lines():
        assert watch._look()
        found = out.getvalue().splitlines()
        out.seek(0)
        out.truncate()
        return found

    def end(x):
        trial = oracle.create_trial("t")
        trial.hyperparameters.Float("x", 0.5, 10.0)
        trial.hyperparameters.values = {"x": x}
        running = lines()
        oracle.update_trial(trial.trial_id, {"loss": x})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
        return running

    assert lines()[1] == "0 of 5 trials have ended, 0 running, 1 process alive, no result yet"
    assert end(2.0) == ["0 of 5 trials have ended, 1 running, 1 process alive, no result yet"]
    line, status = lines()
    assert line.startswith("trial 0000 of 5: complete, loss 2, 0.")
    assert line.endswith("s; x=2")
    assert (
        status == "1 of 5 trials have ended, 0 running, 1 process alive, best loss 2 (trial 0000)"
    )
    assert lines() == []
    end(1.0)
    assert lines()[1].endswith("best loss 1 (trial 0001)")
    trial = oracle.create_trial("t")
    trial.status, trial.message, trial.why = "INVALID", "Traceback\n  x\nE: no memory", "infeasible"
    oracle.end_trial(trial)
    assert "trial 0002 of 5: infeasible: E: no memory, 0." in lines()[0]
    oracle.release()
    assert not watch._look()
    close(tuner)


def test_a_watch_sees_a_search_that_begins_and_ends_meanwhile(tmp_path):
    first = tuner_of(tmp_path, 1)
    first.search()
    close(first)
    watch, out = watched(tmp_path / "p")
    assert not watch._look()
    second = tuner_of(tmp_path, 3)
    second.oracle.begin_search()
    assert watch._look()
    assert "1 of 3 trials have ended, 0 running, 1 process alive" in out.getvalue()
    second.search()
    close(second)
    assert not watch._look()
    assert "trial 0001 of 3: complete" in out.getvalue()
    # Nothing is left beside the file.
    assert os.listdir(tmp_path / "p") == [_study.FILE]


def test_a_watch_outlasts_a_storage_that_does_not_answer(tmp_path, monkeypatch):
    tuner = tuner_of(tmp_path)
    tuner.oracle.begin_search()
    watch, out = watched(tmp_path / "p")
    assert watch._looked()
    read = _record.read

    def fail(*args):
        monkeypatch.setattr(_record, "read", read)
        raise ValueError("half of it")

    monkeypatch.setattr(_record, "read", fail)
    assert watch._looked()
    assert "half of it" in out.getvalue()
    assert "Trying again." in out.getvalue()
    assert watch._looked()
    tuner.oracle.release()


def test_the_last_line_of_a_terminal_is_the_status(finished, monkeypatch):
    watch, out = watched(finished)
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    watch.run()
    watch.close()
    assert out.getvalue().startswith("Search 'p'")
    assert "\r\x1b[K5 of 5 trials" in out.getvalue()
    assert out.getvalue().endswith("\r\x1b[KNo process works on the search.\n")


def test_a_silent_process_of_another_machine_counts_as_dead(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    alive = _watch._Alive()

    def among(heartbeat):
        row = _ledger.TrialRow(0, "other|1|2|x", heartbeat, 0, _ledger.RUNNING, "{}")
        return alive.among({"idle|1|2|y"}, [row])

    assert among(0) == {"other|1|2|x", "idle|1|2|y"}
    now = 59.0
    assert among(1) == {"other|1|2|x", "idle|1|2|y"}
    now = 61.0
    assert among(1) == {"other|1|2|x"}
    now = 120.0
    assert among(1) == set()
    assert among(2) == {"other|1|2|x"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_ends_a_watch_without_a_traceback(tmp_path):
    tuner = tuner_of(tmp_path)
    tuner.oracle.begin_search()
    arguments = [sys.executable, "-m", "tfbig.tuners", "watch", str(tmp_path / "p")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        while "1 process alive" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        timer.cancel()
        process.kill()
        tuner.oracle.release()
    assert process.returncode == command.INTERRUPTED
    assert "Traceback" not in error
