"""A batch that changes in size trains like plain Keras by hand, with batches of those sizes."""

import csv
import itertools
import signal
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests import job
from tests.callbacks import backup_test
from tests.conftest import make_strategy
from tfbig import errors
from tfbig.callbacks import BackupAndRestore, BatchSizeSchedule, TrainingMonitor
from tfbig.distribute import _sharded_weights

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(50, 4)), RNG.normal(size=(50, 2))

SIZES = {0: 4, 3: 10, 5: 7, 9: 17}


def size_of(update):
    """`SIZES`, as a function."""
    return SIZES[max(begin for begin in SIZES if begin <= update)]


def layers():
    return [keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(2)]


def compiled(optimizer="sgd", strategy="default", cls=tfbig.Sequential, **options):
    keras.utils.set_random_seed(1)
    settings = {k: options.pop(k) for k in ("steps_per_execution", "run_eagerly") if k in options}
    with make_strategy(strategy).scope():
        model = cls(layers(), **options)
        model.compile(optimizer, "mse", **settings)
    return model


def fit(model, *callbacks, x=X, y=Y, **kwargs):
    arguments = {"epochs": 3, "shuffle": False, "verbose": 0} | kwargs
    return model.fit(x, y, callbacks=list(callbacks), **arguments)


def batches(sizes, epochs=3, x=X, y=Y):
    """The batches of some epochs of so many samples, whose sizes a function of the update gives."""
    updates = itertools.count()
    for _ in range(epochs):
        begin = 0
        while begin < len(x):
            end = begin + sizes(next(updates))
            yield x[begin:end], y[begin:end]
            begin = end


def assert_same_weights(model, other, atol=1e-10):
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


class Record(keras.callbacks.Callback):
    """Keeps the logs after each batch, and the steps that Keras announces for each epoch."""

    def on_train_begin(self, logs=None):
        self.logs, self.steps = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.steps.append(self.params["steps"])

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(logs)

    @property
    def sizes(self):
        return [logs["batch_size"] for logs in self.logs]


# --- Exactness ---------------------------------------------------------------


