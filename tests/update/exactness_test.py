"""tfbig makes the update that plain Keras makes of the whole batch on one device.

Everything runs through compiled `fit` in float64. The same layers, from the same
weights on the same data, are trained twice: once as a plain Keras model with the
default strategy, the effective batch whole; once as a tfbig model, split, under some
strategy. Weights, optimizer variables, history and `evaluate` must agree.

The combinations cover every pair of feature, optimizer, strategy, split and batch.
Run with `--replicas 2` and `--replicas 4`, and `--slow`, for all of them. If the environment
variable TFBIG_EXACTNESS_REPORT names a file, each combination appends a line of
JSON with its parameters and its largest deviation, `{"deviation": 1e-16, ...}`.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import tfbig
from tests.combinations import pairwise
from tests.conftest import STRATEGIES, make_strategy

# All values are of order 1 and 64 samples are summed in another order, some updates
# long: float64 rounds at 2e-16, a wrong denominator shows in the second digit.
TOLERANCE = 1e-10

EPOCHS = 2

# Samples in the data and in a batch.
BATCHES = {
    "64by32": (64, 32),  # divides by every split and number of replicas
    "37by8": (37, 8),  # last batch of 5
    "37by10": (37, 10),  # 10 divides neither by 4 nor by 3; last batch of 7
    "37by12": (37, 12),  # last batch of 1: replicas without a sample
    "14by3": (14, 3),  # fewer samples than 4 replicas or 8 micro-batches
}

SPLITS = {f"K{k}": {"gradient_accumulation_steps": k} for k in (1, 2, 3, 8)}
SPLITS |= {f"b{b}": {"micro_batch_size": b} for b in (1, 3)}

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.PiecewiseConstantDecay([2, 5], [0.02, 0.01, 0.005]),
        weight_decay=0.02,
        use_ema=True,
        ema_momentum=0.9,
        global_clipnorm=0.2,
    ),
    "clipnorm": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.RMSprop(
        keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.7), clipvalue=0.02
    ),
}
# Not crossed with all else: what it does is up to the optimizer alone.
EMA_OVERWRITES = {
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3)
}


# --- Features ----------------------------------------------------------------


@dataclasses.dataclass
class Feature:
    """A model and what it is trained on.

    Attributes:
        graph: Function that returns the inputs and outputs of the model.
        x: Inputs.
        y: Targets.
        sample_weight: For `fit` and `evaluate`.
        compile: Function that returns the keyword arguments of `compile`.
        overrides: Class with the methods that a user's model overrides.
        class_weight: For `fit`.
    """

    graph: Callable
    x: object
    y: object
    sample_weight: object = None
    compile: Callable = lambda: {
        "loss": "mse",
        "metrics": ["mae"],
        "weighted_metrics": [keras.metrics.MeanSquaredError(name="weighted_mse")],
    }
    overrides: type | None = None
    class_weight: dict | None = None

    def model(self, base, **options):
        cls = base if self.overrides is None else type("Net", (self.overrides, base), {})
        return cls(*self.graph(), **options)


FEATURES = {}


def feature(function):
    FEATURES[function.__name__] = function
    return function


def dense_graph(*between, features=3, outputs=2, **options):
    x = h = keras.Input((features,))
    for layer in (layers.Dense(4, "tanh", **options), *between, layers.Dense(outputs)):
        h = layer(h)
    return x, h


def regression(rng, n, **fields):
    fields.setdefault("graph", dense_graph)
    return Feature(x=rng.normal(size=(n, 3)), y=rng.normal(size=(n, 2)), **fields)


def tokens_of(rng, n, length=5, vocabulary=7):
    """Tokens padded with zeros; every fifth sample is all padding."""
    lengths = rng.integers(1, length + 1, size=n)
    lengths[::5] = 0
    padding = np.arange(length) >= lengths[:, np.newaxis]
    return np.where(padding, 0, rng.integers(1, vocabulary, size=(n, length)))


def tagger_graph(vocabulary=7):
    x = keras.Input((5,), dtype="int32")
    return x, layers.Dense(2)(layers.Embedding(vocabulary, 3, mask_zero=True)(x))


def weights_of(rng, *shape):
    """Sample weights, a third of them zero."""
    return rng.uniform(0.2, 2.0, size=shape) * (rng.uniform(size=shape) > 1 / 3)


@feature
def plain(rng, n):
    return regression(rng, n)


@feature
def sample_weight(rng, n):
    return regression(rng, n, sample_weight=rng.uniform(0.2, 2.0, size=n))


@feature
def zero_weights(rng, n):
    return regression(rng, n, sample_weight=weights_of(rng, n))


@feature
def class_weight(rng, n):
    def compile_arguments():
        return {
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "metrics": ["accuracy"],
            "weighted_metrics": [keras.metrics.SparseCategoricalAccuracy(name="weighted")],
        }

    return Feature(
        graph=functools.partial(dense_graph, outputs=3),
        x=rng.normal(size=(n, 3)),
        y=rng.integers(0, 3, size=n),
        compile=compile_arguments,
        class_weight={0: 1.0, 1: 0.3, 2: 2.5},
    )


@feature
def embedding_mask(rng, n):
    return Feature(tagger_graph, tokens_of(rng, n), rng.normal(size=(n, 5, 2)))


@feature
def masking_layer(rng, n):
    def graph():
        x = keras.Input((4, 3))
        h = layers.SimpleRNN(3, return_sequences=True)(layers.Masking()(x))
        return x, layers.Dense(2)(h)

    x = rng.normal(size=(n, 4, 3)) * (tokens_of(rng, n, length=4) > 0)[..., np.newaxis]
    return Feature(graph, x, rng.normal(size=(n, 4, 2)), sample_weight=rng.uniform(size=(n, 4)))


def two_taggers():
    inputs = [keras.Input((5,), dtype="int32", name=name) for name in ("s", "t")]
    outputs = [
        layers.Dense(size, name=name)(layers.Embedding(7, 3, mask_zero=True)(x))
        for x, size, name in zip(inputs, (2, 1), ("a", "b"), strict=True)
    ]
    return inputs, outputs


def two_outputs_arguments():
    return {
        "loss": ["mse", keras.losses.Huber()],
        "loss_weights": [0.3, 2.0],
        "metrics": [["mae"], ["mse"]],
        "weighted_metrics": [[keras.metrics.MeanSquaredError(name="weighted")], []],
    }


@feature
def two_outputs(rng, n):
    return Feature(
        two_taggers,
        [tokens_of(rng, n), tokens_of(rng, n)],
        [rng.normal(size=(n, 5, 2)), rng.normal(size=(n, 5, 1))],
        compile=two_outputs_arguments,
    )


@feature
def two_outputs_weighted(rng, n):
    weighted = two_outputs(rng, n)
    # Keras wants (samples, 1) where there is a mask.
    weighted.sample_weight = [weights_of(rng, n, 5), weights_of(rng, n, 1)]
    return weighted


def reduced(rng, n, reduction, **fields):
    return regression(
        rng,
        n,
        compile=lambda: {
            "loss": keras.losses.MeanSquaredError(reduction=reduction),
            "metrics": ["mae"],
        },
        **fields,
    )


@feature
def sum_reduction(rng, n):
    return reduced(rng, n, "sum", sample_weight=rng.uniform(size=n))


@feature
def sum_reduction_masked(rng, n):
    def compile_arguments():
        return {"loss": keras.losses.MeanAbsoluteError(reduction="sum"), "metrics": ["mae"]}

    masked = embedding_mask(rng, n)
    masked.compile = compile_arguments
    return masked


@feature
def mean_reduction(rng, n):
    return reduced(rng, n, "mean", sample_weight=weights_of(rng, n))


@feature
def mean_with_sample_weight(rng, n):
    return reduced(rng, n, "mean_with_sample_weight", sample_weight=weights_of(rng, n))


@feature
def mean_with_sample_weight_masked(rng, n):
    def compile_arguments():
        loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
        return {"loss": loss, "weighted_metrics": ["mae"]}

    masked = embedding_mask(rng, n)
    masked.compile, masked.sample_weight = compile_arguments, weights_of(rng, n, 5)
    return masked


@feature
def scalar_loss(rng, n):
    def loss(y, y_pred):
        return keras.ops.mean(keras.ops.log(keras.ops.cosh(y - y_pred)))

    return regression(rng, n, compile=lambda: {"loss": loss, "metrics": ["mae"]})


class Penalized(layers.Layer):
    """Adds a mean over samples to the loss."""

    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.sqrt(keras.ops.square(x) + 1.0)))
        return x


@feature
def add_loss(rng, n):
    return regression(rng, n, graph=lambda: dense_graph(Penalized()))


@feature
def activity_regularizer(rng, n):
    return regression(
        rng, n, graph=lambda: dense_graph(activity_regularizer=keras.regularizers.L2(0.05))
    )


@feature
def weight_regularizer(rng, n):
    return regression(
        rng,
        n,
        graph=lambda: dense_graph(
            kernel_regularizer=keras.regularizers.L1L2(0.01, 0.05),
            bias_regularizer=keras.regularizers.L2(0.1),
        ),
        sample_weight=weights_of(rng, n),
    )


@feature
def sparse_gradient(rng, n):
    def graph():
        x = keras.Input((5,), dtype="int32")
        return x, layers.Dense(2)(layers.GlobalAveragePooling1D()(layers.Embedding(6, 3)(x)))

    return Feature(graph, rng.integers(0, 5, size=(n, 5)), rng.normal(size=(n, 2)))


@feature
def frozen_layer(rng, n):
    return regression(rng, n, graph=lambda: dense_graph(layers.Dense(4, "tanh", trainable=False)))


class Unused(layers.Layer):
    """Has a weight that its output does not depend on."""

    def build(self, shape):
        self.add_weight(shape=(2, 2), name="unused")

    def call(self, x):
        return 1.5 * x


@feature
def no_gradient(rng, n):
    return regression(rng, n, graph=lambda: dense_graph(Unused()))


class WithLoss:
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        positive = keras.ops.cast(x[:, :1] > 0, y_pred.dtype)
        own = keras.ops.mean(keras.ops.square(y - y_pred) * positive)
        compiled = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        return own + 0.5 * compiled


@feature
def compute_loss(rng, n):
    return regression(rng, n, overrides=WithLoss, sample_weight=weights_of(rng, n))


class WithTokenLoss:
    """A mean over valid tokens, as a language model's."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        losses = keras.ops.sum(keras.ops.square(y - y_pred), -1) * keras.ops.cast(x > 0, "float64")
        # Of a micro-batch without tokens, this is no number.
        return keras.ops.sum(losses) / self.loss_denominator(x, y, y_pred, sample_weight)

    def loss_denominator(self, x, y, y_pred, sample_weight):
        return keras.ops.sum(keras.ops.cast(x > 0, "float64"))


