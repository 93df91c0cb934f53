"""`micro_batch_size="auto"`: finds what fits, goes on when memory runs out, changes no number."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests import job
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig._keras import memory
from tfbig._update import automatic_size

pytestmark = pytest.mark.usefixtures("float64")

# Another split is another order of floating-point sums.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(96, 3)), RNG.normal(size=(96, 2))


class Limited(layers.Layer):
    """Runs out of memory for more than so many samples, on one replica, when it trains.

    Attributes:
        most: int, how many samples fit.
        failures: list of the numbers of samples that did not.
    """

    def __init__(self, most, replica=1, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.most = most
        self.replica = replica
        self.failures = []

    def check(self, x, replica):
        if len(x) > self.most and replica == self.replica:
            self.failures.append(len(x))
            # TensorFlow makes a ResourceExhaustedError of it.
            raise MemoryError(f"no memory for {len(x)} samples")
        return x

    def call(self, x, training=None):
        if not training:
            return x
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        if tf.distribute.get_strategy().num_replicas_in_sync == 1:
            replica = self.replica
        checked = tf.numpy_function(self.check, [x, replica], x.dtype)
        return x + tf.stop_gradient(tf.ensure_shape(checked, x.shape) - x)


def large():
    """Layers that keep 64 KiB of a sample for the backward pass, and take as much in it."""
    return [layers.Dense(8192, "tanh"), layers.Dense(2)]


@pytest.fixture(autouse=True)
def nothing_remembered():
    automatic_size._chosen.clear()


def build(name="default", most=10**6, between=(), compile_kwargs=None, **options):
    """A model, and its layer that runs out of memory."""
    keras.utils.set_random_seed(1)
    limited = Limited(most)
    with make_strategy(name).scope():
        h = x = keras.Input((3,))
        for layer in (limited, layers.Dense(4, "tanh", name="hidden"), *between, layers.Dense(2)):
            h = layer(h)
        model = tfbig.Model(x, h, **{"micro_batch_size": "auto"} | options)
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **compile_kwargs or {})
    return model, limited


def values_of(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [getattr(v.value, "values", [v.value])[0].numpy() for v in variables]


def fit(model, **kwargs):
    kwargs = {"batch_size": 32, "epochs": 2, "shuffle": False, "verbose": 0} | kwargs
    return model.fit(X, Y, **kwargs).history


def assert_same(got, want, tolerance=TOLERANCE):
    for a, b in zip(values_of(got), values_of(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def whole(name, **kwargs):
    """The model trained with its batch as one."""
    model, _ = build(name, micro_batch_size=32, **kwargs)
    return model, fit(model)


class RunsOut(keras.callbacks.Callback):
    """From the second update on, only so many samples fit."""

    def __init__(self, limited, most):
        super().__init__()
        self.limited, self.most = limited, most

    def on_train_batch_begin(self, batch, logs=None):
        if batch > 0:
            self.limited.most = self.most


@pytest.fixture
def told(capfd):
    """What tfbig printed."""
    return lambda: [x for x in capfd.readouterr().err.splitlines() if x.startswith("tfbig:")]


names = pytest.mark.parametrize("name", ["default", "mirrored_2"])
# Of what does not depend on replicas.
one_of_names = pytest.mark.parametrize(
    "name", ["default", pytest.param("mirrored_2", marks=pytest.mark.slow)]
)


@names
def test_largest_that_fits_on_every_replica(name, told):
    model, limited = build(name, most=13)
    history = fit(model)
    # Less a tenth, and the last doubt.
    assert 10 <= model.micro_batch_size <= 13
    assert min(limited.failures) > 13
    (line,) = told()
    assert f"is {model.micro_batch_size} samples" in line
    assert max(limited.failures) <= 32 // make_strategy(name).num_replicas_in_sync
    want, want_history = whole(name)
    assert_same(model, want)
    for key, values in want_history.items():
        np.testing.assert_allclose(history[key], values, rtol=TOLERANCE)


@in_turn(
    {
        "kwargs": [{}, {"run_eagerly": True}, {"steps_per_execution": 2}],
        "name": ["mirrored_2", "default"],
    }
)
def test_memory_that_runs_out_later(name, kwargs, told):
    if kwargs.get("run_eagerly") and name != "default":
        pytest.skip("plain Keras fails with eager mirrored CPUs too")
    model, limited = build(name, compile_kwargs=kwargs)
    fit(model, callbacks=[RunsOut(limited, 3)])
    # 32 or 16 that fitted, halved until it fits again.
    assert model.micro_batch_size == 2
    assert limited.failures[-1] == 4
    assert len(told()) == (5 if name == "default" else 4)
    assert_same(model, whole(name)[0])
    assert int(model.optimizer.iterations.numpy()) == 6


def test_trying_changes_no_state():
    between = [layers.Dropout(0.5, seed=1), layers.BatchNormalization()]
    got, _ = build(most=13, between=between)
    fit(got)
    between = [layers.Dropout(0.5, seed=1), layers.BatchNormalization()]
    want, _ = build(between=between, micro_batch_size=got.micro_batch_size)
    fit(want)
    # To the bit: the same micro-batches, masks and statistics.
    assert_same(got, want, tolerance=0)


MIB = 2**20


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("default", {}),
        ("default", {"jit_compile": True}),
        pytest.param("mirrored_2", {}, marks=pytest.mark.slow),
    ],
    ids=["default", "compiled", "mirrored_2"],
)
def test_budget_on_the_cpu(name, kwargs):
    def found(budget):
        keras.utils.set_random_seed(1)
        with make_strategy(name).scope():
            layers_ = [keras.Input((3,)), *large()]
            model = tfbig.Sequential(layers_, micro_batch_size="auto", memory_budget=budget)
            model.compile("sgd", "mse", **kwargs)
        x, y = np.ones((1024, 3)), np.ones((1024, 2))
        model.fit(x, y, batch_size=1024, verbose=0)
        return model.micro_batch_size

    share = 1024 // make_strategy(name).num_replicas_in_sync
    assert found(2**33) == share
    # At least the activations and their gradients; not twice that, nor four times by XLA, of
    # what the budget leaves beside the 2 MiB of the model. What is computed at the same time
    # depends on the threads, so no closer.
    sample = 2 * 64 * 2**10
    at_most = (4 if kwargs else 2) * sample
    for budget in (16 * MIB, 48 * MIB):
        assert 0.9 * (budget - 2 * MIB) / at_most <= found(budget) <= budget / sample


def test_compiled_replicas():
    def trained(size):
        keras.utils.set_random_seed(1)
        with make_strategy("mirrored_2").scope():
            model = tfbig.Sequential([keras.Input((3,)), layers.Dense(2)], micro_batch_size=size)
            model.compile("adam", "mse", jit_compile=True)
        fit(model, epochs=1)
        return model

    # Replicas that share memory are tried one alone, while the others have no samples.
    got = trained("auto")
    assert got.micro_batch_size == 16
    assert_same(got, trained(16))


def of_sequences():
    """A model of sequences, with a budget for some hundred elements."""
    x = keras.Input((None,))
    h = layers.Reshape((-1, 1))(x)
    for layer in large():
        h = layer(h)
    model = tfbig.Model(x, h, micro_batch_size="auto", memory_budget=64 * MIB)
    model.compile("sgd", "mse")
    return model


def test_budget_and_larger_samples():
    model = of_sequences()

    def size_for(width):
        model.train_on_batch(np.ones((256, width)), np.ones((256, width, 2)))
        return model.micro_batch_size

    short = size_for(2)
    long = size_for(16)
    assert long <= short / 3
    assert size_for(2) == size_for(17) == long


def test_budget_and_few_larger_samples():
    def size_after(model, *lengths):
        samples = [(np.ones(n), np.ones((n, 2))) for n in lengths]
        specs = tf.TensorSpec((None,), tf.float64), tf.TensorSpec((None, 2), tf.float64)
        dataset = tf.data.Dataset.from_generator(lambda: iter(samples), output_signature=specs)
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(samples)))
        model.fit(dataset.padded_batch(256), verbose=0, shuffle=False)
        return model.micro_batch_size

    short, long = (size_after(of_sequences(), *[n] * 256) for n in (2, 16))
    assert long <= short / 3
    automatic_size._chosen.clear()
    model = of_sequences()
    # A last batch of two samples says of no more than two that they fit.
    assert size_after(model, *[2] * 256, 16, 16) == short
    assert size_after(model, *[16] * 256) == long
    assert size_after(of_sequences(), *[16] * 256) == long


def test_size_is_remembered(told):
    first, limited = build(most=13)
    fit(first)
    tried = len(limited.failures)
    fit(first)
    assert len(limited.failures) == tried
    assert len(told()) == 1
    second, again = build(most=13)
    fit(second)
    assert (second.micro_batch_size, again.failures) == (first.micro_batch_size, [])


@pytest.mark.parametrize("other", ["recompute", "optimizer", "precision"])
def test_size_is_not_that_of_another_computation(other):
    if other == "precision":
        # Variables of both are in float32.
        keras.config.set_dtype_policy("float32")
    first, _ = build(most=13)
    fit(first)
    options = {"recompute": ["hidden"]} if other == "recompute" else {}
    if other == "precision":
        keras.config.set_dtype_policy("mixed_bfloat16")
    second, limited = build(most=13, **options)
    if other == "optimizer":
        second.compile("sgd", "mse")
    fit(second)
    assert limited.failures


@pytest.mark.parametrize("change", ["unfreeze", "optimizer", "loss", "recompute"])
def test_size_is_found_anew_for_what_has_changed(change, told):
    model, limited = build()
    model.get_layer("hidden").trainable = change != "unfreeze"
    model.compile("sgd", "mse")
    fit(model)
    assert model.micro_batch_size == 32
    # The same again is no change.
    model.compile("sgd", "mse")
    fit(model)
    assert len(told()) == 1
    limited.most = 13
    model.get_layer("hidden").trainable = True
    if change == "recompute":
        model.recompute = ["hidden"]
    else:
        optimizer = "adam" if change == "optimizer" else "sgd"
        model.compile(optimizer, "mae" if change == "loss" else "mse")
    fit(model)
    # Not halved: 32 is not taken for granted.
    assert 10 <= model.micro_batch_size <= 13
    (line,) = told()
    assert "ran out" not in line


@pytest.mark.parametrize("first", ["train_on_batch", "fit"])
def test_larger_batch_is_tried_anew(first):
    model, limited = build(most=13)
    # `fit` wants more samples than there are.
    getattr(model, first)(X[:4], Y[:4])
    assert (model.micro_batch_size, limited.failures) == (4, [])
    fit(model)
    assert 10 <= model.micro_batch_size <= 13
    model.train_on_batch(X[:4], Y[:4])
    assert 10 <= model.micro_batch_size <= 13


@one_of_names
def test_noise_scale_needs_two_micro_batches(name):
    model, _ = build(name)
    fit(model)
    model.log_gradient_noise_scale = True
    history = fit(model)
    # Two replicas are two micro-batches.
    assert model.micro_batch_size == 16
    assert np.all(np.isfinite(history["gradient_noise_scale"]))
    if name == "default":
        sizes = []
        for samples in (9, 32, 2):
            fit(model, batch_size=samples, epochs=1)
            sizes.append(model.micro_batch_size)
        assert sizes == [5, 16, 1]
        with pytest.raises(ValueError, match="one micro-batch for a batch of 1"):
            fit(model, batch_size=1)


class Batches(keras.utils.PyDataset):
    """Three batches of 32 samples."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[32 * index : 32 * index + 32], Y[32 * index : 32 * index + 32]