@keras.saving.register_keras_serializable()
class Multiplied(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule with a factor for each update, for plain Keras."""

    def __init__(self, schedule, factors):
        self.schedule, self.factors = schedule, factors

    def __call__(self, step):
        # Its rates are of float32, also with floatx float64.
        rate = self.schedule
        rate = tf.cast(rate(step), "float64") if callable(rate) else tf.constant(rate, "float64")
        return rate * tf.gather(tf.constant(self.factors, "float64"), tf.cast(step, "int32"))

    def get_config(self):
        return {"schedule": self.schedule, "factors": self.factors}


OPTIMIZERS = {
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.3),
}
RULES = {None: lambda ratio: 1.0, "linear": float, "square_root": np.sqrt}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("optimizer", "rule", "decays", "data", "strategy", "options"),
    [
        ("sgd", None, False, "arrays", "default", {}),
        ("sgd", "linear", True, "dataset", "default", {"micro_batch_size": 3}),
        ("adamw", "square_root", True, "arrays", "default", {"gradient_accumulation_steps": 2}),
        ("adamw", "linear", False, "dataset", "default", {"micro_batch_size": "auto"}),
        ("sgd", "square_root", True, "arrays", "mirrored_2", {"micro_batch_size": 3}),
        ("adamw", "linear", True, "dataset", "mirrored_2", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                OPTIMIZERS,
                RULES,
                [False, True],
                ["arrays"],
                ["default", "mirrored_2", "mirrored_4"],
                [{"micro_batch_size": 2}],
            )
        ),
        ("adamw", "linear", True, "arrays", "mirrored_2", {"shard": "optimizer"}),
        ("sgd", "linear", True, "arrays", "mirrored_2", {"shard": "weights"}),
        ("sgd", "linear", False, "dataset", "default", {"pipeline": 2, "micro_batch_size": 3}),
        pytest.param(
            *("adamw", "linear", True, "arrays", "mirrored_2", {"jit_compile": True}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_training_equals_plain_keras_with_batches_of_the_scheduled_sizes(
    optimizer, rule, decays, data, strategy, options, monkeypatch
):
    # The weights of this model are smaller than what is divided else.
    monkeypatch.setattr(_sharded_weights, "SMALLEST", 1)
    rate = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.8) if decays else 0.05
    schedule = BatchSizeSchedule(SIZES, learning_rate=rule)
    is_compiled = options.get("jit_compile", False)
    options = {k: v for k, v in options.items() if k != "jit_compile"}
    if "pipeline" in options:
        options["pipeline"] = tfbig.distribute.Pipeline(["CPU:0", "CPU:1"])
    with make_strategy(strategy).scope():
        ours = OPTIMIZERS[optimizer](rate)
    model = compiled(ours, strategy, **options)
    model.jit_compile = is_compiled
    if data == "arrays":
        fit(model, schedule)
    else:
        # Its batches have nothing to do with those of updates.
        fit(model, schedule, x=tf.data.Dataset.from_tensor_slices((X, Y)).batch(6), y=None)
    updates = list(batches(size_of))
    factors = [RULES[rule](size_of(i) / size_of(0)) for i in range(len(updates) + 1)]
    plain = compiled(OPTIMIZERS[optimizer](Multiplied(rate, factors)), cls=keras.Sequential)
    for batch in updates:
        plain.train_on_batch(*batch)
    assert model.optimizer.iterations.numpy() == len(updates)
    assert_same_weights(model, plain)


@pytest.mark.usefixtures("float64")
def test_a_schedule_of_one_size_is_fit_with_that_batch_size():
    model, other = compiled(), compiled()
    weights = np.linspace(0.5, 2, len(X))
    kwargs = {"shuffle": True, "sample_weight": weights, "batch_size": 8}
    fit(model, BatchSizeSchedule({0: 8}), **kwargs)
    keras.utils.set_random_seed(1)
    fit(other, **kwargs)
    assert_same_weights(model, other, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_structures_ragged_and_sparse_samples_are_joined_and_cut():
    seen = []

    class Net(tfbig.Model):
        def train_step(self, data):
            seen.append(data)
            return {"loss": tf.constant(0.0)}

    rows = tf.ragged.constant([[i] * (i % 3) for i in range(10)])
    sparse = tf.sparse.from_dense(np.diag(np.arange(1.0, 11)))
    data = ({"rows": rows, "sparse": sparse, "none": None}, np.arange(10))
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(4)
    model = Net()
    model.compile(run_eagerly=True)
    model.build = lambda *_: None
    model.built = True
    fit(model, BatchSizeSchedule({0: 3, 1: 5}), x=dataset, y=None, epochs=1)
    assert [y.numpy().tolist() for _, y in seen] == [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]
    for x, y in seen:
        assert x["none"] is None
        assert x["rows"].to_list() == [[i] * (i % 3) for i in y.numpy()]
        np.testing.assert_array_equal(
            tf.sparse.to_dense(x["sparse"]), np.diag(np.arange(1.0, 11))[y.numpy()]
        )


# --- Counts, logs and traces ------------------------------------------------------


def test_another_fit_continues_the_schedule_and_skipped_updates_count():
    y = Y.copy()
    y[5] = np.inf
    model = compiled(loss_scale=8.0)
    record = Record()
    fit(model, BatchSizeSchedule(size_of), record, y=y, epochs=1)
    assert model.skipped_updates == 1
    assert record.sizes == [4, 4, 4, 10, 10, 7, 7, 7]
    # The last batch of an epoch has what is left of its 7 samples.
    fit(model, BatchSizeSchedule(size_of), record, y=y, epochs=1)
    assert record.sizes == [7, 17, 17, 17]


def test_steps_are_announced_and_sizes_logged_where_others_look(tmp_path, capsys):
    model = compiled(keras.optimizers.SGD(0.5))
    record, path = Record(), tmp_path / "log.csv"
    monitor = TrainingMonitor(tmp_path / "monitor", frequency=1, tensorboard=False, plot=False)
    others = [keras.callbacks.CSVLogger(path), monitor, record]
    history = fit(
        model,
        *others,
        BatchSizeSchedule(SIZES, learning_rate="linear"),
        verbose=1,
        epochs=2,
        validation_data=(X, Y),
    )
    assert record.steps == [8, 4]
    assert record.sizes == [4, 4, 4, 10, 10, 7, 7, 7, 7, 17, 17, 17]
    assert history.history["batch_size"] == [7, 17]
    assert "val_batch_size" not in history.history
    with path.open() as file:
        assert [float(row["batch_size"]) for row in csv.DictReader(file)] == [7, 17]
    out = capsys.readouterr().out
    assert "8/8" in out
    assert "4/4" in out
    assert "Unknown" not in out
    assert [row["batch_size"] for row in monitor.rows] == record.sizes
    # The first update, which is traced, has no times; the others end epochs with fewer samples.
    trained = [4, 4, 4, 10, 10, 7, 7, 4, 7, 17, 17, 9]
    for row, samples in list(zip(monitor.rows, trained, strict=True))[1:]:
        if row["samples_per_second"] is not None:
            product = row["samples_per_second"] * row["update_seconds"]
            np.testing.assert_allclose(product, samples)
    assert sum(row["samples_per_second"] is not None for row in monitor.rows) >= 10
    rates = [row["learning_rate"] for row in monitor.rows]
    np.testing.assert_allclose(rates, [0.5 * size / 4 for size in record.sizes])
    assert model.optimizer.learning_rate.numpy() == 0.5


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("default", {}),
        ("mirrored_2", {}),
        ("default", {"loss_scale": tfbig.DynamicLossScale(retry=True)}),
    ],
)
def test_no_size_is_traced_again(strategy, options):
    # At most as often as with one size, of which the last batch of an epoch is a smaller one.
    traces = []

    class Net(tfbig.Sequential):
        def compute_loss(self, *args, **kwargs):
            traces.append(args)
            return super().compute_loss(*args, **kwargs)

    fit(compiled(strategy=strategy, cls=Net, **options), epochs=1, batch_size=4)
    expected = len(traces)
    model, record = compiled(strategy=strategy, cls=Net, **options), Record()
    fit(model, BatchSizeSchedule({0: 4, 15: 5, 17: 6, 20: 16}, learning_rate="linear"), record)
    assert len(set(record.sizes)) == 4
    # Nor is it in another `fit`.
    fit(model, BatchSizeSchedule({0: 7}, learning_rate="linear"), epochs=1)
    assert expected < len(traces) <= 2 * expected


@pytest.mark.usefixtures("float64")
def test_other_callbacks_may_read_and_assign_the_learning_rate():
    class Halve(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            optimizer = self.model.optimizer
            optimizer.learning_rate = optimizer.learning_rate.numpy() / 2

    model = compiled(keras.optimizers.SGD(0.1))
    # What is traced here knows of no factor.
    fit(model, BatchSizeSchedule({0: 25}), epochs=1)
    schedule = BatchSizeSchedule({0: 10, 7: 25}, learning_rate="linear")
    fit(model, schedule, Halve(), epochs=2)
    # Without the callback, the factor is gone.
    fit(model, epochs=1, batch_size=25)
    rates = [*[0.1] * 7, *[0.05 * 25 / 10] * 2, *[0.025] * 2]
    sizes = [*[25] * 2, *[10] * 5, *[25] * 4]
    plain = compiled(keras.optimizers.SGD(0.1), cls=keras.Sequential)
    for rate, batch in zip(rates, batches(sizes.__getitem__, epochs=4), strict=True):
        plain.optimizer.learning_rate = rate
        plain.train_on_batch(*batch)
    assert_same_weights(model, plain)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_per_epoch_counts_updates_and_goes_on_in_the_data(steps):
    model, record = compiled(steps_per_execution=steps), Record()
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(3).repeat()
    fit(model, BatchSizeSchedule(SIZES), record, x=data, y=None, steps_per_epoch=6, epochs=2)
    assert record.steps == [6, 6]
    assert record.sizes == [size_of(u) for u in range(steps - 1, 12, steps)]
    plain = compiled(cls=keras.Sequential)
    twice = [np.concatenate([v, v, v]) for v in (X, Y)]
    for batch in itertools.islice(batches(size_of, 1, *twice), 12):
        plain.train_on_batch(*batch)
    assert_same_weights(model, plain)


# --- The gradient noise scale ----------------------------------------------------------


def noisy():
    """Targets that hardly depend on the inputs, so that gradients are mostly noise."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(200, 4)), rng.normal(size=(200, 2))


FOLLOW = {"bounds": (4, 24), "interval": 5}


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_the_size_follows_the_noise_scale_at_the_update_that_decides(strategy):
    x, y = noisy()
    model = compiled(
        strategy=strategy, gradient_accumulation_steps=2, log_gradient_noise_scale=True
    )
    record = Record()
    schedule = BatchSizeSchedule("noise_scale", **FOLLOW)
    fit(model, schedule, record, x=x, y=y, epochs=2)
    size, expected = 4, []
    for update in range(len(record.logs)):
        if update and update % 5 == 0:
            larger = min(2 * size, 24)
            # What the update just before has logged: there is no lag.
            if record.logs[update - 1]["gradient_noise_scale"] >= larger:
                size = larger
        expected.append(size)
    assert record.sizes == expected
    assert {4, 8} <= set(expected)
    # Another `fit` continues with the size, and so does another callback, up to the noise scale.
    reached = record.sizes[-1]
    fit(model, schedule, record, x=x, y=y, epochs=1)
    assert record.sizes[0] == reached
    noise_scale = record.logs[-1]["gradient_noise_scale"]
    fit(model, BatchSizeSchedule("noise_scale", **FOLLOW), record, x=x, y=y, epochs=1)
    assert record.sizes[0] == max(size for size in (4, 8, 16, 24) if size <= max(4, noise_scale))
    # A model that is new begins anew, though the callback is not.
    again = compiled(gradient_accumulation_steps=2, log_gradient_noise_scale=True)
    fit(again, schedule, record, x=x, y=y, epochs=1)
    assert record.sizes[0] == 4


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (lambda update: float("nan"), [4] * 9),
        (lambda update: float("inf"), [4, 4, 8, 8, 16, 16, 24, 24, 24]),
        (lambda update: 7.9, [4] * 9),
        (lambda update: 8.0, [4, 4, 8, 8, 8, 8, 8, 8, 8]),
        (lambda update: 100.0 if update < 5 else 1.0, [4, 4, 8, 8, 16, 16, 16, 16, 16]),
    ],
    ids=["unknown", "hidden", "below", "reached", "shrinks"],
)
def test_sizes_double_up_to_the_bound_and_never_shrink(noise, expected):
    policy = BatchSizeSchedule("noise_scale", bounds=(4, 24), interval=2)._policy
    found = []
    for update in range(9):
        policy.noise_scale = lambda update=update: noise(update)
        found.append(policy.size_of(update))
    assert found == expected


