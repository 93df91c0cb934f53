"""The loop over micro-batches: one replica's share of an update, before the exchange."""

import contextlib
import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, errors
from tfbig._update import (
    accumulators,
    batch_dependence,
    batch_split,
    denominators,
    exchange,
    noise_scale,
    own_step,
    table_rows,
)

__all__ = ("Loss", "MicroBatches", "accumulate_gradients")


@dataclasses.dataclass
class Loss:
    """What the loss function of the step returns for a micro-batch.

    Attributes:
        loss: float scalar.
        weight: float scalar: what the mean over the micro-batch was divided by,
            if not by its samples (tokens, say); else None.
        values: structure of float scalars, reported as means over the effective
            batch.
        logs: structure of scalars; those of the last micro-batch are reported.
    """

    loss: tf.Tensor
    weight: tf.Tensor | None = None
    values: list | dict = dataclasses.field(default_factory=list)
    logs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class LossTrace:
    """What tracing a micro-batch once, without effect, tells.

    Attributes:
        kinds: kinds of the Keras losses, in the order of the calls.
        state: list of variables that the forward pass assigns.
        rows: list, for each trainable variable the `Rows` of the parts of its gradient; none
            where it is added up densely.
        is_known: list of bools, for each of them whether its gradient was seen to have rows.
        connected: indices of trainable variables that have a gradient, as far as
            known: without eager execution, tracing the loop adds to them.
        values: structure of the further values.
        logs: structure of the logs.
        has_weight: whether the loss function says the weight of a micro-batch.
    """

    kinds: list
    state: list
    rows: list
    is_known: list
    connected: set
    values: list | dict
    logs: dict
    has_weight: bool


