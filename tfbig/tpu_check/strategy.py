"""A `tf.distribute.TPUStrategy` for a slice that is not there.

Programs can be traced under it, with variables and their copies, not run: the cores are made
up, and a logical CPU device stands in for each where there must be a device.
"""

import numpy as np
import tensorflow as tf

from tfbig import errors

__all__ = ("made_up_strategy",)

_DEVICE = "/job:localhost/replica:0/task:0/device:{}:{}"


class _Resolver(tf.distribute.cluster_resolver.SimpleClusterResolver):
    """Answers what a `TPUStrategy` asks of the resolver of a cluster."""

    tpu_hardware_feature = None

    def __init__(self, metadata):
        super().__init__(tf.train.ClusterSpec({}))
        self._metadata = metadata

    def get_tpu_system_metadata(self):
        return self._metadata


def made_up_strategy(tpu_slice):
    """Makes a `TPUStrategy` under which programs can be traced, but not run.

    All cores are on one made-up host, which changes nothing in the program of a core.

    Args:
        tpu_slice: `Slice`.

    Returns:
        `tf.distribute.TPUStrategy` of as many replicas as the slice has cores.

    Raises:
        UnsupportedStrategyError: If there are fewer logical CPU devices than cores.
    """
    cores = tpu_slice.cores
    cpus = len(tf.config.list_logical_devices("CPU"))
    if cpus < cores:
        raise errors.UnsupportedStrategyError(
            f"A made-up {tpu_slice} needs {cores} logical CPU devices, one for each core. "
            f"Received: {cpus}. Make them before TensorFlow starts: "
            "tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0]"
            f", [tf.config.LogicalDeviceConfiguration()] * {cores})."
        )
    mesh = tpu_slice.mesh_shape
    places = np.stack(np.unravel_index(np.arange(cores), mesh), axis=-1)
    topology = tf.tpu.experimental.Topology(
        mesh_shape=mesh, device_coordinates=places[np.newaxis].astype(np.int32)
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
        tf.tpu.experimental.DeviceAssignment(topology, places[:, np.newaxis]),
    )
    # Where variables are made; those of a program are one packed handle, whose devices it does
    # not look at.
    strategy.extended._tpu_devices = np.array(
        [[_DEVICE.format("CPU", i)] for i in range(cores)], dtype=object
    )
    return strategy
