"""What a split changes whatever tfbig does is refused, or said once, before training."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

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


def test_rows_of_embeddings_under_xla_are_warned_of():
    model = tfbig.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            layers.Embedding(5, 2, name="words"),
            layers.Flatten(),
            layers.Dense(1),
        ],
        **SPLIT,
    )
    model.compile("adam", "mse", jit_compile=True)
    x, y = np.ones((6, 3), "int32"), np.ones((6, 1))
    (message,) = warnings_of(lambda: model.fit(x, y, batch_size=6, verbose=0))
    assert message.startswith("With jit_compile=True, the rows")
    assert "words" in message


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
