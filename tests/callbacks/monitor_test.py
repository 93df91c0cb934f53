"""`tfbig.callbacks.TrainingMonitor` records what happened."""

import contextlib
import csv
import importlib.util
import shutil
import time
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import config

import tfbig
from tests.conftest import make_strategy
from tfbig.callbacks import _monitor, _monitor_file

X, Y = np.ones((32, 4), "float32"), np.ones((32, 1), "float32")


def build(strategy="default", **options):
    options = {"gradient_accumulation_steps": 2, "loss_scale": 8.0, "log_grad_norm": True} | options
    with make_strategy(strategy).scope():
        model = tfbig.Sequential([keras.Input((4,)), layers.Dense(1)], **options)
        model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"])
    return model


def monitor(directory, **options):
    return tfbig.callbacks.TrainingMonitor(
        directory, **{"frequency": 1, "plot": False, "tensorboard": False} | options
    )


def fit(model, *callbacks, x=X, epochs=2, **kwargs):
    return model.fit(
        x,
        Y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks],
        **kwargs,
    )


def written(directory):
    with open(directory / "training.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_rows_are_the_logs_of_updates(tmp_path, strategy):
    model, seen = build(strategy), []
    model.loss_scale = tfbig.DynamicLossScale(initial_scale=8.0)
    x = X.copy()
    x[20] = np.inf  # In the third batch.
    logged = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append({k: float(v) for k, v in logs.items()})
    )
    history = fit(model, monitor(tmp_path), logged, x=x).history
    rows = written(tmp_path)
    assert [int(row["update"]) for row in rows] == list(range(1, 9))
    assert [int(row["epoch"]) for row in rows] == [0] * 4 + [1] * 4
    names = ["loss", "mae", "loss_scale", "skipped_updates", "grad_norm"]
    for row, logs in zip(rows, seen, strict=True):
        np.testing.assert_equal([float(row[n]) for n in names], [logs[n] for n in names])
    assert [float(row["skipped_updates"]) for row in rows] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert float(rows[-1]["loss"]) == pytest.approx(history["loss"][-1], rel=1e-6)
    assert all(float(row["learning_rate"]) == pytest.approx(0.01) for row in rows)
    assert all(float(row["host_mib"]) > 100 for row in rows)
    held = {id(v): v for v in (*model.variables, *model.optimizer.variables)}
    state = sum(v.numpy().nbytes for v in held.values()) / 2**20
    assert [float(row["state_mib"]) for row in rows] == pytest.approx([state] * 8)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert rows[0]["update_seconds"] == ""  # It was traced.
    for row in rows[1:]:
        assert 8 / float(row["update_seconds"]) == pytest.approx(float(row["samples_per_second"]))


@pytest.mark.parametrize(
    "options",
    [{}, {"steps_per_execution": 2}, {"run_eagerly": True}, {"micro_batch_size": "auto"}],
    ids=["plain", "many_steps", "eager", "auto"],
)
def test_waiting_for_data_is_measured(tmp_path, options):
    pause = 0.1

    def sleep(x, y):
        time.sleep(pause)
        return x, y

    def slow(x, y):
        a, b = tf.numpy_function(sleep, [x, y], [tf.float32, tf.float32])
        return tf.ensure_shape(a, x.shape), tf.ensure_shape(b, y.shape)

    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8, drop_remainder=True)
    # Without a thread that reads ahead and hides the waiting behind a slow update.
    quiet = tf.data.Options()
    quiet.threading.private_threadpool_size = 1
    quiet.experimental_optimization.inject_prefetch = False
    size = options.pop("micro_batch_size", None)
    kinds = {"micro_batch_size": size, "gradient_accumulation_steps": None} if size else {}
    model = build(log_grad_norm=False, **kinds)
    model.compile("sgd", "mse", **options)
    callback = monitor(tmp_path, frequency=None)
    model.fit(
        dataset.map(slow).with_options(quiet),
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
    )
    # Keras reads one batch ahead while it takes shapes from the dataset, not later.
    for row in callback.rows[1:]:
        assert row["input_seconds"] >= 0.5 * pause
        assert row["input_seconds"] <= row["update_seconds"]
    callback = monitor(tmp_path / "fast", frequency=None)
    model.fit(dataset.cache(), epochs=6, shuffle=False, verbose=0, callbacks=[callback])
    # The minimum, because a busy machine may delay any of them.
    assert min(row["input_seconds"] for row in callback.rows) < 0.5 * pause