@feature
def loss_denominator(rng, n):
    masked = embedding_mask(rng, n)
    masked.overrides = WithTokenLoss
    masked.compile = lambda: {"loss": None, "metrics": ["mae"]}
    return masked


class WithMetrics:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.largest = keras.metrics.Mean(name="largest")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.largest.update_state(keras.ops.max(keras.ops.abs(y - y_pred), -1), sample_weight)
        return super().compute_metrics(x, y, y_pred, sample_weight)


@feature
def compute_metrics(rng, n):
    return regression(rng, n, overrides=WithMetrics, sample_weight=weights_of(rng, n))


@feature
def nested_dicts(rng, n):
    def graph():
        x = {"u": keras.Input((3,), name="u"), "v": {"w": keras.Input((2,), name="w")}}
        h = layers.Dense(3, "tanh")(layers.Concatenate()([x["u"], x["v"]["w"]]))
        return x, {"p": layers.Dense(2, name="p")(h), "q": layers.Dense(1, name="q")(h)}

    def compile_arguments():
        return {
            "loss": {"p": "mse", "q": keras.losses.LogCosh(reduction="sum")},
            "loss_weights": {"p": 0.7, "q": 0.2},
            "metrics": {"p": ["mae"], "q": ["mse"]},
        }

    return Feature(
        graph,
        {"u": rng.normal(size=(n, 3)), "v": {"w": rng.normal(size=(n, 2))}},
        {"p": rng.normal(size=(n, 2)), "q": rng.normal(size=(n, 1))},
        sample_weight={"p": weights_of(rng, n), "q": rng.uniform(size=n)},
        compile=compile_arguments,
    )


