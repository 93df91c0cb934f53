"""`head_chunk_size`: the last layer and the loss of a few tokens at a time change no number."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import errors
from tfbig._keras import head_call, matrix_product, memory, variables
from tfbig._keras.sharded_variable import ShardedWeight
from tfbig.distribute import Pipeline, _sharded_weights

# The order of sums differs, nothing else.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
SAMPLES, LENGTH, VOCABULARY = 22, 5, 13
TOKENS = RNG.integers(1, VOCABULARY, (SAMPLES, LENGTH))
TOKENS[:, 3:] *= RNG.integers(0, 2, (SAMPLES, 1))  # Padding.
NEXT = RNG.integers(0, VOCABULARY, (SAMPLES, LENGTH))
WEIGHTS = RNG.uniform(0, 2, (SAMPLES, LENGTH)) * RNG.integers(0, 2, (SAMPLES, LENGTH))
SIZES = RNG.normal(size=(SAMPLES, LENGTH, 2))
CLASSES = keras.utils.to_categorical(NEXT[:, 0], VOCABULARY)


# --- Programs ----------------------------------------------------------------------------


def body(x, mask_zero=False):
    embedding = layers.Embedding(VOCABULARY, 6, mask_zero=mask_zero)
    h = embedding(x)
    return h + layers.Dense(6, "tanh")(h)


def dense(cls, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    return cls(x, layers.Dense(VOCABULARY)(body(x, mask_zero=True)), **options)


def tied(cls, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    embedding = layers.ReversibleEmbedding(VOCABULARY, 6, logit_soft_cap=3.0)
    h = embedding(x)
    h = h + layers.Dense(6, "gelu")(h)
    return cls(x, embedding(h, reverse=True), **options)


def untied(cls, **options):
    # A length that is not known, and a layer of the head's kind inside.
    x = keras.Input((None,), dtype="int32")
    embedding = layers.ReversibleEmbedding(VOCABULARY, 6, tie_weights=False)
    return cls(x, embedding(layers.Dense(6, "relu")(embedding(x)), reverse=True), **options)


def classifier(cls, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(body(x))
    return cls(x, layers.Dense(VOCABULARY, "softmax", use_bias=False)(h), **options)


def two_outputs(cls, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    h = body(x, mask_zero=True)
    word = layers.Dense(VOCABULARY, name="word")(h)
    size = layers.Dense(2, name="size", kernel_regularizer="l2")(h)
    return cls(x, {"word": word, "size": size}, **options)


def frozen(cls, **options):
    model = dense(cls, **options)
    model.layers[-1].trainable = False
    return model


class Subclassed:
    """Its layers are called in `call`, the last one of them twice."""

    def __init__(self, **options):
        super().__init__(**options)
        self.embedding = layers.Embedding(VOCABULARY, 6)
        self.last = layers.Dense(VOCABULARY)
        self.back = layers.Dense(6)

    def call(self, x):
        h = self.embedding(x)
        return self.last(h + self.back(self.last(h)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **_):
        values = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
        return keras.ops.mean(keras.ops.sum(values(y, y_pred) * sample_weight, axis=-1))


class Weighted:
    """How much a token counts in its loss is learned, too."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.importance = self.add_weight(shape=(LENGTH,), name="importance")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        weight = sample_weight * keras.ops.softplus(self.importance)
        return super().compute_loss(x, y, y_pred, weight, training)


def weighted(cls, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    cls = type("Net", (Weighted, cls), {})
    return cls(x, layers.Dense(VOCABULARY)(body(x, mask_zero=True)), **options)


def subclassed(cls, **options):
    model = type("Net", (Subclassed, cls), {})(**options)
    model(TOKENS[:2])
    return model


def crossentropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


# A model, its targets and sample weights, and the arguments of `compile`.
PROGRAMS = {
    "dense": lambda: (dense, NEXT, None, {"loss": crossentropy(), "metrics": ["accuracy"]}),
    "dense, weighted": lambda: (
        dense,
        NEXT,
        WEIGHTS,
        {
            "loss": crossentropy(reduction="mean_with_sample_weight"),
            "weighted_metrics": [
                keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
                "accuracy",
            ],
        },
    ),
    "tied": lambda: (
        tied,
        NEXT[..., np.newaxis],
        WEIGHTS[:, :1],
        {"loss": crossentropy(reduction="sum"), "metrics": ["accuracy"]},
    ),
    "untied": lambda: (untied, NEXT - 1, None, {"loss": crossentropy(ignore_class=-1)}),
    "classifier": lambda: (
        classifier,
        CLASSES,
        WEIGHTS[:, 0],
        {
            "loss": keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
            "metrics": ["accuracy"],
        },
    ),
    "two outputs": lambda: (
        two_outputs,
        {"word": NEXT, "size": SIZES},
        {"word": WEIGHTS, "size": WEIGHTS},
        {
            "loss": {"word": crossentropy(), "size": "mse"},
            "loss_weights": {"word": 0.7, "size": 0.2},
            "metrics": {"word": ["accuracy"], "size": ["mae"]},
        },
    ),
    "frozen": lambda: (frozen, NEXT, None, {"loss": crossentropy()}),
    "weighted": lambda: (weighted, NEXT, WEIGHTS, {"loss": crossentropy()}),
    "subclassed": lambda: (subclassed, NEXT, WEIGHTS, {"loss": None}),
}

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.5, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1, global_clipnorm=0.1),
}


