"""Keras builds models for dense inputs only; here ragged and sparse inputs work too."""

import keras
import tensorflow as tf
from keras.src import backend

from tfbig import _types


def build_for(model: keras.Model, specs: _types.Structure) -> None:
    """Builds a model, its losses and its metrics for batches of these specifications."""
    if any(_is_composite(spec) for spec in keras.tree.flatten(specs)):
        _build_by_call(model, specs)
    model._symbolic_build(data_batch=specs)


def _build_by_call(model: keras.Model, specs: _types.Structure) -> None:
    """Builds a model for ragged or sparse inputs by tracing a call.

    Keras would build it for dense ones of the same shape, on which `to_tensor()` and the like
    fail.
    """

    def call() -> None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            keras.tree.map_structure(_placeholder, specs)
        )
        y_pred = model(x, training=False)
        if model._compile_metrics is not None:
            model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        if model._compile_loss is not None:
            model._compute_loss(x, y, y_pred, sample_weight, training=False)

    layers = [*model._flatten_layers(), model._compile_metrics, model._compile_loss]
    if not all(layer is None or layer.built for layer in layers):
        backend.compute_output_spec(call)


def _is_composite(spec: tf.TypeSpec | None) -> bool:
    return isinstance(spec, tf.RaggedTensorSpec | tf.SparseTensorSpec)


def _placeholder(spec: tf.TypeSpec | None) -> _types.Structure:
    if isinstance(spec, tf.RaggedTensorSpec):
        inner = spec.shape[spec.ragged_rank + 1 :]
        return tf.compat.v1.ragged.placeholder(spec.dtype, spec.ragged_rank, inner)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.compat.v1.sparse_placeholder(spec.dtype, spec.shape)
    return spec if spec is None else tf.compat.v1.placeholder(spec.dtype, spec.shape)
