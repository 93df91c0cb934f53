"""`shard="weights"`: what differs from the optimizer's state alone."""

import math
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests.conftest import make_strategy
from tfbig import errors
from tfbig._keras import memory
from tfbig._keras.sharded_variable import ShardedWeight
from tfbig._update import gathered_weights
from tfbig.distribute import _sharded_weights

TOLERANCE = 1e-10


@pytest.fixture
def small_weights_are_divided(monkeypatch):
    monkeypatch.setattr(_sharded_weights, "SMALLEST", 1)


def data(samples=22, shape=(6,), targets=(3,)):
    rng = np.random.default_rng(0)
    return rng.normal(size=(samples, *shape)), rng.normal(size=(samples, *targets))


def divided(model):
    return [v for v in model.weights if isinstance(v, ShardedWeight)]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=TOLERANCE)


def train(make, x, y, strategy="default", optimizer="adam", loss="mse", weights=None, **options):
    """A model after two epochs; divided, if there are options."""
    with make_strategy(strategy).scope():
        keras.utils.set_random_seed(1)
        model = make(tfbig.Model if options else keras.Model, **options)
        # Models that are built late are built here.
        model(x[:2])
        if weights is not None:
            model.set_weights(weights)
        model.compile(optimizer() if callable(optimizer) else optimizer, loss)
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


def assert_trains_as_plain(make, x, y, options=None, **kwargs):
    keras.utils.set_random_seed(1)
    start = make(keras.Model)
    start(x[:2])
    start = start.get_weights()
    plain = train(make, x, y, weights=start, **kwargs)
    model = train(
        make, x, y, "mirrored_2", weights=start, shard="weights", **options or {}, **kwargs
    )
    assert len(divided(model)) == len(model.trainable_weights)
    assert_same(model.get_weights(), plain.get_weights())
    return model, plain


def dense(cls, **options):
    x = keras.Input((6,))
    return cls(x, layers.Dense(3)(layers.Dense(8, "tanh")(x)), **options)


# --- Programs ----------------------------------------------------------------------------


class Branching(layers.Layer):
    """Reads its weight in a conditional and in a loop."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(6, 6))

    def call(self, x):
        h = tf.cond(
            tf.reduce_sum(self.kernel) > 0,
            lambda: tf.matmul(x, self.kernel),
            lambda: -2 * tf.matmul(x, self.kernel),
        )
        one = lambda i, h: (i + 1, tf.tanh(tf.matmul(h, self.kernel)))  # noqa: E731
        return h + tf.while_loop(lambda i, _: i < 3, one, (0, x))[1]


class Positions(layers.Layer):
    """Tables of tokens and positions in a layer that recomputes."""

    def build(self, shape):
        self.tokens, self.positions = layers.Embedding(7, 6), layers.Embedding(9, 6)
        self.tokens.build(shape)
        self.positions.build(shape)
        self.dense = layers.Dense(6)
        self.dense.build((None, None, 6))

    def call(self, tokens):
        return self.dense(self.tokens(tokens) + self.positions(keras.ops.arange(5)))


def sequence(*inner):
    def make(cls, **options):
        h = x = keras.Input((5, 6))
        for layer in inner:
            h = layer()(h)
        return cls(x, layers.Dense(3)(h), **options)

    return make


def branching(cls, **options):
    x = keras.Input((6,))
    return cls(x, layers.Dense(3)(Branching()(x)), **options)


def regularized(cls, **options):
    x = keras.Input((6,))
    h = layers.Dense(8, kernel_regularizer="l2", activity_regularizer="l1")(x)
    return cls(x, layers.Dense(3)(h), **options)


def late(cls, **options):
    """Layers in a list, a weight of the model's own; built in the first call."""

    class Late(cls):
        def __init__(self, **options):
            super().__init__(**options)
            self.blocks = [layers.Dense(6, "tanh") for _ in range(3)]
            self.head = layers.Dense(3)
            self.scale = self.add_weight(shape=(6,), initializer="ones")

        def call(self, x):
            for block in self.blocks:
                x = x + block(x)
            return self.head(x * self.scale)

    return Late(**options)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (sequence(lambda: layers.LSTM(4)), (5, 6)),
        (sequence(lambda: layers.Bidirectional(layers.GRU(4, unroll=True))), (5, 6)),
        (branching, (6,)),
        (regularized, (6,)),
        (late, (6,)),
    ],
    ids=["lstm", "gru", "branching", "regularized", "late"],
)
def test_programs_train_as_in_plain_keras(make, shape, small_weights_are_divided, float64):
    x, y = data(shape=shape)
    options = {"gradient_accumulation_steps": 3}
    assert_trains_as_plain(make, x, y, options, optimizer=lambda: keras.optimizers.SGD(0.1))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_rows_of_tables_in_a_layer_that_recomputes_stay_rows(
    optimizer, small_weights_are_divided, float64
):
    def make(cls, **options):
        tokens = keras.Input((5,), dtype="int32")
        return cls(tokens, layers.Dense(7)(Positions()(tokens)), **options)

    tokens = np.random.default_rng(0).integers(0, 7, (22, 5))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"gradient_accumulation_steps": 2}
    assert_trains_as_plain(make, tokens, tokens, options, loss=loss, optimizer=optimizer)


