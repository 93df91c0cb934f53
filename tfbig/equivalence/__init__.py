"""`check_equivalence`: does cutting the batch change the update of a user's model?"""

import math

import keras

from tfbig import _keras, _numbers, _types, errors
from tfbig._update import train_step
from tfbig.equivalence import _causes
from tfbig.equivalence._report import Deviation, EquivalenceReport
from tfbig.equivalence._trainings import Trainings

__all__ = ("Deviation", "EquivalenceReport", "check_equivalence")

# Relative deviations that the order of summation explains, with a margin: about a thousand
# roundings in float32 and float64, a few dozen in half precision, where each weighs more.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}

# The distance from 1 to the next larger number.
EPSILONS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def check_equivalence(
    model: keras.Model,
    x: _types.Structure,
    y: _types.Structure = None,
    sample_weight: _types.Structure = None,
    *,
    tolerance: float | None = None,
) -> EquivalenceReport:
    """Compares updates of a model's whole batch with updates of the cut batch.

    Trains three updates the way plain Keras does on one device, and three the way the model does,
    with its micro-batches and replicas; both start from the model's present weights and use its
    own optimizer. Compares the loss, the gradients and the non-trainable variables after the first
    update, and the weights and the optimizer's state after the last. The cut batch runs through
    the code that `fit` runs. The model is left unchanged.

    Gradients show a wrong constant factor, which Adam hides. Weights and optimizer state show
    whether rows of an embedding were summed before being squared, which gradients hide. An
    optimizer may magnify rounding errors, so the check measures by how much: it also trains from
    weights moved by one rounding.

    Args:
        model: A compiled model with tfbig's mixins and tfbig's `train_step`; it need not be
            built.
        x: One batch of inputs, as for `train_on_batch`. Choose a size that is a multiple of
            neither the micro-batch size nor the number of replicas. The whole batch must fit into
            the memory of one device.
        y: Targets.
        sample_weight: Sample weights.
        tolerance: The relative deviation that counts as rounding. Defaults to 1e-4 in float32,
            1e-10 in float64, and 0.03 (float16) or 0.2 (bfloat16) in half precision, where only
            large deviations show: check the model in float32 too.

    Returns:
        An `EquivalenceReport`, which prints as a table: `is_equivalent`, the `deviations` of each
        variable, and the likely `causes` if the updates differ.

    Raises:
        InvalidOptionError: If the model is not compiled, has none of tfbig's mixins, has a
            `train_step` of its own, has no trainable weights, or has not found its micro-batch
            size yet; or if the parts of the batch hold different numbers of samples.
        LossScaleError: If no loss scale yields finite gradients.
        UnsupportedModelError: If the model has divided weights.

    Example:

    >>> model = tfbig.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()],
    ...     gradient_accumulation_steps=3,
    ... )
    >>> model.compile("sgd", "mse")
    >>> report = tfbig.check_equivalence(model, np.random.rand(10, 4), np.ones((10, 3)))
    >>> report.is_equivalent
    False
    >>> print(report.causes[0])
    BatchNormalization ('batch_normalization') normalizes each micro-batch with its own statistics.
    """
    _check_model(model)
    if tolerance is not None:
        tolerance = _checked_tolerance(tolerance)
    data = keras.tree.map_structure(_keras.batches.as_tensor, (x, y, sample_weight))
    data = _keras.batches.of_one_size(data)
    model._maybe_symbolic_build(data_batch=data)
    if any(isinstance(v, _keras.sharded_variable.ShardedWeight) for v in model.weights):
        raise errors.UnsupportedModelError(
            "`check_equivalence` needs weights that every replica has all of. Received: a model "
            "with divided weights. Check it with shard='optimizer' or None; dividing weights "
            "changes no number."
        )
    if not model.trainable_variables:
        raise errors.InvalidOptionError(
            "`model` must have trainable weights, whose updates are compared. Received: "
            f"{model.name}, which has none. Set `trainable` to True, and compile it."
        )
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    dtypes = _compute_dtypes(model)
    if tolerance is None:
        tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    trainings = Trainings(model, data)
    deviations = trainings.deviations(tolerance, max(EPSILONS[dtype] for dtype in dtypes))
    return _report(trainings, deviations, tolerance)


def _report(
    trainings: Trainings, deviations: list[Deviation], tolerance: float
) -> EquivalenceReport:
    is_exact = all(d.is_rounding for d in deviations)
    suspects = _causes.in_layers(trainings.model, trainings.state)
    if any(not math.isfinite(d.relative) for d in deviations):
        suspects = [
            "Losses, gradients or weights are not finite, and cannot be compared. Look for NaN or "
            "inf in the data and the weights, and for a learning rate that is too high."
        ]
    elif not is_exact:
        suspects += _causes.in_loss(trainings, deviations, tolerance)
    if not is_exact and not suspects:
        suspects = [
            "Unknown. If a scalar loss, or one from `add_loss`, is not a mean over samples, "
            "override `loss_denominator` or use a Keras loss. If a layer, or a loss from "
            "`add_loss`, mixes samples, only larger micro-batches help."
        ]
    return EquivalenceReport(
        deviations=sorted(
            deviations,
            # What differs after several updates mostly follows from what differs in the first.
            key=lambda d: (d.is_rounding, d.kind in ("weight", "optimizer"), -d.relative),
        ),
        causes=[] if is_exact else suspects,
        notes=suspects if is_exact else [],
        tolerance=tolerance,
        cut=_describe(trainings.model, _keras.batches.batch_size(trainings.data)),
    )


def _check_model(model: keras.Model) -> None:
    if not isinstance(model, train_step.TrainStep) or not model.compiled:
        raise errors.InvalidOptionError(
            "`model` must be a compiled model with tfbig's mixins. Received: "
            f"{type(model).__name__}, compiled={getattr(model, 'compiled', False)}. "
            "Use tfbig.extend(model) and compile it."
        )
    if type(model).train_step is not train_step.TrainStep.train_step:
        raise errors.InvalidOptionError(
            "`check_equivalence` compares tfbig's own `train_step` with that of Keras. Received: "
            f"{type(model).__name__}, which has a `train_step` of its own. Train one update with "
            "gradient_accumulation_steps=1 and one with more, and compare the weights."
        )
    if getattr(model, "micro_batch_size", None) is None and (
        getattr(model, "gradient_accumulation_steps", 1) is None
    ):
        raise errors.InvalidOptionError(
            "`micro_batch_size='auto'` is found in the first update of `fit`. Received: a model "
            "that has not been fitted. Call fit first, or pass a number of samples."
        )


def _checked_tolerance(value: object) -> float:
    tolerance = _numbers.as_number(value)
    if tolerance is None or not 0 < tolerance < math.inf:
        raise errors.InvalidOptionError(
            f"`tolerance` must be a number > 0 or None. Received: tolerance={value!r}."
        )
    return tolerance


def _compute_dtypes(model: keras.Model) -> set[str]:
    return {
        layer.compute_dtype
        for layer in [model, *_keras.layers.all_layers(model)]
        if layer.compute_dtype in TOLERANCES
    }


def _describe(model: train_step.TrainStep, samples: _types.Tensor) -> str:
    split, replicas = model._batch_split(), model.distribute_strategy.num_replicas_in_sync
    parts = (
        f"{split.gradient_accumulation_steps} micro-batch(es)"
        if split.micro_batch_size is None
        else f"micro-batches of {split.micro_batch_size}"
    )
    return f"{int(samples)} samples on {replicas} replica(s) in {parts}"
