"""Spikes: training with them ends as plain Keras does that never saw their batches."""

import contextlib
import csv
import json
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests import job
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import errors
from tfbig.callbacks import BackupAndRestore, SpikeGuard, TrainingMonitor, _backup_files
from tfbig.callbacks._spike_state import SpikeSettings, SpikeState

pytestmark = pytest.mark.usefixtures("float64")

SIZE = 6
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.PiecewiseConstantDecay([2, 5], [0.1, 0.05, 0.02])
    ),
    "adam": lambda: keras.optimizers.Adam(0.02, global_clipnorm=1.0),
}


def batches(pattern):
    """Batches one after another: "g" is a good one, "s" one with huge targets."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(pattern), SIZE, 3))
    y = x.sum(-1, keepdims=True) + rng.normal(size=(len(pattern), SIZE, 1))
    y[[kind == "s" for kind in pattern]] *= 1e4
    return x, y


def layers():
    return [
        keras.Input((3,)),
        keras.layers.Dense(4, "tanh"),
        keras.layers.Dense(1),
    ]


def net(strategy="default", optimizer="sgd", compile_options=None, between=(), **options):
    keras.utils.set_random_seed(1)
    if strategy == "pipeline":
        strategy, options["pipeline"] = "default", tfbig.distribute.Pipeline(["CPU:0", "CPU:1"])
    with make_strategy(strategy).scope():
        *first, last = layers()
        model = tfbig.Sequential([*first, *(layer() for layer in between), last], **options)
        model.compile(OPTIMIZERS[optimizer](), "mse", **(compile_options or {}))
    return model


def fit(model, x, y, *callbacks, **options):
    flat = (np.reshape(v, (-1, v.shape[-1])) for v in (x, y))
    options = {"batch_size": SIZE, "shuffle": False, "verbose": 0, "callbacks": callbacks} | options
    return model.fit(*flat, **options).history


def plain(x, y, seen, optimizer="sgd"):
    """Plain Keras, trained on some of the batches, one after another."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(layers())
    model.compile(OPTIMIZERS[optimizer](), "mse")
    fit(model, x[seen], y[seen])
    return model


def assert_same_state(model, expected):
    assert int(model.optimizer.iterations.numpy()) == int(expected.optimizer.iterations.numpy())
    found = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    wanted = [*expected.get_weights(), *(v.numpy() for v in expected.optimizer.variables)]
    for one, other in zip(found, wanted, strict=True):
        # Rounding in float64.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


