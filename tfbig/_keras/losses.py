"""Losses and metrics: reductions that know the whole batch, results of all replicas."""

import contextlib
import functools

import keras
from keras.src.losses import loss as _loss_module
from keras.src.trainers import trainer as _trainer

from tfbig import errors
from tfbig._keras.thread import current, holding
from tfbig._keras.variables import VariableValues, is_summed

# Keras reduces a loss over the samples it sees and divides it by the number of
# replicas. Both are wrong for a cut batch: a micro-batch must be divided by the
# denominator of the whole batch, which only the reduction knows (it depends on
# shapes, sample weights and masks). So the one function through which every
# `keras.Loss` reduces is replaced by one that asks the reducer of the running
# thread, if there is one. Without a reducer it is Keras's own.


def intercepted_losses(reducer):
    """A context in which every Keras loss of this thread reduces through `reducer`.

    Args:
        reducer: A callable with the arguments of Keras's
            `reduce_weighted_values` and, first, that function itself, or None
            for Keras's own reduction. In both cases the division by the number
            of replicas is left out.
    """
    return holding("reducer", reducer or _keras_reduction)


def _keras_reduction(reduce_values, *args, **kwargs):
    return reduce_values(*args, **kwargs)


def _replace_in_loss_module(name, replacement):
    original = getattr(_loss_module, name)
    setattr(_loss_module, name, functools.wraps(original)(functools.partial(replacement, original)))


def _reduce_weighted_values(
    original,
    values,
    sample_weight=None,
    mask=None,
    reduction="sum_over_batch_size",
    dtype=None,
):
    reducer = current("reducer") or _keras_reduction
    return reducer(
        original, values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
    )


def _for_distribution(original, value):
    return original(value) if current("reducer") is None else value


_replace_in_loss_module("reduce_weighted_values", _reduce_weighted_values)
_replace_in_loss_module("scale_loss_for_distribution", _for_distribution)
_replace_in_loss_module("unscale_loss_for_distribution", _for_distribution)


def added_loss(loss):
    """What a loss of `add_loss` contributes to that of the model.

    Keras adds up the entries of a loss that is no scalar, such as one value for each sample; of
    a cut batch they are those of all micro-batches, of which only the reducer knows.
    """
    added = getattr(current("reducer"), "added", None)
    return keras.ops.sum(loss) if added is None or loss.shape.rank == 0 else added(loss)


merge_mask = _loss_module.apply_mask
match_ranks = _loss_module.squeeze_or_expand_to_same_rank


@contextlib.contextmanager
def output_losses(model):
    """Collects the loss of each output instead of adding it to its metric.

    Keras adds the loss of every output of every call to a mean without weights,
    so that micro-batches of different sizes would count alike. Within the
    context the values are appended to the list that it yields, in the order of
    the metrics; the caller hands their whole-batch values to
    `update_losses`.
    """
    compile_loss = model._compile_loss
    values: list = []
    if compile_loss is None or not compile_loss.metrics:
        yield values
        return

    class Recorder:
        def update_state(self, value, sample_weight=None):
            del sample_weight
            values.append(value)

    metrics = compile_loss._metrics
    object.__setattr__(compile_loss, "_metrics", [Recorder() for _ in metrics])
    try:
        yield values
    finally:
        object.__setattr__(compile_loss, "_metrics", metrics)


def update_losses(model, loss, samples, output_losses, weight):
    """Adds whole-batch losses to the model's metrics.

    Keras weights the loss by samples, the losses of outputs by updates (in a
    compiled step, where it does not know the number of samples).
    """
    model._loss_tracker.update_state(loss, sample_weight=samples)
    if output_losses:
        for metric, value in zip(model._compile_loss.metrics, output_losses, strict=True):
            metric.update_state(value, sample_weight=weight)


def update_metrics(model, x, y, y_pred, sample_weight):
    """Updates the metrics; returns the logs of an overridden `compute_metrics`.

    Keras's own `compute_metrics` also computes the result of every metric,
    which is wanted once per update, not once per micro-batch.
    """
    if type(model).compute_metrics is not _trainer.Trainer.compute_metrics:
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight=sample_weight)
    return {}


def metrics_results(model, replicas):
    """Results of the metrics, in replica context, for the samples of all replicas.

    Each replica holds an equal part of every sum; see `exchange.exchange`.
    """
    if replicas == 1:
        return dict(model.get_metrics_result())
    totals = [(v, v.value * replicas) for v in model.metrics_variables if is_summed(v)]
    with VariableValues(totals):
        return dict(model.get_metrics_result())


def loss_names(model):
    """Names in the logs of the losses that `update_losses` adds."""
    metrics = model._compile_loss.metrics if model._compile_loss is not None else []
    return {model._loss_tracker.name, *(m.name for m in metrics)}


def losses_that_couple_samples(model):
    """Names of the Keras losses of a model that are not sums over the samples.

    What `Dice` and `Tversky` divide is summed over the batch, if no axes are named; `Circle`
    compares each sample with the others.
    """
    compile_loss = model._compile_loss
    if compile_loss is None or not compile_loss.built:
        return []
    losses = [x.loss for x in compile_loss._flat_losses]
    return [loss.fn.__name__.capitalize() for loss in losses if _couples_samples(loss)]


def _couples_samples(loss):
    function = getattr(loss, "fn", None)
    if function is keras.losses.circle:
        return True
    if function not in (keras.losses.dice, keras.losses.tversky):
        return False
    axis = loss._fn_kwargs.get("axis")
    return axis is None or 0 in (axis if isinstance(axis, tuple | list) else (axis,))


def check_losses(model):
    """Refuses losses that return one value per sample."""
    for loss in keras.tree.flatten(model.loss):
        if isinstance(loss, keras.Loss) and loss.reduction in (None, "none"):
            raise errors.InvalidOptionError(
                "A loss given to `compile` must reduce to a scalar. Received: "
                f"{type(loss).__name__}(reduction={loss.reduction!r}). Use "
                "reduction='sum_over_batch_size', or reduce it in `compute_loss`."
            )


def check_is_scalar(loss):
    """Refuses a loss of one value per sample."""
    if loss is not None and loss.shape.rank != 0:
        raise errors.UnsupportedModelError(
            f"The loss must be a scalar. Received: a loss of shape {tuple(loss.shape)}. A Keras "
            "loss with reduction 'none' returns one value per sample; use "
            "reduction='sum_over_batch_size', or reduce it in `compute_loss`."
        )
