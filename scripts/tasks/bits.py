"""Metrics of a language model over the tokens that are not padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tasks import tokens


class _Costs(keras.metrics.Metric):
    """Sums of the cross-entropy of tokens in nats, and of a number for each token."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name=name, **options)
        self.cost = self.add_weight(initializer="zeros", name="cost")
        self.count = self.add_weight(initializer="zeros", name="count")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        if sample_weight is not None:
            raise ValueError(
                "`sample_weight` must be None: these metrics recognize padding by its token."
            )
        cost = ops.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        is_text = ops.cast(ops.not_equal(y_true, tokens.PADDING), cost.dtype)
        self.cost.assign_add(ops.cast(ops.sum(cost * is_text), self.cost.dtype))
        count = ops.sum(self._numbers(y_true) * ops.cast(is_text, self.count.dtype))
        self.count.assign_add(ops.cast(count, self.count.dtype))

    def result(self) -> Any:  # A tensor of the Keras backend.
        return ops.divide_no_nan(self.cost, self.count)


@keras.saving.register_keras_serializable("tfbig_scripts")
class BitsPerByte(_Costs):
    """Bits per byte of text, which does not depend on the tokenizer.

    Args:
        byte_lengths: The bytes of each token.
    """

    def __init__(
        self, byte_lengths: Sequence[int], name: str = "bits_per_byte", **options: Any
    ) -> None:
        super().__init__(name, **options)
        self.byte_lengths = list(byte_lengths)

    def _numbers(self, y_true: Any) -> Any:
        return ops.take(ops.array(self.byte_lengths, self.count.dtype), y_true)

    def result(self) -> Any:  # A tensor of the Keras backend.
        return super().result() / math.log(2)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"byte_lengths": self.byte_lengths}


@keras.saving.register_keras_serializable("tfbig_scripts")
class Perplexity(_Costs):
    """The number of equally likely tokens among which the model chooses, on average."""

    def __init__(self, name: str = "perplexity", **options: Any) -> None:
        super().__init__(name, **options)

    def _numbers(self, y_true: Any) -> Any:
        return ops.ones(ops.shape(y_true), self.count.dtype)

    def result(self) -> Any:  # A tensor of the Keras backend.
        return ops.exp(super().result())