class Weights(keras.callbacks.Callback):
    """Everything that an update moves, after each; of all replicas."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        copies = self.model.distribute_strategy.experimental_local_results
        model = self.model
        variables = [*model.weights, *model.optimizer.variables, *model.seed_states.variables()]
        self.seen.append([c.numpy() for v in variables for c in copies(v.value)])


# --- Skipped updates -----------------------------------------------------------------


@in_turn(
    {
        "strategy, options": {
            "whole": ("default", {}),
            "mirrored, cut": ("mirrored_2", {"gradient_accumulation_steps": 3, "loss_scale": 8.0}),
            "divided state": ("mirrored_2", {"shard": "optimizer", "micro_batch_size": 2}),
            "divided weights": ("mirrored_2", {"shard": "weights", "micro_batch_size": 2}),
            "executions": ("default", {"compile_options": {"steps_per_execution": 4}}),
            "mirrored, executions": ("mirrored_2", {"compile_options": {"steps_per_execution": 4}}),
            "compiled": ("default", {"compile_options": {"jit_compile": True}}),
            "eager": ("mirrored_2", {"compile_options": {"run_eagerly": True}}),
            "automatic": ("mirrored_2", {"micro_batch_size": "auto"}),
            "pipeline": ("pipeline", {"gradient_accumulation_steps": 3}),
        },
        "optimizer": list(OPTIMIZERS),
        "looks_at": {"norm": {}, "loss": {"grad_norm": False, "loss": True}},
    },
    slow=["compiled", "eager", "automatic", "divided weights", "mirrored, executions"],
)
def test_training_never_saw_a_spike(strategy, optimizer, options, looks_at):
    x, y = batches("ggggggsggs")
    guard = SpikeGuard(factor=20, window=3, **looks_at)
    model = net(strategy, optimizer, **options)
    history = fit(model, x, y, guard)
    assert history["spikes"] == [2]
    assert history["rollbacks"] == [0]
    assert guard.spikes == 2
    assert_same_state(model, plain(x, y, [0, 1, 2, 3, 4, 5, 7, 8], optimizer))


def test_another_guard_goes_on_counting_what_was_left_out(tmp_path):
    x, y = batches("ggggggsggs")
    model = net()
    left_out = []
    for _ in range(2):
        guard = SpikeGuard(factor=20, window=3)
        fit(model, x, y, guard, TrainingMonitor(tmp_path))
        left_out.append(model.left_out_updates)
        assert guard.spikes == 2
    assert left_out == [2, 4]
    with open(tmp_path / "training.csv") as file:
        assert [int(row["update"]) for row in csv.DictReader(file)] == [10, 20]


def test_a_spike_changes_no_bit_and_metrics_count_its_batch(mirrored):
    x, y = batches("gggsg")
    weights = Weights()
    # Layers whose state each update moves.
    between = [keras.layers.BatchNormalization, lambda: keras.layers.Dropout(0.5, seed=1)]
    model = net("mirrored_2", "adam", between=between)
    with pytest.warns(UserWarning, match="BatchNormalization"):
        history = fit(model, x, y, SpikeGuard(factor=20, window=3), weights)
    before, after, later = weights.seen[2:]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    # The learning rate stays.
    same = [np.array_equal(one, other) for one, other in zip(after, later, strict=True)]
    assert sum(same) == 2
    # As for an update that the loss scale skips.
    assert history["loss"][0] > 1e5


def test_nothing_is_skipped_in_the_warm_up_unless_it_is_not_finite():
    x, y = batches("ggggsgg")
    x[2, 0, 0] = np.inf
    model = net()
    # Five accepted updates, of which the spike is the fourth.
    history = fit(model, x, y, SpikeGuard(factor=20, window=3, warm_up=5))
    assert history["spikes"] == [1]
    assert_same_state(model, plain(x, y, [0, 1, 3, 4, 5, 6]))


def test_no_guard_after_fit_and_a_further_fit_knows_of_the_first():
    x, y = batches("gggs")
    guard, model = SpikeGuard(factor=20, window=3), net()
    fit(model, x[:3], y[:3], guard)
    function = model.train_function
    fit(model, x[3:], y[3:], guard)
    assert guard.spikes == 1
    # Not traced again.
    assert model.train_function is function
    assert_same_state(model, plain(x, y, [0, 1, 2]))
    model.train_on_batch(x[3], y[3])
    assert_same_state(model, plain(x, y, [0, 1, 2, 3]))
    fit(model, x[3:], y[3:])
    assert_same_state(model, plain(x, y, [0, 1, 2, 3, 3]))
    assert guard.spikes == 1
    assert model.update_guard is None


def test_what_the_loss_scale_skips_is_no_spike():
    x, y = batches("ggggsgg")
    x[3, 0, 0] = np.inf
    model = net(loss_scale="dynamic")
    guard = SpikeGuard(factor=20, window=3, patience=2)
    history = fit(model, x, y, guard)
    assert history["spikes"] == [1]
    assert history["skipped_updates"] == [1]
    assert guard.rollbacks == 0
    # The spike was finite, so the scale counts it.
    assert int(model.loss_scale_state.finite_updates.numpy()) == 3
    assert_same_state(model, plain(x, y, [0, 1, 2, 5, 6]))


def test_an_update_stands_out_from_the_median_of_accepted_ones():
    settings = SpikeSettings(3.0, 5, True, True, 4, 10**6, 6.0)
    state = SpikeState(settings)
    state.set_active(True)
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=300)).astype("float32")
    losses = (rng.normal(size=300) - np.linspace(-3, 3, 300)).astype("float32")
    norms[20:40] = 0.0
    norms[100] = np.nan
    accepted, risen, rises = [], 0, []

    def stands_out(value, values, factor):
        median = np.median(values[-5:]) if values else 0.0
        return median != 0 and value > median + (factor - 1) * abs(median)

    for norm, loss in zip(norms, losses, strict=True):
        pairs = list(zip((norm, loss), zip(*accepted, strict=True) or ((), ()), strict=False))
        is_warm = len(accepted) >= 4
        expected = np.isfinite(norm) and not (
            is_warm and any(stands_out(value, values, 3.0) for value, values in pairs)
        )
        has_risen = is_warm and stands_out(loss, [other for _, other in accepted], 6.0)
        risen = risen + 1 if has_risen else 0
        rises.append(risen >= 2)
        found = state.accepts(tf.constant(loss), tf.constant(norm), None)
        assert bool(found) == expected
        if expected:
            accepted.append((norm, loss))
        assert bool(state.number("is_due")) == rises[-1]
        state.is_due.assign(0)
    assert 20 < state.number("spikes") < 200
    assert any(rises)


# --- Training that goes back -----------------------------------------------------------


@in_turn(
    {
        "strategy, options": {
            "default": ("default", {"loss_scale": "dynamic"}),
            "mirrored": ("mirrored_2", {"shard": "optimizer"}),
            "weights": ("mirrored_2", {"shard": "weights"}),
            "executions": ("mirrored_2", {"compile_options": {"steps_per_execution": 3}}),
        },
        "optimizer": list(OPTIMIZERS),
    },
    slow=["weights"],
)
def test_after_patience_training_goes_back_and_leaves_batches_out(strategy, options, optimizer):
    x, y = batches("ggggggsssggg")
    guard = SpikeGuard(factor=20, window=3, patience=3, snapshot_every=2)
    model = net(strategy, optimizer, **options)
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(logs)
    )
    history = fit(model, x, y, record, guard)
    assert history["rollbacks"] == [1]
    assert history["spikes"] == [3]
    assert seen[-1]["rollbacks"] == 1
    # The copy after 6 batches was never confirmed. After executions of 3, the copies are those
    # after 3 and 6.
    last = 3 if "compile_options" in options else 4
    assert_same_state(model, plain(x, y, [*range(last), 9, 10, 11], optimizer))
    assert model.left_out_updates == 12 - int(model.optimizer.iterations.numpy())


def several():
    """Optimizers for some of the weights each; together they have no learning rate."""
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.02))
    optimizers[".*/bias"] = keras.optimizers.SGD(0.1, momentum=0.9)
    return keras.optimizers.MultiOptimizer(optimizers)


def test_training_goes_back_with_several_optimizers(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "several", several)
    x, y = batches("ggggggsssggg")
    model = net(optimizer="several")
    fit(model, x, y, SpikeGuard(factor=20, window=3, patience=3, snapshot_every=2))
    assert_same_state(model, plain(x, y, [0, 1, 2, 3, 9, 10, 11], "several"))


def test_training_goes_back_when_the_loss_has_risen():
    # The spike is accepted, and the weights are bad after it.
    x, y = batches("ggggsgggg")
    guard = SpikeGuard(factor=1e9, window=3, rollback_factor=5, snapshot_every=1)
    model = net()
    history = fit(model, x, y, guard)
    assert history["rollbacks"] == [1]
    assert history["spikes"] == [0]
    # The copies after the spike and before it were never confirmed.
    assert_same_state(model, plain(x, y, [0, 1, 2, 6, 7, 8]))


def test_a_single_loss_that_has_risen_takes_nothing_back():
    x, y = batches("ggggsgggg")
    guard = SpikeGuard(factor=20, window=3, rollback_factor=20)
    model = net()
    assert fit(model, x, y, guard)["rollbacks"] == [0]
    assert_same_state(model, plain(x, y, [0, 1, 2, 3, 5, 6, 7, 8]))


def test_training_ends_after_too_many_rollbacks():
    x, y = batches("gggg" + "s" * 9)
    model = net()
    guard = SpikeGuard(factor=20, window=3, patience=2, max_rollbacks=2, snapshot_every=1)
    with pytest.raises(errors.SpikeError, match=r"back 3 times, .*max_rollbacks=2"):
        fit(model, x, y, guard)
    assert guard.spikes == 6
    assert_same_state(model, plain(x, y, [0, 1, 2]))
    # It no longer acts.
    model.train_on_batch(x[4], y[4])
    assert_same_state(model, plain(x, y, [0, 1, 2, 4]))


def test_a_learning_rate_that_callbacks_set_stays():
    x, y = batches("gggg" + "ss" + "gg")
    keras.utils.set_random_seed(1)
    model = tfbig.Sequential(layers())
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 if epoch == 0 else 0.01)
    guard = SpikeGuard(factor=20, window=3, patience=2)
    # The copy is from the start, before the second epoch sets the rate.
    fit(model, x, y, rates, guard, steps_per_epoch=4, epochs=2)
    assert guard.rollbacks == 1
    keras.utils.set_random_seed(1)
    expected = keras.Sequential(layers())
    expected.compile(keras.optimizers.SGD(0.01), "mse")
    fit(expected, x[6:], y[6:])
    for one, other in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.01)


@pytest.mark.parametrize("on_background", [False, True])
def test_training_goes_back_to_the_last_backup(on_background, tmp_path, monkeypatch):
    write = _backup_files.write_archive

    def slow_write(*args):
        # Longer than the updates until it is wanted.
        time.sleep(0.5 if on_background else 0)
        write(*args)

    monkeypatch.setattr(_backup_files, "write_archive", slow_write)
    x, y = batches("ggggg" + "ss" + "gg")
    backup = BackupAndRestore(tmp_path / "backup", save_freq=4, save_on_background=on_background)
    guard = SpikeGuard(factor=20, window=3, patience=2, snapshot_every=None)
    model = net(optimizer="adam")
    fit(model, x, y, backup, guard)
    assert guard.rollbacks == 1
    # The backup is of four batches.
    assert_same_state(model, plain(x, y, [0, 1, 2, 3, 7, 8], "adam"))


def test_no_backup_to_go_back_to(tmp_path):
    x, y = batches("gggss")
    backup = BackupAndRestore(tmp_path / "backup")
    guard = SpikeGuard(factor=20, window=3, patience=2, snapshot_every=None)
    with pytest.raises(errors.SpikeError, match="no backup in"):
        fit(net(), x, y, backup, guard)


def test_a_training_that_resumes_copies_its_state_when_that_is_due(tmp_path):
    x, y = batches("gggg" + "gggss" + "gg")
    with contextlib.suppress(KeyboardInterrupt):
        backup = BackupAndRestore(tmp_path / "backup", save_freq=4)
        fit(net(), x, y, backup, SpikeGuard(factor=20, window=3), Interrupt(5))
    guard = SpikeGuard(factor=20, window=3, patience=2, snapshot_every=4)
    model = net()
    fit(model, x, y, BackupAndRestore(tmp_path / "backup"), guard)
    assert guard.rollbacks == 1
    # The copy of the four batches before is not four updates old.
    assert_same_state(model, plain(x, y, [0, 1, 2, 3, 9, 10]))


def test_a_copy_is_not_early_where_an_execution_ends_with_the_data():
    x, y = batches("ggggg")
    guard = SpikeGuard(factor=20, window=3, snapshot_every=6)
    copies = []
    model = net(compile_options={"steps_per_execution": 2})
    copy = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: copies.append(guard._source._since)
    )
    fit(model, x, y, guard, copy, epochs=2)
    assert copies == [2, 4, 5, 0, 2, 3]


@pytest.mark.parametrize("window_before", [None, 4], ids=["no guard", "another window"])
def test_training_goes_back_to_a_backup_without_what_the_guard_knows(window_before, tmp_path):
    x, y = batches("gggg" + "gggss" + "gg")
    before = [] if window_before is None else [SpikeGuard(factor=20, window=window_before)]
    with contextlib.suppress(KeyboardInterrupt):
        backup = BackupAndRestore(tmp_path / "backup", save_freq=4)
        fit(net(optimizer="adam"), x, y, backup, *before, Interrupt(5))
    guard = SpikeGuard(factor=20, window=3, patience=2, snapshot_every=None)
    model = net(optimizer="adam")
    fit(model, x, y, BackupAndRestore(tmp_path / "backup"), guard)
    assert (guard.spikes, guard.rollbacks) == (2, 1)
    assert_same_state(model, plain(x, y, [0, 1, 2, 3, 9, 10], "adam"))


def test_training_does_not_go_back_to_a_backup_of_another_model(tmp_path):
    x, y = batches("ggggss")
    with contextlib.suppress(KeyboardInterrupt):
        backup = BackupAndRestore(tmp_path / "other", save_freq=1)
        fit(net(optimizer="sgd"), x, y, backup, Interrupt(2))

    def replace(batch, logs):
        if batch == 4:
            path = _backup_files.path_in(tmp_path / "backup")
            path.write_bytes(_backup_files.path_in(tmp_path / "other").read_bytes())

    backup = BackupAndRestore(tmp_path / "backup", save_freq=2)
    guard = SpikeGuard(factor=20, window=3, patience=2, snapshot_every=None)
    model = net(optimizer="adam")
    other = keras.callbacks.LambdaCallback(on_train_batch_end=replace)
    with pytest.raises(errors.SpikeError, match=r"(?s)another model, .*it holds .*for itself"):
        fit(model, x, y, backup, other, guard)
    assert_same_state(model, plain(x, y, [0, 1, 2, 3], "adam"))


# --- With other callbacks ----------------------------------------------------------------


class Interrupt(keras.callbacks.Callback):
    """Ends training after so many batches."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.batches:
            raise KeyboardInterrupt


