"""Training that is interrupted and resumed ends as if it had not been interrupted."""

import contextlib
import errno
import json
import random
import re
import signal
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests import job
from tests.conftest import make_strategy
from tests.jobs import training
from tfbig import errors
from tfbig.callbacks import _backup, _backup_files

PROGRAM = job.JOBS / "training.py"


# --- Killed programs ---------------------------------------------------------


def end_of(directory):
    """The arrays and logs that a run has written at its end."""
    with np.load(directory / "end.npz") as file:
        arrays = [file[name] for name in file.files]
    return arrays, json.loads((directory / "end.json").read_text())


def assert_same_end(directory, expected):
    (arrays, logs), (expected_arrays, expected_logs) = end_of(directory), expected
    for array, wanted in zip(arrays, expected_arrays, strict=True):
        # Bitwise: the same numbers were summed in the same order.
        np.testing.assert_array_equal(array, wanted)
    assert logs == expected_logs


class Run:
    """A run of the training program, which a test may interrupt any number of times."""

    def __init__(self, directory, *options):
        directory.mkdir()
        self.directory = directory
        self.command = [sys.executable, PROGRAM, directory, directory / "backup", *options]

    def interrupted(self, number, update, seconds=0.1):
        """Sends a signal after an update; returns the ended process."""
        process = job.start([*self.command, "--seconds", seconds])
        for line in process.stdout:
            if line.startswith(f"update {update}"):
                break
        process.send_signal(number)
        return job.finish(process, 60)

    def to_the_end(self):
        done = job.finish(job.start(self.command), 120)
        assert done.returncode == 0, done.stderr
        return done


VARIANTS = {
    "default": [],
    "mirrored": ["--strategy", "mirrored"],
    "unknown length": ["--data", "unknown"],
    "steps_per_epoch": ["--data", "steps"],
    "dataset, 2 steps": ["--data", "dataset", "--steps_per_execution", "2", "--save_freq", "2"],
    "by epoch": ["--save_freq", "epoch"],
    "in the background": ["--save_on_background", "--save_freq", "1"],
}
# On replicas, training resumes bit for bit in this process below.
QUICK = ("default",)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(v, id=k, marks=[] if k in QUICK else [pytest.mark.slow])
        for k, v in VARIANTS.items()
    ],
)
def test_a_run_that_is_killed_and_preempted_ends_like_an_uninterrupted_one(options, tmp_path):
    whole = Run(tmp_path / "whole", *options)
    whole.to_the_end()
    run = Run(tmp_path / "interrupted", *options)
    # In the second epoch, and in the third.
    assert run.interrupted(signal.SIGKILL, 6).returncode == -signal.SIGKILL
    preempted = run.interrupted(signal.SIGTERM, 10)
    assert preempted.returncode == tfbig.callbacks.PREEMPTED
    assert "preempted after batch" in preempted.stderr
    assert "Traceback" not in preempted.stderr
    resumed = run.to_the_end()
    # The epoch resumes; it is not repeated.
    batch, epoch = map(int, re.search(r"batch (\d+) of epoch (\d+)", preempted.stderr).groups())
    done = (epoch - 1) * (3 if "steps" in options else 4) + batch
    steps = 2 if "--steps_per_execution" in options else 1
    assert int(re.search(r"update (\d+)", resumed.stdout)[1]) == done + steps
    assert_same_end(run.directory, end_of(whole.directory))
    assert list((run.directory / "backup").iterdir()) == []


def job_with_restarts(directory, *options, restarts):
    directory.mkdir()
    return job.launcher(
        "training",
        directory,
        directory / "backup",
        *options,
        options=["--max_restarts", restarts],
    )


def next_update(process, least):
    """Waits for an update of a job whose number is at least this; returns the number."""
    for line in process.stdout:
        match = re.search(r"update (\d+)", line)
        if match and int(match[1]) >= least:
            return int(match[1])
    raise AssertionError("the job has ended")


