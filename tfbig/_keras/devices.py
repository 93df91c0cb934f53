"""Keras does not tell which devices replicas run on, nor whether XLA compiles all; this does."""

import contextlib

import tensorflow as tf
from tensorflow.python.distribute import device_util as _device_util

from tfbig import _types
from tfbig._keras.thread import current, holding

# The strategies that tfbig supports, besides the default one, which names no devices.
STRATEGIES = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.TPUStrategy,
)


def devices_of(strategy: _types.Strategy) -> list[str]:
    """Names, such as "GPU:0", of the devices of this process that replicas run on."""
    if isinstance(strategy, STRATEGIES):
        devices = strategy.extended.worker_devices
    else:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [(gpus or tf.config.list_logical_devices("CPU"))[0].name]
    return [short_name(device) for device in devices]


def short_name(device: str) -> str:
    """The name without the job, which functions that take a device do not understand: "GPU:0"."""
    kind, index = device.split(":")[-2:]
    return f"{kind}:{index}"


def full_name(device: str) -> str:
    """The name of a device with job, replica and task: of this process, if it names none."""
    name: str = _device_util.canonicalize(device if "/" in device else f"/device:{device}")
    return name


def full_names() -> list[str]:
    """The full names of all devices that this process can use."""
    return [full_name(device.name) for device in tf.config.list_logical_devices()]


def is_on_cpu(strategy: _types.Strategy) -> bool:
    """Whether all replicas of this process run on the CPU."""
    return all(device.startswith("CPU") for device in devices_of(strategy))


def make_logical_cpus(count: int) -> int:
    """Makes `count` logical CPU devices; returns how many there are.

    If TensorFlow has started, no more can be made, and there may be fewer.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    made = len(tf.config.get_logical_device_configuration(cpu) or [None])
    if made < count:
        try:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
        except RuntimeError:
            return made
    return max(made, count)


def is_tpu(strategy: _types.Strategy) -> bool:
    """Whether replicas run on TPUs."""
    return isinstance(strategy, tf.distribute.TPUStrategy)


def compiled_as_a_whole() -> contextlib.AbstractContextManager[None]:
    """A context in which the program that is traced becomes a single XLA program, as on TPUs.

    For a `tf.function(jit_compile=True)` around a whole step on one CPU, which runs what a TPU
    would.
    """
    return holding("compiled_as_a_whole", True)


def is_compiled_as_a_whole() -> bool:
    """Whether the step being traced is a single XLA program, including its exchange and update."""
    return bool(current("compiled_as_a_whole")) or is_tpu(tf.distribute.get_strategy())