def test_an_interrupted_training_knows_earlier_norms(tmp_path):
    x, y = batches("gggsgsg")
    options = {"factor": 20, "window": 3}
    with contextlib.suppress(KeyboardInterrupt):
        backup = BackupAndRestore(tmp_path / "backup", save_freq=2)
        fit(net(), x, y, backup, SpikeGuard(**options), Interrupt(5))
    # Resumes after four batches, of which one was skipped.
    guard, model = SpikeGuard(**options), net()
    monitor = TrainingMonitor(tmp_path / "monitor", frequency=1, plot=False, tensorboard=False)
    history = fit(model, x, y, monitor, BackupAndRestore(tmp_path / "backup"), guard)
    assert history["spikes"] == [2]
    assert_same_state(model, plain(x, y, [0, 1, 2, 4, 6]))
    # The monitor, which comes first, counts and shows what the guard does.
    assert [(row["update"], row["spikes"]) for row in monitor.rows] == [(5, 1), (6, 2), (7, 2)]


@pytest.mark.parametrize("has_guard", [False, True])
def test_a_guard_may_come_and_go_between_interruption_and_resumption(has_guard, tmp_path):
    x, y = batches("ggggs")
    backup = BackupAndRestore(tmp_path / "backup", save_freq=2)
    guards = [SpikeGuard(factor=20, window=3)]
    with contextlib.suppress(KeyboardInterrupt):
        fit(net(), x, y, backup, *(guards if has_guard else ()), Interrupt(3))
    model = net()
    history = fit(model, x, y, backup, *(() if has_guard else guards))
    assert history.get("spikes") == (None if has_guard else [0])
    assert_same_state(model, plain(x, y, range(5)))