def samples_as_dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y))


def generated(*sizes):
    """A dataset of a generator of batches."""
    specs = tf.TensorSpec((None, 3), tf.float64), tf.TensorSpec((None, 2), tf.float64)
    return tf.data.Dataset.from_generator(
        lambda: ((X[:n], Y[:n]) for n in sizes), output_signature=specs
    )


# What does not say before training that its batches are of 32 samples.
SILENT = {
    "map": lambda: samples_as_dataset().batch(32).map(lambda x, y: (x, y)),
    "rebatch": lambda: samples_as_dataset().batch(16).rebatch(32),
    "interleave": lambda: tf.data.Dataset.range(3).interleave(
        lambda i: samples_as_dataset().skip(32 * i).take(32).batch(32)
    ),
    "sample_from_datasets": lambda: tf.data.Dataset.sample_from_datasets(
        [samples_as_dataset().batch(32)] * 2, seed=1
    ),
    "generator.rebatch": lambda: generated(96).rebatch(32),
    "PyDataset": Batches,
}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *(("default", data) for data in SILENT),
        pytest.param("mirrored_2", "map", marks=pytest.mark.slow),
        ("mirrored_2", "rebatch"),
    ],
)
def test_batches_tell_their_size(name, data):
    arguments = {"steps_per_epoch": 3, "verbose": 0, "shuffle": False}
    got, limited = build(name, most=13)
    got.fit(SILENT[data](), **arguments)
    assert 10 <= got.micro_batch_size <= 13
    assert 13 < min(limited.failures) <= max(limited.failures) <= 32
    want, _ = build(name, micro_batch_size=8)
    want.fit(SILENT[data](), **arguments)
    assert_same(got, want)