def gone(pid, processes, seconds=30):
    """Waits until none of some processes is still a child of `pid`."""
    deadline = time.monotonic() + seconds
    while set(processes) & set(job.children(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("kills", "terms", "options"),
    [
        # There is a SIGTERM besides.
        pytest.param(1, 0, ["--save_on_background"], id="1"),
        pytest.param(1, 1, [], id="2", marks=pytest.mark.slow),
        pytest.param(1, 1, ["--shard=optimizer"], id="2, divided", marks=pytest.mark.slow),
        pytest.param(
            *(1, 1, ["--shard=optimizer", "--save_on_background"]),
            id="2, divided, in the background",
            marks=pytest.mark.slow,
        ),
        pytest.param(10, 5, [], id="15", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1500)
def test_a_job_of_two_workers_survives_signals_at_random_moments(kills, terms, options, tmp_path):
    whole = job_with_restarts(tmp_path / "whole", *options, restarts=0)
    whole = job.finish(job.start(whole), 120)
    assert whole.returncode == 0, whole.stderr
    rng = random.Random(kills)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(signals)
    process = job.start(
        job_with_restarts(
            tmp_path / "run",
            "--seconds",
            0.2,
            "--terminate_in_validation",
            *options,
            restarts=len(signals) + 1,
        )
    )
    # First, a worker sends one to itself during a validation.
    next_update(process, 1)
    gone(process.pid, job.children(process.pid))
    sent = 0
    for number in signals:
        # Few updates pass before most of the signals, so that some are left for the last.
        update = next_update(process, rng.randrange(1, training.UPDATES * (sent + 1) // 20 + 2))
        if update == training.UPDATES:
            break
        time.sleep(rng.uniform(0, 0.15))
        workers = job.children(process.pid)
        job.send(rng.choice(workers), number)
        sent += 1
        gone(process.pid, workers)
    done = job.finish(process, 300)
    assert done.returncode == 0, done.stderr
    failures = re.findall(r"restarts left: \d+", done.stderr)
    # Each ended the job that was running; the last ones may find training complete.
    assert len(failures) == sent + 1
    assert "preempted after batch 4 of epoch 1" in done.stderr
    assert sent >= max(1, 2 * len(signals) // 3)
    assert_same_end(tmp_path / "run", end_of(tmp_path / "whole"))
    assert list((tmp_path / "run" / "backup").iterdir()) == []
    assert job.alive(str(tmp_path)) == []


# --- In this process ---------------------------------------------------------


def compiled(units=2, strategy="default", optimizer="adam", **options):
    with make_strategy(strategy).scope():
        model = tfbig.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(3, "tanh"),
                keras.layers.Dropout(0.4),
                keras.layers.Dense(units),
            ],
            gradient_accumulation_steps=2,
            **options,
        )
        model.compile(optimizer, "mse", metrics=["mae"])
    return model


def samples(units=2):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(20, n)).astype("float32") for n in (4, units)]


class At(keras.callbacks.Callback):
    """Calls a function after a number of batches of an epoch, at the next hook."""

    def __init__(self, epoch, batches, function):
        super().__init__()
        self.at = (epoch, batches)
        self.function = function
        self.done = None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.done = (self.epoch, batch + 1)

    def next(self, *_, **__):
        if self.done == self.at:
            self.done = None
            self.function()

    on_train_batch_begin = on_test_begin = on_epoch_end = next


class Interrupt(At):
    """Raises after a number of batches of an epoch."""

    def __init__(self, epoch, batches):
        super().__init__(epoch, batches, self.interrupt)

    def interrupt(self):
        raise KeyboardInterrupt


def terminate():
    signal.raise_signal(signal.SIGTERM)


def fit(model, *callbacks, x=None, y=None, **kwargs):
    x, y = samples(model.output_shape[-1]) if x is None else (x, y)
    arguments = {"batch_size": 4, "epochs": 3, "verbose": 0} | kwargs
    return model.fit(x, y, callbacks=list(callbacks), **arguments)


def interrupted_and_resumed(directory, at, strategy="default", save_freq=1, others=list, **kwargs):
    with pytest.raises(KeyboardInterrupt):
        fit(
            compiled(strategy=strategy),
            tfbig.callbacks.BackupAndRestore(directory, save_freq),
            *others(),
            Interrupt(*at),
            **kwargs,
        )
    keras.utils.set_random_seed(1)
    model = compiled(strategy=strategy)
    backup = tfbig.callbacks.BackupAndRestore(directory, save_freq)
    return model, fit(model, backup, *others(), **kwargs)


def assert_same_weights(model, other):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("strategy", "at"),
    [
        ("default", (0, 1)),
        ("default", (1, 5)),
        ("default", (2, 5)),
        ("mirrored_2", (1, 3)),
        *(
            pytest.param("mirrored_2", at, marks=pytest.mark.slow)
            for at in [(0, 1), (1, 5), (2, 5)]
        ),
    ],
    ids=str,
)
def test_training_resumed_at_any_batch_has_the_logs_and_weights_of_an_uninterrupted_run(
    strategy, at, tmp_path
):
    # (1, 5) is the last batch of an epoch, before its validation.
    kwargs = {"validation_data": samples()}
    whole = compiled(strategy=strategy)
    history = fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"), **kwargs)
    keras.utils.set_random_seed(1)
    model, resumed = interrupted_and_resumed(tmp_path / "run", at, strategy, **kwargs)
    assert_same_weights(model, whole)
    assert resumed.epoch == list(range(at[0], 3))
    # The metrics of an epoch resume as well; they are sums of float32.
    for name, values in history.history.items():
        np.testing.assert_allclose(resumed.history[name], values[at[0] :], rtol=1e-6)


class Batches(keras.utils.PyDataset):
    """More batches than Keras's threads read ahead, of samples that change after each epoch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = samples()
        self.rng = np.random.default_rng(0)
        self.order = self.rng.permutation(len(self.x))

    @property
    def num_batches(self):
        return len(self.x)

    def __getitem__(self, index):
        i = self.order[index]
        return self.x[i : i + 1], self.y[i : i + 1]

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.x))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_batches_of_a_py_dataset_keep_their_order(workers, shuffle, tmp_path):
    def run(directory, *others, seed=1, **kwargs):
        model = compiled()
        # What Keras shuffles by; a program that starts again has another.
        random.seed(seed)
        backup = tfbig.callbacks.BackupAndRestore(directory, 1, delete_checkpoint=False)
        data, arguments = Batches(workers=workers), {"verbose": 0, "shuffle": shuffle}
        model.fit(data, callbacks=[backup, *others], **{"epochs": 3} | arguments | kwargs)
        return model

    whole = run(tmp_path / "whole")
    keras.utils.set_random_seed(1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupt(1, 5))
    keras.utils.set_random_seed(1)
    assert_same_weights(run(tmp_path / "run", seed=2), whole)
    # They are shuffled if they shall be.
    keras.utils.set_random_seed(1)
    in_order = run(tmp_path / "in order", shuffle=False)
    is_same = all(map(np.array_equal, in_order.get_weights(), whole.get_weights()))
    assert is_same != shuffle


def test_an_order_of_batches_that_cannot_be_repeated_is_warned_of(tmp_path):
    backup = tfbig.callbacks.BackupAndRestore(tmp_path)
    with pytest.warns(UserWarning, match="shuffles the batches of a PyDataset in an order that"):
        compiled().fit(Batches(), steps_per_epoch=5, epochs=2, verbose=0, callbacks=[backup])


@pytest.mark.parametrize("steps", [5, 20])
def test_batches_that_are_read_ahead_are_warned_of(steps, tmp_path):
    def run(**options):
        arguments = {"steps_per_epoch": steps, "epochs": 2, "shuffle": False, "verbose": 0}
        backup = tfbig.callbacks.BackupAndRestore(tmp_path)
        compiled().fit(Batches(**options), callbacks=[backup], **arguments)

    with pytest.warns(UserWarning, match="threads of a PyDataset with workers > 1 read ahead"):
        run(workers=2)
    run(workers=1)


def in_executions_of(steps):
    model = compiled()
    model.compile("adam", "mse", metrics=["mae"], steps_per_execution=steps)
    return model


def test_executions_that_do_not_end_where_the_backup_was_taken_are_refused(tmp_path):
    before = backed_up(tmp_path)
    with pytest.raises(errors.BackupError, match=r"(?s)after batch 2 of .*_execution=3.* 2, such"):
        fit(in_executions_of(3), tfbig.callbacks.BackupAndRestore(tmp_path))
    assert _backup_files.path_in(tmp_path).read_bytes() == before
    model = in_executions_of(2)
    fit(model, tfbig.callbacks.BackupAndRestore(tmp_path))
    assert model.optimizer.iterations.numpy() == 15
    # The end of an epoch is the end of an execution.
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path, 1), Interrupt(1, 5))
    model = in_executions_of(3)
    fit(model, tfbig.callbacks.BackupAndRestore(tmp_path))
    assert model.optimizer.iterations.numpy() == 15


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("at", [(0, 4), (0, 6), (1, 2), (1, 6)])
def test_data_of_unknown_length_that_end_within_an_execution(at, tmp_path, capsys):
    def dataset():
        return tf.data.Dataset.from_tensor_slices(tuple(samples())).batch(4).filter(lambda *_: True)

    def run(model, *callbacks):
        kwargs = {"epochs": 3, "verbose": 0, "shuffle": False, "validation_data": samples()}
        return model.fit(dataset(), callbacks=list(callbacks), **kwargs)

    whole = in_executions_of(2)
    expected = run(whole)
    keras.utils.set_random_seed(1)
    with pytest.raises(SystemExit):
        # With Keras's number of the last batch.
        run(in_executions_of(2), At(*at, terminate), tfbig.callbacks.BackupAndRestore(tmp_path, 1))
    batch = min(at[1] + 2 * (at[1] < 5), 5)
    assert f"preempted after batch {batch} of epoch {at[0] + 1}" in capsys.readouterr().err
    model = in_executions_of(2)
    history = run(model, tfbig.callbacks.BackupAndRestore(tmp_path, 1))
    assert_same_weights(model, whole)
    for name, values in history.history.items():
        np.testing.assert_allclose(values, expected.history[name][at[0] :], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 10])
def test_batches_of_another_size_are_warned_of(batch_size, tmp_path):
    backed_up(tmp_path)
    with pytest.warns(UserWarning, match=rf"of 5 batches. .* of {20 // batch_size} batches"):
        fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path), batch_size=batch_size)
    # Between epochs they may change.
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path), Interrupt(1, 1))
    fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path), batch_size=batch_size)


def test_a_preemption_names_a_batch_that_there_is(tmp_path, capsys):
    preempt = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: terminate() if batch == 5 else None
    )
    with pytest.raises(SystemExit):
        fit(in_executions_of(2), preempt, tfbig.callbacks.BackupAndRestore(tmp_path))
    assert "preempted after batch 5 of epoch 1" in capsys.readouterr().err
    assert fit(in_executions_of(2), tfbig.callbacks.BackupAndRestore(tmp_path)).epoch == [
        0,
        1,
        2,
    ]


def test_a_backup_is_not_early_where_an_execution_ends_with_the_data(tmp_path):
    batches = []

    def note(batch, logs):
        saved = _backup.read(tmp_path)
        if saved is not None:
            batches.append((saved.backup.epoch, saved.backup.batch))
            saved.close()

    # Before the backup of the same batch.
    before = keras.callbacks.LambdaCallback(on_train_batch_end=note)
    fit(in_executions_of(2), before, tfbig.callbacks.BackupAndRestore(tmp_path, 6))
    # After seven updates, and seven more.
    assert batches == [(1, 2)] * 4 + [(2, 4)]


@pytest.mark.parametrize("at", [(0, 1), (1, 3), (1, 5)])
def test_a_learning_rate_that_callbacks_multiply_is_not_multiplied_twice(at, tmp_path):
    def rates():
        return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)]

    whole = compiled()
    history = fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"), *rates())
    keras.utils.set_random_seed(1)
    model, resumed = interrupted_and_resumed(tmp_path / "run", at, others=rates)
    assert_same_weights(model, whole)
    assert resumed.history["learning_rate"] == history.history["learning_rate"][at[0] :]


@pytest.mark.parametrize("where", ["after an epoch", "in a validation"])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_weights_that_are_swapped_for_their_averages_are_backed_up_as_themselves(
    where, optimizers, tmp_path
):
    def trained(directory, *others):
        keras.utils.set_random_seed(1)
        optimizer = keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.9)
        if optimizers == 2:
            parts = keras.optimizers.OptimizerMap(optimizer)
            parts[".*/bias"] = keras.optimizers.SGD(0.1)
            optimizer = keras.optimizers.MultiOptimizer(parts)
        model = compiled(optimizer=optimizer)
        backup = tfbig.callbacks.BackupAndRestore(directory)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        fit(model, swap, *others, backup, validation_data=samples())
        return model

    whole = trained(tmp_path / "whole")
    hook = "on_epoch_begin" if where == "after an epoch" else "on_test_batch_end"
    seen = []

    def end(*_, **__):
        seen.append(hook)
        if len(seen) == 2:
            # With a backup that was made after the first epoch, or is made in the validation.
            terminate() if hook == "on_test_batch_end" else sys.exit(1)

    with pytest.raises(SystemExit):
        trained(tmp_path / "run", keras.callbacks.LambdaCallback(**{hook: end}))
    resumed = trained(tmp_path / "run")
    # Keras swaps by additions.
    for a, b in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_fit_goes_on_after_ctrl_c_in_a_validation_that_had_swapped_averages(tmp_path):
    def trained(directory, *others):
        keras.utils.set_random_seed(1)
        model = compiled(optimizer=keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5))
        swap = keras.callbacks.SwapEMAWeights()
        backup = tfbig.callbacks.BackupAndRestore(directory)
        for _ in range(1 + len(others)):
            with contextlib.suppress(KeyboardInterrupt):
                fit(model, swap, *others, backup, validation_data=samples())
        return model

    whole = trained(tmp_path / "whole")
    seen = []

    def interrupt(*_):
        seen.append(None)
        if len(seen) == 2:
            raise KeyboardInterrupt

    # The same model and callbacks, as in a notebook.
    resumed = trained(tmp_path / "run", keras.callbacks.LambdaCallback(on_test_begin=interrupt))
    assert len(seen) > 2
    # Keras swaps by additions.
    for a, b in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("signal_in_validation", [False, True])
def test_an_epoch_resumed_after_its_last_batch_has_the_logs_of_that_batch(
    signal_in_validation, tmp_path
):
    def trained(directory, *callbacks):
        keras.utils.set_random_seed(1)
        model = compiled(optimizer="sgd", loss_scale="dynamic", log_grad_norm=True)
        backup = tfbig.callbacks.BackupAndRestore(directory, 1)
        return fit(model, backup, *callbacks, validation_data=samples(), epochs=2).history

    expected = trained(tmp_path / "whole")
    assert {"loss_scale", "skipped_updates", "grad_norm", "val_loss"} < expected.keys()
    # The second time, no batch is left.
    for done in (None, (0, 5)):
        end = At(0, 5, terminate) if signal_in_validation else Interrupt(0, 5)
        end.done = done
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trained(tmp_path / "run", end)
    resumed = trained(tmp_path / "run")
    assert resumed.keys() == expected.keys()
    for name, values in expected.items():
        # Sums of float32.
        np.testing.assert_allclose(resumed[name], values, rtol=1e-6)


class Halve(keras.callbacks.Callback):
    """Acts after an epoch, as ReduceLROnPlateau does; keeps the weights of the start."""

    def on_train_begin(self, logs=None):
        self.at_start = self.model.get_weights()

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        optimizer.learning_rate = optimizer.learning_rate.numpy() / 2


def test_other_callbacks_act_after_it_restores_and_before_it_backs_up(tmp_path):
    whole = compiled()
    fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"), Halve())
    keras.utils.set_random_seed(1)
    seen = []

    def others():
        seen.append(Halve())
        return [seen[-1]]

    model, _ = interrupted_and_resumed(tmp_path / "run", (1, 2), save_freq="epoch", others=others)
    assert_same_weights(model, whole)
    assert model.optimizer.learning_rate.numpy() == whole.optimizer.learning_rate.numpy()
    first, resumed = (halve.at_start for halve in seen)
    assert not np.array_equal(first[0], resumed[0])


def test_variables_of_bfloat16_are_kept(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    try:
        whole = compiled()
        fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"))
        keras.utils.set_random_seed(1)
        model, _ = interrupted_and_resumed(tmp_path / "run", (1, 3))
    finally:
        keras.config.set_dtype_policy("float32")
    assert {v.dtype for v in model.trainable_variables} == {"bfloat16"}
    assert_same_weights(model, whole)


@pytest.mark.parametrize("batches", [5, 0], ids=["in the last validation", "after it"])
def test_sigterm_after_the_last_update_loses_nothing(batches, tmp_path, capsys):
    whole = compiled()
    kwargs = {"validation_data": samples()}
    history = fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"), **kwargs)
    keras.utils.set_random_seed(1)
    if batches:
        preempt = At(2, batches, terminate)
    else:
        preempt = keras.callbacks.LambdaCallback(on_train_end=lambda logs: terminate())
    backup = tfbig.callbacks.BackupAndRestore(tmp_path / "run")
    with pytest.raises(SystemExit) as raised:
        fit(compiled(), preempt, backup, **kwargs)
    assert raised.value.code == tfbig.callbacks.PREEMPTED
    expected = "preempted after batch 5 of epoch 3" if batches else "preempted at its end"
    assert expected in capsys.readouterr().err
    model = compiled()
    resumed = fit(model, tfbig.callbacks.BackupAndRestore(tmp_path / "run"), **kwargs)
    assert_same_weights(model, whole)
    assert resumed.epoch == ([2] if batches else [])
    for name, values in resumed.history.items():
        np.testing.assert_allclose(values, history.history[name][2:], rtol=1e-6)


def test_training_that_stopped_early_has_ended(tmp_path):
    def run(epochs=3, *others):
        model = compiled()
        backup = tfbig.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
        return model, fit(model, backup, *others, epochs=epochs).epoch

    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=1e9, start_from_epoch=0)
    stopped, epochs = run(3, stop)
    assert epochs == [0, 1]
    again, epochs = run()
    assert epochs == []
    assert_same_weights(again, stopped)
    assert run(epochs=4)[1] == [2, 3]


def test_each_epoch_has_its_own_order_which_a_restart_keeps(tmp_path):
    # Keras itself shuffles every epoch in the same order once a seed is set.
    def order(*callbacks, epochs=3):
        seen = []

        class Identity(keras.layers.Layer):
            def call(self, x):
                return x

        model = tfbig.Sequential([keras.Input((1,)), Identity(), keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=True)
        train_step = model.train_step

        def record(data):
            seen.append(data[0].numpy().ravel().astype(int).tolist())
            return train_step(data)

        model.train_step = record
        x = np.arange(12.0).reshape(-1, 1)
        model.fit(x, x, batch_size=4, epochs=epochs, verbose=0, callbacks=list(callbacks))
        return seen

    backup = tfbig.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    first = order(backup, epochs=2)
    epochs = np.reshape(first, (2, -1)).tolist()
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    keras.utils.set_random_seed(1)
    rest = order(tfbig.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False))
    keras.utils.set_random_seed(1)
    whole = order(tfbig.callbacks.BackupAndRestore(tmp_path / "other"))
    assert len(rest) == 3
    assert first + rest == whole


def test_without_a_seed_the_backup_brings_its_own(tmp_path):
    program = (
        "import keras, numpy as np, sys, tfbig\n"
        "x = np.arange(12.0).reshape(-1, 1)\n"
        "model = tfbig.Sequential([keras.Input((1,)), keras.layers.Dense(1)])\n"
        "model.compile('sgd', 'mse', run_eagerly=True)\n"
        "train_step = model.train_step\n"
        "def record(data):\n"
        "    print(*data[0].numpy().ravel().astype(int), end=' ')\n"
        "    return train_step(data)\n"
        "model.train_step = record\n"
        "backup = tfbig.callbacks.BackupAndRestore(sys.argv[1], delete_checkpoint=False)\n"
        "epochs = int(sys.argv[2])\n"
        "model.fit(x, x, batch_size=4, epochs=epochs, verbose=0, callbacks=[backup])\n"
        "print(backup._seed)\n"
    )

    def order(epochs):
        done = job.finish(job.start([sys.executable, "-c", program, tmp_path, epochs]), 60)
        assert done.returncode == 0, done.stderr
        return list(map(int, done.stdout.split()))

    *first, seed = order(1)
    *second, seed_of_second = order(2)
    assert seed == seed_of_second
    assert sorted(first) == sorted(second) == list(range(12))
    # By chance they are the same once in 12! runs.
    assert first != second


def test_training_with_an_initial_epoch_resumes_its_data(tmp_path):
    kwargs = {"initial_epoch": 4, "epochs": 8}
    whole = compiled()
    fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"), **kwargs)
    keras.utils.set_random_seed(1)
    model, _ = interrupted_and_resumed(tmp_path / "run", (6, 2), **kwargs)
    assert_same_weights(model, whole)


def test_samples_within_batches_are_shuffled_differently_in_each_epoch(tmp_path):
    seen = []
    model = tfbig.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    train_step = model.train_step

    def record(data):
        seen.append(data[0].numpy().ravel().astype(int).tolist())
        return train_step(data)

    model.train_step = record
    x = np.arange(14.0).reshape(-1, 1)
    backup = tfbig.callbacks.BackupAndRestore(tmp_path)
    fit(model, backup, x=x, y=x, batch_size=6, epochs=2, shuffle="batch")
    batches = [list(range(6)), list(range(6, 12)), [12, 13]]
    assert [sorted(batch) for batch in seen] == batches * 2
    assert len({str(batch) for batch in seen[:2] + seen[3:5]}) == 4
    assert seen[0] != batches[0]


def test_structures_with_none_in_them_are_shuffled_too(tmp_path):
    inputs = [keras.Input((4,)), keras.Input((4,), optional=True)]
    model = tfbig.Model(inputs, keras.layers.Dense(2)(inputs[0]))
    model.compile("sgd", "mse")
    x, y = samples()
    backup = tfbig.callbacks.BackupAndRestore(tmp_path)
    history = model.fit([x, None], y, batch_size=4, epochs=2, verbose=0, callbacks=[backup])
    assert np.isfinite(history.history["loss"]).all()


def test_chief_only_refuses_a_callback_that_all_workers_must_have(tmp_path):
    with pytest.raises(errors.InvalidOptionError, match="All workers must have this callback"):
        tfbig.callbacks.ChiefOnly(tfbig.callbacks.BackupAndRestore(tmp_path))


def test_a_function_replaces_the_exit(tmp_path):
    called = []
    model = compiled()

    class Preempt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)

    def batches_of_backup():
        with contextlib.closing(_backup.read(tmp_path)) as saved:
            called.append(saved.backup.batch)

    backup = tfbig.callbacks.BackupAndRestore(tmp_path, on_preemption=batches_of_backup)
    fit(model, Preempt(), backup)
    assert called == [3]
    assert model.optimizer.iterations.numpy() == 3
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_does_what_it_did_before_once_fit_has_ended(tmp_path):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path), Interrupt(0, 2))
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [True]


def test_a_complete_training_leaves_no_backup_unless_asked_to(tmp_path):
    fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path))
    assert list(tmp_path.iterdir()) == []
    model = compiled()
    fit(model, tfbig.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False))
    again = compiled()
    history = fit(again, tfbig.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False))
    assert history.epoch == []
    assert_same_weights(again, model)


@pytest.mark.parametrize("delete", [True, False])
@pytest.mark.parametrize("epochs", [1, 0])
def test_a_backup_that_has_come_further_stays(epochs, delete, tmp_path):
    whole = compiled()
    fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"))
    keras.utils.set_random_seed(1)
    # Of the second epoch of three.
    before = backed_up(tmp_path)
    with pytest.warns(UserWarning, match=f"after batch 2 of epoch 2.*epochs={epochs}"):
        history = fit(
            compiled(),
            tfbig.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=delete),
            epochs=epochs,
        )
    assert history.epoch == []
    assert _backup_files.path_in(tmp_path).read_bytes() == before
    # Nothing is lost.
    model = compiled()
    fit(model, tfbig.callbacks.BackupAndRestore(tmp_path))
    assert_same_weights(model, whole)


def test_a_training_that_has_ended_and_runs_again_resumes_its_data_with_more_epochs(tmp_path):
    def run(directory, epochs):
        keras.utils.set_random_seed(1)
        model = compiled()
        sizes = tfbig.callbacks.BatchSizeSchedule({0: 3, 9: 5})
        backup = tfbig.callbacks.BackupAndRestore(tmp_path / directory, delete_checkpoint=False)
        fit(model, backup, sizes, batch_size=None, epochs=epochs)
        return model

    whole = run("whole", 4)
    for epochs in (2, 2, 4):
        model = run("run", epochs)
    assert_same_weights(model, whole)


@pytest.mark.parametrize("initial_epoch", [2, 3])
@pytest.mark.parametrize("at", [(0, 2), (1, 1)])
def test_a_backup_of_an_epoch_before_the_initial_one_is_refused(at, initial_epoch, tmp_path):
    before = backed_up(tmp_path, at=at)
    model = compiled()
    weights = model.get_weights()
    with pytest.raises(errors.BackupError, match=f"initial_epoch={initial_epoch}.*is kept"):
        fit(model, tfbig.callbacks.BackupAndRestore(tmp_path), initial_epoch=initial_epoch)
    assert _backup_files.path_in(tmp_path).read_bytes() == before
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_backup_wins_over_an_earlier_initial_epoch(tmp_path):
    whole = compiled()
    fit(whole, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"))
    keras.utils.set_random_seed(1)
    backed_up(tmp_path / "run")
    model = compiled()
    history = fit(model, tfbig.callbacks.BackupAndRestore(tmp_path / "run"), initial_epoch=1)
    assert history.epoch == [1, 2]
    assert_same_weights(model, whole)


def backed_up(directory, at=(1, 2), **kwargs):
    """Makes a backup of interrupted training; returns its bytes."""
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(**kwargs), tfbig.callbacks.BackupAndRestore(directory, 1), Interrupt(*at))
    return _backup_files.path_in(directory).read_bytes()


OTHERS = {
    "units": {"units": 3},
    "optimizer": {"optimizer": "sgd"},
    "loss scale": {"loss_scale": "dynamic"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_backup_of_another_model_is_refused_and_kept(other, tmp_path):
    before = backed_up(tmp_path)
    model = compiled(**OTHERS[other])
    weights = model.get_weights()
    with pytest.raises(errors.BackupError, match=f"(?s){re.escape(str(tmp_path))}.*it holds"):
        fit(model, tfbig.callbacks.BackupAndRestore(tmp_path))
    assert _backup_files.path_in(tmp_path).read_bytes() == before
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_backup_of_another_format_is_refused_and_kept(tmp_path, monkeypatch):
    before = backed_up(tmp_path)
    monkeypatch.setattr(_backup, "FORMAT", 2)
    with pytest.raises(errors.BackupError, match=r"has format 1, and this version .* format 2"):
        fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path))
    assert _backup_files.path_in(tmp_path).read_bytes() == before


def flipped(data, index):
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


DAMAGES = {
    "empty": lambda before: b"",
    "text": lambda before: b"no archive",
    "cut": lambda before: before[: len(before) // 2],
    # In the values of the first array, behind its name and its header.
    "a bit": lambda before: flipped(before, 220),
    # In the directory at the end, which has flags and the method of compression of each array.
    "encrypted": lambda before: flipped(before, before.index(b"PK\1\2") + 8),
    "compressed": lambda before: flipped(before, before.index(b"PK\1\2") + 10),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_refused_and_kept(damage, tmp_path):
    before = backed_up(tmp_path)
    damaged = DAMAGES[damage](before)
    _backup_files.path_in(tmp_path).write_bytes(damaged)
    with pytest.raises(errors.BackupError, match="cannot be read"):
        fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path))
    assert _backup_files.path_in(tmp_path).read_bytes() == damaged


def full_disk(*_, **__):
    """Replaces what writes an array."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_raises_a_warning_and_the_last_backup_stays(tmp_path, monkeypatch):
    before = backed_up(tmp_path)
    monkeypatch.setattr(_backup_files, "write_array", full_disk)
    model = compiled()
    with pytest.warns(UserWarning, match=r"could not be written.*No space left.*continues"):
        fit(model, tfbig.callbacks.BackupAndRestore(tmp_path, 1, delete_checkpoint=False))
    assert model.optimizer.iterations.numpy() == 15
    assert _backup_files.path_in(tmp_path).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [_backup_files.FILE]


def test_a_preemption_whose_backup_cannot_be_written_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_backup_files, "write_array", full_disk)
    backup = tfbig.callbacks.BackupAndRestore(tmp_path)
    with (
        pytest.warns(UserWarning, match="could not be written"),
        pytest.raises(SystemExit) as raised,
    ):
        fit(compiled(), At(0, 2, terminate), backup)
    assert raised.value.code == 128 + signal.SIGTERM
    assert "no backup could be written" in capsys.readouterr().err


