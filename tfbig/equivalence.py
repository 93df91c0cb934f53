"""`check_equivalence`: is a user's own model cut without changing the update?"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _reduction, _step, errors

__all__ = ("EquivalenceReport", "check_equivalence")

# Relative deviations that the order of sums explains, with a margin: about a
# thousand roundings in float32 and float64, a few dozen in the half precisions,
# where each rounding weighs more.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far a variable's gradient, or new state, of the cut batch is off.

    Attributes:
        name: str, path of the variable; "loss" for the loss.
        kind: str, "loss", "gradient" or "state".
        absolute: float, largest absolute deviation.
        relative: float, `absolute` by the largest absolute value of the whole
            batch's; at least a thousandth of the largest among all gradients
            (states), so that a gradient of nothing but rounding is not compared
            with itself.
    """

    name: str
    kind: str
    absolute: float
    relative: float


@dataclasses.dataclass(frozen=True)
class EquivalenceReport:
    """What `check_equivalence` found. Prints as a table.

    Attributes:
        deviations: list of `Deviation`, the largest relative one first.
        causes: list of str, what makes the model inexact, likeliest first; empty
            if it is exact.
        notes: list of str, what could make it inexact but did not here.
        tolerance: float, the relative deviation that counts as rounding.
        cut: str, how the batch was cut.
    """

    deviations: list
    causes: list
    notes: list
    tolerance: float
    cut: str

    @property
    def is_equivalent(self):
        """Whether all relative deviations are within the tolerance."""
        return all(d.relative <= self.tolerance for d in self.deviations)

    @property
    def largest(self):
        """The largest `Deviation`, by its relative size."""
        return self.deviations[0]

    def __str__(self):
        width = max(len(d.name) for d in self.deviations)
        verdict = "equivalent" if self.is_equivalent else "NOT equivalent"
        lines = [
            f"Whole batch and cut batch are {verdict}: {self.cut}.",
            f"{'variable':<{width}}  {'what':<8}  {'absolute':>9}  {'relative':>9}",
        ]
        for d in self.deviations:
            mark = "" if d.relative <= self.tolerance else "  <--"
            lines.append(
                f"{d.name:<{width}}  {d.kind:<8}  {d.absolute:9.1e}  {d.relative:9.1e}{mark}"
            )
        lines.append(f"Relative deviations up to {self.tolerance:.0e} are rounding.")
        lines += [f"Cause: {c}" for c in self.causes] + [f"Note: {n}" for n in self.notes]
        return "\n".join(lines)


