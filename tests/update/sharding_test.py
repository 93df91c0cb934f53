"""`shard`: where the state lies changes no number, and each replica has a share of it."""

import contextlib
import functools
import gc
import math
import random
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import errors
from tfbig._keras.sharded_variable import ShardedVariable, ShardedWeight
from tfbig._update import sharded_state
from tfbig.distribute import _sharded_weights

TOLERANCE = 1e-10
STRATEGIES = ("mirrored_2", "mirrored_4")
SHARDS = ("optimizer", "weights")
both = pytest.mark.parametrize("shard", SHARDS)
# Divided weights come with divided state.
weights_first = pytest.mark.parametrize(
    "shard", ["weights", pytest.param("optimizer", marks=pytest.mark.slow)]
)

optimizer_first = pytest.mark.parametrize(
    "shard", ["optimizer", pytest.param("weights", marks=pytest.mark.slow)]
)

pytestmark = [
    # The tied layer has a weight on which the loss does not depend.
    pytest.mark.filterwarnings("ignore:Gradients do not exist"),
    # A replica's share of the last batch.
    pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger"),
]

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=0.1),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.02, 0.01, 0.005]),
        weight_decay=0.02,
        use_ema=True,
        ema_momentum=0.9,
        global_clipnorm=0.2,
    ),
    "overwriting": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, clipvalue=0.02, centered=True, momentum=0.9),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "lion": lambda: keras.optimizers.Lion(0.01, weight_decay=0.1),
    "muon": lambda: keras.optimizers.Muon(0.01, weight_decay=0.1),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
}
# Each with another number of micro-batches and other options.
OPTIONS = {
    "sgd": {"gradient_accumulation_steps": 8, "exchange_bucket_bytes": 100},
    "momentum": {"gradient_accumulation_steps": 3, "log_grad_norm": True},
    "adam": {"gradient_accumulation_steps": 1},
    "adamw": {"micro_batch_size": 3, "loss_scale": 64.0},
    "overwriting": {"gradient_accumulation_steps": 3},
    "lamb": {"gradient_accumulation_steps": 8, "recompute": True},
    "muon": {"micro_batch_size": 2},
}


@pytest.fixture(autouse=True)
def small_weights_are_divided(monkeypatch):
    """Those of these models are smaller than what is divided else."""
    monkeypatch.setattr(_sharded_weights, "SMALLEST", 1)


class Tied(layers.Layer):
    """Scores of tokens by the table that embeds them; the loss depends on no `unused`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(7, 4, mask_zero=True)

    def build(self, shape):
        self.table.build(shape)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")

    def call(self, tokens):
        h = self.table(tokens)
        # A position table: rows that do not depend on the batch.
        return keras.ops.matmul(h * self.scale, keras.ops.transpose(self.table.embeddings))

    def compute_mask(self, tokens, mask=None):
        return self.table.compute_mask(tokens)


def graph():
    x, tokens = keras.Input((3,), name="x"), keras.Input((5,), dtype="int32", name="tokens")
    # As many rows as make whole rows of each replica's piece.
    large = layers.Flatten()(layers.Embedding(80, 2)(tokens))
    scores = Tied(name="tied")(tokens)
    shared = layers.Dense(4, "tanh", name="shared")
    h = layers.Dense(4, "tanh")(layers.Concatenate()([x, large]))
    h = layers.LayerNormalization()(shared(shared(h)))
    frozen = layers.Dense(4, name="frozen", trainable=False)
    outputs = {"h": layers.Dense(2, name="h")(frozen(h)), "tied": scores}
    return {"x": x, "tokens": tokens}, outputs


def data(samples=37):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, (samples, 5))
    x = {"x": rng.normal(size=(samples, 3)), "tokens": tokens}
    y = {"h": rng.normal(size=(samples, 2)), "tied": tokens}
    weights = {"h": rng.uniform(0.2, 2, samples), "tied": rng.uniform(0.2, 2, (samples, 5))}
    return x, y, weights


def compile_model(model, optimizer, **arguments):
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        OPTIMIZERS[optimizer](),
        {"h": "mse", "tied": crossentropy},
        loss_weights={"h": 1.0, "tied": 0.5},
        **arguments,
    )


def fit(model, epochs=2, **arguments):
    x, y, weights = data()
    return model.fit(
        x, y, sample_weight=weights, batch_size=10, epochs=epochs, shuffle=False, verbose=0,
        **arguments,
    ).history  # fmt: skip


def state(model):
    """Weights, and the optimizer's state as it is saved."""
    store = {}
    model.optimizer.save_own_variables(store)
    return [*model.get_weights(), *store.values()]


