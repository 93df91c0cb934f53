"""Backups that a thread writes while training continues, and backups of which several stay."""

import contextlib
import errno
import os
import pathlib
import shutil
import threading
import time
import warnings

import keras
import numpy as np
import pytest

import tfbig
from tests.callbacks.backup_test import (
    At,
    Interrupt,
    assert_same_weights,
    compiled,
    fit,
    full_disk,
    samples,
    terminate,
)
from tests.callbacks.goodput_test import monitor, rows, seconds
from tfbig import _keras, errors
from tfbig.callbacks import _backup, _backup_files, _backup_writer
from tfbig.distribute import _sharded_weights, _workers


def backup(directory, save_freq=1, **options):
    return tfbig.callbacks.BackupAndRestore(
        directory, save_freq, **{"save_on_background": True} | options
    )


def values_in(directory):
    with contextlib.closing(_backup.SavedBackup(directory)) as saved:
        return saved.backup, list(saved.arrays())


def values_of(model):
    return _keras.variables.values_of(_backup.State(model).variables)


def is_writing():
    return any(thread.name == "tfbig backup" for thread in threading.enumerate())


class Held:
    """Has the thread wait before it writes, until it is released."""

    def __init__(self, monkeypatch):
        self.begun, self.released = threading.Event(), threading.Event()
        write = _backup_files.write_archive

        def write_later(path, members):
            self.begun.set()
            assert self.released.wait(60)
            write(path, members)

        monkeypatch.setattr(_backup_files, "write_archive", write_later)


@pytest.fixture
def held(monkeypatch):
    return Held(monkeypatch)


# --- While it is written -----------------------------------------------------


MODELS = {
    "adam": {"optimizer": "adam"},
    "sgd, compiled by XLA": {"optimizer": "sgd"},
    "divided": {"optimizer": "adam", "strategy": "mirrored_2", "shard": "weights"},
}


@pytest.mark.parametrize("model", MODELS)
def test_updates_do_not_reach_the_copy(model, held, tmp_path, monkeypatch):
    monkeypatch.setattr(_sharded_weights, "SMALLEST", 1)
    is_compiled = "XLA" in model
    model = compiled(**MODELS[model])
    if is_compiled:
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=True)
    seen = []

    class Record(keras.callbacks.Callback):
        """Acts before the backup."""

        def on_train_batch_end(self, batch, logs=None):
            seen.append(values_of(model))
            if batch == 3:
                assert held.begun.wait(60)
                assert is_writing()
                held.released.set()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, backup(tmp_path, 3), Record())
    # The exception waits for it.
    assert not is_writing()
    described, values = values_in(tmp_path)
    assert (described.epoch, described.batch) == (0, 3)
    _, _, at_its_time, later = seen
    assert sum(not np.array_equal(a, b) for a, b in zip(at_its_time, later, strict=True)) > 5
    for value, wanted in zip(values, at_its_time, strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_a_copy_shares_no_memory_with_variables(strategy):
    # TensorFlow on CPU copies a tensor that something holds before it assigns; others need not.
    state = _backup.State(compiled(strategy=strategy))
    copies = _backup_writer._Copies()
    first, views, again = (
        dict(read(_backup.members(state, is_chief=True))) for read in (copies.of, list, copies.of)
    )
    assert len(first) == len(state.variables)
    for name, view in views.items():
        np.testing.assert_array_equal(first[name], view)
        assert not np.shares_memory(first[name], view)
        # The memory serves again.
        assert np.shares_memory(first[name], again[name])


@pytest.mark.parametrize(("at", "strategy"), [((0, 1), "default"), ((1, 5), "mirrored_2")], ids=str)
def test_training_resumed_has_the_weights_of_an_uninterrupted_run(at, strategy, tmp_path):
    kwargs = {"validation_data": samples()}
    whole = compiled(strategy=strategy)
    fit(whole, backup(tmp_path / "whole"), **kwargs)
    assert list((tmp_path / "whole").iterdir()) == []
    keras.utils.set_random_seed(1)
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(strategy=strategy), backup(tmp_path / "run"), Interrupt(*at), **kwargs)
    keras.utils.set_random_seed(1)
    model = compiled(strategy=strategy)
    assert fit(model, backup(tmp_path / "run"), **kwargs).epoch == list(range(at[0], 3))
    assert_same_weights(model, whole)


