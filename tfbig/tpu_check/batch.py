"""Shapes, dtypes and values of an effective batch, and of what one core gets of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig.tpu_check._types import Array
from tfbig.tpu_check.checks import DynamicShapeError

__all__ = ("Batch",)

_PARTS = ("x", "y", "sample_weight")


@dataclasses.dataclass(frozen=True)
class Batch:
    """An effective batch: shapes and dtypes, without values.

    Attributes:
        specs: `(x, y)` or `(x, y, sample_weight)`, structures of `tf.TensorSpec`, whose first
            dimension is the batch's.
        is_assumed: Whether the model implied them, although it does not know its targets.
        sample: `(x, y)` or `(x, y, sample_weight)`, structures of arrays, or None.
    """

    specs: tuple[_types.Structure, ...]
    is_assumed: bool
    sample: tuple[_types.Structure, ...] | None = None

    @classmethod
    def of_sample(cls, sample: tuple[_types.Structure, ...], size: int) -> "Batch":
        """Makes a batch that looks like a sample of the data.

        Args:
            sample: Structure of arrays or tensors of shape `(samples, ...)`, with any number of
                samples.
            size: Samples in an update, over all cores.

        Raises:
            InvalidOptionError: If the sample is anything else.
        """

        def spec(value: _types.Tensor | None) -> tf.TensorSpec | None:
            if value is None:
                return None
            return tf.TensorSpec([size, *value.shape[1:]], value.dtype)

        sample = _checked_sample(sample)
        return cls(keras.tree.map_structure(spec, sample), is_assumed=False, sample=sample)

    @classmethod
    def of_model(cls, model: keras.Model, size: int) -> "Batch":
        """Makes a batch that fits a functional or sequential model's inputs, outputs and losses.

        Args:
            model: A compiled model.
            size: Samples in an update, over all cores.

        Raises:
            InvalidOptionError: If the model does not imply one.
            DynamicShapeError: If a dimension other than the batch's is not fixed.
        """
        try:
            inputs, outputs = list(model.inputs), list(model.outputs)
        except (AttributeError, ValueError, TypeError):
            inputs = outputs = []
        sparse = _are_sparse(model.loss, outputs)
        if not inputs or sparse is None:
            raise errors.InvalidOptionError(
                "The model's inputs, outputs and losses must determine its training data. "
                f"Received: {type(model).__name__} {model.name!r}, whose do not. Have build() "
                "return a pair of the model and a sample of the data: model, (x, y)."
            )
        x = _keras.layers.as_inputs(model, [_spec(i, i.shape[1:], i.dtype, size) for i in inputs])
        y = [
            _spec(o, o.shape[1:-1], "int32", size)
            if is_sparse
            else _spec(o, o.shape[1:], keras.config.floatx(), size)
            for o, is_sparse in zip(outputs, sparse, strict=True)
        ]
        pair = tuple(p[0] if isinstance(p, list) and len(p) == 1 else p for p in (x, y))
        return cls(pair, is_assumed=True)

    def share(self, cores: int) -> _types.Structure:
        """Returns the `tf.TensorSpec` of what each of `cores` gets, structured as `specs`.

        Raises:
            InvalidOptionError: If the cores do not divide the batch.
        """

        def part(spec: tf.TensorSpec | None) -> tf.TensorSpec | None:
            if spec is None:
                return None
            size = spec.shape[0]
            if size % cores:
                # The multiples around it; there is none below the first.
                near = sorted({max(size // cores, 1) * cores, -(-size // cores) * cores})
                raise errors.InvalidOptionError(
                    f"The batch size must be a multiple of the number of cores, {cores}. Received: "
                    f"batch_size={size}. Use {' or '.join(map(str, near))}."
                )
            return tf.TensorSpec([size // cores, *spec.shape[1:]], spec.dtype)

        return keras.tree.map_structure(part, self.specs)

    def weighted(self) -> "Batch | None":
        """Returns the batch with a weight per sample.

        None if it has weights already, or does not have exactly one target.
        """
        parts = dict(zip(_PARTS, self.specs, strict=False))
        if parts.get("sample_weight") is not None or not isinstance(parts.get("y"), tf.TensorSpec):
            return None
        size, *rest = parts["y"].shape
        # Keras broadcasts it if the loss has one value per position of a sample.
        weight = tf.TensorSpec([size, 1] if rest else [size], tf.float32)
        return dataclasses.replace(self, specs=(parts["x"], parts["y"], weight), sample=None)

    def values(self, seed: int = 0) -> tuple[_types.Structure, ...]:
        """Draws a batch: rows of the sample, or random values without a sample.

        Where all rows of the sample are the same, it only gives shapes and dtypes.

        Args:
            seed: Seed of the draw.

        Returns:
            Structure of arrays, like `specs`.
        """
        random = np.random.default_rng(seed)
        rows: Array = random.random(size=(_flat(self.specs)[0].shape[0],))

        # `Any`: an array, a tensor or a list.
        def drawn(spec: tf.TensorSpec | None, sample: Any) -> Array | None:
            if spec is None:
                return None
            sample = None if sample is None else np.asarray(sample)
            if sample is not None and len(sample) and (sample != sample[:1]).any():
                # The same rows of all parts, which belong together.
                values: Array = sample[(rows * len(sample)).astype(int)]
            elif spec.dtype.is_floating:
                values = random.normal(size=spec.shape).astype(spec.dtype.as_numpy_dtype)
            else:
                # Small enough for any index.
                values = random.integers(2, size=spec.shape).astype(spec.dtype.as_numpy_dtype)
            return values

        sample = self.sample
        if sample is None:
            sample = keras.tree.map_structure(lambda spec: None, self.specs)
        flat = [drawn(*pair) for pair in zip(_flat(self.specs), _flat(sample), strict=True)]
        values: tuple[_types.Structure, ...] = keras.tree.pack_sequence_as(self.specs, flat)
        return values

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {spec.dtype.name} {tuple(spec.shape)}"
            for name, part in zip(_PARTS, self.specs, strict=False)
            for spec in _flat(part)
            if spec is not None
        )


def _checked_sample(sample: Any) -> tuple[_types.Structure, ...]:  # `Any`: the user's.
    """The sample as tensors."""
    if not isinstance(sample, tuple) or not 1 <= len(sample) <= 3:
        raise _not_a_sample(type(sample).__name__)
    tensors: tuple[_types.Structure, ...] = keras.tree.map_structure(_tensor, sample)
    shapes = [tuple(t.shape) for t in _flat(tensors) if t is not None]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        raise _not_a_sample(f"arrays of shapes {', '.join(map(str, shapes))}")
    return tensors


def _tensor(value: Any) -> _types.Tensor | None:  # `Any`: whatever TensorFlow converts.
    try:
        return None if value is None else tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        name = getattr(getattr(value, "dtype", type(value)), "name", type(value).__name__)
        raise _not_a_sample(f"{name}, which is no tensor") from error


def _not_a_sample(received: str) -> errors.InvalidOptionError:
    return errors.InvalidOptionError(
        "A sample of the data must be a tuple of x, y and optionally sample_weight: arrays "
        f"with one row per sample. Received: {received}. Return model, (x, y)."
    )


def _flat(structure: _types.Structure) -> list[Any]:
    """Returns the leaves of a structure, which are `Any` as the structure is."""
    leaves: list[Any] = keras.tree.flatten(structure)
    return leaves


# `Any`: `compile` takes a name, a function, a loss, or a list or dictionary of these.
def _are_sparse(loss: Any, outputs: Sequence[keras.KerasTensor]) -> list[bool] | None:
    """Returns whether the targets of each output are class indices; None if that is unknown."""
    losses = loss if isinstance(loss, list | tuple) else [loss] * len(outputs)
    if isinstance(loss, dict) or len(losses) != len(outputs) or None in losses:
        return None
    names = [x if isinstance(x, str) else getattr(x, "__name__", type(x).__name__) for x in losses]
    return [name.lower().startswith("sparse") for name in names]


def _spec(
    tensor: keras.KerasTensor, shape: Sequence[int | None], dtype: str, size: int
) -> tf.TensorSpec:
    if None in shape:
        raise DynamicShapeError(
            "Every shape in a TPU program must be fixed, except for the batch size, which is "
            f"given. Received: {tensor.name!r} of shape {tuple(tensor.shape)}. Fix it in "
            "keras.Input, or have build() also return a sample of the data: model, (x, y)."
        )
    return tf.TensorSpec([size, *shape], dtype)
