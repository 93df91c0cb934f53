"""Keras builds models for dense inputs only; here ragged and sparse inputs work too."""

from collections.abc import Callable

import keras
import tensorflow as tf
from keras.src import backend

from tfbig import _types
from tfbig._keras.batches import spec_of_any_size
from tfbig._keras.optimizer import temporary_optimizer


def build_for(model: keras.Model, specs: _types.Structure) -> None:
    """Builds a model, its losses and its metrics for batches of these specifications."""
    if any(_is_composite(spec) for spec in keras.tree.flatten(specs)):
        _build_by_call(model, specs)
    model._symbolic_build(data_batch=specs)


def build_if_possible(model: keras.Model, specs: _types.Structure) -> None:
    """Builds a model, its losses and its metrics, unless only its step knows for which data.

    A step of the user's own may pass on other data than it is given; see `build_in_step`.
    """
    unbuilt = [x for x in _compiled(model) if not x.built]
    _keep_specs(model, specs if unbuilt else None)
    try:
        build_for(model, specs)
    except Exception:  # Whatever layers and metrics raise for data that are not for them.
        _forget(unbuilt)


def build_in_step(model: keras.Model, data: _types.Structure) -> None:
    """Builds in a step, for the data that it computes with, what is not built for them.

    Keras builds losses and metrics for the first data that they see: what "accuracy" is depends on
    the shapes.
    """
    specs = keras.tree.map_structure(spec_of_any_size, data)
    found = model.specs_built_for
    _keep_specs(model, None)
    if found is not None and not _are_alike(found, specs):
        _forget(_compiled(model))

    def build() -> None:
        with temporary_optimizer(model, None):
            build_for(model, specs)

    if not model.built or not all(x.built for x in _compiled(model)):
        create_in_step(build)


def create_in_step(create: Callable[[], None]) -> None:
    """Calls, in replica context, a function that creates variables; once for all replicas."""

    def run(strategy: _types.Strategy) -> None:
        with tf.init_scope(), strategy.scope():
            create()

    tf.distribute.get_replica_context().merge_call(run)


def _keep_specs(model: keras.Model, specs: _types.Structure) -> None:
    # Past Keras, which would put structures of its own in place of lists and dictionaries.
    object.__setattr__(model, "specs_built_for", specs)


def _compiled(model: keras.Model) -> list[_types.Layer]:
    return [x for x in (model._compile_metrics, model._compile_loss) if x is not None]


def _forget(compiled: list[_types.Layer]) -> None:
    """Has losses and metrics built anew when they are next called."""
    for part in compiled:
        part.built = False


def _are_alike(one: _types.Structure, other: _types.Structure) -> bool:
    """Whether data of two specifications have the same structure and compatible shapes."""
    try:
        keras.tree.assert_same_structure(one, other)
    except ValueError:
        return False
    pairs = zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True)
    return all(
        a is b is None or (None not in (a, b) and a.shape.is_compatible_with(b.shape))
        for a, b in pairs
    )


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
