"""The devices of the stages of a `tfbig.distribute.Pipeline`."""

from __future__ import annotations


def make_logical_cpus(count: int) -> None:
    """Makes logical CPU devices, CPU:0 and so on; before TensorFlow starts."""
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * count,
    )


def names(kind: str, stages: int, replicas: int = 1) -> list[tuple[str, ...]]:
    """The names of each stage's devices, one for each replica of this process.

    Args:
        kind: "CPU" or "GPU".
        stages: How many stages.
        replicas: How many replicas; they run on the devices of the first stage.
    """
    return [
        tuple(f"{kind}:{stage * replicas + replica}" for replica in range(replicas))
        for stage in range(stages)
    ]