def trained(program, cls, optimizer="sgd", strategy="default", **options):
    """A model after two epochs, with its history and evaluation."""
    make, y, weights, settings = PROGRAMS[program]()
    rng = np.random.default_rng(1)
    with make_strategy(strategy).scope():
        model = make(cls, **options)
        model.set_weights([rng.normal(size=w.shape) / 3 for w in model.get_weights()])
        model.compile(OPTIMIZERS[optimizer](), **{"jit_compile": False, **settings})
    data = {"x": TOKENS, "y": y, "sample_weight": weights, "batch_size": 8, "verbose": 0}
    history = model.fit(**data, epochs=2, shuffle=False).history
    for name in ("loss_scale", "skipped_updates", "grad_norm"):
        history.pop(name, None)
    return model, history, model.evaluate(**data, return_dict=True)


def assert_same(found, expected):
    model, history, evaluation = found
    plain, expected_history, expected_evaluation = expected
    assert history.keys() == expected_history.keys()
    for a, b in [
        (model.get_weights(), plain.get_weights()),
        *((variables.values_of(m.optimizer.variables) for m in (model, plain)),),
        *((history[k], v) for k, v in expected_history.items()),
        *((evaluation[k], v) for k, v in expected_evaluation.items()),
        *((keras.tree.flatten(m.predict(TOKENS, verbose=0)) for m in (model, plain)),),
    ]:
        keras.tree.map_structure(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE), a, b
        )


WAYS = {
    "whole": {},
    "split": {"gradient_accumulation_steps": 3},
    "recomputed": {"micro_batch_size": 3, "recompute": True},
    "scaled": {"gradient_accumulation_steps": 2, "loss_scale": 1024.0, "log_grad_norm": True},
    "mirrored": {"strategy": "mirrored_2", "micro_batch_size": 3},
    "shard": {"strategy": "mirrored_2", "micro_batch_size": 2, "shard": "weights"},
    "staged": {"gradient_accumulation_steps": 3, "pipeline": Pipeline(["CPU:0", "CPU:1"])},
}


@pytest.mark.usefixtures("float64")
@in_turn({"program": list(PROGRAMS), "way": list(WAYS)})
def test_trains_as_plain_keras(program, way, monkeypatch):
    if program in ("subclassed", "weighted") and way == "staged":
        pytest.skip("a subclassed model, or a weight outside of layers, is not cut by itself")
    monkeypatch.setattr(_sharded_weights, "SMALLEST", 1)
    # So that gradients of this size are computed in parts, too.
    monkeypatch.setattr(matrix_product, "_PART", 150)
    # The optimizers take turns, also among the combinations of the ordinary run.
    number = list(PROGRAMS).index(program) // 2 + list(WAYS).index(way) + 1
    optimizer = list(OPTIMIZERS)[number % 2]
    found = trained(program, tfbig.Model, optimizer, head_chunk_size=4, **WAYS[way])
    if way == "shard":
        assert any(isinstance(v, ShardedWeight) for v in found[0].weights)
    assert_same(found, trained(program, keras.Model, optimizer))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_that_round_to_zero_have_the_gradient_of_their_logits(activation):
    sparse = activation == "softmax"
    loss = "sparse_categorical_crossentropy" if sparse else "binary_crossentropy"
    y = NEXT if sparse else keras.utils.to_categorical(NEXT, VOCABULARY)

    def train(cls, **options):
        x = keras.Input((LENGTH,), dtype="int32")
        model = cls(x, layers.Dense(VOCABULARY, activation)(body(x)), **options)
        rng = np.random.default_rng(1)
        model.set_weights([10 * rng.normal(size=w.shape) for w in model.get_weights()])
        model.compile(OPTIMIZERS["adamw"](), loss, metrics=[loss, "accuracy"], jit_compile=False)
        data = {"x": TOKENS, "y": y, "batch_size": 8, "verbose": 0}
        history = model.fit(**data, shuffle=False).history
        return model, history, model.evaluate(**data, return_dict=True)

    expected = train(keras.Model)
    assert np.any(expected[0].predict(TOKENS, verbose=0) < keras.config.epsilon())
    for options in ({}, {"micro_batch_size": 3, "recompute": True}):
        assert_same(train(tfbig.Model, head_chunk_size=4, **options), expected)