def test_one_is_written_at_a_time_and_the_next_waits(tmp_path, monkeypatch):
    pause, running, most, written = 0.1, [], [], []
    write = _backup_files.write_archive

    def slow_write(path, members):
        running.append(path)
        most.append(len(running))
        time.sleep(pause)
        write(path, members)
        running.pop()
        written.append(path)

    monkeypatch.setattr(_backup_files, "write_archive", slow_write)
    fit(compiled(), backup(tmp_path / "backup"), monitor(tmp_path), epochs=2)
    assert len(written) == 10
    assert set(most) == {1}
    # The last one is waited for, too.
    assert not is_writing()
    last = rows(tmp_path)[-1]
    # The updates take less time than the writes.
    assert seconds(last)["backups"] >= 5 * pause
    # A row for each, for each epoch, and the last.
    assert len(rows(tmp_path)) == 10 + 2 + 1


def test_a_full_disk_is_said_at_the_next_batch_and_the_last_backup_stays(tmp_path, monkeypatch):
    fit(compiled(), backup(tmp_path, delete_checkpoint=False), epochs=1)
    before = _backup_files.path_in(tmp_path).read_bytes()
    monkeypatch.setattr(_backup_files, "write_array", full_disk)
    model, said = compiled(), []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            deadline = time.monotonic() + 30
            while is_writing() and time.monotonic() < deadline:
                time.sleep(0.01)
            said.append(len(caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, Count(), backup(tmp_path, 2, delete_checkpoint=False), epochs=3)
    assert model.optimizer.iterations.numpy() == 15
    of_backups = [w for w in caught if "could not be written" in str(w.message)]
    assert all("No space left" in str(w.message) for w in of_backups)
    # After batches 2, 4, ... of 10, and at the end.
    assert len(of_backups) == 6
    # Before those of the batch in which it is asked.
    assert said == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4][: len(said)]
    assert _backup_files.path_in(tmp_path).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [_backup_files.FILE]


@pytest.mark.parametrize("on_background", [False, True])
def test_a_program_may_change_its_directory(on_background, tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    elsewhere = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: os.chdir(tmp_path / "second")
    )
    fit(
        compiled(),
        elsewhere,
        backup("backup", 2, save_on_background=on_background, delete_checkpoint=False),
        tfbig.callbacks.TrainingMonitor("monitor", tensorboard=False),
    )
    assert names_in(tmp_path / "first/backup") == ["backup.npz"]
    assert "training.csv" in names_in(tmp_path / "first/monitor")
    assert names_in(tmp_path / "second") == []


def test_another_error_of_the_thread_is_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(_backup_files, "write_archive", fail)
    with pytest.raises(ZeroDivisionError):
        fit(compiled(), backup(tmp_path))


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_preemption_writes_at_once_after_the_running_one(in_validation, tmp_path, monkeypatch):
    written, write = [], _backup_files.write_archive

    def slow_write(path, members):
        time.sleep(0.3)
        write(path, members)
        written.append(threading.current_thread().name)

    monkeypatch.setattr(_backup_files, "write_archive", slow_write)
    preempt = At(0, 5 if in_validation else 3, terminate)
    kwargs = {"validation_data": samples()}
    with pytest.raises(SystemExit) as raised:
        fit(compiled(), preempt, backup(tmp_path / "run", 3), **kwargs)
    assert raised.value.code == tfbig.callbacks.PREEMPTED
    assert written == ["tfbig backup", "MainThread"]
    trained = []
    for name in ("run", "whole"):
        keras.utils.set_random_seed(1)
        trained.append(compiled())
        fit(trained[-1], backup(tmp_path / name, 3), **kwargs)
    assert_same_weights(*trained)


# --- Several -----------------------------------------------------------------


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def interrupted(directory, at=(1, 2), **options):
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), backup(directory, **options), Interrupt(*at))