class Mixed(layers.Layer):
    """A kernel that is read in half precision, one that is read in full, and one in both."""

    def build(self, shape):
        self.half = layers.Dense(6, dtype=self.dtype_policy, kernel_regularizer="l2", name="half")
        self.full, self.both = (layers.Dense(6, dtype="float32", name=n) for n in ("full", "both"))
        for layer in (self.half, self.full, self.both):
            layer.build((None, 6))

    def call(self, x):
        h = self.full(keras.ops.tanh(self.half(x)))
        narrow = keras.ops.matmul(keras.ops.cast(h, x.dtype), self.both.kernel)
        return self.both(h) + keras.ops.cast(narrow, "float32")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_weights_travel_as_layers_read_them(policy, small_weights_are_divided, monkeypatch):
    """Half as many bytes, and the same numbers to the bit."""

    def make(cls, **options):
        tokens = keras.Input((5,), dtype="int32")
        h = layers.Embedding(11, 6, dtype=policy)(tokens)
        outputs = layers.Dense(11, dtype=policy)(Mixed(dtype=policy)(h))
        return cls(tokens, outputs, **options)

    tokens = np.random.default_rng(0).integers(0, 11, (22, 5))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sent = []
    gathered = ShardedWeight.gathered
    monkeypatch.setattr(
        ShardedWeight,
        "gathered",
        lambda self, piece: sent.append((self.path, piece.dtype.name)) or gathered(self, piece),
    )
    options = {"shard": "weights", "gradient_accumulation_steps": 2, "head_chunk_size": 4}
    model = train(make, tokens, tokens, "mirrored_2", loss=loss, **options)
    half = policy.removeprefix("mixed_")
    dtypes = {}
    for path, dtype in sent:
        dtypes.setdefault(path.replace(f"{model.layers[2].name}/", ""), set()).add(dtype)
    assert dtypes["half/kernel"] == {half, "float32"}, "a regularizer reads all of it"
    assert dtypes["half/bias"] == dtypes[f"{model.layers[-1].name}/kernel"] == {half}
    assert dtypes["full/kernel"] == dtypes["both/kernel"] == {"float32"}
    assert dtypes[f"{model.layers[1].name}/embeddings"] == {"float32"}, "its gradient has rows"

    monkeypatch.setattr(gathered_weights.WeightStandIns, "narrow_dtypes", lambda self: {})
    sent.clear()
    whole = train(make, tokens, tokens, "mirrored_2", loss=loss, **options)
    assert {dtype for _, dtype in sent} == {"float32"}
    for a, b in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(model.get_weights()[0]).all()


@pytest.mark.parametrize("samples", [17, 24], ids=["one_sample_left", "as_many"])
def test_replicas_of_fewer_micro_batches_wait_for_the_others(
    samples, small_weights_are_divided, float64
):
    # In the last batch, one replica has a sample and the other none, or four each.
    x, y = data(samples)
    assert_trains_as_plain(dense, x, y, {"micro_batch_size": 1})


