"""The best learning rate of a narrow model is the best of wide ones, and without muP it is not.

Each width trains with each of seven learning rates, a factor of two apart, from the same first
values; learning rates fall linearly to zero. The loss on other data is averaged over runs. At the
base width, models with and without muP are the same.
"""

import keras
import numpy as np
import pytest

import tfbig
from tests.mup.models import decoder

L = keras.layers

# Around a learning rate in the middle of the grid.
STEPS = 2.0 ** np.arange(-3, 4)


def losses(build, data, width, base, *, parametrized, rates, runs, batch, updates):
    """The mean loss of each learning rate."""
    (x, y), held_out = data
    x, y = x[: updates * batch], y[: updates * batch]
    found = np.zeros((runs, len(rates)))
    for run in range(runs):
        keras.utils.set_random_seed(run)
        model = tfbig.mup.build(build, width, base_width=base) if parametrized else build(width)
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        # Compiled once, put back for each learning rate.
        state = [*model.variables, *optimizer.variables]
        first = [v.numpy() for v in state]
        for i, rate in enumerate(rates):
            for variable, value in zip(state, first, strict=True):
                variable.assign(value)
            model.fit(
                x, y, batch_size=batch, shuffle=False, verbose=0, callbacks=[Falling(rate, updates)]
            )
            found[run, i] = model.evaluate(*held_out, batch_size=len(held_out[0]), verbose=0)
    return found.mean(axis=0)


class Falling(keras.callbacks.Callback):
    def __init__(self, rate, updates):
        super().__init__()
        self.rate, self.updates = rate, updates

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = self.rate * (1 - batch / self.updates)


def perceptron(width):
    inputs = keras.Input((32,))
    hidden = inputs
    for _ in range(2):
        hidden = L.Dense(width, "relu", kernel_initializer="he_normal")(hidden)
    model = keras.Model(inputs, L.Dense(10, kernel_initializer="zeros")(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, jit_compile=False)
    return model


def small_decoder(width):
    return decoder(width, 4, keras.optimizers.Adam(), output="zeros")


def classes(samples):
    """Features and the largest output of a random network: training data, held-out data."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples + 4096, 32)).astype("float32")
    inner, outer = rng.normal(size=(32, 24)) / np.sqrt(32), rng.normal(size=(24, 10))
    y = (np.tanh(2 * x @ inner) @ outer).argmax(axis=1)
    return (x[4096:], y[4096:]), (x[:4096], y[:4096])


def text(samples):
    """Tokens and those that follow; each depends on the two before it."""
    rng = np.random.default_rng(0)
    total = rng.dirichlet(np.full(32, 0.1), size=(32, 32)).cumsum(axis=-1)
    tokens = np.zeros((samples + 512, 25), "int32")
    tokens[:, :2] = rng.integers(0, 32, (len(tokens), 2))
    for i in range(2, 25):
        drawn = rng.random((len(tokens), 1))
        tokens[:, i] = (drawn > total[tokens[:, i - 2], tokens[:, i - 1]]).sum(1).clip(0, 31)
    x, y = tokens[:, :-1], tokens[:, 1:]
    return (x[512:], y[512:]), (x[:512], y[:512])


def best(build, data, widths, rates, **kwargs):
    """For each width, the best learning rates with and without muP, as exponents of two."""
    base, *wide = widths
    found = {}
    for width in widths:
        for parametrized in (True, False):
            if width == base and not parametrized:
                continue
            each = losses(
                build, data, width, base, parametrized=parametrized, rates=rates, **kwargs
            )
            kind = "muP" if parametrized else "without"
            exponent = int(np.log2(rates[np.argmin(each)]))
            print(f"{kind:8}{width:5}  2^{exponent}  ", *(f"{loss:.3f}" for loss in each))
            found[parametrized, width] = exponent
    at_base = found[True, base]
    return at_base, [found[True, w] for w in wide], [found[False, w] for w in wide]


def test_perceptron_at_small_widths():
    kwargs = {"runs": 1, "batch": 64, "updates": 100}
    rates = 2.0**-6 * STEPS
    base, with_mup, without = best(perceptron, classes(6400), (64, 256), rates, **kwargs)
    assert with_mup == [base]
    assert without[0] < base


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_perceptron():
    kwargs = {"runs": 3, "batch": 64, "updates": 150}
    rates = 2.0**-6 * STEPS
    base, with_mup, without = best(perceptron, classes(9600), (64, 256, 1024), rates, **kwargs)
    assert with_mup == [base, base]
    assert base > without[0] >= without[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_decoder():
    kwargs = {"runs": 1, "batch": 32, "updates": 120}
    rates = 2.0**-8 * STEPS
    base, with_mup, without = best(small_decoder, text(3840), (64, 128, 256), rates, **kwargs)
    assert with_mup == [base, base]
    assert base > without[0] >= without[1]
