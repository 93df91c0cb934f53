"""The whole update as one XLA program, as on a TPU, but on the CPU: its numbers are compared."""

import contextlib
import json
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests import job
from tests.conftest import make_strategy
from tfbig import _keras

pytestmark = pytest.mark.usefixtures("float64")

# XLA computes in another order, so floating-point sums differ by some 1e-16 of values near 1.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(48, 6)), RNG.normal(size=(48, 2))
BATCH = 16


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.5)


OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
    "schedule": lambda: keras.optimizers.Adam(schedule()),
    "ema": lambda: keras.optimizers.Adam(0.02, use_ema=True, ema_overwrite_frequency=2),
}


def build(optimizer="adamw", batch_norm=True, **options):
    keras.utils.set_random_seed(1)
    with make_strategy("one_device").scope():
        inner = [layers.Dense(8, "tanh", kernel_regularizer="l2")]
        inner += [layers.BatchNormalization()] * batch_norm
        inner.append(layers.Dense(2))
        model = tfbig.Sequential([keras.Input((6,)), *inner], **options)
        model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"], weighted_metrics=["mse"])
    return model


def train(model, x=X, y=Y, *, whole, counted=None):
    """An epoch, with the step compiled as a whole or not at all; returns the last logs.

    Of each batch, all samples count, or those that `counted` says.
    """
    strategy = model.distribute_strategy
    context = _keras.devices.compiled_as_a_whole if whole else contextlib.nullcontext
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)
        _keras.building.build_for(
            model,
            (
                tf.TensorSpec([BATCH, *x.shape[1:]], x.dtype),
                tf.TensorSpec([BATCH, *y.shape[1:]], y.dtype),
            ),
        )

    @tf.function(jit_compile=True if whole else None, autograph=False)
    def update(x, y, *counted):
        with context():
            data = _keras.padding.PaddedBatch((x, y), *counted) if counted else (x, y)
            return strategy.run(model.train_step, args=(data,))

    flags = [] if counted is None else [tf.constant(counted, tf.int32)]
    for begin in range(0, len(x), BATCH):
        x_batch, y_batch = (tf.constant(v[begin : begin + BATCH]) for v in (x, y))
        logs = update(x_batch, y_batch, *flags)
    return {k: float(v) for k, v in logs.items()}


def assert_same(got, want, tolerance=TOLERANCE):
    for a, b in zip(
        [*got.variables, *got.optimizer.variables],
        [*want.variables, *want.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [("adamw", 1), ("adamw", 4), ("adamw", 16), *((o, 4) for o in list(OPTIMIZERS)[1:])],
)
def test_weights_are_those_of_the_uncompiled_step(optimizer, steps):
    models, logs = [], []
    for whole in (True, False):
        model = build(optimizer, gradient_accumulation_steps=steps, log_grad_norm=True)
        logs.append(train(model, whole=whole))
        models.append(model)
    assert_same(*models)
    assert logs[0] == pytest.approx(logs[1], rel=TOLERANCE)


def test_micro_batches_of_two_sizes():
    models = []
    for whole in (True, False):
        models.append(build(micro_batch_size=6))
        train(models[-1], whole=whole)
    assert_same(*models)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 5},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 1},
    ],
)
def test_padded_batch_is_that_of_its_samples(options):
    """A batch of 16, of which 7 samples count, against a batch of these 7."""
    got, want = build(batch_norm=False, **options), build(batch_norm=False, **options)
    x, y = X[:BATCH].copy(), Y[:BATCH].copy()
    x[7:], y[7:] = np.nan, np.nan
    train(got, x, y, whole=True, counted=np.arange(BATCH) < 7)
    train(want, X[:7], Y[:7], whole=False)
    assert_same(got, want)


def test_non_finite_update_is_skipped():
    x = X.copy()
    x[20, 3] = np.inf
    models = []
    for whole in (True, False):
        scale = tfbig.DynamicLossScale(initial_scale=8.0)
        model = build(gradient_accumulation_steps=4, loss_scale=scale)
        train(model, x, whole=whole)
        models.append(model)
        assert (model.skipped_updates, model.loss_scale) == (1, 4.0)
        assert int(model.optimizer.iterations.numpy()) == 2
    assert_same(*models)


def test_dropout_draws_as_in_another_compiled_step():
    """XLA's generator is not that of the uncompiled step, but one program's is another's."""

    def make():
        keras.utils.set_random_seed(1)
        with make_strategy("one_device").scope():
            inner = [layers.Dense(8, "tanh"), layers.Dropout(0.5, seed=3), layers.Dense(2)]
            model = tfbig.Sequential([keras.Input((6,)), *inner], gradient_accumulation_steps=4)
            model.compile("sgd", "mse", jit_compile=True)
        return model

    got, want = make(), make()
    train(got, whole=True)
    # The loop alone is compiled there.
    train(want, whole=False)
    assert_same(got, want)


def test_recomputation():
    models = []
    for recompute in (True, None):
        models.append(build(gradient_accumulation_steps=4, recompute=recompute))
        train(models[-1], whole=True)
    assert_same(*models)


def test_float32():
    keras.config.set_floatx("float32")
    models = []
    for whole in (True, False):
        models.append(build(gradient_accumulation_steps=4))
        train(models[-1], X.astype("float32"), Y.astype("float32"), whole=whole)
    # Adam divides gradients by their own size: a rounding error of 1e-7 of a gradient near
    # zero is a part of it, and moves a weight by as much of the rate of 0.02.
    assert_same(*models, tolerance=1e-4)


def test_memory_is_that_of_a_micro_batch(tmp_path):
    command = [sys.executable, job.JOBS / "temporaries.py", tmp_path, 2, 8, 32]
    done = job.finish(job.start(command), timeout=120)
    assert done.returncode == 0, done.stderr
    two, *more, whole = json.loads(done.stdout.splitlines()[-1])
    for other in more:
        assert other == pytest.approx(two, rel=0.02)
    # The control: 32 micro-batches at once take several times as much.
    assert whole > 4 * two
