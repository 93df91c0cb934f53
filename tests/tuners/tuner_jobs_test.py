"""Searches of several processes, which are killed, stopped and started again."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import types

import keras_tuner
import optuna
import pytest
import sqlalchemy as sa

from tests import job
from tests.jobs.killed_search_points import POINTS
from tfbig.launch import _environment
from tfbig.tuners import HyperParameters, StudyOracle, _isolation, _read_only
from tfbig.tuners import __main__ as looked

KINDS = ("random", "pruned", "nsga2", "hyperopt", "grid", "asha", "population")
KINDS = dict.fromkeys(KINDS, 12)
KINDS |= {"hyperband": 17}

slow = pytest.mark.slow


@pytest.fixture(scope="session")
def postgresql():
    """URL of a PostgreSQL server of this test run's own."""
    pytest.importorskip("psycopg", reason="needs psycopg to talk to PostgreSQL")
    programs = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs PostgreSQL in /usr/lib/postgresql: apt-get install postgresql")
    # The server refuses to run as root.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    (port,) = _environment.free_ports(1)
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        if user:
            shutil.chown(home, "postgres")

        def run(program, *options):
            command = [programs[-1] / program, "-D", f"{home}/data", *options]
            subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL, **user)

        run("initdb", "-A", "trust", "-U", "tfbig")
        options = f"-p {port} -k {home} -c fsync=off"
        run("pg_ctl", "-w", "-o", options, "-l", f"{home}/log", "start")
        yield f"postgresql+psycopg://tfbig:secret@localhost:{port}/postgres"
        run("pg_ctl", "-m", "immediate", "stop")


def killed(directory, storage, kind, *options):
    """Runs searches to their end; returns what became of each, and how many processes died."""
    command = [sys.executable, job.JOBS / "killed_search.py", directory, storage, kind, *options]
    done = job.finish(job.start(command), 250)
    assert done.returncode == 0, done.stderr
    results = [json.loads(p.read_text()) for p in sorted(directory.glob("*.json"))]
    return results, list(map(int, done.stdout.split()))


def assert_each_once(result, kind, trials=None):
    """Each trial of a search has completed, exactly once."""
    trials = trials or KINDS[kind]
    assert sorted(result["indices"]) == list(range(trials))
    assert set(result["rows"]) == {"told"}
    if kind == "population":
        # Values change while trials are trained.
        assert set(result["states"]) == {"COMPLETE"}
        assert result["steps"] == [[1, 2, 3, 4]] * trials
        return
    # No two trials have the same values, and one has the defaults.
    texts = [json.dumps(v, sort_keys=True) for v in result["values"]]
    assert len(set(texts)) == trials
    defaults = [v for v in result["values"] if (v["a"], v["b"], v.get("c", 0)) == (None, 1, 0)]
    assert len(defaults) == 1
    states = result["states"]
    if kind == "hyperband":
        assert [states.count(s) for s in ("COMPLETE", "PRUNED")] == [5, 12]
    elif kind == "asha":
        # Who is promoted depends on who is faster; who came furthest is complete.
        assert set(states) == {"COMPLETE", "PRUNED"}
    else:
        assert set(states) == {"COMPLETE"}


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("asha", 10),
        pytest.param("hyperband", 10, marks=slow),
        *(pytest.param(kind, 40, marks=slow) for kind in KINDS),
    ],
)
def test_a_search_whose_processes_are_killed_ends_with_each_trial_once(kind, kills, tmp_path):
    options = ["--kills", kills, "--workers", 2]
    (result,), (deaths,) = killed(tmp_path, "file", kind, *options)
    assert_each_once(result, kind)
    assert deaths >= kills // 3


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("population", 10), *(pytest.param(kind, 40, marks=slow) for kind in KINDS)],
)
def test_on_postgresql_too(kind, kills, postgresql, tmp_path):
    options = ["--kills", kills, "--workers", 2]
    (result,), (deaths,) = killed(tmp_path, postgresql, kind, *options)
    assert_each_once(result, kind)
    assert deaths >= kills // 3


