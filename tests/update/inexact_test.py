"""What a split changes whatever tfbig does is refused, or said once, before training."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfbig
from tests.conftest import make_strategy

X = np.random.default_rng(0).normal(size=(6, 4, 4, 2))
Y = (np.random.default_rng(1).uniform(size=(6, 4, 4, 1)) > 0.5).astype("float32")

SPLIT = {"gradient_accumulation_steps": 3}


def net(*between, loss="mse", strategy="default", **options):
    with make_strategy(strategy).scope():
        stack = [keras.Input((4, 4, 2)), *(b() for b in between), layers.Conv2D(1, 1)]
        model = tfbig.Sequential(stack, **options)
        model.compile("sgd", loss)
    return model


def warnings_of(run):
    """Messages of the warnings of tfbig."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "docs/contract.md" in str(w.message)]


def fit(model, **arguments):
    return lambda: model.fit(X, Y, **({"batch_size": 6, "verbose": 0} | arguments))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("default", SPLIT), ("default", {"micro_batch_size": 2}), ("mirrored_2", {})],
)
def test_batch_normalization_that_trains_is_warned_of_once(strategy, options):
    model = net(
        lambda: layers.BatchNormalization(name="first"),
        lambda: layers.BatchNormalization(name="frozen", trainable=False),
        strategy=strategy,
        **options,
    )
    (message,) = warnings_of(fit(model))
    assert message.startswith("BatchNormalization normalizes each micro-batch")
    assert "Received: first." in message
    assert warnings_of(fit(model)) == []


def test_what_is_no_longer_exact_in_a_later_training_is_warned_of():
    model = net(lambda: layers.BatchNormalization(name="frozen", trainable=False), **SPLIT)
    assert warnings_of(fit(model)) == []
    model.get_layer("frozen").trainable = True
    model.compile("sgd", keras.losses.Dice())
    normalization, loss = warnings_of(fit(model))
    assert "Received: frozen." in normalization
    assert "Received: Dice." in loss
    assert warnings_of(fit(model)) == []


class Counting(layers.Layer):
    """Counts its calls in training, as the weight of an annealed loss does."""

    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False, dtype="int32", name="calls"
        )
        self.mean = keras.metrics.Mean()
        self.dropout = layers.Dropout(0.1)

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1)
            self.mean.update_state(x)
        return self.dropout(x, training=training)


@pytest.mark.parametrize(
    ("strategy", "options", "calls"),
    [("default", SPLIT, 3), ("mirrored_2", {}, 1), ("default", {}, 1)],
)
def test_state_that_every_micro_batch_changes_is_warned_of_once(strategy, options, calls):
    model = net(lambda: Counting(name="counting"), strategy=strategy, **options)
    messages = warnings_of(fit(model))
    assert model.get_layer("counting").calls.numpy() == calls
    if strategy == "default" and not options:
        assert messages == []
        return
    (message,) = messages
    assert "counting/calls. What counts updates" in message
    assert warnings_of(fit(model, batch_size=2)) == []
    assert warnings_of(lambda: model.evaluate(X, Y, verbose=0)) == []


