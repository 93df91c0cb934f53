"""TensorFlow writes into NumPy arrays that Python code hands it; here it gets copies of them.

The tensor that a generator or a `tf.numpy_function` returns is the memory of the NumPy array.
TensorFlow writes into no such tensor, but does into a part of it, such as a replica's share of a
batch, as soon as nothing else needs it: arrays of the user would change, and training on them.
"""

import functools

import tensorflow as tf
from keras.src.trainers.data_adapters import (
    GeneratorDataAdapter,
    PyDatasetAdapter,
    TFDatasetAdapter,
)
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from tfbig import _types
from tfbig._keras import datasets
from tfbig._keras.thread import current

__all__ = ("without_arrays",)

# Text is copied anyway; TensorFlow copies tensors of no other dtypes.
_DTYPES = frozenset(
    tf.as_dtype(name)
    for name in (
        *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    )
)


def without_arrays(dataset: _types.Dataset) -> _types.Dataset:
    """A dataset whose elements are copies, if they may be memory of NumPy arrays."""
    if not isinstance(dataset, tf.data.Dataset) or not datasets.hands_on_arrays(dataset):
        return dataset
    is_tuple = isinstance(dataset.element_spec, tuple)

    def copied(*parts: _types.Structure) -> _types.Structure:
        element = tf.nest.pack_sequence_as(
            dataset.element_spec, tf.nest.flatten(parts if is_tuple else parts[0])
        )
        return tf.nest.map_structure(_copy, element, expand_composites=True)

    return dataset.map(copied)


def _copy(value: _types.Tensor) -> _types.Tensor:
    is_copied = isinstance(value, tf.Tensor) and value.dtype in _DTYPES
    return tf.raw_ops.DeepCopy(x=value) if is_copied else value


def _hand_on_no_arrays(adapter_class: type[DataAdapter]) -> None:
    """Has the datasets of an adapter class of Keras hand on no memory of NumPy arrays.

    While tfbig's `fit`, `evaluate` or `predict` runs.
    """
    get_tf_dataset = adapter_class.get_tf_dataset

    @functools.wraps(get_tf_dataset)
    def get_copying_dataset(self: DataAdapter) -> _types.Dataset:
        dataset = get_tf_dataset(self)
        return without_arrays(dataset) if current("releases_iterators") else dataset

    adapter_class.get_tf_dataset = get_copying_dataset


for _adapter_class in (GeneratorDataAdapter, PyDatasetAdapter, TFDatasetAdapter):
    _hand_on_no_arrays(_adapter_class)