@functools.cache
def initial_weights():
    keras.utils.set_random_seed(3)
    return keras.Model(*graph()).get_weights()


@functools.cache
def plain(optimizer):
    """State and history of plain Keras on one device."""
    model = keras.Model(*graph())
    model.set_weights(initial_weights())
    compile_model(model, optimizer)
    return fit(model), state(model)


def sharded(strategy, optimizer, arguments=None, **options):
    with make_strategy(strategy).scope():
        model = tfbig.Model(
            *graph(), **{"shard": "optimizer"} | OPTIONS.get(optimizer, {}) | options
        )
        model.set_weights(initial_weights())
        compile_model(model, optimizer, **arguments or {})
    assert_divided(model)
    return model


def assert_divided(model):
    """All numbers would be the same without it."""
    assert sharded_state.is_divided(model.optimizer)
    if model.shard == "weights":
        divided = [v for v in model.weights if isinstance(v, ShardedWeight)]
        # Frozen layers too.
        assert len(divided) == sum(len(x._trainable_variables) for x in model._flatten_layers())


def assert_equal(model, optimizer, history=None):
    expected_history, expected = plain(optimizer)
    for a, b in zip(state(model), expected, strict=True):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    for name, values in expected_history.items() if history else ():
        np.testing.assert_allclose(history[name], values, rtol=0, atol=TOLERANCE)


# They keep the same kinds of state, and divide it in the same way.
LIKE_ADAM = ("nadam", "rmsprop", "adagrad", "lion")


# In the ordinary run, an optimizer meets one option on two replicas, and the other on four.
@pytest.mark.parametrize(
    ("strategy", "optimizer", "shard"),
    [
        pytest.param(
            *(strategy, optimizer, shard),
            marks=[] if (i + j + k) % 2 and optimizer not in LIKE_ADAM else [pytest.mark.slow],
        )
        for i, strategy in enumerate(STRATEGIES)
        for j, optimizer in enumerate(OPTIMIZERS)
        for k, shard in enumerate(SHARDS)
    ],
)
def test_it_trains_as_plain_keras_on_one_device(strategy, optimizer, shard, float64):
    plain(optimizer)
    model = sharded(strategy, optimizer, shard=shard)
    history = fit(model)
    assert_equal(model, optimizer, history)
    evaluated = model.evaluate(*data()[:2], batch_size=10, verbose=0, return_dict=True)
    assert evaluated["loss"] < 10


@pytest.mark.parametrize(
    ("arguments", "shard"),
    [
        ({"steps_per_execution": 3}, "optimizer"),
        ({"run_eagerly": True}, "optimizer"),
        ({"steps_per_execution": 3}, "weights"),
    ],
    ids=["steps_per_execution", "run_eagerly", "steps_per_execution, weights"],
)
def test_it_trains_the_same_in_other_modes(arguments, shard, float64):
    plain("adam")
    model = sharded("mirrored_2", "adam", arguments, shard=shard)
    history = fit(model)
    assert_equal(model, "adam", history)


def held(variables, replica):
    """Bytes of variables on a replica, without scalars."""
    total = 0
    for v in variables:
        if isinstance(v, ShardedVariable):
            part = v.pieces.get(replica)
            total += 0 if part is None else math.prod(part.shape) * part.dtype.size
        elif len(v.shape):
            total += math.prod(v.shape) * tf.as_dtype(v.dtype).size
    return total


