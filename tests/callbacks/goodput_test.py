"""`TrainingMonitor` says where the wall time of training went."""

import csv
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tfbig.callbacks import _backup_files, _goodput, _goodput_file

X, Y = np.ones((64, 4), "float32"), np.ones((64, 1), "float32")
PAUSE = 0.06


def monitor(directory, **options):
    return tfbig.callbacks.TrainingMonitor(
        directory, **{"frequency": 1, "plot": False, "tensorboard": False} | options
    )


def rows(directory):
    with open(directory / "goodput.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def seconds(row):
    """The seconds of each cause."""
    return {name: row[name] * row["seconds"] for name in _goodput_file.SHARES}


class Sleeping(layers.Layer):
    """Sleeps in each forward pass of training, and when it is traced."""

    def __init__(self):
        super().__init__()
        self.seconds_traced = 0.0

    def call(self, x, training=False):
        def sleep(x):
            time.sleep(PAUSE)
            return x

        if tf.inside_function():
            time.sleep(PAUSE)
            self.seconds_traced += PAUSE
        if not training:
            return x
        return tf.ensure_shape(tf.numpy_function(sleep, [x], x.dtype, stateful=False), x.shape)


def slow_dataset(x):
    """Batches of 8, for each of which the program waits."""

    def sleep(x, y):
        time.sleep(PAUSE)
        return x, y

    def slow(x, y):
        a, b = tf.numpy_function(sleep, [x, y], [tf.float32, tf.float32])
        return tf.ensure_shape(a, x.shape), tf.ensure_shape(b, y.shape)

    # Without a thread that reads ahead and hides the waiting.
    quiet = tf.data.Options()
    quiet.threading.private_threadpool_size = 1
    quiet.experimental_optimization.inject_prefetch = False
    dataset = tf.data.Dataset.from_tensor_slices((x, Y)).batch(8, drop_remainder=True)
    return dataset.map(slow).with_options(quiet)


def test_time_is_attributed_to_its_causes(tmp_path, monkeypatch):
    write = _backup_files.write_archive

    def slow_write(*args):
        time.sleep(PAUSE)
        write(*args)

    monkeypatch.setattr(_backup_files, "write_archive", slow_write)
    sleeping = Sleeping()
    model = tfbig.Sequential(
        [keras.Input((4,)), sleeping, layers.Dense(1)],
        gradient_accumulation_steps=1,
        loss_scale=tfbig.DynamicLossScale(initial_scale=8.0),
    )
    model.compile("sgd", "mse")
    x = X.copy()
    x[[20, 60]] = np.inf  # In the third and in the last of eight batches.

    class Begin(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            sleeping.seconds_traced = 0.0
            self.began = time.perf_counter()

        def on_test_batch_end(self, batch, logs=None):
            time.sleep(PAUSE)

    class After(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(PAUSE)

    begin = Begin()
    backup = tfbig.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=3)
    model.fit(
        slow_dataset(x),
        shuffle=False,
        verbose=0,
        callbacks=[begin, backup, monitor(tmp_path), After()],
        validation_data=(X, Y),
        validation_batch_size=16,
    )
    # Not in `on_train_end`: the monitor's own comes after that of the callbacks before it.
    seconds_of_fit = time.perf_counter() - begin.began
    # That of the validation goes there.
    traced = sleeping.seconds_traced - 2 * PAUSE
    slept = {
        # That of the first, which is traced, is that of the second.
        "goodput": 6 * PAUSE,
        "input": 6 * PAUSE,
        "skipped": 2 * PAUSE,
        "tracing": traced,
        "validation": 4 * PAUSE,
        "backups": 2 * PAUSE,
        "other": 8 * PAUSE,
    }
    assert traced >= 2 * PAUSE
    last = rows(tmp_path)[-1]
    found = seconds(last)
    # Each cause has what was spent on it. As the sum is all the time there was, none has more than
    # that and what the program needed besides.
    for cause, least in slept.items():
        # In ten-thousandths, the two clocks may differ.
        assert found[cause] >= least - 1e-3, cause
    assert found["restarts"] == 0
    assert sum(last[name] for name in _goodput_file.SHARES) == pytest.approx(1, abs=1e-12)
    # What other callbacks do before it begins is left out.
    assert 0 <= seconds_of_fit - last["seconds"] < 0.5 * seconds_of_fit
    # One after each backup, one at the end of the epoch, and the last.
    assert [(row["update"], row["ended"]) for row in rows(tmp_path)] == [
        *((3, 0), (6, 0), (8, 0), (8, 1))
    ]


def build():
    model = tfbig.Sequential([keras.Input((4,)), layers.Dense(1)], gradient_accumulation_steps=2)
    model.compile("sgd", "mse")
    return model


def fit(model, *callbacks, epochs=2):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks])


class Interruption(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 4:
            time.sleep(0.3)
            raise KeyboardInterrupt


def test_what_an_interruption_lost_is_that_of_restarts(tmp_path):
    def callbacks():
        backup = tfbig.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=3)
        return backup, monitor(tmp_path)

    with pytest.raises(KeyboardInterrupt):
        fit(build(), *callbacks(), Interruption())
    before = rows(tmp_path)
    assert [row["update"] for row in before] == [3, 5]
    time.sleep(0.2)
    begin = time.time()
    fit(build(), *callbacks())
    after = rows(tmp_path)
    # The row of the updates that were lost is gone.
    assert after[0] == before[0]
    assert [row["update"] for row in after[1:]] == [6, 8, 9, 12, 15, 16, 16]
    restarts = [seconds(row)["restarts"] for row in after]
    assert restarts[0] == 0
    # From the backup until training resumes, the 0.2 s and what was lost of the session before.
    gap = begin - before[0]["time"]
    assert gap >= 0.5
    for found in restarts[1:]:
        assert gap <= found <= after[1]["time"] - before[0]["time"]
    # Nothing is forgotten, and nothing counted twice.
    last = after[-1]
    assert last["seconds"] == pytest.approx(
        before[0]["seconds"] + last["time"] - before[0]["time"], abs=0.05
    )
    assert seconds(last)["tracing"] >= seconds(before[0])["tracing"]


