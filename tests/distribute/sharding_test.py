"""What is divided over several workers trains, and is saved, as plain Keras on one device."""

import pytest

from tests import job
from tests.update.sharding_test import TOLERANCE


@pytest.mark.parametrize(
    ("workers", "optimizers"),
    [
        (2, ["sgd", "adam", "muon", "adamw"]),
        pytest.param(
            3, ["sgd", "adam", "muon", "lamb", "overwriting", "adamw"], marks=pytest.mark.slow
        ),
    ],
)
def test_workers_train_and_save_as_plain_keras_on_one_device(workers, optimizers, tmp_path):
    done = job.run("sharding", tmp_path, *optimizers, workers=workers, timeout=240)
    assert done.returncode == 0, done.stderr
    results = job.results(tmp_path)
    assert len(results) == workers
    for result in results:
        assert set(result["deviations"]) == set(optimizers)
        assert max(result["deviations"].values()) < TOLERANCE
        # All workers save; whatever loads the files goes on as plain Keras does.
        assert len(result["files"]) == 5
        assert max(result["files"].values()) < TOLERANCE