class MicroBatches:
    """A replica's share of the effective batch, split, with its loss function.

    Args:
        loss_fn: Function of a micro-batch, returning a `Loss`.
        data: Structure of tensors `(samples, ...)`: the replica's share.
        split: `BatchSplit`.
        variables: Trainable variables whose gradients are wanted; may be empty.
        metric_variables: Variables that belong to metrics.
        compiled: Whether XLA compiles the loop.
        unrolled: Whether the loop is laid out.
        trace_scope: Makes the context in which the loss function is traced to
            see what it does.
        measures_noise: Whether to collect what the gradient noise scale needs.
        counted: int32 scalar: how many of the samples count, the first of them, in a program
            that is compiled as a whole. None for all.
    """

    def __init__(
        self,
        loss_fn,
        data,
        split,
        variables,
        metric_variables=(),
        compiled=False,
        unrolled=False,
        trace_scope=contextlib.nullcontext,
        measures_noise=False,
        counted=None,
    ):
        self.loss_fn = loss_fn
        self.data = exchange.checked_data(data)
        self.split = split
        self.variables = list(variables)
        self.metric_ids = {id(v) for v in metric_variables}
        # Then the loop is a part of a program that has static shapes throughout.
        self.is_inline = _keras.devices.is_compiled_as_a_whole()
        self.compiled = compiled or self.is_inline
        self.unrolled = unrolled
        self.measures_noise = measures_noise
        self.counted = counted
        samples = _keras.data.batch_size(data) if counted is None else counted
        self.samples = tf.convert_to_tensor(samples, tf.int32)
        self.dtype = accumulators.dtype_for(keras.config.floatx())
        for variable in variables:
            self.dtype = accumulators.wider(self.dtype, variable.dtype)
        # One micro-batch on one replica: Keras's own reductions are those of
        # the whole batch.
        self.is_whole = split.is_whole and exchange.replicas() == 1 and counted is None
        if unrolled and split.gradient_accumulation_steps is None:
            raise errors.UnsupportedModelError(
                "A model with synchronized layers, whose micro-batches exchange with other "
                "replicas, needs a fixed number of them. Received: "
                f"micro_batch_size={split.micro_batch_size}. Use gradient_accumulation_steps."
            )
        if unrolled and counted is not None:
            raise errors.UnsupportedModelError(
                "With synchronized layers, all batches must have as many samples on a TPU: what "
                "fills a smaller one would be a part of the statistics. Received: data whose last "
                "batch may be smaller. Use drop_remainder=True, or leave samples out."
            )
        self.trace = self._trace(trace_scope)

    def _trace(self, trace_scope):
        probes: list = []

        def probe(data):
            samples = _keras.data.batch_size(data)
            counter = denominators.LossCounter(samples if isinstance(samples, int) else None)
            with (
                trace_scope(),
                tf.GradientTape() as tape,
                _keras.losses.intercepted_losses(counter),
                _keras.variables.VariableValues() as scope,
            ):
                result = self.loss_fn(data)
            gradients = [None] * len(self.variables)
            if tf.executing_eagerly() or (not self.compiled and _looks_up_rows()):
                gradients = tape.gradient(
                    result.loss, [_keras.variables.native(v) for v in self.variables]
                )
            probes.append((data, counter, result, scope.assigned, gradients))

        if tf.executing_eagerly():
            probe(self._few_samples())
        else:
            self._traced(probe)
        _, counter, result, assigned, gradients = probes[-1]
        self._check(result, counter.kinds, assigned)
        is_table = [isinstance(g, tf.IndexedSlices) for g in gradients]
        # The rows of one micro-batch on one replica are those of the whole batch.
        rows: list = [(table_rows.Rows.KEPT,) if t else () for t in is_table]
        if any(is_table) and not self.is_whole:
            rows = self._rows(probe, probes)
        return LossTrace(
            kinds=counter.kinds,
            state=assigned,
            rows=rows,
            is_known=is_table,
            connected={i for i, g in enumerate(gradients) if g is not None},
            values=keras.tree.map_structure(_spec, result.values),
            logs=keras.tree.map_structure(_spec, result.logs),
            has_weight=result.weight is not None and not self.is_whole,
        )

    def _traced(self, probe):
        """Traces a function of a micro-batch of any number of samples."""
        specs = keras.tree.map_structure(_spec_of_batch, self.data)
        tf.function(probe, autograph=False).get_concrete_function(specs)

    def _rows(self, probe, probes):
        """The `Rows` of each variable's gradient; none where it is added up densely.

        Args:
            probe: what was traced, or run eagerly.
            probes: list of what it found, to which each further trace adds.
        """
        is_eager = tf.executing_eagerly()
        if is_eager:
            # Only a graph tells where indices come from.
            self._traced(probe)
        data, *_, assigned, gradients = probes[-1]
        dependences = batch_dependence.Dependences(
            data,
            # A tensor from outside is the same for all micro-batches, but may not be for all
            # replicas.
            captured=lambda t: tf.is_tensor(t) and (_is_eager(t) or exchange.replicas() == 1),
            assigned=[_keras.variables.native(v).handle for v in assigned],
        )
        found: list = []
        for variable, gradient in zip(self.variables, gradients, strict=True):
            rows: Any = ()
            if isinstance(gradient, tf.IndexedSlices):
                rows = table_rows.classify(gradient, dependences)
                if is_eager and not isinstance(rows, batch_dependence.Mixed) and len(rows) > 1:
                    # Without a graph, the parts of a gradient cannot be told apart.
                    rows = batch_dependence.Mixed("run_eagerly=True")
            if isinstance(rows, batch_dependence.Mixed):
                table_rows.warn_of_added_rows(variable.path, rows.operation)
                rows = ()
            found.append(rows)
        return found

    def _warn_of_unseen_rows(self, gradients):
        """Warns of rows that nothing in the graph of the forward pass told of."""
        if self.compiled:
            return
        for variable, gradient, is_known in zip(
            self.variables, gradients, self.trace.is_known, strict=True
        ):
            if isinstance(gradient, tf.IndexedSlices) and not is_known:
                table_rows.warn_of_added_rows(variable.path, "a gradient of its own")

    def _few_samples(self):
        # Two, so that a size of one counts no samples.
        if self.samples > 0:
            return _keras.data.samples_of(self.data, 0, tf.minimum(self.samples, 2))
        return keras.tree.map_structure(
            lambda v: v if v is None else tf.zeros([2, *v.shape[1:]], v.dtype), self.data
        )

    def _check(self, result, kinds, assigned):
        _keras.losses.check_is_scalar(result.loss)
        if self.is_whole:
            return
        if result.weight is not None and any(k != "scalar" for k in kinds):
            raise errors.UnsupportedModelError(
                "`loss_denominator` is for losses that come back as scalars; Keras losses know "
                f"their own denominators. Received: both (reductions: {sorted(set(kinds))}). "
                "Remove the hook, or compute the whole loss in `compute_loss` from losses with "
                "reduction=None."
            )
        for variable in assigned:
            if any(variable is v for v in self.variables):
                raise errors.UnsupportedModelError(
                    "The forward pass must not assign a trainable variable when the batch is "
                    "split: every micro-batch would see other weights. Received: "
                    f"{variable.path}. Use gradient_accumulation_steps=1 on one replica."
                )

    def _run(self, step, carry):
        """Folds `step` over the micro-batches, compiled if asked for."""

        def run():
            if self.is_whole:
                return step(self.data, self.samples, carry)
            return batch_split.fold(
                self.split,
                self.data,
                step,
                carry,
                static_sizes=self.compiled,
                unrolled=self.unrolled,
                counted=self.counted,
            )

        if not self.compiled or self.is_inline:
            return run()
        # The exchange stays outside of what XLA compiles, and so does the case of no
        # samples, for which some operations have no XLA program.
        compiled = tf.function(run, jit_compile=True, autograph=False)
        if exchange.replicas() == 1:
            return compiled()
        return tf.cond(self.samples > 0, compiled, lambda: carry)

    def _uniform_micro_batch_size(self):
        """Whether all micro-batches are of one size, and which, or else one; scalars.

        Then they weigh one each, and gradients are added up without a multiplication, which is
        a pass over all of them. None, None where that is not worth asking: XLA multiplies and
        adds in one pass.
        """
        if self.is_whole or self.compiled or self.counted is not None or self.trace.has_weight:
            return None, None
        (large, larges), (small, smalls) = self.split.segments(self.samples)
        alike = tf.equal(larges, 0) | tf.equal(smalls, 0)
        return alike, tf.where(alike, tf.where(tf.equal(larges, 0), small, large), 1)

    def counts(self):
        """This replica's part of the denominators, a vector; None where they are not needed.

        Where masks or sample weights make them, this is a pass of its own over
        the micro-batches, forward only; TensorFlow prunes from it all that the
        denominators do not depend on.
        """
        if self.is_whole or not {"sum", "counted"} & set(self.trace.kinds):
            return None
        counts = [tf.cast(self.samples, self.dtype)]

        def count(micro_batch, size, carry):
            del size
            counter = denominators.LossCounter()
            with _keras.losses.intercepted_losses(counter), _keras.variables.VariableValues():
                self.loss_fn(micro_batch)
            return [a + tf.cast(b, self.dtype) for a, b in zip(carry, counter.counted, strict=True)]

        if number := self.trace.kinds.count("counted"):
            counts += self._run(count, [tf.zeros((), self.dtype)] * number)
        return tf.stack(counts)

    def accumulate(self, loss_scale=None, counts="exchanged"):
        """Runs the micro-batches.

        Args:
            loss_scale: float32 scalar, or None.
            counts: `counts()` of all replicas, summed; by default they are exchanged here.

        Returns:
            This replica's `AccumulatedGradients`.
        """
        if loss_scale is not None:
            loss_scale = tf.convert_to_tensor(loss_scale)
        if isinstance(counts, str):
            counts = exchange.exchange_counts(self.counts())
        whole = None if counts is None else denominators.Denominators(counts)
        state = self.trace.state
        before = [tf.convert_to_tensor(v.value) for v in state]
        connected = set(self.trace.connected)
        alike, unit = self._uniform_micro_batch_size()

        def step(micro_batch, size, carry):
            weight = tf.ones((), self.dtype) if self.is_whole else tf.cast(size, self.dtype)
            reducer = (
                None if self.is_whole else denominators.LossReducer(whole, weight, self.trace.kinds)
            )
            with tf.GradientTape() as tape:
                with (
                    _keras.losses.intercepted_losses(reducer),
                    _keras.variables.VariableValues(
                        zip(state, carry["state"], strict=True)
                    ) as scope,
                ):
                    result = self.loss_fn(micro_batch)
                loss = scaled_loss = tf.cast(result.loss, self.dtype)
                if loss_scale is not None:
                    scaled_loss = loss * tf.cast(loss_scale, self.dtype)
            gradients = tape.gradient(
                scaled_loss, [_keras.variables.native(v) for v in self.variables]
            )
            connected.update(i for i, g in enumerate(gradients) if g is not None)
            self._warn_of_unseen_rows(gradients)
            moments = carry["moments"]
            if self.measures_noise:
                moments += noise_scale.moments(
                    gradients, size, loss_scale, self.dtype, self.compiled
                )
            if self.trace.has_weight:
                weight = tf.cast(result.weight, self.dtype)
            elif alike is not None:
                weight = tf.where(alike, tf.ones_like(weight), weight)
            return {
                "gradients": accumulators.add(
                    carry["gradients"],
                    gradients,
                    weight,
                    alike,
                    tf.equal(carry["weight"], 0),
                ),
                "loss": carry["loss"] + weight * loss,
                "values": keras.tree.map_structure(
                    lambda total, value: total + weight * tf.cast(value, self.dtype),
                    carry["values"],
                    result.values,
                ),
                "weight": carry["weight"] + weight,
                "state": [scope.get_current_value(v) for v in state],
                "logs": keras.tree.map_structure(tf.convert_to_tensor, result.logs),
                "moments": moments,
            }

        zero = tf.zeros((), self.dtype)
        total = self._run(
            step,
            {
                "gradients": [
                    accumulators.start(v, rows)
                    for v, rows in zip(self.variables, self.trace.rows, strict=True)
                ],
                "loss": zero,
                "values": keras.tree.map_structure(lambda _: zero, self.trace.values),
                "weight": zero,
                "state": before,
                "logs": keras.tree.map_structure(
                    lambda spec: tf.zeros(spec.shape, spec.dtype), self.trace.logs
                ),
                "moments": tf.zeros([3 if self.measures_noise else 0], self.dtype),
            },
        )
        share = exchange.AccumulatedGradients(
            variables=self.variables,
            gradients=[
                accumulators.result(total["gradients"][i], v, self.trace.rows[i])
                if i in connected
                else None
                for i, v in enumerate(self.variables)
            ],
            rows=self.trace.rows,
            loss=total["loss"],
            values=total["values"],
            weight=total["weight"],
            samples=self.samples,
            state=[
                exchange.VariableUpdate(v, old, new, id(v) in self.metric_ids)
                for v, old, new in zip(state, before, total["state"], strict=True)
            ],
            logs=total["logs"],
            moments=total["moments"],
            loss_scale=loss_scale,
        )
        # On one replica, it does not matter in what the weights are counted.
        return share if alike is None or exchange.replicas() == 1 else share.times(unit)