def test_both_of_two_monitors_measure_waiting(tmp_path):
    first, second = monitor(tmp_path / "1"), monitor(tmp_path / "2", frequency=2)
    fit(build(), first, second)
    waited = [row["input_seconds"] for row in first.rows]
    assert all(seconds > 0 for seconds in waited[1:])
    # The first update of all is traced.
    means = [waited[1], *np.reshape(waited[2:], (3, 2)).mean(1)]
    assert [row["input_seconds"] for row in second.rows] == pytest.approx(means)


def test_two_monitors_of_a_directory_are_refused(tmp_path):
    model = build()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(tfbig.errors.InvalidOptionError, match="only one TrainingMonitor of a dir"):
        fit(model, monitor(tmp_path / "run"), monitor(tmp_path / "link"))
    assert int(model.optimizer.iterations.numpy()) == 0
    fit(model, monitor(tmp_path / "run"))
    assert len(written(tmp_path / "run")) == 8


def test_deterministic_operations_have_no_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "is_op_determinism_enabled", lambda: True)
    monkeypatch.setattr(tf, "timestamp", None)
    callback = monitor(tmp_path)
    fit(build(), callback)
    assert [row["input_seconds"] for row in callback.rows] == [None] * 8
    assert all(row["update_seconds"] > 0 for row in callback.rows[1:])


