"""Storages that fail: full, damaged, emptied, or not to be made."""

import contextlib
import gc
import itertools
import pathlib
import resource
import sqlite3

import keras
import keras_tuner
import numpy as np
import pytest
import sqlalchemy as sa

from tfbig import errors, tuners
from tfbig.tuners import HyperParameters, _oracle, _read_only


def oracle_in(directory, max_trials=4):
    hp = HyperParameters()
    hp.Float("x", 0, 1)
    oracle = _oracle.StudyOracle(
        keras_tuner.Objective("loss", "min"),
        max_trials,
        hyperparameters=hp,
        seed=0,
        grace_period=0.5,
    )
    oracle._set_project_dir(str(directory), "p")
    oracle.verbose = 0
    return oracle


def close(oracle):
    """What the end of a process does."""
    oracle.release()
    if oracle._opened:
        oracle._ledger._engine.dispose()
        oracle.study._storage._backend.engine.dispose()
    gc.collect()


def run(oracle):
    """Runs all trials; returns their values."""
    with contextlib.ExitStack() as stack:
        stack.callback(close, oracle)
        while (trial := oracle.create_trial("a")).status != "STOPPED":
            if trial.status == "IDLE":
                continue  # Until a trial of a process that failed is free.
            oracle.update_trial(trial.trial_id, {"loss": trial.hyperparameters.values["x"]})
            trial.status = "COMPLETED"
            oracle.end_trial(trial)
        return [t.hyperparameters.values for t in oracle.trials.values()]


