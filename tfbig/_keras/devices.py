"""The devices that a strategy's replicas run on."""

import tensorflow as tf

_NAMES_DEVICES = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


def devices_of(strategy):
    """Names, such as "GPU:0", of the devices of this process that replicas run on."""
    if isinstance(strategy, _NAMES_DEVICES):
        devices = strategy.extended.worker_devices
    else:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [(gpus or tf.config.list_logical_devices("CPU"))[0].name]
    # Without the job, which functions that take a device do not know.
    return [f"{kind}:{index}" for kind, index in (d.split(":")[-2:] for d in devices)]


def is_on_cpu(strategy):
    """Whether all replicas of this process run on the CPU."""
    return all(device.startswith("CPU") for device in devices_of(strategy))
