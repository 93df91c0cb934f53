"""An update by four cores, simulated in one graph, against the whole batch; planted faults."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests.tpu_check import faults
from tfbig import tpu_check
from tfbig._update import apply, replicas
from tfbig.tpu_check import build_function, comparison, numbers, report

CORES, BATCH = 4, 32


@functools.cache
def strategy():
    return tpu_check.made_up_strategy(tpu_check.Slice.parse("v5e:2x2"))


def build(inner=(), inputs=((6,), "float32"), loss="mse"):
    """Returns a function that makes a compiled model; `inner` are functions that make layers."""

    def make():
        shape, dtype = inputs
        made = [layer() for layer in inner]
        model = keras.Sequential([keras.Input(shape, dtype=dtype), *made, layers.Dense(2)])
        metrics = ["mae"] if loss == "mse" else ["accuracy"]
        model.compile(keras.optimizers.Adam(global_clipnorm=1.0), loss, metrics=metrics)
        return model

    return make


def imitate(model, batch, *several):
    program = tpu_check.trace(model, batch.share(CORES))
    with strategy().scope():
        function = tpu_check.PureFunction(program)
    runner = numbers.imitated(function)
    return [numbers.run(function, data, CORES, runner) for data in several]


def built(make, **options):
    """Returns an extended model for four cores, and its batch."""
    options = options or {"gradient_accumulation_steps": 4}
    return build_function.build_model(make, strategy(), BATCH, options)


def compared(make, run=imitate):
    def exact(strategy):
        options = {"gradient_accumulation_steps": 4}
        model, batch = build_function.build_model(make, strategy, BATCH, options)
        return comparison.make_exact(model, strategy), batch

    return comparison.compare(exact, strategy(), CORES, run)


class Centred(layers.Layer):
    """Subtracts the mean over the cores, so that it exchanges in every forward pass."""

    def call(self, x):
        context = tf.distribute.get_replica_context()
        # There is no replica context while Keras builds the model.
        return x - (context.all_reduce("MEAN", x) if context else x)

    def compute_output_shape(self, shape):
        return shape


DENSE = (lambda: layers.Dense(8, "tanh"),)


@pytest.mark.parametrize(
    "make",
    [
        build(DENSE),
        build((*DENSE, layers.BatchNormalization, lambda: layers.Dropout(0.5))),
        build((*DENSE, lambda: layers.GaussianNoise(0.5))),
        build((lambda: layers.Dense(4, kernel_regularizer="l2"), layers.LayerNormalization)),
        build(
            (lambda: layers.Embedding(5, 3, mask_zero=True), layers.GlobalAveragePooling1D),
            inputs=((7,), "int32"),
        ),
        build(
            (lambda: layers.Conv2D(3, 3), layers.Flatten),
            inputs=((5, 5, 2), "float32"),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ),
    ],
    ids=["dense", "state", "noise", "regularized", "tokens", "images"],
)
def test_an_update_by_all_cores_equals_that_of_the_whole_batch(make):
    found = compared(make)
    assert found.is_right, found
    assert found.differences[0].size < 1e-5  # Rounding in float32 of changes near 1.
    assert (found.apart, found.skipped, found.random) == ([], [], [])


def mean_for_sum(monkeypatch):
    def mean(share, batch):
        return dataclasses.replace(batch, gradients=[g / CORES for g in batch.gradients])

    faults.changed_exchange(monkeypatch, mean)


def loss_divided_twice(monkeypatch):
    original = apply._divide
    monkeypatch.setattr(apply, "_divide", lambda g, d: original(original(g, d), float(CORES)))


def no_exchange(monkeypatch):
    monkeypatch.setattr(replicas, "all_reduce_sum", lambda tensors, *_: list(tensors))


FAULTS = {
    "double_sum": faults.double_sum,
    "mean_for_sum": mean_for_sum,
    "loss_divided_twice": loss_divided_twice,
    "no_exchange": no_exchange,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_number_is_found(monkeypatch, fault):
    FAULTS[fault](monkeypatch)
    found = compared(build(DENSE))
    assert not found.is_right
    # Not rounding, but a multiple or a fraction of the update.
    assert found.differences[0].size > 0.1
    assert bool(found.apart) == (fault == "no_exchange")


def test_cores_that_decide_for_themselves_are_found(monkeypatch):
    flags, shares = apply._finite_flags, []

    def kept(share, batch):
        shares.append(share.gradients)
        return batch

    faults.changed_exchange(monkeypatch, kept)
    monkeypatch.setattr(apply, "_finite_flags", lambda gradients: flags(shares[-1]))
    found = compared(build(DENSE))
    assert not found.is_right
    assert any("skipped updates of the cores: [0, 0, 0, 1]" in line for line in found.skipped)


def test_an_update_skipped_without_cause_is_found(monkeypatch):
    monkeypatch.setattr(apply, "_finite_flags", lambda gradients: tf.zeros(len(gradients), bool))
    found = compared(build(DENSE))
    assert found.differences[0].size < 1e-5
    assert not found.is_right
    assert "without NaN" in found.skipped[0]


def test_a_nan_weight_is_found_if_nothing_is_skipped(monkeypatch):
    monkeypatch.setattr(apply, "_finite_flags", lambda gradients: tf.ones(len(gradients), bool))
    found = compared(build(DENSE))
    assert found.differences[0].size < 1e-5
    assert not found.is_right
    assert any("kernel has changed" in line for line in found.skipped)


def test_a_layer_that_exchanges_in_the_loop_cannot_be_simulated():
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"layer 'own' \(Centred\)"):
        compared(build((lambda: Centred(name="own"),)))


def test_differences_by_random_numbers_are_reported():
    class Noisy(layers.Layer):
        def __init__(self):
            super().__init__(name="noisy")
            self.generator = keras.random.SeedGenerator(1)

        def call(self, x):
            return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)

    found = compared(build((Noisy,)))
    assert found.random == ["Noisy 'noisy'"]
    assert found.differences[0].size > 1e-3
    # Neither can be claimed.
    assert (found.is_right, found.is_wrong) == (False, False)
    first, *_ = report.compared(found, "traced", CORES)
    assert first.startswith("not compared: random numbers of Noisy 'noisy' cannot be turned off")
    # Random numbers do not explain this.
    apart = dataclasses.replace(found, apart=["kernel"])
    assert apart.is_wrong
    assert next(report.compared(apart, "traced", CORES)).startswith("WRONG: ")


@pytest.mark.parametrize("inner", [lambda: layers.LSTM(3), lambda: layers.LSTM(3, dropout=0.5)])
def test_a_layer_whose_dropout_is_off_excuses_nothing(monkeypatch, inner):
    faults.double_sum(monkeypatch)
    found = compared(build((inner,), inputs=((4, 3), "float32")))
    assert found.random == []
    assert found.is_wrong


def bfloat16():
    made = [layers.Dense(8, "tanh", dtype="bfloat16"), layers.Dense(2, dtype="bfloat16")]
    model = keras.Sequential([keras.Input((6,), dtype="bfloat16"), *made])
    model.compile(keras.optimizers.SGD(), "mse")
    return model


def test_weights_in_bfloat16_are_compared(monkeypatch):
    found = compared(bfloat16)
    assert len(found.differences) == 4
    assert found.is_right, found
    faults.double_sum(monkeypatch)
    assert compared(bfloat16).is_wrong


def test_nan_in_bfloat16_equals_itself():
    values = np.array([[1, np.nan]] * 2, tf.bfloat16.as_numpy_dtype)
    assert numbers.Update({"v": values}, {"v": values.copy()}).changed(["v"]) == []
    assert numbers.Update({}, {"v": values}).apart() == []
    (poisoned,), _ = numbers.poisoned((np.ones((4, 2), values.dtype),), 4)
    assert np.isnan(poisoned.astype(float)).sum() == 2


def test_arguments_and_results():
    model, batch = built(build(DENSE), loss_scale=4.0, micro_batch_size=2)
    with strategy().scope():
        function = tpu_check.PureFunction(tpu_check.trace(model, batch.share(CORES)))
    arguments = {a.name: a for a in function.arguments}
    kernel = model.trainable_variables[0]
    assert arguments[kernel.path].kind == "variable"
    assert len(arguments[kernel.path].values) == CORES
    np.testing.assert_array_equal(arguments[kernel.path].values[3], kernel.numpy())
    assert [a.index for a in function.arguments if a.kind == "data"] == [0, 1]
    numbered = [a.values for a in function.arguments if a.kind == "core"]
    assert [0, 1, 2, 3] in [list(map(int, values)) for values in numbered]
    logged = [r.name for r in function.results if r.argument is None]
    assert logged == ["loss", "loss_scale", "mae", "skipped_updates"]
    assigned = {r.name: r.argument for r in function.results if r.argument is not None}
    assert function.arguments[assigned[kernel.path]].name == kernel.path
    # Nothing assigns the learning rate.
    assert not any("learning_rate" in name for name in assigned)
    assert {v.path for v in model.trainable_variables} <= set(assigned)


def test_a_pure_function_has_no_variables():
    model, batch = built(build(DENSE), loss_scale=4.0)
    with strategy().scope():
        function = tpu_check.PureFunction(tpu_check.trace(model, batch.share(CORES)))
    specs = [a.spec for a in function.arguments]
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    assert not [n.op for n in nodes if "Variable" in n.op or n.op == "TPUReplicateMetadata"]
    assert any(n.op == "While" for n in nodes)
    assert any(n.op == "If" for n in nodes)


def test_rows_of_a_sample_are_drawn():
    sample = (np.arange(12.0).reshape(4, 3), np.arange(4))
    x, y = tpu_check.Batch.of_sample(sample, BATCH).values()
    np.testing.assert_array_equal(x[:, 0] / 3, y)
    assert len(np.unique(y)) > 1


def test_a_sample_of_zeros_only_gives_shapes():
    sample = (np.zeros((2, 3), "float32"), np.zeros(2, "int32"))
    x, y = tpu_check.Batch.of_sample(sample, BATCH).values()
    assert (x.dtype, y.dtype) == ("float32", "int32")
    assert len(np.unique(x)) == x.size
    assert set(y) == {0, 1}


def test_sample_weights_need_targets():
    assert tpu_check.Batch.of_sample((np.zeros((2, 3), "float32"),), BATCH).weighted() is None


@pytest.mark.parametrize(("size", "text"), [(2, "Use 4."), (6, "Use 4 or 8.")])
def test_a_batch_that_the_cores_do_not_divide(size, text):
    batch = tpu_check.Batch.of_sample((np.zeros((2, 3)), np.zeros(2)), size)
    with pytest.raises(tfbig.errors.InvalidOptionError) as caught:
        batch.share(CORES)
    assert str(caught.value).endswith(text)


def test_poisoned():
    ones, ids = np.ones((8, 3)), np.ones(8, int)
    (x, y), is_sure = numbers.poisoned((ones, ones), 4)
    assert is_sure
    assert np.isnan(y[6:]).all()
    assert np.isfinite(y[:6]).all()
    assert np.isfinite(x).all()
    (x, y), is_sure = numbers.poisoned((ones, ids), 4)
    assert not is_sure
    assert np.isnan(x[6:]).all()
    (x, y, weights), is_sure = numbers.poisoned((ids, ids, ones), 4)
    assert is_sure
    assert np.isnan(weights[6:]).all()
    assert numbers.poisoned((ids, None), 4) == (None, False)


def floating_ids():
    return keras.Sequential(
        [keras.Input((4,)), layers.Embedding(5, 3), layers.Flatten(), layers.Dense(1)]
    )


def buckets():
    """Puts NaN in the same bucket as other numbers."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Discretization([-1.0, 0.0, 1.0]),
            layers.Embedding(5, 3),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )


