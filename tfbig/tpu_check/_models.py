"""The models that `python -m tfbig.tpu_check` looks at: as a user makes them, and comparable."""

import contextlib
import dataclasses

import keras
import numpy as np

from tfbig import _keras, errors, models, tpu_check
from tfbig._update import step_options, train_step
from tfbig.loss_scaling import DynamicLossScale
from tfbig.tpu_check import numbers
from tfbig.tpu_check.build_function import UsageError

__all__ = ("Comparison", "built", "compared", "made_exact")


# So that float16 does not overflow, and the scale is none that could be left out.
_SCALE_OF_FLOAT16 = 16.0

# What layers of Keras call the part that they drop, and the size of the noise that they add.
_RATES = ("rate", "dropout", "recurrent_dropout", "stddev")


def built(build, strategy, batch_size, options):
    """Makes a model, extended.

    Args:
        build: function that returns a compiled model, or a pair of it and a sample of the data.
        strategy: `tf.distribute.Strategy` in whose scope it is made, or None, for which a plain
            Keras model stays one.
        batch_size: int, samples of an update.
        options: dict of options of `tfbig.extend`.

    Returns:
        Model and `Batch`.

    Raises:
        UsageError: If `build` fails, or returns something else.
    """
    with strategy.scope() if strategy else contextlib.nullcontext():
        model, sample = _made(build)
        options = {name: value for name, value in options.items() if value is not None}
        if isinstance(model, train_step.TrainStep):
            step_options.set_options(model, options)
        elif strategy:
            model = models.extend(model, **options)
        if sample is None:
            return model, tpu_check.Batch.of_model(model, batch_size)
        return model, tpu_check.Batch.of_sample(sample, batch_size)


def _made(build):
    try:
        made = build()
    except Exception as e:
        raise UsageError(f"build() failed: {type(e).__name__}: {e}") from e
    model, sample = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, keras.Model) or not model.compiled or model.optimizer is None:
        raise UsageError(
            "build() must return a compiled Keras model, or it and a sample of the data. "
            f"Received: {type(model).__name__}"
            f"{', not compiled' if isinstance(model, keras.Model) else ''}."
        )
    return model, sample


def made_exact(model, strategy):
    """Takes from a model what depends on how a batch is cut, and Adam, which hides a scale.

    It gets SGD; dropout drops nothing, noise is none, and BatchNormalization normalizes with its
    moving statistics.
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


def _rates(layer):
    """Names of the numbers that turn a layer's randomness off where they are 0."""
    # A layer may keep a layer under one of these names.
    return [name for name in _RATES if isinstance(getattr(layer, name, None), int | float)]


