"""The gradient noise scale: the batch size beyond which larger batches pay off less.

A micro-batch of `n` samples has the gradient `g`, an estimate of the true gradient `G` of
which each sample adds noise of the covariance `S`:

    E|g|^2 = |G|^2 + tr(S) / n.

Micro-batches of an update, whose sizes have the mean of inverses `m`, and the effective batch
of `N` samples are two such equations, from which `|G|^2` and `tr(S)` follow without bias. Their
ratio `tr(S) / |G|^2` is the noise scale: a batch of that size has as much noise as signal;
larger ones save few updates, smaller ones little work.

Reference: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import accumulators

if TYPE_CHECKING:
    from tfbig._update.apply import Update

__all__ = ("NoiseScale", "moments", "no_moments")

# Of the averages so far, at each update. Both estimates are noisy and their ratio is biased, so
# the ratio of their averages is taken.
DECAY = 0.99


def no_moments(dtype: _types.DType, is_measured: bool) -> _types.Tensor:
    """The sum of the moments of no micro-batches; of no elements unless they are measured."""
    return tf.zeros([3 if is_measured else 0], dtype)


def moments(
    gradients: list[_types.Gradient | None],
    size: _types.Tensor,
    loss_scale: _types.Tensor | None,
    dtype: _types.DType,
    compiled: bool,
) -> _types.Tensor:
    """What a micro-batch adds to the sum of moments: `[|g|^2, 1 / n, 1]`.

    Args:
        gradients: its gradients; None where the loss does not depend on a variable.
        size: int32 scalar, its number of samples.
        loss_scale: float32 scalar by which the gradients are multiplied, or None.
        dtype: dtype of the result.
        compiled: whether XLA compiles it.
    """
    factor = tf.ones((), dtype) if loss_scale is None else 1 / tf.cast(loss_scale, dtype)
    squares = [accumulators.squared_norm(g, factor, compiled) for g in gradients if g is not None]
    squared = tf.add_n([tf.cast(s, dtype) for s in squares]) if squares else tf.zeros((), dtype)
    return tf.stack([squared, 1 / tf.cast(size, dtype), tf.ones((), dtype)])


class NoiseScale(_keras.saving.SavedState):
    """Averages over the updates so far; the same on every replica, saved with the model.

    Attributes:
        squared_gradient: float32 variable, average of the estimates of `|G|^2`.
        variance: float32 variable, average of the estimates of `tr(S)`, for a sample.
    """

    _names = ("squared_gradient", "variance")

    def __init__(self) -> None:
        for name in self._names:
            variable = keras.Variable(
                0.0,
                dtype="float32",
                trainable=False,
                aggregation="only_first_replica",
                name=name,
            )
            setattr(self, name, variable)

    def update(self, update: Update) -> _types.Tensor:
        """Takes an `Update` into account; returns the noise scale, a float32 scalar.

        A skipped update, or one of a single micro-batch, is left out. NaN before the first that
        counts; inf where the noise hides the gradient.
        """
        squares, inverses, count = tf.unstack(tf.cast(update.noise_moments, tf.float32))
        whole = tf.cast(update.gradient_norm, tf.float32) ** 2
        samples = tf.cast(update.samples, tf.float32)
        variance = tf.math.divide_no_nan(
            tf.math.divide_no_nan(squares, count) - whole,
            tf.math.divide_no_nan(inverses, count) - 1 / samples,
        )
        estimates = {"variance": variance, "squared_gradient": whole - variance / samples}
        is_known = (count > 1) & tf.math.is_finite(variance)
        if update.is_applied is not None:
            is_known &= update.is_applied
        new = {}
        for name, estimate in estimates.items():
            # Both averages start at zero; the bias cancels in their ratio.
            old = tf.convert_to_tensor(getattr(self, name).value)
            new[name] = tf.where(is_known, old + (1 - DECAY) * (estimate - old), old)
            _keras.variables.native(getattr(self, name)).assign(new[name])
        return _ratio(new["squared_gradient"], new["variance"])

    def current(self) -> float:
        """The noise scale after the updates so far, as `update` returned it."""
        signal, noise = _keras.variables.values_of(getattr(self, name) for name in self._names)
        return float(_ratio(tf.constant(signal), tf.constant(noise)))


def _ratio(signal: _types.Tensor, noise: _types.Tensor) -> _types.Tensor:
    ratio = tf.where(signal > 0, tf.math.divide_no_nan(noise, signal), float("inf"))
    return tf.where((signal == 0) & (noise == 0), float("nan"), ratio)
