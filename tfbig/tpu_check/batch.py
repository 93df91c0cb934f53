"""What one core is given of a batch: shapes and dtypes."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, errors
from tfbig.tpu_check.checks import DynamicShapeError

__all__ = ("Batch",)


@dataclasses.dataclass(frozen=True)
class Batch:
    """An effective batch: shapes and dtypes, without values.

    Attributes:
        specs: `(x, y)` or `(x, y, sample_weight)`, structures of `tf.TensorSpec`, whose first
            dimension is the batch's.
        is_assumed: bool, whether they are taken from the model, which does not know its targets.
        sample: `(x, y)` or `(x, y, sample_weight)`, structures of arrays, or None.
    """

    specs: tuple
    is_assumed: bool
    sample: tuple | None = None

    @classmethod
    def of_sample(cls, sample, size):
        """As a sample of the data says.

        Args:
            sample: structure of arrays or tensors `(samples, ...)`, of any number of samples.
            size: int, samples of an update, over all cores.

        Raises:
            InvalidOptionError: If it is something else.
        """

        def spec(value):
            if value is None:
                return None
            value = tf.convert_to_tensor(value)
            return tf.TensorSpec([size, *value.shape[1:]], value.dtype)

        _check_sample(sample)
        return cls(keras.tree.map_structure(spec, sample), is_assumed=False, sample=sample)

    @classmethod
    def of_model(cls, model, size):
        """As the inputs, outputs and losses of a functional or sequential model say.

        Raises:
            InvalidOptionError: If they do not tell.
            DynamicShapeError: If a dimension besides the batch's is not fixed.
        """
        try:
            inputs, outputs = list(model.inputs), list(model.outputs)
        except (AttributeError, ValueError, TypeError):
            inputs = outputs = []
        sparse = _are_sparse(model.loss, outputs)
        if not inputs or sparse is None:
            raise errors.InvalidOptionError(
                "What the model is trained on cannot be told from its inputs and losses. Have "
                "build() return a pair of the model and a sample of the data: model, (x, y)."
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

    def share(self, cores):
        """Specifications of what each of `cores` is given.

        Raises:
            InvalidOptionError: If the batch does not divide by the cores.
        """

        def part(spec):
            if spec is None:
                return None
            size = spec.shape[0]
            if size % cores:
                # The multiples next to it; below the first there is none.
                near = sorted({max(size // cores, 1) * cores, -(-size // cores) * cores})
                raise errors.InvalidOptionError(
                    f"A batch must divide by the cores, of which there are {cores}. Received: "
                    f"batch_size={size}. Use {' or '.join(map(str, near))}."
                )
            return tf.TensorSpec([size // cores, *spec.shape[1:]], spec.dtype)

        return keras.tree.map_structure(part, self.specs)

    def weighted(self):
        """The same with a weight for each sample; None if it has one, or not one target."""
        parts = dict(zip(("x", "y", "sample_weight"), self.specs, strict=False))
        if parts.get("sample_weight") is not None or not isinstance(parts.get("y"), tf.TensorSpec):
            return None
        size, *rest = parts["y"].shape
        # Keras takes it for each position of a sample, too.
        weight = tf.TensorSpec([size, 1] if rest else [size], tf.float32)
        return dataclasses.replace(self, specs=(parts["x"], parts["y"], weight), sample=None)

    def values(self, seed=0):
        """A batch: rows of the sample; random, where there is none or all its rows are the same.

        Returns:
            Structure of arrays, as `specs`.
        """
        random = np.random.default_rng(seed)
        rows = random.random(_flat(self.specs)[0].shape[0])

        def drawn(spec, sample):
            if spec is None:
                return None
            sample = None if sample is None else np.asarray(sample)
            if sample is not None and len(sample) and (sample != sample[:1]).any():
                # What belongs together is drawn together.
                return sample[(rows * len(sample)).astype(int)]
            if spec.dtype.is_floating:
                return random.normal(size=spec.shape).astype(spec.dtype.as_numpy_dtype)
            # Small enough for an index, of whatever.
            return random.integers(2, size=spec.shape).astype(spec.dtype.as_numpy_dtype)

        sample = self.sample
        if sample is None:
            sample = keras.tree.map_structure(lambda spec: None, self.specs)
        flat = [drawn(*pair) for pair in zip(_flat(self.specs), _flat(sample), strict=True)]
        return keras.tree.pack_sequence_as(self.specs, flat)

    def __str__(self):
        names = ("x", "y", "sample_weight")
        parts = zip(names, self.specs, strict=False)
        return ", ".join(
            f"{name} {spec.dtype.name} {tuple(spec.shape)}"
            for name, part in parts
            for spec in keras.tree.flatten(part)
            if spec is not None
        )


def _check_sample(sample):
    is_tuple = isinstance(sample, tuple) and 1 <= len(sample) <= 3
    shapes = [np.shape(v) for v in _flat(sample) if v is not None] if is_tuple else []
    if not is_tuple or not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        received = (
            f"arrays of the shapes {', '.join(map(str, shapes))}"
            if is_tuple
            else type(sample).__name__
        )
        raise errors.InvalidOptionError(
            "A sample of the data must be a tuple of x, y and perhaps sample_weight, of arrays "
            f"with a row for each sample. Received: {received}. Return model, (x, y)."
        )


def _flat(structure):
    return keras.tree.flatten(structure)


def _are_sparse(loss, outputs):
    """For each output whether its targets are indices of classes; None if that is not told."""
    losses = loss if isinstance(loss, list | tuple) else [loss] * len(outputs)
    if isinstance(loss, dict) or len(losses) != len(outputs) or None in losses:
        return None
    names = [x if isinstance(x, str) else getattr(x, "__name__", type(x).__name__) for x in losses]
    return [name.lower().startswith("sparse") for name in names]


def _spec(tensor, shape, dtype, size):
    if None in shape:
        raise DynamicShapeError(
            "Every shape of a TPU's program must be fixed, save that the batch's size is given. "
            f"Received: {tensor.name!r} of shape {tuple(tensor.shape)}. Fix it in keras.Input, or "
            "have build() return a sample of the data too: model, (x, y)."
        )
    return tf.TensorSpec([size, *shape], dtype)