def test_a_replica_without_ragged_samples_knows_their_inner_shape(
    small_weights_are_divided, float64
):
    class Points(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(3)

        def call(self, points):
            differences = points.values[:, 0] - points.values[:, 1]
            rows = tf.RaggedTensor.from_row_splits(differences, points.row_splits)
            return self.head(tf.reduce_sum(rows, 1)[:, tf.newaxis])

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4, size=9)
    points = tf.RaggedTensor.from_row_lengths(rng.normal(size=(lengths.sum(), 2)), lengths)
    # The last batch has one sample.
    dataset = tf.data.Dataset.from_tensor_slices((points, rng.normal(size=(9, 3)))).batch(8)
    found = []
    for strategy, options in (
        ("default", None),
        ("mirrored_2", {"shard": "weights", "micro_batch_size": 2}),
    ):
        with make_strategy(strategy).scope():
            keras.utils.set_random_seed(1)
            model = Points()
            model(points[:2])
            if options is not None:
                model = tfbig.extend(model, **options)
            model.compile("adam", "mse")
        model.fit(dataset, epochs=2, shuffle=False, verbose=0)
        found.append(model.get_weights())
    assert divided(model)
    assert_same(*found)


def test_what_does_not_count_may_be_no_number(small_weights_are_divided, float64):
    """A replica without samples computes with zeros, whose logarithm is infinite."""

    def make(cls, **options):
        x = keras.Input((6,))
        return cls(x, layers.Dense(3)(keras.ops.log(x)), **options)

    x, y = data(17)
    assert_trains_as_plain(make, np.exp(x), y, {"micro_batch_size": 2})


def test_synchronized_layers_beside_divided_weights(float64):
    def make(cls, **options):
        x = keras.Input((128,))
        h = layers.Dense(128)(x)
        h = layers.BatchNormalization(synchronized=cls is tfbig.Model)(h)
        return cls(x, layers.Dense(3)(h), **options)

    x, y = data(16, (128,))
    start = make(keras.Model)
    sgd = lambda: keras.optimizers.SGD(0.1)  # noqa: E731
    plain = train(make, x, y, optimizer=sgd, weights=start.get_weights())
    model = train(
        make, x, y, "mirrored_2", sgd, weights=start.get_weights(), shard="weights",
        gradient_accumulation_steps=1,
    )  # fmt: skip
    assert [v.shape for v in divided(model)] == [(128, 128)]
    assert_same(model.get_weights(), plain.get_weights())


