"""The devices that a strategy's replicas run on, and what is compiled for them."""

import tensorflow as tf

from tfbig._keras.thread import current, holding

# What tfbig runs under, besides the default strategy, which names no devices.
STRATEGIES = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.TPUStrategy,
)


def devices_of(strategy):
    """Names, such as "GPU:0", of the devices of this process that replicas run on."""
    if isinstance(strategy, STRATEGIES):
        devices = strategy.extended.worker_devices
    else:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [(gpus or tf.config.list_logical_devices("CPU"))[0].name]
    # Without the job, which functions that take a device do not know.
    return [f"{kind}:{index}" for kind, index in (d.split(":")[-2:] for d in devices)]


def is_on_cpu(strategy):
    """Whether all replicas of this process run on the CPU."""
    return all(device.startswith("CPU") for device in devices_of(strategy))


def make_logical_cpus(count):
    """Makes so many logical CPU devices; returns how many there are.

    Fewer than asked for, if TensorFlow has started.
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


def is_tpu(strategy):
    """Whether replicas run on TPUs."""
    return isinstance(strategy, tf.distribute.TPUStrategy)


def compiled_as_a_whole():
    """A context in which what is traced becomes one XLA program, as TPUs need it.

    For a `tf.function(jit_compile=True)` around a whole step on one CPU, which runs what a TPU
    would.
    """
    return holding("compiled_as_a_whole", True)


def is_compiled_as_a_whole():
    """Whether the step that is traced is one XLA program, its exchange and update included."""
    return bool(current("compiled_as_a_whole")) or is_tpu(tf.distribute.get_strategy())