# Tables that are looked up otherwise than by the tokens of a sample. Optimizers that square
# gradients see which look-ups share a row; SGD does not.


class Positions(layers.Layer):
    """Adds an embedding of each position, as the transformers of keras.io do."""

    def __init__(self, length=None, **kwargs):
        super().__init__(**kwargs)
        self.length = length
        self.table = layers.Embedding(9, 3)

    def build(self, shape):
        self.table.build(None)

    def call(self, x):
        length = keras.ops.shape(x)[1] if self.length is None else self.length
        return x + self.table(keras.ops.arange(0, length))


def token_graph(*between, length=5):
    x = keras.Input((length,), dtype="int32")
    h = layers.Embedding(6, 3)(x)
    for layer in between:
        h = layer(h)
    return x, layers.Dense(2)(keras.ops.tanh(h))


def sequences(rng, n, graph):
    return Feature(graph, rng.integers(0, 6, size=(n, 5)), rng.normal(size=(n, 5, 2)))


@feature
def position_table(rng, n):
    return sequences(rng, n, lambda: token_graph(Positions(5)))


@feature
def position_table_of_any_length(rng, n):
    return sequences(rng, n, lambda: token_graph(Positions(), length=None))


class RelativeBias(layers.Layer):
    """Mixes positions by a table of one value for each distance, as Swin and T5 do."""

    def build(self, shape):
        self.bias = self.add_weight(shape=(4, 1), name="bias")
        distance = np.abs(np.arange(5)[:, np.newaxis] - np.arange(5))
        self.distances = np.minimum(distance, 3)

    def call(self, x):
        weights = keras.ops.take(self.bias, self.distances, axis=0)[..., 0]
        return keras.ops.einsum("ij,bjd->bid", weights, x)


