"""A `train_step` that the user wrote: what it uses of tfbig, and which options it ignores.

What it uses is what it calls while it is traced, so an option without effect is refused before the
first update.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._update import option, replicas
from tfbig._update.batch_split import BatchSplit
from tfbig._update.step_options import StepOptions

__all__ = (
    "accumulates",
    "applies",
    "checked",
    "current_model",
    "uses_all",
    "warn_of_jit_compile",
)

_SPLITS = ("gradient_accumulation_steps", "micro_batch_size")


def _use(*names: str) -> None:
    """Records what the step that is being traced uses, if a user wrote it."""
    uses = _keras.thread.current("uses")
    if uses is not None:
        uses.update(names)


def current_model() -> keras.Model | None:
    """The model whose own step is being traced; None if it is none of tfbig's."""
    model: keras.Model | None = _keras.thread.current("model")
    return model


def uses_all() -> None:
    """Records that the step calls tfbig's `train_step`."""
    _use("everything")


def accumulates(split: BatchSplit, loss_scale: object, is_staged: bool) -> None:
    """Records what the step passes to `accumulate_gradients`."""
    _use(
        *(("pipeline",) if is_staged else ()),
        *(() if split.never_splits else _SPLITS),
        *(() if loss_scale is None else ("scaled",)),
    )


def applies(
    loss_scale: object,
    log_grad_norm: bool,
    exchange_dtype: str | None,
    bucket_bytes: int,
    is_sharded: bool,
    is_guarded: bool,
) -> None:
    """Records what the step passes to `apply_gradients`."""
    passed = {
        "unscaled": loss_scale is not None,
        "log_grad_norm": log_grad_norm,
        "exchange_dtype": exchange_dtype is not None,
        "exchange_bucket_bytes": bucket_bytes != replicas.BUCKET_BYTES,
        "shard": is_sharded,
        "update_guard": is_guarded,
    }
    guarded = _keras.thread.current("guarded")
    if is_guarded and guarded is not None:
        if guarded:
            raise errors.UnsupportedModelError(
                "A `train_step` must pass `update_guard` to one call of tfbig.apply_gradients: the "
                "norms of different optimizers do not compare. Received: two calls with it. Leave "
                "it out of the others."
            )
        guarded.append(True)
    _use(*(name for name, is_passed in passed.items() if is_passed))
    if not is_sharded:
        _use("an undivided optimizer")


def warn_of_jit_compile(model: keras.Model) -> None:
    """Warns of `jit_compile=True`, which a user's own step does not see."""
    if model._compile_config is not None and model._compile_config.config["jit_compile"] is True:
        warnings.warn(
            f"jit_compile=True has no effect in the `train_step` of {type(model).__name__}, which "
            "is its own. Pass compiled=True to tfbig.accumulate_gradients, or leave it out.",
            stacklevel=2,
        )


def _unused(model: StepOptions, uses: set[str]) -> dict[str, Any]:
    """The options that the step ignores, with their values."""
    if "everything" in uses:
        return {}
    if "an undivided optimizer" in uses:
        # One of several, which the model does not hold.
        uses = uses - {"shard"}
    used = uses | ({"loss_scale"} if {"scaled", "unscaled"} <= uses else set())
    return {name: value for name, value in model._asked_options().items() if name not in used}


def checked(model: StepOptions, step: _types.AnyFunction) -> _types.AnyFunction:
    """A user's `train_step` that raises if it leaves an option without effect."""

    # Kept with the model: a tf.function of the user's is traced only once, however many train
    # functions call it.
    kept: dict[str, Any] = model.__dict__
    uses: set[str] = kept.setdefault("_uses_of_own_step", set())

    @functools.wraps(step)
    def checked_step(data: _types.Structure) -> _types.Logs:
        is_eager = tf.executing_eagerly() and _unused(model, uses)
        undo = _undo(model) if is_eager else None
        with (
            _keras.thread.holding("uses", uses),
            _keras.thread.holding("guarded", []),
            _keras.thread.holding("model", model),
        ):
            logs: _types.Logs = step(data)
        unused = _unused(model, uses)
        if unused:
            if undo is not None:
                undo()
            raise _error(model, unused)
        return logs

    return checked_step


def _undo(model: keras.Model) -> Callable[[], None]:
    """A function that takes back an update which ran before it was known what it uses."""
    variables = list(model.variables)
    for _, optimizer in _keras.optimizer.optimizers_of(model):
        variables += optimizer.variables
    values = _keras.variables.values_of(variables)
    return lambda: _keras.variables.assign_all(variables, values)


def _error(model: StepOptions, unused: dict[str, Any]) -> errors.UnsupportedModelError:
    said = ", ".join(f"{name}={value!r}" for name, value in unused.items())
    options = option.declared(type(model))
    remedies = [
        options[name].passed_on or ""
        if name in options
        # A callback gives it.
        else f"{name}=self.{name} to tfbig.apply_gradients"
        for name in unused
    ]
    halves = f", or pass {', '.join(remedies)}" if all(remedies) else ""
    keras_scales = ""
    if "loss_scale" in unused:
        keras_scales = " With loss_scale=None, Keras's LossScaleOptimizer scales in float16."
    return errors.UnsupportedModelError(
        f"{type(model).__name__} has a `train_step` of its own, in which an option would have no "
        f"effect. Received: {said}. Call super().train_step(data){halves}; or leave the option "
        f"out.{keras_scales}"
    )