def test_batches_that_become_larger():
    model, _ = build(most=13)
    sizes = []
    sees = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: sizes.append(model.micro_batch_size)
    )
    dataset = tf.data.Dataset.from_tensor_slices(np.int64([4, 2, 8, 32, 8]))
    dataset = dataset.flat_map(lambda n: samples_as_dataset().take(n).batch(n))
    arguments = {"steps_per_epoch": 5, "verbose": 0, "shuffle": False}
    model.fit(dataset, callbacks=[sees], **arguments)
    assert sizes[:3] == [4, 4, 8]
    assert 10 <= sizes[3] == sizes[4] <= 13
    want, _ = build(micro_batch_size=8)
    want.fit(dataset, **arguments)
    assert_same(model, want)


def test_evaluation_takes_no_more_samples_at_a_time():
    sizes = []

    class Sees(layers.Layer):
        def see(self, x):
            sizes.append(len(x))
            return x

        def call(self, x):
            seen = tf.numpy_function(self.see, [x], x.dtype)
            return tf.ensure_shape(seen, x.shape)

    def largest_of_evaluation(model):
        sizes.clear()
        model.evaluate(X, Y, batch_size=48, verbose=0)
        return max(sizes)

    x = keras.Input((3,))
    h = layers.Dense(2)(Sees()(Limited(13)(x)))
    model = tfbig.Model(x, h, micro_batch_size="auto")
    model.compile("sgd", "mse")
    assert largest_of_evaluation(model) == 48
    fit(model)
    assert largest_of_evaluation(model) == model.micro_batch_size < 48