@feature
def constant_look_up(rng, n):
    return sequences(rng, n, lambda: token_graph(RelativeBias()))


class SharedTable(layers.Layer):
    """One table for tokens, for positions and for a token that starts each sample."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(9, 3)

    def build(self, shape):
        self.table.build(None)

    def call(self, x):
        start = keras.ops.full_like(x[:, :1], 8)
        return self.table(x) + self.table(keras.ops.arange(5)) * 2.0 + self.table(start)


@feature
def shared_table(rng, n):
    def graph():
        x = keras.Input((5,), dtype="int32")
        return x, layers.Dense(2)(keras.ops.tanh(SharedTable()(x)))

    return sequences(rng, n, graph)


def columns_of(rng, n, columns=8):
    """A `tf.SparseTensor` of shape (n, columns); every fifth sample is empty."""
    dense = rng.normal(size=(n, columns)) * (rng.uniform(size=(n, columns)) > 0.7)
    dense[::5] = 0
    return tf.sparse.from_dense(dense)


@feature
def sparse_input(rng, n):
    def graph():
        x = keras.Input((8,), sparse=True)
        return x, layers.Dense(2)(layers.Dense(4, "tanh")(x))

    return Feature(graph, columns_of(rng, n), rng.normal(size=(n, 2)))


class VectorPenalty(layers.Layer):
    """Adds one value for each sample to the loss, as keras.io's CTC layer does."""

    def call(self, x):
        self.add_loss(0.1 * keras.ops.sum(keras.ops.square(x), axis=-1))
        return x