def check_equivalence(model, x, y=None, sample_weight=None, *, tolerance=None):
    """Compares one update of a model's whole batch with one of the cut batch.

    Computes the gradient of a batch as plain Keras does on one device, and as
    the model does with its micro-batches and replicas, and compares what the
    optimizer would get: the gradients, the loss, and the new values of
    non-trainable variables. The model is left as it is; no update is applied.

    Gradients are compared rather than weights, because an optimizer such as Adam
    hides a gradient that is wrong by a factor.

    Args:
        model: A compiled model with tfbig's mixins; not necessarily built.
        x: One batch of inputs, as for `train_on_batch`. Choose a size that
            neither the micro-batches nor the replicas divide. It must fit into
            the memory of one device as a whole.
        y: Targets.
        sample_weight: Sample weights.
        tolerance: float, the relative deviation that counts as rounding. Defaults
            to 1e-4 in float32, 1e-10 in float64, more in half precision.

    Returns:
        An `EquivalenceReport`.

    Raises:
        InvalidOptionError: If the model is not compiled or has no mixin.

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
    if not isinstance(model, _step.TrainStep) or not model.compiled:
        raise errors.InvalidOptionError(
            "`model` must be a compiled model with tfbig's mixins. Received: "
            f"{type(model).__name__}, compiled={getattr(model, 'compiled', False)}. "
            "Use tfbig.extend(model) and compile it."
        )
    data = keras.tree.map_structure(
        lambda v: v if v is None else tf.convert_to_tensor(v), (x, y, sample_weight)
    )
    model._maybe_symbolic_build(data_batch=data)
    with model.distribute_strategy.scope():
        whole, cut, state = _both(model, data)
    if tolerance is None:
        tolerance = max(TOLERANCES[dtype] for dtype in _compute_dtypes(model))

    deviations = _deviations(model, whole, cut, state)
    is_exact = all(d.relative <= tolerance for d in deviations)
    suspects = _suspects(model, state)
    if not is_exact and not suspects:
        suspects = [
            "Unknown. A scalar loss, or one from `add_loss`, that is not a mean over samples? "
            "Then override `loss_denominator`, or use a Keras loss. A layer that mixes samples?"
        ]
    return EquivalenceReport(
        deviations=sorted(deviations, key=lambda d: -d.relative),
        causes=[] if is_exact else suspects,
        notes=suspects if is_exact else [],
        tolerance=tolerance,
        cut=_describe(model, _keras.batch_size(data)),
    )


def _both(model, data):
    """Gradients, loss and state of the whole and of the cut batch."""
    strategy = model.distribute_strategy
    found = {}

    def cut(data):
        share = model._share(model._share_of_replica(data), model._cut(), training=True)
        accumulated = _reduction.exchange(share.accumulate())
        found["state"] = [c.variable for c in accumulated.state if not c.is_metric]
        return {
            "loss": accumulated.loss / accumulated.weight,
            "gradient": [_dense(g, accumulated.weight) for g in accumulated.gradients],
            "state": [c.after for c in accumulated.state if not c.is_metric],
        }

    def whole(data):
        with (
            tf.GradientTape() as tape,
            _keras.intercepted_losses(None),
            _keras.VariableValues() as scope,
        ):
            loss = _keras.forward(model, data, training=True)[0]
        variables = [_keras.native(v) for v in model.trainable_variables]
        return {
            "loss": loss,
            "gradient": [_dense(g, 1) for g in tape.gradient(loss, variables)],
            "state": [tf.convert_to_tensor(scope.get_current_value(v)) for v in found["state"]],
        }

    def first_result(function):
        def run(data):
            results = strategy.run(function, args=(data,))
            return tf.nest.map_structure(
                lambda v: strategy.experimental_local_results(v)[0], results
            )

        return run if model.run_eagerly else tf.function(run, autograph=False)

    of_cut = first_result(cut)(data)
    of_whole = first_result(whole)(data)
    return of_whole, of_cut, found["state"]


def _dense(gradient, divisor):
    if gradient is None:
        return tf.zeros(())
    gradient = tf.convert_to_tensor(gradient)
    return gradient / tf.cast(divisor, gradient.dtype)


def _deviations(model, whole, cut, state):
    names = {
        "loss": ["loss"],
        "gradient": [v.path for v in model.trainable_variables],
        "state": [v.path for v in state],
    }
    deviations = []
    for kind, paths in names.items():
        pairs = [
            (np.asarray(a, np.float64), np.asarray(b, np.float64))
            for a, b in zip(tf.nest.flatten(whole[kind]), tf.nest.flatten(cut[kind]), strict=True)
        ]
        sizes = [np.max(np.abs(a), initial=0) for a, _ in pairs]
        floor = 1e-3 * max(sizes, default=0)
        for path, size, (a, b) in zip(paths, sizes, pairs, strict=True):
            absolute = float(np.max(np.abs(a - b), initial=0))
            reference = max(size, floor)
            relative = absolute / reference if reference > 0 else float(absolute > 0)
            deviations.append(Deviation(path, kind, absolute, float(relative)))
    return deviations


def _suspects(model, state):
    """What is known not to be exact, in the order of the docs."""
    suspects = []
    layers = _keras.all_layers(model)
    for layer in layers:
        is_normalization = isinstance(layer, keras.layers.BatchNormalization)
        if is_normalization and layer.trainable and not layer.synchronized:
            suspects.append(
                f"BatchNormalization ({layer.name!r}) normalizes each micro-batch with its own "
                "statistics."
            )
    for layer in layers:
        if _keras.draws_random_numbers(layer):
            suspects.append(
                f"{type(layer).__name__} ({layer.name!r}) draws random numbers; micro-batches "
                "and replicas draw others."
            )
    for layer in layers:
        own = [v for v in state if _keras.owns(layer, v)]
        if own and not type(layer).__module__.startswith("keras."):
            suspects.append(
                f"{type(layer).__name__} ({layer.name!r}) changes its state "
                f"({', '.join(v.name for v in own)}) in every forward pass, so once for each "
                "micro-batch."
            )
    return suspects


def _compute_dtypes(model):
    return {
        layer.compute_dtype
        for layer in [model, *_keras.all_layers(model)]
        if layer.compute_dtype in TOLERANCES
    }


def _describe(model, samples):
    cut, replicas = model._cut(), model.distribute_strategy.num_replicas_in_sync
    parts = (
        f"{cut.gradient_accumulation_steps} micro-batch(es)"
        if cut.micro_batch_size is None
        else f"micro-batches of {cut.micro_batch_size}"
    )
    return f"{int(samples)} samples on {replicas} replica(s) in {parts}"
