"""The stages of --pipeline, and the devices that they lie on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import command_line
import stage_devices

from training import settings

if TYPE_CHECKING:
    import tensorflow as tf

    import tfbig


def mirrored_replicas() -> int:
    """Replicas of --strategy=mirrored: those of --replicas, or as many as there are devices for."""
    return settings.REPLICAS.value or (max(1, _gpus() // settings.stages()) if _gpus() else 2)


def make_devices(replicas: int) -> None:
    """Makes what devices are missing, for so many replicas; before the strategy is made."""
    if settings.stages() > 1 and not _gpus():
        stage_devices.make_logical_cpus(settings.stages() * replicas)


def pipeline(strategy: tf.distribute.Strategy) -> tfbig.distribute.Pipeline | None:
    """The pipeline of --pipeline, or None without it.

    Raises:
        UsageError: If the strategy is that of a TPU, or there are too few GPUs.
    """
    import tensorflow as tf

    import tfbig

    stages, gpus = settings.stages(), _gpus()
    if stages == 1:
        return None
    if isinstance(strategy, tf.distribute.TPUStrategy):
        raise command_line.UsageError(
            f"--pipeline={stages} needs GPUs or the CPU: all cores of a TPU run one program. "
            "Received: a TPU. Leave --pipeline out, or choose another --strategy."
        )
    replicas = 1
    if isinstance(
        strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy
    ):
        replicas = len(strategy.extended.worker_devices)
    if gpus and gpus < stages * replicas:
        remedy = "Hide the GPUs with CUDA_VISIBLE_DEVICES=-1 to use the CPU"
        if gpus >= stages:
            remedy = f"Use --strategy=mirrored --replicas={gpus // stages}"
        raise command_line.UsageError(
            f"--pipeline={stages} needs {stages} GPUs for each replica. Received: {gpus} GPU(s) "
            f"and {replicas} replica(s). {remedy}."
        )
    devices = stage_devices.names("GPU" if gpus else "CPU", stages, replicas)
    return tfbig.distribute.Pipeline(devices)


def _gpus() -> int:
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))