@feature
def vector_add_loss(rng, n):
    return regression(rng, n, graph=lambda: dense_graph(VectorPenalty()))


# --- Combinations ------------------------------------------------------------


COMBINATIONS = pairwise(
    feature=FEATURES, split=SPLITS, optimizer=OPTIMIZERS, batch=BATCHES, strategy=STRATEGIES
)
COMBINATIONS += [("plain", "K2", "ema", "37by8", strategy) for strategy in STRATEGIES]

LOOK_UPS = ("position_table", "position_table_of_any_length", "constant_look_up", "shared_table")
LOOK_UPS += ("sparse_input", "sparse_gradient", "vector_add_loss")
ADAPTIVE = {
    "plain_sgd": lambda: keras.optimizers.SGD(0.05),
    "adam": OPTIMIZERS["adam"],
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "muon": lambda: keras.optimizers.Muon(0.02),
}
COMBINATIONS += pairwise(
    feature=LOOK_UPS,
    split=("K1", "K3", "b3"),
    optimizer=ADAPTIVE,
    batch=("37by10", "37by12", "14by3"),
    strategy=STRATEGIES,
)
COMBINATIONS = list(dict.fromkeys(COMBINATIONS))
# tf.data hands no replica a sparse batch of no samples: the row runs on one device, and on four
# replicas with batches that leave none empty.
SPARSE_ON_FOUR = [
    r for r in COMBINATIONS if r[0] == "sparse_input" and r[4] == "mirrored_4" and r[3] != "64by32"
]
COMBINATIONS = [r for r in COMBINATIONS if r not in SPARSE_ON_FOUR]
COMBINATIONS += [
    (*r[:3], *rest)
    for r in SPARSE_ON_FOUR
    for rest in ((r[3], "default"), ("64by32", "mirrored_4"))
]
COMBINATIONS = list(dict.fromkeys(COMBINATIONS))


def test_combinations_hold_every_pair():
    rows = set(COMBINATIONS)
    dimensions = (FEATURES, SPLITS, OPTIMIZERS, BATCHES, STRATEGIES)
    for (i, a), (j, b) in itertools.combinations(enumerate(dimensions), 2):
        assert {(row[i], row[j]) for row in rows} >= set(itertools.product(a, b))


def in_ordinary_runs():
    """Rows with all values of each dimension on each strategy; the others are slow tests.

    Features take turns: each is trained by default, and on two replicas or on four.
    OneDeviceStrategy takes the way of the default strategy, and meets all splits alone.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(FEATURES))}
    seen, rows = set(), []
    for row in COMBINATIONS:
        strategy = row[4]
        has_turn = {
            "default": True,
            "one_device": False,
            "mirrored_2": places[row[0]] % 2 == 0,
            "mirrored_4": places[row[0]] % 2 == 1,
        }[strategy]
        dimensions = {"one_device": [1]}.get(strategy, [0, 1, 2, 3] if has_turn else [1, 2, 3])
        values = {(strategy, i, row[i]) for i in dimensions}
        if values - seen:
            rows.append(row)
            seen |= values
    return rows


ORDINARY = in_ordinary_runs()

# For the oldest supported Keras: each feature once, with one split or another.
CORE = [row for row in ORDINARY if row[4] != "mirrored_4"]
CORE = [next(r for r in CORE[i::7] + CORE if r[0] == f) for i, f in enumerate(FEATURES)]


def marks_of(row):
    if row in CORE:
        return [pytest.mark.core]
    return [] if row in ORDINARY else [pytest.mark.slow]


# --- Training ----------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What training leaves: each a list or dictionary of arrays."""

    weights: list
    optimizer: list
    history: dict
    evaluation: dict

    def deviation(self, other):
        """The largest absolute deviation from another result."""
        structures = [dataclasses.asdict(r) for r in (self, other)]
        keras.tree.assert_same_structure(*structures)
        leaves = [keras.tree.flatten(s) for s in structures]
        for a, b in zip(*leaves, strict=True):
            assert np.shape(a) == np.shape(b)
            assert np.all(np.isfinite(a))
        return max(
            float(np.max(np.abs(np.subtract(a, b)), initial=0))
            for a, b in zip(*leaves, strict=True)
        )


