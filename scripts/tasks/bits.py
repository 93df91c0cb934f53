"""What text costs: metrics of a language model, over tokens that are not padding."""

import math

import keras
from keras import ops

from tasks import tokens


class _Costs(keras.metrics.Metric):
    """Sums of what tokens cost in nats, and of a number that belongs to each."""

    def __init__(self, name, **options):
        super().__init__(name=name, **options)
        self.cost = self.add_weight(initializer="zeros", name="cost")
        self.count = self.add_weight(initializer="zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        if sample_weight is not None:
            raise ValueError("`sample_weight` must be None: padding is known by its token.")
        cost = ops.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        is_text = ops.cast(ops.not_equal(y_true, tokens.PADDING), cost.dtype)
        self.cost.assign_add(ops.cast(ops.sum(cost * is_text), self.cost.dtype))
        count = ops.sum(self._numbers(y_true) * ops.cast(is_text, self.count.dtype))
        self.count.assign_add(ops.cast(count, self.count.dtype))

    def result(self):
        return ops.divide_no_nan(self.cost, self.count)


@keras.saving.register_keras_serializable("tfbig_scripts")
class BitsPerByte(_Costs):
    """Bits that a byte of text takes, whatever the tokens are.

    Args:
        byte_lengths: list of int, the bytes of each token.
    """

    def __init__(self, byte_lengths, name="bits_per_byte", **options):
        super().__init__(name, **options)
        self.byte_lengths = list(byte_lengths)

    def _numbers(self, y_true):
        return ops.take(ops.array(self.byte_lengths, self.count.dtype), y_true)

    def result(self):
        return super().result() / math.log(2)

    def get_config(self):
        return super().get_config() | {"byte_lengths": self.byte_lengths}


@keras.saving.register_keras_serializable("tfbig_scripts")
class Perplexity(_Costs):
    """Among how many equally likely tokens the model chooses, on average."""

    def __init__(self, name="perplexity", **options):
        super().__init__(name, **options)

    def _numbers(self, y_true):
        return ops.ones(ops.shape(y_true), self.count.dtype)

    def result(self):
        return ops.exp(super().result())