@pytest.mark.parametrize(
    ("optimizer", "slack"),
    # Whole variables are balanced as far as their sizes allow.
    [("adam", 1.01), ("muon", 1.1)],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_replica_has_its_share_of_the_state(strategy, optimizer, slack):
    strategy = make_strategy(strategy)
    number = strategy.num_replicas_in_sync
    with strategy.scope():
        model = tfbig.Sequential(
            [keras.Input((64,)), *(layers.Dense(64) for _ in range(8))], shard="optimizer"
        )
        model.compile(OPTIMIZERS[optimizer](), "mse")
    model.optimizer.build(model.trainable_variables)
    slots = [v for v in model.optimizer.variables if len(v.shape)]
    whole = sum(math.prod(v.shape) * 4 for v in slots)
    shares = [held(model.optimizer.variables, r) for r in range(number)]
    assert sum(shares) == whole
    assert max(shares) <= whole / number * slack


def test_the_monitor_shows_what_a_replica_holds(tmp_path):
    def shown(shard):
        with make_strategy("mirrored_2").scope():
            model = tfbig.Sequential([keras.Input((64,)), layers.Dense(512)], shard=shard)
            model.compile("adam", "mse")
        monitor = tfbig.callbacks.TrainingMonitor(tmp_path / str(shard), plot=False)
        model.fit(np.ones((4, 64)), np.ones((4, 512)), verbose=0, callbacks=[monitor])
        return monitor.rows[-1]["state_mib"] * 2**20 / model.count_params()

    # 4 bytes of weights, 8 of Adam's state, and a few of counters.
    assert shown(None) == pytest.approx(12, abs=0.01)
    assert shown("optimizer") == pytest.approx(8, abs=0.01)
    assert shown("weights") == pytest.approx(6, abs=0.01)


@in_turn({"optimizer": ["overwriting", "muon"], "shard": list(SHARDS)})
def test_a_value_that_is_not_finite_on_one_replica_is_skipped_by_all(optimizer, shard):
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential(
            [keras.Input((3,)), layers.Dense(4), layers.Dense(1)],
            shard=shard,
            loss_scale=8.0,
        )
        model.compile(OPTIMIZERS[optimizer](), "mse")
    x, y = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")
    model.train_on_batch(x, y)
    before = state(model)
    x[5] = np.inf
    model.train_on_batch(x, y)
    assert model.skipped_updates == 1
    for a, b in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    if shard == "optimizer":
        for first, second in [v.value.values for v in model.trainable_variables]:
            np.testing.assert_array_equal(first, second)


def test_half_precision_is_exchanged_as_without_it(float64):
    def trained(shard):
        with make_strategy("mirrored_2").scope():
            model = tfbig.Model(*graph(), shard=shard, exchange_dtype="bfloat16")
            model.set_weights(initial_weights())
            compile_model(model, "sgd")
        fit(model)
        return model.get_weights()

    for a, b, start in zip(trained("optimizer"), trained(None), initial_weights(), strict=True):
        # Both round to three digits, the sum of two once more or less.
        np.testing.assert_allclose(a, b, rtol=0, atol=0.01 * np.abs(b - start).max() + 1e-12)


def test_an_overflow_of_half_precision_raises():
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential(
            [keras.Input((1,)), layers.Dense(1)], shard="optimizer", exchange_dtype="float16"
        )
        model.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.GradientOverflowError):
        model.fit(np.full((4, 1), 1e6), np.ones((4, 1)), batch_size=4, verbose=0)