def test_as_many_stay_as_are_kept(tmp_path):
    interrupted(tmp_path, keep=3)
    assert names_in(tmp_path) == ["backup-1.npz", "backup-2.npz", "backup.npz"]
    found = []
    for path in _backup_files.present(tmp_path):
        (tmp_path / "one").mkdir()
        shutil.copy(path, tmp_path / "one" / "backup.npz")
        described, _ = values_in(tmp_path / "one")
        found.append((described.epoch, described.batch))
        shutil.rmtree(tmp_path / "one")
    assert found == [(1, 2), (1, 1), (0, 5)]
    # Fewer are kept from now on.
    interrupted(tmp_path, at=(1, 3), keep=2)
    assert names_in(tmp_path) == ["backup-1.npz", "backup.npz"]
    fit(compiled(), backup(tmp_path, keep=2))
    assert names_in(tmp_path) == []


def test_a_damaged_backup_names_the_one_before_which_is_used_once_it_is_moved(tmp_path):
    whole = compiled()
    fit(whole, backup(tmp_path / "whole"))
    directory = tmp_path / "run"
    keras.utils.set_random_seed(1)
    interrupted(directory, keep=2)
    damaged = _backup_files.path_in(directory)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(
        errors.BackupError, match=r"cannot be read.*from .*backup-1.npz, which is o"
    ):
        fit(compiled(), backup(directory, keep=2))
    assert len(damaged.read_bytes()) == 1000
    damaged.rename(tmp_path / "damaged.npz")
    keras.utils.set_random_seed(1)
    model = compiled()
    fit(model, backup(directory, keep=2))
    assert_same_weights(model, whole)


class Killed(BaseException):
    pass


class Kill:
    """Ends all that reaches the disk at one of its steps, as SIGKILL does."""

    def __init__(self, monkeypatch, step):
        self.left, self.is_dead = step, False
        for owner, name in [
            (os, "replace"),
            (os, "fsync"),
            (pathlib.Path, "unlink"),
            (pathlib.Path, "mkdir"),
            (_backup_files, "write_array"),
        ]:
            monkeypatch.setattr(owner, name, self.stepping(getattr(owner, name)))

    def stepping(self, function):
        def step(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                self.is_dead = True
                raise Killed
            return function(*args, **kwargs)

        return step


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_killed_at_any_step_a_whole_backup_is_there(keep, tmp_path):
    state = _backup.State(compiled())
    wanted = _keras.variables.values_of(state.variables)
    alone = _workers.Workers(("worker 0",), 0)

    def write(directory, batch):
        writer = _backup_writer.BackupWriter(directory, alone, keep, "fit")
        described = _backup.Backup(0, 0, batch, 5, 0, None, state.described)
        assert writer.write(described, state, (), is_on_background=False)

    steps, is_dead, newest = 0, True, []
    while is_dead:
        directory = tmp_path / str(steps)
        for batch in range(3):
            write(directory, batch)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            kill = Kill(patch, steps)
            write(directory, 3)
        is_dead = kill.is_dead
        present = _backup_files.present(directory)
        assert len(present) >= max(1, keep - 1)
        described, values = values_in(directory)
        newest.append(described.batch)
        for value, array in zip(values, wanted, strict=True):
            np.testing.assert_array_equal(value, array)
        # Training resumes from it, and nothing is left of the other.
        write(directory, 4)
        assert values_in(directory)[0].batch == 4
        assert len(names_in(directory)) == min(keep, len(present) + 1)
        steps += 1
    assert set(newest) == {2, 3}
    assert newest == sorted(newest)
    assert steps > 12


def test_a_disk_that_is_too_small_for_one(tmp_path, monkeypatch):
    # A limit of the process reaches all of its files, and makes the system refuse a write.
    resource = pytest.importorskip("resource")
    fit(compiled(), backup(tmp_path, delete_checkpoint=False), epochs=1)
    before = _backup_files.path_in(tmp_path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.warns(UserWarning, match=os.strerror(errno.EFBIG)):
            fit(compiled(), backup(tmp_path, delete_checkpoint=False), epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _backup_files.path_in(tmp_path).read_bytes() == before
    assert names_in(tmp_path) == [_backup_files.FILE]
