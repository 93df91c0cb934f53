"""Prediction with layers on stages: micro-batches follow one another through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import keras
import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import micro_batch_loop
from tfbig._update.batch_split import BatchSplit

__all__ = ("predict",)

# A function of a batch that returns outputs for its samples.
_Predict: TypeAlias = Callable[[_types.Structure], _types.Structure]


def predict(
    step: _Predict, data: _types.Structure, split: BatchSplit, in_flight: int
) -> _types.Structure:
    """The outputs for a batch, computed in micro-batches of which several run at the same time.

    Whole, where micro-batches cannot be put together: if an output is no tensor of samples, or if
    the forward pass assigns a variable.

    Args:
        step: what predicts.
        data: structure of tensors `(samples, ...)`, on this replica.
        split: how it is split.
        in_flight: the most micro-batches that run at the same time.
    """
    if tf.executing_eagerly():
        return step(data)
    specs = _specs_of_outputs(step, data)
    if specs is None:
        return step(data)

    def write(
        micro_batch: _types.Structure, size: _types.Tensor, carry: _types.Structure
    ) -> _types.Structure:
        del size
        k, arrays = carry
        leaves = keras.tree.flatten(step(micro_batch))
        return k + 1, [a.write(k, leaf) for a, leaf in zip(arrays, leaves, strict=True)]

    arrays = [
        tf.TensorArray(
            spec.dtype, size=0, dynamic_size=True, element_shape=spec.shape, infer_shape=False
        )
        for spec in keras.tree.flatten(specs)
    ]
    start = (tf.constant(0), arrays)
    _, arrays = micro_batch_loop.fold(split, data, write, start, in_flight=in_flight)
    return keras.tree.pack_sequence_as(specs, [a.concat() for a in arrays])


def _specs_of_outputs(step: _Predict, data: _types.Structure) -> _types.Structure | None:
    """Specifications of the outputs for any number of samples; None if it cannot be split."""
    two, three = (_outputs_of(step, data, samples) for samples in (2, 3))
    if two is None or three is None:
        return None
    pairs = zip(keras.tree.flatten(two), keras.tree.flatten(three), strict=True)
    for of_two, of_three in pairs:
        # Each output has a row for each sample, and no other dimension depends on their number.
        if of_two.shape[0] != 2 or of_three.shape[0] != 3:
            return None
        if None in of_two.shape or of_two.shape[1:] != of_three.shape[1:]:
            return None
    return keras.tree.map_structure(lambda t: _spec_of_samples(t, None), two)


def _outputs_of(step: _Predict, data: _types.Structure, samples: int) -> _types.Structure | None:
    """Symbolic outputs for so many samples; None if not all are tensors, or something is assigned.

    Nothing runs.
    """
    found: list[_types.Structure] = []

    def trace(data: _types.Structure) -> None:
        with _keras.variables.VariableValues() as values:
            outputs = step(data)
        leaves = keras.tree.flatten(outputs)
        if not values.assigned and all(isinstance(x, tf.Tensor) and x.shape.rank for x in leaves):
            found.append(outputs)

    specs = keras.tree.map_structure(lambda value: _spec_of_samples(value, samples), data)
    tf.function(trace, autograph=False).get_concrete_function(specs)
    return found[0] if found else None


def _spec_of_samples(value: object, samples: int | None) -> tf.TypeSpec | None:
    if isinstance(value, tf.Tensor):
        return tf.TensorSpec([samples, *value.shape[1:]], value.dtype)
    return None if value is None else tf.type_spec_from_value(value)