# --- Backups -----------------------------------------------------------------------------


class Interrupt(keras.callbacks.Callback):
    """Raises after so many updates, when the next one begins or the epoch ends."""

    def __init__(self, updates):
        super().__init__()
        self.left = updates

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1

    def next(self, *_, **__):
        if self.left == 0:
            raise KeyboardInterrupt

    on_train_batch_begin = on_epoch_end = next


def shuffled_dataset():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(50, seed=3).batch(6)
    return {"x": data, "y": None}


RESUMED = {
    "arrays": (SIZES, {}, {"shuffle": True}, 13),
    "after an epoch's last batch": (SIZES, {}, {"shuffle": True}, 8),
    "dataset": (SIZES, {}, shuffled_dataset, 9),
    "steps_per_epoch": (
        SIZES,
        {},
        lambda: {"x": shuffled_dataset()["x"].repeat(), "y": None, "steps_per_epoch": 5},
        7,
    ),
    "noise scale": (
        "noise_scale",
        {"gradient_accumulation_steps": 2, "log_gradient_noise_scale": True},
        {"shuffle": True},
        15,
    ),
}


@pytest.mark.parametrize(
    "by_epoch",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["after each update", "by epoch"],
)
@pytest.mark.parametrize("case", RESUMED)
def test_training_resumes_where_it_was(case, by_epoch, tmp_path):
    sizes, options, kwargs, updates = RESUMED[case]
    follow = {"bounds": (4, 24), "interval": 6} if sizes == "noise_scale" else {}

    def run(directory, *others):
        model, record = compiled("adam", **options), Record()
        backup = BackupAndRestore(tmp_path / directory, "epoch" if by_epoch else 1)
        schedule = BatchSizeSchedule(sizes, learning_rate="square_root", **follow)
        arguments = kwargs() if callable(kwargs) else kwargs
        fit(model, backup, *others, schedule, record, **arguments)
        return model, record

    whole, recorded = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("resumed", Interrupt(updates))
    model, rest = run("resumed")
    assert rest.sizes == recorded.sizes[len(recorded.sizes) - len(rest.sizes) :]
    if not by_epoch:
        assert len(rest.sizes) == len(recorded.sizes) - updates
    for ours, theirs in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(set(recorded.sizes)) > 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_of_which_one_is_killed_end_like_one_that_is_not(tmp_path):
    options = ["--exact", "--sizes", "[[0, 8], [3, 20], [9, 13]]"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    for directory in (whole, run):
        directory.mkdir()
    program = [sys.executable, backup_test.PROGRAM, whole, whole / "backup", *options]
    done = job.finish(job.start(program), 120)
    assert done.returncode == 0, done.stderr
    arguments = [run, run / "backup", "--save_freq", 2, "--seconds", 0.2, *options]
    process = job.start(job.launcher("training", *arguments, options=["--max_restarts", 1]))
    backup_test.next_update(process, 7)
    job.send(job.children(process.pid)[-1], signal.SIGKILL)
    done = job.finish(process, 200)
    assert done.returncode == 0, done.stderr
    (arrays, logs), (expected, _) = map(backup_test.end_of, (run, whole))
    for array, wanted in zip(arrays, expected, strict=True):
        # All floats are of 64 bits; sums over replicas have another order.
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-10)
    assert logs["batch_size"] == 13


