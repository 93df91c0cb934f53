"""Dynamic loss scaling: `DynamicLossScale` and its mixin."""

from typing import Any

import keras

from tfbig import _keras, _types, errors
from tfbig._update import train_step
from tfbig._update.loss_scale import (
    FLOAT32_RANGE,
    DynamicLossScale,
    LossScaleState,
    is_positive_float32,
)
from tfbig._update.option import Option

__all__ = ("DynamicLossScale", "DynamicLossScalingMixin")


def _checked(option: Any) -> str | float | DynamicLossScale | None:
    """Returns the `loss_scale` option, or raises if it is not one."""
    if isinstance(option, dict):
        option = keras.saving.deserialize_keras_object(option)
    valid = option is None or option in ("auto", "dynamic") or isinstance(option, DynamicLossScale)
    if not valid and not is_positive_float32(option):
        raise errors.InvalidOptionError(
            f"`loss_scale` must be 'auto', 'dynamic', a finite number > 0, None or a "
            f"tfbig.DynamicLossScale. Received: loss_scale={option!r}. A number must be "
            f"{FLOAT32_RANGE}."
        )
    checked: str | float | DynamicLossScale | None = option
    return checked


def _scale_now(model: "DynamicLossScalingMixin") -> float | None:
    if model.loss_scale_state is not None:
        return float(model.loss_scale_state.loss_scale.numpy())
    settings = model._scale_settings
    return None if settings is None else settings.initial_scale


def _restart(model: "DynamicLossScalingMixin") -> None:
    if model.compiled:
        model._reset_loss_scale()
        model._rebuild_step()


class DynamicLossScalingMixin(train_step.TrainStep):
    """Loss scaling for a `keras.Model`, decided by all replicas together.

    A non-finite value in any micro-batch on any replica makes all replicas skip
    the same update: the weights, `optimizer.iterations` and the learning-rate
    schedule stay as they are.

    Place the mixin before the Keras class: `class M(tfbig.DynamicLossScalingMixin, keras.Model)`.
    It also takes all options of `GradientAccumulationMixin`, which documents them, except
    `gradient_accumulation_steps`, `micro_batch_size` and `memory_budget`.

    Args:
        loss_scale: Defaults to "auto".

            - "auto": dynamic if the model or one of its layers computes in float16, otherwise
              none. None also for an extended class with a `train_step` of its own, whose loss
              Keras keeps scaling.
            - "dynamic": `DynamicLossScale()`.
            - A positive number: a fixed scale; non-finite updates are skipped too.
            - A `DynamicLossScale`.
            - None: tfbig neither scales nor checks. In float16, Keras then scales the loss of
              your own `train_step`.

    Attributes:
        skipped_updates: Number of updates skipped so far.

    Example:

    >>> class Net(tfbig.DynamicLossScalingMixin, keras.Sequential):
    ...     pass
    >>> model = Net([keras.Input((4,)), keras.layers.Dense(1)], loss_scale="dynamic")
    >>> model.compile("sgd", "mse")
    >>> model.loss_scale
    32768.0
    """

    loss_scale: Option[float | None] = Option(
        default="auto",
        check=_checked,
        is_none_given=True,
        doc=(
            "The current scale, a float; None without scaling.\n\n"
            "Set it to any value the constructor accepts; scaling then restarts."
        ),
        shown=_scale_now,
        changed=_restart,
        asks=lambda model, _: model.loss_scale_state is not None,
        passed_on=(
            "loss_scale=self.loss_scale_state to tfbig.accumulate_gradients and to "
            "tfbig.apply_gradients"
        ),
        logs=("loss_scale", "skipped_updates"),
    )

    @property
    def skipped_updates(self) -> int:
        """Number of updates skipped so far."""
        state = self.loss_scale_state
        return 0 if state is None else int(state.skipped_updates.numpy())

    @property
    def _scale_settings(self) -> DynamicLossScale | None:
        return _settings(self)[0]

    def _finish_compile(self) -> None:
        super()._finish_compile()
        self._reset_loss_scale()

    def _make_train_function(self) -> _types.AnyFunction:
        function: _types.AnyFunction = super()._make_train_function()
        state = self.loss_scale_state
        if state is None or not _keras.devices.is_tpu(self.distribute_strategy):
            return function
        watched: _types.AnyFunction = state.watched(
            function, self.steps_per_execution, self.trainable_variables
        )
        return watched

    def _reset_loss_scale(self) -> None:
        settings, is_fixed = _settings(self)
        with self.distribute_strategy.scope():
            self.loss_scale_state = None if settings is None else LossScaleState(settings, is_fixed)


def _settings(model: DynamicLossScalingMixin) -> tuple[DynamicLossScale | None, bool]:
    """`(DynamicLossScale or None, whether it is fixed)` for a model."""
    option = DynamicLossScalingMixin.loss_scale.value(model)
    if option == "auto":
        # Keras keeps scaling the loss of an extended class's own step.
        is_extended = type(model)._owner_of_extended_train_step() is not None
        is_wanted = _keras.layers.computes_in_float16(model) and not is_extended
        option = "dynamic" if is_wanted else None
    if option == "dynamic":
        return DynamicLossScale(), False
    if option is None or isinstance(option, DynamicLossScale):
        return option, False
    value = float(option)
    fixed = DynamicLossScale(
        initial_scale=value, min_scale=min(value, 1.0), max_scale=max(value, 1.0)
    )
    return fixed, True
