"""Along which axes of a weight a layer sums over its inputs."""

import math
from collections.abc import Collection

import keras

from tfbig import _types

__all__ = ("fan_in_axes",)

# Weights that are added or multiplied elementwise: they sum over nothing.
_ELEMENTWISE = ("alpha", "beta", "bias", "gamma", "scale")


def fan_in_axes(layer: _types.Layer, variable: _types.KerasVariable) -> tuple[int, ...]:
    """The axes of a layer's own weight over which the layer sums.

    The other axes are outputs. For weights of layers that Keras does not have, all axes but the
    last are inputs, as in a kernel of `Dense`.
    """
    rank = len(variable.shape)
    layers = keras.layers
    if isinstance(layer, layers.AdditiveAttention):
        return tuple(range(rank))
    if rank < 2 or variable.name in _ELEMENTWISE or variable.name.endswith("_bias"):
        return ()
    if isinstance(layer, layers.Embedding) and variable.name == "embeddings":
        # One row for each input: a lookup sums over nothing.
        return ()
    if isinstance(layer, layers.EinsumDense) and variable.name == "kernel":
        return _summed_in(layer.equation)
    if variable.name == "depthwise_kernel" or isinstance(
        layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D
    ):
        # Each channel has a kernel of its own.
        return tuple(range(rank - 2))
    if isinstance(layer, layers.Conv1DTranspose | layers.Conv2DTranspose | layers.Conv3DTranspose):
        return (*range(rank - 2), rank - 1)
    return tuple(range(rank - 1))


def _summed_in(equation: str) -> tuple[int, ...]:
    """The axes of the kernel of an `EinsumDense` that are not in its output."""
    kernel, output = equation.replace(" ", "").split(",")[1].split("->")
    return tuple(i for i, label in enumerate(kernel) if label not in output)


def product(numbers: tuple[float, ...], axes: Collection[int]) -> float:
    """The product of the numbers at some axes."""
    return math.prod(numbers[i] for i in axes)