def initialize(model):
    """Gives every weight a value that depends on nothing but its place and shape."""
    rng = np.random.default_rng(1)
    model.set_weights([0.5 * rng.normal(size=w.shape) for w in model.get_weights()])


def train(base, feature, optimizer, batch, **options):
    samples, batch_size = BATCHES[batch]
    data = FEATURES[feature](np.random.default_rng(0), samples)
    model = data.model(base, **options)
    model.compile((OPTIMIZERS | EMA_OVERWRITES | ADAPTIVE)[optimizer](), **data.compile())
    initialize(model)
    arguments = {
        "x": data.x,
        "y": data.y,
        "sample_weight": data.sample_weight,
        "batch_size": batch_size,
        "verbose": 0,
    }
    history = model.fit(
        **arguments, epochs=EPOCHS, shuffle=False, class_weight=data.class_weight
    ).history
    for variable in [*model.weights, *model.optimizer.variables]:
        # Reading a mirrored variable shows replica 0 alone.
        first, *others = model.distribute_strategy.experimental_local_results(variable.value)
        for other in others:
            np.testing.assert_array_equal(first.numpy(), other.numpy(), variable.path)
    return Result(
        model.get_weights(),
        [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables],
        history,
        model.evaluate(**arguments, return_dict=True),
    )


@functools.cache
def trained_by_keras(feature, optimizer, batch):
    return train(keras.Model, feature, optimizer, batch)


def report(deviation, **parameters):
    if path := os.environ.get("TFBIG_EXACTNESS_REPORT"):
        with open(path, "a") as file:
            print(json.dumps(parameters | {"deviation": deviation}), file=file)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    ("feature", "split", "optimizer", "batch", "strategy"),
    [pytest.param(*row, marks=marks_of(row), id="-".join(row)) for row in COMBINATIONS],
)
def test_split_batch_trains_as_the_whole_batch_in_keras(feature, split, optimizer, batch, strategy):
    expected = trained_by_keras(feature, optimizer, batch)
    with make_strategy(strategy).scope():
        result = train(tfbig.Model, feature, optimizer, batch, **SPLITS[split])
    deviation = result.deviation(expected)
    report(
        deviation, feature=feature, split=split, optimizer=optimizer, batch=batch, strategy=strategy
    )
    assert deviation < TOLERANCE


# --- Properties --------------------------------------------------------------

# The fixtures set what is the same for all examples.
PROPERTY = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def update():
    """A function that makes one update of a fresh model on one batch.

    It keeps one compiled model for each set of options, since tracing is what takes
    time, and puts its variables back before each update.
    """

    @functools.cache
    def compiled(**options):
        model = tfbig.Model(*dense_graph(), **options)
        # A power of two: both sides of a comparison round it the same.
        model.compile(keras.optimizers.Adam(2.0**-6, global_clipnorm=0.5), "mse")
        model.optimizer.build(model.trainable_variables)
        return model, [v.numpy() for v in model.optimizer.variables]

    def run(x, y, sample_weight=None, **options):
        model, state = compiled(**options)
        for variable, value in zip(model.optimizer.variables, state, strict=True):
            variable.assign(value)
        initialize(model)
        model.train_on_batch(x, y, sample_weight)
        assert int(model.optimizer.iterations.numpy()) == 1
        return model.get_weights()

    return run


