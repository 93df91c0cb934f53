"""`pipeline`: layers on stages of their own train, evaluate and predict as on one device."""

import contextlib
import inspect
import json
import math
import os
import re
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.eager import context
from tensorflow.python.framework import config as tf_config

import tfbig
from tests import job
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import errors
from tfbig._keras import devices, stages, variables, work
from tfbig._update import stage_cut
from tfbig.distribute import Pipeline

TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(44, 16)), RNG.normal(size=(44, 4))
WEIGHTS = RNG.uniform(0.5, 2, 44)
IDS, LABELS = RNG.integers(1, 30, (44, 7)), RNG.integers(0, 30, (44, 7))
IDS[::3, 4:] = 0


def on_cpus(stages=2, replicas=1, **kwargs):
    devices = [
        tuple(f"CPU:{s * replicas + r}" for r in range(replicas)) if replicas > 1 else f"CPU:{s}"
        for s in range(stages)
    ]
    return Pipeline(devices, **kwargs)


# --- Programs ---------------------------------------------------------------------------


def skips(cls, **options):
    """Skip connections over stages, by an operation and by a layer."""
    x = keras.Input((16,))
    h = layers.Dense(12, "tanh", kernel_regularizer="l2")(x)
    for i in range(4):
        new = layers.Dense(12, "tanh")(h)
        h = new + h if i % 2 else layers.Add()([new, h])
        h = layers.LayerNormalization()(h)
    return cls(x, layers.Dense(4)(h), **options)


def plain(cls, **options):
    x = h = keras.Input((16,))
    for _ in range(4):
        h = layers.Dense(12, "tanh")(h)
    return cls(x, layers.Dense(4)(h), **options)


def two_outputs(cls, **options):
    x = keras.Input((16,))
    h = layers.Dense(12, "tanh")(x)
    early = layers.Dense(4, name="early")(h)
    for _ in range(3):
        h = layers.Dense(12, "tanh")(h)
    return cls(x, {"early": early, "late": layers.Dense(4, name="late")(h)}, **options)


def masks(cls, **options):
    """Masks that go from stage to stage, loops inside layers, and rows of a table."""
    x = keras.Input((None,), dtype="int64")
    h = layers.Embedding(30, 8, mask_zero=True)(x)
    h = layers.LSTM(8, return_sequences=True)(h)
    h = layers.MultiHeadAttention(2, 4)(h, h)
    h = layers.GRU(8, return_sequences=True)(layers.LayerNormalization()(h))
    return cls(x, layers.Dense(30)(h), **options)


def state(cls, **options):
    """Statistics that move, and seeds."""
    x = keras.Input((16,))
    h = x
    for i in range(4):
        h = layers.BatchNormalization()(layers.Dense(12, "tanh")(h))
        h = layers.Dropout(0.3, seed=i)(h)
    return cls(x, layers.Dense(4)(h), **options)


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


PROGRAMS = {
    "plain": (plain, X, Y, "mse"),
    "skips": (skips, X, Y, "mse"),
    "two_outputs": (two_outputs, X, {"early": Y, "late": Y}, {"early": "mse", "late": "mae"}),
    "masks": (masks, IDS, LABELS, crossentropy),
    "state": (state, X, Y, "mse"),
}

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, global_clipnorm=0.5, use_ema=True),
    "muon": lambda: keras.optimizers.Muon(0.01, clipnorm=0.1),
}


def train(name, optimizer="adamw", cls=tfbig.Model, strategy="default", compiled=None, **options):
    """A trained model, and what it and its history are then."""
    make, x, y, loss = PROGRAMS[name]
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        model = make(cls, **options)
        metrics = None if name == "two_outputs" else ["mae" if name != "masks" else "accuracy"]
        # A loss of Keras has the dtype of the moment when it is made.
        loss = loss() if loss is crossentropy else loss
        model.compile(OPTIMIZERS[optimizer](), loss, metrics=metrics, **compiled or {})
    weights = {"two_outputs": None, "masks": WEIGHTS[:, np.newaxis] * np.ones(7)}.get(name, WEIGHTS)
    history = model.fit(
        x, y, sample_weight=weights, batch_size=16, epochs=2, shuffle=False, verbose=0
    ).history
    evaluated = model.evaluate(x, y, batch_size=16, verbose=0)
    predicted = tf.nest.flatten(model.predict(x, batch_size=16, verbose=0))
    values = variables.values_of([*model.variables, *model.optimizer.variables])
    return model, [*values, evaluated, *predicted], history


def assert_same(found, expected, tolerance=TOLERANCE):
    _, found, history = found
    _, expected, expected_history = expected
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    for key, values in expected_history.items():
        np.testing.assert_allclose(history[key], values, rtol=tolerance, atol=tolerance)


def devices_of(model):
    """The devices of each stage's variables, as sets."""
    found = {}
    for v in model.trainable_variables:
        found.setdefault(stages.stage_of(v).index, set()).update(variables.devices_of(v))
    return found


# --- The same update ---------------------------------------------------------------------


@in_turn(
    {
        "optimizer": ["adamw", "sgd", "muon"],
        "number, name": {
            "2-skips": (2, "skips"),
            "3-two_outputs": (3, "two_outputs"),
            "4-masks": (4, "masks"),
            "2-masks": (2, "masks"),
            "4-skips": (4, "skips"),
            "3-masks": (3, "masks"),
        },
    },
    slow=["2-masks", "4-skips", "3-masks"],
)
def test_as_plain_keras_on_one_device(name, number, optimizer, float64):
    pipeline = on_cpus(number)
    found = train(name, optimizer, pipeline=pipeline, gradient_accumulation_steps=3)
    assert_same(found, train(name, optimizer, keras.Model))
    full = "/job:localhost/replica:0/task:0/device:CPU:"
    assert devices_of(found[0]) == {i: {f"{full}{i}"} for i in range(number)}
    for v, average in zip(
        found[0].trainable_variables,
        getattr(found[0].optimizer, "_model_variables_moving_average", []),
        strict=False,
    ):
        assert average.value.device == v.value.device


