"""A `train_step` that a user wrote: what it uses of tfbig, and which options have no effect in it.

What it uses is what it calls while it is traced, so an option without effect is refused before the
first update.
"""

import functools
import warnings

import tensorflow as tf

from tfbig import _keras, errors
from tfbig._update import option

__all__ = ("accumulates", "applies", "checked", "uses_all", "warn_of_jit_compile")

_CUTS = ("gradient_accumulation_steps", "micro_batch_size")


def _use(*names):
    """Records what is used by the step that is being traced, if it is a user's."""
    uses = _keras.thread.current("uses")
    if uses is not None:
        uses.update(names)


def uses_all():
    """Records that tfbig's `train_step` is called."""
    _use("everything")


def accumulates(split, loss_scale):
    """Records what `accumulate_gradients` is given."""
    _use(
        *(() if split.is_whole else _CUTS),
        *(() if loss_scale is None else ("scaled",)),
    )


def applies(loss_scale, log_grad_norm, exchange_dtype):
    """Records what `apply_gradients` is given."""
    passed = {
        "unscaled": loss_scale is not None,
        "log_grad_norm": log_grad_norm,
        "exchange_dtype": exchange_dtype is not None,
    }
    _use(*(name for name, is_passed in passed.items() if is_passed))


def warn_of_jit_compile(model):
    """Warns of `jit_compile=True`, which is not passed on to a step of a user."""
    if model._compile_config is not None and model._compile_config.config["jit_compile"] is True:
        warnings.warn(
            f"jit_compile=True has no effect in the `train_step` of {type(model).__name__}, which "
            "is its own. Pass compiled=True to tfbig.accumulate_gradients, or leave it out.",
            stacklevel=2,
        )


def _unused(model, uses):
    if "everything" in uses:
        return {}
    used = uses | ({"loss_scale"} if {"scaled", "unscaled"} <= uses else set())
    return {name: value for name, value in model._asked_options().items() if name not in used}


def checked(model, step):
    """The `train_step` of a user, which raises if it leaves an option without effect."""

    # Kept: a tf.function of the user's is traced once, for however many functions that train.
    uses = vars(model).setdefault("_uses_of_own_step", set())

    @functools.wraps(step)
    def checked_step(data):
        is_eager = tf.executing_eagerly() and _unused(model, uses)
        undo = _undo(model) if is_eager else None
        with _keras.thread.holding("uses", uses):
            logs = step(data)
        unused = _unused(model, uses)
        if unused:
            if undo is not None:
                undo()
            raise _error(model, unused)
        return logs

    return checked_step


def _undo(model):
    """What takes back an update that ran before it was known what it uses."""
    variables = list(model.variables)
    for _, optimizer in _keras.optimizer.optimizers_of(model):
        variables += optimizer.variables
    values = _keras.variables.values_of(variables)
    return lambda: _keras.variables.assign_all(variables, values)


def _error(model, unused):
    said = ", ".join(f"{name}={value!r}" for name, value in unused.items())
    options = option.declared(type(model))
    remedies = [options[name].passed_on for name in unused]
    halves = "" if None in remedies else f", or pass {', '.join(remedies)}"
    keras_scales = ""
    if "loss_scale" in unused:
        keras_scales = " With loss_scale=None, Keras's LossScaleOptimizer scales in float16."
    return errors.UnsupportedModelError(
        f"{type(model).__name__} has a `train_step` of its own, in which an option would have no "
        f"effect. Received: {said}. Call super().train_step(data){halves}; or leave the option "
        f"out.{keras_scales}"
    )
