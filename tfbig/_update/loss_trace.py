"""What a loss function does, found by tracing it once without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._keras.sharded_variable import ShardedWeight
from tfbig._update import (
    batch_dependence,
    denominators,
    gathered_weights,
    replicas,
    table_rows,
    xla_on_cpu,
)
from tfbig._update.micro_batch_loss import LossFunction, MicroBatchLoss
from tfbig._update.table_rows import Rows

__all__ = ("LossTrace", "LossTracer")


@dataclasses.dataclass
class LossTrace:
    """What tracing the loss of a micro-batch tells.

    Attributes:
        kinds: kinds of the Keras losses, in the order of the calls.
        state: variables that the forward pass assigns.
        assignments: names of the operations that assign a `tf.Variable`, which nothing holds back.
        rows: for each trainable variable the `Rows` of the parts of its gradient; none
            where it is added up densely.
        has_rows: for each of them, whether its gradient was seen to have rows.
        added_rows: paths of those whose gradient has rows that XLA adds up.
        connected: indices of trainable variables that have a gradient, as far as known: in a
            graph, `MicroBatchStep` finds the others.
        values: structure of specs of the further values.
        logs: structure of specs of the logs.
        has_weight: whether the loss function says the weight of a micro-batch.
        divided: the weights that are read and divided over the replicas.
        narrow_dtypes: the dtypes in which some of them travel, by their identities.
        counts_need_weights: whether the denominators of losses depend on them.
        is_faster_compiled: whether XLA on a CPU is expected to compute a micro-batch faster.
        coupled_by: types of the operations by which the loss is known not to be a mean over the
            samples of a batch that is split; none where it is one, or not known not to be.
    """

    kinds: list[str]
    state: list[keras.Variable]
    assignments: list[str]
    rows: list[tuple[Rows, ...]]
    has_rows: list[bool]
    added_rows: list[str]
    connected: set[int]
    values: _types.Structure
    logs: _types.Structure
    has_weight: bool
    divided: list[ShardedWeight]
    narrow_dtypes: dict[int, _types.DType]
    counts_need_weights: bool
    is_faster_compiled: bool
    coupled_by: frozenset[str]


@dataclasses.dataclass
class _Probe:
    """What one trace of the loss function found."""

    data: _types.Structure
    result: MicroBatchLoss
    kinds: list[str]
    reductions: list[tuple[str, _types.Tensor, _types.Tensor]]
    assigned: list[keras.Variable]
    gradients: list[_types.Gradient | None]
    divided: list[ShardedWeight]
    narrow_dtypes: dict[int, _types.DType]
    counts_need_weights: bool
    operations: list[tf.Operation]


class LossTracer:
    """Traces the loss function of micro-batches, and refuses what cannot be split.

    Args:
        loss_fn: function of a micro-batch.
        data: structure of tensors `(samples, ...)`: the replica's share of the batch.
        samples: int32 scalar, samples of the share.
        variables: trainable variables whose gradients are wanted.
        is_whole_batch: whether the share is the whole batch, in one micro-batch.
        compiled: whether XLA compiles the micro-batches.
        scope: makes the context in which the loss function is traced.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        data: _types.Structure,
        samples: _types.Tensor,
        variables: list[keras.Variable],
        *,
        is_whole_batch: bool,
        compiled: bool,
        scope: Callable[[], AbstractContextManager[Any]],  # Any: what it yields is not used.
    ) -> None:
        self.loss_fn = loss_fn
        self.data = data
        self.samples = samples
        self.variables = variables
        self.is_whole_batch = is_whole_batch
        self.compiled = compiled
        self.scope = scope
        self._probes: list[_Probe] = []

    def trace(self) -> LossTrace:
        """Traces the loss function, and where needed its gradient."""
        if tf.executing_eagerly():
            self._probe(self._few_samples())
        else:
            self._probe_in_graph()
        probe = self._probes[-1]
        self._check(probe)
        has_rows = [isinstance(g, tf.IndexedSlices) for g in probe.gradients]
        added_rows = []
        if self.compiled and not tf.executing_eagerly():
            pairs = zip(self.variables, has_rows, strict=True)
            added_rows = [variable.path for variable, has in pairs if has]
            has_rows = [False] * len(has_rows)
        # The rows of one micro-batch on one replica are those of the whole batch.
        rows: list[tuple[Rows, ...]] = [(Rows.KEPT,) if has else () for has in has_rows]
        if any(has_rows) and not self.is_whole_batch:
            rows = self._rows()
        return LossTrace(
            kinds=probe.kinds,
            state=probe.assigned,
            assignments=[o.name for o in probe.operations if o.type in _ASSIGNMENTS],
            rows=rows,
            has_rows=has_rows,
            added_rows=added_rows,
            connected={i for i, g in enumerate(probe.gradients) if g is not None},
            values=keras.tree.map_structure(_spec, probe.result.values),
            logs=keras.tree.map_structure(_spec, probe.result.logs),
            has_weight=probe.result.weight is not None and not self.is_whole_batch,
            divided=probe.divided,
            narrow_dtypes=probe.narrow_dtypes,
            counts_need_weights=probe.counts_need_weights,
            # Not the operations: they keep the graph.
            is_faster_compiled=xla_on_cpu.is_faster(probe.operations, self.data),
            coupled_by=self._coupled_by(probe),
        )

    def _probe(self, data: _types.Structure) -> None:
        samples = _keras.batches.batch_size(data)
        counter = denominators.LossCounter(samples if isinstance(samples, int) else None)
        weights = gathered_weights.WeightStandIns(self.variables)
        with (
            self.scope(),
            tf.GradientTape() as tape,
            _keras.losses.intercepted_losses(counter),
            _keras.variables.VariableValues() as values,
            _keras.thread.holding("gathering", weights),
        ):
            tape.watch(weights.tensors())
            result = self.loss_fn(data)
        operations = [] if tf.executing_eagerly() else _operations()
        gradients: list[_types.Gradient | None] = [None] * len(self.variables)
        if tf.executing_eagerly() or weights.read or _look_up_rows(operations):
            gradients = tape.gradient(result.loss, weights.gradient_sources(self.variables))
        self._probes.append(
            _Probe(
                data=data,
                result=result,
                kinds=counter.kinds,
                reductions=counter.reductions,
                assigned=values.assigned,
                gradients=gradients,
                divided=weights.read,
                narrow_dtypes=weights.narrow_dtypes(),
                counts_need_weights=weights.are_needed_for(counter.counted),
                operations=operations,
            )
        )

    def _probe_in_graph(self) -> None:
        """Traces the loss of a micro-batch of any number of samples."""
        specs = keras.tree.map_structure(_spec_of_batch, self.data)
        tf.function(self._probe, autograph=False).get_concrete_function(specs)

    def _few_samples(self) -> _types.Structure:
        # Two, so that a size of one counts no samples.
        if self.samples > 1:
            return _keras.batches.slice_samples(self.data, 0, 2)
        two_of = _twice if self.samples > 0 else _two_samples_like
        return keras.tree.map_structure(two_of, self.data)

    def _check(self, probe: _Probe) -> None:
        _keras.losses.check_is_scalar(probe.result.loss)
        if made := [v.path for v in probe.assigned if not _keras.variables.is_created(v)]:
            raise errors.UnsupportedModelError(
                "The loss function must not make variables, which would be those of one "
                f"micro-batch. Received: {', '.join(made)}. Build layers and metrics before: call "
                "them once, or `compute_metrics` of the model, on a few samples."
            )
        if self.is_whole_batch:
            return
        if probe.result.weight is not None and any(k != "scalar" for k in probe.kinds):
            raise errors.UnsupportedModelError(
                "`loss_denominator` is for losses that come back as scalars; Keras losses know "
                "their own denominators. Received: both (reductions: "
                f"{sorted(set(probe.kinds))}). Remove the hook, or compute the whole loss in "
                "`compute_loss` from losses with reduction=None."
            )
        own = getattr(probe.result.loss, "graph", None)
        for kind, _, reduced in probe.reductions:
            if kind in ("sum", "counted") and _is_in_function(reduced, own):
                raise errors.UnsupportedModelError(
                    "A loss must not be reduced in a tf.function of its own when the batch is "
                    "split: TensorFlow would trace it once, without the denominators of the whole "
                    "batch. Received: a Keras loss that is a sum, or is divided by weights or a "
                    "mask. Call it outside of tf.function, which `fit` makes of all anyway."
                )
        for variable in probe.assigned:
            if any(variable is v for v in self.variables):
                raise errors.UnsupportedModelError(
                    "The forward pass must not assign a trainable variable when the batch is "
                    "split: every micro-batch would see other weights. Received: "
                    f"{variable.path}. Use gradient_accumulation_steps=1 on one replica."
                )

    def _coupled_by(self, probe: _Probe) -> frozenset[str]:
        if self.is_whole_batch or tf.executing_eagerly() or not self.variables:
            return frozenset()
        graph = getattr(probe.result.loss, "graph", None)
        if graph is None:
            return frozenset()
        # What was made outside of the graph is the same for all batches; of what is made in a
        # conditional, nothing is known.
        reductions = [
            r for r in probe.reductions if all(getattr(t, "graph", None) is graph for t in r[1:])
        ]
        losses = [(kind == "sum", values) for kind, values, _ in reductions]
        if probe.result.weight is None:
            losses.append((False, probe.result.loss))
        dependences = self._dependences(
            probe,
            # What is made of them for the whole batch is right.
            known={reduced.name: batch_dependence.MEAN for _, _, reduced in reductions},
            are_draws_joined=True,
        )
        found = [(is_summed, dependences.of(loss)) for is_summed, loss in losses]
        return frozenset(
            d.operation
            for is_summed, d in found
            if isinstance(d, batch_dependence.Coupled)
            or (isinstance(d, batch_dependence.Total) and d.is_mean == is_summed)
        )

    def _dependences(self, probe: _Probe, **options: Any) -> batch_dependence.Dependences:
        """How the tensors of a probe's graph depend on the batch."""
        return batch_dependence.Dependences(
            probe.data,
            # A tensor from outside is the same for all micro-batches, but may not be for all
            # replicas.
            captured=lambda t: tf.is_tensor(t) and (_is_eager(t) or replicas.count() == 1),
            assigned=[_keras.variables.native(v).handle for v in probe.assigned],
            **options,
        )

    def _rows(self) -> list[tuple[Rows, ...]]:
        """The `Rows` of each variable's gradient; none where it is added up densely."""
        is_eager = tf.executing_eagerly()
        if is_eager:
            # Only a graph tells where indices come from.
            self._probe_in_graph()
        probe = self._probes[-1]
        dependences = self._dependences(probe)
        return [
            self._rows_of(variable, gradient, dependences, is_eager)
            for variable, gradient in zip(self.variables, probe.gradients, strict=True)
        ]

    def _rows_of(
        self,
        variable: keras.Variable,
        gradient: _types.Gradient | None,
        dependences: batch_dependence.Dependences,
        is_eager: bool,
    ) -> tuple[Rows, ...]:
        if not isinstance(gradient, tf.IndexedSlices):
            return ()
        rows = table_rows.classify(gradient, dependences)
        if is_eager and not isinstance(rows, batch_dependence.Mixed) and len(rows) > 1:
            # Without a graph, the parts of a gradient cannot be told apart.
            rows = batch_dependence.Mixed("run_eagerly=True")
        if isinstance(rows, batch_dependence.Mixed):
            table_rows.warn_of_added_rows(variable.path, rows.operation)
            return ()
        return rows