@in_turn(
    {
        "options": {
            "ragged": {"micro_batch_size": 5},
            "one": {"gradient_accumulation_steps": 1},
            "scaled": {"gradient_accumulation_steps": 4, "loss_scale": "dynamic"},
            "recomputed": {"gradient_accumulation_steps": 4, "recompute": True},
            "measured": {
                "gradient_accumulation_steps": 4,
                "log_grad_norm": True,
                "log_gradient_noise_scale": True,
            },
        },
        # In the others a tensor is used three times, and the order of its gradients differs.
        "name": ["state", "two_outputs"],
    }
)
@pytest.mark.filterwarnings("ignore:BatchNormalization")
def test_no_bit_differs_from_the_model_without_stages(name, options):
    # In float32, where another order of a sum would show.
    options = {"log_grad_norm": True} | options
    # One micro-batch without stages would be Keras's own step otherwise.
    found, expected = train(name, pipeline=on_cpus(), **options), train(name, **options)
    assert_same(found, expected, tolerance=0)


def test_several_steps_per_execution(float64):
    found = train("plain", compiled={"steps_per_execution": 2}, pipeline=on_cpus(3))
    assert_same(found, train("plain", cls=keras.Model))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_replicas_of_stages(optimizer, float64):
    # Several buckets for each stage.
    options = {"gradient_accumulation_steps": 3, "exchange_bucket_bytes": 1000}
    pipeline = on_cpus(2, 2)
    found = train("masks", optimizer, strategy="mirrored_2", pipeline=pipeline, **options)
    assert_same(found, train("masks", optimizer, keras.Model))
    model = found[0]
    ends = {stage: {d[-1] for d in devices} for stage, devices in devices_of(model).items()}
    assert ends == {0: {"0", "1"}, 1: {"2", "3"}}
    for v in model.trainable_variables:
        first, second = v.value.values
        np.testing.assert_array_equal(first, second)


def test_a_gradient_that_is_not_finite_skips_on_all_stages():
    pipeline = on_cpus(2, 2)
    keras.utils.set_random_seed(1)
    with make_strategy("mirrored_2").scope():
        model = skips(tfbig.Model, pipeline=pipeline, loss_scale=2.0)
        model.compile(OPTIMIZERS["adamw"](), "mse")
    model.train_on_batch(X[:8], Y[:8])
    before = variables.values_of([*model.variables, *model.optimizer.variables])
    bad = X[:8].copy()
    bad[0] = np.inf
    model.train_on_batch(bad, Y[:8])
    after = variables.values_of([*model.variables, *model.optimizer.variables])
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(model.loss_scale_state.skipped_updates.numpy()) == 1


def test_float16_and_a_scale_that_moves():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        # At the first of these scales, gradients overflow.
        scale = tfbig.DynamicLossScale(initial_scale=2.0**22, backoff_factor=0.25)
        options = {"gradient_accumulation_steps": 4, "loss_scale": scale}
        found, expected = (train("plain", **options | o) for o in ({"pipeline": on_cpus()}, {}))
    finally:
        keras.config.set_dtype_policy("float32")
    assert found[0].compute_dtype == "float16"
    assert found[0].skipped_updates == expected[0].skipped_updates > 0
    assert found[0].loss_scale == expected[0].loss_scale
    assert_same(found, expected, tolerance=0)


class OwnStep(tfbig.Model):
    def train_step(self, data):
        x, y = data

        def loss(micro_batch):
            x, y = micro_batch
            return self.compute_loss(y=y, y_pred=self(x, training=True))

        accumulated = tfbig.accumulate_gradients(
            loss, self.trainable_variables, (x, y), gradient_accumulation_steps=3
        )
        update = tfbig.apply_gradients(self.optimizer, accumulated)
        return {"loss": update.loss}


def test_a_step_of_ones_own(float64):
    def trained(cls, **options):
        keras.utils.set_random_seed(1)
        model = skips(cls, **options)
        model.compile(OPTIMIZERS["adamw"](), "mse")
        model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
        return model

    found, expected = trained(OwnStep, pipeline=on_cpus(3)), trained(keras.Model)
    for a, b in zip(found.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


class Weighted(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]))
        self.bias = self.add_weight(shape=(shape[-1],))

    def product(self, x):
        return tf.matmul(x, tf.convert_to_tensor(self.kernel))


class WithGradient(Weighted):
    """Has a gradient of its own, of a weight too."""

    def call(self, x):
        @tf.custom_gradient
        def function(x):
            def gradient(upstream, variables):
                of_weights = [tf.matmul(x, upstream, transpose_a=True) for _ in variables]
                return tf.matmul(upstream, self.kernel, transpose_b=True), of_weights

            return self.product(x), gradient

        return function(x) + self.bias


class InFunctions(Weighted):
    """Reads its weights in functions, in a loop and in Python."""

    def call(self, x):
        x = tf.function(self.product)(x) + self.bias
        x = tf.map_fn(lambda row: tf.tanh(self.product(row[tf.newaxis])[0]), x)
        _, x = tf.while_loop(lambda i, _: i < 2, lambda i, x: (i + 1, self.product(x)), (0, x))
        kernel = tf.convert_to_tensor(self.kernel)
        return tf.ensure_shape(tf.py_function(tf.matmul, [x, kernel], x.dtype), x.shape)


class WithLosses(Weighted):
    """Adds losses, and differentiates in its forward pass."""

    def call(self, x):
        self.add_loss(tf.reduce_mean(tf.square(self.kernel)) + tf.reduce_mean(tf.square(x)))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.tanh(self.product(x)))
        return tape.gradient(y, x) + self.bias


