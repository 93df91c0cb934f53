"""Stages on workers, and in other processes, train as plain Keras on one device."""

import json
import sys

from tests import job
from tests.update.pipeline_test import TOLERANCE


def test_two_workers_of_two_stages_each(tmp_path):
    done = job.run("staged", tmp_path, timeout=150)
    assert done.returncode == 0, done.stderr
    results = job.results(tmp_path)
    assert len(results) == 2
    for worker, result in enumerate(results):
        assert max(result["deviations"].values()) < TOLERANCE
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
