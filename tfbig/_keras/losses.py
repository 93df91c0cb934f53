"""Keras divides losses by the samples it sees, and metrics by replica; here the whole batch counts.

Keras reduces a loss over the samples that it sees, and divides it by the number of replicas. Both
are wrong for a batch that is cut: a micro-batch must be divided by the denominator of the whole
batch, which only the reduction knows, since it depends on shapes, sample weights and masks. So
the function through which every `keras.Loss` reduces is replaced by one that asks the reducer of
the running thread, if there is one. Without a reducer it is Keras's own.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import keras
from keras.src.losses import loss as _loss_module
from keras.src.trainers import trainer as _trainer

from tfbig import _types, errors
from tfbig._keras.thread import current, holding
from tfbig._keras.variables import VariableValues, is_summed

# Any: a metric decides what its result is.
_Results: TypeAlias = dict[str, Any]

# Functions of Keras that it exports under no public name.
merge_mask = _loss_module.apply_mask
match_ranks = _loss_module.squeeze_or_expand_to_same_rank


def intercepted_losses(
    reducer: _types.AnyFunction | None,
) -> contextlib.AbstractContextManager[None]:
    """A context in which every Keras loss of this thread reduces through `reducer`.

    Args:
        reducer: called with Keras's `reduce_weighted_values` and its arguments; None for Keras's
            own reduction. In both cases the division by the number of replicas is left out.
    """
    return holding("reducer", reducer or _keras_reduction)


def _keras_reduction(
    reduce_values: _types.AnyFunction, *args: object, **kwargs: object
) -> _types.Tensor:
    return reduce_values(*args, **kwargs)


def _replace_in_loss_module(name: str, replacement: _types.AnyFunction) -> None:
    original = getattr(_loss_module, name)
    setattr(_loss_module, name, functools.wraps(original)(functools.partial(replacement, original)))


def _reduce_weighted_values(
    original: _types.AnyFunction,
    values: _types.Tensor,
    sample_weight: _types.Tensor | None = None,
    mask: _types.Tensor | None = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: str | None = None,
) -> _types.Tensor:
    reducer = current("reducer") or _keras_reduction

    def reduce(values: _types.Tensor) -> _types.Tensor:
        return reducer(
            original,
            values,
            sample_weight=sample_weight,
            mask=mask,
            reduction=reduction,
            dtype=dtype,
        )

    head = current("head")
    return reduce(values) if head is None else head.reduced(values, reduction, reduce)


def _for_distribution(original: _types.AnyFunction, value: _types.Tensor) -> _types.Tensor:
    return original(value) if current("reducer") is None else value


_replace_in_loss_module("reduce_weighted_values", _reduce_weighted_values)
_replace_in_loss_module("scale_loss_for_distribution", _for_distribution)
_replace_in_loss_module("unscale_loss_for_distribution", _for_distribution)


def added_loss(loss: _types.Tensor) -> _types.Tensor:
    """What a loss of `add_loss` contributes to the loss of the model.

    Keras adds up the entries of a loss that is not a scalar, such as one value for each sample. If
    a batch is cut, the entries of all micro-batches count, and only the reducer knows those.
    """
    added = getattr(current("reducer"), "added", None)
    return keras.ops.sum(loss) if added is None or loss.shape.rank == 0 else added(loss)


class _Recorder:
    """Stands in for the metric of an output's loss, and appends the loss to a list."""

    def __init__(self, values: list[_types.Tensor]) -> None:
        self.values = values

    def update_state(
        self, value: _types.Tensor, sample_weight: _types.Tensor | None = None
    ) -> None:
        del sample_weight
        self.values.append(value)


@contextlib.contextmanager
def output_losses(model: keras.Model) -> Iterator[list[_types.Tensor]]:
    """Collects the loss of each output instead of adding it to its metric.

    Keras adds the loss of every output in every call to an unweighted mean, so that micro-batches
    of different sizes would count alike. Within the context the values are appended to the list
    that it yields, in the order of the metrics; the caller passes their whole-batch values to
    `update_losses`.
    """
    compile_loss = model._compile_loss
    values: list[_types.Tensor] = []
    if compile_loss is None or not compile_loss.metrics:
        yield values
        return
    metrics = compile_loss._metrics
    # Keras's `__setattr__` would track the recorders.
    object.__setattr__(compile_loss, "_metrics", [_Recorder(values) for _ in metrics])
    try:
        yield values
    finally:
        object.__setattr__(compile_loss, "_metrics", metrics)