# The operations whose gradient is a `tf.IndexedSlices`, or which may hold one of them.
_LOOK_UPS = frozenset(
    [
        *("Gather", "GatherNd", "GatherV2", "ResourceGather", "ResourceGatherNd"),
        *("Case", "If", "PartitionedCall", "StatefulPartitionedCall"),
        *("StatelessCase", "StatelessIf"),
    ]
)


_ASSIGNMENTS = frozenset(
    [
        *("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"),
        *("ResourceScatterUpdate", "ResourceScatterAdd", "ResourceScatterSub"),
        *("ResourceScatterNdUpdate", "ResourceScatterNdAdd", "ResourceScatterNdSub"),
    ]
)


def _look_up_rows(operations: list[tf.Operation]) -> bool:
    """Whether rows of a variable are looked up.

    Only such variables have sparse gradients, and only for them is it worth tracing a backward
    pass that does not run.
    """
    # What is looked up in a table of integers, such as a shape, has no gradient.
    return any(
        o.type in _LOOK_UPS and not (o.inputs[0].dtype.is_integer and o.type == "GatherV2")
        for o in operations
    )


def _operations() -> list[tf.Operation]:
    """Those that have been traced into the graph so far."""
    found: list[tf.Operation] = tf.compat.v1.get_default_graph().get_operations()
    return found


