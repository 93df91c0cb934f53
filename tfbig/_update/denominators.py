"""Denominators: what the losses of an effective batch are divided by.

Let micro-batch `k` have the weight `w_k` (its samples), and the effective batch
the weight `W`, the sum over all micro-batches of all replicas. A loss `L` that is
a mean over samples satisfies

    L = sum_k w_k L_k / W,

and so does its gradient. Other Keras reductions have denominators of their own:
a masked mean is `N / D`, with `D` the number of valid entries of the whole batch.
`LossReducer` therefore returns for such a loss, in micro-batch `k`,

    L_k = (N_k / D) (W / w_k),

with which the same formula holds. `D` and `W` must be known before the backward
pass; a first pass over the forward part yields them (`LossCounter`), of which
TensorFlow runs only what the denominators depend on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors

__all__ = ("Denominators", "LossCounter", "LossReducer")

# Keras's value of a loss with a given reduction.
_Reduced: TypeAlias = Callable[[str | None], _types.Tensor]


class Denominators:
    """What the losses of an effective batch are divided by.

    Args:
        counts: float vector, what `MicroBatches.exchanged_counts` returned.

    Attributes:
        weight: float scalar, `W`: its samples.
        counted: list of float scalars, `D` of each Keras loss that has one of
            its own, in the order of the calls.
    """

    def __init__(self, counts: _types.Tensor) -> None:
        self.weight: _types.Tensor
        self.counted: list[_types.Tensor]
        self.weight, *self.counted = tf.unstack(counts)


def _denominator(
    values: _types.Tensor,
    sample_weight: _types.Tensor | None,
    mask: _types.Tensor | None,
    reduction: str,
    dtype: _types.DType | str,
) -> _types.Tensor:
    """`D` of one Keras loss on one micro-batch, from its weighted values."""
    if reduction == "mean_with_sample_weight":
        weight = _keras.losses.merge_mask(sample_weight, mask, dtype=dtype, reduction=reduction)
        _, weight = _keras.losses.match_ranks(values, tf.cast(weight, dtype))
        return tf.reduce_sum(weight)
    # A masked mean is divided by its valid entries: Keras gives each the weight
    # total / valid and divides by the number of values.
    entries = tf.cast(tf.size(values), dtype)
    total = tf.cast(tf.size(mask), dtype)
    valid = tf.reduce_sum(tf.cast(mask, dtype))
    return tf.math.divide_no_nan(valid * entries, total)


class _Interceptor:
    """Classifies each call of a Keras loss; subclasses say what it returns.

    A call is "mean" if its denominator is proportional to the number of samples,
    "sum" if it is one, "counted" if only the call itself knows it.
    """

    def __call__(
        self,
        reduce_values: _types.AnyFunction,
        values: _types.Tensor,
        sample_weight: _types.Tensor | None,
        mask: _types.Tensor | None,
        reduction: str | None,
        dtype: _types.DType | str,
    ) -> _types.Tensor:
        """The value of a call of a Keras loss, which would be `reduce_values(values, ...)`."""

        def reduced(reduction: str | None) -> _types.Tensor:
            return reduce_values(
                values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
            )

        if reduction in (None, "none"):
            return reduced(reduction)
        if tuple(values.shape) == ():
            if sample_weight is not None:
                raise errors.UnsupportedModelError(
                    "A loss that returns a scalar cannot be weighted by `sample_weight` or "
                    "`class_weight` and split into micro-batches or over replicas: the weights "
                    "would multiply a mean over samples. Return one value per sample, of shape "
                    f"(batch,). Received: values of shape {values.shape}, "
                    f"sample_weight of shape {sample_weight.shape}."
                )
            # The mask cannot act on a scalar; Keras multiplies by one in effect.
            mask = None
            kind = "sum" if reduction == "sum" else "scalar"
            return self.reduce(kind, reduced, None)
        weighted = sample_weight is not None and reduction == "mean_with_sample_weight"
        if reduction == "sum":
            return self.reduce("sum", reduced, None)
        if mask is None and not weighted:
            return self.reduce("mean", lambda _: reduced(reduction), None)

        def denominator() -> _types.Tensor:
            return _denominator(reduced(None), sample_weight, mask, reduction, dtype)

        return self.reduce("counted", reduced, denominator)

    def added(self, loss: _types.Tensor) -> _types.Tensor:
        """The value of a loss of `add_loss` that is no scalar; Keras adds its entries up."""
        kind = "sum" if self.has_samples(loss) else "scalar"
        return self.reduce(kind, lambda _: keras.ops.sum(loss), None)

    def has_samples(self, loss: _types.Tensor) -> bool:
        """Whether a loss of `add_loss` has a value for each sample."""
        raise NotImplementedError

    def reduce(
        self, kind: str, reduced: _Reduced, denominator: Callable[[], _types.Tensor] | None
    ) -> _types.Tensor:
        """The value of one call.

        Args:
            kind: "scalar", "mean", "sum" or "counted".
            reduced: Function of a reduction, returning Keras's value with it.
            denominator: Function that returns `D`; None unless "counted".
        """
        raise NotImplementedError


class LossCounter(_Interceptor):
    """Collects the kinds and the denominators of Keras losses.

    Args:
        samples: samples of the micro-batch; None if their number is not known.

    Attributes:
        kinds: kinds of the calls, in their order.
        counted: the denominators of those that are "counted".
        reductions: for each call that is not "scalar", its kind, what it reduces, and the result.
    """

    def __init__(self, samples: int | None = None) -> None:
        self.samples = samples
        self.kinds: list[str] = []
        self.counted: list[_types.Tensor] = []
        self.reductions: list[tuple[str, _types.Tensor, _types.Tensor]] = []

    def __call__(
        self, reduce_values: _types.AnyFunction, values: _types.Tensor, *args: Any, **kwargs: Any
    ) -> _types.Tensor:
        calls = len(self.kinds)
        reduced = super().__call__(reduce_values, values, *args, **kwargs)
        # Without a reduction, it is no call of any kind.
        return self._keep(values, reduced) if len(self.kinds) > calls else reduced

    def added(self, loss: _types.Tensor) -> _types.Tensor:
        return self._keep(loss, super().added(loss))

    def has_samples(self, loss: _types.Tensor) -> bool:
        return bool(loss.shape[0] == self.samples)

    def reduce(
        self, kind: str, reduced: _Reduced, denominator: Callable[[], _types.Tensor] | None
    ) -> _types.Tensor:
        self.kinds.append(kind)
        if denominator is not None:
            self.counted.append(denominator())
        return reduced("sum_over_batch_size")

    def _keep(self, values: _types.Tensor, reduced: _types.Tensor) -> _types.Tensor:
        if self.kinds[-1] != "scalar":
            self.reductions.append((self.kinds[-1], values, reduced))
        return reduced


class LossReducer(_Interceptor):
    """Divides Keras losses of a micro-batch by the denominators of the batch.

    Args:
        denominators: those of the effective batch, or None where all
            losses are means over samples.
        weight: float scalar, `w_k`.
        kinds: kinds of the losses, in the order of the calls. Sizes that are
            constant in an XLA program do not tell whether they count samples.
    """

    def __init__(
        self, denominators: Denominators | None, weight: _types.Tensor, kinds: list[str]
    ) -> None:
        self.kinds = list(kinds)
        self.weight = weight
        self.denominators = denominators
        self.remaining = list(denominators.counted) if denominators else []

    def has_samples(self, loss: _types.Tensor) -> bool:
        return self.kinds[0] == "sum"

    def reduce(
        self, kind: str, reduced: _Reduced, denominator: Callable[[], _types.Tensor] | None
    ) -> _types.Tensor:
        self.kinds.pop(0)
        if kind in ("mean", "scalar"):
            return reduced("sum_over_batch_size")
        # Such losses need the denominators, so they are there.
        assert self.denominators is not None
        value = reduced("sum")
        if kind == "counted":
            value = tf.math.divide_no_nan(value, tf.cast(self.remaining.pop(0), value.dtype))
        return value * tf.cast(self.denominators.weight / self.weight, value.dtype)
