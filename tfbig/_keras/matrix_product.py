"""Products of matrices that are added up a part at a time.

The gradient of a large matrix of weights is a product, computed for each chunk of data and added to
those before. As a whole, it takes as much memory as the sum, and goes through the memory twice; a
part of it stays in the processor's cache.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfbig import _types

# Bytes of a part. Measured on two cores with matrices of 51 MB: parts of 2 to 8 MiB take as long.
_PART = 2**22


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a matrix is divided along one of its dimensions.

    Attributes:
        axis: the dimension, 0 or 1.
        sizes: of the parts along it.
    """

    axis: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tensor: _types.Tensor) -> Parts:
        """How a tensor is divided: into one part, unless it is a large product of matrices."""
        shape = tensor.shape
        if _factors(tensor) is None or not shape.is_fully_defined():
            return cls(0, (-1,))
        axis = 0 if shape[0] >= shape[1] else 1
        count = -(-shape.num_elements() * tensor.dtype.size // _PART)
        count = max(1, min(count, shape[axis]))
        size, more = divmod(shape[axis], count)
        return cls(axis, tuple(size + (i < more) for i in range(count)))

    def zeros(self, shape: tf.TensorShape, dtype: _types.DType) -> list[_types.Tensor]:
        """The parts of a tensor of zeros."""
        if len(self.sizes) == 1:
            return [tf.zeros(shape, dtype)]
        other = shape[1 - self.axis]
        shapes = [(n, other) if self.axis == 0 else (other, n) for n in self.sizes]
        return [tf.zeros(s, dtype) for s in shapes]

    def add(self, sums: list[_types.Tensor], tensor: _types.Tensor) -> list[_types.Tensor]:
        """The parts of a sum, and those of a tensor added to them, one after another."""
        factors = _factors(tensor)
        if len(self.sizes) == 1 or factors is None:
            (total,) = sums
            return [total + tf.cast(tensor, total.dtype)]
        # Of the two factors, which have a row for each token, one is divided by columns.
        divided, whole = factors if self.axis == 0 else factors[::-1]
        begin = 0
        added: list[_types.Tensor] = []
        for total, size in zip(sums, self.sizes, strict=True):
            with tf.control_dependencies(added[-1:]):
                columns = divided[:, begin : begin + size]
            pair = (columns, whole) if self.axis == 0 else (whole, columns)
            product = tf.cast(tf.matmul(*pair, transpose_a=True), tensor.dtype)
            added.append(total + tf.cast(product, total.dtype))
            begin += size
        return added

    def join(self, sums: list[_types.Tensor]) -> _types.Tensor:
        """The whole."""
        return sums[0] if len(sums) == 1 else tf.concat(sums, self.axis)


def _factors(tensor: _types.Tensor) -> tuple[_types.Tensor, _types.Tensor] | None:
    """`a` and `b` if a symbolic tensor is the product of the transpose of `a` with `b`."""
    operation = tensor.op
    if operation.type == "Cast":
        operation = operation.inputs[0].op
    if operation.type != "MatMul":
        return None
    if not operation.get_attr("transpose_a") or operation.get_attr("transpose_b"):
        return None
    a, b = operation.inputs
    return a, b
