"""`exchange_bucket_bytes`: how many gradients travel at a time changes memory and no number."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.conftest import make_strategy
from tests.update.exchange_test import samples, traced_update
from tfbig._update import replicas

FLOAT = 4  # Bytes.


def train(strategy, optimizer, **options):
    """Weights after two updates of a model with rows, large and small variables and state."""
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        tokens, x = keras.Input((4,), dtype="int32"), keras.Input((3,))
        rows = keras.layers.Flatten()(keras.layers.Embedding(9, 5)(tokens))
        h = keras.layers.Dense(20)(keras.layers.BatchNormalization()(x))
        outputs = keras.layers.Dense(1)(keras.layers.Concatenate()([rows, h]))
        model = tfbig.Model([tokens, x], outputs, gradient_accumulation_steps=2, **options)
        model.compile(optimizer(), "mse")
    x, y = samples(22)
    data = [np.random.default_rng(0).integers(0, 9, (22, 4)), x], y
    model.fit(*data, batch_size=11, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.parametrize("strategy", ["mirrored_2", "mirrored_4"])
@pytest.mark.parametrize(
    ("optimizer", "options", "size"),
    [
        # Each gradient alone; and several, not all, together.
        pytest.param(keras.optimizers.SGD, {}, 1, id="sgd"),
        pytest.param(keras.optimizers.Adam, {"loss_scale": 64.0}, 30 * FLOAT, id="adam_scaled"),
        pytest.param(keras.optimizers.SGD, {"exchange_dtype": "bfloat16"}, 1, id="half"),
    ],
)
def test_the_size_of_buckets_changes_no_bit(strategy, optimizer, options, size):
    one = train(strategy, optimizer, **options)
    some = train(strategy, optimizer, exchange_bucket_bytes=size, **options)
    for a, b in zip(one, some, strict=True):
        np.testing.assert_array_equal(a, b)


def test_buckets_are_filled_in_order():
    sizes = [3, 5, 2, 100, 1, 7, 9]
    tensors = [tf.zeros(n) for n in sizes]
    buckets = list(replicas._buckets(tensors, 10 * FLOAT))
    assert [[len(t) for t in b] for b in buckets] == [[3, 5, 2], [100], [1, 7], [9]]
    assert not list(replicas._buckets([], 10))


def exchanges(model):
    """For each bucket of one replica in a traced update: what it waits for."""
    graph = traced_update(model, *samples(8))
    sent = [op for op in graph.get_operations() if "/bucket_" in op.name]
    found = {}
    for op in sent:
        found.setdefault(op.name.split("/bucket_")[1].split("/")[0], set()).update(
            o.name for o in op.control_inputs
        )
    return found


def test_a_bucket_waits_for_the_one_before_it():
    with make_strategy("mirrored_2").scope():
        layers = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)]
        model = tfbig.Sequential(layers, exchange_bucket_bytes=1)
        model.compile("sgd", "mse")
    found = exchanges(model)
    # Two kernels, two biases, and the scalars.
    assert len(found) >= 5
    assert not found["0"]
    assert all(found[str(i)] for i in range(1, len(found)))


def test_small_models_need_one_bucket():
    with make_strategy("mirrored_2").scope():
        model = tfbig.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        model.compile("sgd", "mse")
    assert exchanges(model).keys() == {"0"}


@pytest.mark.parametrize("value", [0, -1, 1.5, None, True, "32 MiB"])
def test_a_bucket_has_a_number_of_bytes(value):
    with pytest.raises(ValueError, match="`exchange_bucket_bytes` must be an integer >= 1"):
        tfbig.Sequential([keras.Input((3,))], exchange_bucket_bytes=value)
