"""The loss scale: its settings, `DynamicLossScale`, and its state.

`tfbig/loss_scaling.py` has the mixin.
"""

import dataclasses
from collections.abc import Iterator
from typing import Self

import keras
import tensorflow as tf

from tfbig import _integers, _keras, _types, errors

__all__ = ("FLOAT32_RANGE", "DynamicLossScale", "LossScaleState", "is_positive_float32")


@keras.saving.register_keras_serializable(package="tfbig")
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """Settings of dynamic loss scaling.

    The loss is multiplied by the scale before the backward pass, the gradient
    divided by it after. A gradient with a non-finite value makes all replicas
    skip the update and multiplies the scale by `backoff_factor`; `growth_interval` finite updates
    in a row multiply it by `growth_factor`.

    Args:
        initial_scale: The scale at the start. Defaults to 2**15.
        growth_factor: > 1. Defaults to 2.
        backoff_factor: Between 0 and 1. Defaults to 0.5.
        growth_interval: >= 1, finite updates in a row before the scale grows. Defaults to 2000.
        min_scale: > 0, the floor. Defaults to 1.
        max_scale: The ceiling. Defaults to 2**24.
        hysteresis: >= 1, the number of skipped updates before the scale backs off: with 2, the
            first skip since the scale last grew leaves it unchanged. Defaults to 1.
        max_consecutive_skips: >= 1, skipped updates in a row after which training raises
            `LossScaleError`. Defaults to 100.
        retry: Whether a batch whose gradient is not finite is run again at the lower scale, on all
            replicas, instead of being lost: True for as often as the scale can be lowered, or an
            integer >= 1 for at most so often. Only an update that is given up is a skipped update;
            it lowers the scale once, however often it was tried, because its data are to blame.
            With `hysteresis`, a skip that leaves the scale unchanged is not retried. Python then
            runs the batches of `steps_per_execution` one by one. Not with a `train_step` of your
            own. Defaults to False.

    Raises:
        InvalidOptionError: If a value is out of its range.

    Example:

    >>> tfbig.DynamicLossScale(initial_scale=1024.0).growth_interval
    2000

    Reference:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2;
        hysteresis as in Megatron-LM's `DynamicGradScaler`.
    """

    initial_scale: float = 2.0**15
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    hysteresis: int = 1
    max_consecutive_skips: int = 100
    retry: bool | int = False

    def __post_init__(self) -> None:
        def require(valid: bool, name: str, rule: str) -> None:
            if not valid:
                raise errors.InvalidOptionError(
                    f"`{name}` must be {rule}. Received: {name}={getattr(self, name)!r}."
                )

        for name in ("growth_interval", "hysteresis", "max_consecutive_skips"):
            object.__setattr__(self, name, _integers.checked(name, getattr(self, name)))
        if not isinstance(self.retry, bool):
            retry = _integers.checked("retry", self.retry, rule="a bool or an integer >= 1")
            object.__setattr__(self, "retry", retry)
        for name in ("initial_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"):
            value = getattr(self, name)
            require(is_positive_float32(value), name, f"a finite number > 0, {FLOAT32_RANGE}")
        require(self.growth_factor > 1, "growth_factor", "greater than 1")
        require(self.backoff_factor < 1, "backoff_factor", "less than 1")
        require(
            self.min_scale <= self.initial_scale <= self.max_scale,
            "initial_scale",
            f"between min_scale={self.min_scale} and max_scale={self.max_scale}",
        )
        require(
            not self.retry or self.min_scale < self.max_scale,
            "retry",
            f"False for a scale that cannot be lowered, as with min_scale={self.min_scale} and "
            f"max_scale={self.max_scale}",
        )

    def get_config(self) -> _types.Config:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: _types.Config) -> Self:
        return cls(**config)


FLOAT32_RANGE = "between 2**-126 and 2**126, which float32 holds"