@one_of_names
def test_masks_and_loss_scale(name):
    def make(**options):
        keras.utils.set_random_seed(1)
        limited = Limited(5)
        with make_strategy(name).scope():
            x = keras.Input((5, 3))
            h = limited(layers.Masking()(x))
            h = layers.SimpleRNN(3, return_sequences=True)(h)
            model = tfbig.Model(x, layers.Dense(2)(h), loss_scale=64.0, **options)
            model.compile("adam", "mse")
        return model

    x = RNG.normal(size=(37, 5, 3)) * (RNG.uniform(size=(37, 5, 1)) > 0.4)
    y = RNG.normal(size=(37, 5, 2))
    got, want = make(micro_batch_size="auto"), make(micro_batch_size=2)
    for model in (got, want):
        model.fit(x, y, batch_size=16, verbose=0, shuffle=False)
    assert got.micro_batch_size > 2
    assert_same(got, want)


def test_option_is_kept():
    config = tfbig.extend(keras.Sequential([keras.Input((3,)), layers.Dense(1)])).get_config()
    assert config["micro_batch_size"] is None
    small = tfbig.Sequential(
        [keras.Input((3,)), layers.Dense(1)], micro_batch_size="auto", memory_budget=2**30
    )
    small.compile("sgd", "mse")
    small.fit(X, Y, verbose=0)
    assert small.micro_batch_size == 32
    for copy in (type(small).from_config(small.get_config()), keras.models.clone_model(small)):
        assert copy.get_config()["micro_batch_size"] == "auto"
        assert (copy.micro_batch_size, copy.gradient_accumulation_steps) == (None, None)
        assert copy.memory_budget == 2**30
    small.gradient_accumulation_steps = 2
    small.memory_budget = None
    small.fit(X, Y, verbose=0)
    assert (small.micro_batch_size, small.gradient_accumulation_steps) == (None, 2)


# --- Bad input -----------------------------------------------------------------