def update_losses(
    model: keras.Model,
    loss: _types.Tensor,
    samples: _types.Tensor,
    output_losses: Sequence[_types.Tensor],
    weight: _types.Tensor,
) -> None:
    """Adds whole-batch losses to the model's metrics.

    Keras weights the loss by samples, but the losses of outputs by updates (in a compiled step,
    where it does not know the number of samples).
    """
    model._loss_tracker.update_state(loss, sample_weight=samples)
    if output_losses:
        for metric, value in zip(model._compile_loss.metrics, output_losses, strict=True):
            metric.update_state(value, sample_weight=weight)


def update_metrics(
    model: keras.Model,
    x: _types.Structure,
    y: _types.Structure,
    y_pred: _types.Structure,
    sample_weight: _types.Structure,
) -> _Results:
    """Updates the metrics; returns the logs of an overridden `compute_metrics`.

    Keras's own `compute_metrics` also computes the result of every metric, which is needed once
    per update, not once per micro-batch.
    """
    if type(model).compute_metrics is not _trainer.Trainer.compute_metrics:
        logs: _Results = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight=sample_weight)
    return {}


def metrics_results(model: keras.Model, replicas: int) -> _Results:
    """Results of the metrics for the samples of all replicas. In replica context.

    Each replica holds an equal part of every sum; see `exchange.all_reduce_accumulated`.
    """
    if replicas == 1:
        return dict(model.get_metrics_result())
    totals = [(v, v.value * replicas) for v in model.metrics_variables if is_summed(v)]
    with VariableValues(totals):
        return dict(model.get_metrics_result())


def loss_names(model: keras.Model) -> set[str]:
    """Names under which the logs hold the losses that `update_losses` adds."""
    metrics = model._compile_loss.metrics if model._compile_loss is not None else []
    return {model._loss_tracker.name, *(m.name for m in metrics)}


def losses_that_couple_samples(model: keras.Model) -> list[str]:
    """Names of a model's Keras losses that are not sums over samples.

    `Dice` and `Tversky` divide sums over the batch, unless axes are named; `Circle` compares each
    sample with the others.
    """
    compile_loss = model._compile_loss
    if compile_loss is None or not compile_loss.built:
        return []
    losses = [x.loss for x in compile_loss._flat_losses]
    return [loss.fn.__name__.capitalize() for loss in losses if _couples_samples(loss)]


def _couples_samples(loss: keras.Loss) -> bool:
    function = getattr(loss, "fn", None)
    if function is keras.losses.circle:
        return True
    if function not in (keras.losses.dice, keras.losses.tversky):
        return False
    axis = loss._fn_kwargs.get("axis")
    return axis is None or 0 in (axis if isinstance(axis, tuple | list) else (axis,))


def check_losses(model: keras.Model) -> None:
    """Raises if a loss given to `compile` returns one value per sample."""
    for loss in keras.tree.flatten(model.loss):
        if isinstance(loss, keras.Loss) and loss.reduction in (None, "none"):
            raise errors.InvalidOptionError(
                "A loss given to `compile` must reduce to a scalar. Received: "
                f"{type(loss).__name__}(reduction={loss.reduction!r}). Use "
                "reduction='sum_over_batch_size', or reduce it in `compute_loss`."
            )


def check_is_scalar(loss: _types.Tensor | None) -> None:
    """Raises if the model's loss is not a scalar, such as one value per sample."""
    if loss is not None and loss.shape.rank != 0:
        raise errors.UnsupportedModelError(
            f"The loss must be a scalar. Received: a loss of shape {tuple(loss.shape)}. A Keras "
            "loss with reduction 'none' returns one value per sample; use "
            "reduction='sum_over_batch_size', or reduce it in `compute_loss`."
        )
