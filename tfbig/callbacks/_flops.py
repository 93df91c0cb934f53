"""Tokens, floating-point operations, and the share of what the devices could compute at most."""

from __future__ import annotations

import math
import weakref

import keras
import tensorflow as tf

from tfbig import _keras, _numbers, _types, errors
from tfbig.callbacks import _peak_flops
from tfbig.callbacks._monitor_file import Row

__all__ = ("Rates", "check")

# The backward pass has two products for each of the forward pass: by the inputs and by the weights.
_PASSES = 3

# Of each model, by what it depends on: the work of a forward pass, and of what is recomputed.
_COUNTED: weakref.WeakKeyDictionary[keras.Model, dict[str, tuple[float, float]]] = (
    weakref.WeakKeyDictionary()
)


def check(name: str, value: object) -> float | None:
    """Returns an argument that must be a positive number or None, checked."""
    if value is None:
        return None
    number = _numbers.as_number(value)
    if number is None or not 0 < number < math.inf:
        meaning = {
            "tokens": "tokens of a sample",
            "peak_flops": "floating-point operations that a device makes in a second at most",
        }
        raise errors.InvalidOptionError(
            f"`{name}` must be a positive number, {meaning[name]}, or None. Received: "
            f"{name}={value!r}."
        )
    return number


class Rates:
    """What training costs and gets, made of samples per second.

    Args:
        model: the model, whose `fit` begins.
        tokens: tokens of a sample; None to count them.
        peak_flops: operations per second of a device at most; None for what is known of it.

    Attributes:
        tokens: tokens of a sample; None if unknown.
        flops: floating-point operations that training needs for a sample; None if unknown.
        hardware_flops: those that are made, recomputation too; None if unknown.
    """

    def __init__(self, model: keras.Model, tokens: float | None, peak_flops: float | None) -> None:
        specs = _keras.epoch_iterator.specs_of(_keras.epoch_iterator.of_fit(model))
        x, _, _ = keras.utils.unpack_x_y_sample_weight(specs)
        self.tokens = tokens or _tokens(model, x)
        self.flops, self.hardware_flops = _flops(model, x)
        peak = peak_flops or _peak_flops.of_model(model)
        stages = 1 if model.pipeline is None else len(model.pipeline.devices)
        devices = model.distribute_strategy.num_replicas_in_sync * stages
        self._peak = None if peak is None else peak * devices

    def row(self, samples_per_second: float | None) -> Row:
        """Columns that are known for this model; their values may be None in a row."""
        found: Row = {}
        if self.tokens is not None:
            found["tokens_per_second"] = _product(samples_per_second, self.tokens)
        if self.flops is not None:
            found["flops_per_sample"] = self.flops
        if self.flops is not None and self._peak is not None:
            found["mfu"] = _product(samples_per_second, self.flops / self._peak)
            if self.hardware_flops != self.flops and self.hardware_flops is not None:
                found["hfu"] = _product(samples_per_second, self.hardware_flops / self._peak)
        return found


def _product(rate: float | None, factor: float) -> float | None:
    return None if rate is None else rate * factor


def _tokens(model: keras.Model, x: _types.Structure) -> float | None:
    """The length of the first input of integers `(batch, length)`, of a model with embeddings."""
    if not any(isinstance(layer, keras.layers.Embedding) for layer in model._flatten_layers()):
        return None
    for spec in keras.tree.flatten(x):
        if isinstance(spec, tf.TensorSpec) and spec.dtype.is_integer and spec.shape.rank == 2:
            length = spec.shape[1]
            return None if length is None else float(length)
    return None


def _flops(model: keras.Model, x: _types.Structure) -> tuple[float | None, float | None]:
    """`flops` and `hardware_flops` of `Rates`."""
    leaves = keras.tree.flatten(x)
    if not all(isinstance(spec, tf.TensorSpec) and spec.shape.rank for spec in leaves):
        return None, None
    # Of a sequence of any length, the work is not known.
    if any(None in spec.shape[1:] for spec in leaves):
        return None, None
    one = keras.tree.map_structure(lambda s: tf.TensorSpec([1, *s.shape[1:]], s.dtype), x)
    layers = model._recomputed_layers()
    key = f"{one} {sorted(map(id, layers))}"
    known = _COUNTED.setdefault(model, {})
    if key not in known:
        try:
            with model.distribute_strategy.scope():
                known[key] = _keras.work.products_of_forward_pass(model, one, layers)
        except Exception:  # A `call` of the user's may take other arguments than the data.
            known[key] = 0.0, 0.0
    forward, recomputed = known[key]
    if not forward:
        return None, None
    return _PASSES * forward, _PASSES * forward + recomputed
