"""The one exchange between the replicas in an update."""

import dataclasses
import functools

import keras
import tensorflow as tf

from tfbig import _keras, errors
from tfbig._update import accumulators, table_rows

__all__ = (
    "all_reduce_sum",
    "checked_dtype",
    "exchange_counts",
    "replicas",
)


def replicas():
    """Number of replicas of the current strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def replicas_of(model):
    """Number of replicas of a model's strategy."""
    return model.distribute_strategy.num_replicas_in_sync


def all_reduce_sum(tensors):
    """Sums a list of tensors over all replicas in one exchange."""
    if replicas() == 1 or not tensors:
        return list(tensors)
    # Outputs of loops are on no device, of which an exchange over workers complains.
    tensors = [tf.identity(t) for t in tensors]
    return list(tf.distribute.get_replica_context().all_reduce("SUM", tensors))


def exchange_counts(counts):
    """Sums what `MicroBatches.counts` returned over all replicas."""
    return None if counts is None else all_reduce_sum([counts])[0]


@dataclasses.dataclass
class VariableUpdate:
    """What the micro-batches of a replica made of one non-trainable variable.

    Attributes:
        variable: `keras.Variable`.
        before: tensor, its value before the first micro-batch.
        after: tensor, its value after the last.
        is_metric: whether it belongs to a metric, whose value is the sum over the
            replicas.
    """

    variable: keras.Variable
    before: tf.Tensor
    after: tf.Tensor
    is_metric: bool


