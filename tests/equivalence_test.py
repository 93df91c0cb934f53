"""`check_equivalence` tells an exact model from an inexact one, and why."""

import keras
import numpy as np
import pytest

import tfbig
from tests.conftest import make_strategy
from tfbig import _accumulators

X = np.random.default_rng(0).normal(size=(13, 5))
Y = np.random.default_rng(1).normal(size=(13, 2))


class RunningMean(keras.layers.Layer):
    """A layer that keeps a moving mean of what it sees, once for each call."""

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False, name="mean")

    def call(self, x):
        self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
        return x - keras.ops.stop_gradient(self.mean)


class SummedPenalty(keras.layers.Layer):
    """`add_loss` with a sum over samples, which no cut can know to be one."""

    def call(self, x):
        self.add_loss(keras.ops.sum(x**2))
        return x


def _model(name, *layers, **options):
    with make_strategy(name).scope():
        model = tfbig.Sequential(
            [keras.Input((5,)), keras.layers.Dense(4, "tanh"), *layers, keras.layers.Dense(2)],
            **(options or {"gradient_accumulation_steps": 3}),
        )
        model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 3}, {"micro_batch_size": 4}])
@pytest.mark.usefixtures("float64")
def test_exact_model_is_equivalent(strategy, options):
    model = _model(strategy, **options)
    report = tfbig.check_equivalence(model, X, Y, np.linspace(0, 2, 13))
    assert report.is_equivalent
    assert report.tolerance == 1e-10
    assert report.largest.relative < 1e-13  # A few roundings of float64.
    assert not report.causes
    names = [d.name for d in report.deviations]
    assert sorted(names) == sorted(["loss", *(v.path for v in model.trainable_variables)])
    assert all(name in str(report) for name in names)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
@pytest.mark.parametrize(
    ("make_layer", "cause"),
    [
        (lambda: keras.layers.BatchNormalization(name="norm"), "BatchNormalization ('norm')"),
        (lambda: keras.layers.Dropout(0.5, name="drop"), "Dropout ('drop') draws random"),
        (lambda: RunningMean(name="running"), "RunningMean ('running') changes its state (mean)"),
        (SummedPenalty, "Unknown. A scalar loss, or one from `add_loss`"),
    ],
)
def test_inexact_model_is_named(strategy, make_layer, cause):
    with make_strategy(strategy).scope():
        layer = make_layer()
    report = tfbig.check_equivalence(_model(strategy, layer), X, Y)
    assert not report.is_equivalent
    assert report.causes[0].startswith(cause)
    assert "NOT equivalent" in str(report)
    assert "<--" in str(report)


def test_suspects_of_an_exact_run_are_notes():
    model = _model("default", keras.layers.BatchNormalization(), gradient_accumulation_steps=1)
    report = tfbig.check_equivalence(model, X, Y)
    assert report.is_equivalent
    assert not report.causes
    assert report.notes[0].startswith("BatchNormalization")


def test_planted_fault_is_found(monkeypatch):
    add = _accumulators.add

    def add_twice(totals, gradients, *args):
        return add(add(totals, gradients, *args), gradients, *args)

    monkeypatch.setattr(_accumulators, "add", add_twice)
    report = tfbig.check_equivalence(_model("default"), X, Y)
    assert not report.is_equivalent
    assert report.largest.kind == "gradient"


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_model_is_left_as_it_was(strategy):
    with make_strategy(strategy).scope():
        layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=1)]
    model = _model(strategy, *layers)
    model.fit(X, Y, batch_size=5, verbose=0)
    state = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = [v.numpy() for v in state]
    tfbig.check_equivalence(model, X, Y)
    for variable, value in zip(state, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=variable.path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Sequential([keras.layers.Dense(1)]),
        lambda: tfbig.Sequential([keras.layers.Dense(1)]),
    ],
)
def test_model_without_mixins_or_compile_is_refused(make):
    with pytest.raises(tfbig.errors.InvalidOptionError, match="compiled model with tfbig's mixins"):
        tfbig.check_equivalence(make(), X, Y)
