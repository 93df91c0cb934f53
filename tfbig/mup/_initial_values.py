"""How large the first values of a weight are, and how large they are to be."""

import math

import keras
import numpy as np

from tfbig import _keras, _types, errors

__all__ = ("initial_factor",)

_CONSTANT = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
# Their values do not depend on the shape.
_OF_FIXED_SIZE = (
    *_CONSTANT,
    keras.initializers.RandomNormal,
    keras.initializers.TruncatedNormal,
    keras.initializers.RandomUniform,
)


def initial_factor(
    variable: _types.KerasVariable, base: _types.KerasVariable, kind: str, fan_in: float
) -> float:
    """What the first value of a weight is multiplied by.

    At the base width it is 1. At others, the standard deviation of hidden weights falls as the root
    of the inputs and that of output weights as their number, whatever the initializer makes of the
    shape.

    Args:
        variable: the weight.
        base: that of the base model.
        kind: see `Width`.
        fan_in: see `Width`.
    """
    initializer = _keras.sharded_variable.initializer_of(variable)
    if isinstance(initializer, keras.initializers.Identity):
        return 1.0
    if kind != "vector" and isinstance(initializer, _CONSTANT) and np.any(_value(variable)):
        raise errors.UnsupportedModelError(
            "Weights that sum over a width must begin random, orthogonal or zero: a sum of equal "
            f"numbers grows with the width. Received: {variable.path} with {initializer}."
        )
    wanted = {"vector": 1.0, "hidden": 1 / math.sqrt(fan_in), "output": 1 / fan_in}[kind]
    return wanted * _size_ratio(variable, base, initializer)


def _size_ratio(
    variable: _types.KerasVariable,
    base: _types.KerasVariable,
    initializer: keras.initializers.Initializer | None,
) -> float:
    """The standard deviation at the shape of the base model, over that at the weight's own."""
    if variable.shape == base.shape or isinstance(initializer, _OF_FIXED_SIZE):
        return 1.0
    if isinstance(initializer, keras.initializers.VarianceScaling):
        mine, other = (_fan(initializer, v.shape) for v in (variable, base))
        return math.sqrt(mine / other)
    if isinstance(initializer, keras.initializers.Orthogonal):
        mine, other = (max(math.prod(v.shape[:-1]), v.shape[-1]) for v in (variable, base))
        return math.sqrt(mine / other)
    # A function of the user's own: as large as it came out.
    mine, other = (float(np.sqrt(np.mean(np.square(_value(v))))) for v in (variable, base))
    return other / mine if mine and other else 1.0


def _fan(initializer: keras.initializers.VarianceScaling, shape: tuple[int, ...]) -> float:
    """What the initializer divides the variance by."""
    # Keras 3.14 has no such axes.
    inputs = getattr(initializer, "input_axes", None)
    outputs = getattr(initializer, "output_axes", None)
    if inputs is None or outputs is None:
        outer = math.prod(shape[:-2])
        fan_in, fan_out = outer * (shape[-2] if len(shape) > 1 else shape[-1]), outer * shape[-1]
    else:
        fan_in, fan_out = (math.prod(shape[i] for i in axes) for axes in (inputs, outputs))
    mode = initializer.mode
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    return max(1.0, fan)


def _value(variable: _types.KerasVariable) -> _types.Array:
    (value,) = _keras.variables.values_of([variable])
    return value.astype("float64")
