"""What the gradient of one variable is added up in.

float32 or wider. A dense gradient has one buffer. The gradient of an embedding
is a `tf.IndexedSlices`, a row for each look-up; its rows are kept, as Keras keeps
them for the whole batch, since Keras's optimizers square each row for itself.
"""

import math

import tensorflow as tf

__all__ = (
    "add",
    "dtype_for",
    "map_values",
    "result",
    "size_of",
    "squared_norm",
    "start",
    "values",
    "wider",
)


def dtype_for(dtype):
    """float32, or the given dtype if it is wider."""
    dtype = tf.as_dtype(dtype)
    return dtype if dtype.size > tf.float32.size else tf.float32


def wider(dtype, other):
    """The wider one of an accumulator dtype and that for another dtype."""
    other = dtype_for(other)
    return other if other.size > dtype.size else dtype


def size_of(variables):
    """Bytes of the accumulators of dense gradients of these variables."""
    return sum(math.prod(v.shape) * dtype_for(v.dtype).size for v in variables)


def start(variable, is_sparse):
    """An empty accumulator: a structure of tensors that a loop can carry."""
    dtype = dtype_for(variable.dtype)
    if not is_sparse:
        return tf.zeros(variable.shape, dtype)

    def rows(dtype, shape):
        return tf.TensorArray(
            dtype, size=0, dynamic_size=True, element_shape=shape, infer_shape=False
        )

    return {
        "count": tf.constant(0),
        "indices": rows(tf.int64, [None]),
        "values": rows(dtype, [None, *variable.shape[1:]]),
    }


def add(totals, gradients, weight, are_alike=None, is_first=None):
    """A list of accumulators with `weight * gradient` added to each.

    Args:
        totals: list of accumulators.
        gradients: list of tensors, `tf.IndexedSlices` or None.
        weight: float scalar.
        are_alike: bool scalar: whether the weights of all gradients of the sum are one. Each
            pass over dense gradients that it saves is a part of the time of small
            micro-batches. None if that is not known.
        is_first: bool scalar: whether nothing has been added yet.
    """
    pairs = list(zip(totals, gradients, strict=True))
    dense = [i for i, (_, g) in enumerate(pairs) if isinstance(g, tf.Tensor)]
    sums = [t if isinstance(g, tf.Tensor) else _add_rows(t, g, weight) for t, g in pairs]

    def summed(function):
        # Of inputs of unknown length, TensorFlow may not know the shape of a gradient.
        return [
            tf.ensure_shape(function(total, tf.cast(gradient, total.dtype)), total.shape)
            for total, gradient in (pairs[i] for i in dense)
        ]

    def weighted():
        return summed(lambda total, gradient: total + tf.cast(weight, total.dtype) * gradient)

    if are_alike is None or not dense:
        results = weighted()
    else:
        results = tf.switch_case(
            tf.where(are_alike, tf.where(is_first, 0, 1), 2),
            [lambda: summed(lambda _, gradient: gradient), lambda: summed(tf.add), weighted],
        )
    for i, result in zip(dense, results, strict=True):
        sums[i] = result
    return sums


def _add_rows(total, gradient, weight):
    """The accumulator with the weighted rows of a gradient, which may be None."""
    if gradient is None:
        return total
    if isinstance(total, dict):
        k, values = total["count"], total["values"]
        row = tf.cast(weight, values.dtype) * tf.cast(gradient.values, values.dtype)
        return {
            "count": k + 1,
            "indices": total["indices"].write(k, tf.cast(gradient.indices, tf.int64)),
            "values": values.write(k, row),
        }
    rows = tf.cast(weight, total.dtype) * tf.cast(gradient.values, total.dtype)
    return tf.tensor_scatter_nd_add(total, gradient.indices[:, tf.newaxis], rows)


def result(total, variable):
    """The gradient that was added up: a tensor or `tf.IndexedSlices`."""
    if not isinstance(total, dict):
        return total
    if tf.executing_eagerly() and total["count"] == 0:
        # There, TensorFlow cannot concatenate no arrays.
        total = _add_rows(total, _no_rows(variable, total["values"].dtype), 1)
    return tf.IndexedSlices(
        total["values"].concat(),
        total["indices"].concat(),
        tf.constant(variable.shape.as_list(), tf.int64),
    )


def _no_rows(variable, dtype):
    return tf.IndexedSlices(tf.zeros([0, *variable.shape[1:]], dtype), tf.zeros([0], tf.int64))


def values(gradient):
    """The values of a gradient, dense or of rows."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def map_values(function, gradient):
    """A gradient with `function` of its values; None for None."""
    if not isinstance(gradient, tf.IndexedSlices):
        return None if gradient is None else function(gradient)
    return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)


def squared_norm(gradient, factor, compiled):
    """The sum of the squares of `factor * gradient`, float32 or wider.

    Args:
        gradient: tensor or `tf.IndexedSlices`, whose rows may be of the same index.
        factor: float scalar.
        compiled: whether XLA compiles it.
    """
    dtype = dtype_for(gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        values, indices, size = gradient.values, gradient.indices, gradient.dense_shape[0]
        if not compiled:
            # As many rows as there are different ones; XLA must know how many.
            unique, indices = tf.unique(indices)
            size = tf.size(unique)
        gradient = tf.math.unsorted_segment_sum(tf.cast(values, dtype), indices, size)
    return tf.reduce_sum(tf.square(tf.cast(gradient, dtype) * tf.cast(factor, dtype)))
