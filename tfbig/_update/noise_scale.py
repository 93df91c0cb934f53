"""The gradient noise scale: which batch size is worth having.

A micro-batch of `n` samples has the gradient `g`, an estimate of the true gradient `G` of
which each sample adds noise of the covariance `S`:

    E|g|^2 = |G|^2 + tr(S) / n.

Micro-batches of an update, whose sizes have the mean of inverses `m`, and the effective batch
of `N` samples are two such equations, from which `|G|^2` and `tr(S)` follow without bias. Their
ratio `tr(S) / |G|^2` is the noise scale: a batch of that size has as much noise as signal;
larger ones save few updates, smaller ones little work.

Reference: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.
"""

import keras
import tensorflow as tf

from tfbig import _keras
from tfbig._update import accumulators

__all__ = ("NoiseScale", "moments")

# Of what is known so far, after each update. Both estimates are noisy and their ratio is
# biased, so the ratio of averages is taken.
DECAY = 0.99


def moments(gradients, size, loss_scale, dtype, compiled):
    """What a micro-batch adds: `[|g|^2, 1 / n, 1]`.

    Args:
        gradients: list of its gradients, None among them.
        size: int32 scalar, its samples.
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

    def __init__(self):
        for name in self._names:
            variable = keras.Variable(
                0.0,
                dtype="float32",
                trainable=False,
                aggregation="only_first_replica",
                name=name,
            )
            setattr(self, name, variable)

    def update(self, update):
        """Takes an `Update` into account; returns the noise scale, a float32 scalar.

        A skipped update, or one of a single micro-batch, tells nothing. NaN before any that
        does; inf where the noise hides the gradient.
        """
        squares, inverses, count = tf.unstack(tf.cast(update.moments, tf.float32))
        whole = tf.cast(update.gradient_norm, tf.float32) ** 2
        samples = tf.cast(update.samples, tf.float32)
        variance = tf.math.divide_no_nan(
            tf.math.divide_no_nan(squares, count) - whole,
            tf.math.divide_no_nan(inverses, count) - 1 / samples,
        )
        estimates = {"variance": variance, "squared_gradient": whole - variance / samples}
        is_known = (count > 1) & tf.math.is_finite(variance)
        if update.is_finite is not None:
            is_known &= update.is_finite
        new = {}
        for name, estimate in estimates.items():
            # From zero on: what that lacks at first, the ratio does not show.
            old = tf.convert_to_tensor(getattr(self, name).value)
            new[name] = tf.where(is_known, old + (1 - DECAY) * (estimate - old), old)
            _keras.variables.native(getattr(self, name)).assign(new[name])
        signal, noise = new["squared_gradient"], new["variance"]
        ratio = tf.where(signal > 0, tf.math.divide_no_nan(noise, signal), float("inf"))
        return tf.where((signal == 0) & (noise == 0), float("nan"), ratio)
