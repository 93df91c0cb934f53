"""A learning-rate schedule cannot be assigned; here a factor multiplies the rate of each update.

The optimizer keeps its learning rate or schedule, which others read, assign and save as ever: the
factor counts only while the optimizer applies gradients, there also in weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras.src.backend.tensorflow.optimizer import TFOptimizer

from tfbig import _types
from tfbig._keras.optimizer import parts_of
from tfbig._keras.variables import assign_all

__all__ = ("LearningRateFactor", "factor_of", "factors_of", "is_new")

_NAME = "_tfbig_learning_rate_factor"


class LearningRateFactor:
    """What the learning rate of an optimizer is multiplied by; 1 at first.

    Args:
        optimizer: the optimizer. It has at most one factor, which is part of what is traced.
    """

    def __init__(self, optimizer: _types.Optimizer) -> None:
        with optimizer._distribution_strategy.scope():
            self.variable = keras.Variable(
                1.0,
                # A schedule's rate may have fewer digits, and what is multiplied keeps these.
                dtype="float64" if keras.config.floatx() == "float64" else "float32",
                trainable=False,
                aggregation="only_first_replica",
                name="learning_rate_factor",
            )
        self.value = 1.0
        # How many calls apply gradients now. No thread's own: under a strategy, another thread
        # than that of a replica decays its weights.
        self.applying = 0
        vars(optimizer)[_NAME] = self

    def assign(self, value: float) -> None:
        """Has the updates that begin from now on multiplied."""
        if value != self.value:
            assign_all([self.variable], [value])
            self.value = value


def is_new(optimizer: _types.Optimizer) -> bool:
    """Whether an optimizer has no factor yet, so that no trace knows of it."""
    return any(_NAME not in vars(o) for o in parts_of(optimizer))


def factors_of(optimizer: _types.Optimizer) -> list[LearningRateFactor]:
    """The factors of an optimizer and of those that it consists of; made if there are none."""
    return [vars(o).get(_NAME) or LearningRateFactor(o) for o in parts_of(optimizer)]


def factor_of(optimizer: _types.Optimizer) -> float:
    """What the learning rate of an optimizer is multiplied by now."""
    factor: LearningRateFactor | None = vars(parts_of(optimizer)[0]).get(_NAME)
    return 1.0 if factor is None else factor.value


_rate_of_keras = TFOptimizer._get_current_learning_rate


def _current_learning_rate(
    self: TFOptimizer,
) -> _types.Tensor | _types.KerasVariable | float:
    rate = _rate_of_keras(self)
    factor: LearningRateFactor | None = vars(self).get(_NAME)
    if factor is None or not factor.applying:
        return rate
    return keras.ops.cast(rate, factor.variable.dtype) * factor.variable


TFOptimizer._get_current_learning_rate = _current_learning_rate


_apply_of_keras = TFOptimizer._backend_apply_gradients


def _backend_apply_gradients(
    self: TFOptimizer,
    grads: Sequence[_types.Gradient],
    trainable_variables: Sequence[_types.KerasVariable],
) -> None:
    factor: LearningRateFactor | None = vars(self).get(_NAME)
    if factor is None:
        _apply_of_keras(self, grads, trainable_variables)
        return
    factor.applying += 1
    try:
        _apply_of_keras(self, grads, trainable_variables)
    finally:
        factor.applying -= 1


TFOptimizer._backend_apply_gradients = _backend_apply_gradients