def test_a_search_on_postgresql_can_be_looked_at(postgresql, tmp_path, capsys):
    oracle = StudyOracle(
        objective=keras_tuner.Objective("loss", "min"),
        max_trials=1,
        hyperparameters=HyperParameters(),
        storage=postgresql,
    )
    oracle._set_project_dir(str(tmp_path), "looked at")
    oracle._display = types.SimpleNamespace(on_trial_begin=print, on_trial_end=print)
    trial = oracle.create_trial("t")
    oracle.update_trial(trial.trial_id, {"loss": 0.5})
    trial.status = "COMPLETED"
    oracle.end_trial(trial)
    oracle.study._storage._backend.engine.dispose()
    oracle._ledger._engine.dispose()
    where = [postgresql, "--name", "looked at"]
    assert looked.main(["report", *where, "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Trial 0000: loss 0.5" in page
    assert "secret" not in page
    capsys.readouterr()
    assert looked.main(["watch", *where]) == 0
    assert "1 trials have ended" in capsys.readouterr().out
    opened = _read_only.open_study(postgresql, "looked at")
    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        opened.ledger.claim(0, "a")
    with pytest.raises(optuna.exceptions.StorageInternalError):
        opened.study.set_user_attr("a", 1)


@pytest.mark.parametrize("kind", ["random", pytest.param("grid", marks=slow)])
def test_a_process_that_dies_at_the_worst_moment_leaves_nothing_behind(kind, tmp_path):
    results, deaths = killed(tmp_path, "file", kind, "--points", "--trials", 4)
    assert deaths == [1] * len(POINTS)
    assert len(results) == len(POINTS)
    for result in results:
        assert_each_once(result, kind, 4 if kind == "random" else 12)


@pytest.mark.parametrize("storage", ["file", pytest.param("postgresql", marks=slow)])
def test_four_workers_share_a_space_that_only_trials_define(storage, request, tmp_path):
    if storage == "postgresql":
        storage = request.getfixturevalue("postgresql")
    (result,), _ = killed(tmp_path, storage, "defined", "--workers", 4, "--trials", 60)
    assert_each_once(result, "defined", 60)
    assert result["processes"] == 4


@slow
def test_a_process_that_was_stopped_for_long_drops_its_late_result(tmp_path):
    options = ["--stops", 3, "--workers", 2, "--trials", 40]
    (result,), (deaths,) = killed(tmp_path, "file", "random", *options)
    assert deaths == 0
    assert_each_once(result, "random", 40)


ISOLATED = """
    import os, signal, sys
    import tfbig.tuners

    class Search(tfbig.tuners.RandomSearch):
        def run_trial(self, trial, *args, **kwargs):
            x = trial.hyperparameters.Float("x", 0, 1)
            if trial.trial_id == "0001":
                os.kill(os.getpid(), signal.SIGKILL)
            self.kept = bytearray(2**28)
            print("memory of", os.getpid(), resident(), flush=True)
            return x

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    search = Search(
        max_trials=int(sys.argv[2]), seed=0, directory=sys.argv[1], isolate=True, overwrite=True
    )
    len(search.oracle.trials)  # Opens the study.
    before = resident()
    search.search(verbose=0)
    print("grown by", resident() - before)
    print(*(t.status for t in search.oracle.trials.values()))
    print(search.oracle.trials["0001"].message)
"""


@pytest.mark.parametrize("trials", [3, pytest.param(50, marks=slow)])
def test_a_trial_in_a_process_of_its_own_leaves_no_memory_behind(trials, tmp_path):
    program = tmp_path / "search.py"
    program.write_text(textwrap.dedent(ISOLATED))
    done = job.finish(job.start([sys.executable, program, tmp_path, trials]), 550)
    assert done.returncode == 0, done.stderr
    *children, grown, statuses, message = done.stdout.splitlines()
    assert len({line.split()[2] for line in children}) == len(children) == trials - 1
    assert int(grown.split()[-1]) < 20 * 2**20
    wanted = ["COMPLETED"] * trials
    wanted[1] = "INVALID"
    assert statuses.split() == wanted
    assert message == "The process of the trial was ended by SIGKILL."


# Its trials fail, or take longer than the search may.
LIMITED = """
    import sys, time
    import tfbig.tuners

    class Search(tfbig.tuners.RandomSearch):
        def run_trial(self, trial, *args, **kwargs):
            trial.hyperparameters.Float("x", 0, 1)
            print("trial", trial.trial_id, flush=True)
            if sys.argv[2] == "fails":
                raise RuntimeError("no luck")
            time.sleep(4)
            return 0.0

    limits = {"max_consecutive_failed_trials": 2} if sys.argv[2] == "fails" else {"max_seconds": 4}
    search = Search(max_trials=4, directory=sys.argv[1], isolate=True, **limits)
    search.search(verbose=0)
    print("ended", flush=True)
"""


@pytest.mark.parametrize("kind", ["fails", "takes long"])
def test_the_limits_of_a_search_hold_for_all_processes_of_its_trials(kind, tmp_path):
    program = tmp_path / "search.py"
    program.write_text(textwrap.dedent(LIMITED))
    done = job.finish(job.start([sys.executable, program, tmp_path, kind]), 250)
    lines = done.stdout.splitlines()
    if kind == "fails":
        assert lines == ["trial 0000", "trial 0001"]
        assert "SearchError: 2 trials in a row failed" in done.stderr
    else:
        assert lines == ["trial 0000", "ended"], done.stderr


# Two searches, one after the other.
TWO = """
    import sys
    import tfbig.tuners

    class Search(tfbig.tuners.RandomSearch):
        def run_trial(self, trial, *args, **kwargs):
            print(self.project_name, trial.trial_id, flush=True)
            return trial.hyperparameters.Float("x", 0, 1)

    options = {"directory": sys.argv[1], "overwrite": True}
    first = Search(max_trials=2, project_name="first", **options)
    first.search(verbose=0)
    (best,) = first.get_best_hyperparameters()
    second = Search(max_trials=1, project_name="second", isolate=True, **options)
    second.search(best.get("x"), verbose=0)
    print(*(len(s.oracle.trials) for s in (first, second)))
"""


def test_the_process_of_a_trial_runs_no_search_before_its_own_again(tmp_path):
    program = tmp_path / "search.py"
    program.write_text(textwrap.dedent(TWO))
    done = job.finish(job.start([sys.executable, program, tmp_path]), 250)
    trials = ["first 0000", "first 0001", "second 0000"]
    assert done.stdout.splitlines() == [*trials, "2 1"], done.stderr


# An error that no trial causes ends the search.
ENDED = """
    import sys
    import tfbig.tuners

    class OwnError(tfbig.tuners.errors.FatalError):
        # It can be pickled, and not be loaded.
        def __init__(self, one, other):
            super().__init__(f"{one} and {other}")

    class Search(tfbig.tuners.RandomSearch):
        def run_trial(self, trial, *args, **kwargs):
            trial.hyperparameters.Float("x", 0, 1)
            if sys.argv[2] == "own":
                raise OwnError("this", "that")
            if sys.argv[2] == "report":
                self.report(trial, 1, {"other": 1.0})
            return super().run_trial(trial, *args, **kwargs)

    objective = tfbig.tuners.Objective("score", "min")
    search = Search(lambda hp: "no model", objective, directory=sys.argv[1], isolate=True)
    try:
        search.search(verbose=0)
    except tfbig.errors.SearchError as e:
        print(type(e).__name__, e, sep=": ")
        print(any("in run_trial" in note for note in e.__notes__))
    print(*(t.status for t in search.oracle.trials.values()))
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("report", "SearchError: `logs` must have the objective 'score'. Received: ['other']."),
        (
            "model",
            "NotAModelError: The model-building function must return a Keras model. Received: "
            "'no model' of type str.",
        ),
        ("own", "SearchError: OwnError: this and that"),
    ],
)
def test_an_error_that_ends_the_search_is_raised_in_the_process_of_the_search(
    kind, message, tmp_path
):
    program = tmp_path / "search.py"
    program.write_text(textwrap.dedent(ENDED))
    done = job.finish(job.start([sys.executable, program, tmp_path, kind]), 250)
    # The trial may go on when the program is corrected.
    assert done.stdout.splitlines() == [message, "True", "RUNNING"], done.stderr


# Says its id, and runs on.
RUNS_ON = """
    import os, pathlib, sys, time
    name = pathlib.Path(sys.argv[1], "new")
    name.write_text(str(os.getpid()))
    name.rename(name.with_name("child"))
    time.sleep(100)
"""

STARTS = """
    import sys
    from tfbig.tuners import _isolation
    sys.orig_argv = sys.orig_argv[:1] + sys.argv[1:]
    watch = _isolation.Watch(None, lambda pid: None)
    _isolation.run_trials("a search", lambda: True, lambda *death: True, watch)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="uses a signal of Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_trial_ends_with_the_process_of_its_search(number, tmp_path):
    parent, child = tmp_path / "parent.py", tmp_path / "child.py"
    parent.write_text(textwrap.dedent(STARTS))
    child.write_text(textwrap.dedent(RUNS_ON))
    process = job.start([sys.executable, parent, child, tmp_path])
    deadline = time.monotonic() + 60
    while not (tmp_path / "child").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    # It ends when the child no longer holds its output open.
    assert job.finish(process, 20).returncode == -number


# Hangs in its first run, deaf to SIGTERM if it is to be; there is no trial in the third.
HANGING = """
    import pathlib, signal, sys, time
    runs = pathlib.Path(sys.argv[1])
    runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
    if runs.read_text() == "x":
        if sys.argv[2] == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        runs.with_name("hangs").touch()
        time.sleep(1000)
    sys.exit(75 if runs.read_text() == "xx" else 76)
"""


@pytest.mark.parametrize("kind", ["deaf", "not deaf"])
def test_a_process_that_hangs_in_its_trial_is_ended_and_the_next_one_runs(
    kind, tmp_path, monkeypatch
):
    program, runs, deaths, codes = tmp_path / "program.py", tmp_path / "runs", [], []
    program.write_text(textwrap.dedent(HANGING))
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, program, runs, kind])
    monkeypatch.setattr(_isolation, "_SECONDS_TO_END", 0.5)
    end = _isolation._end
    monkeypatch.setattr(_isolation, "_end", lambda process: codes.append(end(process)) or codes[-1])
    began = time.monotonic()

    def why_overdue(pid):
        assert time.monotonic() < began + 60
        if not (tmp_path / "hangs").exists():
            return None
        (tmp_path / "hangs").unlink()
        return "It hangs."

    watch = _isolation.Watch(0.05, why_overdue)
    # It died without a trial: that has just ended by itself.
    _isolation.run_trials("a search", lambda: True, lambda *death: deaths.append(death), watch)
    assert runs.read_text() == "xxx"
    assert [death[1:] for death in deaths] == [("It hangs.", False)]
    assert codes == [-signal.SIGKILL if kind == "deaf" else -signal.SIGTERM]