def test_denominators_may_depend_on_weights(small_weights_are_divided, float64):
    class Counting(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            mean = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
            return mean(y, y_pred, sample_weight=tf.cast(y_pred[:, 0] > 0, y_pred.dtype))

    class Divided(tfbig.Model):
        compute_loss = Counting.compute_loss

    def make(cls, **options):
        return dense(Counting if cls is keras.Model else Divided, **options)

    x, y = data()
    assert_trains_as_plain(make, x, y, {"gradient_accumulation_steps": 2}, loss=None)


@pytest.mark.parametrize(
    ("budget", "message"), [(4.9, "must hold the model itself"), (5.1, "missing")]
)
def test_a_budget_counts_the_pieces_of_divided_weights(
    small_weights_are_divided, float64, budget, message
):
    x, y = data(shape=(512,), targets=(512,))
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential(
            [keras.Input((512,)), layers.Dense(512, use_bias=False)],
            micro_batch_size="auto",
            memory_budget=int(2**20 * budget),
            shard="weights",
        )
        # The half of 2 MiB, of both moments, and of two gradients.
        model.compile("adam", "mse")
    with pytest.raises(errors.OutOfMemoryError, match=message):
        model.fit(x, y, batch_size=8, verbose=0)


# --- Everything but training -------------------------------------------------------------


@pytest.mark.parametrize("is_extended", [False, True])
def test_it_predicts_with_the_weights_that_it_has_after_a_change(
    small_weights_are_divided, float64, is_extended
):
    x, y = data()
    with make_strategy("mirrored_2").scope():
        model = original = dense(keras.Model if is_extended else tfbig.Model)
        model.compile("sgd", "mse")
    before = model.predict(x, batch_size=8, verbose=0)
    if is_extended:
        model = tfbig.extend(original, shard="weights")
    for shard in ["weights", None]:
        model.shard = shard
        assert bool(divided(model)) == (shard is not None)
        assert_same(model.predict(x, batch_size=8, verbose=0), before)
        model.fit(x, y, batch_size=8, verbose=0)
        found = model.predict(x, batch_size=8, verbose=0)
        assert np.max(np.abs(found - before)) > 1e-3
        plain = dense(keras.Model)
        plain.set_weights(model.get_weights())
        before = plain.predict(x, batch_size=8, verbose=0)
        assert_same(found, before)
        if shard or not is_extended:
            assert_same(original.predict(x, batch_size=8, verbose=0), before)
        else:
            # It is not told of the change; it does not go on with the weights of before.
            with pytest.raises(tf.errors.InvalidArgumentError):
                original.predict(x, batch_size=8, verbose=0)


def test_another_model_does_not_predict_with_the_weights_of_before(
    small_weights_are_divided, float64
):
    x, _ = data()
    with make_strategy("mirrored_2").scope():
        original = dense(keras.Model)
        original.compile("sgd", "mse")
    original.predict(x, batch_size=8, verbose=0)
    model = tfbig.extend(original)
    model.shard = "weights"
    assert divided(model)
    with pytest.raises(tf.errors.InvalidArgumentError):
        original.predict(x, batch_size=8, verbose=0)


def test_a_model_inside_predicts_with_the_weights_that_it_has_after_a_change(
    small_weights_are_divided, float64
):
    x, y = data()
    with make_strategy("mirrored_2").scope():
        inner = keras.Sequential([keras.Input((6,)), layers.Dense(8)])
        inner.predict(x, batch_size=8, verbose=0)
        model = tfbig.Sequential([inner, layers.Dense(3)], shard="weights")
        model.build((None, 6))
        model.compile("sgd", "mse")
    model.fit(x, y, batch_size=8, verbose=0)
    kernel, bias = inner.get_weights()
    assert_same(inner.predict(x, batch_size=8, verbose=0), x @ kernel + bias)


def test_it_evaluates_and_predicts_as_plain_keras(small_weights_are_divided, float64):
    x, y = data()
    model, plain = assert_trains_as_plain(dense, x, y, {"gradient_accumulation_steps": 2})
    expected = plain.predict(x, batch_size=8, verbose=0)
    assert_same(model.predict(x, batch_size=8, verbose=0), expected)
    assert_same([model.evaluate(x, y, batch_size=8, verbose=0)], [plain.evaluate(x, y, verbose=0)])
    assert_same(model.predict_on_batch(x[:5]), expected[:5])
    assert_same([model.test_on_batch(x[:5], y[:5])], [plain.test_on_batch(x[:5], y[:5])])
    # Outside of the replicas, eagerly and in a function.
    assert_same(model(x), expected)
    assert_same(tf.function(lambda: model(x))(), expected)


class Counter(layers.Layer):
    """Counts its calls, also those that predict."""

    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False, aggregation="only_first_replica"
        )
        self.kernel = self.add_weight(shape=(6, 6))

    def call(self, x):
        self.calls.assign(self.calls + 1)
        return tf.matmul(x, self.kernel)


def test_what_a_layer_assigns_in_prediction_is_kept(small_weights_are_divided):
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((6,)), Counter()], shard="weights")
    assert divided(model)
    model.predict(data()[0], batch_size=8, verbose=0)
    assert float(model.layers[0].calls.numpy()) == 3


@pytest.mark.parametrize("function", ["evaluate", "predict"])
def test_no_more_than_two_layers_are_whole_at_a_time(function):
    number, width = 12, 512
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential(
            [keras.Input((width,)), *(layers.Dense(width) for _ in range(number))],
            shard="weights",
            micro_batch_size=1,
        )
        model.compile("sgd", "mse")
    x = np.ones((4, width), "float32")
    arguments = [x, x] if function == "evaluate" else [x]
    run = lambda: getattr(model, function)(*arguments, batch_size=4, verbose=0)  # noqa: E731
    run()
    layer = 4 * width * width
    # Threads of earlier tests may take memory, too. Two replicas; what travels is copied.
    deadline, taken = time.monotonic() + 30, math.inf
    while taken > number * layer and time.monotonic() < deadline:
        taken = min(taken, memory.Meter(["CPU:0"])(run))
    assert 2 * layer < taken <= number * layer


