"""Keras's optimizers have one learning rate for all weights; here each weight may scale it.

A rule beside the weight says how. The optimizer stays the user's own, with its learning rate, its
schedule and its state. Where Keras calls `update_step` for a weight, it gets the learning rate and
the gradient multiplied; where it clips, each gradient is measured in units of its own.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer

from tfbig import _types
from tfbig._keras.thread import current, holding

__all__ = (
    "Rule",
    "UpdateScale",
    "clipping_units",
    "ignore_rules",
    "multiplied",
    "rule_of",
    "set_rule",
    "update_step",
    "uses_adamw",
)


@dataclasses.dataclass(frozen=True)
class UpdateScale:
    """What an update of one weight is multiplied by.

    Attributes:
        learning_rate: factor of the learning rate. Weight decay is not multiplied.
        gradient: factor of the gradient that the optimizer sees, after clipping.
        norm: factor of the gradient while `clipnorm` or `global_clipnorm` measure it.
        value: factor of the gradient while `clipvalue` measures it.
    """

    learning_rate: float = 1.0
    gradient: float = 1.0
    norm: float = 1.0
    value: float = 1.0


# What multiplies the updates of a weight, given the optimizer and the weight.
Rule: TypeAlias = Callable[[_types.Optimizer, _types.KerasVariable], UpdateScale]

_UNSCALED = UpdateScale()


def set_rule(variable: _types.KerasVariable, rule: Rule) -> None:
    """Has the updates of a weight multiplied, whichever optimizer makes them."""
    vars(variable)["_tfbig_update_rule"] = rule


def rule_of(variable: _types.KerasVariable) -> Rule | None:
    """The rule of a weight, or None."""
    rule: Rule | None = vars(variable).get("_tfbig_update_rule")
    return rule


def ignore_rules(optimizer: _types.Optimizer) -> None:
    """Has an optimizer see gradients as they are, whatever rules weights have."""
    vars(optimizer)["_tfbig_ignores_rules"] = True


def _scale_of(
    optimizer: _types.Optimizer, variable: _types.KerasVariable | _types.Variable
) -> UpdateScale:
    if vars(optimizer).get("_tfbig_ignores_rules"):
        return _UNSCALED
    # Under a strategy, Keras hands over the copy of a device.
    weight = optimizer._trainable_variables[optimizer._get_variable_index(variable)]
    rule = rule_of(weight) if isinstance(weight, keras.Variable) else None
    return _UNSCALED if rule is None else rule(optimizer, weight)


def uses_adamw(optimizer: _types.Optimizer, variable: _types.KerasVariable) -> bool:
    """Whether Muon updates a weight as AdamW does."""
    return bool(optimizer._should_use_adamw(variable))


def multiplied(gradient: _types.Gradient | None, factor: float) -> _types.Gradient | None:
    """A gradient times a number; itself if the number is 1."""
    if gradient is None or factor == 1.0:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


# --- Updates ---------------------------------------------------------------------------


def update_step(
    optimizer: _types.Optimizer,
    gradient: _types.Gradient,
    variable: _types.KerasVariable | _types.Variable,
    learning_rate: _types.Tensor | float,
) -> None:
    """The optimizer's `update_step`, scaled as the rule of the weight says."""
    scale = _scale_of(optimizer, variable)
    if scale.learning_rate != 1.0:
        learning_rate = learning_rate * scale.learning_rate
    optimizer.update_step(multiplied(gradient, scale.gradient), variable, learning_rate)


_update_of_keras = TFOptimizer._distributed_tf_update_step


def _distributed_update(
    self: TFOptimizer,
    distribution: _types.Strategy,
    grads_and_vars: Iterable[tuple[_types.Gradient, _types.Variable]],
    learning_rate: _types.Tensor,
) -> None:
    if not _has_rules(self):
        _update_of_keras(self, distribution, grads_and_vars, learning_rate)
        return

    # Scaled on each device: in cross-replica context, a gradient is no tensor.
    def update(
        variable: _types.Variable, gradient: _types.Gradient, learning_rate: _types.Tensor
    ) -> None:
        update_step(self, gradient, variable, learning_rate)

    for gradient, variable in grads_and_vars:
        distribution.extended.update(variable, update, args=(gradient, learning_rate), group=False)


TFOptimizer._distributed_tf_update_step = _distributed_update


def _has_rules(optimizer: _types.Optimizer) -> bool:
    if vars(optimizer).get("_tfbig_ignores_rules"):
        return False
    weights = optimizer._trainable_variables
    return any(isinstance(v, keras.Variable) and rule_of(v) is not None for v in weights)


# --- Clipping --------------------------------------------------------------------------


def clipping_units(
    optimizer: _types.Optimizer, variables: Sequence[_types.KerasVariable]
) -> list[float]:
    """What each gradient is multiplied by while it is clipped, and divided by after that."""
    is_by_value = not (optimizer.clipnorm or optimizer.global_clipnorm)
    scales = [_scale_of(optimizer, v) for v in variables]
    return [scale.value if is_by_value else scale.norm for scale in scales]


_apply_of_keras = TFOptimizer._backend_apply_gradients


def _backend_apply_gradients(
    self: TFOptimizer,
    grads: Sequence[_types.Gradient],
    trainable_variables: Sequence[_types.KerasVariable],
) -> None:
    # Keras clips without knowing whose gradients they are.
    with holding("clipped", trainable_variables if _has_rules(self) else None):
        _apply_of_keras(self, grads, trainable_variables)


TFOptimizer._backend_apply_gradients = _backend_apply_gradients


_clip_of_keras = TFOptimizer._clip_gradients


def _clip_gradients(
    self: TFOptimizer, grads: Sequence[_types.Gradient]
) -> Sequence[_types.Gradient]:
    variables = current("clipped")
    clips = self.clipnorm or self.global_clipnorm or self.clipvalue
    if variables is None or not clips:
        unscaled: Sequence[_types.Gradient] = _clip_of_keras(self, grads)
        return unscaled
    units = clipping_units(self, variables)
    clipped = _clip_of_keras(self, [multiplied(g, u) for g, u in zip(grads, units, strict=True)])
    return [multiplied(g, 1 / u) for g, u in zip(clipped, units, strict=True)]


TFOptimizer._clip_gradients = _clip_gradients
