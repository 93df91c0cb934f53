"""scripts/tune.py, as a user starts it: in a process of its own."""

import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.scripts import forked

TUNE = pathlib.Path(__file__).parents[2] / "scripts" / "tune.py"
TINY = ("--epochs=1", "--threads=1")


def start(*arguments, worker=None, cwd=None):
    environment = {k: v for k, v in os.environ.items() if k != "TFBIG_WORKER"}
    if worker is not None:
        environment["TFBIG_WORKER"] = str(worker)
    return subprocess.Popen(
        [sys.executable, TUNE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
    )


def finish(process):
    """Exit code, stdout and stderr."""
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def run(*arguments, **options):
    return finish(start(*arguments, **options))


def run_forked(*arguments):
    """The same in a process that need not import TensorFlow."""
    done = forked.run(TUNE, *arguments)
    return done.returncode, done.stdout, done.stderr


def trials(output):
    """Ids of the trials that a process has run."""
    return re.findall(r"^trial (\d{4})", output, flags=re.MULTILINE)


def losses(output):
    """The validation losses of the default configuration and of the best."""
    found = re.findall(r"^validation loss of .*?  (\d+\.\d+)$", output, flags=re.MULTILINE)
    return [float(value) for value in found]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A search of two trials: the directory and what was printed."""
    path = tmp_path_factory.mktemp("tune") / "digits"
    return path, *run("--max_trials=2", *TINY, f"--output_dir={path}")


def test_a_search_ends_with_a_summary_and_a_report(search):
    path, code, stdout, stderr = search
    assert (code, stderr) == (0, "")
    assert trials(stdout) == ["0000", "0001"]
    assert "2 trials: 2 complete" in stdout
    default, best = losses(stdout)
    assert best <= default
    assert str(path / "report.html") in stdout
    page = (path / "report.html").read_text()
    assert "<td>0001</td>" in page
    assert page.count("<figure") == 8


def test_a_search_goes_on_and_is_not_another(search):
    path = search[0]
    report = path.parent / "other.html"
    arguments = (f"--output_dir={path}", f"--report={report}")
    code, stdout, _ = run_forked("--max_trials=3", *TINY, *arguments)
    assert code == 0
    assert trials(stdout) == ["0002"]
    assert "<td>0002</td>" in report.read_text()
    # What was there is refused to another search.
    code, stdout, stderr = run_forked("--tuner=grid", *TINY, *arguments)
    assert (code, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert "created by a different search" in line


@pytest.mark.slow
def test_hyperband(tmp_path):
    arguments = ("--tuner=hyperband", "--max_epochs=1", "--threads=1", "--micro_batch_size=64")
    code, stdout, stderr = run(*arguments, f"--output_dir={tmp_path}")
    assert (code, stderr) == (0, "")
    assert trials(stdout) == ["0000"]


@pytest.mark.slow
def test_several_processes_share_a_search(tmp_path):
    path = tmp_path / "digits"
    arguments = ("--tuner=optuna", "--sampler=nsga2", "--pruner=median", "--max_trials=4", *TINY)
    workers = [start(*arguments, f"--output_dir={path}", worker=i) for i in range(2)]
    (code, first, _), (other_code, second, _) = map(finish, workers)
    assert (code, other_code) == (0, 0)
    assert sorted(trials(first) + trials(second)) == ["0000", "0001", "0002", "0003"]
    assert "4 trials: 4 complete" in first
    assert len(losses(first)) == 2
    assert (path / "report.html").exists()
    assert "report" not in second
    assert losses(second) == []


def test_an_interrupted_search_says_how_to_go_on(tmp_path):
    tuner = "hyperopt" if importlib.util.find_spec("hyperopt") else "random"
    process = start(f"--tuner={tuner}", "--max_trials=1000", *TINY, f"--output_dir={tmp_path}")
    for line in process.stdout:
        if line.startswith("trial 0000"):
            break
    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)
    assert code == 130
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    (line,) = lines
    assert line.startswith("tune.py: interrupted")
    assert "with the same flags" in line
    assert not (tmp_path / "report.html").exists()


ERRORS = {
    "--task=nothing": "--task=nothing",
    "--tuner=nothing": "hyperband",
    "--max_trials=0": "positive",
    "--epochs=0": "positive",
    "--seed=-1": "seed",
    "--threads=-1": "threads",
    "--micro_batch_size=0": "positive",
    "--tuner=random --sampler=tpe": "--sampler goes with",
    "--tuner=bayesian --sampler=cmaes": "tpe or gp",
    "--tuner=hyperband --max_trials=5": "--max_trials goes with",
    "--tuner=hyperband --pruner=asha": "--pruner goes with",
    "--max_epochs=9": "hyperband",
    "--output_dir=/proc/tfbig": "cannot be written",
    "--output_dir=/": "a directory with a name",
    "--report=.": "must be a file",
    "--no_such_flag=1": "no_such_flag",
    "argument": "argument",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_a_bad_flag_gets_one_line_and_exit_code_2(arguments, tmp_path):
    code, stdout, stderr = run(*arguments.split(), cwd=tmp_path)
    assert (code, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith("tune.py: ")
    assert ERRORS[arguments] in line


def test_one_of_several_workers_does_not_overwrite(tmp_path):
    code, _, stderr = run("--overwrite", f"--output_dir={tmp_path}", worker=1)
    assert code == 2
    assert "--overwrite" in stderr


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sklearn'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{TUNE.parents[1]}")
    code, stdout, stderr = run(f"--output_dir={tmp_path / 'run'}")
    assert (code, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line == (
        "tune.py: --task=digits needs a package that is not there: pip install 'tfbig[sklearn]'"
    )


def test_a_password_is_not_printed(tmp_path):
    # Nothing listens at port 1.
    storage = "--storage=postgresql://user:s3cret@127.0.0.1:1/db"
    code, stdout, stderr = run_forked(storage, *TINY, f"--output_dir={tmp_path}")
    assert (code, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert "s3cret" not in line
    assert "cannot be used" in line


def test_help_is_quick_and_lists_the_flags(monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    code, stdout, imported = run("--help")
    assert code == 0
    # TensorFlow takes seconds.
    assert "absl.flags\n" in imported
    assert "tensorflow" not in imported
    for name in ("tuner", "sampler", "pruner", "max_trials", "storage", "report", "threads"):
        assert f"--{name}:" in stdout
