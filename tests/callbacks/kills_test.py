"""One training that dies again and again, in each way, and ends as if it had not."""

import csv
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests import job
from tests.callbacks.backup_test import PROGRAM, end_of

TIMEOUT = 180

# How a session of the training dies, and on how many workers it runs.
DEATHS = [
    ("SIGKILL", 1),
    ("full disk", 1),
    ("worker lost", 2),  # The next one has a worker less.
    ("SIGTERM", 1),
    ("SIGTERM", 2),
    ("worker lost", 3),
    ("full disk", 2),
    ("SIGKILL", 1),
    ("worker lost", 2),
    ("full disk", 1),
]
QUICK = 4


@pytest.fixture
def disk(tmp_path):
    """A directory on a disk of its own, of a few megabytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", directory]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as e:
        pytest.skip(f"a disk that gets full needs the right to mount one: {e}")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True, timeout=30)


def fill(disk):
    """Takes all that is left of a disk; returns the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**14))
        except OSError:
            return filler


@dataclasses.dataclass
class Session:
    """What a session printed: its first and its last update, and how it ended."""

    first: int
    last: int
    code: int


def run(command, death, rng, disk):
    """Runs the training until it has made a few updates and then dies, or to its end."""
    # The first backup is sure to be there once the third update begins.
    wanted, updates, filler = rng.randint(3, 5), [], None
    errors = []
    with job.start(command) as process:
        watchdog = threading.Timer(TIMEOUT, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        reader = threading.Thread(target=lambda: errors.extend(process.stderr))
        reader.start()
        try:
            for line in process.stdout:
                updates += map(int, re.findall(r"update (\d+)", line))
                if death is None or len(updates) < wanted:
                    continue
                if death == "full disk" and filler is None:
                    filler = fill(disk)
                    wanted += 2
                    continue
                # In the middle of an update, or of a backup.
                time.sleep(rng.uniform(0, 0.1))
                kill(process, death, rng)
                death = None
            process.wait(TIMEOUT)
            reader.join()
        finally:
            watchdog.cancel()
            if filler is not None:
                filler.unlink()
    assert updates, "".join(errors)
    return Session(min(updates), max(updates), process.returncode)


def updates_in(path):
    """The updates that a monitor has written rows of."""
    with path.open(newline="") as file:
        return [int(row["update"]) for row in csv.DictReader(file)]


def kill(process, death, rng):
    workers = job.children(process.pid)
    if death == "SIGTERM":
        process.terminate()
    elif death == "worker lost":
        # The launcher ends the others.
        job.send(rng.choice(workers), signal.SIGKILL)
    else:
        for pid in [*workers, process.pid]:
            job.send(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("optimizer", "keep", "kills", "shard"),
    [
        ("adamw", 1, QUICK, None),
        pytest.param("sgd", 2, 30, None, marks=pytest.mark.slow),
        pytest.param("adamw", 1, 30, None, marks=pytest.mark.slow),
        # Each worker writes its part of a backup; one worker goes on from the parts of several.
        pytest.param("adamw", 1, 10, "optimizer", marks=pytest.mark.slow),
        pytest.param("sgd", 2, 10, "weights", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(3600)
def test_training_survives_all_deaths(optimizer, keep, kills, shard, tmp_path, disk):
    rng = random.Random(kills)
    options = [
        *("--exact", f"--optimizer={optimizer}", f"--epochs={4 + 2 * kills}"),
        *("--sizes=[[0, 8], [9, 20], [30, 13]]", "--seconds=0.02"),
        # A backup of some megabytes, so that deaths meet one that is being written.
        *("--width=20000", "--save_freq=1", "--save_on_background", f"--keep={keep}"),
        *([f"--shard={shard}"] if shard else []),
    ]

    def command(directory, backup, workers=1):
        arguments = [directory, backup, *options, f"--monitor={directory}"]
        if workers == 1:
            return [sys.executable, PROGRAM, *arguments]
        return job.launcher("training", *arguments, workers=workers)

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(command(tmp_path / "whole", tmp_path / "backup"), None, rng, disk)
    assert (whole.first, whole.code) == (1, 0)
    backup = disk / "backup"
    sessions = []
    for death, workers in (DEATHS * kills)[:kills]:
        session = run(command(tmp_path / "killed", backup, workers), death, rng, disk)
        print(death, workers, session)
        assert session.code != 0
        # It resumes from a backup of the session before, which may not have been its last update.
        before = sessions[-1] if sessions else Session(1, 0, 0)
        assert before.first <= session.first <= before.last + 1
        assert session.first > 1 or not sessions
        assert any(backup.glob("*.npz"))
        sessions.append(session)
    last = run(command(tmp_path / "killed", backup), None, rng, disk)
    assert last.code == 0
    assert 1 < last.first <= sessions[-1].last + 1
    assert last.last == whole.last
    (arrays, _), (expected, _) = (end_of(tmp_path / name) for name in ("killed", "whole"))
    for array, wanted in zip(arrays, expected, strict=True):
        # Sums over workers have another order.
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-10)
    history, expected_history = (
        json.loads((tmp_path / name / "history.json").read_text()) for name in ("killed", "whole")
    )
    assert history.keys() == expected_history.keys()
    rows = [updates_in(tmp_path / name / "training.csv") for name in ("killed", "whole")]
    assert rows[0] == rows[1] == list(range(1, whole.last + 1))
    # Of the last session, which began in some epoch.
    epochs = len(history["loss"])
    for name, values in expected_history.items():
        np.testing.assert_allclose(history[name], values[-epochs:], rtol=0, atol=1e-10)