# --- Other floating-point numbers -----------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "rounding"),
    [
        ("mixed_float16", 2.0**-11),
        pytest.param("mixed_bfloat16", 2.0**-8, marks=pytest.mark.slow),
    ],
)
def test_is_as_near_to_float32_as_without_it(policy, rounding):
    def losses(policy, size=None):
        keras.mixed_precision.set_dtype_policy(policy)
        try:
            options = {"gradient_accumulation_steps": 2, "head_chunk_size": size}
            return np.array(trained("tied", tfbig.Model, **options)[1]["loss"])
        finally:
            keras.mixed_precision.set_dtype_policy("float32")

    expected = losses("float32")
    whole, chunked = (np.abs(losses(policy, size) / expected - 1) for size in (None, 4))
    assert np.all(chunked <= whole + rounding)


# --- What it is for ---------------------------------------------------------------------------


def update_of(vocabulary, tokens, width, **options):
    """A function that makes an update of a last layer alone."""
    x = keras.Input((None, width))
    model = tfbig.Model(x, layers.Dense(vocabulary, use_bias=False)(x), **options)
    model.compile("sgd", crossentropy(), weighted_metrics=["accuracy"], jit_compile=False)
    x = tf.constant(RNG.normal(size=(4, tokens // 4, width)).astype("float32"))
    y = tf.constant(RNG.integers(0, vocabulary, (4, tokens // 4)))

    def update():
        model.train_on_batch(x, y)

    update()
    return update


def test_takes_a_tenth_of_the_memory():
    meter = memory.Meter(["CPU:0"])
    whole = meter(update_of(20_000, 1024, 32))
    chunked = meter(update_of(20_000, 1024, 32, head_chunk_size=32))
    assert chunked < whole / 10


def test_a_chunk_has_one_tensor_of_its_size_at_a_time():
    found = memory.Meter(["CPU:0"])(update_of(20_000, 1024, 256, head_chunk_size=128))
    # The gradient of the weights is as large as two chunks of logits. If it were computed as a
    # whole, and the metric and the loss at the same time, this would be 7.8 or more. The allocator
    # gives out pieces that are larger than asked for.
    chunk = 4 * 20_000 * 128
    assert found < 6 * chunk, found / chunk


def test_the_loss_of_a_chunk_waits_for_its_metrics():
    """Whose tensors are then gone when its gradient, the largest, is there."""
    layer = layers.Dense(5)
    layer.build((None, 3))

    def loss(y_true, y_pred):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)

    def before(op):
        found, left = set(), [op]
        while left:
            op = left.pop()
            new = {*op.control_inputs, *(tensor.op for tensor in op.inputs)} - found
            found |= new
            left += new
        return found

    @tf.function(autograph=False)
    def computed():
        inputs, targets = tf.zeros([4, 3]), tf.zeros([4], tf.int32)
        call = head_call.HeadCall(layer, inputs, (), {}, None, 4, False)
        accuracy = keras.metrics.sparse_categorical_accuracy
        functions = [
            head_call.TokenFunction(f, targets, tf.float32) for f in (loss, accuracy, accuracy)
        ]
        weights = [tf.identity(v) for v in layer.variables]
        values = call._computed(inputs, weights, functions, [targets] * 3)
        (of_loss,) = (
            op
            for op in tf.compat.v1.get_default_graph().get_operations()
            if op.type == "SparseSoftmaxCrossEntropyWithLogits"
        )
        assert {values[1].op, values[2].op} <= before(of_loss)
        assert values[2].op in before(values[1].op)

    computed()


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (1, 9), (5, 5)])
@pytest.mark.parametrize("size", [1, 24, 100])
@pytest.mark.parametrize("is_cast", [False, True])
def test_a_product_is_computed_in_parts(shape, size, is_cast, monkeypatch):
    monkeypatch.setattr(matrix_product, "_PART", size)
    a, b = (RNG.normal(size=(4, n)) for n in shape)

    @tf.function
    def product(a, b):
        whole = tf.matmul(a, b, transpose_a=True)
        whole = tf.cast(whole, "float32") if is_cast else whole
        parts, axis = matrix_product.parts_of(whole)
        rows = max(1, size // (whole.dtype.size * min(shape)))
        assert len(parts) == -(-max(shape) // rows)
        return matrix_product.joined([part() for part in parts], axis)

    found = product(tf.constant(a), tf.constant(b))
    np.testing.assert_allclose(found, a.T @ b, rtol=0, atol=1e-5 if is_cast else 1e-14)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_what_is_no_such_product_is_one_part(shape):
    @tf.function
    def whole(a, b):
        for tensor in (a, tf.matmul(a, b), tf.matmul(b, a, transpose_a=True, transpose_b=True)):
            (part,), axis = matrix_product.parts_of(tensor)
            assert matrix_product.joined([part()], axis) is tensor

    whole(tf.zeros(shape), tf.zeros(shape[::-1]))


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 100, 128])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_metric_takes_a_chunk_in_pieces(length, is_known):
    predictions = RNG.normal(size=(length, 3))
    targets = RNG.integers(0, 3, length)
    largest = []

    def accuracy(y_true, y_pred):
        largest.append(y_pred.shape[0])
        return keras.metrics.sparse_categorical_accuracy(y_true, y_pred)

    shapes = [[length if is_known else None], [length if is_known else None, 3]]
    types = [tf.int64, tf.float64]

    @tf.function(input_signature=[tf.TensorSpec(*pair) for pair in zip(shapes, types, strict=True)])
    def values(targets, predictions):
        function = head_call.TokenFunction(accuracy, targets, tf.float64)
        return head_call._values_in_pieces(function, targets, predictions)

    found = values(targets, predictions)
    np.testing.assert_array_equal(found, targets == predictions.argmax(-1))
    if is_known:
        assert sum(largest) == length
        assert max(largest) <= -(-length // 64) * 16


def test_is_saved_and_cloned(tmp_path):
    model, *_ = trained("tied", tfbig.Model, head_chunk_size=3)
    model.save(tmp_path / "model.keras")
    for copy in (
        keras.models.load_model(tmp_path / "model.keras"),
        keras.models.clone_model(model),
    ):
        assert copy.head_chunk_size == 3
    extended = tfbig.extend(tied(keras.Model), head_chunk_size=5)
    assert extended.head_chunk_size == 5


# --- What is refused --------------------------------------------------------------------------


class Largest(keras.metrics.Metric):
    """Looks at all predictions at once."""

    def __init__(self):
        super().__init__(name="largest")
        self.value_ = self.add_weight(initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value_.assign(keras.ops.max(y_pred))

    def result(self):
        return self.value_.value


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred), axis=-1)


def fitted(last=None, settings=None, cls=tfbig.Model, y=NEXT):
    x = keras.Input((LENGTH,), dtype="int32")
    last = last or layers.Dense(VOCABULARY)
    model = cls(x, last(body(x)), head_chunk_size=4)
    model.compile("sgd", **{"loss": crossentropy(), "jit_compile": False, **(settings or {})})
    before = model.get_weights()
    try:
        model.fit(TOKENS, y, verbose=0)
    finally:
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)


class Penalized(tfbig.Model):
    """Its loss looks at the logits themselves."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 1e-4 * keras.ops.mean(keras.ops.logsumexp(y_pred, axis=-1) ** 2)


class Distilled(tfbig.Model):
    """Its targets depend on its weights."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        targets = keras.ops.softmax(keras.ops.one_hot(y, VOCABULARY) * self.layers[-1].bias)
        return keras.losses.CategoricalCrossentropy(from_logits=True)(targets, y_pred)


REFUSED = {
    "Softmax 'last'": {"last": layers.Softmax(name="last")},
    "Conv1D 'last'": {"last": layers.Conv1D(VOCABULARY, 1, name="last")},
    "Dense 'regularized'": {
        "last": layers.Dense(VOCABULARY, activity_regularizer="l2", name="regularized")
    },
    "Received: own_loss": {"settings": {"loss": own_loss}},
    "Received: largest": {"settings": {"metrics": [Largest()]}},
    "Received: over_time": {
        "settings": {"loss": keras.losses.CosineSimilarity(axis=1, name="over_time")},
        "y": np.eye(VOCABULARY)[NEXT],
    },
    "reads all of it": {"cls": Penalized},
    "targets of a loss must not depend on weights": {"cls": Distilled},
    "run_eagerly=True": {"settings": {"run_eagerly": True}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_what_cannot_be_computed_in_chunks(message):
    with pytest.raises((errors.UnsupportedModelError, errors.InvalidOptionError), match=message):
        fitted(**REFUSED[message])


class Shortened(tfbig.Model):
    """Its targets have no value for the last token."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return crossentropy()(y[:, :-1], y_pred)


def test_targets_of_another_length_are_refused():
    message = r"Received: targets of shape \(None, 4\) for inputs of shape \(None, 5, features\)"
    with pytest.raises(ValueError, match=message):
        fitted(cls=Shortened, settings={"loss": None})
