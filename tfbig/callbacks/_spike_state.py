"""What a `SpikeGuard` knows of the updates so far, as variables, and what it makes of the next."""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _types

__all__ = ("SpikeSettings", "SpikeState")

# How many updates in a row must have a loss that has risen: one odd batch says nothing about the
# weights.
_RISEN_UPDATES = 2


@dataclasses.dataclass(frozen=True)
class SpikeSettings:
    """When an update is skipped, and when training goes back; see `SpikeGuard`.

    Attributes:
        factor: how many times the median is too much.
        window: how many updates the median is of.
        grad_norm: whether the norm of the gradient is looked at.
        loss: whether the loss is looked at.
        warm_up: updates before the first may be skipped.
        patience: skipped updates in a row after which training goes back.
        rollback_factor: how many times its median the loss must be for training to go back; None
            if it never does for that.
    """

    factor: float
    window: int
    grad_norm: bool
    loss: bool
    warm_up: int
    patience: int
    rollback_factor: float | None


class SpikeState:
    """The norms and losses of the last accepted updates, and counters. An `UpdateGuard`.

    Saved in backups; the same on every replica. To be made under the strategy's scope.

    Args:
        settings: when an update is skipped, and when training goes back.

    Attributes:
        needs_norm: whether it looks at the norm of the gradient.
        norms: float32 variable `(window,)`, the norms of the last accepted updates, in no order.
        losses: float32 variable `(window,)`, their losses.
        accepted: int64 variable, accepted updates so far.
        consecutive_spikes: int64 variable, updates skipped since the last accepted one.
        risen_losses: int64 variable, updates in a row whose loss has risen by `rollback_factor`.
        is_due: int64 variable, 1 once training must go back, until it has.
        spikes: int64 variable, all updates skipped so far.
        rollbacks: int64 variable, how often training went back.
        undone: int64 variable, applied updates that were taken back by that.
        is_active: int64 variable, 1 while `fit` runs with the guard. Otherwise all updates are
            accepted, and none is remembered. Not saved.
    """

    _names = (
        "norms",
        "losses",
        "accepted",
        "consecutive_spikes",
        "risen_losses",
        "is_due",
        "spikes",
        "rollbacks",
        "undone",
    )
    # What goes back with the weights; the counters count on.
    _moved_back = ("norms", "losses", "accepted")

    norms: keras.Variable
    losses: keras.Variable
    accepted: keras.Variable
    consecutive_spikes: keras.Variable
    risen_losses: keras.Variable
    is_due: keras.Variable
    spikes: keras.Variable
    rollbacks: keras.Variable
    undone: keras.Variable
    is_active: keras.Variable

    def __init__(self, settings: SpikeSettings) -> None:
        self.settings = settings
        self.needs_norm = settings.grad_norm
        for name in (*self._names, "is_active"):
            is_window = name in ("norms", "losses")
            variable = keras.Variable(
                np.zeros([settings.window] if is_window else []),
                dtype="float32" if is_window else "int64",
                trainable=False,
                aggregation="only_first_replica",
                name=f"spike_guard_{name}",
            )
            setattr(self, name, variable)

    def __repr__(self) -> str:
        return f"<SpikeGuard {self.settings}>"

    def variables(self) -> list[_types.KerasVariable]:
        """The variables that are saved, and that an update assigns."""
        return [getattr(self, name) for name in self._names]

    def counters(self) -> list[_types.KerasVariable]:
        """The variables that stay as they are when training goes back."""
        return [getattr(self, name) for name in self._names if name not in self._moved_back]

    # --- In an update -------------------------------------------------------------------

    def accepts(
        self,
        loss: _types.Tensor,
        norm: _types.Tensor | None,
        is_finite: _types.Tensor | None,
    ) -> _types.Tensor:
        """See `acceptance.UpdateGuard`."""
        settings = self.settings
        loss = tf.cast(loss, tf.float32)
        norm = tf.zeros_like(loss) if norm is None else tf.cast(norm, tf.float32)
        accepted = tf.convert_to_tensor(self.accepted.value)
        is_spike = ~(tf.math.is_finite(loss) & tf.math.is_finite(norm))
        if settings.grad_norm:
            is_spike |= self._stands_out(norm, self.norms, settings.factor, accepted)
        if settings.loss:
            is_spike |= self._stands_out(loss, self.losses, settings.factor, accepted)
        if settings.rollback_factor is None:
            has_risen = tf.constant(False)
        else:
            limit = settings.rollback_factor
            has_risen = self._stands_out(loss, self.losses, limit, accepted)
            has_risen |= ~tf.math.is_finite(loss)
        # An update that is skipped for its loss scale says nothing about the weights.
        is_candidate = tf.constant(True) if is_finite is None else is_finite
        is_active = tf.convert_to_tensor(self.is_active.value) > 0
        is_judged = is_candidate & is_active
        self._remember(loss, norm, is_judged, is_judged & ~is_spike, has_risen)
        return is_candidate & ~(is_spike & is_active)

    def _stands_out(
        self,
        value: _types.Tensor,
        window: _types.KerasVariable,
        factor: float,
        accepted: _types.Tensor,
    ) -> _types.Tensor:
        """Whether a value is more than `factor` times the median of the window."""
        median = _median_of_first(window, tf.minimum(accepted, self.settings.window))
        # For a negative loss, the same distance from the median as for a positive one.
        limit = median + (factor - 1) * tf.abs(median)
        is_warm = accepted >= self.settings.warm_up
        # Of zeros, as from a hinge loss, nothing can be a multiple.
        return is_warm & tf.not_equal(median, 0) & (value > limit)

    def _remember(
        self,
        loss: _types.Tensor,
        norm: _types.Tensor,
        is_judged: _types.Tensor,
        is_accepted: _types.Tensor,
        has_risen: _types.Tensor,
    ) -> None:
        settings = self.settings
        zero = tf.zeros((), tf.int64)
        accepted, consecutive, risen, is_due, spikes = (
            tf.convert_to_tensor(v.value)
            for v in (
                self.accepted,
                self.consecutive_spikes,
                self.risen_losses,
                self.is_due,
                self.spikes,
            )
        )
        position = tf.range(settings.window, dtype=tf.int64) == accepted % settings.window
        is_written = position & is_accepted
        is_skipped = is_judged & ~is_accepted
        consecutive = tf.where(is_accepted, zero, consecutive + tf.cast(is_skipped, tf.int64))
        risen = tf.where(is_judged, tf.where(has_risen, risen + 1, zero), risen)
        must_go_back = (consecutive >= settings.patience) | (risen >= _RISEN_UPDATES)
        new = {
            "norms": tf.where(is_written, norm, tf.convert_to_tensor(self.norms.value)),
            "losses": tf.where(is_written, loss, tf.convert_to_tensor(self.losses.value)),
            "accepted": accepted + tf.cast(is_accepted, tf.int64),
            "consecutive_spikes": consecutive,
            "risen_losses": risen,
            # Later updates of the same execution do not change it.
            "is_due": tf.maximum(is_due, tf.cast(must_go_back, tf.int64)),
            "spikes": spikes + tf.cast(is_skipped, tf.int64),
        }
        for name, value in new.items():
            _keras.variables.native(getattr(self, name)).assign(value)

    # --- Between updates ----------------------------------------------------------------

    def number(self, name: str) -> int:
        """The value of a counter."""
        return int(getattr(self, name).numpy())

    def set_active(self, is_active: bool) -> None:
        """Turns the guard on or off."""
        _keras.variables.assign_all([self.is_active], [int(is_active)])

    def is_calm(self) -> bool:
        """Whether the last update was accepted, and its loss had not risen."""
        return not (self.number("consecutive_spikes") or self.number("risen_losses"))

    def count_undone(self, updates: int) -> None:
        """Notes that the model has left out so many updates before."""
        _keras.variables.assign_all([self.undone], [updates])

    def went_back(self, undone: int) -> None:
        """Notes that training went back over so many applied updates."""
        new = {
            "consecutive_spikes": 0,
            "risen_losses": 0,
            "is_due": 0,
            "rollbacks": self.number("rollbacks") + 1,
            "undone": self.number("undone") + undone,
        }
        _keras.variables.assign_all([getattr(self, name) for name in new], new.values())


def _median_of_first(window: _types.KerasVariable, count: _types.Tensor) -> _types.Tensor:
    """The median of the first values of a vector; not a number to compare with if there are none.

    Args:
        window: float32 variable, a vector.
        count: int64 scalar, how many of its values count.
    """
    values = tf.convert_to_tensor(window.value)
    is_there = tf.range(values.shape[0], dtype=tf.int64) < count
    ordered = tf.sort(tf.where(is_there, values, math.inf))
    middle = [tf.maximum(count - 1, 0) // 2, tf.minimum(count // 2, values.shape[0] - 1)]
    # Halved first: the sum of two large values would overflow.
    return tf.reduce_sum(tf.gather(ordered, middle) / 2)
