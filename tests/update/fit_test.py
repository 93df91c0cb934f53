"""`fit`, `evaluate` and `predict` are those of plain Keras on one device, to 1e-10."""

import csv
import functools
import io
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context as tf_context

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig._update import fit_context

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Keras's own, at the end of data whose number of batches it was not told.
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
]

# Float64 sums in another order differ by some 1e-16 of values near 1; a wrong
# denominator or batch shows in the first three digits.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4))
Y = np.eye(3)[RNG.integers(0, 3, 40)]
W = RNG.uniform(0.5, 2, 40)

# A namespace from which a test builds its model, so that both are built alike.
PLAIN = types.SimpleNamespace(Model=keras.Model, Sequential=keras.Sequential, options={})


def big(**options):
    return types.SimpleNamespace(Model=tfbig.Model, Sequential=tfbig.Sequential, options=options)


K1, K3 = {"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 3}
BY_2 = {"micro_batch_size": 2}
REPLICATED = ("default", "mirrored_2")

on_strategies = pytest.mark.parametrize("name", REPLICATED)
# A split on one device, and replicas with and without one: the rest is the sum of these.
STRATEGIES_AND_SPLITS = {
    "mirrored_2-by2": ("mirrored_2", BY_2),
    "default-k3": ("default", K3),
    "mirrored_2-k1": ("mirrored_2", K1),
}
SLOW = ("mirrored_2-k1",)
on_strategies_and_splits = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*row, id=k, marks=[pytest.mark.slow] if k in SLOW else [])
        for k, row in STRATEGIES_AND_SPLITS.items()
    ],
)


def dense(units, seed, **kwargs):
    """A layer that starts with the same weights in every model."""
    kwargs = {"kernel_initializer": keras.initializers.GlorotUniform(seed)} | kwargs
    return keras.layers.Dense(units, **kwargs)


def functional(api):
    x = keras.Input((4,))
    return api.Model(x, dense(3, 2)(dense(5, 1, activation="tanh")(x)), **api.options)


def compile_classifier(model, **kwargs):
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", "mse"],
        weighted_metrics=["mae"],
        **kwargs,
    )


def compile_mse(model, **kwargs):
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", metrics=["mae"], **kwargs)


def train(api, name, build, compile_model, feed, **compile_args):
    with make_strategy(name).scope():
        model = build(api)
        compile_model(model, **compile_args)
    return model, feed(model)


