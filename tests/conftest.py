"""Devices and strategies for all tests, and what the docstring examples use."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import functools
import gc

import keras
import pytest
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

STRATEGIES = ("default", "one_device", "mirrored_2", "mirrored_4")


@functools.cache
def make_strategy(name):
    """The strategy of a name.

    Two MirroredStrategies of different size in one process collide: collectives
    keep the size of the first. So one run of pytest has 2 replicas, another 4.
    """
    if name == "default":
        return tf.distribute.get_strategy()
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy("CPU:0")
    replicas = int(name.removeprefix("mirrored_"))
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def pytest_addoption(parser):
    parser.addoption(
        "--replicas",
        type=int,
        choices=(2, 4),
        default=2,
        help="replicas of MirroredStrategy; with 4, only the tests that want 4 run",
    )
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


# What runs with 4 replicas without --slow: tracing each takes long.
FOUR_REPLICAS = ("exactness_test", "reference_test", "test_one_non_finite_value")


def pytest_collection_modifyitems(config, items):
    replicas, slow = config.getoption("--replicas"), config.getoption("--slow")

    def wanted(item):
        names = getattr(item, "callspec", None) and item.callspec.params.values()
        size = 4 if "mirrored_4" in map(str, names or ()) else 2
        if not slow and size == 4 and not any(n in item.nodeid for n in FOUR_REPLICAS):
            return False
        return size == replicas and (slow or "slow" not in item.keywords)

    config.hook.pytest_deselected(items=[i for i in items if not wanted(i)])
    items[:] = [i for i in items if wanted(i)]


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    """Each supported strategy in turn."""
    return make_strategy(request.param)


@pytest.fixture
def mirrored():
    """Two mirrored replicas."""
    return make_strategy("mirrored_2")


@pytest.fixture(autouse=True)
def seed():
    """Fresh Keras state and seeds for every test."""
    keras.backend.clear_session()
    # It collects garbage; without this, all that TensorFlow keeps would be looked at each time.
    gc.freeze()
    keras.utils.set_random_seed(1)


@pytest.fixture
def float64():
    """Everything computes in float64."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")