@pytest.mark.parametrize("strategy", ["default", "one_device"])
# `py_function` is one, as far as TensorFlow knows.
@pytest.mark.filterwarnings("ignore:Operations with side effects")
def test_layers_of_many_kinds(strategy, float64):
    def trained(**options):
        keras.utils.set_random_seed(1)
        with make_strategy(strategy).scope():
            kinds = [WithGradient, InFunctions, WithLosses, WithGradient]
            inner = [layer for kind in kinds for layer in (kind(), layers.Dense(6, "tanh"))]
            # Built late, hence moved after the optimizer is there.
            model = tfbig.Sequential(inner, gradient_accumulation_steps=3, **options)
            model.compile("adam", "mse")
        model.fit(X[:, :6], Y[:, :1], batch_size=16, shuffle=False, verbose=0)
        return model

    model, expected = trained(pipeline=on_cpus()), trained()
    assert devices_of(model).keys() == {0, 1}
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Counting(layers.Layer):
    """Assigns a variable that Keras knows nothing of."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def call(self, x):
        with tf.control_dependencies([self.counter.assign_add(1.0)]):
            return tf.identity(x)


class Counted(Counting):
    """Reads it, later than the next micro-batch could assign it."""

    def call(self, x):
        def slow(x):
            time.sleep(0.05)
            return x

        waited = tf.numpy_function(slow, [x], x.dtype, stateful=False)
        with tf.control_dependencies([waited]):
            return x * self.counter.read_value()


@pytest.mark.filterwarnings("ignore:Operations with side effects")
@pytest.mark.filterwarnings("ignore:The forward pass changes variables")
def test_what_is_assigned_in_a_micro_batch_is_read_in_it(float64):
    counter = tf.Variable(0.0, dtype="float64", trainable=False)
    pipeline = on_cpus()
    x = keras.Input((1,))
    with pipeline.stage(0):
        h = Counting(counter)(layers.Dense(1, kernel_initializer="ones")(x))
    with pipeline.stage(1):
        h = Counted(counter)(layers.Dense(1, kernel_initializer="ones")(h))
    model = tfbig.Model(x, h, gradient_accumulation_steps=6, pipeline=pipeline)
    model.compile(keras.optimizers.SGD(0.0), lambda y, y_pred: y_pred)
    counter.assign(0.0)
    ones = np.ones((6, 1))
    loss = model.train_on_batch(ones, ones)
    before = 1.0 if int(counter.numpy()) == 6 else counter.numpy() - 5
    assert loss == pytest.approx(np.mean(before + np.arange(6)))


def batch_mean(cls, **options):
    x = keras.Input((16,))
    h = layers.Dense(4)(layers.Dense(8)(x))
    return cls(x, [h, keras.ops.mean(h, axis=0)], **options)


def products_of_samples(cls, **options):
    x = keras.Input((16,))
    h = layers.Dense(4)(layers.Dense(8)(x))
    return cls(x, keras.ops.matmul(h, keras.ops.transpose(h)), **options)


@pytest.mark.parametrize("make", [batch_mean, products_of_samples])
def test_outputs_that_are_not_of_one_sample_each_are_predicted_at_once(make, float64):
    keras.utils.set_random_seed(1)
    expected = make(keras.Model).predict(X, batch_size=44, verbose=0)
    keras.utils.set_random_seed(1)
    found = make(tfbig.Model, pipeline=on_cpus()).predict(X, batch_size=44, verbose=0)
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_prediction_builds_a_model():
    model = tfbig.Sequential([layers.Dense(12), layers.Dense(4)], pipeline=on_cpus())
    first = model.predict(X, verbose=0)
    np.testing.assert_allclose(model.predict(X, verbose=0), first, atol=1e-6)
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    assert devices_of(model).keys() == {0, 1}


def test_layers_of_a_subclass_on_chosen_stages(float64):
    pipeline = on_cpus(2)

    class Chosen(layers.Layer):
        def __init__(self):
            super().__init__()
            with pipeline.stage(0):
                self.first = layers.Dense(8, "tanh")
            with pipeline.stage(1):
                self.second = keras.Sequential([layers.Dense(8, "tanh"), layers.Dense(4)])

        def call(self, x):
            return self.second(self.first(x) * 2)

    class Model(tfbig.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.inner = Chosen()

        def call(self, x):
            return self.inner(x)

    def trained(**options):
        keras.utils.set_random_seed(1)
        model = Model(gradient_accumulation_steps=2, **options)
        model.compile("adam", "mse")
        model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
        return model

    model = trained(pipeline=pipeline)
    assert {k: len(v) for k, v in devices_of(model).items()} == {0: 1, 1: 1}
    pipeline = contextlib.nullcontext()
    pipeline.stage = lambda _: contextlib.nullcontext()
    for a, b in zip(model.get_weights(), trained().get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# --- A model that is there already ---------------------------------------------------------


def test_extend_moves_a_model_and_its_optimizer(float64):
    expected = train("plain", cls=keras.Model)[0]
    expected.fit(X, Y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    model = tfbig.extend(train("plain", cls=keras.Model)[0], pipeline=on_cpus(3))
    assert sorted(devices_of(model)) == [0, 1, 2]
    state = {v.path: v.value.device for v in model.optimizer.variables}
    for v in model.trainable_variables:
        name = v.path.replace("/", "_")
        own = {d for path, d in state.items() if f"{name}_" in path}
        assert own == {v.value.device}
    model.fit(X, Y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    # And back.
    model.pipeline = None
    everything = [*model.variables, *model.optimizer.variables]
    assert {v.value.device[-1] for v in everything} == {"0"}
    model.fit(X, Y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    expected.fit(X, Y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def several_optimizers(_):
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.01))
    optimizers["dense_[23].*"] = keras.optimizers.SGD(0.1, momentum=0.9)
    return keras.optimizers.MultiOptimizer(optimizers)


def excluding(dense):
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.5)
    excluded = {"var_list": [dense[3].kernel, dense[0].bias], "var_names": ["dense_2/kernel"]}
    optimizer.exclude_from_weight_decay(**excluded)
    return optimizer


@pytest.mark.parametrize("make_optimizer", [several_optimizers, excluding])
def test_an_optimizer_knows_the_weights_that_are_moved(make_optimizer, float64):
    def trained(cls, *pipelines):
        keras.utils.set_random_seed(1)
        dense = [layers.Dense(8, name=f"dense_{i}") for i in range(4)]
        model = cls([keras.Input((16,)), *dense])
        model.compile(make_optimizer(dense), "mse")
        for pipeline in pipelines:
            model.pipeline = pipeline
            for v in model.optimizer.variables if pipeline else ():
                # The number of the layer is in its name.
                number = re.search(r"dense_(\d)", v.path)
                assert number is None or v.value.device[-1] == str(int(number[1]) // 2)
            model.fit(X, X[:, :8], batch_size=16, shuffle=False, verbose=0)
        everything = [*model.variables, *model.optimizer.variables]
        assert {v.value.device[-1] for v in everything} == {"0"}
        return variables.values_of(everything)

    expected = trained(keras.Sequential, None, None, None, None)
    found = trained(tfbig.Sequential, on_cpus(), None, on_cpus(), None)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_model_for_which_every_device_is_too_small_is_made_on_the_host(monkeypatch):
    """The host is CPU:3 here; that variables move one at a time is counted."""
    with tf.device("CPU:3"):
        model = plain(keras.Model)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.optimizer.build(model.trainable_variables)
    everything = [*model.trainable_variables, *model.optimizer.momentums]
    assert {v.value.device[-1] for v in everything} == {"3"}
    natives = {id(v.value): v.value for v in everything}
    elements = sum(math.prod(v.shape) for v in natives.values())
    move, held = stages.move, []

    def counted(variable, *args):
        move(variable, *args)
        natives[id(variable.value)] = variable.value
        values = (
            tf.raw_ops.ReadVariableOp(resource=v.handle, dtype=v.dtype) for v in natives.values()
        )
        held.append(sum(int(tf.size(value)) for value in values))

    monkeypatch.setattr(stages, "move", counted)
    moved = tfbig.extend(model, pipeline=on_cpus(2))
    # Each time, what was moved has left the host, but for an element.
    assert held == [elements + n for n in range(1, len(everything) + 1)]
    assert {v.value.device[-1] for v in everything} == {"0", "1"}
    before = moved.get_weights()
    moved.fit(X, Y, batch_size=16, verbose=0)
    assert all((a != b).any() for a, b in zip(moved.get_weights(), before, strict=True))


def test_files_hold_no_devices(tmp_path):
    model, values, _ = train("plain", pipeline=on_cpus(4))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.pipeline is None
    assert {v.value.device[-1] for v in loaded.variables} == {"0"}
    for a, b in zip(loaded.get_weights(), values, strict=False):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    loaded.pipeline = on_cpus(2)
    loaded.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(
        exported.serve(X.astype("float32")), model.predict(X, verbose=0), atol=1e-6
    )


def test_a_backup_resumes_on_other_stages(tmp_path, float64):
    def trained(pipeline, epochs, directory=None):
        keras.utils.set_random_seed(1)
        model = skips(tfbig.Model, pipeline=pipeline, gradient_accumulation_steps=2)
        model.compile(OPTIMIZERS["adamw"](), "mse")
        callbacks = [] if directory is None else [tfbig.callbacks.BackupAndRestore(directory)]
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(
                *(X, Y),
                batch_size=16,
                epochs=epochs,
                shuffle=False,
                verbose=0,
                callbacks=[*callbacks, *([Stop()] if epochs == 3 and directory else [])],
            )
        return model.get_weights()

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    trained(on_cpus(3), 3, tmp_path)
    resumed = trained(on_cpus(2), 4, tmp_path)
    for a, b in zip(resumed, trained(None, 4), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_monitor_tells_of_the_stage_that_holds_most(tmp_path):
    monitor = tfbig.callbacks.TrainingMonitor(tmp_path, frequency=1, plot=False)
    model = plain(tfbig.Model, pipeline=on_cpus(2))
    model.compile("adam", "mse")
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[monitor])
    sizes = {}
    for v in (*model.trainable_variables, *model.optimizer.variables):
        if v.value.shape.rank:
            sizes[v.value.device] = sizes.get(v.value.device, 0) + v.numpy().nbytes
    found = {row["state_mib"] * 2**20 for row in monitor.rows}
    assert len(sizes) == 2
    # Counters are there as well.
    assert all(max(sizes.values()) <= size <= max(sizes.values()) + 100 for size in found)
    # Without a monitor, stages are not timed.
    with_clocks = model.train_function
    model.fit(X, Y, batch_size=16, verbose=0)
    assert model.stage_clock is None
    assert model.train_function is not with_clocks


@pytest.mark.parametrize(
    ("name", "strategy", "compiled"),
    [
        ("plain", "default", {"steps_per_execution": 2}),
        pytest.param("skips", "default", {}, marks=pytest.mark.slow),
        pytest.param("masks", "mirrored_2", {}, marks=pytest.mark.slow),
    ],
)
def test_stages_are_timed_for_a_monitor_and_nothing_else_changes(
    name, strategy, compiled, tmp_path, float64
):
    make, x, y, loss = PROGRAMS[name]

    def trained(*callbacks):
        keras.utils.set_random_seed(1)
        with make_strategy(strategy).scope():
            pipeline = on_cpus(2, 2 if strategy == "mirrored_2" else 1)
            model = make(tfbig.Model, pipeline=pipeline, gradient_accumulation_steps=3)
            loss_of_model = loss() if loss is crossentropy else loss
            model.compile(OPTIMIZERS["adamw"](), loss_of_model, **compiled)
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0, callbacks=[*callbacks])
        return model

    monitor = tfbig.callbacks.TrainingMonitor(tmp_path, frequency=1, plot=False, tensorboard=False)
    model, expected = trained(monitor), trained()
    assert all(0 < row["bubble"] < 1 for row in monitor.rows)
    # TensorFlow does not join operations whose results are timed, and rounds otherwise.
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_stages_are_not_timed_without_a_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(tf_config, "is_op_determinism_enabled", lambda: True)
    monitor = tfbig.callbacks.TrainingMonitor(tmp_path, frequency=1, plot=False, tensorboard=False)
    model = plain(tfbig.Model, pipeline=on_cpus(2))
    model.compile("sgd", "mse")
    model.fit(X[:16], Y[:16], batch_size=16, verbose=0, callbacks=[monitor])
    assert model.stage_clock is None
    assert "bubble" not in monitor.rows[0]


def test_stages_that_were_chosen_are_chosen_again(float64):
    model = chosen(0, 1, 1, 1)
    pipeline = model.pipeline

    def numbers():
        return [stages.stage_of(layer).index for layer in model.layers[1:]]

    model.pipeline = None
    assert devices_of_all(model) == {"0"}
    model.pipeline = pipeline
    assert numbers() == [0, 1, 1, 1]
    model.pipeline = on_cpus(in_flight=5)
    assert numbers() == [0, 1, 1, 1]
    with pytest.raises(errors.InvalidOptionError, match="twice"):
        model.pipeline = Pipeline(["CPU:0", "/device:CPU:0"])
    # The one before is in effect.
    assert model.pipeline.in_flight == 5
    assert numbers() == [0, 1, 1, 1]
    model.compile("sgd", "mse")
    model.fit(X, X[:, :4], verbose=0)


def test_a_model_made_again_of_the_same_layers(float64):
    """As when a cell of a notebook is run once more."""
    x = h = keras.Input((16,))
    for _ in range(3):
        h = layers.Dense(4)(h)

    def made(**options):
        model = tfbig.Model(x, h, gradient_accumulation_steps=3, **options)
        model.compile("adam", "mse")
        return model

    def fit(model):
        model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)

    start = keras.Model(x, h).get_weights()
    models = [made(pipeline=on_cpus()), made(pipeline=on_cpus(3)), made(pipeline=on_cpus())]
    for model in models:
        model.set_weights(start)
        fit(model)
    found = models[0].get_weights()
    # Those that were made before go on, each with its stages.
    fit(models[1])
    assert devices_of(models[1]).keys() == {0, 1, 2}
    expected = made()
    with pytest.raises(errors.InvalidOptionError, match="pipeline=None"):
        fit(expected)
    models[1].pipeline = None
    expected = made()
    expected.set_weights(start)
    fit(expected)
    for a, b in zip(expected.get_weights(), found, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def devices_of_all(model):
    return {v.value.device[-1] for v in model.variables}


def test_what_another_model_has_traced_does_not_go_on_with_old_weights():
    x = keras.Input((16,))
    h = layers.Dense(12)(layers.Dense(12)(x))
    model = tfbig.Model(x, layers.Dense(4)(h))
    encoder = keras.Model(x, h)
    encoder.predict(X, verbose=0)
    model.pipeline = on_cpus()
    with pytest.raises(tf.errors.InvalidArgumentError):
        encoder.predict(X, verbose=0)
    encoder.predict_function = None
    np.testing.assert_allclose(encoder.predict(X, verbose=0), encoder(X), atol=1e-6)
    # `extend` leaves the model that it extends as it was.
    plain_model = plain(keras.Model)
    plain_model.compile("sgd", "mse")
    plain_model.fit(X, Y, verbose=0)
    tfbig.extend(plain_model, pipeline=on_cpus())
    before = plain_model.get_weights()
    plain_model.fit(X, Y, verbose=0)
    for a, b in zip(plain_model.get_weights(), before, strict=True):
        assert np.abs(a - b).max() > 0


# --- What goes from device to device ------------------------------------------------------


def sent(model, data):
    """Names of operations whose results go from one device to another, with their shapes."""
    model.train_on_batch(*(part[:16] for part in data))
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(16).repeat()
    iterator = iter(model.distribute_strategy.experimental_distribute_dataset(dataset))
    model.make_train_function(force=True)
    context.enable_run_metadata()
    try:
        model.train_function(iterator)
        metadata = context.export_run_metadata()
    finally:
        context.disable_run_metadata()
    # Tracing once more would give other names.
    program = step_function_of(model.train_function)._on_iterator
    (run,) = program._list_all_concrete_functions()
    shapes = dict(_shapes(run.graph))
    found = []
    # There are those of other calls as well, the last is that of this one.
    for partition in metadata.function_graphs[-1].partition_graphs:
        nodes = {node.name: node for node in partition.node}
        for node in partition.node:
            if node.op == "_Send":
                name = _origin(nodes, node.input[0])
                # Where a loop or a conditional was inlined, and where it was copied.
                traced = re.sub(r"/_\d+$", "", re.split(r"/_\d+/(?=\w)", name)[-1])
                found.append((name, shapes.get(traced)))
    assert found
    return found


def step_function_of(function):
    """The `StepFunction` that a train function calls, through functions of its own."""
    while not hasattr(function, "_on_iterator"):
        called = [c.cell_contents for c in function.__closure__]
        (function,) = (f for f in called if inspect.isfunction(f) or hasattr(f, "_on_iterator"))
    return function


def _shapes(graph):
    for operation in graph.get_operations():
        for i, output in enumerate(operation.outputs):
            name = operation.name if i == 0 else f"{operation.name}:{i}"
            yield name, output.shape
        if operation.type == "Placeholder":
            # As an argument of a function it has another name.
            yield operation.name.lower().replace("/", "_"), operation.outputs[0].shape
        for name in ("_body_graph", "_true_graph", "_false_graph"):
            if getattr(operation, name, None) is not None:
                yield from _shapes(getattr(operation, name))


SIGNALS = ("Loop", "NoOp", "loop_body", "_Func", "Func/", "/ctrl/", "/switch", "/pivot")


def _origin(nodes, name):
    """The operation whose result a loop, or an identity, hands on."""
    while True:
        node = nodes.get(name.split(":")[0])
        handed_on = ("Enter", "Exit", "Identity", "Merge", "NextIteration", "Switch")
        if node is None or node.op not in handed_on:
            return name
        name = node.input[0]


@in_turn(
    {
        "options": {
            "plain": {},
            "recompute": {"recompute": True},
            "scaled": {"loss_scale": "dynamic"},
            "norm": {"log_grad_norm": True},
        },
        "optimizer": ["adamw", "sgd", "muon"],
    }
)
def test_nothing_of_the_size_of_a_weight_is_sent(options, optimizer):
    check_what_is_sent(optimizer, "default", {"loss_scale": None} | options)


def test_operations_that_are_no_layers_are_computed_on_their_stage():
    pipeline = on_cpus(2)
    with pipeline.stage(0):
        x = keras.Input((3,))
        h = layers.Dense(5, "tanh")(x)
    with pipeline.stage(1):
        h = keras.ops.concatenate([h, h, h], axis=-1)
        outputs = layers.Dense(2)(h)
    model = tfbig.Model(x, outputs, gradient_accumulation_steps=2, pipeline=pipeline)
    model.compile("sgd", "mse")
    data = (np.ones((32, 3), "float32"), np.zeros((32, 2), "float32"))
    shapes = [tuple(shape) for _, shape in sent(model, data) if shape is not None and shape.rank]
    # What they receive is sent, and not what they make of it.
    assert (None, 5) in shapes
    assert (None, 15) not in shapes


def test_recomputed_layers_are_computed_again_on_their_stage():
    """Also where what comes from another stage is larger than the weight."""
    pipeline = on_cpus(2)
    with pipeline.stage(0):
        x = keras.Input((20, 3))
        h = layers.Dense(5, "tanh")(x)
    with pipeline.stage(1):
        h = layers.Dense(7, "tanh", name="again")(h)
        outputs = layers.Dense(2)(h)
    model = tfbig.Model(
        *(x, outputs),
        gradient_accumulation_steps=2,
        pipeline=pipeline,
        recompute=lambda layer: layer.name == "again",
    )
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(32, 20, 3)).astype("float32"), np.zeros((32, 20, 2), "float32"))
    shapes = [tuple(shape) for _, shape in sent(model, data) if shape is not None and shape.rank]
    assert (None, 20, 5) in shapes
    assert (5, 7) not in shapes
    assert (7,) not in shapes


@in_turn({"loss_scale": ["dynamic", None], "optimizer": ["adamw", "muon"]})
def test_replicas_send_nothing_of_the_size_of_a_weight(loss_scale, optimizer):
    # What they exchange is not sent from device to device, but by collectives.
    check_what_is_sent(optimizer, "mirrored_2", {"loss_scale": loss_scale})


def check_what_is_sent(optimizer, strategy, options):
    # Sizes that nothing else has: activations are (samples, 12).
    keras.utils.set_random_seed(1)
    pipeline = on_cpus(2, 2 if strategy == "mirrored_2" else 1, max_parameters=1000)
    with make_strategy(strategy).scope():
        x = keras.Input((16,))
        h = layers.Dense(31, "tanh", kernel_regularizer="l2")(x)
        h = layers.Dense(12, "tanh")(h)
        h = layers.Dense(37, "tanh", kernel_regularizer="l2")(h)
        model = tfbig.Model(
            *(x, layers.Dense(4)(h)),
            gradient_accumulation_steps=4,
            pipeline=pipeline,
            **options,
        )
        model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"])
    assert devices_of(model).keys() == {0, 1}
    weights = {tuple(v.shape) for v in model.variables}
    assert {(12, 37), (37,), (16, 31)} < weights
    found = sent(model, (X.astype("float32"), Y.astype("float32")))
    known = [(name, shape) for name, shape in found if shape is not None]
    # The activations between the stages are among what is found.
    assert any(shape.rank == 2 and shape[-1] in (31, 12) for _, shape in known)
    for name, shape in known:
        assert shape.rank == 0 or tuple(shape) not in weights, name
        # Nor many of them in one.
        assert shape.num_elements() is None or shape.num_elements() < 12 * 31, name
    # Without a shape are only signals of the loop.
    for name, _ in set(found) - set(known):
        assert any(part in name for part in SIGNALS), name


# --- The order of forward and backward passes ----------------------------------------------


def measured(what):
    done = job.finish(job.start([sys.executable, job.JOBS / "stages.py", what]), timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stages_are_as_busy_as_can_be():
    """Of layers that hold their device and sleep; all in one process, which takes a minute."""
    times = measured("times")
    for number, bar in (2, 1.10), (4, 1.08):
        found = times[str(number)]
        assert 1 <= found["ratio"] <= bar
        assert found["held"] == [number + 1 - i for i in range(number)]
        # A device that is ready but does not sleep yet counts as busy; that adds up to at most the
        # time by which an update exceeds the ideal.
        ideal = (number - 1) / (3 * number + number - 1)
        bubbles = found["bubbles"]
        # Other load may change some of them.
        assert any(ideal - (bar - 1) <= b <= 1 - (1 - ideal) / bar for b in bubbles), bubbles
    # With one in flight, one stage runs after the other, and half of all waits.
    assert times["one in flight"]["ratio"] >= 6 * 2 / (6 + 1)
    assert np.median(times["one in flight"]["bubbles"]) == pytest.approx(0.5, abs=0.05)
    assert times["one in flight"]["held"] == [1, 1]
    # Predictions follow one another through the stages, too: in turn, it would be 12 / 7.
    assert 1 <= times["2"]["prediction"] <= 1.3
    # TensorFlow would wait for a conditional or a loop that reads a weight, and for assertions.
    assert times["branching"]["ratio"] <= 1.10
    assert times["asserting"]["ratio"] <= 1.10
    assert times["asserting"]["failed"]
    # What it must wait for is named.
    assert times["calling"]["ratio"] >= 1.4
    (warning,) = times["warnings"]
    assert re.search(r"Received: \S*/calling_1/PyFunc \(PyFunc\)", warning)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each stage")
def test_two_stages_compute_at_the_same_time():
    """Two cores, one thread each, against one stage after the other on one."""
    found = measured("cores")
    # The bubble alone allows (16 + 1) / (2 * 16) = 0.53.
    assert found["ratio"] <= 0.65, found


# Other load on the machine changes when memory is freed, and so what a process takes.
@pytest.mark.slow
def test_memory_follows_what_is_in_flight():
    found = measured("memory")
    sizes = found["micro_batches"]
    assert max(sizes.values()) <= 1.05 * sizes["4"]
    # Of two stages, the first holds as many as are in flight, and the second one less.
    one, two, four = (found["in_flight"][n] for n in "124")
    a_micro_batch = (four - two) / (4 + 3 - 2 - 1)
    assert 11 * 2**20 <= a_micro_batch <= 17 * 2**20
    assert one < two
    assert found["recomputed"] <= 0.45 * four


def test_few_micro_batches_are_told_of(capfd):
    model = skips(tfbig.Model, pipeline=on_cpus(3), gradient_accumulation_steps=4)
    model.compile("sgd", "mse")
    model.fit(X, Y, batch_size=16, verbose=0)
    said = capfd.readouterr().err
    assert "3 stages wait for at least 33 % of the time, since an update has few" in said
    model.gradient_accumulation_steps = 6
    model.fit(X, Y, batch_size=16, verbose=0)
    assert "stages wait" not in capfd.readouterr().err


# --- Stages that are found ----------------------------------------------------------------


def parts(*sizes):
    return [stage_cut.Part([str(i)], w, p) for i, (w, p) in enumerate(sizes)]


def test_the_largest_stage_has_the_least_work():
    work = (5, 1, 1, 1, 4, 2, 2)
    found = stage_cut.cut(parts(*((w, 1) for w in work)), 3)
    assert [len(p.calls) for p in found] == [2, 3, 2]
    assert max(p.work for p in found) == min(
        max(sum(work[:i]), sum(work[i:j]), sum(work[j:]))
        for i in range(1, 6)
        for j in range(i + 1, 7)
    )
    # Of cuts with the same work, the one with the fewest parameters.
    found = stage_cut.cut(parts((3, 10), (0, 100), (3, 10)), 2)
    assert sorted(p.parameters for p in found) == [10, 110]
    found = stage_cut.cut(parts((3, 200), (0, 100), (3, 10)), 2)
    assert [p.parameters for p in found] == [200, 110]


def test_a_table_of_many_parameters_and_little_work_does_not_spoil_the_balance():
    x = keras.Input((20,), dtype="int64")
    h = layers.Embedding(10_000, 32)(x)
    for _ in range(8):
        h = layers.Dense(32)(h)
    model = keras.Model(x, layers.Dense(2)(h))
    first, _ = stage_cut.cut(stage_cut.parts_of(model), 2)
    assert len([c for c in first.calls if isinstance(c, layers.Dense)]) == 4
    # Unless it may not have so many.
    with pytest.raises(errors.InvalidOptionError, match=r"max_parameters=1000.*cannot be divided"):
        stage_cut.cut(stage_cut.parts_of(model), 2, 1000)


def test_work_is_that_of_matrix_products():
    x = keras.Input((8, 6))
    dense, attention = layers.Dense(10), layers.MultiHeadAttention(2, 4)
    convolution, recurrent = layers.Conv1D(5, 3, padding="same"), layers.LSTM(7)
    h = dense(x)
    h = convolution(attention(h, h))
    model = keras.Model(x, recurrent(h))
    calls = [dense, attention, convolution, recurrent]
    found = [
        work.floating_point_operations(model, calls)[id(call)] / products
        for call, products in zip(
            calls,
            [
                2 * 8 * 6 * 10,
                # Queries, keys, values and outputs, and twice tokens x tokens.
                2 * (4 * 8 * 10 * 8 + 2 * 2 * 8 * 8 * 4),
                2 * 8 * 3 * 10 * 5,
                2 * 8 * (5 + 7) * 4 * 7,
            ],
            strict=True,
        )
    ]
    # Biases and activations are there as well.
    assert all(1 <= ratio < 1.5 for ratio in found), found


def test_a_head_stays_with_the_table_that_it_uses():
    class Head(layers.Layer):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def call(self, h):
            return tf.matmul(h, self.table.embeddings, transpose_b=True)

    x = keras.Input((7,), dtype="int64")
    table = layers.Embedding(30, 8)
    h = table(x)
    for _ in range(4):
        h = layers.Dense(8, "tanh")(h)
    model = tfbig.Model(x, Head(table)(h), pipeline=on_cpus())
    assert stages.stage_of(model.layers[-1]) is stages.stage_of(table) is not None
    assert stages.stage_of(table).index == 0


def test_the_stages_are_told(capfd):
    tfbig.Sequential(
        [keras.Input((16,)), layers.Dense(10), layers.Dense(10), layers.Dense(10)],
        pipeline=on_cpus(),
    )
    lines = capfd.readouterr().err.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("tfbig: stages of"))
    table = [line.split() for line in lines[begin + 1 : begin + 4]]
    assert table[0] == ["stage", "layers", "parameters", "work"]
    assert table[1][0] == "0"
    assert table[1][-2] == "170"
    assert table[2][-2] == "220"
    assert sum(int(row[-1].rstrip("%")) for row in table[1:]) == 100


# --- What is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["CPU:0"], "two stages or more"),
        ("CPU:0", "must be a list"),
        (["CPU:0", 1], "a list with a device for each stage"),
        (["CPU:0", "CPU:0"], "CPU:0 twice"),
        ([("CPU:0", "CPU:1"), ("CPU:1", "CPU:2")], "CPU:1 twice"),
        ([("CPU:0", "CPU:1"), "CPU:2"], "as many devices"),
    ],
)
def test_devices_that_make_no_stages(devices, message):
    with pytest.raises(errors.InvalidOptionError, match=message):
        Pipeline(devices)


@pytest.mark.parametrize("name", ["in_flight", "max_parameters"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_numbers_that_are_none(name, value):
    with pytest.raises(errors.InvalidOptionError, match=f"`{name}` must be an integer >= 1"):
        Pipeline(["CPU:0", "CPU:1"], **{name: value})


def test_a_device_that_does_not_exist():
    with pytest.raises(errors.InvalidOptionError, match=r"'CPU:7'. There are .*CPU:3"):
        skips(tfbig.Model, pipeline=Pipeline(["CPU:0", "CPU:7"]))


def test_the_cores_of_a_tpu_are_no_stages(monkeypatch):
    monkeypatch.setattr(devices, "is_tpu", lambda strategy: True)
    with pytest.raises(errors.UnsupportedStrategyError, match="Leave `pipeline` out"):
        skips(tfbig.Model, pipeline=on_cpus())


def test_a_stage_that_does_not_exist():
    for index in (2, -1, "0"):
        with pytest.raises(errors.InvalidOptionError, match="from 0 to 1"), on_cpus().stage(index):
            pass


def test_a_pipeline_of_something_else():
    with pytest.raises(errors.InvalidOptionError, match=r"must be a tfbig\.distribute\.Pipeline"):
        skips(tfbig.Model, pipeline=["CPU:0", "CPU:1"])


def chosen(*numbers, number=2, given=True):
    """A model whose layers are on stages of these numbers."""
    pipeline = on_cpus(number)
    x = h = keras.Input((16,))
    for i in numbers:
        with contextlib.nullcontext() if i is None else pipeline.stage(i):
            h = layers.Dense(4)(h)
    return tfbig.Model(x, h, pipeline=pipeline if given else None)


def test_layers_that_do_not_make_the_stages():
    with pytest.raises(errors.InvalidOptionError, match="of which stage 1 has none"):
        chosen(0, 0)
    with pytest.raises(errors.InvalidOptionError, match=r"dense.*on no stage"):
        chosen(0, None, 1)
    model = chosen(0, 1, given=False)
    model.compile("sgd", "mse")
    with pytest.raises(errors.InvalidOptionError, match="pipeline=None"):
        model.fit(X, Y, verbose=0)
    pipeline = on_cpus()
    with pipeline.stage(0):
        layer = layers.Dense(4)
    with pytest.raises(errors.InvalidOptionError, match="of which stage 1 has none"):
        tfbig.Sequential([keras.Input((16,)), layer], pipeline=on_cpus(in_flight=5))


def test_layers_of_two_equal_pipelines():
    first, second = on_cpus(), on_cpus()
    x = keras.Input((16,))
    with first.stage(0):
        h = layers.Dense(4)(x)
    with second.stage(1):
        h = layers.Dense(4)(h)
    with pytest.raises(errors.InvalidOptionError, match="stages of another"):
        tfbig.Model(x, h, pipeline=second)


def test_weights_of_a_model_on_no_stage():
    pipeline = on_cpus()

    class Own(tfbig.Model):
        def __init__(self, **options):
            super().__init__(**options)
            with pipeline.stage(0):
                self.inner = layers.Dense(4)
            with pipeline.stage(1):
                self.scale = self.add_weight(shape=(4,))

        def call(self, x):
            return self.inner(x) * self.scale

    model = Own(pipeline=pipeline)
    model.compile("sgd", "mse")
    with pytest.raises(errors.InvalidOptionError, match="Weights of the model itself"):
        model.fit(X, Y, verbose=0)


def test_a_variable_on_two_stages():
    pipeline = on_cpus()

    class Tied(layers.Layer):
        def __init__(self, other):
            super().__init__()
            self.other = other

        def call(self, h):
            return h + tf.reduce_sum(self.other.kernel)

    x = keras.Input((16,))
    with pipeline.stage(0):
        first = layers.Dense(4)
        h = first(x)
    with pipeline.stage(1):
        tied = Tied(first)
        object.__setattr__(first, "_tfbig_stage", None)
        h = layers.Dense(4)(tied(h))
    stages.put(first, pipeline.stages[0])
    tied._trainable_variables.append(first.kernel)
    message = r"kernel on stages [01] and [01]\. Make them"
    with pytest.raises(errors.InvalidOptionError, match=message):
        tfbig.Model(x, h, pipeline=pipeline)


def test_a_seed_generator_on_two_stages():
    class Noise(layers.Layer):
        def __init__(self, generator):
            super().__init__()
            self.generator = generator

        def call(self, h):
            return h + keras.random.normal(keras.ops.shape(h), seed=self.generator)

    generator = keras.random.SeedGenerator(1)
    x = h = keras.Input((16,))
    for _ in range(2):
        h = Noise(generator)(layers.Dense(16)(h))
    message = r"on stages 0 and 1\. Give each layer a seed generator"
    with pytest.raises(errors.InvalidOptionError, match=message):
        tfbig.Model(x, h, pipeline=on_cpus())


def test_more_stages_than_layers():
    with pytest.raises(errors.InvalidOptionError, match="4 stages, and a model of 3 layer"):
        tfbig.Sequential(
            [keras.Input((16,)), *(layers.Dense(4) for _ in range(3))], pipeline=on_cpus(4)
        )


def test_a_model_whose_order_is_not_known():
    class Own(tfbig.Model):
        def build(self, shape):
            self.inner = layers.Dense(4)
            self.inner.build(shape)

        def call(self, x):
            return self.inner(x)

    model = Own(pipeline=on_cpus())
    model.compile("sgd", "mse")
    with pytest.raises(errors.UnsupportedModelError, match=r"Own.*with pipeline\.stage"):
        model.fit(X, Y, verbose=0)


def test_other_numbers_of_devices_than_of_replicas():
    with (
        make_strategy("mirrored_2").scope(),
        pytest.raises(errors.InvalidOptionError, match=r"1 device\(s\) a stage, and 2 replica"),
    ):
        skips(tfbig.Model, pipeline=on_cpus())
    with pytest.raises(errors.InvalidOptionError, match=r"2 device\(s\) a stage, and 1 replica"):
        skips(tfbig.Model, pipeline=on_cpus(2, 2))


@pytest.mark.parametrize(
    ("options", "compiled", "message"),
    [
        ({}, {"jit_compile": True}, "`jit_compile=True` does not go with `pipeline`"),
        ({}, {"run_eagerly": True}, "`run_eagerly=True` does not go with `pipeline`"),
        (
            {"shard": "optimizer"},
            {},
            "`shard='optimizer'` does not go with `pipeline`.*Use more stages or `recompute`",
        ),
        ({"micro_batch_size": "auto"}, {}, "`micro_batch_size='auto'` does not go"),
    ],
)
def test_options_that_do_not_go_with_stages(options, compiled, message):
    with pytest.raises(errors.InvalidOptionError, match=message):
        skips(tfbig.Model, pipeline=on_cpus(), **options).compile("sgd", "mse", **compiled)


def test_divided_weights_do_not_go_with_stages():
    strategy = make_strategy("mirrored_2")
    pipeline = on_cpus(2, 2)
    with (
        tfbig.distribute.sharded_weights(strategy),
        pytest.raises(errors.InvalidOptionError, match="outside of `sharded_weights`"),
        pipeline.stage(0),
    ):
        pass
    with tfbig.distribute.sharded_weights(strategy):
        x = h = keras.Input((16,))
        for _ in range(2):
            h = layers.Dense(1024)(h)
    with (
        strategy.scope(),
        pytest.raises(errors.InvalidOptionError, match="`shard='weights'` does not go"),
    ):
        tfbig.Model(x, h, pipeline=pipeline)


def test_options_of_replicas_that_do_not_go_with_stages():
    pipeline = on_cpus(2, 2)
    with (
        make_strategy("mirrored_2").scope(),
        pytest.raises(errors.InvalidOptionError, match="`exchange_dtype` does not go"),
    ):
        skips(tfbig.Model, pipeline=pipeline, exchange_dtype="bfloat16")
    with make_strategy("mirrored_2").scope():
        x = keras.Input((16,))
        h = layers.BatchNormalization(synchronized=True)(layers.Dense(4)(x))
        model = tfbig.Model(x, layers.Dense(4)(h), pipeline=on_cpus(2, 2))
        model.compile("sgd", "mse")
    with pytest.raises(errors.UnsupportedModelError, match="synchronized=True"):
        model.fit(X, Y, verbose=0)