class Clock:
    """A clock of `_monitor` that advances only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        clock = types.SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(_monitor, "time", clock)

    def advance(self, seconds):
        self.now += seconds


def test_times_are_of_updates_alone(tmp_path, monkeypatch):
    """They exclude tracing, validation and the work of callbacks after an epoch."""
    clock = Clock(monkeypatch)
    others = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: clock.advance(0.25 if clock.now else 50.0),
        on_test_batch_end=lambda batch, logs: clock.advance(100.0),
        on_epoch_end=lambda epoch, logs: clock.advance(100.0),
    )
    callback = monitor(tmp_path, frequency=None)
    fit(build(), callback, others, validation_data=(X, Y), validation_batch_size=8)
    # One row per epoch; that of the first excludes its first update.
    assert [row["update_seconds"] for row in callback.rows] == [0.25, 0.25]
    assert [row["samples_per_second"] for row in callback.rows] == [32.0, 32.0]
    assert [row["update"] for row in callback.rows] == [4, 8]
    assert not any(name.startswith("val_") for row in callback.rows for name in row)


def test_by_default_a_row_covers_a_second(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    others = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: clock.advance(0.5)
    )
    callback = monitor(tmp_path, frequency=None)
    fit(build(), callback, others)
    assert [row["update"] for row in callback.rows] == [3, 4, 6, 8]
    assert [row["seconds"] for row in callback.rows] == [1.5, 2.0, 3.0, 4.0]


def test_plots_are_drawn_during_training_if_that_takes_little_time(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    clock, drawn = Clock(monkeypatch), []
    callback = monitor(tmp_path, plot=True)

    def draw(rows, path, goodput):
        drawn.append(rows[-1]["update"])
        path.write_text(f"{len(drawn)}")
        clock.advance(2.0)

    monkeypatch.setattr(_monitor._monitor_plot, "draw", draw)
    others = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: clock.advance(15.0)
    )
    fit(build(), callback, others, epochs=10)
    # Epochs of 60 s. First after at least 100 s, then at intervals of at least 100 times what
    # drawing took, and at the end.
    assert drawn == [8, 24, 40, 40]
    assert (tmp_path / "training.png").read_text() == "4"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "goodput.csv",
        "training.csv",
        "training.png",
    ]


def test_resumed_training_appends_its_rows(tmp_path):
    model = build()
    fit(model, monitor(tmp_path), epochs=1)
    first = written(tmp_path)
    fit(model, monitor(tmp_path), epochs=1)
    assert written(tmp_path)[:4] == first
    assert [int(row["update"]) for row in written(tmp_path)] == list(range(1, 9))


def test_rows_that_an_interruption_lost_are_replaced(tmp_path):
    class Interruption(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    def backup():
        return tfbig.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=2)

    with pytest.raises(KeyboardInterrupt):
        fit(build(), backup(), monitor(tmp_path), Interruption())
    assert [int(row["update"]) for row in written(tmp_path)] == [1, 2, 3]
    fit(build(), backup(), monitor(tmp_path))
    assert [int(row["update"]) for row in written(tmp_path)] == list(range(1, 9))


def test_restart_after_a_crash_before_the_first_backup(tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise RuntimeError("crash")

    def callbacks():
        return tfbig.callbacks.BackupAndRestore(tmp_path / "backup"), monitor(tmp_path / "run")

    with pytest.raises(RuntimeError, match="crash"):
        fit(build(), *callbacks(), Crash())
    with pytest.warns(UserWarning, match=r"3 rows in .* are kept as training\.1\.csv"):
        fit(build(), *callbacks())
    assert [int(row["update"]) for row in written(tmp_path / "run")] == list(range(1, 9))


def test_files_of_another_training_are_kept(tmp_path):
    contents = []
    for number in range(3):
        if number:
            (tmp_path / "training.png").write_text(f"{number}")
            with pytest.warns(UserWarning, match=rf"are kept as training\.{number}\.csv"):
                fit(build(), monitor(tmp_path))
        else:
            fit(build(), monitor(tmp_path))
        contents.append((tmp_path / "training.csv").read_bytes())
    names = ["training.1.csv", "training.2.csv", "training.csv"]
    assert [(tmp_path / name).read_bytes() for name in names] == contents
    assert [(tmp_path / f"training.{n}.png").read_text() for n in (1, 2)] == ["1", "2"]
    assert len({*contents}) == 3
    # A number is free if both names are.
    (tmp_path / "training.3.png").write_text("3")
    with pytest.warns(UserWarning, match=r"are kept as training\.4\.csv"):
        fit(build(), monitor(tmp_path))
    assert (tmp_path / "training.3.png").read_text() == "3"


@pytest.mark.parametrize("name", ["training.csv", "goodput.csv"])
def test_a_line_that_was_cut_is_left_out(name, tmp_path):
    model = build()
    fit(model, monitor(tmp_path))
    path = tmp_path / name
    file, text = _monitor_file.RowsFile(tmp_path, (), name), path.read_bytes()
    *whole, _ = file.read()
    # Of the last number a digit is missing, then all of it, then others.
    for length in (len(text) - 3, text.rindex(b",") + 1, text.rindex(b",") - 3):
        path.write_bytes(text[:length])
        assert file.read() == whole
    fit(model, monitor(tmp_path))
    assert file.read()[: len(whole)] == whole


@pytest.mark.parametrize("change", ["gap", "column"])
def test_goodput_of_other_columns_is_kept(change, tmp_path):
    model = build()
    fit(model, monitor(tmp_path))
    path = tmp_path / "goodput.csv"
    head, *lines = path.read_text().splitlines()
    if change == "gap":
        lines[-1] = lines[-1][: lines[-1].rindex(",") + 1]
    else:
        head = head.replace("other", "others")
    path.write_text("".join(f"{line}\n" for line in (head, *lines)))
    before = path.read_text()
    with pytest.raises(tfbig.errors.InvalidOptionError, match=r"goodput\.csv must .* column other"):
        fit(model, monitor(tmp_path))
    assert path.read_text() == before


@pytest.mark.parametrize("updates", [0, 8])
@pytest.mark.parametrize(
    "text",
    ["update,epoch,seconds\nx,0,1.0\n", "epoch,loss\n0,1.0\n1,0.5\n", f'update\n"{"x" * 140000}'],
    ids=["damaged", "other", "field"],
)
def test_file_that_cannot_be_read_is_kept(tmp_path, text, updates):
    model = build()
    if updates:
        fit(model)
    (tmp_path / "training.csv").write_text(text)
    with pytest.raises(tfbig.errors.InvalidOptionError, match="cannot be read"):
        fit(model, monitor(tmp_path))
    assert (tmp_path / "training.csv").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["training.csv"]


def test_the_learning_rate_of_several_optimizers_is_that_of_the_first(tmp_path):
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.02))
    optimizers[".*/bias"] = keras.optimizers.SGD(0.1)
    model = tfbig.Sequential([keras.Input((4,)), layers.Dense(1)], gradient_accumulation_steps=2)
    model.compile(keras.optimizers.MultiOptimizer(optimizers), "mse")
    fit(model, monitor(tmp_path))
    rates = [float(row["learning_rate"]) for row in written(tmp_path)]
    # Keras has the default one last.
    assert rates == pytest.approx([0.1] * len(rates))


def test_optimizer_that_the_model_does_not_hold(tmp_path):
    optimizer = keras.optimizers.SGD(0.01)

    class Own(tfbig.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            optimizer.apply(tape.gradient(loss, self.trainable_variables))
            return {"loss": loss}

    model = Own([keras.Input((4,)), layers.Dense(1)])
    model.compile(loss="mse")
    optimizer.build(model.trainable_variables)
    fit(model, monitor(tmp_path, frequency=2))
    assert [int(row["update"]) for row in written(tmp_path)] == [2, 4, 6, 8]
    fit(model, monitor(tmp_path, frequency=2), epochs=1)
    assert [int(row["update"]) for row in written(tmp_path)] == [2, 4, 6, 8, 10, 12]
    # Not the learning rate of the optimizer in `compile`.
    assert {row["learning_rate"] for row in written(tmp_path)} == {""}
    # It is known once the model holds the optimizer.
    model.own_optimizer = optimizer
    fit(model, monitor(tmp_path, frequency=2), epochs=1)
    assert [int(row["update"]) for row in written(tmp_path)] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert float(written(tmp_path)[-1]["learning_rate"]) == pytest.approx(0.01)


def test_columns_that_change(tmp_path):
    model = build()
    fit(model, monitor(tmp_path), epochs=1)
    model.log_grad_norm = False
    fit(model, monitor(tmp_path), epochs=1)
    rows = written(tmp_path)
    assert [row["grad_norm"] != "" for row in rows] == [True] * 4 + [False] * 4
    assert {row["loss_scale"] for row in rows} == {"8.0"}
    # Killed while it wrote a row.
    with open(tmp_path / "training.csv", "a") as file:
        file.write("9,0,1.")
    fit(model, monitor(tmp_path), epochs=1)
    assert [int(row["update"]) for row in written(tmp_path)] == list(range(1, 13))


def test_validation_batches_of_another_size_do_not_count(tmp_path):
    callback = monitor(tmp_path)
    fit(build(), callback, validation_data=(X, Y), validation_batch_size=32)
    for row in callback.rows[1:]:
        assert row["samples_per_second"] * row["update_seconds"] == pytest.approx(8)


def test_steps_per_execution_that_do_not_divide_the_epoch(tmp_path):
    model = build()
    model.compile("sgd", "mse", steps_per_execution=3)
    callback = monitor(tmp_path)
    fit(model, callback)
    assert [row["update"] for row in callback.rows] == [3, 4, 7, 8]
    assert int(model.optimizer.iterations.numpy()) == 8


def test_metrics_of_all_kinds(tmp_path):
    model = build()
    two = keras.metrics.F1Score(average=None, threshold=0.5, name="two")
    model.compile("sgd", "mse", metrics=[two, keras.metrics.MeanAbsoluteError(name="update")])
    callback = monitor(tmp_path)
    fit(model, callback)
    assert [row["update"] for row in callback.rows] == list(range(1, 9))


def test_logs_that_are_not_numbers_have_no_columns(tmp_path):
    others = {"text": "best", "digits": "1", "none": None, "nested": [1, [2, 3]], "object": {}}
    numbers = {"rate": np.float32(0.5), "tensor": tf.constant(2, tf.bfloat16), "flag": True}
    put = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(others | numbers)
    )
    callback = monitor(tmp_path, frequency=None)
    fit(build(), put, callback)
    for row in callback.rows:
        assert not others.keys() & row.keys()
        assert [row[name] for name in numbers] == [0.5, 2.0, 1.0]
    assert len(written(tmp_path)) == 2


def test_batches_of_unknown_size(tmp_path):
    def batches():
        while True:
            yield X[:8], Y[:8]

    callback = monitor(tmp_path)
    build().fit(
        batches(), steps_per_epoch=4, epochs=2, shuffle=False, verbose=0, callbacks=[callback]
    )
    assert [row["samples_per_second"] for row in callback.rows] == [None] * 8
    assert all(row["update_seconds"] > 0 for row in callback.rows[1:])


def test_an_exception_leaves_no_clock_running(tmp_path):
    pytest.importorskip("matplotlib")

    def stop(batch, logs):
        raise KeyboardInterrupt

    model, callback = build(), monitor(tmp_path, plot=True)
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, keras.callbacks.LambdaCallback(on_train_batch_end=stop))
    assert model.input_clock is None
    # The callback was not told that training ended, but can draw the rows so far.
    assert not (tmp_path / "training.png").exists()
    callback.draw()
    assert (tmp_path / "training.png").exists()


def test_a_file_that_cannot_be_written_does_not_end_training(tmp_path):
    class Removing(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    model = build()
    with pytest.warns(UserWarning, match=r"could not be written.*Training continues"):
        fit(model, Removing(), monitor(tmp_path / "run"))
    assert int(model.optimizer.iterations.numpy()) == 8


def test_enabled_false_turns_it_off(tmp_path):
    model = build()
    fit(model, monitor(tmp_path / "not", enabled=False))
    assert not (tmp_path / "not").exists()
    assert model.input_clock is None


def test_evaluation_by_itself_is_not_recorded(tmp_path):
    build().evaluate(X, Y, verbose=0, callbacks=[monitor(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_page_of_plots(tmp_path):
    pytest.importorskip("matplotlib")
    fit(build(), monitor(tmp_path, plot=True))
    header = (tmp_path / "training.png").read_bytes()[:24]
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert (header[1:4], width, height) == (b"PNG", 1350, 780)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    fit(build(), monitor(tmp_path, tensorboard=True))
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    found = {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")}
    assert found == {
        int(row["update"]): pytest.approx(float(row["loss"])) for row in written(tmp_path)
    }


class Events:
    """Replaces `tf.summary`; one of its functions fails."""

    def __init__(self, failing):
        self.failing, self.called, self.steps = failing, [], []

    def call(self, name):
        self.called.append(name)
        if name == self.failing:
            raise tf.errors.ResourceExhaustedError(None, None, "Could not flush events file.")

    def create_file_writer(self, directory):
        self.call("create")
        return self

    @contextlib.contextmanager
    def as_default(self):
        yield
        self.call("exit")

    def scalar(self, name, value, step):
        self.call("scalar")
        self.steps.append(step)

    def flush(self):
        self.call("flush")

    def close(self):
        self.call("close")


@pytest.mark.parametrize("failing", ["create", "scalar", "exit", "flush", "close", None])
def test_events_that_cannot_be_written_do_not_end_training(tmp_path, monkeypatch, failing):
    events = Events(failing)
    monkeypatch.setattr(tf, "summary", events)
    model, callback = build(), monitor(tmp_path)
    callback.tensorboard = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, callback)
    messages = [str(w.message) for w in caught if "could not be written" in str(w.message)]
    assert len(messages) == (failing is not None)
    assert all("TensorBoard's events in" in m and "Training continues" in m for m in messages)
    assert int(model.optimizer.iterations.numpy()) == 8
    assert [int(row["update"]) for row in written(tmp_path)] == list(range(1, 9))
    # It is not tried again.
    assert events.called.count(failing) == (failing is not None)
    if failing in ("close", None):
        assert sorted({*events.steps}) == list(range(1, 9))
        assert events.called[-1] == "close"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directory": ""}, "must be a directory"),
        ({"directory": "gs://bucket"}, "must be a directory of a file system"),
        ({"frequency": 0}, "must be an integer >= 1"),
        ({"frequency": True}, "must be an integer >= 1"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(tfbig.errors.InvalidOptionError, match=message):
        tfbig.callbacks.TrainingMonitor(**{"directory": tmp_path} | arguments)


@pytest.mark.parametrize("directory", ["file", "file/run", "no_directory/run"])
def test_directory_that_cannot_be_made(tmp_path, directory):
    (tmp_path / "file").write_text("other")
    (tmp_path / "no_directory").symlink_to(tmp_path / "nowhere")
    model = build()
    with pytest.raises(tfbig.errors.InvalidOptionError, match="must be one that can be made"):
        fit(model, monitor(tmp_path / directory))
    assert int(model.optimizer.iterations.numpy()) == 0
    assert (tmp_path / "file").read_text() == "other"


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("plot", "matplotlib")]
)
def test_missing_package(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tfbig.errors.InvalidOptionError, match=f"pip install {package}"):
        tfbig.callbacks.TrainingMonitor(tmp_path, **{name: True})
    callback = tfbig.callbacks.TrainingMonitor(tmp_path)
    assert not getattr(callback, name)


def test_keras_model_is_refused_unless_the_monitor_is_off(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"Use tfbig\.extend"):
        fit(model, monitor(tmp_path / "run"))
    fit(model, monitor(tmp_path / "run", enabled=False))
    assert int(model.optimizer.iterations.numpy()) == 8
    assert not (tmp_path / "run").exists()
