"""Compares an update by all cores with an update of the whole batch in plain Keras."""

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Protocol

import keras
import numpy as np

from tfbig import _keras, _types, errors
from tfbig._update import step_options, train_step
from tfbig.loss_scaling import DynamicLossScale
from tfbig.tpu_check import numbers
from tfbig.tpu_check._types import Array
from tfbig.tpu_check.batch import Batch
from tfbig.tpu_check.numbers import Difference, Update

__all__ = ("Build", "Comparison", "Run", "compare", "make_exact")


# Small enough that float16 does not overflow, and not 1, which would hide a missing scale.
_FLOAT16_LOSS_SCALE = 16.0

# Names that Keras's layers give to the fraction that they drop, and to the noise that they add.
_RATES = ("rate", "dropout", "recurrent_dropout", "stddev")


class Build(Protocol):
    """Makes an exact model and its batch under a strategy; without one, a plain model."""

    def __call__(self, strategy: _types.Strategy | None) -> tuple[keras.Model, Batch]: ...


class Run(Protocol):
    """Updates a model from the same state with each of several values of its batch."""

    def __call__(
        self, model: keras.Model, batch: Batch, *values: tuple[_types.Structure, ...]
    ) -> list[Update]: ...


def make_exact(model: keras.Model, strategy: _types.Strategy | None) -> keras.Model:
    """Turns off whatever depends on how a batch is split, and Adam, which hides a wrong scale.

    The model gets SGD. Dropout drops nothing, noise layers add nothing, and BatchNormalization
    normalizes with its moving statistics.

    Args:
        model: A compiled model, which is changed.
        strategy: The strategy of the model, or None.

    Returns:
        The model.
    """
    for layer in _keras.layers.all_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
        elif _keras.layers.draws_random_numbers(layer):
            for name in _rates(layer):
                setattr(layer, name, 0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model.optimizer = keras.optimizers.SGD(1.0)
    return model


def _rates(layer: _types.Layer) -> list[str]:
    """Returns the names of the numbers that turn off a layer's randomness at 0."""
    # A layer may keep another layer under one of these names.
    return [name for name in _RATES if isinstance(getattr(layer, name, None), int | float)]


def _stays_random(layer: _types.Layer) -> bool:
    """Returns whether `make_exact` cannot turn off a layer's randomness."""
    return bool(_keras.layers.draws_random_numbers(layer)) and not _rates(layer)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An update by all cores beside one of the whole batch, and one with NaN on one core.

    Attributes:
        differences: How far each weight is off, the largest difference first.
        tolerance: Differences up to this count as rounding.
        apart: Variables that are not the same on all cores.
        random: Layers that may draw random numbers and have no switch to turn them off.
        skipped: What is wrong with two updates under dynamic loss scaling: one that should match
            an update without scaling, and one that should be skipped. None if they did not run,
            because nothing could be NaN or the model has no loss scaling.
    """

    differences: list[Difference]
    tolerance: float
    apart: list[str]
    random: list[str]
    skipped: list[str] | None

    @property
    def is_equal(self) -> bool:
        """Whether the update matches that of the whole batch, except for rounding."""
        return self.differences[0].size <= self.tolerance

    @property
    def is_wrong(self) -> bool:
        """Whether something is wrong that random numbers cannot explain."""
        return bool(self.apart or self.skipped or not (self.is_equal or self.random))

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong, and random numbers hid nothing."""
        return self.is_equal and not self.is_wrong


def compare(build: Build, strategy: _types.Strategy, cores: int, run: Run) -> Comparison:
    """Compares updates by all cores with what they should be.

    Args:
        build: Makes the model.
        strategy: A `TPUStrategy`.
        cores: Number of cores.
        run: Runs updates of all cores.
    """
    model, batch = build(strategy)
    if isinstance(model, train_step.TrainStep) and hasattr(type(model), "loss_scale"):
        model.loss_scale = None
    data = batch.values()
    expected = _expected(build, model, batch, data)
    model.optimizer.learning_rate = expected.learning_rate
    (update,) = run(model, batch, data)
    differences = numbers.differences(update, expected.after, _paths(model.weights))
    random = [
        f"{type(layer).__name__} {layer.name!r}"
        for layer in _keras.layers.all_layers(model)
        if _stays_random(layer)
    ]
    # Random numbers may cause a difference of any size.
    size = np.inf if random else differences[0].size
    return Comparison(
        differences,
        _tolerance(model),
        update.apart(_core_variables(model)),
        random,
        _check_loss_scaling(build, strategy, cores, run, data, expected, size),
    )


@dataclasses.dataclass(frozen=True)
class _Expected:
    """An update of the whole batch.

    Attributes:
        before: The weights before the update, in the order of `get_weights`.
        after: The weights after the update.
        learning_rate: The learning rate of the update.
    """

    before: list[Array]
    after: list[Array]
    learning_rate: float


def _expected(
    build: Build, model: keras.Model, batch: Batch, data: tuple[_types.Structure, ...]
) -> _Expected:
    """Updates a plain model from the weights of a model."""
    whole, _ = build(None)
    if isinstance(whole, train_step.TrainStep):
        # With these options its step is Keras's own.
        step_options.make_plain(whole)
    _keras.building.build_for(whole, batch.specs)
    with model.distribute_strategy.scope():
        _keras.building.build_for(model, batch.specs)
    whole.set_weights(model.get_weights())
    whole.optimizer.build(whole.trainable_variables)
    before = whole.get_weights()
    after = numbers.whole_update(whole, data)
    changes = [
        numbers.distance(a, b) for a, b in zip(after, before, strict=True) if numbers.is_floating(a)
    ]
    # Makes the largest change about 1, so that the rounding of weights is small beside it.
    rate = float(2.0 ** -np.round(np.log2(max(changes, default=0) or 1.0)))
    return _Expected(model.get_weights(), numbers.whole_update(whole, data, rate), rate)


def _paths(variables: Iterable[_types.KerasVariable]) -> list[str]:
    return [variable.path for variable in variables]


def _tolerance(model: keras.Model) -> float:
    dtypes = {layer.compute_dtype for layer in [model, *_keras.layers.all_layers(model)]}
    if isinstance(model, train_step.TrainStep):
        dtypes.add(model.exchange_dtype)
    return max(numbers.TOLERANCES.get(dtype, 0.0) for dtype in dtypes)


def _core_variables(model: keras.Model) -> set[str]:
    """Returns the paths of variables that each core keeps for itself: sums of metrics."""
    return {v.path for v in model.metrics_variables if not _keras.variables.is_summed(v)}


def _check_loss_scaling(
    build: Build,
    strategy: _types.Strategy,
    cores: int,
    run: Run,
    data: tuple[_types.Structure, ...],
    expected: _Expected,
    size: float,
) -> list[str] | None:
    """Returns what is wrong with two updates under dynamic loss scaling; None without any.

    One must match an update without scaling, except for rounding; the other has NaN on one core,
    and must be skipped.

    Args:
        build: Makes the model.
        strategy: A `TPUStrategy`.
        cores: Number of cores.
        run: Runs updates of all cores.
        data: Values of the batch.
        expected: The update of the whole batch.
        size: The largest difference of an update without scaling.
    """
    model, batch = build(strategy)
    if not hasattr(type(model), "loss_scale"):
        return None
    _set_loss_scaling(model, batch, expected)
    poisoned, is_certain = numbers.poisoned(data, cores)
    if poisoned is None:
        # Data without floats cannot be NaN, but sample weights can.
        weighted = batch.weighted()
        if weighted is None:
            return None
        batch = weighted
        data = (*data[:2], np.ones(batch.specs[2].shape, "float32"))
        poisoned, is_certain = numbers.poisoned(data, cores)
        assert poisoned is not None  # The weights are floats.
    try:
        update, skipped = run(model, batch, data, poisoned)
    except errors.UnsupportedModelError:
        # The model has its own `train_step`, which does not scale.
        return None
    counts = skipped.after.get("skipped_updates")
    # A layer may turn NaN into numbers.
    if counts is None or not (is_certain or counts.any() or skipped.has_nan()):
        return None
    tolerance = max(_tolerance(model), 2 * size)
    return [
        *_scaled_faults(model, update, expected, tolerance),
        *_skip_faults(model, skipped),
    ]


def _set_loss_scaling(model: keras.Model, batch: Batch, expected: _Expected) -> None:
    with model.distribute_strategy.scope():
        _keras.building.build_for(model, batch.specs)
    model.set_weights(expected.before)
    is_half = _keras.layers.computes_in_float16(model) or model.exchange_dtype == "float16"
    model.loss_scale = DynamicLossScale(initial_scale=_FLOAT16_LOSS_SCALE) if is_half else "dynamic"
    model.optimizer.learning_rate = expected.learning_rate


def _scaled_faults(
    model: keras.Model, update: Update, expected: _Expected, tolerance: float
) -> list[str]:
    """Returns what is wrong with an update that should match one without scaling."""
    largest = numbers.differences(update, expected.after, _paths(model.weights))[0]
    if largest.size > tolerance:
        return [f"without NaN, {largest.name} deviates by {largest.size:.1e} under loss scaling"]
    return []


def _skip_faults(model: keras.Model, skipped: Update) -> list[str]:
    """Returns what is wrong with an update that should be skipped."""
    names = _paths([*model.weights, *model.optimizer.variables])
    faults = [f"{name} has changed" for name in skipped.changed(names)]
    counts, scale = skipped.after["skipped_updates"], skipped.after["loss_scale"]
    if not (counts == 1).all():
        faults.append(f"skipped updates of the cores: {counts.tolist()}")
    if not (scale * 2 == skipped.before["loss_scale"]).all():
        faults.append(f"loss scale of the cores: {scale.tolist()}")
    return faults + [
        f"{name} differs between the cores" for name in skipped.apart(_core_variables(model))
    ]
