"""Connecting to TPUs: finding them, or saying what is missing."""

import os
import pathlib

import tensorflow as tf
from tensorflow.python.framework import kernels as _kernels

from tfbig import errors

__all__ = ("connect", "is_there")

# Operations without which no program can be sent to a TPU.
_NEEDED = ("_ConfigureDistributedTPU", "TPUCompile", "TPUExecute")

_INSTALL = "pip uninstall tensorflow && pip install 'tensorflow-tpu==2.20.*'"


def _is_supported():
    return any(_kernels.get_registered_kernels_for_op(name).kernel for name in _NEEDED)


def is_there():
    """Whether this TensorFlow knows TPUs, and one is named by TPU_NAME or in this machine."""
    devices = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return _is_supported() and bool(os.environ.get("TPU_NAME") or devices)


def connect(tpu=None):
    """Connects to a TPU, initializes it, and makes the strategy for it.

    Args:
        tpu: str, name or address of the TPU, or "local" for that of this machine. By default
            what the environment variable TPU_NAME says, else "local".

    Returns:
        `tf.distribute.TPUStrategy`, and why it was made, a str.

    Raises:
        ClusterError: If this TensorFlow knows no TPUs, or none is found.
    """
    if not _is_supported():
        raise errors.ClusterError(
            f"This build of TensorFlow, {tf.__version__}, has no support for TPUs; the newest that "
            f"has is tensorflow-tpu 2.20. On the TPU's machine: {_INSTALL}"
        )
    name = tpu or os.environ.get("TPU_NAME") or "local"
    source = "as asked for" if tpu else f"as TPU_NAME={name}" if name != "local" else "found here"
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver), source
    except (ValueError, OSError, RuntimeError, tf.errors.OpError) as e:
        told = " ".join(str(e).split())[:300]
        where = "on this machine" if name == "local" else f"under the name {name!r}"
        raise errors.ClusterError(
            f"No TPU was found {where}. Run on a TPU VM, or give the name of a TPU in this project "
            f"and zone as `tpu` or TPU_NAME. TensorFlow says: {told}"
        ) from e