@contextlib.contextmanager
def largest_file(size):
    """As on a full disk, no file of this process can become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_search_on_a_full_disk_goes_on_when_there_is_space(tmp_path):
    said = []
    for pages in (1, 3, 8, 20, 26, 30, 32, 33, 34, 35, 36, 38):
        with largest_file(4096 * pages):
            try:
                run(oracle_in(tmp_path))
            except errors.StorageUnavailableError as e:
                said.append(str(e))
    assert len(said) >= 4
    assert all("study.db cannot be used: " in message for message in said)
    assert run(oracle_in(tmp_path)) == run(oracle_in(tmp_path / "straight"))


def build(hp):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(hp.Int("size", 9000, 9100))])
    model.compile("sgd", "mse")
    return model


def test_weights_that_cannot_be_written_are_no_failure_of_the_trial(tmp_path):
    x, y = np.ones((4, 8), "float32"), np.ones((4, 1), "float32")

    def search():
        tuner = tuners.RandomSearch(build, "loss", 2, seed=0, directory=tmp_path)
        tuner.search(x, y, verbose=0)
        return tuner

    with (
        largest_file(250_000),
        pytest.raises(errors.StorageUnavailableError, match="weights of a trial cannot be written"),
    ):
        search()
    assert not list(tmp_path.rglob("new-*"))
    assert [t.status for t in search().oracle.trials.values()] == ["COMPLETED"] * 2


@contextlib.contextmanager
def interrupted(number):
    """Interrupts this process before its n-th change of a database."""
    changes = itertools.count(1)

    def interrupt(connection, cursor, statement, *_):
        if statement.lstrip().startswith(("CREATE", "INSERT")) and next(changes) == number:
            raise KeyboardInterrupt

    sa.event.listen(sa.Engine, "before_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", interrupt)


def schema(directory):
    (path,) = directory.rglob("study.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        return sorted(map(str, database.execute("SELECT type, name, sql FROM sqlite_master")))


def test_a_database_is_completed_if_making_it_was_interrupted(tmp_path):
    run(oracle_in(tmp_path / "whole", 1))
    whole = schema(tmp_path / "whole")
    # Keeps two processes from making a study of the same name.
    assert any("CREATE UNIQUE INDEX" in row and "study_name" in row for row in whole)
    made = sum("CREATE" in row for row in whole)
    for number in range(1, made + 2):
        directory = tmp_path / str(number)
        with interrupted(number):
            run(oracle_in(directory, 1))
        run(oracle_in(directory, 1))
        assert schema(directory) == whole


def test_a_damaged_file_is_said_to_be_damaged(tmp_path):
    run(oracle_in(tmp_path))
    path = pathlib.Path(tmp_path, "p", "study.db")
    content = path.read_bytes()
    for begin in (0, 4096, 40960):
        path.write_bytes(content[:begin] + b"\xff" * (len(content) - begin))
        damaged = path.read_bytes()
        with pytest.raises(errors.StorageUnavailableError, match=r"study.db cannot be used: "):
            run(oracle_in(tmp_path, 6))
        assert path.read_bytes() == damaged
    path.write_bytes(content)
    assert len(run(oracle_in(tmp_path, 5))) == 5


@pytest.mark.parametrize("is_removed", [False, True])
def test_an_emptied_study_is_not_begun_anew(tmp_path, is_removed):
    run(oracle_in(tmp_path))
    (tmp_path / "p" / "trial_0000").mkdir()
    path = tmp_path / "p" / "study.db"
    path.unlink() if is_removed else path.write_bytes(b"")
    with pytest.raises(errors.StudyError, match=r"is empty, but .* has files of its trials"):
        run(oracle_in(tmp_path))
    assert (tmp_path / "p" / "trial_0000").exists()
    anew = oracle_in(tmp_path)
    anew.begin_anew()
    run(anew)
    assert not (tmp_path / "p" / "trial_0000").exists()


def test_a_directory_may_have_any_name(tmp_path):
    directory = tmp_path / "lr?#%20{x}"
    assert len(run(oracle_in(directory, max_trials=2))) == 2
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
    assert (directory / "p" / "study.db").exists()
    # It is found again, to resume it, to look at it and to start over.
    resumed = oracle_in(directory)
    assert len(resumed.trials) == 2
    assert len(run(resumed)) == 4
    assert len(_read_only.open_study(str(directory / "p")).study.trials) == 4
    anew = oracle_in(directory)
    anew.begin_anew()
    assert not anew.trials
    close(anew)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageUnavailableError, match=r"file/p cannot be made: "):
        tuners.RandomSearch(build, "loss", directory=tmp_path / "file", project_name="p")


class Within(tuners.RandomSearch):
    """Its trial leaves a file, and runs something."""

    def __init__(self, directory, run=lambda: None, **options):
        self.run = run
        super().__init__(max_trials=1, directory=directory, project_name="p", **options)

    def run_trial(self, trial, *args, **kwargs):
        path = pathlib.Path(self.get_trial_dir(trial.trial_id))
        path.mkdir(exist_ok=True)
        (path / "file").touch()
        self.run()
        return trial.hyperparameters.Float("x", 0, 1)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("running", "other"), [("memory", "memory"), ("memory", None), (None, "memory")]
)
def test_a_search_in_memory_uses_its_directory_alone(tmp_path, running, other, overwrite):
    def search_as_well():
        with pytest.raises(errors.StudyError, match="p, and one of the two has storage='memory'"):
            Within(tmp_path, storage=other, overwrite=overwrite).search(verbose=0)
        # Nothing is lost.
        assert (tmp_path / "p" / "trial_0000" / "file").exists()

    tuner = Within(tmp_path, search_as_well, storage=running)
    tuner.search(verbose=0)
    assert [t.score for t in tuner.oracle.trials.values()] == [0]
    Within(tmp_path, storage=running).search(verbose=0)


def test_a_search_in_memory_does_not_overwrite_one_that_is_stored(tmp_path):
    Within(tmp_path).search(verbose=0)
    with pytest.raises(errors.StudyError, match="p has a stored search"):
        Within(tmp_path, storage="memory").search(verbose=0)
    assert len(Within(tmp_path).oracle.trials) == 1
    for overwrite in (True, False):
        Within(tmp_path, storage="memory", overwrite=overwrite).search(verbose=0)
