"""What `model.export` writes computes what the Keras model computes."""

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig

# Keras imports tf2onnx in a way that NumPy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")

CASES = ["float32", "mixed_float16", "mixed_bfloat16"]

# float32: the sums of a convolution and of a dense layer in another order, some roundings of
# values around 1. float16: each result of the convolution is rounded to 11 bits, by the runtime
# maybe the other way: one rounding of 2**-11 of values up to 4.
TOLERANCES = {"float32": 1e-5, "mixed_float16": 2e-3}


@pytest.fixture
def policy():
    yield keras.mixed_precision.set_global_policy
    keras.mixed_precision.set_global_policy("float32")


def layers():
    return [
        keras.Input((8, 8, 1), name="image"),
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dense(3, dtype="float32"),
    ]


def trained():
    """A model after some updates of 4 micro-batches each, inputs, and what it makes of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8, 8, 1)).astype("float32")
    y = rng.normal(size=(32, 3)).astype("float32")
    model = tfbig.Sequential(layers(), gradient_accumulation_steps=4)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    model.fit(x, y, batch_size=16, epochs=8, verbose=0)
    # In float16 the first are skipped, until the loss scale fits.
    assert model.optimizer.iterations + model.skipped_updates == 16
    assert model.optimizer.iterations > 0
    return model, x, model.predict(x, verbose=0)


def run_onnx(model, path, x):
    """Exports a model to ONNX, and returns what onnxruntime computes."""
    missing = [n for n in ("onnx", "onnxruntime", "tf2onnx") if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed. pip install tfbig[onnx]")
    import onnxruntime

    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x})[0]


@pytest.mark.parametrize("precision", CASES)
def test_a_saved_model_computes_the_same(precision, policy, tmp_path):
    policy(precision)
    model, x, expected = trained()
    model.export(tmp_path, verbose=False)
    saved = tf.saved_model.load(tmp_path)
    # The same operations of the same library: not even the order of sums differs.
    np.testing.assert_array_equal(saved.serve(x), expected)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_onnxruntime_computes_the_same(precision, policy, tmp_path):
    policy(precision)
    model, x, expected = trained()
    # Another batch size than that of training.
    for samples in (32, 5):
        found = run_onnx(model, tmp_path / "model.onnx", x[:samples])
        np.testing.assert_allclose(found, expected[:samples], rtol=0, atol=TOLERANCES[precision])


def test_a_bfloat16_model_goes_by_way_of_float32(policy, tmp_path):
    policy("mixed_bfloat16")
    model, x, trained_in_bfloat16 = trained()
    # As docs/export.md says; on the day that onnxruntime takes it, the detour can go.
    with pytest.raises(Exception, match="bfloat16"):
        run_onnx(model, tmp_path / "bfloat16.onnx", x)
    policy("float32")
    plain = keras.Sequential(layers())
    plain.set_weights(model.get_weights())
    expected = plain.predict(x, verbose=0)
    found = run_onnx(plain, tmp_path / "float32.onnx", x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES["float32"])
    # Roundings to 8 bits of values up to 4, of which many are added up.
    np.testing.assert_allclose(found, trained_in_bfloat16, rtol=0, atol=5e-2)