def assert_trains_as_plain(train, shard):
    """Compares a training on two replicas with one of plain Keras.

    Args:
        train: Function of a class of models and options that returns a trained model.
        shard: The option.
    """
    expected = train(keras.Sequential)
    with make_strategy("mirrored_2").scope():
        found = train(tfbig.Sequential, shard=shard, gradient_accumulation_steps=2)
    assert_divided(found)
    for a, b in zip(state(found), state(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def assert_small_model_trains_as_plain(between, optimizer, shard):
    """Compares a model of three inputs and two outputs with plain Keras, weights and state.

    Args:
        between: Function that returns its layers.
        optimizer: Function that returns its optimizer.
        shard: The option.
    """

    def train(base, **options):
        keras.utils.set_random_seed(2)
        model = base([keras.Input((3,)), *between()], **options)
        model.compile(optimizer(), "mse")
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
        model.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
        return model

    assert_trains_as_plain(train, shard)


@weights_first
def test_a_constraint_looks_at_the_whole_variable(shard, float64):
    def constrained():
        constraint = keras.constraints.MaxNorm(0.5, axis=0)
        return layers.Dense(6, kernel_constraint=constraint), layers.Dense(2)

    assert_small_model_trains_as_plain(constrained, OPTIMIZERS["adam"], shard)


@weights_first
def test_a_constraint_may_come_and_go_between_trainings(shard, float64):
    def train(base, **options):
        keras.utils.set_random_seed(2)
        model = base([keras.Input((3,)), layers.Dense(6), layers.Dense(2)], **options)
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
        for constraint in (None, keras.constraints.MaxNorm(0.5), None):
            model.layers[0].kernel.constraint = constraint
            model.compile(model.optimizer if model.compiled else OPTIMIZERS["adam"](), "mse")
            model.fit(x, y, batch_size=10, shuffle=False, verbose=0)
        return model

    assert_trains_as_plain(train, shard)


class Elementless(layers.Layer):
    """Weights of no elements, one of many rows."""

    def build(self, shape):
        self.none = [self.add_weight(shape=shape) for shape in ((64, 0), (0,), (0, 4))]

    def call(self, x):
        return x + sum(map(keras.ops.sum, self.none))


def test_a_weight_may_have_no_elements(float64):
    assert_small_model_trains_as_plain(
        lambda: [Elementless(), layers.Dense(2)], OPTIMIZERS["adam"], "optimizer"
    )


class Overwriting(layers.Layer):
    """A weight whose gradient is its new value, as those of float8 quantization."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 2), initializer="ones", name="kernel")
        self.history = self.add_weight(shape=(7,), initializer="ones", name="history")
        self.history.overwrite_with_gradient = True

    def call(self, x):
        return keras.ops.matmul(x, self.kernel) * keras.ops.mean(self.history)


@both
def test_a_weight_whose_gradient_is_its_value_is_whole(shard, float64):
    assert_small_model_trains_as_plain(lambda: [Overwriting()], OPTIMIZERS["adam"], shard)


@pytest.mark.parametrize(
    ("swaps_on_epoch", "shard"), [(False, "optimizer"), (True, "optimizer"), (True, "weights")]
)
def test_keras_swaps_weights_and_averages(swaps_on_epoch, shard, float64):
    def train(base, **options):
        keras.utils.set_random_seed(2)
        model = base([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)], **options)
        model.compile(keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5), "mse")
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
        history = model.fit(
            x, y, batch_size=10, epochs=3, shuffle=False, verbose=0, validation_data=(x, y),
            callbacks=[keras.callbacks.SwapEMAWeights(swaps_on_epoch)],
        ).history  # fmt: skip
        return [*state(model), history["val_loss"]]

    expected = train(keras.Sequential)
    with make_strategy("mirrored_2").scope():
        found = train(tfbig.Sequential, shard=shard)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("frequency", "shard"), [(None, "optimizer"), (3, "optimizer"), (3, "weights")]
)
def test_an_update_of_some_weights_averages_all(frequency, shard, float64):
    class Plain(keras.Sequential):
        def train_step(self, data):
            x, y = data
            for layer in self.layers:
                weights = layer.trainable_variables
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(self(x) - y))
                gradients = tape.gradient(loss, weights)
                self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
            return {"loss": loss}

    class Divided(tfbig.Sequential):
        def train_step(self, data):
            def loss(part):
                return tf.reduce_mean(tf.square(self(part[0]) - part[1]))

            for layer in self.layers:
                gradients = tfbig.accumulate_gradients(
                    loss, layer.trainable_variables, data, gradient_accumulation_steps=2
                )
                update = tfbig.apply_gradients(self.optimizer, gradients)
            return {"loss": update.loss}

    def train(base, **options):
        keras.utils.set_random_seed(2)
        model = base([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)], **options)
        model.compile(
            keras.optimizers.SGD(
                0.1, momentum=0.9, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=frequency
            )
        )
        model.optimizer.build(model.trainable_variables)
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
        model.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
        return state(model)

    expected = train(Plain)
    with make_strategy("mirrored_2").scope():
        found = train(Divided, shard=shard, gradient_accumulation_steps=2)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_check_equivalence_compares_with_an_optimizer_that_is_not_divided(float64):
    expected = plain("adam")[1]
    model = sharded("mirrored_2", "adam")
    fit(model, epochs=1)
    before = state(model)
    batch = keras.tree.map_structure(lambda v: v[:7], data())
    report = tfbig.check_equivalence(model, *batch)
    assert report.is_equivalent, report
    for a, b in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(isinstance(v, ShardedVariable) for v in model.optimizer.variables)
    fit(model, epochs=1)
    for a, b in zip(state(model), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("is_later", [False, True])
def test_what_is_excluded_from_weight_decay_stays_excluded(is_later, float64):
    def train(cls, **options):
        keras.utils.set_random_seed(2)
        dense = [layers.Dense(4, name=f"dense_{i}") for i in range(4)]
        model = cls([keras.Input((3,)), *dense], **{} if is_later else options)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.5)
        excluded = {"var_list": [dense[3].kernel, dense[0].bias], "var_names": ["dense_2/kernel"]}
        optimizer.exclude_from_weight_decay(**excluded)
        if is_later:
            # The model does not know the optimizer yet.
            for name, value in options.items():
                setattr(model, name, value)
        model.compile(optimizer, "mse")
        model.fit(np.ones((20, 3)), np.ones((20, 4)), batch_size=10, verbose=0)
        model.shard = None
        model.fit(np.ones((20, 3)), np.ones((20, 4)), batch_size=10, verbose=0)
        return state(model)

    expected = train(keras.Sequential)
    with make_strategy("mirrored_2").scope():
        found = train(tfbig.Sequential, shard="weights")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


# --- Files, and state that is divided or put together later ------------------------


@weights_first
def test_a_checkpoint_waits_for_state_that_is_divided(shard, float64, tmp_path):
    expected = plain("adam")[1]
    model = keras.Model(*graph())
    model.set_weights(initial_weights())
    compile_model(model, "adam")
    fit(model, epochs=1)
    tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    again = sharded("mirrored_2", "adam", shard=shard)
    tf.train.Checkpoint(model=again).read(str(tmp_path / "checkpoint")).expect_partial()
    fit(again, epochs=1)
    for a, b in zip(state(again), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@weights_first
def test_files_are_those_of_a_model_that_is_not_divided(shard, float64, tmp_path):
    expected = plain("adam")[1]
    model = sharded("mirrored_2", "adam", shard=shard)
    fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))

    def loaded_from_keras(scope):
        with scope:
            return keras.models.load_model(tmp_path / "model.keras", custom_objects={"Tied": Tied})

    def restored(base, **options):
        other = base(*graph(), **options)
        compile_model(other, "adam")
        other.optimizer.build(other.trainable_variables)
        return other

    one = loaded_from_keras(contextlib.nullcontext())
    two = loaded_from_keras(make_strategy("mirrored_2").scope())
    twin = restored(keras.Model)
    twin.load_weights(tmp_path / "model.weights.h5")
    with make_strategy("mirrored_2").scope():
        again = restored(tfbig.Model, shard=shard)
    tf.train.Checkpoint(model=again).read(str(tmp_path / "checkpoint")).expect_partial()
    assert isinstance(two.optimizer.variables[2], ShardedVariable)
    for other in (one, two, twin, again, model):
        fit(other, epochs=1)
        for a, b in zip(state(other), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@optimizer_first
def test_state_is_divided_and_put_together_in_the_course_of_training(shard, float64):
    expected = plain("lamb")[1]
    with make_strategy("mirrored_2").scope():
        model = tfbig.Model(*graph(), gradient_accumulation_steps=2)
        model.set_weights(initial_weights())
        compile_model(model, "lamb")
    fit(model, epochs=1, callbacks=[Sharding({2: shard})])
    assert_divided(model)
    model.shard = None
    variables = [*model.variables, *model.optimizer.variables]
    assert not any(isinstance(v, ShardedVariable) for v in variables)
    fit(model, epochs=1)
    for a, b in zip(state(model), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_a_saved_model_has_the_whole_state(tmp_path):
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((3,)), layers.Dense(4)], shard="optimizer")
        model.compile("adam", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 4)), verbose=0)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    saved = tf.train.load_checkpoint(str(tmp_path / "saved" / "variables" / "variables"))
    values = [saved.get_tensor(name) for name in saved.get_variable_to_shape_map()]
    for variable in model.optimizer.variables:
        if isinstance(variable, ShardedVariable):
            assert any(np.array_equal(variable.numpy(), value) for value in values)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert loaded is not None


def test_state_that_is_put_together_leaves_no_pieces():
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((3,)), layers.Dense(4)], shard="optimizer")
        model.compile("adam", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 4)), verbose=0)
    pieces = [
        weakref.ref(piece)
        for v in model.optimizer.variables
        if isinstance(v, ShardedVariable)
        for piece in v.pieces.values()
    ]
    assert len(pieces) == 8
    model.shard = None
    model.train_function = None
    gc.unfreeze()
    gc.collect()
    assert not any(piece() is not None for piece in pieces)


class Sharding(keras.callbacks.Callback):
    """Sets `shard` after some updates."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def on_train_batch_end(self, batch, logs=None):
        if batch in self.schedule:
            self.model.shard = self.schedule[batch]
            self.model.train_function = None
            self.model.make_train_function()


# --- Bad input -----------------------------------------------------------------------


def test_it_can_be_set_before_compile():
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((2,)), layers.Dense(1)], shard="optimizer")
        model.shard = None
        model.compile("adam", "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert not any(isinstance(v, ShardedVariable) for v in model.optimizer.variables)


def test_values_are_checked():
    with pytest.raises(tfbig.errors.InvalidOptionError, match="shard='optimiser'"):
        tfbig.Sequential([layers.Dense(1)], shard="optimiser")


def test_one_replica_has_nothing_to_divide(caplog):
    model = tfbig.Sequential([keras.Input((2,)), layers.Dense(1)], shard="optimizer")
    with caplog.at_level("INFO", "tfbig"):
        model.compile("adam", "mse")
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert [r.message for r in caplog.records if "nothing to divide" in r.message]
    assert not any(isinstance(v, ShardedVariable) for v in model.optimizer.variables)


def test_the_log_says_how_it_is_divided(caplog):
    with caplog.at_level("INFO", "tfbig"), make_strategy("mirrored_2").scope():
        for optimizer in ("adam", "muon"):
            model = tfbig.Sequential([keras.Input((2,)), layers.Dense(1)], shard="optimizer")
            model.compile(optimizer, "mse")
            model.optimizer.build(model.trainable_variables)
    messages = [r.message for r in caplog.records]
    assert len(messages) == 2
    assert "equal chunks" in messages[0]
    assert "Muon looks at whole variables" in messages[1]


def test_an_optimizer_that_copies_variables_is_refused():
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((2,)), layers.Dense(1)], shard="optimizer")
        model.compile(keras.optimizers.ScheduleFreeAdamW(), "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    for _ in range(2):
        with pytest.raises(tfbig.errors.InvalidOptionError, match=r"ScheduleFreeAdamW.*copies"):
            model.fit(x, y, verbose=0)
    # The optimizer is as it was.
    model.shard = None
    model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 1


class OwnClipping(keras.optimizers.SGD):
    def _clip_gradients(self, gradients):
        return [0 * g for g in gradients]


class OwnUpdate(keras.optimizers.SGD):
    """Looks at the gradients of all weights."""

    def _backend_update_step(self, gradients, variables, learning_rate):
        norm = keras.ops.sqrt(sum(keras.ops.sum(keras.ops.square(g)) for g in gradients))
        gradients = [g / norm for g in gradients]
        super()._backend_update_step(gradients, variables, learning_rate)


class OwnDecay(keras.optimizers.SGD):
    """Looks at all weights."""

    def _apply_weight_decay(self, variables):
        norm = sum(keras.ops.sum(keras.ops.square(v)) for v in variables)
        for variable in variables:
            self.assign_sub(variable, 0.1 * norm * variable)


class AddingUp(keras.optimizers.SGD):
    """What it adds up over the weights would be another number on each replica."""

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.total = self.add_variable((), name="total")

    def update_step(self, gradient, variable, learning_rate):
        self.assign_add(self.total, keras.ops.sum(keras.ops.square(gradient)))
        self.assign_sub(variable, learning_rate * gradient / self.total)


class InDictionary(keras.optimizers.SGD):
    """Keeps its state by the index of the weight."""

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.means = {
                self._get_variable_index(v): self.add_variable_from_reference(v, "mean")
                for v in variables
            }

    def update_step(self, gradient, variable, learning_rate):
        mean = self.means[self._get_variable_index(variable)]
        self.assign(mean, 0.9 * mean + gradient)
        self.assign_sub(variable, learning_rate * mean)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (OwnUpdate, r"OwnUpdate.*_backend_update_step"),
        (OwnDecay, r"OwnDecay.*_apply_weight_decay"),
        (AddingUp, r"AddingUp.*assigns adding_up\S*/total"),
        (InDictionary, r"InDictionary.*kernel_mean is in none"),
    ],
)
def test_an_optimizer_that_looks_beyond_a_weight_is_refused(optimizer, message):
    def train(shard):
        with make_strategy("mirrored_2").scope():
            model = tfbig.Sequential([keras.Input((2,)), layers.Dense(1)])
            model.shard = shard
            model.compile(optimizer(0.1), "mse")
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
        return model

    with pytest.raises(tfbig.errors.InvalidOptionError, match=message):
        train("optimizer")
    model = train(None)

    def divide_and_train():
        model.shard = "optimizer"
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)

    with pytest.raises(tfbig.errors.InvalidOptionError, match=message):
        divide_and_train()