@pytest.mark.slow
def test_two_workers_follow_the_noise_scale_as_two_replicas_do(tmp_path):
    options = ["--exact", "--optimizer=sgd", '--sizes="noise_scale"']
    replicas, workers = tmp_path / "replicas", tmp_path / "workers"
    for directory in (replicas, workers):
        directory.mkdir()
    command = [sys.executable, backup_test.PROGRAM, replicas, replicas / "backup"]
    done = job.finish(job.start([*command, "--strategy=mirrored", *options]), 120)
    assert done.returncode == 0, done.stderr
    done = job.run("training", workers, workers / "backup", *options)
    assert done.returncode == 0, done.stderr
    (arrays, logs), (expected, expected_logs) = map(backup_test.end_of, (workers, replicas))
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-10)
    assert logs["batch_size"] == expected_logs["batch_size"]
    assert logs["batch_size"] > 4


@pytest.mark.parametrize("has_schedule", [False, True])
def test_a_backup_of_other_batches_is_refused(has_schedule, tmp_path):
    schedules = [BatchSizeSchedule({0: 10})]
    first, second = (schedules, []) if has_schedule else ([], schedules)
    fit(compiled(), BackupAndRestore(tmp_path, delete_checkpoint=False), *first, epochs=1)
    with pytest.raises(errors.BackupError, match="without a BatchSizeSchedule"):
        fit(compiled(), BackupAndRestore(tmp_path), *second, epochs=2)


