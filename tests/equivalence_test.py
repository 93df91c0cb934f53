"""`check_equivalence` tells an exact model from an inexact one, and why."""

import keras
import numpy as np
import pytest

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig._update import accumulators, apply, table_rows

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
    """`add_loss` with a sum over samples, which no split can know to be one."""

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


@in_turn(
    {
        "strategy": ["default", "mirrored_2"],
        "options": [{"gradient_accumulation_steps": 3}, {"micro_batch_size": 4}],
    }
)
@pytest.mark.usefixtures("float64")
def test_exact_model_is_equivalent(strategy, options):
    model = _model(strategy, **options)
    report = tfbig.check_equivalence(model, X, Y, np.linspace(0, 2, 13))
    assert report.is_equivalent
    assert report.tolerance == 1e-10
    assert report.largest.relative < 1e-13  # A few roundings of float64.
    assert not report.causes
    paths = [v.path for v in model.trainable_variables]
    names = {kind: [] for kind in ("loss", "gradient", "weight", "optimizer")}
    for deviation in report.deviations:
        names[deviation.kind].append(deviation.name)
        assert deviation.name in str(report)
    assert names["loss"] == ["loss"]
    assert sorted(names["gradient"]) == sorted(names["weight"]) == sorted(paths)
    # Adam's two moments.
    assert len(names["optimizer"]) == 2 * len(paths)


INEXACT = {
    "normalization": (
        lambda: keras.layers.BatchNormalization(name="norm"),
        "BatchNormalization ('norm')",
    ),
    "dropout": (lambda: keras.layers.Dropout(0.5, name="drop"), "Dropout ('drop') draws random"),
    "state": (
        lambda: RunningMean(name="running"),
        "RunningMean ('running') changes its state (mean)",
    ),
    "penalty": (SummedPenalty, "Unknown. If a scalar loss, or one from `add_loss`"),
}


@in_turn({"make_layer, cause": INEXACT, "strategy": ["default", "mirrored_2"]})
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
    add = accumulators.add

    def add_twice(totals, gradients, *args):
        return add(add(totals, gradients, *args), gradients, *args)

    monkeypatch.setattr(accumulators, "add", add_twice)
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


class Positions(keras.layers.Layer):
    """Adds an embedding of each position."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(5, 3)

    def build(self, shape):
        self.table.build(None)

    def call(self, x):
        return keras.ops.tanh(x[..., None] + self.table(keras.ops.arange(5)))


def _with_positions(optimizer, strategy="default"):
    with make_strategy(strategy).scope():
        model = tfbig.Sequential(
            [keras.Input((5,)), Positions(), keras.layers.Flatten(), keras.layers.Dense(2)],
            gradient_accumulation_steps=3,
        )
        model.compile(optimizer, "mse")
    return model


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_rows_that_an_optimizer_squares_one_by_one_are_found(strategy, monkeypatch):
    """With gradients alone, and with SGD, they are not seen."""
    exact = tfbig.check_equivalence(_with_positions("adam", strategy), X, Y)
    assert exact.is_equivalent, exact
    # As if each look-up of a position were one of a sample.
    monkeypatch.setattr(table_rows, "classify", lambda *_: (table_rows.Rows.KEPT,))
    report = tfbig.check_equivalence(_with_positions("adam", strategy), X, Y)
    beyond = [d for d in report.deviations if not d.is_rounding]
    assert {d.kind for d in beyond} == {"weight", "optimizer"}
    assert "rows of a table were added up" in report.causes[0]
    assert tfbig.check_equivalence(_with_positions("sgd", strategy), X, Y).is_equivalent


def test_division_of_the_code_that_trains_is_checked(monkeypatch):
    divide = apply._divide
    monkeypatch.setattr(apply, "_divide", lambda g, divisor: divide(g, 1.5 * divisor))
    report = tfbig.check_equivalence(_model("default"), X, Y)
    assert not report.is_equivalent
    assert report.largest.kind == "gradient"


def similarity(y, y_pred):
    return keras.ops.mean((y_pred @ keras.ops.transpose(y_pred)) ** 2)


COUPLING = {
    "dice": (keras.losses.Dice(), "Dice"),
    "tversky": (keras.losses.Tversky(), "Tversky"),
    "similarity": (similarity, None),
}


@in_turn({"loss, name": COUPLING, "strategy": ["default", "mirrored_2"]})
def test_loss_that_couples_samples_is_named(loss, name, strategy):
    model = _model(strategy)
    with make_strategy(strategy).scope():
        model.compile("adam", loss)
    report = tfbig.check_equivalence(model, X, np.abs(Y))
    assert not report.is_equivalent
    assert report.causes[0].startswith("The loss couples the samples of a batch")
    assert name is None or name in report.causes[0]
    assert "does not help" in report.causes[0]


def test_loss_of_another_denominator_is_not_said_to_couple_samples():
    class Net(tfbig.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            y = keras.ops.cast(y, y_pred.dtype)
            positive = keras.ops.cast(y[:, :1] > 0, y_pred.dtype)
            return keras.ops.sum(positive * (y - y_pred) ** 2) / keras.ops.sum(positive)

    model = Net([keras.Input((5,)), keras.layers.Dense(2)], gradient_accumulation_steps=3)
    model.compile("sgd")
    (cause,) = tfbig.check_equivalence(model, X, Y).causes
    assert "override `loss_denominator`" in cause


def test_skipped_updates_are_tried_again():
    scale = tfbig.DynamicLossScale(initial_scale=2.0**126, max_scale=2.0**126)
    model = _model("default", gradient_accumulation_steps=3, loss_scale=scale)
    report = tfbig.check_equivalence(model, 1e3 * X, Y)
    assert report.is_equivalent, report
    assert model.skipped_updates == 0


def test_model_with_a_step_of_its_own_or_no_size_yet_is_refused():
    class Net(tfbig.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    model = Net([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.InvalidOptionError, match="`train_step` of its own"):
        tfbig.check_equivalence(model, X, Y)
    model = _model("default", micro_batch_size="auto")
    with pytest.raises(tfbig.errors.InvalidOptionError, match="has not been fitted"):
        tfbig.check_equivalence(model, X, Y)


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


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1e-4"])
def test_tolerance_must_be_a_positive_number(value):
    with pytest.raises(tfbig.errors.InvalidOptionError, match=r"`tolerance` must .* Received: tol"):
        tfbig.check_equivalence(_model("default"), X, Y, tolerance=value)


def test_data_that_cannot_be_compared():
    model = _model("default", gradient_accumulation_steps=3)
    x = X.copy()
    x[1, 2] = np.nan
    report = tfbig.check_equivalence(model, x, Y)
    assert not report.is_equivalent
    (cause,) = report.causes
    assert "not finite" in cause
    with pytest.raises(tfbig.errors.InvalidOptionError, match=f"Received: {len(X)}, 3 samples"):
        tfbig.check_equivalence(model, X, Y[:3])
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.InvalidOptionError, match="must have trainable weights"):
        tfbig.check_equivalence(model, X, Y)