def test_evaluate_by_itself_is_left_alone(tmp_path):
    model = compiled()
    backup = tfbig.callbacks.BackupAndRestore(tmp_path)
    x, y = samples()
    wanted = model.evaluate(x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0, callbacks=[backup]) == wanted


def test_two_backups_of_one_training_are_refused(tmp_path):
    backups = [tfbig.callbacks.BackupAndRestore(tmp_path / name) for name in "ab"]
    with pytest.raises(errors.InvalidOptionError, match="only one that restores"):
        fit(compiled(), *backups)


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.BackupError, match=r"cannot be read.*Not a directory"):
        fit(compiled(), tfbig.callbacks.BackupAndRestore(tmp_path / "file" / "below"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_freq": 0}, "`save_freq` must be 'epoch' or an integer >= 1.*save_freq=0"),
        ({"save_freq": True}, "save_freq=True"),
        ({"save_freq": "batch"}, "save_freq='batch'"),
        ({"on_preemption": "stop"}, "`on_preemption` must be .*on_preemption='stop'"),
        ({"keep": 0}, "`keep` must be an integer >= 1.*keep=0"),
        ({"keep": True}, "keep=True"),
        ({"save_on_background": 1}, "`save_on_background` must be True or False.*=1"),
        ({"backup_dir": ""}, "`backup_dir` must not be empty"),
        ({"backup_dir": "gs://bucket/x"}, "mount the storage.*'gs://bucket/x'"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(errors.InvalidOptionError, match=message):
        tfbig.callbacks.BackupAndRestore(**{"backup_dir": tmp_path} | arguments)


def test_plain_keras_models_are_told_what_to_use(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(errors.UnsupportedModelError, match=r"tfbig\.extend"):
        model.fit(*samples(), verbose=0, callbacks=[tfbig.callbacks.BackupAndRestore(tmp_path)])


# --- ChiefOnly --------------------------------------------------------------


def test_chief_only_is_the_callback_itself_in_a_single_process(tmp_path):
    class Count(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.calls = []

        def on_train_begin(self, logs=None):
            self.calls.append(self.params["epochs"])

        def on_epoch_end(self, epoch, logs=None):
            self.calls.append((epoch, sorted(logs)))

    alone, wrapped, second = Count(), Count(), Count()
    fit(compiled(), alone, tfbig.callbacks.ChiefOnly(wrapped, second))
    assert alone.calls == wrapped.calls == second.calls
    assert len(alone.calls) == 4


def test_chief_only_forwards_every_hook():
    hooks = {n for n in dir(keras.callbacks.Callback) if n.startswith("on_")}
    called = []

    class Everything(keras.callbacks.Callback):
        pass

    for hook in hooks:
        setattr(Everything, hook, lambda self, *_, hook=hook, **__: called.append(hook))
    wrapped = tfbig.callbacks.ChiefOnly(Everything())
    model = compiled()
    fit(model, wrapped, epochs=1, validation_data=samples())
    model.predict(samples()[0], verbose=0, callbacks=[wrapped])
    # `on_batch_begin` and `on_batch_end` are what the hooks of training call by default.
    assert hooks - set(called) == {"on_batch_begin", "on_batch_end"}


def test_chief_only_takes_nothing_but_callbacks():
    with pytest.raises(errors.InvalidOptionError, match=r"must be Keras callbacks.*3"):
        tfbig.callbacks.ChiefOnly(3)


def test_other_optimizers_of_a_model_are_in_the_backup(tmp_path):
    model = compiled()
    model.own = keras.optimizers.SGD()
    model.more = [keras.optimizers.Adam(), keras.optimizers.SGD()]
    with pytest.raises(errors.BackupError, match=r"Received: more, not built"):
        fit(model, tfbig.callbacks.BackupAndRestore(tmp_path))
    assert model.optimizer.iterations.numpy() == 0
    others = [model.own, *model.more]
    for optimizer in others:
        optimizer.build(model.trainable_variables)
    held = [id(v) for v in _backup.State(model).variables]
    assert all(held.count(id(v)) == 1 for o in others for v in o.variables)
    assert len(set(held)) == len(held)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
@pytest.mark.parametrize("passes_on_classes", [True, False])
def test_a_model_with_a_step_of_its_own_resumes(strategy, passes_on_classes, tmp_path):
    """Its step builds what is not built before: its optimizer, and metrics of its data."""

    class OneHot(tfbig.Sequential):
        def train_step(self, data):
            x, y = data
            return super().train_step(data if passes_on_classes else (x, tf.one_hot(y, 3)))

    kind = "sparse_categorical_crossentropy" if passes_on_classes else "categorical_crossentropy"
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(20, 4)), "y": rng.integers(0, 3, 20)}

    def model():
        keras.utils.set_random_seed(1)
        with make_strategy(strategy).scope():
            made = OneHot([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
            made.compile("adam", kind, metrics=["accuracy"])
        return made

    backup = tfbig.callbacks.BackupAndRestore
    whole, resumed = model(), model()
    history = fit(whole, backup(tmp_path / "whole", 1), **data).history
    with pytest.raises(KeyboardInterrupt):
        fit(model(), backup(tmp_path / "one", 1), Interrupt(1, 3), **data)
    found = fit(resumed, backup(tmp_path / "one", 1), **data).history
    assert found == {key: values[1:] for key, values in history.items()}
    assert_same_weights(resumed, whole)
