"""A `tf.distribute.TPUStrategy` for a slice that does not exist.

It can trace programs and create variables with their copies, but not run programs: a logical CPU
device takes the place of each core wherever TensorFlow needs a device.
"""

import numpy as np
import tensorflow as tf

from tfbig import _types, errors
from tfbig.tpu_check.slice import Slice

__all__ = ("made_up_strategy",)

_DEVICE = "/job:localhost/replica:0/task:0/device:{}:{}"


class _Resolver(tf.distribute.cluster_resolver.SimpleClusterResolver):  # type: ignore[misc]  # TensorFlow has no types.
    """Answers what a `TPUStrategy` asks of a cluster's resolver."""

    tpu_hardware_feature = None

    def __init__(self, metadata: tf.tpu.experimental.TPUSystemMetadata) -> None:
        super().__init__(tf.train.ClusterSpec({}))
        self._metadata = metadata

    def get_tpu_system_metadata(self) -> tf.tpu.experimental.TPUSystemMetadata:
        return self._metadata


def made_up_strategy(tpu_slice: Slice) -> _types.Strategy:
    """Makes a `TPUStrategy` that can trace programs, but not run them.

    It pretends that all cores are on one host, which changes nothing in a core's program.

    Args:
        tpu_slice: The slice, of which the strategy has one replica per core.

    Returns:
        A `tf.distribute.TPUStrategy`.

    Raises:
        UnsupportedStrategyError: If there are fewer logical CPU devices than cores.
    """
    cores = tpu_slice.cores
    cpus = len(tf.config.list_logical_devices("CPU"))
    if cpus < cores:
        raise errors.UnsupportedStrategyError(
            f"A made-up {tpu_slice} needs {cores} logical CPU devices, one per core. "
            f"Received: {cpus}. Create them before TensorFlow starts: "
            "tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0]"
            f", [tf.config.LogicalDeviceConfiguration()] * {cores})."
        )
    mesh = tpu_slice.mesh_shape
    coordinates = np.stack(np.unravel_index(np.arange(cores), mesh), axis=-1)
    topology = tf.tpu.experimental.Topology(
        mesh_shape=mesh, device_coordinates=coordinates[np.newaxis].astype(np.int32)
    )
    metadata = tf.tpu.experimental.TPUSystemMetadata(
        num_cores=cores,
        num_hosts=1,
        num_of_cores_per_host=cores,
        topology=topology,
        devices=[tf.config.LogicalDevice(_DEVICE.format("TPU", i), "TPU") for i in range(cores)],
    )
    strategy = tf.distribute.TPUStrategy(
        _Resolver(metadata),
        tf.tpu.experimental.DeviceAssignment(topology, coordinates[:, np.newaxis]),
    )
    # The devices on which variables are created. A program uses a variable through one packed
    # handle, and does not look at its devices.
    strategy.extended._tpu_devices = np.array(
        [[_DEVICE.format("CPU", i)] for i in range(cores)], dtype=object
    )
    return strategy
