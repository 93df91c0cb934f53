"""A micro-batch whose `loss_denominator` is zero counts nothing: its loss is no number."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tfbig
from tests.conftest import make_strategy
from tfbig.distribute import Pipeline, _sharded_weights

pytestmark = pytest.mark.usefixtures("float64")

RNG = np.random.default_rng(0)
TOKENS, TARGETS = RNG.integers(1, 7, (12, 5)), RNG.normal(size=(12, 5, 2))
# Padding alone, also in both samples of a micro-batch, and in all those of a replica.
TOKENS[[0, 3, 6, 7, 8]] = 0
TOKENS[4, 2:] = 0


def tagger(base, **options):
    class Tagger(base):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            losses = ops.sum(ops.square(y - y_pred), -1) * ops.cast(x > 0, y_pred.dtype)
            return ops.sum(losses) / self.loss_denominator(x, y, y_pred, sample_weight)

        def loss_denominator(self, x, y, y_pred, sample_weight):
            return ops.sum(ops.cast(x > 0, y_pred.dtype))

    keras.utils.set_random_seed(1)
    x = keras.Input((5,), dtype="int32")
    return Tagger(x, layers.Dense(2)(layers.Dense(3, "tanh")(layers.Embedding(7, 4)(x))), **options)


def trained(model, optimizer, **settings):
    optimizers = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}
    model.compile(optimizers[optimizer](0.1), **settings)
    history = model.fit(TOKENS, TARGETS, batch_size=6, epochs=2, shuffle=False, verbose=0).history
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables), history["loss"]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("strategy", "options", "settings"),
    [
        ("default", {"micro_batch_size": 1}, {}),
        ("default", {"micro_batch_size": 2, "loss_scale": 8.0}, {}),
        ("default", {"gradient_accumulation_steps": 4}, {"jit_compile": False}),
        ("default", {"gradient_accumulation_steps": 4}, {"jit_compile": True}),
        ("default", {"micro_batch_size": 1}, {"run_eagerly": True}),
        ("default", {"micro_batch_size": 1, "pipeline": Pipeline(["CPU:0", "CPU:1"])}, {}),
        ("mirrored_2", {}, {}),
        ("mirrored_2", {"micro_batch_size": 1, "shard": "weights"}, {}),
    ],
)
def test_the_update_is_that_of_plain_keras(strategy, options, settings, optimizer, monkeypatch):
    monkeypatch.setattr(_sharded_weights, "SMALLEST", 1)
    if settings.get("jit_compile"):
        # XLA adds up the rows of a table before Adam squares them.
        optimizer = "sgd"
    with make_strategy(strategy).scope():
        found = trained(tagger(tfbig.Model, **options), optimizer, **settings)
    expected = trained(tagger(keras.Model), optimizer)
    assert np.all(np.isfinite(expected[-1]))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
