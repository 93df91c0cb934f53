"""`TrainingMonitor` says what training costs, and which part of what devices could do it gets."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests.conftest import make_strategy
from tfbig._keras import work
from tfbig.callbacks import _flops, _peak_flops

LENGTH, VOCABULARY, WIDTH, BLOCKS = 24, 50, 32, 2
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (16, LENGTH))


def fit(model, directory, x=IDS, y=IDS, **options):
    """The rows of a training run of two updates."""
    monitor = tfbig.callbacks.TrainingMonitor(
        directory, frequency=1, plot=False, tensorboard=False, **options
    )
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[monitor])
    return monitor.rows


def block(x):
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(4, WIDTH // 4)(h, h, use_causal_mask=True)
    h = layers.Dense(4 * WIDTH, "gelu")(layers.LayerNormalization()(x))
    return x + layers.Dense(WIDTH)(h)


def decoder(length=LENGTH, **options):
    x = keras.Input((length,), dtype="int64")
    h = layers.Embedding(VOCABULARY, WIDTH)(x)
    for _ in range(BLOCKS):
        h = block(h)
    model = tfbig.Model(x, layers.Dense(VOCABULARY, name="head")(h), **options)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_operations_of_a_decoder(tmp_path):
    model = decoder()
    (row, _) = fit(model, tmp_path)
    # In a forward pass, each weight of a matrix product is multiplied and added once per token;
    # attention multiplies queries with keys, and weights with values.
    products = sum(v.numpy().size for v in model.weights if v.path.endswith("kernel"))
    attention = 12 * BLOCKS * WIDTH * LENGTH**2
    assert row["flops_per_sample"] == 6 * products * LENGTH + attention
    # The common estimate counts tables, biases and norms, and leaves attention out.
    parameters = model.count_params()
    others = parameters - products
    assert others < 0.1 * parameters
    estimate = 6 * parameters * LENGTH
    excess = row["flops_per_sample"] - estimate
    assert -6 * others * LENGTH <= excess <= attention
    assert abs(excess) < 0.1 * estimate


def test_columns_are_consistent(tmp_path):
    _, row = fit(decoder(), tmp_path, peak_flops=1e9)
    rate = row["samples_per_second"]
    assert row["tokens_per_second"] == pytest.approx(LENGTH * rate)
    assert row["mfu"] == pytest.approx(row["flops_per_sample"] * rate / 1e9)
    # Nothing is computed twice.
    assert "hfu" not in row


@pytest.mark.parametrize("devices", ["replicas", "stages"])
def test_each_device_could_compute_as_much(devices, tmp_path):
    pipeline = tfbig.distribute.Pipeline(["CPU:0", "CPU:1"]) if devices == "stages" else None
    with make_strategy("mirrored_2" if devices == "replicas" else "default").scope():
        model = small(pipeline=pipeline)
    x = np.ones((16, 5), "float32")
    _, row = fit(model, tmp_path, x, x, peak_flops=1e9)
    assert row["flops_per_sample"] == 3 * 2 * (5 * 7 + 7 * 5)
    assert row["mfu"] == pytest.approx(row["flops_per_sample"] * row["samples_per_second"] / 2e9)


def small(**options):
    x = keras.Input((5,))
    h = layers.Dense(7, "tanh", name="first")(x)
    model = tfbig.Model(x, layers.Dense(5)(h), gradient_accumulation_steps=2, **options)
    model.compile("sgd", "mse")
    return model


def test_what_is_computed_twice_counts_for_the_hardware(tmp_path):
    x = np.ones((16, 5), "float32")
    _, row = fit(small(recompute=["first"]), tmp_path, x, x, peak_flops=1e9)
    # One of two layers with as many products, four times instead of three.
    assert row["hfu"] / row["mfu"] == pytest.approx(7 / 6)


def test_conditionals_and_functions_within_are_counted(tmp_path):
    class Inner(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 3))

        def call(self, x):
            kernel = tf.convert_to_tensor(self.kernel)
            y = tf.function(lambda x: x @ kernel)(x)
            return tf.cond(tf.reduce_sum(x) > 0, lambda: y @ tf.transpose(kernel), lambda: x)

    model = tfbig.Sequential([keras.Input((5,)), Inner()])
    model.compile("sgd", "mse")
    x = np.ones((16, 5), "float32")
    assert fit(model, tmp_path, x, x)[0]["flops_per_sample"] == 3 * 2 * 2 * 5 * 3


def test_what_is_not_known_has_no_column(tmp_path):
    names = {"tokens_per_second", "flops_per_sample", "mfu", "hfu"}
    # The CPU has no published peak.
    assert names & fit(decoder(), tmp_path / "1")[0].keys() == {
        "tokens_per_second",
        "flops_per_sample",
    }
    # A sequence of any length, unless one says how long they are.
    dataset = tf.data.Dataset.from_tensor_slices((IDS, IDS)).padded_batch(8, ([None], [None]))
    assert dataset.element_spec[0].shape[1] is None
    model = decoder(None)
    options = {"frequency": 1, "plot": False, "tensorboard": False}
    for number, tokens in enumerate((None, 20.5)):
        monitor = tfbig.callbacks.TrainingMonitor(
            tmp_path / f"any{number}", tokens=tokens, **options
        )
        model.fit(dataset, shuffle=False, verbose=0, callbacks=[monitor])
        found = names & monitor.rows[0].keys()
        assert found == ({"tokens_per_second"} if tokens else set())

    class Own(tfbig.Model):
        """Takes something else than the data."""

        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(1)
            self.inner.build((None, 5))

        def call(self, a, b):
            return self.inner(a + b)

        def train_step(self, data):
            x, y = data
            loss = tf.reduce_mean((self(x, x) - y) ** 2)
            return {"loss": loss}

    model = Own()
    model.compile("sgd", "mse")
    x = np.ones((16, 5), "float32")
    assert not names & fit(model, tmp_path / "own", x, x[:, :1])[0].keys()
    # Integers without an embedding are no tokens.
    model = tfbig.Sequential([keras.Input((5,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    found = fit(model, tmp_path / "integers", x.astype("int32"), x[:, :1])[0].keys()
    assert names & found == {"flops_per_sample"}


@pytest.mark.parametrize(
    ("name", "dtype", "tensor_float_32", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", "bfloat16", True, 312e12),
        ("NVIDIA A100 80GB PCIe", "float32", True, 156e12),
        ("NVIDIA A100-SXM4-80GB", "float32", False, 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", True, None),
        ("NVIDIA H100 80GB HBM3", "float16", True, 989.5e12),
        ("NVIDIA H100 PCIe", "bfloat16", True, 756.5e12),
        ("NVIDIA H200", "float64", True, 67e12),
        ("NVIDIA H100 NVL", "bfloat16", True, None),
        ("NVIDIA A10", "float16", True, 125e12),
        ("NVIDIA A10G", "float16", True, None),
        ("Tesla V100-SXM2-16GB", "float16", True, 125e12),
        ("Tesla V100-SXM2-16GB", "bfloat16", True, None),
        ("Tesla T4", "float32", True, 8.1e12),
        ("NVIDIA L4", "bfloat16", True, 121e12),
        ("NVIDIA L40S", "bfloat16", True, None),
        ("NVIDIA GeForce GTX 1080", "float32", True, None),
    ],
)
def test_published_peaks_of_gpus(name, dtype, tensor_float_32, expected):
    assert _peak_flops.of_gpu(name, dtype, tensor_float_32) == expected


def test_published_peaks_of_tpus():
    assert _peak_flops.of_tpu("v5litepod-8", "bfloat16") == 197e12
    # Half a chip is a device.
    assert _peak_flops.of_tpu("v3-8", "float32") == 61.5e12
    assert _peak_flops.of_tpu("v3-8", "float64") is None
    assert _peak_flops.of_tpu("", "bfloat16") is None


def test_the_peak_of_the_gpu_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(_peak_flops._keras.devices, "is_on_cpu", lambda _: False)
    monkeypatch.setattr(_flops._peak_flops.tf.config, "list_physical_devices", lambda _: ["gpu"])
    monkeypatch.setattr(
        _peak_flops.tf.config.experimental,
        "get_device_details",
        lambda _: {"device_name": "Tesla T4"},
    )
    model = small()
    model.jit_compile = False
    x = np.ones((16, 5), "float32")
    _, row = fit(model, tmp_path, x, x)
    assert row["mfu"] == pytest.approx(row["flops_per_sample"] * row["samples_per_second"] / 8.1e12)


@pytest.mark.parametrize("name", ["tokens", "peak_flops"])
@pytest.mark.parametrize("value", [0, -1.0, True, "many", float("inf"), float("nan")])
def test_numbers_that_are_none(name, value, tmp_path):
    with pytest.raises(tfbig.errors.InvalidOptionError, match=f"`{name}` must be a positive"):
        tfbig.callbacks.TrainingMonitor(tmp_path, **{name: value})


# --- Layers counted by hand -------------------------------------------------------------------

# A layer, the shape of a sample, and the multiplications of a forward pass.
COUNTED = {
    "transposed": (layers.Conv2DTranspose(8, 3, 2, "same"), (6, 5, 4), 6 * 5 * 4 * 3 * 3 * 8),
    "transposed_1d": (layers.Conv1DTranspose(8, 3, 2), (6, 4), 6 * 4 * 3 * 8),
    "transposed_3d": (layers.Conv3DTranspose(8, 3), (2, 3, 4, 5), 2 * 3 * 4 * 5 * 3**3 * 8),
    "grouped": (layers.Conv2D(8, 3, padding="same", groups=2), (6, 5, 4), 6 * 5 * 9 * 2 * 8),
    "lstm": (layers.LSTM(5), (7, 3), 7 * (3 + 5) * 4 * 5),
    "gru": (layers.Bidirectional(layers.GRU(5)), (7, 3), 2 * 7 * (3 + 5) * 3 * 5),
    "cells": (layers.RNN([layers.LSTMCell(5), layers.GRUCell(4)]), (7, 3), 7 * (8 * 20 + 9 * 12)),
    "unrolled": (layers.SimpleRNN(5, unroll=True), (7, 3), 7 * (3 + 5) * 5),
    "pictures": (layers.ConvLSTM2D(2, 3, padding="same"), (4, 6, 5, 3), 4 * 30 * 9 * (3 + 2) * 8),
}


@pytest.mark.parametrize("name", COUNTED)
def test_layers_are_counted_as_by_hand(name, tmp_path):
    layer, shape, products = COUNTED[name]
    layer = type(layer).from_config(layer.get_config())
    model = tfbig.Sequential([keras.Input(shape), layer], recompute=[layer.name])
    model.compile("sgd", "mse")
    y = np.zeros((16, *model.output_shape[1:]), "float32")
    _, row = fit(model, tmp_path, np.ones((16, *shape), "float32"), y, peak_flops=1e9)
    assert row["flops_per_sample"] == 3 * 2 * products
    assert row["hfu"] / row["mfu"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(("layer", "gates"), [(layers.LSTM, 4), (layers.GRU, 3)])
def test_recurrent_layers_of_a_gpu_are_counted(layer, gates, monkeypatch):
    # It is traced, and nothing runs.
    module = sys.modules["keras.src.backend.tensorflow.rnn"]
    monkeypatch.setattr(module, "_is_gpu_available", lambda: True)
    model = keras.Sequential([keras.Input((7, 3)), layer(5, return_sequences=True), layer(4)])
    found, _ = work.products_of_forward_pass(model, tf.TensorSpec([1, 7, 3]))
    assert found == 2 * 7 * gates * ((3 + 5) * 5 + (5 + 4) * 4)
