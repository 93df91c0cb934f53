"""How much wider a weight is than that of the base model, and what follows for its updates."""

from __future__ import annotations

import dataclasses
import math

import keras

from tfbig import _keras, _types, errors
from tfbig._keras.scaled_updates import UpdateScale

__all__ = ("Width", "check_optimizer", "width_of")

# Optimizers by the class that has the update. The first divide each entry of the gradient by an
# average of its size; the others multiply the gradient by the learning rate.
_ENTRYWISE = (
    keras.optimizers.Adam,
    keras.optimizers.Nadam,
    keras.optimizers.Adamax,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.Lion,
)
_PROPORTIONAL = (keras.optimizers.SGD,)
_SPECTRAL = (keras.optimizers.Muon,)


@dataclasses.dataclass(frozen=True)
class Width:
    """The width of a weight, as multiples of the base model's.

    Attributes:
        kind: "hidden" if inputs and outputs grow with the width, "output" if only the inputs do,
            "vector" if only the outputs do.
        fan_in: inputs of the layer, over those in the base model; 1 if they do not grow.
        fan_out: outputs of the layer, over those in the base model; 1 if they do not grow.
        longest: the longest axis, over that in the base model. Muon multiplies by its root.
        sums: whether the layer sums over inputs; False for biases and embeddings.
        multiplier: what stands before the weight. The weight of the table is the weight divided by
            it. It is 1 but for queries of attention whose heads grow.
        initial: what the first value was multiplied by.
    """

    kind: str
    fan_in: float
    fan_out: float
    longest: float
    sums: bool
    multiplier: float
    initial: float

    def update_scale(
        self, optimizer: _types.Optimizer, variable: _types.KerasVariable
    ) -> UpdateScale:
        """What the updates of the weight are multiplied by.

        Args:
            optimizer: the optimizer.
            variable: the weight.

        Raises:
            InvalidOptionError: If it is not known how updates of the optimizer grow with width.
        """
        check_optimizer(optimizer)
        ratio = self.fan_out / self.fan_in
        # Entries of a gradient are as large as 1 / fan_out, and there are fan_in * fan_out.
        value = self.multiplier * self.fan_out
        norm = self.multiplier * math.sqrt(ratio)
        if _updates_like(optimizer, _PROPORTIONAL):
            rate = self.multiplier**2 * ratio
            return UpdateScale(learning_rate=rate, norm=norm, value=value)
        if _updates_like(optimizer, _SPECTRAL) and not _keras.scaled_updates.uses_adamw(
            optimizer, variable
        ):
            return UpdateScale(
                learning_rate=self.multiplier * self._spectral(optimizer), norm=norm, value=value
            )
        # With the factor of the gradient, `epsilon` matters as much at every width.
        return UpdateScale(self.multiplier / self.fan_in, gradient=value, norm=norm, value=value)

    def _spectral(self, optimizer: _types.Optimizer) -> float:
        # The update is an orthogonal matrix, times the root of its longest axis with `rms_rate`.
        included = 1.0 if optimizer.rms_rate is None else math.sqrt(self.longest)
        wanted = math.sqrt(self.fan_out / self.fan_in) if self.sums else math.sqrt(self.longest)
        return wanted / included


def check_optimizer(optimizer: _types.Optimizer) -> None:
    """Raises for an optimizer whose updates no rule covers."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not _updates_like(inner, _ENTRYWISE + _PROPORTIONAL + _SPECTRAL):
        known = sorted(c.__name__ for c in _ENTRYWISE + _PROPORTIONAL + _SPECTRAL)
        raise errors.InvalidOptionError(
            "`optimizer` must be one for which it is known how learning rates change with width: "
            f"AdamW, {', '.join(known)}, or a subclass with the same `update_step`. Received: "
            f"{type(inner).__name__}. Use one of these, or train without tfbig.mup.parametrize."
        )


def _updates_like(optimizer: _types.Optimizer, classes: tuple[type, ...]) -> bool:
    return any(type(optimizer).update_step is getattr(c, "update_step") for c in classes)  # noqa: B009


def width_of(variable: _types.KerasVariable) -> Width | None:
    """The width of a weight; None if it is as large in all models, or its model has no widths."""
    rule = _keras.scaled_updates.rule_of(variable)
    owner = getattr(rule, "__self__", None)
    return owner if isinstance(owner, Width) else None
