"""A backup resumes wherever the program runs next, with the weights of an uninterrupted run."""

import re
import sys

import numpy as np
import pytest

from tests import job
from tests.callbacks.backup_test import PROGRAM, end_of

BACKGROUND, STAGES = "--save_on_background", "--pipeline"
OPTIMIZER, WEIGHTS = "--shard=optimizer", "--shard=weights"

# Options of all sessions, and for each session: workers, the update after which they die, and
# options of its own. An epoch has 4 updates, but for those of other batch sizes.
# A backup in the background is taken once the one before is written, so that the third update is
# the first at which one is sure to be there.
CASES = {
    "1, 2, 1": (
        ["--optimizer=sgd", "--data=dataset"],
        [(1, 3, [STAGES]), (2, 10, [OPTIMIZER, BACKGROUND]), (1, None, [])],
    ),
    "sgd": (
        ["--optimizer=sgd"],
        [(1, 3, []), (2, 6, []), (4, 10, [OPTIMIZER]), (3, None, [])],
    ),
    "adamw, dataset, last batch of another size": (
        ["--data=dataset", "--batch_size=17"],
        [(1, 3, [BACKGROUND]), (2, 6, [OPTIMIZER]), (4, 11, [BACKGROUND]), (3, None, [WEIGHTS])],
    ),
    "sgd, dataset of unknown length": (
        ["--optimizer=sgd", "--data=unknown", "--batch_size=13"],
        [(1, 3, []), (2, 7, [WEIGHTS, BACKGROUND]), (4, 12, [OPTIMIZER]), (3, None, [])],
    ),
    "adamw, steps of endless data": (
        ["--data=steps"],
        [(2, 2, [OPTIMIZER]), (1, 5, []), (3, 8, [OPTIMIZER]), (2, None, [WEIGHTS])],
    ),
    "sgd, growing batch": (
        ["--optimizer=sgd", "--sizes=[[0, 8], [3, 20], [9, 13]]"],
        [(1, 3, []), (2, 6, [OPTIMIZER, BACKGROUND]), (4, 11, []), (3, None, [WEIGHTS])],
    ),
    "adamw, growing batch": (
        ["--sizes=[[0, 7], [4, 16], [8, 24]]"],
        [(3, 2, [OPTIMIZER]), (2, 6, [BACKGROUND]), (1, 9, [STAGES]), (2, None, [OPTIMIZER])],
    ),
    "adamw, stages and replicas": (
        [],
        [(1, 3, [STAGES]), (1, 6, []), (1, 10, [WEIGHTS, "--strategy=mirrored"]), (2, None, [])],
    ),
}
QUICK = ("1, 2, 1",)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in CASES
    ],
)
@pytest.mark.timeout(1200)
def test_a_backup_resumes_on_any_number_of_workers_and_stages(case, tmp_path):
    options, sessions = CASES[case]
    exact = ["--exact", *options]

    def run(directory, workers, *more):
        arguments = [directory, directory / "backup", *exact, *more]
        command = [sys.executable, PROGRAM, *arguments]
        if workers > 1:
            command = job.launcher("training", *arguments, workers=workers)
        return job.finish(job.start(command), 300)

    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    done = run(tmp_path / "whole", 1)
    assert done.returncode == 0, done.stderr
    last_before = 0
    for workers, last, more in sessions:
        until = [] if last is None else [f"--last={last}"]
        done = run(tmp_path / "run", workers, "--save_freq=1", *until, *more)
        updates = [int(number) for number in re.findall(r"update (\d+)", done.stdout)]
        # It resumes in the middle; the last backups may not have been written yet.
        assert updates, done.stderr
        first = min(updates)
        assert (first == 1) if not last_before else 1 < first <= last_before, done.stderr
        if last is None:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode != 0
            assert max(updates) == last, done.stderr
            last_before = last
    (arrays, logs), (expected, expected_logs) = map(end_of, (tmp_path / "run", tmp_path / "whole"))
    for array, wanted in zip(arrays, expected, strict=True):
        # All floats are of 64 bits; sums over replicas have another order.
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-10)
    for name, value in expected_logs.items():
        np.testing.assert_allclose(logs[name], value, rtol=0, atol=1e-10)
    assert list((tmp_path / "run" / "backup").iterdir()) == []