# --- A train_step of one's own -------------------------------------------------------------


class Own(tfbig.Sequential):
    """A model with a `train_step` of its own, which may pass the guard on."""

    is_guarded = True
    calls = 1

    def train_step(self, data):
        def loss(micro_batch):
            inputs, targets = micro_batch
            return tf.reduce_mean((self(inputs, training=True) - targets) ** 2)

        share = tfbig.accumulate_gradients(loss, self.trainable_variables, data)
        guard = {"update_guard": self.update_guard} if self.is_guarded else {}
        for _ in range(self.calls):
            update = tfbig.apply_gradients(self.optimizer, share, **guard)
        return {"loss": update.loss}


def own_net():
    keras.utils.set_random_seed(1)
    model = Own(layers())
    model.compile(OPTIMIZERS["sgd"](), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def test_a_train_step_of_ones_own_passes_the_guard_on():
    x, y = batches("gggsg")
    model = own_net()
    history = fit(model, x, y, SpikeGuard(factor=20, window=3))
    assert history["spikes"] == [1]
    assert_same_state(model, plain(x, y, [0, 1, 2, 4]))


def test_a_train_step_without_the_guard_is_refused():
    x, y = batches("g")
    model = own_net()
    model.is_guarded = False
    before = model.get_weights()
    with pytest.raises(errors.UnsupportedModelError, match=r"update_guard=self\.update_guard to"):
        fit(model, x, y, SpikeGuard())
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    # Without the callback, it trains.
    fit(model, x, y)


def test_a_guard_of_several_updates_is_refused():
    x, y = batches("g")
    model = own_net()
    model.calls = 2
    with pytest.raises(errors.UnsupportedModelError, match="to one call of"):
        fit(model, x, y, SpikeGuard())


def test_an_extended_class_with_its_own_step_is_refused():
    class Theirs(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    x, y = batches("g")
    model = tfbig.extend(Theirs)(layers())
    model.compile("sgd", "mse")
    with pytest.raises(errors.UnsupportedModelError, match=r"Theirs .*update_guard=<SpikeGuard"):
        fit(model, x, y, SpikeGuard())


# --- Bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1}, r"`factor` must be a finite number > 1.*factor=1\b"),
        ({"factor": float("nan")}, "`factor` must be a finite number > 1"),
        ({"factor": True}, "factor=True"),
        ({"window": 2}, "`window` must be an integer >= 3.*window=2"),
        ({"warm_up": 0}, "`warm_up` must be an integer >= 1"),
        ({"patience": 0}, "`patience` must be an integer >= 1"),
        ({"rollback_factor": 0.5}, "`rollback_factor` must be a finite number > 1"),
        ({"max_rollbacks": -1}, "`max_rollbacks` must be an integer >= 0"),
        ({"snapshot_every": 0.5}, "`snapshot_every` must be an integer >= 1"),
        ({"grad_norm": False}, "must look at .*grad_norm=False, loss=False"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(errors.InvalidOptionError, match=message):
        SpikeGuard(**options)


def test_bad_use():
    x, y = batches("g")
    model = net()
    before = model.get_weights()
    with pytest.raises(errors.InvalidOptionError, match="only one SpikeGuard"):
        fit(model, x, y, SpikeGuard(), SpikeGuard())
    with pytest.raises(errors.InvalidOptionError, match="BackupAndRestore among the callbacks"):
        fit(model, x, y, SpikeGuard(snapshot_every=None))
    outer = keras.callbacks.CallbackList([SpikeGuard()], model=model)
    inner = keras.callbacks.LambdaCallback(on_train_begin=outer.on_train_begin)
    with pytest.raises(errors.InvalidOptionError, match="must be among the `callbacks`"):
        fit(model, x, y, inner)
    with pytest.raises(errors.InvalidOptionError, match="All workers must have this callback"):
        tfbig.callbacks.ChiefOnly(SpikeGuard())
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    with pytest.raises(errors.UnsupportedModelError, match="needs a tfbig model"):
        fit(plain(x, y, [0]), x, y, SpikeGuard())


# --- Several workers -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shard", [None, "optimizer"])
def test_two_workers_skip_and_go_back_together(shard, tmp_path):
    done = job.run("spikes", tmp_path, json.dumps(shard), timeout=200)
    assert done.returncode == 0, done.stderr
    one, other = job.results(tmp_path)
    assert one == other
    assert (one["spikes"], one["rollbacks"], one["iterations"]) == (4, 1, 10)
    x, y = batches("ggggggsggsssggg")
    expected = plain(x, y, [*range(6), 7, 12, 13, 14], "adam")
    for found, wanted in zip(one["weights"], expected.get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