HANGS_IN_A_BATCH = """
    import sys, time
    import keras
    import numpy as np
    import tfbig.tuners

    class Hangs(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            time.sleep(1000)

    class Model(tfbig.tuners.HyperModel):
        def build(self, hp):
            hp.Choice("x", [0, 1])
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            return model

        def fit(self, hp, model, *args, callbacks, **kwargs):
            callbacks = [*callbacks, *([] if hp.get("x") else [Hangs()])]
            return model.fit(*args, callbacks=callbacks, **kwargs)

    tuner = tfbig.tuners.GridSearch(
        Model(), "loss", directory=sys.argv[1], isolate=True, timeout_per_trial=15, grace_period=5
    )
    tuner.search(np.zeros((8, 3)), np.zeros((8, 1)), verbose=0)
    print(*(t.status for t in tuner.oracle.trials.values()))
    print(tuner.oracle.trials["0000"].message)
"""


@slow
def test_a_trial_that_hangs_in_a_batch_is_stopped_by_its_timeout(tmp_path):
    program = tmp_path / "search.py"
    program.write_text(textwrap.dedent(HANGS_IN_A_BATCH))
    done = job.finish(job.start([sys.executable, program, tmp_path]), 250)
    assert done.returncode == 0, done.stderr
    statuses, message = done.stdout.splitlines()
    assert statuses == "INVALID COMPLETED"
    assert message == (
        "The trial took longer than timeout_per_trial=15 s. Because it did not stop by itself "
        "within grace_period=5 s more, its process was ended."
    )


