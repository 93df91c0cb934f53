"""The option `shard`: what is divided over the replicas instead of copied to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfbig import _keras, _log, errors
from tfbig._update import option, replicas, sharded_state, sharded_weights

if TYPE_CHECKING:
    from tfbig._update.step_options import StepOptions

__all__ = ("apply", "checked", "say_if_nothing_is_divided", "update")

_VALUES = ("optimizer", "weights")


def checked(value: object) -> str | None:
    """Returns the option `shard`, checked."""
    if value is not None and not (isinstance(value, str) and value in _VALUES):
        raise errors.InvalidOptionError(
            f"`shard` must be 'optimizer', 'weights' or None. Received: shard={value!r}."
        )
    return value


def apply(model: StepOptions) -> None:
    """Divides what a model has, if `shard` says so: weights, and the state of all its optimizers.

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
    if model.shard == "weights":
        if replicas.count_of(model) > 1:
            _refuse_others(model)
        sharded_weights.divide(model, model.distribute_strategy)
    optimizers = [optimizer for _, optimizer in _keras.optimizer.optimizers_of(model)]
    has_changed = [sharded_state.divide(x, model.distribute_strategy) for x in optimizers]
    if any(has_changed):
        # The step has the pieces of before.
        model._rebuild_step()


def _refuse_others(model: StepOptions) -> None:
    """Raises for options that do not go with divided weights."""
    refused = {
        "log_gradient_noise_scale": "no replica has the gradient of its samples alone",
        "exchange_dtype": "gradients are added up over the replicas in each micro-batch",
    }
    for name, reason in refused.items():
        value = getattr(model, name, None)
        if value:
            raise errors.InvalidOptionError(
                f"`{name}` does not go with divided weights, since {reason}. Received: "
                f"{name}={value!r} and shard='weights'. Leave it out, or use shard='optimizer'."
            )
    option.refuse_compile_settings(
        model,
        "shard='weights'",
        jit_compile="XLA cannot compile a step that gathers weights from other replicas",
        run_eagerly="the replicas of a process would take turns within a layer",
    )


def update(model: StepOptions) -> None:
    """Has a change of `shard` take effect on a model that is there already."""
    if model.shard != "weights":
        sharded_weights.make_whole(model)
    if model.shard is None:
        for _, optimizer in _keras.optimizer.optimizers_of(model):
            sharded_state.make_whole(optimizer)
    elif model.compiled or (model.built and model.shard == "weights"):
        apply(model)
    model._rebuild_step()


def say_if_nothing_is_divided(model: StepOptions) -> None:
    """Says once in a log line that `shard` has nothing to divide."""
    is_said = model.__dict__.get("_has_said_nothing_is_divided")
    if model.shard is not None and replicas.count_of(model) == 1 and not is_said:
        model.__dict__["_has_said_nothing_is_divided"] = True
        _log.logger().info(
            "tfbig: shard=%r has nothing to divide, since there is one replica", model.shard
        )