def _is_in_function(tensor: _types.Tensor, graph: _types.Structure) -> bool:
    """Whether a tensor was made in a function that a graph calls; not in its conditionals."""
    inner = getattr(tensor, "graph", None)
    while inner is not None and inner is not graph:
        if type(inner) is tf.__internal__.FuncGraph:
            return True
        inner = getattr(inner, "outer_graph", None)
    return False


def _is_eager(tensor: _types.Tensor) -> bool:
    return hasattr(tensor, "numpy")


def _spec(value: object) -> tf.TypeSpec | None:
    if value is None:
        return None
    return tf.type_spec_from_value(tf.convert_to_tensor(value) if _is_number(value) else value)


def _spec_of_batch(value: object) -> tf.TypeSpec | None:
    """The specification of a batch of any number of samples."""
    if isinstance(value, tf.Tensor):
        return tf.TensorSpec([None, *value.shape[1:]], value.dtype)
    return _spec(value)


def _twice(value: _types.Structure) -> _types.Structure:
    """Two samples that are the same one."""
    if value is None:
        return None
    if isinstance(value, tf.SparseTensor):
        return tf.sparse.concat(0, [value, value])
    return tf.concat([value, value], 0)


def _two_samples_like(value: _types.Structure) -> _types.Structure:
    """Two samples in place of none: of zeros, or of no values."""
    if value is None:
        return None
    if isinstance(value, tf.RaggedTensor):
        return tf.RaggedTensor.from_row_splits(value.values, tf.zeros([3], value.row_splits.dtype))
    if isinstance(value, tf.SparseTensor):
        shape = tf.concat([[2], value.dense_shape[1:]], 0)
        return tf.SparseTensor(value.indices, value.values, shape)
    return tf.zeros([2, *value.shape[1:]], value.dtype)


def _is_number(value: object) -> bool:
    return not isinstance(value, tf.Tensor | tf.RaggedTensor | tf.SparseTensor)