def is_positive_float32(value: object) -> bool:
    """Whether `value` is a number, not a bool, in the range of positive float32."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 2.0**-126 <= value <= 2.0**126


class _Attempts:
    """What is known of a batch that is tried again; between batches, nothing.

    No attribute of a `SavedState` itself, which would be saved.

    Attributes:
        retries: int64 variable, how often the batch is to have been run again.
        first_scale: float32 variable, the scale at its first attempt, if it is run again.
    """

    def __init__(self) -> None:
        self.retries, self.first_scale = (
            keras.Variable(
                0,
                dtype=dtype,
                trainable=False,
                aggregation="only_first_replica",
                name=name,
            )
            for name, dtype in (("retries", "int64"), ("first_scale", "float32"))
        )

    def variables(self) -> list[_types.KerasVariable]:
        """Both variables."""
        return [self.retries, self.first_scale]


class LossScaleState(_keras.saving.SavedState):
    """The scale and its counters.

    Saved with the model, not among its weights; the same on every replica.

    Attributes:
        settings: How the scale moves.
        is_fixed: Whether the scale never moves.
        loss_scale: float32 variable, what the next loss is multiplied by.
        finite_updates: int64 variable, finite updates since the scale last changed or an update
            was skipped.
        remaining_hysteresis: int64 variable, skips until the scale backs off.
        skipped_updates: int64 variable, all skips so far.
        consecutive_skips: int64 variable, skips since the last finite update.
        first_non_finite: int64 variable, index among the trainable variables of the first one
            whose gradient was not finite in the last skipped update; -1 if there was none.
    """

    _names = (
        "loss_scale",
        "finite_updates",
        "remaining_hysteresis",
        "skipped_updates",
        "consecutive_skips",
        "first_non_finite",
    )

    def __init__(self, settings: DynamicLossScale, is_fixed: bool = False):
        self.settings = settings
        self.is_fixed = is_fixed
        initial = {
            "loss_scale": settings.initial_scale,
            "remaining_hysteresis": settings.hysteresis,
            "first_non_finite": -1,
        }
        for name in self._names:
            variable = keras.Variable(
                initial.get(name, 0),
                dtype="float32" if name == "loss_scale" else "int64",
                trainable=False,
                aggregation="only_first_replica",
                name=name,
            )
            setattr(self, name, variable)
        self._attempts = _Attempts() if settings.retry else None

    def assigned_variables(self) -> list[_types.KerasVariable]:
        """All variables that an update assigns, of which `variables` are saved."""
        attempts = [] if self._attempts is None else self._attempts.variables()
        return [*self.variables(), *attempts]

    def logs(self) -> _types.Logs:
        """What the logs of `fit` hold of it."""
        return {
            "loss_scale": tf.convert_to_tensor(self.loss_scale.value),
            "skipped_updates": tf.convert_to_tensor(self.skipped_updates.value),
        }

    # --- Batches that are tried again ----------------------------------------------------

    @property
    def is_retrying(self) -> bool:
        """Whether batches are run again at all."""
        return self._attempts is not None

    def is_pending(self) -> bool:
        """Whether the last batch must be run again. Between updates."""
        return self._attempts is not None and int(self._attempts.retries.numpy()) > 0

    def give_up(self) -> None:
        """Forgets a batch that was to be run again."""
        if self._attempts is not None:
            _keras.variables.assign_all([self._attempts.retries], [0])

    def is_repeated(self, finite: _types.Tensor) -> _types.Tensor | None:
        """Whether the update's batch will be run again, a bool scalar; None if none ever is.

        To be asked before `update`.

        Args:
            finite: bool scalar, whether the gradient is finite.
        """
        if self._attempts is None:
            return None
        scale, _, _ = self._moved(finite)
        is_lower = scale < tf.convert_to_tensor(self.loss_scale.value)
        if self.settings.retry is True:
            return ~finite & is_lower
        retries = tf.convert_to_tensor(self._attempts.retries.value)
        return ~finite & is_lower & (retries < self.settings.retry)

    # --- In an update ----------------------------------------------------------------------

    def update(self, finite: _types.Tensor, flags: _types.Tensor) -> None:
        """Moves the scale and the counters after an update.

        Args:
            finite: bool scalar, whether the gradient is finite.
            flags: bool vector, whether the gradient of each trainable variable was finite.
        """
        repeated = self.is_repeated(finite)
        scale, finite_updates, hysteresis = self._moved(finite)
        is_skipped = ~finite
        if repeated is not None:
            scale = self._try_again(finite, repeated, scale)
            is_skipped &= ~repeated
        skipped = tf.cast(is_skipped, tf.int64)
        consecutive = tf.where(finite, tf.zeros((), tf.int64), self.consecutive_skips + skipped)
        first = tf.argmin(tf.cast(flags, tf.int32), output_type=tf.int64)
        new = {
            "loss_scale": scale,
            "finite_updates": finite_updates,
            "remaining_hysteresis": hysteresis,
            "skipped_updates": self.skipped_updates + skipped,
            "consecutive_skips": consecutive,
            "first_non_finite": tf.where(
                is_skipped, first, tf.convert_to_tensor(self.first_non_finite.value)
            ),
        }
        written = [
            _keras.variables.native(getattr(self, name)).assign(new[name]) for name in self._names
        ]
        limit = tf.constant(self.settings.max_consecutive_skips, tf.int64)
        with tf.control_dependencies([] if tf.executing_eagerly() else written):
            tf.debugging.assert_less(consecutive, limit, _keras.graph_errors.TOO_MANY_SKIPS)

    def _moved(self, finite: _types.Tensor) -> tuple[_types.Tensor, _types.Tensor, _types.Tensor]:
        """What an update makes of `loss_scale`, `finite_updates` and `remaining_hysteresis`."""
        settings = self.settings
        finite_updates = tf.where(finite, self.finite_updates + 1, tf.zeros((), tf.int64))
        hysteresis = self.remaining_hysteresis - tf.cast(~finite, tf.int64)
        scale = tf.convert_to_tensor(self.loss_scale.value)
        if self.is_fixed:
            return scale, finite_updates, hysteresis
        grows = finite_updates >= settings.growth_interval
        backs_off = ~finite & (hysteresis <= 0)
        scale = tf.where(grows, scale * settings.growth_factor, scale)
        scale = tf.where(backs_off, scale * settings.backoff_factor, scale)
        scale = tf.clip_by_value(scale, settings.min_scale, settings.max_scale)
        finite_updates = tf.where(grows, tf.zeros((), tf.int64), finite_updates)
        hysteresis = tf.where(grows, tf.constant(settings.hysteresis, tf.int64), hysteresis)
        return scale, finite_updates, hysteresis

    def _try_again(
        self, finite: _types.Tensor, repeated: _types.Tensor, lower: _types.Tensor
    ) -> _types.Tensor:
        """Counts the attempts at a batch, and returns the next scale.

        Args:
            finite: bool scalar, whether the gradient is finite.
            repeated: see `is_repeated`.
            lower: float32 scalar, the scale that would follow without further attempts.
        """
        attempts, settings = self._attempts, self.settings
        assert attempts is not None
        retries = tf.convert_to_tensor(attempts.retries.value)
        scale = tf.convert_to_tensor(self.loss_scale.value)
        first = tf.where(retries > 0, tf.convert_to_tensor(attempts.first_scale.value), scale)
        after_one_skip = tf.maximum(first * settings.backoff_factor, settings.min_scale)
        is_given_up = ~finite & ~repeated & (retries > 0)
        retries = tf.where(repeated, retries + 1, tf.zeros((), tf.int64))
        _keras.variables.native(attempts.retries).assign(retries)
        _keras.variables.native(attempts.first_scale).assign(first)
        return tf.where(is_given_up, after_one_skip, lower)

    def watched(
        self,
        function: _types.AnyFunction,
        updates: int,
        variables: list[_types.KerasVariable],
    ) -> _types.AnyFunction:
        """A train function that checks the counters on the host.

        TPU programs drop assertions. Reading a counter waits for the update, so it is read once
        in `max_consecutive_skips` updates.

        Args:
            function: Function of an iterator.
            updates: Number of updates that a call makes.
            variables: The trainable variables.
        """
        limit, since = self.settings.max_consecutive_skips, 0

        def watched(iterator: Iterator[_types.Structure]) -> _types.Logs:
            nonlocal since
            logs: _types.Logs = function(iterator)
            since += updates
            if since >= limit:
                since = 0
                if int(self.consecutive_skips.numpy()) >= limit:
                    raise self.error(variables)
            return logs

        return watched

    def error(self, variables: list[_types.KerasVariable]) -> errors.LossScaleError:
        """The error that says what happened, and where."""
        index = int(self.first_non_finite.numpy())
        name = variables[index].path if 0 <= index < len(variables) else "unknown"
        return errors.LossScaleError(
            f"{int(self.consecutive_skips.numpy())} updates in a row had a non-finite gradient "
            "and were skipped. The first variable with one is "
            f"{name!r} (loss_scale={float(self.loss_scale.numpy())}). The weights are those of "
            "the last finite update. Look for NaN or inf in the data, a learning rate that is "
            "too high, or an operation that overflows in the model's compute dtype."
        )
