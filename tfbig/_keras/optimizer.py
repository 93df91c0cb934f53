"""Optimizers: gradients that are exchanged already, moving averages in replica context."""

import contextlib

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer as LossScaleOptimizer

from tfbig._keras.thread import current, holding
from tfbig._keras.variables import native


def aggregated_gradients():
    """A context in which optimizers of this thread take gradients as they are.

    Keras sums the gradients over the replicas inside `apply`, after clipping
    each replica's own. tfbig exchanges them before, once.
    """
    return holding("aggregated", True)


def _all_reduce_sum_gradients(
    self, grads_and_vars, _original=TFOptimizer._all_reduce_sum_gradients
):
    if current("aggregated"):
        return list(grads_and_vars)
    return _original(self, grads_and_vars)


TFOptimizer._all_reduce_sum_gradients = _all_reduce_sum_gradients


_overwrite_in_cross_replica_context = TFOptimizer._overwrite_model_variables_with_average_value


def _overwrite_with_average(self, trainable_variables):
    # `ema_overwrite_frequency` calls it in replica context, where Keras's own
    # raises; every replica writes its own copy there.
    if tf.distribute.in_cross_replica_context():
        _overwrite_in_cross_replica_context(self, trainable_variables)
        return
    averages = self._model_variables_moving_average
    for variable, average in zip(trainable_variables, averages, strict=True):
        native(variable).assign(native(average))


TFOptimizer._overwrite_model_variables_with_average_value = _overwrite_with_average


def needs_no_merge_call():
    """Whether the strategy updates variables in replica context (TPU does)."""
    return tf.__internal__.distribute.strategy_supports_no_merge_call()


def optimizers_of(model):
    """Pairs of name and optimizer: that of `compile`, then others that the model holds."""

    def leaves(name, value):
        # TensorFlow and Keras keep lists of their own of what a model holds.
        if isinstance(value, dict | list | tuple) and not name.startswith("_"):
            return list(value.values()) if isinstance(value, dict) else list(value)
        return [value]

    found = {} if model.optimizer is None else {id(model.optimizer): ("", model.optimizer)}
    for name, value in sorted(vars(model).items()):
        for i, leaf in enumerate(leaves(name, value)):
            if isinstance(leaf, keras.optimizers.Optimizer):
                found.setdefault(id(leaf), (f"{name}/{i}" if i else name, leaf))
    return list(found.values())


@contextlib.contextmanager
def with_optimizer(model, optimizer):
    """Within it, a model has another optimizer, which is neither tracked nor saved."""
    kept = model.optimizer
    vars(model)["optimizer"] = optimizer
    try:
        yield
    finally:
        vars(model)["optimizer"] = kept