# The operations whose gradient is a `tf.IndexedSlices`, or which may hold one of them.
_LOOK_UPS = frozenset(
    [
        *("Gather", "GatherNd", "GatherV2", "ResourceGather", "ResourceGatherNd"),
        *("Case", "If", "PartitionedCall", "StatefulPartitionedCall"),
        *("StatelessCase", "StatelessIf"),
    ]
)


def _is_eager(tensor):
    return hasattr(tensor, "numpy")


def _looks_up_rows():
    """Whether rows of a variable were looked up in the graph being traced.

    Only such variables have sparse gradients, and only for them is it worth to
    trace a backward pass that is not run.
    """
    operations = tf.compat.v1.get_default_graph().get_operations()
    return any(op.type in _LOOK_UPS for op in operations)


def _spec(value):
    if value is None:
        return None
    return tf.type_spec_from_value(tf.convert_to_tensor(value) if _is_number(value) else value)


def _spec_of_batch(value):
    """The specification of a batch of any number of samples."""
    if isinstance(value, tf.Tensor):
        return tf.TensorSpec([None, *value.shape[1:]], value.dtype)
    return _spec(value)


def _is_number(value):
    return not isinstance(value, tf.Tensor | tf.RaggedTensor | tf.SparseTensor)


def accumulate_gradients(
    loss_fn,
    variables,
    data,
    *,
    gradient_accumulation_steps=None,
    micro_batch_size=None,
    loss_scale=None,
    compiled=False,
):
    """Runs a loss function on the micro-batches of this replica's share.

    The first half of an update, for a `train_step` that a user writes alone;
    `tfbig.apply_gradients` is the second. The micro-batches run one after another
    in one `tf.while_loop`; nothing is exchanged and no variable is assigned
    before `apply_gradients`, which also writes back what the forward pass made of
    non-trainable Keras variables (moving statistics, seeds, metrics).

    Args:
        loss_fn: Function of a micro-batch, which has the structure of `data`.
            Returns a float scalar, or a pair of it and a dictionary of further
            float scalars that are to be reported. Scalars are taken as means over
            the samples of the micro-batch; Keras losses called inside know their
            own denominators.
        variables: List of trainable variables. Built, as everything that
            `loss_fn` uses.
        data: Structure of tensors of shape `(samples, ...)`.
        gradient_accumulation_steps: int, micro-batches per replica and update.
        micro_batch_size: int, samples per replica and micro-batch. Exactly one of
            the two may be given; neither means one micro-batch.
        loss_scale: The `loss_scale_state` of a model with
            `tfbig.DynamicLossScalingMixin`, or None.
        compiled: Whether XLA compiles the loop.

    Returns:
        An object to pass to `tfbig.apply_gradients`.

    Raises:
        InvalidOptionError: If an option is not valid.
        UnsupportedModelError: If the loss cannot be split exactly.

    Example:

    >>> w = keras.Variable([1.0, 2.0])
    >>> optimizer = keras.optimizers.SGD(1.0)
    >>> optimizer.build([w])
    >>> x = tf.constant([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    >>> share = tfbig.accumulate_gradients(
    ...     lambda x: tf.reduce_mean(tf.linalg.matvec(x, w)), [w], x, micro_batch_size=2
    ... )
    >>> update = tfbig.apply_gradients(optimizer, share)
    >>> float(update.loss), w.numpy().tolist()
    (3.0, [-2.0, 2.0])
    """
    variables = list(variables)
    if not variables:
        raise errors.InvalidOptionError(
            "`variables` must be a list of one trainable variable or more. Received: none of them. "
            "A model has no variables before it is built."
        )
    if gradient_accumulation_steps is None and micro_batch_size is None:
        gradient_accumulation_steps = 1
    split = batch_split.BatchSplit(gradient_accumulation_steps, micro_batch_size)
    own_step.accumulates(split, loss_scale)

    def wrapped(micro_batch):
        result = loss_fn(micro_batch)
        loss, values = result if isinstance(result, tuple | list) else (result, {})
        return Loss(tf.convert_to_tensor(loss), values=values)

    return MicroBatches(
        wrapped,
        data,
        split,
        variables,
        compiled=compiled,
    ).accumulate(None if loss_scale is None else loss_scale.loss_scale.value)