def test_an_optimizer_is_built_and_divided_where_it_is_first_applied(float64):
    class Model(tfbig.Sequential):
        def train_step(self, data):
            gradients = tfbig.accumulate_gradients(
                lambda part: tf.reduce_mean(tf.square(self(part[0]) - part[1])),
                self.trainable_variables,
                data,
                gradient_accumulation_steps=1,
            )
            return {"loss": tfbig.apply_gradients(self.second, gradients).loss}

    def made(cls, **options):
        model = cls([keras.Input((2,)), layers.Dense(1, kernel_initializer="ones")], **options)
        return model, keras.optimizers.Adam(0.1)

    x = np.arange(8.0).reshape(4, 2)
    plain, optimizer = made(keras.Sequential)
    plain.compile(optimizer, "mse")
    with make_strategy("mirrored_2").scope():
        model, model_optimizer = made(Model, shard="optimizer")
        model.compile("sgd")
        model.second = model_optimizer
    for each in (plain, model):
        each.fit(x, np.ones((4, 1)), epochs=3, verbose=0)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


class Duel(tfbig.Model):
    """Two networks, each with an optimizer of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.networks = [layers.Dense(3, "tanh"), layers.Dense(3, "tanh")]
        for network in self.networks:
            network.build((None, 3))

    def call(self, x):
        return self.networks[0](x)

    def compile_both(self, optimizers):
        self.compile(optimizers[0])
        self.second = optimizers[1]
        for optimizer, network in zip(optimizers, self.networks, strict=True):
            optimizer.build(network.trainable_variables)

    def train_step(self, data):
        losses = {}
        for i, optimizer in enumerate(self.applied()):
            accumulated = tfbig.accumulate_gradients(
                lambda x, i=i: (
                    tf.reduce_mean((self.networks[i](x) - self.networks[1 - i](x)) ** 2) * (-1) ** i
                ),
                self.networks[i].trainable_variables,
                data,
                gradient_accumulation_steps=self.gradient_accumulation_steps or 1,
            )
            losses[f"loss_{i}"] = tfbig.apply_gradients(optimizer, accumulated).loss
        return losses

    def applied(self):
        return self.optimizer, self.second


def duel(strategy, weights=None, cls=Duel, **options):
    with make_strategy(strategy).scope():
        model = cls(**options)
        if weights is not None:
            model.set_weights(weights)
        model.compile_both([OPTIMIZERS["adam"](), OPTIMIZERS["muon"]()])
    return model


@weights_first
def test_two_optimizers_of_an_own_step_are_divided(shard, float64):
    x = np.random.default_rng(0).normal(size=(13, 3))
    whole = duel("default")
    model = duel("mirrored_2", whole.get_weights(), shard=shard, gradient_accumulation_steps=2)
    for trained in (whole, model):
        trained.fit(x, batch_size=6, epochs=2, shuffle=False, verbose=0)
    for optimizer in model.applied():
        assert any(isinstance(v, ShardedVariable) for v in optimizer.variables)
    pairs = [
        (model.weights, whole.weights),
        *(
            (a.variables, b.variables)
            for a, b in zip(model.applied(), whole.applied(), strict=True)
        ),
    ]
    for found, expected in pairs:
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=TOLERANCE)


def test_an_optimizer_that_the_model_does_not_hold_is_refused():
    kept = []

    class Hidden(Duel):
        def compile_both(self, optimizers):
            super().compile_both(optimizers)
            kept.append(self.second)
            del self.second

        def applied(self):
            return self.optimizer, kept[0]

    model = duel("mirrored_2", cls=Hidden, shard="optimizer")
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="shard='optimizer'"):
        model.fit(np.ones((4, 3)), batch_size=4, verbose=0)


def test_a_loss_that_depends_on_no_weight_is_refused():
    with make_strategy("mirrored_2").scope():
        x = keras.Input((2,))
        outputs = layers.Lambda(tf.stop_gradient)(layers.Dense(1)(x))
        model = tfbig.Model(x, outputs, shard="optimizer")
        model.compile("adam", "mse")
    with pytest.raises(ValueError, match="No gradients provided"):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


class HeldBack(keras.optimizers.Adam):
    """Looks at the norm of a variable, so it must not see a part of it."""

    def update_step(self, gradient, variable, learning_rate):
        norm = keras.ops.norm(keras.ops.convert_to_tensor(variable))
        super().update_step(gradient * norm, variable, learning_rate)


def test_an_optimizer_that_clips_in_its_own_way_is_refused():
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((2,)), layers.Dense(1)], shard="optimizer")
        with pytest.raises(tfbig.errors.InvalidOptionError, match=r"OwnClipping.*_clip_gradients"):
            model.compile(OwnClipping(0.1), "mse")


@weights_first
def test_an_unknown_optimizer_has_whole_variables(shard, float64):
    assert_small_model_trains_as_plain(
        lambda: [layers.Dense(6), layers.Dense(2)], lambda: HeldBack(0.1), shard
    )


def test_only_tfbigs_update_applies_divided_state():
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((2,)), layers.Dense(1)], shard="optimizer")
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
    gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="divided over the replicas"):
        model.optimizer.apply(gradients)


# --- Order ---------------------------------------------------------------------------


class Delay(layers.Layer):
    """Passes on its inputs, on one replica some time later."""

    def call(self, x):
        # The first column says by how many milliseconds at most.
        y = tf.numpy_function(self._wait, [x], x.dtype)
        return tf.ensure_shape(y, x.shape)

    @staticmethod
    def _wait(x):
        time.sleep(random.random() * float(x[0, 0]) / 1000)
        return x

    def compute_output_shape(self, shape):
        return shape


@pytest.mark.parametrize(
    ("runs", "updates"), [(3, 20), pytest.param(10, 200, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("optimizer", "shard"),
    [
        ("muon", "weights"),
        pytest.param("adam", "optimizer", marks=pytest.mark.slow),
        pytest.param("muon", "optimizer", marks=pytest.mark.slow),
        pytest.param("adam", "weights", marks=pytest.mark.slow),
    ],
)
def test_no_replica_reads_what_another_has_not_written(optimizer, runs, updates, shard):
    """With one slow replica, all runs end with the same bits, as do both replicas of each."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8 * updates, 5)).astype("float32")
    y = rng.normal(size=(8 * updates, 3)).astype("float32")
    # Of each batch, the second replica gets the second half.
    x[:, 0] = np.where(np.arange(len(x)) % 8 < 4, 0, 4)

    def train():
        keras.utils.set_random_seed(1)
        with make_strategy("mirrored_2").scope():
            inputs = keras.Input((5,))
            h = layers.Dense(40, "tanh")(Delay()(inputs))
            model = tfbig.Model(inputs, layers.Dense(3)(h), shard=shard, exchange_bucket_bytes=200)
            model.compile(OPTIMIZERS[optimizer](), "mse", steps_per_execution=5)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        for v in model.trainable_variables if shard == "optimizer" else ():
            first, second = (copy.numpy() for copy in v.value.values)
            np.testing.assert_array_equal(first, second)
        return state(model)

    expected = train()
    for _ in range(runs - 1):
        for a, b in zip(train(), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_model_that_was_extended_does_not_train_with_what_it_traced_before():
    x = np.ones((8, 3))
    with make_strategy("mirrored_2").scope():
        original = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        original.compile("adam", "mse")
    original.fit(x, x[:, :1], batch_size=8, verbose=0)
    extended = tfbig.extend(original, shard="optimizer")
    extended.fit(x, x[:, :1], batch_size=8, verbose=0)
    with pytest.raises(errors.UnsupportedModelError, match="Train the model that has `shard`"):
        original.fit(x, x[:, :1], batch_size=8, verbose=0)
    assert np.all(np.isfinite(extended.get_weights()[0]))
