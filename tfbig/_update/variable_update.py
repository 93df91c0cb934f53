"""What a forward pass assigns: moving statistics, counters, seeds and metrics."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from tfbig import _keras, _types

__all__ = ("VariableUpdate",)


@dataclasses.dataclass
class VariableUpdate:
    """What the micro-batches of a replica made of one non-trainable variable.

    Moving statistics (floating-point state) become the mean over the replicas that had samples.
    Counters and seeds (integers) advance as on replica 0, whose flags (bool) all take over. A
    metric's sum is divided by the replicas, so that every replica knows all of it.

    Attributes:
        variable: the variable.
        before: its value before the first micro-batch.
        after: its value after the last; once exchanged, its value after the update.
        is_metric: whether it belongs to a metric, whose value is the sum over the replicas.
    """

    variable: keras.Variable
    before: _types.Tensor
    after: _types.Tensor
    is_metric: bool

    @property
    def is_exchanged(self) -> bool:
        """Whether replicas exchange it: not a metric that each replica keeps for itself."""
        return not self.is_metric or bool(_keras.variables.is_summed(self.variable))

    def contribution(
        self, has_samples: _types.Tensor, is_first: _types.Tensor, dtype: _types.DType
    ) -> _types.Tensor:
        """What this replica adds to the sum over the replicas.

        Args:
            has_samples: float scalar, 1 if the replica had samples, else 0.
            is_first: float scalar, 1 on the first replica, else 0.
            dtype: dtype of the result.
        """
        if self.is_metric:
            return tf.cast(self.after, dtype)
        if self._is_float:
            return has_samples * tf.cast(self.after, dtype)
        if self._is_flag:
            return is_first * tf.cast(self.after, dtype)
        # The advance is small; the value (a seed) may not fit into a float.
        return is_first * tf.cast(self.after - self.before, dtype)

    def with_sum(
        self, total: _types.Tensor, active_replicas: _types.Tensor, replicas: int
    ) -> VariableUpdate:
        """The same on every replica, from the sum of the contributions.

        Args:
            total: float tensor, the sum.
            active_replicas: float scalar, how many replicas had samples.
            replicas: number of all replicas.
        """
        if self.is_metric:
            after = tf.cast(total / replicas, self.after.dtype)
        elif self._is_float:
            after = tf.cast(total / active_replicas, self.after.dtype)
        elif self._is_flag:
            after = total > 0
        else:
            after = self.before + tf.cast(total, self.before.dtype)
        return dataclasses.replace(self, after=after)

    @property
    def _is_flag(self) -> bool:
        return bool(self.variable.dtype == "bool")

    @property
    def _is_float(self) -> bool:
        return bool(self.variable.dtype.startswith(("float", "bfloat")))