@dataclasses.dataclass
class AccumulatedGradients:
    """A replica's share of the effective batch, or, exchanged, all of it.

    Attributes:
        variables: list of trainable variables.
        gradients: list of tensors of float32 or wider, the sum over micro-batches
            of weight times gradient of the scaled loss; None where the loss does
            not depend on the variable. Of a table that is looked up, `tf.IndexedSlices`
            whose indices are keys (see `table_rows`); exchanged, whose indices are indices.
        rows: list, the `Rows` of each gradient.
        loss: float scalar, sum of weight times (unscaled) loss.
        values: structure of float scalars, likewise summed.
        weight: float scalar, sum of the weights of the micro-batches: samples, or another unit
            that gradients, loss and values share.
        samples: int32 scalar.
        state: list of `VariableUpdate`.
        logs: structure of the last micro-batch's logs; exchanged, their mean over
            the replicas.
        moments: float vector, sums over the micro-batches of what the gradient noise scale
            needs; without it, of no elements.
        loss_scale: float32 scalar, or None.
        stop: float scalar, 1 if this replica's worker asks to stop; exchanged, the
            sum. Or None.
    """

    variables: list
    gradients: list
    rows: list
    loss: tf.Tensor
    values: list | dict
    weight: tf.Tensor
    samples: tf.Tensor
    state: list
    logs: dict
    moments: tf.Tensor
    loss_scale: tf.Tensor | None
    stop: tf.Tensor | None = None

    def times(self, unit):
        """The same with weights that were counted in this unit, an integer scalar."""

        def times(value):
            return value * tf.cast(unit, value.dtype)

        return dataclasses.replace(
            self,
            gradients=[accumulators.map_values(times, g) for g in self.gradients],
            loss=times(self.loss),
            values=tf.nest.map_structure(times, self.values),
            weight=times(self.weight),
        )

    def _fields(self):
        """What is made of tensors: the rest is the same in every graph."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["variables"], fields["rows"]
        return fields | {"state": [(c.before, c.after) for c in self.state]}

    def tensors(self):
        """List of all tensors, to be handed from one graph to another."""
        leaves = tf.nest.flatten(self._fields(), expand_composites=True)
        return [t for t in leaves if t is not None]

    def with_tensors(self, tensors):
        """The same with others in place of the tensors that `tensors` returned."""
        fields, rest = self._fields(), iter(tensors)
        leaves = tf.nest.flatten(fields, expand_composites=True)
        fields = tf.nest.pack_sequence_as(
            fields, [t if t is None else next(rest) for t in leaves], expand_composites=True
        )
        state = [
            dataclasses.replace(change, before=before, after=after)
            for change, (before, after) in zip(self.state, fields.pop("state"), strict=True)
        ]
        return dataclasses.replace(self, state=state, **fields)


def checked_dtype(value):
    """Returns the option `exchange_dtype`, checked: "float16", "bfloat16" or None."""
    if value is None:
        return None
    try:
        name = tf.as_dtype(value).name
    except TypeError:
        name = None
    if name not in ("float16", "bfloat16"):
        raise errors.InvalidOptionError(
            "`exchange_dtype` must be 'bfloat16', 'float16' or None, which exchanges gradients as "
            f"they are. Received: exchange_dtype={value!r}."
        )
    return name


def _sum_in(dtype, gradients, weight, is_checked):
    """Sums gradients over the replicas in half precision.

    Divided by the weight before, or they might not fit into it; multiplied after.
    """

    def narrow(values):
        return tf.cast(tf.math.divide_no_nan(values, tf.cast(weight, values.dtype)), dtype)

    def widen(values, wide):
        return tf.cast(values, wide) * tf.cast(weight, wide)

    def as_bits(gradient, dtype):
        # Rows are gathered, not added, which TensorFlow does not do in bfloat16.
        is_sparse = isinstance(gradient, tf.IndexedSlices)
        return (
            accumulators.map_values(lambda v: tf.bitcast(v, dtype), gradient)
            if is_sparse
            else gradient
        )

    narrowed = [as_bits(accumulators.map_values(narrow, g), tf.float16) for g in gradients]
    sums = [as_bits(g, dtype) for g in all_reduce_sum(narrowed)]
    if is_checked:
        # With a loss scale, the update is skipped.
        finite = [tf.reduce_all(tf.math.is_finite(accumulators.values(g))) for g in sums]
        with _after(tf.debugging.Assert(tf.reduce_all(finite), [_keras.trainer.OVERFLOW])):
            sums = [accumulators.map_values(tf.identity, g) for g in sums]
    return [
        accumulators.map_values(functools.partial(widen, wide=g.dtype), s)
        for s, g in zip(sums, gradients, strict=True)
    ]


def checked_data(data):
    """The data, refused if it holds no sample.

    A replica's share may be empty, the batch of all replicas may not; `all_reduce_accumulated`
    looks at that.
    """
    if replicas() > 1:
        return data
    samples = _keras.data.batch_size(data)
    if isinstance(samples, int) and samples == 0:
        raise errors.InvalidOptionError(_keras.data.NO_SAMPLES)
    # Else the update could run before the assertion fails.
    with _after(tf.debugging.assert_positive(samples, _keras.data.NO_SAMPLES)):
        return tf.nest.map_structure(
            lambda v: v if v is None else tf.identity(v), data, expand_composites=True
        )


def _after(assertion):
    return tf.control_dependencies([] if assertion is None else [assertion])


def _cast(gradient, dtype):
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.cast(gradient, dtype)


def all_reduce_accumulated(share, exchange_dtype=None):
    """Sums what the replicas accumulated, in one exchange.

    Moving statistics (floating-point state) become the mean over the replicas
    that had samples. Counters and seeds (integers) advance as on replica 0. A
    metric's sum is shared out, so that every replica knows all of it.

    Args:
        share: `AccumulatedGradients` of this replica, in replica context.
        exchange_dtype: str, what gradients are cast to for the exchange, or None. Then what
            they are divided by is exchanged before them.

    Returns:
        `AccumulatedGradients` of the effective batch, the same on every replica.
    """
    if replicas() == 1:
        return _with_rows_added_up(share)
    context = tf.distribute.get_replica_context()
    dtype = share.loss.dtype
    has_samples = tf.cast(share.samples > 0, dtype)
    is_first = tf.cast(tf.equal(context.replica_id_in_sync_group, 0), dtype)
    samples = tf.cast(share.samples, dtype)
    logs = [has_samples * tf.cast(v, dtype) for v in tf.nest.flatten(share.logs)]
    values = tf.nest.flatten(share.values)
    stop = tf.zeros((), dtype) if share.stop is None else tf.cast(share.stop, dtype)
    scalars = [share.loss, share.weight, has_samples, samples, stop, *values, *logs]
    scalars = tf.concat([tf.stack(scalars), share.moments], 0)

    def message(change):
        if change.is_metric:
            return tf.cast(change.after, dtype)
        if change.variable.dtype.startswith(("float", "bfloat")):
            return has_samples * tf.cast(change.after, dtype)
        # The advance is small; the value (a seed) may not fit into a float.
        return is_first * tf.cast(change.after - change.before, dtype)

    def is_shared(change):
        return not change.is_metric or _keras.variables.is_summed(change.variable)

    connected = [g for g in share.gradients if g is not None]
    rest = [scalars, *map(message, filter(is_shared, share.state))]
    if exchange_dtype is None:
        # Of one dtype, the widest, so that all go in one package.
        summed = all_reduce_sum([*(_cast(g, dtype) for g in connected), *rest])
        gradients, (scalars, *messages) = summed[: -len(rest)], summed[-len(rest) :]
    else:
        # What the gradients are divided by goes before them, and in float32.
        scalars, *messages = all_reduce_sum(rest)
        is_checked = share.loss_scale is None
        gradients = _sum_in(exchange_dtype, connected, scalars[1], is_checked)

    gradients, messages = iter(gradients), iter(messages)
    loss, weight, active, samples, stop, *rest = tf.unstack(scalars)
    values, rest = rest[: len(values)], rest[len(values) :]
    logs, moments = rest[: len(logs)], rest[len(logs) :]
    with _after(tf.debugging.assert_positive(active, _keras.data.NO_SAMPLES)):
        weight = tf.identity(weight)

    def received(change):
        if not is_shared(change):
            return change
        value = next(messages)
        if change.is_metric:
            after = tf.cast(value / context.num_replicas_in_sync, change.after.dtype)
        elif change.variable.dtype.startswith(("float", "bfloat")):
            after = tf.cast(value / active, change.after.dtype)
        else:
            after = change.before + tf.cast(value, change.before.dtype)
        return dataclasses.replace(change, after=after)

    batch = dataclasses.replace(
        share,
        gradients=[None if g is None else _cast(next(gradients), g.dtype) for g in share.gradients],
        loss=loss,
        values=tf.nest.pack_sequence_as(share.values, values),
        weight=weight,
        samples=tf.cast(samples, tf.int32),
        state=[received(c) for c in share.state],
        logs=tf.nest.pack_sequence_as(share.logs, [v / active for v in logs]),
        moments=tf.stack(moments) if moments else share.moments,
        stop=None if share.stop is None else stop,
    )
    return _with_rows_added_up(batch)


def _with_rows_added_up(share):
    """The same, of tables the rows that the whole batch has."""

    def added_up(gradient, rows, variable):
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient
        summed = table_rows.add_up(gradient, rows, variable.shape[0], replicas())
        # An exchange forgets the shape, which optimizers such as Muon ask for while tracing.
        shape = tf.constant(variable.shape.as_list(), tf.int64)
        values = tf.ensure_shape(summed.values, [None, *variable.shape[1:]])
        return tf.IndexedSlices(values, summed.indices, shape)

    gradients = map(added_up, share.gradients, share.rows, share.variables)
    return dataclasses.replace(share, gradients=list(gradients))