def test_workers_of_a_job_train_each_trial_together(tmp_path):
    done = job.run("search", tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    chief, other = job.results(tmp_path)
    assert chief == other
    assert chief["statuses"] == ["COMPLETED", "STOPPED", "COMPLETED"]
    rates, replicas = zip(*chief["trained"], strict=True)
    assert replicas == (2, 2, 2)
    assert len(set(rates)) == 3
    assert any(abs(chief["best"]["rate"] - rate) < 1e-7 for rate in rates)
    divided = chief["divided"]
    assert divided["ended"] == ["COMPLETED"] * 3
    # Adding up over the workers may round otherwise.
    assert divided["losses"] == pytest.approx(divided["scores"], rel=1e-6)
    assert len(divided["losses"]) == 1
    # Those of `ChiefOnly`, of which each trial has a copy.
    saved = sorted(path.name for path in tmp_path.glob("*.h5"))
    assert saved == ["1_2.weights.h5", "2_2.weights.h5"]


INDEPENDENT = """
    import os, sys
    import tfbig.tuners

    class Search(tfbig.tuners.GridSearch):
        def run_trial(self, trial, *args, **kwargs):
            return trial.hyperparameters.Int("x", 1, 12)

    assert "TF_CONFIG" not in os.environ
    marker = os.path.join(sys.argv[1], "failed")
    if os.environ["TFBIG_WORKER"] == "1" and not os.path.exists(marker):
        open(marker, "w").close()
        sys.exit(3)
    search = Search(directory=sys.argv[1])
    search.search(verbose=0)
    print(len(search.oracle.trials), search.get_best_hyperparameters()[0].values)
"""


def test_independent_workers_share_a_search_and_one_that_fails_is_started_again(tmp_path):
    program = tmp_path / "search.py"
    program.write_text(textwrap.dedent(INDEPENDENT))
    options = ["--workers", 2, "--independent", "--max_restarts", 1]
    done = job.finish(job.start([sys.executable, job.LAUNCH, *options, program, tmp_path]), 100)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\[worker .\] (.*)", done.stdout) == ["12 {'x': 1}"] * 2
    again = "worker 1 failed with exit code 3 and is restarted; restarts left: 0"
    assert again in done.stderr


@slow
def test_a_search_stays_what_it_is_when_one_independent_worker_fails_for_good(tmp_path):
    program = tmp_path / "search.py"
    program.write_text(textwrap.dedent(INDEPENDENT))
    options = ["--workers", 2, "--independent"]
    done = job.finish(job.start([sys.executable, job.LAUNCH, *options, program, tmp_path]), 100)
    assert done.returncode == 3
    assert re.findall(r"\[worker .\] (.*)", done.stdout) == ["12 {'x': 1}"]
    assert "worker 1 failed with exit code 3; the others continue" in done.stderr