# --- Bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "from update 0 on. Received: {}"),
        (({5: 8},), "from update 0 on. Received: {5: 8}"),
        (({0: 8, -1: 4},), "Received: -1"),
        (({0: 8, 1.5: 4},), "Received: 1.5"),
        (({0: 8, 9: 0},), "Received: 0 for update 9"),
        (({0: 8.0},), "Received: 8.0 for update 0"),
        (({0: True},), "Received: True for update 0"),
        ((lambda update: update,), "Received: 0 for update 0"),
        ((256,), "`sizes` must be a dictionary"),
        (("noise",), "`sizes` must be a dictionary"),
        (("noise_scale",), "needs `bounds`"),
        (("noise_scale", {"bounds": (8, 4)}), "in this order"),
        (("noise_scale", {"bounds": (0, 4)}), "Received: 0 for bounds"),
        (("noise_scale", {"bounds": (4, 8), "interval": 0}), "`interval` must be"),
        (({0: 8}, {"bounds": (4, 8)}), "`bounds` is for"),
        (({0: 8}, {"interval": 3}), "`interval` is for"),
        (({0: 8}, {"learning_rate": "sqrt"}), "'square_root' or None. Received"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    sizes, *options = arguments
    with pytest.raises(errors.InvalidOptionError) as info:
        BatchSizeSchedule(sizes, **(options[0] if options else {}))
    assert message in str(info.value)


def generator():
    yield X, Y


NOISE = BatchSizeSchedule("noise_scale", bounds=(4, 8))


@pytest.mark.parametrize(
    ("schedules", "options", "kwargs", "message"),
    [
        ([{0: 8}] * 2, {}, {}, "only one BatchSizeSchedule"),
        ([{0: 8}], {}, {"batch_size": 16}, "batch_size=16, and 8 in the schedule"),
        ([{0: 8}], {}, {"shuffle": "batch"}, "shuffle='batch'"),
        ([{0: 8}], {}, {"x": generator, "y": None}, "GeneratorDataAdapter"),
        ([{0: 8, 3: 1}], {"strategy": "mirrored_2"}, {}, "with 2 replicas"),
        ([NOISE], {}, {}, "log_gradient_noise_scale=False"),
        ([NOISE], {"log_gradient_noise_scale": True}, {}, "must have two"),
        (
            [NOISE],
            {"log_gradient_noise_scale": True, "micro_batch_size": 4},
            {},
            "must have two",
        ),
        (
            [{0: 8}],
            {},
            {"x": tf.data.Dataset.range(3), "y": None},
            "dataset of batches",
        ),
    ],
)
def test_what_no_schedule_can_do_is_refused_before_training(schedules, options, kwargs, message):
    model = compiled(**options)
    weights = model.get_weights()
    callbacks = [s if isinstance(s, BatchSizeSchedule) else BatchSizeSchedule(s) for s in schedules]
    if callable(kwargs.get("x")):
        kwargs = kwargs | {"x": kwargs["x"]()}
    with pytest.raises(errors.InvalidOptionError) as info:
        fit(model, *callbacks, **kwargs)
    assert message in str(info.value)
    for now, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, before)
    # The model trains without it.
    assert model.sizes_of_updates is None
    model.log_gradient_noise_scale = False
    fit(model, epochs=1)


def test_a_plain_keras_model_is_refused():
    with pytest.raises(errors.UnsupportedModelError, match="needs a tfbig model"):
        fit(compiled(cls=keras.Sequential), BatchSizeSchedule({0: 8}))


def test_samples_of_several_shapes_are_refused():
    def padded():
        for length in (3, 4):
            yield np.ones((6, length)), np.ones((6, 2))

    model = tfbig.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    specs = tf.TensorSpec((None, None)), tf.TensorSpec((None, 2))
    data = tf.data.Dataset.from_generator(padded, output_signature=specs)
    model.build((None, 3))
    with pytest.raises(errors.InvalidOptionError, match="must all have one shape"):
        fit(model, BatchSizeSchedule({0: 8}), x=data, y=None)