def _stays_random(layer):
    """Whether `made_exact` cannot turn a layer's randomness off."""
    return _keras.layers.draws_random_numbers(layer) and not _rates(layer)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An update of all cores beside one of the whole batch, and one with NaN on one core.

    Attributes:
        differences: list of `numbers.Difference`, the largest first.
        tolerance: float, what of them counts as rounding.
        apart: list of str, variables that are not the same on all cores.
        random: list of str, layers that may draw random numbers, which could not be turned off.
        skipped: list of str, what is wrong under dynamic loss scaling, with an update that should
            be as without, and one that should be skipped; None if there were none, as nothing
            could be NaN or the model has no loss scaling.
    """

    differences: list
    tolerance: float
    apart: list
    random: list
    skipped: list | None

    @property
    def is_equal(self):
        """Whether the update is that of the whole batch, but for rounding."""
        return self.differences[0].size <= self.tolerance

    @property
    def is_wrong(self):
        """Whether something is wrong, for which random numbers are no reason."""
        return bool(self.apart or self.skipped or not (self.is_equal or self.random))

    @property
    def is_right(self):
        """Whether nothing is wrong, and random numbers hid nothing."""
        return self.is_equal and not self.is_wrong


def compared(built, strategy, cores, run):
    """Compares updates of all cores with what they should be.

    Args:
        built: function of a strategy or None, and of options, that returns a model and its
            `Batch`.
        strategy: `TPUStrategy`.
        cores: int.
        run: function of a model, a `Batch` and any number of values of it, that returns a list of
            `numbers.Update`: each starts anew.

    Returns:
        A `Comparison`.
    """
    model, batch = built(strategy)
    if isinstance(model, train_step.TrainStep) and hasattr(type(model), "loss_scale"):
        model.loss_scale = None
    data = batch.values()
    names, wanted, rate = _wanted(built, model, batch, data)
    model.optimizer.learning_rate = rate
    initial = model.get_weights()
    (update,) = run(model, batch, data)
    differences = numbers.differences(update, wanted, names)
    random = [
        f"{type(layer).__name__} {layer.name!r}"
        for layer in _keras.layers.all_layers(model)
        if _stays_random(layer)
    ]
    # Random numbers deviate by any amount.
    size = np.inf if random else differences[0].size
    return Comparison(
        differences,
        _tolerance(model),
        update.apart(_own_of_cores(model)),
        random,
        _scaled(built, strategy, cores, run, data, initial, wanted, rate, size),
    )


def _wanted(built, model, batch, data):
    """Names of the weights, their values after the whole batch, and the rate."""
    whole, _ = built(None)
    if isinstance(whole, train_step.TrainStep):
        # Then its step is Keras's own.
        step_options.make_plain(whole)
    _keras.trainer.build_for(whole, batch.specs)
    with model.distribute_strategy.scope():
        _keras.trainer.build_for(model, batch.specs)
    whole.set_weights(model.get_weights())
    whole.optimizer.build(whole.trainable_variables)
    before = whole.get_weights()
    after = numbers.whole_update(whole, data)
    changes = [
        numbers.distance(a, b) for a, b in zip(after, before, strict=True) if numbers.is_floating(a)
    ]
    # With it the largest change is near 1, and what weights lose in rounding is small beside it.
    rate = 2.0 ** -np.round(np.log2(max(changes, default=0) or 1.0))
    return [w.path for w in model.weights], numbers.whole_update(whole, data, rate), float(rate)


def _tolerance(model):
    dtypes = {layer.compute_dtype for layer in [model, *_keras.layers.all_layers(model)]}
    if isinstance(model, train_step.TrainStep):
        dtypes.add(model.exchange_dtype)
    return max(numbers.TOLERANCES.get(dtype, 0.0) for dtype in dtypes)


def _own_of_cores(model):
    """Paths of what each core has for itself: sums that only the result of a metric adds up."""
    return {v.path for v in model.metrics_variables if not _keras.variables.is_summed(v)}


def _scaled(built, strategy, cores, run, data, initial, wanted, rate, size):
    """What is wrong with two updates under dynamic loss scaling; None if there are none.

    One is to be as without scaling, but for rounding; the other, with NaN on one core, skipped.
    """
    model, batch = built(strategy)
    if not hasattr(type(model), "loss_scale"):
        return None
    with model.distribute_strategy.scope():
        _keras.trainer.build_for(model, batch.specs)
    model.set_weights(initial)
    is_half = _keras.layers.computes_in_float16(model) or model.exchange_dtype == "float16"
    model.loss_scale = DynamicLossScale(initial_scale=_SCALE_OF_FLOAT16) if is_half else "dynamic"
    model.optimizer.learning_rate = rate
    poisoned, is_sure = numbers.poisoned(data, cores)
    if poisoned is None:
        # Without floats in the data, a weight can be NaN.
        batch = batch.weighted()
        if batch is None:
            return None
        weight = np.ones(batch.specs[2].shape, "float32")
        data = (*data[:2], weight)
        poisoned, is_sure = numbers.poisoned((*data[:2], weight), cores)
    try:
        update, skipped = run(model, batch, data, poisoned)
    except errors.UnsupportedModelError:
        # A `train_step` of the model's own that does not scale.
        return None
    counts = skipped.after.get("skipped_updates")
    # A layer may make numbers of NaN.
    if counts is None or not (is_sure or counts.any() or skipped.has_nan()):
        return None
    weights = [w.path for w in model.weights]
    largest = numbers.differences(update, wanted, weights)[0]
    wrong = []
    if largest.size > max(_tolerance(model), 2 * size):
        wrong = [f"without NaN, {largest.name} deviates by {largest.size:.1e} under loss scaling"]
    names = weights + [v.path for v in model.optimizer.variables]
    wrong += [f"{name} has changed" for name in skipped.changed(names)]
    if not (counts == 1).all():
        wrong.append(f"skipped updates of the cores: {counts.tolist()}")
    if not (skipped.after["loss_scale"] * 2 == skipped.before["loss_scale"]).all():
        wrong.append(f"loss scale of the cores: {skipped.after['loss_scale'].tolist()}")
    return wrong + [
        f"{name} differs between the cores" for name in skipped.apart(_own_of_cores(model))
    ]
