"""What is divided over several workers trains, and is saved, as plain Keras on one device."""

import keras
import numpy as np
import pytest

from tests import job
from tests.jobs import sharded_callbacks
from tests.update.sharding_test import TOLERANCE


@pytest.mark.parametrize(
    ("workers", "programs"),
    [
        (2, ["sgd/weights", "muon/optimizer", "adamw/weights"]),
        pytest.param(
            2,
            [
                *("adam/optimizer", "lamb/weights", "sgd/optimizer", "adam/weights"),
                *("muon/weights", "lamb/optimizer", "adamw/optimizer"),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3,
            [
                f"{optimizer}/{shard}"
                for optimizer in (
                    "sgd",
                    "adam",
                    "muon",
                    "lamb",
                    "adafactor",
                    "overwriting",
                    "adamw",
                )
                for shard in ("optimizer", "weights")
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["2", "2, the other way round", "3"],
)
def test_workers_train_and_save_as_plain_keras_on_one_device(workers, programs, tmp_path):
    done = job.run("sharding", tmp_path, *programs, workers=workers, timeout=300 * (workers - 1))
    assert done.returncode == 0, done.stderr
    results = job.results(tmp_path)
    assert len(results) == workers
    for result in results:
        assert set(result["deviations"]) == set(programs)
        assert max(result["deviations"].values()) < TOLERANCE
        # All workers save; whatever loads the files goes on as plain Keras does.
        assert len(result["files"]) == 5
        assert max(result["files"].values()) < TOLERANCE
    assert all(result["is_of_chief"] for result in results)


@pytest.fixture(scope="module")
def callbacks_job(tmp_path_factory):
    """Returns the directory and the results of `jobs/sharded_callbacks.py` on two workers."""
    directory = tmp_path_factory.mktemp("callbacks")
    done = job.run("sharded_callbacks", directory, timeout=120)
    # That of the chief, which ended last: the other did not outlive it.
    assert "worker 0 failed with exit code 7" in done.stderr
    return directory, job.results(directory)


def test_the_chief_saves_with_the_help_of_the_other_workers(callbacks_job, float64, tmp_path):
    directory, (chief, other) = callbacks_job
    model = sharded_callbacks.compiled()
    sharded_callbacks.fit(model, sharded_callbacks.checkpoints(tmp_path))
    names = {p.name for p in tmp_path.iterdir()}
    # Saved after each epoch, twice, and after some batches; and the best and the worst.
    assert len(names) == 3 + 3 + 5 + 2
    assert {p.name for p in (directory / "files").iterdir()} == names
    assert {"1_3.keras", "2_1.keras", "2_4.keras", "3_2.keras", "3_5.keras"} < names
    for name in names:
        assert_same_model(directory / "files" / name, tmp_path / name)
    # Other callbacks may read as well.
    assert (chief["read"], other["read"]) == (3, 0)


def assert_same_model(path, expected):
    def state(path):
        if path.suffix == ".keras":
            model = keras.saving.load_model(path)
        else:
            model = sharded_callbacks.compiled()
            model.optimizer.build(model.trainable_variables)
            model.load_weights(path)
        return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]

    for a, b in zip(state(path), state(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_a_callback_of_the_chief_that_reads_after_each_batch_raises(callbacks_job):
    _, (chief, _) = callbacks_job
    assert chief["in batches"].startswith("UnsupportedStrategyError: All workers must take part")
    assert "LambdaCallback.on_train_batch_end on the chief alone" in chief["in batches"]


def test_callbacks_of_the_chief_fail_on_all_workers(callbacks_job):
    for result in callbacks_job[1]:
        assert "must have the same argument callbacks" in result["on one worker"]
        assert "ChiefOnly of on_epoch_begin" in result["on one worker"]
    chief, other = (result["error on the chief"] for result in callbacks_job[1])
    assert chief.startswith("ZeroDivisionError")
    assert other.startswith(
        "WorkerUnavailableError: worker 0 does not train on, since DivideByZero"
    )


def test_a_backup_that_cannot_be_written_does_not_keep_the_other_workers(callbacks_job):
    directory, (chief, other) = callbacks_job
    assert (chief["not written"], other["not written"]) == (2, 0)
    assert not list((directory / "backup").iterdir())
