"""Two trainings do not use one directory of backups at the same time."""

import errno
import fcntl
import os
import signal
import sys
import threading

import keras
import numpy as np
import pytest

import tfbig
from tests import job
from tests.callbacks.backup_test import compiled, fit
from tfbig import errors
from tfbig.callbacks import _backup_files, _backup_lock
from tfbig.distribute import _workers

ALONE = _workers.Workers(("worker 0",), 0)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(_backup_lock, "_PATIENCE_SECONDS", 0.1)


class Meanwhile(keras.callbacks.Callback):
    """Calls a function after the first epoch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.function()


def test_a_second_training_is_refused_and_leaves_the_backup_alone(impatient, tmp_path):
    def another():
        before = _backup_files.path_in(tmp_path).read_bytes()
        model = compiled()
        weights = model.get_weights()
        with pytest.raises(
            errors.BackupError, match=rf"Only one training.*{tmp_path}.*process {os.getpid()} on"
        ):
            fit(model, tfbig.callbacks.BackupAndRestore(tmp_path))
        assert _backup_files.path_in(tmp_path).read_bytes() == before
        for a, b in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(a, b)

    history = fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path), Meanwhile(another))
    assert history.epoch == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_it_waits_for_one_that_is_about_to_end(tmp_path, capsys):
    has_lock, has_said = threading.Event(), threading.Event()

    def hold():
        with _backup_lock.held(tmp_path, ALONE):
            has_lock.set()
            assert has_said.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert has_lock.wait(30)
    threading.Timer(0.5, has_said.set).start()
    with _backup_lock.held(tmp_path, ALONE):
        assert has_said.is_set()
    holder.join()
    assert "waiting for process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import os, sys, time
from tfbig.callbacks import _backup_lock
from tfbig.distribute import _workers
with _backup_lock.held(sys.argv[1], _workers.Workers(("worker 0",), 0)):
    is_forked, forked = os.pipe()
    if child := os.fork():
        os.read(is_forked, 1)
        print(child, flush=True)
    else:
        os.write(forked, b".")
    time.sleep(60)
"""


def test_a_killed_program_leaves_no_lock_even_if_a_child_lives(impatient, tmp_path):
    with job.start([sys.executable, "-c", PROGRAM, tmp_path]) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(errors.BackupError), _backup_lock.held(tmp_path, ALONE):
                pass
            process.kill()
            process.wait(30)
            os.kill(child, 0)  # It is still there.
            with _backup_lock.held(tmp_path, ALONE):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


class InChild(BaseException):
    pass


def test_a_child_that_leaves_by_an_exception_does_not_unlock(impatient, tmp_path):
    try:
        with _backup_lock.held(tmp_path, ALONE):
            child = os.fork()
            if not child:
                raise InChild
            os.waitpid(child, 0)
            with pytest.raises(errors.BackupError), _backup_lock.held(tmp_path, ALONE):
                pass
    except InChild:
        os._exit(0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path))
    assert not _backup_lock._held


def test_other_workers_are_told(tmp_path):
    class Told(_workers.Workers):
        def exchange(self, subject, text, seconds=None):
            return ["Only one training", text]

    with (
        pytest.raises(errors.BackupError, match="Only one training"),
        _backup_lock.held(tmp_path, Told(("worker 0", "worker 1"), 1)),
    ):
        pass
    # The chief locks.
    assert list(tmp_path.iterdir()) == []