def batch(samples, dtype="float64"):
    rng = np.random.default_rng(samples)
    shapes = ((samples, 3), (samples, 2), (samples,))
    return [np.abs(rng.normal(size=shape)).astype(dtype) for shape in shapes]


def largest_deviation(weights, others):
    return max(float(np.max(np.abs(a - b))) for a, b in zip(weights, others, strict=True))


splits = st.sampled_from(["gradient_accumulation_steps", "micro_batch_size"]).flatmap(
    lambda name: st.integers(2, 7).map(lambda value: {name: value})
)


@pytest.mark.core
@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger")
def test_any_split_of_any_batch_equals_no_split(update):
    @PROPERTY
    @given(samples=st.integers(1, 20), split=splits)
    def equal(samples, split):
        data = batch(samples)
        assert largest_deviation(update(*data, **split), update(*data)) < TOLERANCE

    equal()


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger")
def test_order_of_samples_in_a_batch_changes_nothing(update):
    @PROPERTY
    @given(order=st.integers(1, 13).flatmap(lambda n: st.permutations(range(n))))
    def equal(order):
        data = batch(len(order))
        shuffled = [a[list(order)] for a in data]
        split = {"gradient_accumulation_steps": 3}
        assert largest_deviation(update(*data, **split), update(*shuffled, **split)) < TOLERANCE

    equal()


@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger")
def test_fixed_loss_scale_that_is_a_power_of_two_changes_no_bit(update):
    @PROPERTY
    @given(
        samples=st.integers(1, 13),
        exponent=st.sampled_from([-20, -1, 0, 3, 15, 30]),
        steps=st.sampled_from([1, 3]),
    )
    def equal(samples, exponent, steps):
        data = batch(samples, "float32")
        options = {"gradient_accumulation_steps": steps}
        scaled = update(*data, loss_scale=2.0**exponent, **options)
        unscaled = update(*data, loss_scale=None, **options)
        assert largest_deviation(scaled, unscaled) == 0

    equal()


# --- The Keras model itself --------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("strategy", ["default", "one_device"])
@pytest.mark.parametrize("kind", ["Model", "Sequential"])
def test_uncut_on_one_device_is_the_keras_model_to_the_bit(kind, strategy):
    def trained(base):
        keras.utils.set_random_seed(7)
        with make_strategy(strategy).scope():
            stack = [
                keras.Input((3,)),
                layers.Dense(8, "relu"),
                layers.BatchNormalization(),
                layers.Dropout(0.3),
                layers.Dense(2),
            ]
            if kind == "Sequential":
                model = base(stack)
            else:
                h = x = stack[0]
                for layer in stack[1:]:
                    h = layer(h)
                model = base(x, h)
            model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
        x, y, sample_weight = batch(37, "float32")
        history = model.fit(
            x,
            y,
            batch_size=8,
            epochs=2,
            sample_weight=sample_weight,
            validation_data=(x[:9], y[:9]),
            verbose=0,
        ).history
        return model.get_weights(), history, model.predict(x, verbose=0)

    expected, result = (trained(getattr(library, kind)) for library in (keras, tfbig))
    keras.tree.assert_same_structure(result, expected)
    for actual, wanted in zip(*map(keras.tree.flatten, (result, expected)), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_subclass_made_from_inputs_leaves_other_subclasses_alone():
    class FromInputs(tfbig.Model):
        pass

    class WithCall(tfbig.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    bases = tfbig.Model.__bases__
    FromInputs(*dense_graph())
    assert tfbig.Model.__bases__ == bases
    # What a user would see; it also tells if an earlier test changed the class.
    assert WithCall()(np.ones((4, 3), "float32")).shape == (4, 2)