def assert_same_values(got, want):
    got, want = keras.tree.flatten(got), keras.tree.flatten(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_training(trained, reference):
    """Weights, epoch logs and the number of updates are the same."""
    (model, history), (plain, plain_history) = trained, reference
    assert_same_values(model.get_weights(), plain.get_weights())
    assert list(history.history) == list(plain_history.history)
    assert_same_values(history.history, plain_history.history)
    assert model.optimizer.iterations.numpy() == plain.optimizer.iterations.numpy()


def both(name, options, build, compile_model, feed, plain_args=None, **compile_args):
    """Trains the tfbig model and, on one device, its plain twin; compares."""
    plain = train(PLAIN, "default", build, compile_model, feed, **(plain_args or {}))
    keras.backend.clear_session()
    trained = train(big(**options), name, build, compile_model, feed, **compile_args)
    assert_same_training(trained, plain)
    return trained, plain


# --- How data come -----------------------------------------------------------


def arrays(samples, batch_size, **kwargs):
    def feed(model):
        return model.fit(
            X[:samples],
            Y[:samples],
            batch_size=batch_size,
            **{"epochs": 2, "shuffle": False, "verbose": 0} | kwargs,
        )

    return feed


def from_dataset(make, **kwargs):
    return lambda model: model.fit(make(), epochs=2, shuffle=False, verbose=0, **kwargs)


def slices(*values):
    return tf.data.Dataset.from_tensor_slices(values or (X[:19], Y[:19]))


def endless_batches():
    while True:
        for begin, end in ((0, 7), (7, 12), (12, 13), (13, 19)):
            yield X[begin:end], Y[begin:end]


def three_batches():
    for begin, end in ((0, 7), (7, 14), (14, 19)):
        yield X[begin:end], Y[begin:end]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        part = slice(7 * i, min(7 * i + 7, 19))
        return X[part], Y[part], W[part]


FEEDS = {
    "first_batch_splits_unevenly": arrays(19, 7),
    "last_batch_of_one_sample": arrays(15, 7),
    "every_batch_of_one_sample": arrays(3, 1),
    "dataset": from_dataset(lambda: slices().batch(7)),
    "unknown_cardinality": from_dataset(lambda: slices().filter(lambda x, y: True).batch(7)),
    "one_epoch": arrays(19, 7, epochs=1),
    "finite_generator": lambda m: m.fit(three_batches(), shuffle=False, verbose=0),
    "dropped_remainder": from_dataset(lambda: slices().batch(7, drop_remainder=True)),
    "even_batches": from_dataset(lambda: slices().batch(8, drop_remainder=True)),
    "sample_weight": from_dataset(lambda: slices(X[:19], Y[:19], W[:19]).batch(7)),
    "endless_dataset": from_dataset(lambda: slices().batch(7).repeat(), steps_per_epoch=6),
    "generator": from_dataset(endless_batches, steps_per_epoch=6),
    "py_dataset": from_dataset(Batches),
    "validation_data": arrays(19, 7, validation_data=(X[19:36], Y[19:36], W[19:36])),
    "validation_batch_size": arrays(
        19, 7, validation_data=(X[19:36], Y[19:36]), validation_batch_size=5
    ),
    "validation_split": arrays(30, 7, validation_split=0.3),
    "class_weight": arrays(19, 7, class_weight={0: 0.5, 1: 3.0, 2: 1.0}),
}


# Where plain Keras finds the end of the data only by running into it, its graph counts an
# update without data: `iterations` is one too high an epoch, and Adam's next step differs.
# What holds is the training on the same batches in known number.
SAME_BATCHES = {"unknown_cardinality": "dataset", "finite_generator": "one_epoch"}


@functools.cache
def plain_training(feed):
    feed = SAME_BATCHES.get(feed, feed)
    return train(PLAIN, "default", functional, compile_classifier, FEEDS[feed])


# Each feed meets a loop over micro-batches, over steps, and both, with and without replicas.
STEPS = {
    "default-by2-2steps": ("default", BY_2, {"steps_per_execution": 2}),
    "mirrored_2-k3": ("mirrored_2", K3, {}),
    "mirrored_2-k2-3steps": (
        "mirrored_2",
        {"gradient_accumulation_steps": 2},
        {"steps_per_execution": 3},
    ),
}


def feeds_and_steps():
    """Each feed with one way of steps in turn; the others are slow."""
    for i, feed in enumerate(FEEDS):
        for j, steps in enumerate(STEPS):
            marks = [] if i % len(STEPS) == j else [pytest.mark.slow]
            yield pytest.param(feed, steps, id=f"{feed}-{steps}", marks=marks)


@pytest.mark.parametrize(("feed", "steps"), feeds_and_steps())
@pytest.mark.filterwarnings("ignore:.*larger than a replica's share")
def test_every_feed_trains_as_on_one_device(feed, steps):
    name, options, compile_args = STEPS[steps]
    trained = train(
        big(**options), name, functional, compile_classifier, FEEDS[feed], **compile_args
    )
    assert_same_training(trained, plain_training(feed))


@in_turn(
    {
        "name": REPLICATED,
        "options": {"k1": K1, "k3": K3, "scaled": K1 | {"loss_scale": 64.0}},
        "feed, updates": {
            "unknown_cardinality": ("unknown_cardinality", 6),
            "finite_generator": ("finite_generator", 3),
        },
    }
)
def test_the_end_of_the_data_is_not_an_update(name, options, feed, updates):
    model, _ = train(big(**options), name, functional, compile_classifier, FEEDS[feed])
    assert model.optimizer.iterations.numpy() == updates
    assert_same_values(model.get_weights(), plain_training(feed)[0].get_weights())


@pytest.mark.parametrize("options", [K1, K3], ids=["k1", "k3"])
def test_the_end_of_the_data_is_not_an_exchange_in_half_precision(options):
    """Its weight goes first, and is known while tracing if all batches are of one size."""
    half = {"exchange_dtype": "bfloat16"}
    data = slices().filter(lambda x, y: True).batch(6, drop_remainder=True)
    feed = from_dataset(lambda: data)
    model, history = train(big(**options, **half), "mirrored_2", functional, compile_mse, feed)
    assert model.optimizer.iterations.numpy() == 6
    assert np.isfinite(history.history["loss"]).all()


@on_strategies
def test_endless_data_are_trained_on_in_whole_executions(name):
    # As in Keras, steps_per_epoch is rounded up to what one execution runs: 4 to 6.
    feed = from_dataset(lambda: slices().batch(7).repeat(), steps_per_epoch=4)
    steps = {"steps_per_execution": 3}
    (model, _), _ = both(name, BY_2, functional, compile_mse, feed, plain_args=steps, **steps)
    assert model.optimizer.iterations.numpy() == 12


@pytest.mark.parametrize("name", ["one_device", "mirrored_4"])
@pytest.mark.parametrize("feed", ["last_batch_of_one_sample", "generator", "validation_data"])
def test_feeds_on_other_strategies(name, feed):
    trained = train(big(**BY_2), name, functional, compile_classifier, FEEDS[feed])
    assert_same_training(trained, plain_training(feed))


@in_turn(
    {
        "name, options": STRATEGIES_AND_SPLITS,
        "feed": ["validation_data", "last_batch_of_one_sample", "sample_weight"],
    },
    slow=SLOW,
)
@pytest.mark.filterwarnings("ignore:.*larger than a replica's share")
def test_jit_compile(name, options, feed):
    trained = train(
        big(**options), name, functional, compile_classifier, FEEDS[feed], jit_compile=True
    )
    assert_same_training(trained, plain_training(feed))


@pytest.mark.parametrize(
    ("name", "options"),
    [("default", K3), pytest.param("mirrored_2", BY_2, marks=pytest.mark.slow)],
)
def test_jit_compile_of_batches_that_divide(name, options):
    # Keras knows the size of every batch then, and XLA sees a static shape.
    feed = arrays(12, 6, validation_data=(X[12:24], Y[12:24]), validation_batch_size=4)
    both(name, options, functional, compile_classifier, feed, jit_compile=True)


@pytest.mark.parametrize(
    "name",
    ["mirrored_2", pytest.param("default", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:.*larger than a replica's share")
def test_jit_compile_with_steps_per_execution(name):
    trained = train(
        big(**K3),
        name,
        functional,
        compile_classifier,
        FEEDS["last_batch_of_one_sample"],
        jit_compile=True,
        steps_per_execution=2,
    )
    assert_same_training(trained, plain_training("last_batch_of_one_sample"))


@pytest.mark.parametrize("name", REPLICATED)
def test_jit_compile_auto_asks_the_devices_of_the_replicas(name, monkeypatch):
    def resolved(*layers, inputs=(4, 3)):
        with make_strategy(name).scope():
            model = tfbig.Sequential([keras.Input(inputs), *layers])
            model.compile("sgd", "mse")
        return model.jit_compile

    assert not resolved(keras.layers.Dense(2))
    # As on GPUs, which plain Keras asks for without a strategy only.
    monkeypatch.setattr("tfbig._keras.trainer.is_on_cpu", lambda strategy: False)
    assert resolved(keras.layers.Dense(2))
    assert not resolved(keras.layers.RandomZoom(0.1), inputs=(4, 4, 3))
    # The rows of its gradient would be added up before the optimizer squares them.
    assert not resolved(keras.layers.Embedding(5, 2), inputs=(4,))


@on_strategies_and_splits
@pytest.mark.filterwarnings("ignore:.*larger than a replica's share")
def test_run_eagerly_is_the_compiled_training(name, options):
    feed = "last_batch_of_one_sample"
    trained = train(
        big(**options), name, functional, compile_classifier, FEEDS[feed], run_eagerly=True
    )
    assert_same_training(trained, plain_training(feed))


def embedded(api):
    x = keras.Input((4,), dtype="int32")
    table = keras.layers.Embedding(
        6, 4, embeddings_initializer=keras.initializers.RandomUniform(seed=5)
    )
    return api.Model(x, dense(3, 2)(keras.layers.Flatten()(table(x))), **api.options)


@in_turn(
    {
        "options": {"by2": BY_2, "k1": K1},
        "samples, kwargs": {
            "loop": (22, {"steps_per_execution": 3}),
            # In the last batch, a replica has none.
            "eager": (17, {"run_eagerly": True}),
        },
    }
)
def test_rows_of_embeddings_on_replicas_may_be_fewer_or_none(options, samples, kwargs):
    def feed(model):
        x = np.abs(X[:samples] * 100).astype("int32") % 6
        return model.fit(x, Y[:samples], batch_size=8, epochs=2, shuffle=False, verbose=0)

    both("mirrored_2", options, embedded, compile_classifier, feed, plain_args={}, **kwargs)


# --- Inputs and outputs ------------------------------------------------------


def bool_and_int_model(api):
    flags, ids = keras.Input((3,), dtype="bool"), keras.Input((2,), dtype="int32")
    table = keras.layers.Embedding(
        6, 4, embeddings_initializer=keras.initializers.RandomUniform(seed=5)
    )
    rows = keras.layers.Flatten()(table(ids))
    x = keras.layers.Concatenate()([keras.ops.cast(flags, "float64"), rows])
    return api.Model([flags, ids], dense(3, 2)(x), **api.options)


def dict_model(api):
    inputs = {"a": keras.Input((2,), name="a"), "b": [keras.Input((1,)), keras.Input((1,))]}
    x = keras.layers.Concatenate()(keras.tree.flatten(inputs))
    x = dense(5, 1, activation="tanh")(x)
    return api.Model(inputs, {"one": dense(1, 2)(x), "two": dense(2, 3)(x)}, **api.options)


def tuple_model(api):
    inputs = (keras.Input((2,)), keras.Input((2,)))
    x = dense(5, 1, activation="tanh")(keras.layers.Concatenate()(inputs))
    return api.Model(inputs, (dense(1, 2)(x), dense(2, 3)(x)), **api.options)


class Half(keras.layers.Layer):
    """Doubles what there is: an optional input may be None."""

    def call(self, x, extra=None):
        return x if extra is None else x + extra


def optional_model(api):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b", optional=True)
    return api.Model({"a": a, "b": b}, dense(3, 1)(Half()(a, b)), **api.options)


FLAGS, IDS = X[:, :3] > 0, np.random.default_rng(1).integers(0, 6, (40, 2)).astype("int32")
NESTED = {"a": X[:, :2], "b": [X[:, 2:3], X[:, 3:]]}
STRUCTURES = {
    "bool_and_int": (bool_and_int_model, [FLAGS, IDS], Y),
    "dict": (dict_model, NESTED, {"one": Y[:, :1], "two": Y[:, 1:]}),
    "tuple": (tuple_model, (X[:, :2], X[:, 2:]), (Y[:, :1], Y[:, 1:])),
    "optional": (optional_model, {"a": X, "b": None}, Y),
}


# A structure is trained on replicas or without; that None fails on replicas is quickly seen.
@pytest.mark.parametrize(
    ("name", "compile_args", "structure"),
    [
        ("mirrored_2", {"steps_per_execution": 2}, "bool_and_int"),
        ("default", {}, "dict"),
        ("default", {}, "tuple"),
        ("default", {}, "optional"),
        ("mirrored_2", {"steps_per_execution": 2}, "optional"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("default", {}, "bool_and_int"),
                ("mirrored_2", {"steps_per_execution": 2}, "dict"),
                ("mirrored_2", {"steps_per_execution": 2}, "tuple"),
                *(("mirrored_2", {}, structure) for structure in STRUCTURES),
            ]
        ),
    ],
)
def test_structures_of_inputs_and_outputs(name, structure, compile_args):
    build, x, y = STRUCTURES[structure]
    x, y = keras.tree.map_structure(lambda v: v if v is None else v[:15], (x, y))

    def compile_model(model, **kwargs):
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", **kwargs)

    def feed(model):
        return model.fit(x, y, batch_size=7, epochs=2, shuffle=False, verbose=0)

    if structure == "optional" and name != "default":
        # tf.distribute's iterators fail on None.
        with pytest.raises(tfbig.errors.UnsupportedStrategyError, match="None among the inputs"):
            train(big(**BY_2), name, build, compile_model, feed, **compile_args)
        return
    (model, _), (plain, _) = both(name, BY_2, build, compile_model, feed, **compile_args)
    assert_same_values(
        model.predict(x, batch_size=4, verbose=0), plain.predict(x, batch_size=4, verbose=0)
    )
    assert_same_values(
        model.evaluate(x, y, batch_size=4, verbose=0), plain.evaluate(x, y, batch_size=4, verbose=0)
    )


def ragged_net(base):
    class Net(base):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.table = keras.layers.Embedding(
                6, 3, embeddings_initializer=keras.initializers.RandomUniform(seed=5)
            )

        def call(self, x):
            # Of one length: else the padding of a sample depends on its neighbours.
            return tf.reduce_sum(self.table(x.to_tensor(shape=(None, 5))), 1)

    return Net


@on_strategies
@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
def test_ragged_inputs(name, run_eagerly):
    rows = tf.RaggedTensor.from_row_lengths(RNG.integers(0, 6, 45), [1, 2, 3, 4, 5] * 3)
    data = tf.data.Dataset.from_tensor_slices((rows, Y[:15])).batch(7)

    def feed(model):
        return model.fit(data, epochs=2, verbose=0, shuffle=False)

    def build(api):
        model = ragged_net(api.Model)(**api.options)
        if api is PLAIN:  # Which builds it for dense inputs, and fails.
            model(rows)
        return model

    (model, _), (plain, _) = both(name, BY_2, build, compile_mse, feed, run_eagerly=run_eagerly)
    assert_same_values(model.evaluate(data, verbose=0), plain.evaluate(data, verbose=0))


@pytest.mark.parametrize("samples", [2, 3])
def test_added_loss_of_one_value_where_a_replica_has_one_sample(samples, mirrored, float64):
    """Eagerly, it has as many values as the replica has samples, and is none of theirs."""

    class Penalty(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.reshape(keras.ops.mean(x**2), (1,)))
            return x

    def trained(base):
        inputs = keras.Input((3,))
        model = base(inputs, Penalty()(dense(2, 1)(inputs)))
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        model.fit(X[:samples, :3], Y[:samples, :2], batch_size=samples, verbose=0)
        return model.get_weights()

    with mirrored.scope():
        found = trained(tfbig.Model)
    assert_same_values(found, trained(keras.Model))


# --- Models ------------------------------------------------------------------


def subclassed(base):
    class Net(base):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.hidden, self.out = dense(5, 1, activation="tanh"), dense(3, 2)

        def call(self, x, training=False):
            # Doubled in training: shows that the argument arrives.
            return self.out(self.hidden(x)) * (2.0 if training else 1.0)

    return Net


def own_loss(base):
    class Net(subclassed(base)):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + 0.1 * keras.ops.mean(y_pred**2)

    return Net


def own_metrics(base):
    class Net(subclassed(base)):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.largest = keras.metrics.Mean(name="largest")

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.largest.update_state(keras.ops.max(y_pred, axis=-1))
            return super().compute_metrics(x, y, y_pred, sample_weight)

    return Net


def own_test_step(base):
    class Net(subclassed(base)):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.largest = keras.metrics.Mean(name="largest")

        def test_step(self, data):
            x, y = data
            self.largest.update_state(keras.ops.max(self(x, training=False) - y, axis=-1))
            return {"largest": self.largest.result()}

    return Net


def extended_test_step(base):
    class Net(own_test_step(base)):
        def test_step(self, data):
            logs = super(own_test_step_of(type(self)), self).test_step(data)
            self.largest.update_state(keras.ops.max(self(data[0]), axis=-1))
            return logs | {"largest": self.largest.result()}

    return Net


def own_test_step_of(cls):
    """The class whose `test_step` is to be passed over."""
    return [c for c in cls.__mro__ if "test_step" in c.__dict__][1]


def unbuilt_sequential(api):
    return api.Sequential([dense(5, 1, activation="tanh"), dense(3, 2)], **api.options)


def constrained(api):
    layers = [
        keras.Input((4,)),
        dense(3, 1, kernel_constraint=keras.constraints.MaxNorm(0.3)),
        dense(3, 2, kernel_constraint="non_neg"),
    ]
    return api.Sequential(layers, **api.options)


def of_class(make):
    return lambda api: make(api.Model)(**api.options)


MODELS = {
    "subclassed_unbuilt": of_class(subclassed),
    "sequential_unbuilt": unbuilt_sequential,
    "compute_loss": of_class(own_loss),
    "compute_metrics": of_class(own_metrics),
    "test_step": of_class(own_test_step),
    "extended_test_step": of_class(extended_test_step),
    "constraints": constrained,
}


@in_turn({"kind": list(MODELS), "name, options": STRATEGIES_AND_SPLITS}, slow=SLOW)
@pytest.mark.filterwarnings("ignore:.*larger than a replica's share")
def test_models_that_users_write(name, options, kind):
    def feed(model):
        return arrays(16, 7, validation_data=(X[19:30], Y[19:30]), validation_batch_size=4)(model)

    both(name, options, MODELS[kind], compile_mse, feed)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_test_step_takes_means_of_replicas_that_have_samples(run_eagerly):
    def make(base):
        class Net(subclassed(base)):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.weighted = keras.metrics.Mean(name="weighted")
                self.unweighted = keras.metrics.Mean(name="unweighted")

            def test_step(self, data):
                x, y = data
                loss = tf.reduce_mean((self(x, training=False) - y) ** 2)
                self.weighted.update_state(loss, sample_weight=tf.shape(x)[0])
                self.unweighted.update_state(loss)
                means = {m.name: m.result() for m in (self.weighted, self.unweighted)}
                return means | {"last": loss}

        return Net

    def feed(model):
        # Of the last batch of one sample, the second replica has none.
        return model.evaluate(X[:9], Y[:9], batch_size=4, return_dict=True, verbose=0)

    def compile_model(model):
        model.compile(run_eagerly=run_eagerly)

    _, want = train(PLAIN, "default", of_class(make), compile_model, feed)
    _, got = train(big(**K3), "mirrored_2", of_class(make), compile_model, feed)
    assert_same_values([got["weighted"], got["last"]], [want["weighted"], want["last"]])
    # Of four means over two samples, and one over the last.
    of_two = (9 * want["weighted"] - want["last"]) / 2
    assert_same_values(got["unweighted"], (of_two + want["last"]) / 5)


def renamed_metric(base):
    class Net(own_metrics(base)):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            return logs | {"renamed": self.largest.result()}

    return Net


@pytest.mark.filterwarnings("ignore:`compute_metrics` should return")
def test_logs_that_compute_metrics_adds_are_those_of_the_whole_batch():
    both("default", BY_2, of_class(renamed_metric), compile_mse, arrays(16, 7))


def test_logs_that_no_metric_holds_are_warned_of_under_replicas():
    # Replicas do not share what the user computes; the mean of it is no result.
    with pytest.warns(UserWarning, match=r"averaged over the replicas.*\['renamed'\]"):
        train(big(), "mirrored_2", of_class(renamed_metric), compile_mse, arrays(16, 7))


@on_strategies
def test_compute_loss_needs_no_compiled_loss(name):
    def make(base):
        class Net(subclassed(base)):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                return keras.ops.mean(keras.ops.abs(y - y_pred) ** 3)

        return Net

    def compile_model(model, **kwargs):
        model.compile(keras.optimizers.Adam(0.01), **kwargs)

    both(name, BY_2, of_class(make), compile_model, arrays(15, 7))


class Counter(keras.layers.Layer):
    """Counts its calls in training."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1)
        return x


class Started(keras.layers.Layer):
    """Remembers that it was trained, as one that is initialized by the first batch."""

    def build(self, shape):
        self.flags = self.add_weight(
            shape=(2,), dtype="bool", initializer="zeros", trainable=False, name="flags"
        )

    def call(self, x, training=False):
        if training:
            self.flags.assign([True, False])
        return x


@pytest.mark.filterwarnings("ignore:The forward pass changes variables")
@pytest.mark.parametrize("name", ["default", "mirrored_2"])
def test_flags_are_kept(name):
    with make_strategy(name).scope():
        model = tfbig.Sequential([keras.Input((4,)), Started(), keras.layers.Dense(1)], **K3)
        model.compile("sgd", "mse")
    model.fit(X[:6], X[:6, :1], batch_size=6, verbose=0)
    np.testing.assert_array_equal(model.layers[0].flags, [True, False])


@pytest.mark.filterwarnings("ignore:The forward pass changes variables")
@in_turn(
    {
        "name": REPLICATED,
        "options, calls": {"k1": (K1, 4), "k3": (K3, 12)},
        "jit_compile": [False, True],
    }
)
def test_integer_state_counts_micro_batches(name, options, calls, jit_compile):
    def build(api):
        return api.Sequential([keras.Input((4,)), Counter(), dense(3, 1)], **api.options)

    model, _ = train(
        big(**options), name, build, compile_mse, arrays(12, 6), jit_compile=jit_compile
    )
    plain, _ = train(PLAIN, "default", build, compile_mse, arrays(12, 6))
    assert model.layers[0].calls.numpy() == calls
    assert plain.layers[0].calls.numpy() == 4
    assert_same_values(model.layers[1].get_weights(), plain.layers[1].get_weights())


class Queue(keras.layers.Layer):
    """Remembers its last inputs; how many of them a batch brings is not known while tracing."""

    def build(self, shape):
        self.rows = self.add_weight(shape=(3, shape[-1]), trainable=False)

    def call(self, x, training=False):
        if training:
            self.rows.assign(tf.concat([x, self.rows.value], 0)[:3])
        return x


@pytest.mark.filterwarnings("ignore:The forward pass changes variables")
@pytest.mark.parametrize("name", REPLICATED)
def test_state_may_be_of_a_shape_that_tracing_does_not_tell(name):
    with make_strategy(name).scope():
        model = tfbig.Sequential([keras.Input((4,)), Queue(), keras.layers.Dense(1)], **K3)
        model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices((X[:6], X[:6, :1])).batch(6)
    model.fit(data, shuffle=False, verbose=0)
    expected = X[[4, 5, 2]] if name == "default" else (X[[2, 1, 0]] + X[[5, 4, 3]]) / 2
    np.testing.assert_allclose(model.layers[0].rows, expected, rtol=1e-6)


def spectral(api):
    # The variables of the wrapper are drawn at random: start from ones.
    layer = keras.layers.SpectralNormalization(dense(3, 1), power_iterations=2)
    model = api.Sequential([keras.Input((4,)), layer], **api.options)
    model.set_weights([np.ones_like(w) if w.shape[0] == 1 else w for w in model.get_weights()])
    return model


def test_spectral_normalization_whole_is_exact():
    both("default", K1, spectral, compile_mse, arrays(15, 7))


@on_strategies
def test_split_spectral_normalization_is_refused(name):
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"assign a trainable.*kernel"):
        train(big(**K3), name, spectral, compile_mse, arrays(14, 7))


# --- Settings between and during fits ----------------------------------------


@on_strategies_and_splits
def test_frozen_layers_then_recompiled(name, options):
    def feed(model):
        arrays(12, 6)(model)
        with model.distribute_strategy.scope():
            model.layers[1].trainable = False
            compile_classifier(model)
        return arrays(12, 6)(model)

    (model, _), _ = both(name, options, functional, compile_classifier, feed)
    assert len(model.trainable_variables) == 2


@on_strategies
@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize(
    "options",
    [BY_2, K3 | {"loss_scale": "dynamic"}, BY_2 | {"log_grad_norm": True, "shard": "optimizer"}],
    ids=["by2", "scaled", "sharded"],
)
@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_without_trainable_weights(name, options, run_eagerly):
    def compile_frozen(model):
        for layer in model.layers:
            layer.trainable = False
        model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"], run_eagerly=run_eagerly)

    _, expected = train(PLAIN, "default", functional, compile_frozen, arrays(12, 6))
    model, history = train(big(**options), name, functional, compile_frozen, arrays(12, 6))
    for key, values in expected.history.items():
        np.testing.assert_allclose(history.history[key], values, rtol=TOLERANCE)
    assert model.optimizer.iterations == 0


@on_strategies
def test_recompiled_with_another_optimizer_and_loss(name):
    def feed(model):
        arrays(15, 7)(model)
        with model.distribute_strategy.scope():
            compile_mse(model)
        return arrays(15, 7)(model)

    both(name, BY_2, functional, compile_classifier, feed)


@on_strategies
def test_several_fits_continue(name):
    def feed(model):
        arrays(15, 7)(model)
        arrays(19, 5)(model)
        return from_dataset(lambda: slices().batch(4))(model)

    both(name, BY_2, functional, compile_classifier, feed)


SETTINGS = [
    {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 2},
    {"use_ema": True, "ema_momentum": 0.8},
    {"clipvalue": 0.01},
    {"weight_decay": 0.01, "global_clipnorm": 0.1},
    {"clipnorm": 0.05},
]


@in_turn({"settings": {"-".join(s): s for s in SETTINGS}, "name": REPLICATED})
def test_optimizer_settings_count_updates(name, settings):
    def compile_model(model, **kwargs):
        rate = keras.optimizers.schedules.PiecewiseConstantDecay([3, 5], [0.05, 0.02, 0.01])
        model.compile(keras.optimizers.Adam(rate, **settings), "mse", **kwargs)

    both(name, BY_2, functional, compile_model, arrays(21, 7))


@on_strategies
def test_each_weight_ends_as_its_own_average_though_others_are_frozen(name):
    with make_strategy(name).scope():
        inner = [keras.layers.Dense(4, use_bias=False) for _ in range(3)]
        model = tfbig.Sequential([keras.Input((4,)), *inner], gradient_accumulation_steps=2)
        model.compile(keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5), "mse")
        model.fit(X[:12, :4], X[:12, :4], batch_size=6, verbose=0)
        inner[0].trainable = False
        frozen = inner[0].get_weights()[0]
        model.compile(model.optimizer, "mse")
    model.fit(X[:12, :4], X[:12, :4], batch_size=6, verbose=0)
    np.testing.assert_array_equal(inner[0].get_weights()[0], frozen)
    averages = model.optimizer._model_variables_moving_average
    for layer, average in zip(inner[1:], averages[1:], strict=True):
        np.testing.assert_array_equal(layer.get_weights()[0], average.numpy())


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches, self.rates = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)

    def on_epoch_end(self, epoch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate.numpy()))


@on_strategies
def test_callbacks_count_updates(name, tmp_path):
    recorders = []

    def feed(model):
        place = tmp_path / type(model).__module__.partition(".")[0]
        place.mkdir()
        recorders.append(Recorder())
        return model.fit(
            X[:15],
            Y[:15],
            batch_size=6,
            epochs=6,
            shuffle=False,
            verbose=0,
            validation_data=(X[15:], -Y[15:]),
            callbacks=[
                keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr * 0.9),
                keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1),
                keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True),
                keras.callbacks.ModelCheckpoint(
                    str(place / "{batch:02d}.weights.h5"), save_freq=2, save_weights_only=True
                ),
                keras.callbacks.CSVLogger(str(place / "log.csv")),
                recorders[-1],
            ],
        )

    both(name, BY_2, functional, compile_mse, feed)
    plain, recorded = recorders
    assert recorded.batches == plain.batches == [0, 1, 2] * (len(plain.batches) // 3)
    assert len(plain.batches) < 18  # Stopped early, so the callback saw the right losses.
    assert_same_values(recorded.rates, plain.rates)

    places = [tmp_path / package for package in ("keras", "tfbig")]
    written = [sorted(p.name for p in place.iterdir()) for place in places]
    assert written[0] == written[1]
    assert len(written[0]) > 1
    logs = [list(csv.reader((place / "log.csv").read_text().split())) for place in places]
    assert logs[0][0] == logs[1][0]
    assert_same_values(*([[float(v) for r in log[1:] for v in r] for log in logs]))


def mixed_bfloat16(api):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_bfloat16")
    return functional(api)


def test_mixed_bfloat16_whole_is_plain_keras():
    both("default", K1, mixed_bfloat16, compile_classifier, arrays(15, 7))


@on_strategies
def test_split_batches_train_in_mixed_bfloat16(name):
    feed = arrays(36, 12, epochs=6)
    model, history = train(big(**K3), name, mixed_bfloat16, compile_classifier, feed)
    _, expected = train(PLAIN, "default", mixed_bfloat16, compile_classifier, feed)
    assert model.loss_scale is None
    assert {w.dtype for w in model.get_weights()} == {np.dtype("float32")}
    loss, plain_loss = history.history["loss"], expected.history["loss"]
    assert loss[-1] < 0.9 * loss[0]
    # bfloat16 holds 8 bits: 2**-8 of a value is its rounding error.
    np.testing.assert_allclose(loss, plain_loss, rtol=2**-7)


@on_strategies
def test_variables_of_several_dtypes(name):
    def build(api):
        layers = [dense(5, 1, activation="tanh", dtype="float32"), dense(3, 2)]
        return api.Sequential([keras.Input((4,)), *layers], **api.options)

    feed = arrays(15, 7)
    model, _ = train(big(**BY_2), name, build, compile_mse, feed)
    plain, _ = train(PLAIN, "default", build, compile_mse, feed)
    assert [w.dtype for w in model.get_weights()] == [w.dtype for w in plain.get_weights()]
    for got, want in zip(model.get_weights(), plain.get_weights(), strict=True):
        # The first layer computes in float32, whose rounding error is 6e-8.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# --- evaluate, predict, *_on_batch -------------------------------------------


@pytest.fixture
def twins(name):
    """A tfbig model and a plain one with the same weights, on 19 samples."""

    def make(options, **compile_args):
        models = []
        for api, strategy in ((big(**options), name), (PLAIN, "default")):
            with make_strategy(strategy).scope():
                model = functional(api)
                compile_classifier(model, **(compile_args if api is not PLAIN else {}))
            models.append(model)
        return models

    return make


TWINS = ["mirrored_2", "default", "mirrored_4"]


@in_turn(
    {
        "options, compile_args": {
            "k1": (K1, {}),
            "k3-2steps": (K3, {"steps_per_execution": 2}),
            "by2-jit": (BY_2, {"jit_compile": True}),
        },
        "name": TWINS,
    }
)
def test_evaluate(twins, options, compile_args):
    model, plain = twins(options, **compile_args)
    for samples, batch_size in ((19, 7), (15, 7), (3, 1)):
        x, y, w = X[:samples], Y[:samples], W[:samples]
        got, want = (
            m.evaluate(x, y, batch_size, sample_weight=w, verbose=0, return_dict=True)
            for m in (model, plain)
        )
        assert list(got) == list(want)
        assert_same_values(got, want)
    dataset = slices().filter(lambda x, y: True).batch(4)
    assert_same_values(*(m.evaluate(dataset, verbose=0) for m in (model, plain)))
    assert_same_values(*(m.evaluate(dataset, steps=4, verbose=0) for m in (model, plain)))


@in_turn(
    {
        "compile_args": {
            "2steps": {"steps_per_execution": 2},
            "": {},
            "jit": {"jit_compile": True},
        },
        "name": TWINS,
    }
)
def test_predict_keeps_order(twins, compile_args):
    model, plain = twins(K3, **compile_args)
    for samples, batch_size in ((19, 7), (15, 7), (3, 1)):
        got = model.predict(X[:samples], batch_size, verbose=0)
        assert_same_values(got, plain(X[:samples]).numpy())
    dataset = slices(X[:19]).filter(lambda x: True).batch(4)
    assert_same_values(model.predict(dataset, verbose=0), plain(X[:19]).numpy())


@pytest.mark.parametrize("name", ["default", "mirrored_2"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_prediction_of_a_batch_of_two_inputs(name, kind):
    with make_strategy(name).scope():
        x = [keras.Input((4,)), keras.Input((4,))]
        model = tfbig.Model(x, keras.layers.Dense(3)(keras.layers.Concatenate()(x)))
    batch = kind([X[:5], X[1:6]])
    found = model.predict_on_batch(batch)
    np.testing.assert_allclose(found, model.predict(batch, verbose=0), rtol=0, atol=1e-6)
    assert found.shape == (5, 3)


@in_turn({"options": {"k3": K3, "k1": K1, "by2": BY_2}, "name": TWINS})
@pytest.mark.filterwarnings("ignore:.*larger than a replica's share")
def test_on_batch_methods(twins, options):
    model, plain = twins(options)
    for samples in (7, 1, 2, 5):
        x, y, w = X[:samples], Y[:samples], W[:samples]
        for method in ("train_on_batch", "test_on_batch"):
            got, want = (getattr(m, method)(x, y, sample_weight=w) for m in (model, plain))
            assert_same_values(got, want)
        assert_same_values(*(m.predict_on_batch(x) for m in (model, plain)))
    got, want = (
        m.train_on_batch(X[:6], Y[:6], class_weight={0: 2.0, 1: 1.0, 2: 0.5}, return_dict=True)
        for m in (model, plain)
    )
    assert list(got) == list(want)
    assert_same_values(got, want)
    assert_same_values(model.get_weights(), plain.get_weights())


def test_summary_and_count_params_are_the_twins():
    texts = []
    for api in (PLAIN, big(**K3)):
        keras.backend.clear_session()
        model, _ = train(api, "default", functional, compile_mse, arrays(6, 6))
        text = io.StringIO()
        model.summary(print_fn=lambda line, out=text, **_: out.write(line + "\n"))
        texts.append((text.getvalue(), model.count_params()))
    (text, count), (own_text, own_count) = texts
    assert own_count == count == 4 * 5 + 5 + 5 * 3 + 3
    # Only the default name, after the class, may differ.
    assert own_text.splitlines()[1:] == text.splitlines()[1:]


OFF, DATA, FILE = (
    getattr(tf.data.experimental.AutoShardPolicy, name) for name in ("OFF", "DATA", "FILE")
)


@pytest.mark.parametrize(
    ("policy", "change", "warning"),
    [
        (OFF, lambda d: d, "hand every worker the same samples"),
        (OFF, lambda d: d.shard(2, 0), None),
        (DATA, lambda d: d.shuffle(4), "shuffled without a seed"),
        (None, lambda d: d.shuffle(4).map(lambda x: x), "shuffled without a seed"),
        (None, lambda d: d.shuffle(4, seed=0), None),
        (FILE, lambda d: d.shuffle(4), None),
        # Then workers read files of their own.
        (None, lambda d: tf.data.TextLineDataset(["a", "b"]).shuffle(4), None),
        (DATA, lambda d: tf.data.TextLineDataset(["a", "b"]).shuffle(4), "without a seed"),
    ],
)
def test_data_of_which_workers_do_not_each_read_their_own(policy, change, warning, monkeypatch):
    monkeypatch.setattr(tf_context.context(), "_seed", None)
    dataset = change(tf.data.Dataset.range(8)).batch(2)
    if policy is not None:
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = policy
        dataset = dataset.with_options(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_context._warn_of_same_samples(dataset)
    assert len(caught) == (warning is not None)
    assert all(warning in str(w.message) for w in caught)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_train_on_batch_takes_sparse_and_ragged_batches(kind, strategy):
    dense = np.eye(5, 4, dtype="float32")
    sparse = tf.sparse.from_dense(dense)
    x = sparse if kind == "sparse" else tf.RaggedTensor.from_tensor(dense, ragged_rank=1)

    class Net(tfbig.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense = keras.layers.Dense(1, kernel_initializer="ones")

        def call(self, x):
            return self.dense(x.to_tensor(shape=(None, 4)) if kind == "ragged" else x)

    with make_strategy(strategy).scope():
        model = Net(gradient_accumulation_steps=2)
        model.compile("sgd", "mse")
    assert model.train_on_batch(x, np.zeros((5, 1), "float32")) == pytest.approx(0.8)
    assert tfbig.check_equivalence(model, x, np.zeros((5, 1), "float32")).is_equivalent


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_xla_refuses_operations_that_it_does_not_know(kind, steps, monkeypatch):
    # What "auto" does on a GPU.
    monkeypatch.setattr("tfbig._keras.trainer.is_on_cpu", lambda strategy: False)
    dense_x = np.eye(6, 4)
    x = tf.sparse.from_dense(dense_x)
    if kind == "ragged":
        x = tf.RaggedTensor.from_tensor(dense_x, ragged_rank=1)

    class Net(tfbig.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense = dense(1, 1)

        def call(self, x):
            return self.dense(x.to_tensor(shape=(None, 4)) if kind == "ragged" else x)

    data = tf.data.Dataset.from_tensor_slices((x, np.zeros((6, 1)))).batch(3)
    model = Net(gradient_accumulation_steps=steps)
    model.compile("sgd", "mse", jit_compile=True)
    operations = {"sparse": "Sparse(FillEmptyRows|Slice)", "ragged": "RaggedTensorToTensor"}
    refused = pytest.raises(
        tfbig.errors.UnsupportedModelError,
        match=rf"XLA must know.*jit_compile=True.* and {operations[kind]}\.",
    )
    with refused:
        model.fit(data, shuffle=False, verbose=0)
    with refused:
        model.evaluate(data, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 0
    model.compile("sgd", "mse")
    assert model.jit_compile
    model.fit(data, shuffle=False, verbose=0)
    assert not model.jit_compile
    assert model.get_compile_config()["jit_compile"] == "auto"


def test_train_on_batch_with_fewer_samples_than_replicas(mirrored):
    with mirrored.scope():
        model = tfbig.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.train_on_batch(np.ones((1, 2)), np.ones((1, 1)))
    assert int(model.optimizer.iterations.numpy()) == 1


def test_metric_with_the_name_of_a_log_of_tfbig_is_returned():
    model = tfbig.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile("sgd", "mse", metrics=[keras.metrics.MeanAbsoluteError(name="grad_norm")])
    logs = model.train_on_batch(np.ones((4, 2)), np.zeros((4, 1)))
    assert logs == pytest.approx([4.0, 2.0])


def test_the_end_of_data_of_unknown_length_counts_no_loss(mirrored):
    """The step that finds no data left must not count the losses of outputs once more."""

    def train(data):
        keras.utils.set_random_seed(1)
        with mirrored.scope():
            x = keras.Input((2,))
            outputs = [keras.layers.Dense(1, name=name)(x) for name in ("a", "b")]
            model = tfbig.Model(x, outputs, gradient_accumulation_steps=2)
            model.compile("sgd", ["mse", "mae"])
        return model.fit(data, shuffle=False, verbose=0).history

    x = np.random.default_rng(0).normal(size=(12, 2)).astype("float32")
    known = tf.data.Dataset.from_tensor_slices((x, (x[:, :1], x[:, 1:]))).batch(4)
    expected, found = train(known), train(known.filter(lambda x, y: True))
    assert found.keys() == expected.keys() >= {"a_loss", "b_loss"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)