def test_a_language_model_generates_as_plain_keras():
    keras_hub = pytest.importorskip("keras_hub")

    def backbone():
        keras.utils.set_random_seed(1)
        return keras_hub.models.GPT2Backbone(
            vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=128, intermediate_dim=256,
            max_sequence_length=16,
        )  # fmt: skip

    prompt = {"token_ids": np.ones((2, 12), "int32"), "padding_mask": np.ones((2, 12), "int32")}
    prompt["padding_mask"][:, 4:] = 0
    plain = keras_hub.models.GPT2CausalLM(backbone(), preprocessor=None)
    expected = plain.generate(prompt, stop_token_ids=None)["token_ids"]
    with make_strategy("mirrored_2").scope():
        model = keras_hub.models.GPT2CausalLM(backbone(), preprocessor=None)
        model = tfbig.extend(model, shard="weights")
    assert divided(model)
    found = model.generate(prompt, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_it_is_exported(small_weights_are_divided, tmp_path):
    with make_strategy("mirrored_2").scope():
        model = dense(tfbig.Model, shard="weights")
    model.export(tmp_path, verbose=False)
    x = data()[0].astype("float32")
    loaded = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(loaded.serve(x), model.predict(x, verbose=0), rtol=0, atol=1e-6)


def test_the_largest_micro_batch_is_found(small_weights_are_divided, float64):
    x, y = data()
    model, _ = assert_trains_as_plain(dense, x, y, {"micro_batch_size": "auto"})
    assert model.micro_batch_size == 4


def test_weights_are_divided_from_the_start(small_weights_are_divided, float64):
    strategy = make_strategy("mirrored_2")
    with tfbig.distribute.sharded_weights(strategy):
        model = dense(tfbig.Model, shard="weights", micro_batch_size=2)
        model.compile("adam", "mse")
    assert len(divided(model)) == 4
    # Keras's initial values, not zeros.
    assert np.std(model.get_weights()[0]) > 0.1
    plain = dense(keras.Model)
    plain.set_weights(model.get_weights())
    plain.compile("adam", "mse")
    x, y = data()
    for trained in (model, plain):
        trained.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert_same(model.get_weights(), plain.get_weights())
    # Outside of it, weights are whole.
    with strategy.scope():
        assert not divided(dense(keras.Model))


@pytest.mark.parametrize("strategy", ["mirrored_2", "mirrored_4"])
def test_each_replica_has_its_share_of_the_weights(strategy):
    strategy = make_strategy(strategy)
    with strategy.scope():
        model = tfbig.Sequential(
            [keras.Input((256,)), *(layers.Dense(256) for _ in range(4))], shard="weights"
        )
    number = strategy.num_replicas_in_sync
    # Biases are small, and stay whole.
    assert [v.path for v in divided(model)] == [v.path for v in model.weights if len(v.shape) == 2]
    for variable in divided(model):
        sizes = [int(tf.size(piece)) for piece in variable.pieces.values()]
        assert sizes == [256 * 256 // number] * number


def test_one_replica_has_nothing_to_divide():
    with tfbig.distribute.sharded_weights(tf.distribute.get_strategy()):
        model = tfbig.Sequential([keras.Input((256,)), layers.Dense(256)], shard="weights")
    model.compile("adam", "mse")
    model.fit(np.ones((4, 256)), np.ones((4, 256)), verbose=0)
    assert not divided(model)


def test_the_log_names_the_layers_that_recompute(small_weights_are_divided, caplog):
    with caplog.at_level("INFO", "tfbig"), make_strategy("mirrored_2").scope():
        x = keras.Input((6,))
        h = layers.Dense(8, name="first")(layers.Dropout(0.5)(x))
        tfbig.Model(x, layers.Dense(3, name="second")(h), shard="weights")
    assert ["first, second recompute" in r.message for r in caplog.records] == [True]


# --- Bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"log_gradient_noise_scale": True}, "log_gradient_noise_scale=True"),
        ({"exchange_dtype": "bfloat16"}, "exchange_dtype='bfloat16'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_need_whole_gradients_are_refused(options, named):
    with (
        make_strategy("mirrored_2").scope(),
        pytest.raises(tfbig.errors.InvalidOptionError, match=named),
    ):
        dense(tfbig.Model, shard="weights", **options)


def test_xla_is_not_chosen(monkeypatch):
    monkeypatch.setattr("tfbig._keras.trainer.is_on_cpu", lambda strategy: False)
    chosen = {}
    for shard in ("optimizer", "weights"):
        with make_strategy("mirrored_2").scope():
            model = dense(tfbig.Model, shard=shard)
            model.compile("sgd", "mse")
            chosen[shard] = model.jit_compile
    assert chosen == {"optimizer": True, "weights": False}


def test_divided_weights_need_the_option():
    with tfbig.distribute.sharded_weights(make_strategy("mirrored_2")):
        model = tfbig.Sequential([keras.Input((256,)), layers.Dense(256)])
        model.compile("sgd", "mse")
    assert divided(model)
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="shard='weights'"):
        model.fit(np.ones((4, 256)), np.ones((4, 256)), verbose=0)


@pytest.mark.parametrize("name", ["jit_compile", "run_eagerly"])
def test_other_modes_are_refused(name):
    with make_strategy("mirrored_2").scope():
        model = dense(tfbig.Model, shard="weights")
        with pytest.raises(tfbig.errors.InvalidOptionError, match=f"{name}=True"):
            model.compile("sgd", "mse", **{name: True})


def test_check_equivalence_needs_whole_weights(small_weights_are_divided):
    with make_strategy("mirrored_2").scope():
        model = dense(tfbig.Model, shard="weights", micro_batch_size=2)
        model.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="divided weights"):
        tfbig.check_equivalence(model, *data(7))


def test_a_layer_that_cannot_be_recomputed_is_named(small_weights_are_divided):
    with make_strategy("mirrored_2").scope():
        x = keras.Input(batch_shape=(4, 5, 6))
        h = layers.LSTM(4, stateful=True, name="memory")(x)
        outputs = layers.Dense(3)(h)
        with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"LSTM 'memory'.*shard="):
            tfbig.Model(x, outputs, shard="weights")


