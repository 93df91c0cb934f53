"""Keras's optimizers exchange gradients and average weights by `merge_call`; here they need not."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer

from tfbig import _types
from tfbig._keras.sharded_variable import ShardedVariable
from tfbig._keras.thread import current, holding
from tfbig._keras.variables import assign_all, native, values_of

_GradientAndVariable = tuple[_types.Gradient, _types.KerasVariable]


def without_exchange() -> contextlib.AbstractContextManager[None]:
    """A context in which optimizers of this thread apply gradients as they are given.

    Keras sums the gradients over the replicas inside `apply`, after clipping each replica's own.
    tfbig sums them before, once.
    """
    return holding("without_exchange", True)


_all_reduce_of_keras = TFOptimizer._all_reduce_sum_gradients


def _all_reduce_sum_gradients(
    self: TFOptimizer, grads_and_vars: Iterable[_GradientAndVariable]
) -> list[_GradientAndVariable]:
    if current("without_exchange"):
        return list(grads_and_vars)
    reduced: list[_GradientAndVariable] = _all_reduce_of_keras(self, grads_and_vars)
    return reduced


TFOptimizer._all_reduce_sum_gradients = _all_reduce_sum_gradients


def _overwrite_with_average(
    self: TFOptimizer, trainable_variables: Sequence[_types.KerasVariable]
) -> None:
    strategy = self._distribution_strategy
    for variable in trainable_variables:
        # Keras takes the averages in their order, and gives a weight that of another one if some
        # have been frozen since the optimizer was built.
        index = self._trainable_variables_indices.get(self._var_key(variable))
        average = None if index is None else self._model_variables_moving_average[index]
        if average is None:
            continue
        if isinstance(variable, ShardedVariable):
            assign_all([variable], values_of([average]))
        elif tf.distribute.in_cross_replica_context():
            strategy.extended.update(native(variable), _assign, args=(average,))
        else:
            # With `ema_overwrite_frequency`, tfbig calls it in replica context, where Keras's own
            # raises; every replica writes its own copy there.
            native(variable).assign(native(average))


def _assign(variable: _types.Variable, value: _types.Tensor) -> None:
    variable.assign(value)


TFOptimizer._overwrite_model_variables_with_average_value = _overwrite_with_average


def learning_rates_of(model: keras.Model) -> list[_types.KerasVariable]:
    """The learning rates of all optimizers that the model holds, but for those of a schedule."""
    rates = [
        part.learning_rate for _, optimizer in optimizers_of(model) for part in parts_of(optimizer)
    ]
    return [rate for rate in rates if isinstance(rate, keras.Variable)]


def swapped_averages(
    model: keras.Model, callbacks: Iterable[_types.Callback]
) -> list[tuple[_types.KerasVariable, _types.KerasVariable]]:
    """Pairs of a weight and its moving average that have each other's values now.

    Args:
        model: the model that is trained.
        callbacks: those of its `fit`. A `SwapEMAWeights` swaps during validation, and after an
            epoch.
    """
    return averages_of(model) if any(map(_holds_averages, callbacks)) else []


def averages_of(
    model: keras.Model,
) -> list[tuple[_types.KerasVariable, _types.KerasVariable]]:
    """Pairs of a weight and its moving average, of optimizers with `use_ema`."""
    return [
        (weight, average)
        for part in parts_of(model.optimizer)
        if getattr(part, "use_ema", False)
        for weight, average in zip(
            part._trainable_variables, part._model_variables_moving_average, strict=True
        )
        if average is not None
    ]


@contextlib.contextmanager
def averages_in_weights(model: keras.Model, callbacks: Iterable[_types.Callback]) -> Iterator[None]:
    """Within it, weights have the averages that a `SwapEMAWeights` validates, if there is one.

    Args:
        model: the model that is trained; no variable may be divided over workers.
        callbacks: those of its `fit`.
    """
    swapping = [c for c in callbacks if isinstance(c, keras.callbacks.SwapEMAWeights)]
    if not swapping or any(map(_holds_averages, swapping)):
        yield
        return
    pairs = averages_of(model)
    weights = [weight for weight, _ in pairs]
    values = values_of(weights)
    assign_all(weights, values_of(average for _, average in pairs))
    try:
        yield
    finally:
        assign_all(weights, values)


def is_last_swap(callbacks: Iterable[_types.Callback], epoch: int) -> bool:
    """Whether a `SwapEMAWeights` swaps for the last time at the end of an epoch.

    Weights and averages both have the values of the averages then.
    """
    return any(
        isinstance(callback, keras.callbacks.SwapEMAWeights)
        and callback.swap_on_epoch
        and epoch + 1 == callback.params["epochs"]
        for callback in callbacks
    )


def _holds_averages(callback: _types.Callback) -> bool:
    return isinstance(callback, keras.callbacks.SwapEMAWeights) and callback._ema_weights_in_model


def forget_swap(callbacks: Iterable[_types.Callback]) -> None:
    """Tells callbacks that weights and averages have their own values."""
    for callback in callbacks:
        if _holds_averages(callback):
            callback._ema_weights_in_model = False


def updates_in_replica_context() -> bool:
    """Whether the strategy updates variables in replica context, as TPUStrategy does."""
    return bool(tf.__internal__.distribute.strategy_supports_no_merge_call())


def optimizers_of(model: keras.Model) -> list[tuple[str, _types.Optimizer]]:
    """Names and optimizers: first that of `compile`, named "", then others that the model holds."""

    def leaves(name: str, value: object) -> list[object]:
        # TensorFlow and Keras keep private lists of what a model holds.
        if isinstance(value, dict | list | tuple) and not name.startswith("_"):
            return list(value.values()) if isinstance(value, dict) else list(value)
        return [value]

    found: dict[int, tuple[str, _types.Optimizer]] = {}
    # A model that was never compiled has no such attribute.
    if getattr(model, "optimizer", None) is not None:
        found[id(model.optimizer)] = "", model.optimizer
    for name, value in sorted(vars(model).items()):
        for i, leaf in enumerate(leaves(name, value)):
            if isinstance(leaf, keras.optimizers.Optimizer):
                found.setdefault(id(leaf), (f"{name}/{i}" if i else name, leaf))
    return list(found.values())


def parts_of(optimizer: _types.Optimizer) -> Sequence[_types.Optimizer]:
    """The optimizers that apply gradients."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return parts_of(inner)
    # `MultiOptimizer` hands each variable to one of several.
    several = getattr(optimizer, "optimizers", None)
    return [optimizer] if several is None else [p for o in several for p in parts_of(o)]


_SCHEDULE_FREE = getattr(keras.optimizers, "ScheduleFreeAdamW", ())


def begin_at_the_weights(optimizer: _types.Optimizer | None) -> None:
    """Has optimizers that copied the weights copy them again, before the first update.

    `ScheduleFreeAdamW` goes on from its copies. Keras makes them when it builds the optimizer,
    which `fit` does where assignments have no effect: training would begin at zeros. If it was
    built before, what the weights were given since, such as those of a file, would be lost.
    """
    for part in [] if optimizer is None else parts_of(optimizer):
        if isinstance(part, _SCHEDULE_FREE) and part.built and int(part.iterations.numpy()) == 0:
            for copy, weight in zip(part._momentums, part._trainable_variables, strict=True):
                copy.assign(weight)


@contextlib.contextmanager
def temporary_optimizer(model: keras.Model, optimizer: _types.Optimizer | None) -> Iterator[None]:
    """Within it, a model has another optimizer, which is neither tracked nor saved."""
    kept = model.optimizer
    vars(model)["optimizer"] = optimizer
    try:
        yield
    finally:
        vars(model)["optimizer"] = kept
