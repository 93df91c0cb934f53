"""Stages on each of several workers train as plain Keras on one device."""

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