def test_one_sample_that_does_not_fit():
    model, _ = build(most=0)
    with pytest.raises(MemoryError, match=r"one sample does not fit.*no memory for 1.*recompute"):
        fit(model)
    model, limited = build()
    with pytest.raises(tfbig.errors.OutOfMemoryError, match="one sample does not fit"):
        fit(model, callbacks=[RunsOut(limited, 0)])


def test_budget_for_less_than_one_sample():
    # 64 times 64 KiB.
    between = [layers.RepeatVector(64), *large(), layers.GlobalAveragePooling1D()]
    model, _ = build(between=between, memory_budget=3 * MIB)
    with pytest.raises(
        tfbig.errors.OutOfMemoryError, match=r"one sample does not fit.*MiB are missing"
    ):
        fit(model)


def test_budget_for_less_than_the_model():
    model, _ = build(memory_budget=100)
    with pytest.raises(
        tfbig.errors.OutOfMemoryError, match=r"must hold the model itself.*memory_budget=100"
    ):
        fit(model)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "8GB", True])
def test_budget_that_is_none(budget):
    with pytest.raises(ValueError, match=r"`memory_budget` must be an integer >= 1"):
        build(memory_budget=budget)


def test_budget_without_auto():
    model, _ = build(memory_budget=2**30, micro_batch_size=4)
    with pytest.raises(ValueError, match="memory_budget=1073741824 with micro_batch_size=4"):
        fit(model)


@pytest.mark.parametrize(
    "data",
    [
        lambda: generated(96),
        lambda: generated(96).map(lambda x, y: (x, y)).prefetch(1),
        lambda: (batch for batch in [(X, Y)]),
    ],
    ids=["dataset", "map", "generator"],
)
def test_unknown_batch_size(data):
    model, _ = build()
    with pytest.raises(
        ValueError, match=r"needs a batch size that is known.*a generator.*\.rebatch\(n\)"
    ):
        model.fit(data(), verbose=0, shuffle=False)


def test_train_step_of_the_user():
    class Own(tfbig.Model):
        def train_step(self, data):
            return super().train_step(data)

    x = keras.Input((3,))
    model = Own(x, layers.Dense(2)(x), micro_batch_size="auto")
    model.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="Own with a `train_step`"):
        fit(model)


def test_memory_that_runs_out_in_the_optimizer():
    class Fails(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            def fail(g):
                raise MemoryError("no memory for moments")

            gradient = tf.ensure_shape(
                tf.numpy_function(fail, [gradient], gradient.dtype), gradient.shape
            )
            super().update_step(gradient, variable, learning_rate)

    model, _ = build()
    model.compile(Fails(), "mse")
    with pytest.raises(tfbig.errors.OutOfMemoryError, match="while the optimizer was applied"):
        fit(model)


def test_other_errors_are_not_taken_for_it():
    model, limited = build()

    def fail(x, replica):
        raise ValueError("of another kind")

    limited.check = fail
    with pytest.raises(tf.errors.InvalidArgumentError, match="of another kind"):
        fit(model)


def test_meter_sees_what_is_taken():
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.meter"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    large, small, on_two = (int(line) for line in done.stdout.split())
    assert 64 * MIB <= large < 65 * MIB
    assert 4 * MIB <= small < 5 * MIB
    # All CPU devices have one allocator.
    assert 64 * MIB <= on_two < 65 * MIB
    assert memory.available() > MIB
    assert memory.readable(1536 * MIB) == "1.50 GiB"


def test_memory_that_is_not_counted(monkeypatch):
    def missing(device):
        raise ValueError(f"Allocator stats not available for device '{device}'")

    monkeypatch.setattr(memory, "_info", missing)
    model, _ = build()
    with pytest.raises(ValueError, match=r"needs memory to be counted.*oneDNN"):
        fit(model)


def test_workers_of_which_one_runs_out(tmp_path):
    done = job.run("automatic", tmp_path)
    assert done.returncode == 0, done.stderr
    chief, other = job.results(tmp_path)
    assert other == chief
    first, *rest = chief["sizes"]
    assert 10 <= first <= 13
    assert max(rest) <= 3
    assert chief["deviation"] < TOLERANCE
    # The chief alone says it.
    assert done.stderr.count("micro_batch_size='auto' is") == 1
    assert "memory ran out" in done.stderr
