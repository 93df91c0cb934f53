"""Connects to TPUs, or says what is missing."""

import os
import pathlib

import tensorflow as tf
from tensorflow.python.framework import kernels as _kernels

from tfbig import _types, errors

__all__ = ("connect", "is_available")

# TensorFlow cannot send a program to a TPU without these operations.
_REQUIRED_OPERATIONS = ("_ConfigureDistributedTPU", "TPUCompile", "TPUExecute")

_INSTALL = "pip uninstall tensorflow && pip install 'tensorflow-tpu==2.20.*'"


def _is_supported() -> bool:
    return any(_kernels.get_registered_kernels_for_op(name).kernel for name in _REQUIRED_OPERATIONS)


def is_available() -> bool:
    """Returns whether this TensorFlow supports TPUs, and TPU_NAME or this machine has one."""
    devices = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    return _is_supported() and bool(os.environ.get("TPU_NAME") or devices)


def connect(tpu: str | None = None) -> tuple[_types.Strategy, str]:
    """Connects to a TPU, initializes it, and makes its strategy.

    Args:
        tpu: Name or address of the TPU, or "local" for this machine's. Defaults to the environment
            variable TPU_NAME, or else to "local".

    Returns:
        The `tf.distribute.TPUStrategy`, and the reason for choosing it.

    Raises:
        ClusterError: If this TensorFlow does not support TPUs, or there is no TPU.
    """
    if not _is_supported():
        raise errors.ClusterError(
            f"This build of TensorFlow, {tf.__version__}, does not support TPUs; the newest that "
            f"does is tensorflow-tpu 2.20. On the TPU's machine, run: {_INSTALL}"
        )
    name = tpu or os.environ.get("TPU_NAME") or "local"
    reason = "as requested" if tpu else f"from TPU_NAME={name}" if name != "local" else "found here"
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver), reason
    except (ValueError, OSError, RuntimeError, tf.errors.OpError) as e:
        message = " ".join(str(e).split())[:300]
        where = "on this machine" if name == "local" else f"under the name {name!r}"
        raise errors.ClusterError(
            f"No TPU was found {where}. Run on a TPU VM, or pass the name of a TPU in this project "
            f"and zone as `tpu` or TPU_NAME. TensorFlow says: {message}"
        ) from e
