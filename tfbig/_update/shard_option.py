"""The option `shard`: what is divided over the replicas instead of copied to each."""

from __future__ import annotations

from typing import Any

from tfbig import _keras, _log, errors
from tfbig._update import replicas, sharded_state

__all__ = ("apply_to_optimizers", "checked", "say_if_nothing_is_divided", "update_optimizers")

_VALUES = ("optimizer",)


def checked(value: object) -> str | None:
    """Returns the option `shard`, checked."""
    if value is not None and not (isinstance(value, str) and value in _VALUES):
        raise errors.InvalidOptionError(
            f"`shard` must be 'optimizer' or None. Received: shard={value!r}."
        )
    return value


def apply_to_optimizers(model: Any) -> None:  # Any: a tfbig model, which imports this.
    """Divides the state of all optimizers that a model holds, if `shard` says so.

    Raises:
        InvalidOptionError: If the state of an optimizer cannot be divided.
        UnsupportedStrategyError: If the strategy does not support it.
    """
    if model.shard is None:
        return
    if _keras.devices.is_tpu(model.distribute_strategy):
        raise errors.UnsupportedStrategyError(
            "`shard` needs MirroredStrategy or MultiWorkerMirroredStrategy: all cores of a TPU run "
            "one program, in which no core has a piece of its own. Received: "
            f"shard={model.shard!r} under TPUStrategy. Use shard=None."
        )
    for _, optimizer in _keras.optimizer.optimizers_of(model):
        sharded_state.divide(optimizer, model.distribute_strategy)


def update_optimizers(model: Any) -> None:
    """Has a change of `shard` take effect on a model that is compiled already."""
    if model.shard is None:
        for _, optimizer in _keras.optimizer.optimizers_of(model):
            sharded_state.make_whole(optimizer)
    elif model.compiled:
        apply_to_optimizers(model)
    model._rebuild_step()


def say_if_nothing_is_divided(model: Any) -> None:  # Any: as above.
    """Says once in a log line that `shard` has nothing to divide."""
    is_said = vars(model).get("_has_said_nothing_is_divided")
    if model.shard is not None and replicas.count_of(model) == 1 and not is_said:
        vars(model)["_has_said_nothing_is_divided"] = True
        _log.logger().info(
            "tfbig: shard=%r has nothing to divide, since there is one replica", model.shard
        )