def plain():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(1)])


def half():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return plain()
    finally:
        keras.config.set_dtype_policy("float32")


def dictionary():
    a, b = keras.Input((4,), name="zz"), keras.Input((3,), name="bb")
    y = layers.Dense(2)(layers.Concatenate()([a, b]))
    return keras.Model({"zz": a, "bb": b}, y)


class OwnStep(tfbig.Model):
    """Unpacks exactly two parts, and does not scale its loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.out = layers.Dense(3), layers.Dense(1)

    def call(self, x, training=None):
        return self.out(self.hidden(x))

    def train_step(self, data):
        def loss_fn(batch):
            x, y = batch
            return self.compute_loss(x, y, self(x, training=True))

        share = tfbig.accumulate_gradients(
            loss_fn, self.trainable_variables, data, gradient_accumulation_steps=2
        )
        return {"loss": tfbig.apply_gradients(self.optimizer, share).loss}


SAMPLE = (
    np.random.default_rng(0).normal(size=(8, 4)).astype("float32"),
    np.ones((8, 1), "float32"),
)


def with_options(**options):
    def make():
        model = plain()
        model.compile("adam", "mse")
        return tfbig.extend(model, gradient_accumulation_steps=4, **options)

    return make


def compiled(make, loss="mse", sample=None):
    def build():
        model = make()
        model.compile("adam", loss)
        return model if sample is None else (model, sample)

    return build


def overlap():
    model = plain()
    model.compile("adam", "mse", metrics=[keras.metrics.MeanIoU(2)])
    return model


@pytest.mark.parametrize(
    ("make", "has_nan"),
    [
        (compiled(floating_ids, sample=(np.ones((8, 4), "float32"), SAMPLE[1])), True),
        (compiled(buckets), True),
        (compiled(buckets, "sparse_categorical_crossentropy"), False),
        (compiled(half), True),
        (with_options(exchange_dtype="bfloat16"), True),
        (with_options(exchange_dtype="float16"), True),
        (with_options(log_gradient_noise_scale=True, log_grad_norm=True), True),
        (overlap, True),
        (compiled(dictionary), True),
        (compiled(OwnStep, sample=SAMPLE), False),
    ],
    ids=[
        "ids_in_floats",
        "buckets",
        "buckets_classes",
        "float16",
        "exchange_bfloat16",
        "exchange_float16",
        "noise_scale",
        "metric_of_each_core",
        "dictionary",
        "own_step",
    ],
)
def test_correct_updates_are_not_called_wrong(make, has_nan):
    found = compared(make)
    assert found.is_right, found
    assert (found.skipped is not None) == has_nan


def test_a_train_step_that_tfbig_would_replace_is_an_error():
    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    model, batch = built(compiled(lambda: Own([keras.Input((4,)), layers.Dense(1)])))
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="Own has a `train_step`"):
        tpu_check.trace(model, batch.share(CORES))


def test_a_legacy_function_is_named():
    model, batch = built(
        compiled(
            lambda: keras.Sequential([keras.Input((8, 4)), layers.Dense(5)]),
            keras.losses.CTC(),
            sample=(np.ones((8, 8, 4), "float32"), np.ones((8, 3), "int32")),
        )
    )
    with pytest.raises(
        tfbig.errors.UnsupportedModelError, match=r"legacy functions .* in operation"
    ):
        tpu_check.trace(model, batch.share(CORES))


@pytest.mark.parametrize(
    ("sample", "received"),
    [
        (SAMPLE[0], "Received: ndarray"),
        (tf.data.Dataset.from_tensors(SAMPLE), "Received: .*Dataset"),
        ((SAMPLE[0], np.float32(3)), r"shapes \(8, 4\), \(\)"),
        (([[1.0, 2.0]], [[1.0]]), r"shapes \(\), "),
        ((SAMPLE[0], SAMPLE[1][:7]), r"\(8, 4\), \(7, 1\)"),
        ((SAMPLE[0], np.full((8, 1), None)), "Received: object, which is no tensor"),
        ((tf.ragged.constant([[1.0], []]), np.ones(2)), "Received: float32, which is no tensor"),
    ],
    ids=["array", "dataset", "number", "lists", "lengths", "objects", "ragged"],
)
def test_invalid_samples(sample, received):
    with pytest.raises(tfbig.errors.InvalidOptionError, match=received):
        tpu_check.Batch.of_sample(sample, BATCH)