class CountingOutside(layers.Layer):
    """Counts in a `tf.Variable`, which Keras does not know of."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = tf.Variable(0, trainable=False)

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1)
        return x


@pytest.mark.parametrize(
    ("strategy", "options", "is_split"),
    [("default", SPLIT, True), ("mirrored_2", {}, True), ("default", {"loss_scale": 8.0}, False)],
)
def test_variables_of_tensorflow_that_every_micro_batch_changes_are_warned_of(
    strategy, options, is_split
):
    model = net(lambda: CountingOutside(name="counting"), strategy=strategy, **options)
    messages = warnings_of(fit(model))
    assert [
        m for m in messages if "counting" in m and "/AssignAddVariableOp. What" in m
    ] == messages
    assert len(messages) == is_split


def test_own_step_is_warned_of_state_that_every_micro_batch_changes():
    class Own(tfbig.Sequential):
        def train_step(self, data):
            def loss(data):
                return ops.mean((self(data[0], training=True) - data[1]) ** 2)

            share = tfbig.accumulate_gradients(
                loss,
                self.trainable_variables,
                data,
                gradient_accumulation_steps=self.gradient_accumulation_steps,
            )
            return {"loss": tfbig.apply_gradients(self.optimizer, share).loss}

    stack = [keras.Input((4, 4, 2)), Counting(name="counting"), layers.Conv2D(1, 1)]
    model = Own(stack, **SPLIT)
    model.compile("sgd")
    (message,) = warnings_of(fit(model))
    assert "counting/calls. What counts updates" in message
    model = Own(stack)
    model.compile("sgd")
    assert warnings_of(fit(model)) == []


class Balanced(keras.losses.Loss):
    """Divides by an average over the batches before, which it keeps itself."""

    def __init__(self):
        super().__init__()
        self.average = keras.Variable(1.0, trainable=False, name="average")

    def call(self, y, y_pred):
        losses = (y - y_pred) ** 2
        self.average.assign(0.9 * self.average.value + 0.1 * ops.mean(losses))
        return losses / self.average.value


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_state_of_a_loss_that_every_micro_batch_changes_is_warned_of(strategy):
    with make_strategy(strategy).scope():
        loss = Balanced()
    (message,) = warnings_of(fit(net(loss=loss, strategy=strategy, **SPLIT)))
    assert "Received: average. What" in message


def test_step_of_a_keras_model_is_warned_of_state_that_every_micro_batch_changes():
    class Own(keras.Sequential):
        def train_step(self, data):
            def loss(data):
                return ops.mean((self(data[0], training=True) - data[1]) ** 2)

            share = tfbig.accumulate_gradients(
                loss, self.trainable_variables, data, gradient_accumulation_steps=3
            )
            return {"loss": tfbig.apply_gradients(self.optimizer, share).loss}

    model = Own([keras.Input((4, 4, 2)), Counting(name="counting"), layers.Conv2D(1, 1)])
    model.compile("sgd")
    (message,) = warnings_of(fit(model))
    assert "counting/calls. What" in message
    assert "," not in message.partition("Received")[2].partition(". What")[0]


@pytest.mark.parametrize(
    ("options", "arguments"), [({}, {}), ({"micro_batch_size": 6}, {}), (SPLIT, {"batch_size": 1})]
)
def test_batch_that_is_not_split_is_not_warned_of(options, arguments):
    model = net(layers.BatchNormalization, loss=keras.losses.Dice(), **options)
    if arguments:
        with pytest.warns(UserWarning, match="larger than a replica's share"):
            fit(model, **arguments)()
        return
    assert warnings_of(fit(model, **arguments)) == []


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda: keras.losses.Dice(), "Dice"),
        (lambda: keras.losses.Tversky(axis=(0, 1)), "Tversky"),
        (lambda: "dice", "Dice"),
        (lambda: keras.losses.tversky, "Tversky"),
    ],
)
def test_loss_that_couples_samples_is_warned_of(loss, name, strategy):
    model = net(loss=loss(), strategy=strategy, **SPLIT)
    (message,) = warnings_of(fit(model))
    assert "couples the samples of a batch" in message
    assert f"Received: {name}." in message


def test_circle_loss_is_warned_of():
    model = tfbig.Sequential(
        [keras.Input((4,)), layers.Dense(3), layers.UnitNormalization()], **SPLIT
    )
    model.compile("sgd", keras.losses.Circle())
    x, y = np.ones((6, 4), "float32"), np.arange(6) % 2
    (message,) = warnings_of(lambda: model.fit(x, y, batch_size=6, verbose=0))
    assert "Received: Circle." in message


@pytest.mark.parametrize("loss", [keras.losses.Dice, keras.losses.Tversky])
def test_loss_of_each_sample_alone_is_exact(loss):
    model = net(loss=loss(axis=(1, 2, 3)), **SPLIT)
    assert warnings_of(fit(model)) == []
    assert tfbig.check_equivalence(model, X, Y).is_equivalent


class Table(layers.Layer):
    """Looks up rows as an embedding does."""

    def build(self, shape):
        self.rows = self.add_weight(shape=(5, 2), name="rows")

    def call(self, x):
        return keras.ops.take(self.rows, x, axis=0)


@pytest.mark.parametrize(
    "option",
    [SPLIT, {"log_grad_norm": True}],
    ids=["split", "whole batch"],
)
@pytest.mark.parametrize("kind", [lambda **options: layers.Embedding(5, 2, **options), Table])
def test_rows_of_tables_under_xla_are_warned_of(kind, option):
    model = tfbig.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            kind(name="words"),
            layers.Flatten(),
            layers.Dense(1),
        ],
        **option,
    )
    model.compile("adam", "mse", jit_compile=True)
    x, y = np.ones((6, 3), "int32"), np.ones((6, 1))
    (message,) = warnings_of(lambda: model.fit(x, y, batch_size=6, epochs=2, verbose=0))
    assert message.startswith("In an XLA program")
    assert "Received: sequential/words/" in message


def test_rows_of_tables_in_a_compiled_loop_of_a_users_own_are_warned_of():
    table = keras.Variable(np.ones((5, 2)))

    @tf.function
    def step(x):
        loss_fn = lambda x: tf.reduce_mean(tf.gather(table, x) ** 2)  # noqa: E731
        return tfbig.accumulate_gradients(
            loss_fn, [table], x, micro_batch_size=2, compiled=True
        ).loss

    (message,) = warnings_of(lambda: step(tf.constant([0, 1, 1])))
    assert "compiled=True" in message


def recurrent(strategy="default", **options):
    with make_strategy(strategy).scope():
        model = tfbig.Sequential(
            [keras.Input((5, 2), batch_size=6), layers.GRU(3, stateful=True), layers.Dense(1)],
            **options,
        )
        model.compile("sgd", "mse")
    return model


SEQUENCES = np.ones((6, 5, 2), "float32"), np.ones((6, 1), "float32")


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("default", SPLIT),
        ("default", {"micro_batch_size": 2}),
        ("default", {"micro_batch_size": "auto"}),
        ("mirrored_2", {}),
    ],
)
def test_stateful_layers_that_are_split_are_refused(strategy, options):
    model = recurrent(strategy, **options)
    before = model.get_weights()
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"gru.*stateful=False"):
        model.fit(*SEQUENCES, batch_size=6, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_evaluation_of_stateful_layers_that_is_split_is_refused():
    model = recurrent(micro_batch_size=2)
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="must not be split"):
        model.evaluate(*SEQUENCES, batch_size=6, verbose=0)


def test_stateful_layers_that_are_not_split_train():
    model = recurrent(micro_batch_size=6)
    model.fit(*SEQUENCES, batch_size=6, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 1


class Adding(layers.Layer):
    """Adds a loss of what it is called with."""

    def __init__(self, loss, **kwargs):
        super().__init__(**kwargs)
        self.loss = loss

    def call(self, x):
        self.add_loss(self.loss(x))
        return x


def balance(x):
    """The load balance of a mixture of experts: a product of two means over the batch."""
    chosen = ops.one_hot(ops.argmax(x, -1), 2)
    return ops.sum(ops.mean(chosen, (0, 1, 2)) * ops.mean(ops.softmax(x), (0, 1, 2)))


def normalized(y, y_pred):
    return ops.square(y - y_pred) / ops.mean(ops.abs(y_pred))


def over_positives(y, y_pred):
    return ops.sum(y * ops.square(y - y_pred)) / ops.sum(y)


def contrast(y, y_pred):
    features = tf.math.l2_normalize(ops.reshape(y_pred, (-1, 16)), -1)
    pairs = ops.matmul(features, ops.transpose(features))
    own = ops.arange(ops.shape(y_pred)[0])
    return keras.losses.sparse_categorical_crossentropy(own, pairs, from_logits=True)


def sum_over_samples(y, y_pred):
    squares = keras.losses.MeanSquaredError("sum")(y, y_pred)
    return squares / ops.cast(ops.shape(y_pred)[0], y_pred.dtype)


class Scalar(keras.losses.Loss):
    """Returns a mean, of which there is one for each micro-batch."""

    def __init__(self, reduction):
        super().__init__(reduction=reduction)

    def call(self, y, y_pred):
        return ops.mean(ops.square(y - y_pred))


def either(y, y_pred):
    """What is computed in a conditional is in graphs of its own."""
    losses = [keras.losses.MeanSquaredError(), keras.losses.MeanAbsoluteError()]
    return tf.cond(tf.reduce_mean(y) > 0, *(lambda loss=loss: loss(y, y_pred) for loss in losses))


def unweighted(y, y_pred):
    weights = tf.ones_like(y_pred)
    return ops.sum(weights * ops.square(y - y_pred)) / ops.sum(weights)


def mean_of_sums(y, y_pred):
    return ops.sum(ops.square(y - y_pred)) / ops.cast(ops.shape(y_pred)[0], y_pred.dtype)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
@pytest.mark.parametrize(
    ("added", "loss", "operation"),
    [
        (balance, "mse", "Mul"),
        (lambda x: ops.sqrt(ops.mean(ops.square(x))), "mse", "Sqrt"),
        (lambda x: 1e-3 * ops.sum(ops.square(x)), "mse", "Sum"),
        (lambda x: ops.square(x - ops.mean(x, 0)), "mse", "Square"),
        (None, normalized, "RealDiv"),
        (None, over_positives, "RealDiv"),
        (None, contrast, "MatMul"),
        (None, tf.function(contrast, autograph=False), "MatMul"),
        (None, lambda y, y_pred: ops.sum(ops.square(y - y_pred)), "Sum"),
        (None, sum_over_samples, "RealDiv"),
        (None, Scalar("sum"), "Mean"),
    ],
)
def test_loss_that_is_no_mean_over_the_samples_is_warned_of(added, loss, operation, strategy):
    between = [lambda: Adding(added)] if added else []
    options = SPLIT if strategy == "default" else {}
    messages = warnings_of(fit(net(*between, loss=loss, strategy=strategy, **options)))
    (message,) = set(messages)
    assert message.startswith("The loss is not a mean over the samples")
    assert f"Received: {operation}, which" in message
    # Of a whole batch, it is what it is.
    assert warnings_of(fit(net(*between, loss=loss))) == []


@pytest.mark.parametrize(
    ("added", "loss"),
    [
        (lambda x: ops.mean(ops.square(x)), "mse"),
        (lambda x: ops.sum(ops.square(x), (1, 2, 3)), keras.losses.MeanSquaredError("sum")),
        (None, mean_of_sums),
        (None, unweighted),
        (None, either),
        (None, Scalar("sum_over_batch_size")),
        (None, lambda y, y_pred: ops.mean(ops.square(y - y_pred), 0)),
        (None, keras.losses.Dice(axis=(1, 2, 3))),
    ],
)
def test_loss_that_is_a_mean_or_sum_over_the_samples_is_not_warned_of(added, loss):
    between = [lambda: layers.Dropout(0.5)] + ([lambda: Adding(added)] if added else [])
    weights = np.random.default_rng(2).uniform(size=(6, 4, 4))
    model = net(*between, loss=loss, **SPLIT)
    assert warnings_of(fit(model)) == []
    if isinstance(loss, str | keras.losses.MeanSquaredError):
        assert warnings_of(fit(model, sample_weight=weights)) == []


@pytest.mark.parametrize("is_eager", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", "mean"])
def test_losses_in_functions_that_are_traced_once_are_refused(reduction, is_eager):
    w = keras.Variable(np.ones(3))

    @tf.function(autograph=False)
    def loss(x):
        of_keras = keras.losses.MeanSquaredError(reduction)
        return of_keras(tf.zeros_like(x), x * w, sample_weight=x[:, 0])

    def gradients(x):
        return tfbig.accumulate_gradients(loss, [w], x, micro_batch_size=2).gradients

    x = tf.random.stateless_uniform((5, 3), (0, 1), dtype=w.dtype)
    if not is_eager:
        gradients = tf.function(gradients, autograph=False)
    if reduction == "mean":
        gradients(x)
        return
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"tf\.function of its own"):
        gradients(x)


def test_own_step_is_warned_of_a_loss_that_is_no_mean_over_the_samples():
    w = keras.Variable(np.ones(3))

    def update(loss):
        @tf.function(autograph=False)
        def accumulated(x):
            return tfbig.accumulate_gradients(loss, [w], x, micro_batch_size=2).loss

        return lambda: accumulated(tf.ones((6, 3), w.dtype))

    (message,) = warnings_of(update(lambda x: tf.sqrt(tf.reduce_mean(x * w))))
    assert "Received: Sqrt, which" in message
    assert warnings_of(update(lambda x: tf.reduce_mean(tf.sqrt(x * w)))) == []

    normalization = layers.BatchNormalization()
    normalization.build((None, 3))
    loss, state = warnings_of(update(lambda x: tf.reduce_mean(normalization(x * w, training=True))))
    assert "as batch normalization does" in loss
    assert "moving_mean" in state


@pytest.mark.parametrize("made", [tf.constant(1.0), tf.constant([1.0, 2.0, 3.0])])
def test_a_loss_that_was_made_outside_of_the_graph_is_not_followed(made):
    def trained(*between):
        keras.utils.set_random_seed(0)
        model = net(*between, **SPLIT)
        losses = []
        keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: losses.append(logs))
        assert warnings_of(fit(model, callbacks=[keep])) == []
        return losses[0]["loss"]

    added = trained(lambda: Adding(lambda x: made)) - trained()
    np.testing.assert_allclose(added, tf.reduce_sum(made), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_loss_of_numpy_for_an_output_without_one_is_not_followed():
    x = keras.Input((4, 4, 2))
    model = tfbig.Model(x, [layers.Conv2D(1, 1)(x), layers.Conv2D(1, 1)(x)], **SPLIT)
    model.compile("sgd", ["mse", lambda y, y_pred: np.zeros(1, "float32")])
    assert warnings_of(lambda: model.fit(X, [Y, Y], batch_size=6, verbose=0)) == []


def test_loss_whose_denominator_is_known_is_not_warned_of():
    class OfPositives(tfbig.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            return over_positives(tf.cast(y, y_pred.dtype), y_pred)

        def loss_denominator(self, x, y, y_pred, sample_weight):
            return tf.reduce_sum(tf.cast(y, y_pred.dtype))

    model = OfPositives([keras.Input((4, 4, 2)), layers.Conv2D(1, 1)], **SPLIT)
    model.compile("sgd")
    assert warnings_of(fit(model)) == []
