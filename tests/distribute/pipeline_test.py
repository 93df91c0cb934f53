"""Stages on workers, and in other processes, train as plain Keras on one device."""

import json
import sys

import pytest

from tests import job
from tests.update.pipeline_test import TOLERANCE


# SGD shows a wrong factor, and the others a wrong square.
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_two_workers_of_two_stages_each(optimizer, tmp_path):
    done = job.run("staged", tmp_path, optimizer, timeout=150)
    assert done.returncode == 0, done.stderr
    results = job.results(tmp_path)
    assert len(results) == 2
    for worker, result in enumerate(results):
        assert result["deviations"][optimizer] < TOLERANCE
        task = f"/job:worker/replica:0/task:{worker}/device:CPU:"
        assert result["devices"] == {"0": [f"{task}0"], "1": [f"{task}1"]}


def test_stages_in_other_processes():
    program = job.JOBS / "remote_stages.py"
    done = job.finish(job.start([sys.executable, program]), timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["deviation"] < TOLERANCE
    assert result["devices"] == [f"/job:worker/replica:0/task:{i}/device:CPU:0" for i in (0, 1)]
    # Training ends when one dies.
    assert result["error"] == "UnavailableError"
