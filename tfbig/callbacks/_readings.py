"""What a `TrainingMonitor` reads off a model: logs, learning rate, memory."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _types
from tfbig.callbacks._monitor_file import Row

__all__ = ("device_mib", "learning_rate", "numbers", "state_mib")


def numbers(logs: _types.Logs) -> Row:
    """The logs that are single numbers; a metric may have several, and a callback add anything."""
    found = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            # `float` would accept strings too.
            if np.ndim(value) == 0 and not isinstance(value, str | bytes):
                found[name] = float(value)
    return found


def learning_rate(optimizer: _types.Optimizer) -> float:
    """The learning rate of the next update, with the factor of a `BatchSizeSchedule`.

    Of a `MultiOptimizer`, that of the first of its `optimizers`.
    """
    first, *_ = _keras.optimizer.parts_of(optimizer)
    rate = float(keras.ops.convert_to_numpy(first.learning_rate))
    return rate * _keras.learning_rate_factor.factor_of(optimizer)


def state_mib(model: keras.Model) -> float:
    """What a replica holds of the weights and of the states of optimizers.

    With stages, on the device that holds most.
    """
    held = {id(v): v for v in model.variables}
    for _, optimizer in _keras.optimizer.optimizers_of(model):
        held |= {id(v): v for v in optimizer.variables}
    strategy = model.distribute_strategy
    of_stages: dict[object, list[_types.KerasVariable]] = {}
    for variable in held.values():
        # What is on no stage, such as counters, is on the first device.
        stage = _keras.stages.stage_of(variable)
        of_stages.setdefault(0 if stage is None else stage.index, []).append(variable)
    of_stages = of_stages or {0: []}
    sizes = [_keras.sharded_variable.bytes_on_a_replica(v, strategy) for v in of_stages.values()]
    return max(sizes) / 2**20


def device_mib(model: keras.Model) -> float | None:
    """The peak memory of the first device, or of a replica's stages the largest.

    None if TensorFlow does not count it.
    """
    devices = _keras.devices.devices_of(model.distribute_strategy)[:1]
    pipeline = getattr(model, "pipeline", None)
    if pipeline is not None:
        devices = [_keras.devices.short_name(stage.devices[0]) for stage in pipeline.stages]
    try:
        found = [tf.config.experimental.get_memory_info(device)["peak"] for device in devices]
    except (ValueError, tf.errors.OpError):
        return None
    return float(max(found) / 2**20)
