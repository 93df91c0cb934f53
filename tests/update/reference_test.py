"""tfbig agrees with the update written out in `tests/update/reference.py`."""

import keras
import numpy as np
import pytest

import tfbig
from tests.conftest import STRATEGIES, make_strategy
from tests.update import reference

# float64, values of order 1, sums of a few dozen terms in another order.
TOLERANCE = 1e-10

REPLICAS = {"default": 1, "one_device": 1, "mirrored_2": 2, "mirrored_4": 4}


def network(**options):
    return tfbig.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)], **options
    )


def data(samples):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(samples, 3)), rng.normal(size=(samples, 2))
    weights = [rng.normal(size=shape) for shape in ((3, 4), (4,), (4, 2), (2,))]
    return weights, x, y, rng.uniform(0.0, 2.0, size=samples)


def test_gradients_of_reference_are_slopes():
    weights, x, y, sample_weight = data(7)
    _, gradients = reference.batch_loss(weights, x, y, sample_weight, replicas=2, micro_batches=2)
    step = 1e-6
    for weight, gradient in zip(weights, gradients, strict=True):
        for index in np.ndindex(weight.shape):
            losses = []
            for sign in (1, -1):
                weight[index] += sign * step
                losses.append(reference.batch_loss(weights, x, y, sample_weight, 1, 1)[0])
                weight[index] -= sign * step
            # Central differences: an error of step**2 and of 1e-16 / step.
            assert abs((losses[0] - losses[1]) / (2 * step) - gradient[index]) < 1e-8


@pytest.mark.core
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("samples", "batch_size", "micro_batches", "scale"),
    [(24, 12, 1, 128.0), (25, 10, 3, None), (25, 12, 2, 128.0), (7, 3, 3, None)],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger")
def test_fit_is_the_update_of_the_reference(strategy, scale, micro_batches, samples, batch_size):
    weights, x, y, sample_weight = data(samples)
    # Keras takes settings through float32, which holds these.
    settings = {"learning_rate": 0.125, "momentum": 0.75}
    with make_strategy(strategy).scope():
        model = network(
            gradient_accumulation_steps=micro_batches, loss_scale=scale, log_grad_norm=True
        )
        model.compile(keras.optimizers.SGD(**settings, global_clipnorm=0.5), "mse")
        model.set_weights(weights)
    history = model.fit(
        x, y, batch_size, sample_weight=sample_weight, epochs=2, shuffle=False, verbose=0
    ).history

    velocity = [np.zeros_like(w) for w in weights]
    norms = []
    for epoch in range(2):
        summed = 0.0
        for begin in range(0, samples, batch_size):
            batch = [a[begin : begin + batch_size] for a in (x, y, sample_weight)]
            loss, gradients = reference.batch_loss(
                weights, *batch, REPLICAS[strategy], micro_batches
            )
            summed += loss * len(batch[0])
            norms.append(np.sqrt(sum(np.sum(g**2) for g in gradients)))
            gradients = reference.clip_by_global_norm(gradients, 0.5)
            weights, velocity = reference.momentum_update(weights, velocity, gradients, **settings)
        assert abs(history["loss"][epoch] - summed / samples) < TOLERANCE
        # Logs are those of the last update; Keras keeps them in float32 on several replicas.
        assert history["grad_norm"][epoch] == pytest.approx(norms[-1], rel=1e-6)
    for actual, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
    assert max(norms) > 0.5  # Clipping did something.


SCALES = {
    "growth_and_backoff": {},
    "floor": {"initial": 4.0, "floor": 2.0, "growth_interval": 6},
    "ceiling": {"initial": 32.0, "ceiling": 64.0, "growth_interval": 1},
    "hysteresis": {"hysteresis": 3},
    "hysteresis_and_limits": {"hysteresis": 2, "floor": 512.0, "ceiling": 2048.0},
    "other_factors": {"growth": 1.3, "backoff": 0.7},
}


class Recorder(keras.callbacks.Callback):
    """Notes the loss scale and weights after each update."""

    def __init__(self):
        super().__init__()
        self.rows, self.logs, self.weights = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        state = self.model.loss_scale_state
        self.rows.append(
            reference.LossScale(
                state.loss_scale.numpy(),
                int(state.finite_updates.numpy()),
                int(state.remaining_hysteresis.numpy()),
                int(state.skipped_updates.numpy()),
            )
        )
        self.logs.append((logs["loss_scale"], logs["skipped_updates"]))
        self.weights.append(self.model.get_weights())


@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger")
@pytest.mark.parametrize(("case", "steps"), zip(SCALES, [1, 2, 3] * 2, strict=True))
@pytest.mark.parametrize("strategy", ["default", "mirrored_2", "mirrored_4"])
def test_loss_scale_moves_as_in_the_reference(strategy, steps, case):
    case = {
        "initial": 1024.0,
        "growth": 2.0,
        "backoff": 0.5,
        "growth_interval": 3,
        "floor": 1.0,
        "ceiling": 2.0**20,
        "hysteresis": 1,
    } | SCALES[case]
    updates, batch_size = 48, 8
    rng = np.random.default_rng(3)
    is_finite = rng.uniform(size=updates) > 0.35
    _, x, y, _ = data(updates * batch_size)
    for update in np.flatnonzero(~is_finite):
        # One number of one sample, which any replica and micro-batch may hold.
        place = update * batch_size + rng.integers(batch_size)
        x[place, rng.integers(3)] = rng.choice([np.inf, -np.inf, np.nan])

    with make_strategy(strategy).scope():
        model = network(
            gradient_accumulation_steps=steps,
            loss_scale=tfbig.DynamicLossScale(
                initial_scale=case["initial"],
                growth_factor=case["growth"],
                backoff_factor=case["backoff"],
                growth_interval=case["growth_interval"],
                min_scale=case["floor"],
                max_scale=case["ceiling"],
                hysteresis=case["hysteresis"],
            ),
        )
        model.compile(keras.optimizers.SGD(0.01), "mse")
    before = model.get_weights()
    recorder = Recorder()
    model.fit(x, y, batch_size, shuffle=False, verbose=0, callbacks=[recorder])

    expected = list(reference.loss_scales(is_finite, **case))
    assert recorder.rows == expected
    assert recorder.logs == [(row.scale, row.skipped) for row in expected]
    assert int(model.optimizer.iterations.numpy()) == is_finite.sum()
    for finite, old, new in zip(
        is_finite, [before, *recorder.weights], recorder.weights, strict=False
    ):
        same = [np.array_equal(a, b) for a, b in zip(old, new, strict=True)]
        assert not any(same) if finite else all(same)