def test_a_synchronized_layer_with_divided_weights_is_named(small_weights_are_divided):
    with make_strategy("mirrored_2").scope():
        x = keras.Input((6,))
        outputs = layers.BatchNormalization(synchronized=True, name="norm")(x)
        with pytest.raises(tfbig.errors.UnsupportedModelError, match="'norm' with synchronized"):
            tfbig.Model(x, outputs, shard="weights")


def test_a_weight_that_is_read_in_a_branch_outside_of_layers_is_refused(
    small_weights_are_divided,
):
    class Branch(tfbig.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.head = layers.Dense(3)
            self.scale = self.add_weight(shape=(6,), initializer="ones", name="scale")

        def call(self, x):
            return self.head(
                tf.cond(tf.reduce_sum(x) > 0, lambda: x * self.scale, lambda: x / self.scale)
            )

    with make_strategy("mirrored_2").scope():
        model = Branch(shard="weights")
        model.compile("sgd", "mse")
    x, y = data()
    # TensorFlow makes another error of it.
    with pytest.raises(ValueError, match=r"scale, read in one"):
        model.fit(x, y, verbose=0)


def looped(x, step):
    return tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, step(x)), (0, x))[1]


def branched(x, step):
    # Replicas take different branches.
    return tf.cond(tf.reduce_sum(x) > 0, lambda: step(x), lambda: x)