def test_training_that_goes_on_after_its_end_has_lost_nothing(tmp_path):
    model = build()
    fit(model, monitor(tmp_path))
    time.sleep(0.2)
    fit(model, monitor(tmp_path), epochs=1)
    first, last = rows(tmp_path)[2], rows(tmp_path)[-1]
    assert (first["ended"], last["ended"]) == (1, 1)
    assert seconds(last)["restarts"] == 0
    assert last["seconds"] <= last["time"] - first["time"] + first["seconds"] - 0.19
    # The step was traced before; its forward pass is once more, to count operations.
    assert seconds(last)["tracing"] - seconds(first)["tracing"] < 0.5 * seconds(first)["tracing"]


@pytest.fixture
def clock(monkeypatch):
    """One that advances only when a test says so."""
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(_goodput, "time", clock)
    return clock


def update(meter, clock, taken, after=0.0, traces=0, waited=0.0, skipped=0, updates=1):
    meter.begin_update()
    clock.now += taken
    meter.end_update(updates, waited, traces, np.float32(skipped))
    clock.now += after


def meter_of(is_synchronous=True):
    return _goodput.Goodput(is_synchronous, on_backup=int, on_end=int)


def test_shares_to_the_second(clock):
    meter = meter_of()
    clock.now += 1
    meter.begin(None, 0.0, skipped=0, traces=3)
    update(meter, clock, 12, waited=1, traces=4)  # An update, and tracing.
    update(meter, clock, 6, waited=2, traces=4, after=3)
    update(meter, clock, 8, traces=4, skipped=1, updates=2)  # Of these, one is skipped.
    with meter.spending("backups"):
        clock.now += 5
    meter.turn_to("validation")
    clock.now += 7
    meter.turn_to("other")
    shares = meter.shares()
    assert meter.total == 42
    assert {k: v * 42 for k, v in shares.items()} == pytest.approx(
        {
            "updates": 4 + 4 + 4,
            "input": 3,
            "skipped": 4,
            "tracing": 7,
            "validation": 7,
            "backups": 5,
            "restarts": 0,
            "other": 4,
        }
    )


def test_updates_that_are_taken_back_are_those_before(clock):
    meter = meter_of()
    meter.begin(None, 0.0, skipped=0, traces=0)
    update(meter, clock, 9, traces=1)
    for taken, skipped in [(1, 0), (2, 0), (4, 1), (8, 1)]:
        update(meter, clock, taken, traces=1, skipped=skipped)
    # Of the four, the third was skipped already.
    meter.leave_out(2)
    assert meter.seconds["skipped"] == 4 + 8 + 2
    # The first took as long as the second, and the rest was tracing.
    assert (meter.seconds["updates"], meter.seconds["tracing"]) == (1 + 1, 8)
    meter.leave_out(10)
    assert meter.shares() == pytest.approx(
        dict.fromkeys(_goodput.CAUSES, 0.0) | {"skipped": 16 / 24, "tracing": 8 / 24}
    )


def test_nothing_waits_for_an_update_when_none_is_left_out(clock):
    class Unfinished:
        def __float__(self):
            raise AssertionError("it was waited for")

    meter = meter_of()
    meter.begin(None, 0.0, skipped=0, traces=0)
    meter.begin_update()
    meter.end_update(1, 0.0, 0, Unfinished())
    meter.leave_out(0)
    with pytest.raises(AssertionError, match="waited for"):
        meter.leave_out(1)


@pytest.mark.parametrize("comes_first", [False, True])
def test_what_a_guard_leaves_out_is_no_goodput(comes_first, tmp_path):
    y = Y.copy()
    y[32:48] = 1e9  # The fifth and the sixth of eight batches stand out.
    model = tfbig.Sequential([keras.Input((4,)), Sleeping(), layers.Dense(1)])
    model.compile("sgd", "mse")
    guard = tfbig.callbacks.SpikeGuard(factor=100, window=3, patience=2, snapshot_every=100)
    callbacks = [guard, monitor(tmp_path)]
    model.fit(
        *(X, y),
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=callbacks if comes_first else callbacks[::-1],
    )
    assert (guard.spikes, guard.rollbacks, int(model.optimizer.iterations)) == (2, 1, 2)
    found = seconds(rows(tmp_path)[-1])
    # Two updates came after it went back to the beginning. An update sleeps once.
    assert found["goodput"] >= 2 * PAUSE
    assert found["skipped"] >= 6 * PAUSE
    assert found["skipped"] > 1.5 * found["goodput"]


def test_where_the_host_is_ahead_what_follows_an_update_belongs_to_it(clock):
    meter = meter_of(is_synchronous=False)
    meter.begin(None, 0.0, skipped=0, traces=0)
    update(meter, clock, 1, after=3)
    update(meter, clock, 1, after=3, waited=np.nan)
    meter.turn_to("other")
    clock.now += 2
    assert meter.shares() == pytest.approx(
        dict.fromkeys(_goodput.CAUSES, 0.0) | {"updates": 0.8, "other": 0.2}
    )
