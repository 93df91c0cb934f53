"""What is divided over several workers trains, and is saved, as plain Keras on one device."""

import contextlib
import re
import shutil

import keras
import numpy as np
import pytest

from tests import job
from tests.jobs import sharded_callbacks
from tests.update.sharding_test import TOLERANCE
from tfbig import errors
from tfbig.callbacks import _backup, _backup_lock


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
        pytest.param(5, ["sgd/weights", "adamw/optimizer"], marks=pytest.mark.slow),
    ],
    ids=["2", "2, the other way round", "3", "5"],
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


def test_each_worker_writes_its_part_of_a_backup(callbacks_job):
    directory, (chief, other) = callbacks_job
    assert (chief["backups"]["joined"], other["backups"]["joined"]) == (0, 0)
    part, whole = sorted((directory / "backup").iterdir(), key=lambda path: -len(path.name))
    with np.load(part) as mine, np.load(whole) as theirs:
        assert mine.files
        assert all("@" in name for name in mine.files)
        pieces = [name for name in theirs.files if "@" in name]
        # Each a different part of each.
        assert len(pieces) == len(mine.files)
        assert not set(pieces) & set(mine.files)
        # Half of 26 weights and two moments of each.
        assert sum(mine[name].size for name in mine.files) == 39


def test_a_part_that_cannot_be_written_leaves_the_last_backup(callbacks_job):
    _, (chief, other) = callbacks_job
    # The second and the third of five.
    for worker, said in enumerate(reversed(chief["backups"]["said"])):
        assert f"could not be written: worker {worker}: [Errno 28] No space left" in said
    assert (len(chief["backups"]["said"]), other["backups"]["said"]) == (2, [])
    # Nothing is left of these.
    newest, part = sorted({*other["backups"]["files"]} - {_backup_lock.FILE}, key=len)
    assert newest == "backup.npz"
    assert re.fullmatch(r"backup-part-\w+-1-1\.npz", part)
    assert chief["backups"]["left"] == 0


def test_a_backup_is_valid_once_all_parts_are_there(callbacks_job):
    directory, (chief, _) = callbacks_job
    assert (chief["backups"]["before"], chief["backups"]["after"]) == (False, True)
    with (
        np.load(directory / "state.npz") as file,
        contextlib.closing(_backup.SavedBackup(directory / "backup")) as saved,
    ):
        for i, array in enumerate(saved.arrays()):
            np.testing.assert_array_equal(array, file[f"arr_{i}"])
        assert i + 1 == len(file.files)


def empty_archive(path):
    np.savez(path)


DAMAGES = {
    "missing": (lambda path: path.unlink(), "its part .* is missing"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    "without its arrays": (empty_archive, "its parts have .* of .* elements"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_backup_with_a_damaged_part_is_refused(damage, callbacks_job, tmp_path):
    shutil.copytree(callbacks_job[0] / "backup", tmp_path, dirs_exist_ok=True)
    (part,) = tmp_path.glob("backup-part-*")
    function, message = DAMAGES[damage]
    function(part)
    with (
        pytest.raises(errors.BackupError, match=message),
        contextlib.closing(_backup.SavedBackup(tmp_path)) as saved,
    ):
        list(saved.arrays())
    assert (tmp_path / "backup.npz").exists()
