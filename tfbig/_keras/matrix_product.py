"""Products of matrices that are computed a part at a time.

The gradient of a large matrix of weights is a product, which is computed for each chunk of tokens
and added to those before. As a whole, it takes as much memory as the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfbig import _types

# Bytes of a part. Measured on two cores with matrices of 51 MB: parts of 2 to 8 MiB take as long.
_PART = 2**22


def parts_of(tensor: _types.Tensor) -> tuple[list[Callable[[], _types.Tensor]], int]:
    """Functions that compute the parts of a tensor, and the axis on which they are joined.

    There is one part, unless a symbolic tensor is a large product.
    """
    factors, shape = _factors(tensor), tensor.shape
    if factors is None or not shape.is_fully_defined():
        return [lambda: tensor], 0
    axis = 0 if shape[0] >= shape[1] else 1
    size = max(1, _PART // (tensor.dtype.size * shape[1 - axis]))
    part = functools.partial(_part, factors, axis, tensor.dtype)
    return [functools.partial(part, i, i + size) for i in range(0, shape[axis], size)], axis


def joined(parts: Sequence[_types.Tensor], axis: int) -> _types.Tensor:
    """The whole."""
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis)


def _part(
    factors: Sequence[_types.Tensor], axis: int, dtype: _types.DType, begin: int, end: int
) -> _types.Tensor:
    # Of the two factors, which have a row for each token, one is divided by columns.
    a, b = (f[:, begin:end] if i == axis else f for i, f in enumerate(factors))
    return tf.cast(tf.matmul(a, b, transpose_a=True), dtype)


def _factors(tensor: _types.Tensor) -> tuple[_types.Tensor, _types.Tensor] | None:
    """`a` and `b` if a symbolic tensor is the product of the transpose of `a` with `b`."""
    operation = tensor.op
    if operation.type == "Cast":
        operation = operation.inputs[0].op
    is_product = (
        operation.type == "MatMul"
        and operation.get_attr("transpose_a")
        and not operation.get_attr("transpose_b")
    )
    return tuple(operation.inputs) if is_product else None
