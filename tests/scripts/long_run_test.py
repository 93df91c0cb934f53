"""scripts/long_run.py, short: a run that is killed ends as the one that is not."""

import pytest

from tests.scripts.scripts_test import TRAIN, run

LONG_RUN = TRAIN.parent / "long_run.py"
# In float64, since the order of sums depends on the number of workers.
DIGITS = "--task=digits --epochs=40 --precision=float64 --backup_freq=7 --verbose=0"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "sessions",
    ["1:1:SIGKILL,1", pytest.param("2:1:worker,1", marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_ends_like_the_other(sessions, tmp_path):
    table = tmp_path / "table.md"
    arguments = (f"--sessions={sessions}", f"--train={DIGITS}", "--measure=val_loss")
    # The spike comes after the end.
    arguments = (*arguments, "--inject_spike=100000", f"--markdown={table}")
    done = run(LONG_RUN, *arguments, f"--output_dir={tmp_path / 'runs'}", timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()]
    ends = [line[-1] for line in lines if line[0] in ("disturbed", "undisturbed")]
    wanted = ["a worker is killed"] if "worker" in sessions else ["SIGKILL"]
    assert ends == [*wanted, "ended", "ended"]
    epochs = [line for line in lines if line[0].isdecimal()]
    assert [line[0] for line in epochs] == [str(epoch) for epoch in range(40)]
    assert [line[2] for line in epochs] == [line[3] for line in epochs]

    # What is there is not overwritten.
    again = run(LONG_RUN, *arguments, f"--output_dir={tmp_path / 'runs'}", timeout=300)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr


def test_a_measure_that_there_is_not_is_refused_after_the_first_session(tmp_path):
    options = ("--train=--task=digits --epochs=1 --verbose=0", "--sessions=1", "--measure=loss_val")
    done = run(LONG_RUN, *options, f"--output_dir={tmp_path}")
    assert done.returncode == 2
    assert "--measure must be a column of" in done.stderr
    assert "val_loss" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["disturbed"]


def test_a_table_that_cannot_be_written_is_refused_before_training(tmp_path):
    done = run(LONG_RUN, "--markdown=/proc/table.md", f"--output_dir={tmp_path / 'runs'}")
    assert done.returncode == 2
    assert "--markdown=/proc cannot be written to" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("sessions", ["1:5:SIGKILL", "1,1", "0", "2:5:SIGHUP,1", ""])
def test_sessions_that_make_no_sense_are_refused(sessions):
    done = run(LONG_RUN, f"--sessions={sessions}")
    assert done.returncode == 2
    assert "WORKERS:SECONDS:END" in done.stderr
