"""`coordinate_check` says which parametrization keeps activations, and which does not."""

import keras
import numpy as np
import pytest

import tfbig
from tests.mup.models import decoder

L = keras.layers
OPTIMIZERS = keras.optimizers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16)).astype("float32")
Y = np.sin(X @ RNG.normal(size=(16, 4)) / 2).astype("float32")
TOKENS = (RNG.integers(0, 32, (16, 1)) + np.arange(25) * RNG.integers(1, 4, (16, 1))) % 32


def perceptron(optimizer):
    def build(width):
        inputs = keras.Input((16,))
        hidden = L.Dense(width, "relu", name="first")(inputs)
        hidden = L.Dense(width, "relu", name="second")(hidden)
        model = keras.Model(inputs, L.Dense(4, name="last")(hidden))
        model.compile(optimizer(), "mse", jit_compile=False)
        return model

    return build


def check(optimizer, **kwargs):
    return tfbig.mup.coordinate_check(
        perceptron(optimizer), X, Y, **{"widths": (64, 256, 1024), "updates": 3} | kwargs
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: OPTIMIZERS.Adam(0.02),
        lambda: OPTIMIZERS.SGD(0.2),
        pytest.param(lambda: OPTIMIZERS.SGD(0.1, momentum=0.9), marks=pytest.mark.slow),
        lambda: OPTIMIZERS.Muon(0.02),
        pytest.param(lambda: OPTIMIZERS.Lion(0.005), marks=pytest.mark.slow),
        pytest.param(lambda: OPTIMIZERS.RMSprop(0.005), marks=pytest.mark.slow),
        pytest.param(lambda: OPTIMIZERS.Adagrad(0.05), marks=pytest.mark.slow),
        pytest.param(lambda: OPTIMIZERS.Adamax(0.02), marks=pytest.mark.slow),
        pytest.param(lambda: OPTIMIZERS.Nadam(0.02), marks=pytest.mark.slow),
    ],
    ids=["adam", "sgd", "momentum", "muon", "lion", "rmsprop", "adagrad", "adamax", "nadam"],
)
def test_perceptron(optimizer):
    found = check(optimizer)
    assert found.is_ok, str(found)
    without = check(optimizer, parametrized=False)
    assert not without.is_ok, str(without)
    # Not by a hair: the output grows, or hidden layers learn less.
    grown = max(without.exponent("last", update) for update in (1, 2, 3))
    assert max(grown, -without.exponent("first", 3, "change")) > 0.35, str(without)


@pytest.mark.slow
@pytest.mark.parametrize("grows", ["number", "size"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_decoder(name, grows):
    def build(width):
        heads = width // 16 if grows == "number" else 4
        rates = {"adam": OPTIMIZERS.Adam(0.01), "sgd": OPTIMIZERS.SGD(0.2)}
        return decoder(width, heads, rates[name])

    options = {"widths": (64, 128, 256, 512), "updates": 4, "repeats": 3}
    found = tfbig.mup.coordinate_check(build, TOKENS[:, :-1], TOKENS[:, 1:], **options)
    assert found.is_ok, str(found)
    without = tfbig.mup.coordinate_check(
        build, TOKENS[:, :-1], TOKENS[:, 1:], parametrized=False, **options
    )
    assert not without.is_ok, str(without)


def test_result():
    rows = [
        tfbig.mup.Coordinates(layer, update, width, size, change)
        for layer, power in [("flat", 0.0), ("grows", 0.5), ("stops", -0.5)]
        for update, width, size, change in [
            (0, 64, 1.0, 0.0),
            (0, 256, 1.0, 0.0),
            (1, 64, 2.0, 1.0),
            (1, 256, 2.0 * 4 ** max(power, 0), 4**power),
        ]
    ]
    found = tfbig.mup.CoordinateCheck(tuple(rows), tolerance=0.25)
    assert found.exponent("grows", 1) == pytest.approx(0.5)
    assert found.exponent("stops", 1, "change") == pytest.approx(-0.5)
    assert found.exponent("stops", 0, "change") == 0
    assert not found.is_ok
    assert [text.split(" at ")[0].split(":")[0] for text in found.failures] == [
        "The size of grows grows as width^0.50",
        "stops learns less in a wider model",
    ]
    assert "flat   width^0.00" in str(found)
    assert tfbig.mup.CoordinateCheck(tuple(rows[:4]), tolerance=0.25).is_ok


def test_numbers_that_are_not_finite():
    rows = [tfbig.mup.Coordinates("x", u, w, np.nan, 1.0) for u in (0, 1) for w in (8, 16)]
    assert not tfbig.mup.CoordinateCheck(tuple(rows), tolerance=0.25).is_ok


def test_sizes_are_those_of_outputs():
    found = check(lambda: OPTIMIZERS.SGD(0.0), widths=(8, 16), repeats=1, updates=1)
    assert {row.layer for row in found.rows} == {"first", "second", "last"}
    assert all(row.change == 0 for row in found.rows)
    keras.utils.set_random_seed(0)
    found = check(lambda: OPTIMIZERS.SGD(0.1), widths=(8, 16), repeats=1, updates=1)
    keras.utils.set_random_seed(0)
    model = perceptron(OPTIMIZERS.SGD)(8)
    first = next(r for r in found.rows if (r.layer, r.update, r.width) == ("first", 0, 8))
    assert first.size == pytest.approx(float(np.mean(np.abs(model.layers[1](X)))), rel=1e-5)


def test_layers_stay_as_they_were():
    seen = []
    build = perceptron(OPTIMIZERS.SGD)

    def recorded(width):
        seen.append(build(width))
        return seen[-1]

    tfbig.mup.coordinate_check(recorded, X, Y, widths=(8, 16), updates=1, repeats=1)
    assert not any("call" in vars(layer) for model in seen for layer in model.layers)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    found = check(lambda: OPTIMIZERS.SGD(0.1), widths=(8, 16), repeats=1, updates=2)
    path = tmp_path / "check.png"
    found.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
