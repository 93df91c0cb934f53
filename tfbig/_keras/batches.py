"""Keras measures and cuts dense batches only; these functions take ragged, sparse and None too."""

import keras
import tensorflow as tf

from tfbig import _types
from tfbig._keras import graph_errors
from tfbig._keras.independence import run_independently


def batch_size(data: _types.Structure) -> int | _types.Tensor:
    """Number of samples of a (nested) batch: an int if static, else a tensor."""
    first = next(v for v in keras.tree.flatten(data) if v is not None)
    if isinstance(first, tf.SparseTensor):
        return (
            first.shape[0]
            if first.shape[0] is not None
            else tf.cast(first.dense_shape[0], tf.int32)
        )
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def of_one_size(data: _types.Structure) -> _types.Structure:
    """The (nested) batch, refused unless all parts hold as many samples.

    A part that holds more would be cut like the others, and what is left of it would be lost.
    """
    parts = [v for v in keras.tree.flatten(data) if v is not None]
    has_scalar = any(v.shape == () for v in parts)
    sizes = [0 if v.shape == () else batch_size(v) for v in parts]
    if tf.executing_eagerly():
        sizes = [int(s) for s in sizes]
    known = [s for s in sizes if isinstance(s, int)]
    if len(set(known)) > 1 or has_scalar:
        raise graph_errors.sizes_differ([s if isinstance(s, int) else "?" for s in sizes])
    if len(known) == len(sizes):
        return data
    numbers = tf.stack(sizes)
    is_one = tf.reduce_all(tf.equal(numbers, numbers[0]))
    assertion = tf.raw_ops.Assert(
        condition=is_one, data=[graph_errors.SIZES_DIFFER, numbers], summarize=len(sizes)
    )
    # That of a replica would wait for what the replicas before it do.
    run_independently(assertion)
    # Without the dependency, the update could run before the assertion fails.
    with tf.control_dependencies([assertion]):
        return tf.nest.map_structure(
            lambda v: v if v is None else tf.identity(v), data, expand_composites=True
        )


def slice_samples(
    data: _types.Structure, begin: int | _types.Tensor, size: int | _types.Tensor
) -> _types.Structure:
    """The `size` samples of a (nested) batch that start at index `begin`."""

    def part(value: _types.Structure) -> _types.Structure:
        if value is None:
            return None
        if isinstance(value, tf.RaggedTensor):
            return value[begin : begin + size]
        if isinstance(value, tf.SparseTensor):
            shape = tf.cast(value.dense_shape, tf.int64)
            begin_, size_ = (tf.reshape(tf.cast(x, tf.int64), [1]) for x in (begin, size))
            return tf.sparse.slice(
                value,
                tf.concat([begin_, tf.zeros_like(shape[1:])], 0),
                tf.concat([size_, shape[1:]], 0),
            )
        # tf.slice with explicit sizes: XLA needs them as constants.
        inner = tf.shape(value)[1:]
        sliced = tf.slice(
            value,
            tf.concat([[begin], tf.zeros_like(inner)], 0),
            tf.concat([[size], inner], 0),
        )
        static_size = size if isinstance(size, int) else None
        return tf.ensure_shape(sliced, [static_size, *value.shape[1:]])

    return keras.tree.map_structure(part, data)


def as_tensor(value: _types.Structure) -> _types.Structure:
    """A leaf of a batch as a tensor; ragged and sparse tensors and None stay as they are."""
    is_kept = value is None or isinstance(value, tf.RaggedTensor | tf.SparseTensor)
    return value if is_kept else tf.convert_to_tensor(value)


def spec_of_any_size(value: _types.Structure) -> _types.Structure:
    """The specification of a leaf of a batch, for any number of samples."""
    if value is None:
        return None
    shape = [None, *value.shape[1:]]
    if isinstance(value, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, value.dtype, value.ragged_rank, value.row_splits.dtype)
    if isinstance(value, tf.SparseTensor):
        return tf.SparseTensorSpec(shape, value.dtype)
    return tf.TensorSpec(shape, value.dtype)


def without_optionals(data: _types.Structure) -> _types.Structure:
    """The batch with None again where Keras has put a `tf.experimental.Optional` for it."""
    return keras.tree.map_structure(
        lambda v: None if isinstance(v, tf.experimental.Optional) else v, data
    )


def specs_of_one_replica(dataset: _types.Dataset) -> _types.Structure:
    """The specification of one replica's part of a batch; None for an optional input."""

    def spec(s: tf.TypeSpec) -> tf.TypeSpec | None:
        # A PerReplicaSpec holds one spec per replica.
        parts = getattr(s, "_value_specs", None)
        s = parts[0] if parts else s
        # The stand-in for None has no shape.
        return s if hasattr(s, "shape") and not isinstance(s, tf.OptionalSpec) else None

    return tf.nest.map_structure(spec, dataset.element_spec)


def is_distributed(data: _types.Structure) -> bool:
    """Whether a batch is a `tf.distribute` value that already holds each replica's part."""
    return any(isinstance(v, tf.distribute.DistributedValues) for v in tf.nest.flatten(data))