@pytest.mark.parametrize("around", [looped, branched])
def test_a_layer_in_a_loop_or_branch_of_the_model_is_refused_in_training(
    around, small_weights_are_divided
):
    class Around(tfbig.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.block = layers.Dense(6, "tanh")
            self.head = layers.Dense(3)

        def call(self, x):
            return self.head(around(x, self.block))

    x, y = data()
    with make_strategy("mirrored_2").scope():
        model = Around(shard="weights")
        model(x[:2])
        model.compile("sgd", "mse")
    # TensorFlow makes another error of it.
    with pytest.raises(ValueError, match=r"kernel, read in one"):
        model.fit(x, y, verbose=0)


def decoding(around):
    """A model whose prediction calls all of it in a loop or branch."""

    def make(cls, **options):
        class Decoder(cls):
            def predict_step(self, data):
                step = lambda x: tf.ensure_shape(self(x, training=False), [None, 6])  # noqa: E731
                return around(tf.ensure_shape(data, [None, 6]), step)

        x = keras.Input((6,))
        return Decoder(x, layers.Dense(6)(layers.Dense(8, "tanh")(x)), **options)

    return make


@pytest.mark.parametrize("around", [looped, branched])
def test_prediction_may_call_the_model_in_a_loop_or_branch(
    around, small_weights_are_divided, float64
):
    x = data(10)[0]
    # Of one sign on each replica, and of another on the next one.
    x = np.abs(x) * np.where(np.arange(10) < 5, 1, -1)[:, np.newaxis]
    model, plain = assert_trains_as_plain(decoding(around), x, x)
    expected = [plain.predict(part, batch_size=5, verbose=0) for part in (x[:5], x[5:])]
    found = model.predict(x, batch_size=10, verbose=0)
    assert_same([found], [np.concatenate(expected)])


def test_a_function_of_replicas_may_call_a_model_in_a_loop(small_weights_are_divided, float64):
    strategy = make_strategy("mirrored_2")
    model, plain = assert_trains_as_plain(decoding(looped), *[data(10)[0]] * 2)
    x = tf.constant(data(4)[0])

    @tf.function
    def run(x):
        step = lambda x: tf.ensure_shape(model(x), [None, 6])  # noqa: E731
        return strategy.run(lambda x: looped(x, step), args=(x,))

    for found in strategy.experimental_local_results(run(x)):
        assert_same([found], [plain.predict(x, verbose=0)])


def test_half_precision_is_refused_in_a_step_of_ones_own(small_weights_are_divided):
    class Own(tfbig.Sequential):
        def train_step(self, data):
            share = tfbig.accumulate_gradients(
                lambda data: self.compute_loss(*data, self(data[0], training=True)),
                self.trainable_variables,
                data,
            )
            return {
                "loss": tfbig.apply_gradients(self.optimizer, share, exchange_dtype="bfloat16").loss
            }

    x, y = data()
    with make_strategy("mirrored_2").scope():
        model = Own([keras.Input(x.shape[1:]), layers.Dense(y.shape[1])], shard="weights")
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="exchange_dtype='bfloat16' and shard='weights'"):
        model.fit(x, y, verbose=0)


def test_a_gradient_inside_of_the_loss_is_refused(small_weights_are_divided):
    class Penalized(tfbig.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.head = layers.Dense(3)

        def call(self, x):
            return self.head(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            with tf.GradientTape() as tape:
                tape.watch(x)
                score = self(x)
            return tf.reduce_mean(tf.square(tape.gradient(score, x)))

    x, y = data()
    with make_strategy("mirrored_2").scope():
        model = Penalized(shard="weights")
        model(x[:2])
        model.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"inside of the loss.*dense/"):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("name", ["fit", "evaluate"])
@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_a_table_of_another_device_is_refused(name, steps_per_execution, small_weights_are_divided):
    with make_strategy("mirrored_2").scope():
        x = keras.Input((1,), dtype="int64")
        h = layers.IntegerLookup(vocabulary=[1, 2], output_mode="one_hot")(x)
        model = tfbig.Model(x, layers.Dense(1)(h), shard="weights", micro_batch_size=2)
        model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"IntegerLookup.*CPU:1"):
        getattr(model, name)(np.ones((8, 1), int), np.ones((8, 1)), batch_size=4, verbose=0)
