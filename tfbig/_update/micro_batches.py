"""One replica's share of an update: its micro-batches, from the data to their sum."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._update import (
    accumulators,
    compiled_step,
    denominators,
    empty_batch,
    exchange,
    gathered_step,
    gathered_weights,
    lockstep_loop,
    loss_trace,
    micro_batch_loop,
    replicas,
    staged_step,
)
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.batch_split import BatchSplit
from tfbig._update.micro_batch_loop import Step
from tfbig._update.micro_batch_loss import LossFunction
from tfbig._update.micro_batch_step import MicroBatchStep, Totals
from tfbig._update.variable_update import VariableUpdate

__all__ = ("MicroBatches",)


class MicroBatches:
    """A replica's share of the effective batch, split, with its loss function.

    Args:
        loss_fn: Function of a micro-batch, returning a `MicroBatchLoss`.
        data: Structure of tensors `(samples, ...)`: the replica's share.
        split: How it is split.
        variables: Trainable variables whose gradients are wanted; may be empty.
        metric_variables: Variables that belong to metrics.
        compiled: Whether XLA compiles the loop.
        may_compile_each: Whether XLA may compile each micro-batch of several, where that is known
            to be faster on a CPU. A whole batch is left as Keras computes it.
        unrolled: Whether the loop is laid out.
        trace_scope: Makes the context in which the loss function is traced to
            see what it does.
        measures_noise: Whether to collect what the gradient noise scale needs.
        valid_samples: int32 scalar: how many of the samples, the first of them, are no padding,
            in a program that is compiled as a whole. None for all.
        in_flight: How many micro-batches may run at the same time, if layers lie on stages. None
            for what the variables' stages say.

    Attributes:
        is_whole_batch: Whether the share is the whole batch, in one micro-batch.
        trace: What the loss function does.
        compiles_each: Whether XLA compiles each micro-batch.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        data: _types.Structure,
        split: BatchSplit,
        variables: Iterable[keras.Variable],
        *,
        metric_variables: Iterable[keras.Variable] = (),
        compiled: bool = False,
        may_compile_each: bool = False,
        unrolled: bool = False,
        # Any: what the context yields is not used.
        trace_scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        measures_noise: bool = False,
        valid_samples: _types.Tensor | None = None,
        in_flight: int | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        # Then Keras's own reductions are those of the whole batch.
        self.is_whole_batch = split.never_splits and replicas.count() == 1 and valid_samples is None
        data = empty_batch.refuse_empty_data(data)
        self.data = data if self.is_whole_batch else _keras.batches.of_one_size(data)
        self.split = split
        self.variables = list(variables)
        self.metric_ids = {id(v) for v in metric_variables}
        # Then the loop is a part of a program that has static shapes throughout.
        self.is_inline = _keras.devices.is_compiled_as_a_whole()
        self.compiled = compiled or self.is_inline
        self.unrolled = unrolled
        self.measures_noise = measures_noise
        self.valid_samples = valid_samples
        samples = _keras.batches.batch_size(data) if valid_samples is None else valid_samples
        self.samples = tf.convert_to_tensor(samples, tf.int32)
        self.dtype = accumulators.widest(keras.config.floatx(), self.variables)
        in_flight = in_flight or _keras.stages.in_flight_of(self.variables)
        # Eagerly, devices take turns.
        self.is_staged = in_flight is not None and not tf.executing_eagerly()
        self.in_flight = (in_flight or 1) if self.is_staged else 1
        self._check_can_unroll()
        self.trace = loss_trace.LossTracer(
            loss_fn,
            self.data,
            self.samples,
            self.variables,
            is_whole_batch=self.is_whole_batch,
            compiled=self.compiled,
            scope=trace_scope,
        ).trace()
        self._check_can_gather()
        self.compiles_each = may_compile_each and self._is_each_worth_compiling()

    def exchanged_counts(self) -> _types.Tensor | None:
        """The denominators of the whole batch, see `counts`."""
        return exchange.all_reduce_counts(self.counts())

    def counts(self) -> _types.Tensor | None:
        """This replica's part of the denominators, a vector; None where they are not needed.

        Where masks or sample weights make them, this is a pass of its own over
        the micro-batches, forward only; TensorFlow prunes from it all that the
        denominators do not depend on.
        """
        if self.is_whole_batch or not {"sum", "counted"} & set(self.trace.kinds):
            return None
        found = [tf.cast(self.samples, self.dtype)]
        pieces = {id(v): v.own_piece() for v in self.trace.divided}

        def count(
            micro_batch: _types.Structure,
            size: _types.Tensor,
            totals: list[_types.Tensor],
            is_own: _types.Tensor | None = None,
        ) -> list[_types.Tensor]:
            del size
            counter = denominators.LossCounter()
            weights: gathered_weights.Gathering = gathered_weights.WeightStandIns([])
            if self.trace.counts_need_weights:
                weights = gathered_weights.GatheredWeights(pieces)
            with (
                _keras.losses.intercepted_losses(counter),
                _keras.variables.VariableValues(),
                _keras.thread.holding("gathering", weights),
            ):
                self.loss_fn(micro_batch)
            pairs = zip(totals, counter.counted, strict=True)
            added = [total + tf.cast(value, self.dtype) for total, value in pairs]
            if is_own is None:
                return added
            return [tf.where(is_own, a, b) for a, b in zip(added, totals, strict=True)]

        if number := self.trace.kinds.count("counted"):
            zeros = [tf.zeros((), self.dtype)] * number
            if self.trace.counts_need_weights and not self.unrolled:
                found += lockstep_loop.fold(self.split, self.data, count, zeros)
            else:
                with _keras.stages.following(self.is_staged):
                    found += self._for_each(count, zeros)
        return tf.stack(found)

    def accumulate(
        self, loss_scale: _types.Tensor | None, counts: _types.Tensor | None
    ) -> AccumulatedGradients:
        """Runs the micro-batches; assigns nothing.

        Args:
            loss_scale: float32 scalar, or None.
            counts: `counts()`, summed over all replicas.
        """
        if loss_scale is not None:
            loss_scale = tf.convert_to_tensor(loss_scale)
        is_uniform, size = self._uniform_micro_batch_size()
        step = self._kind_of_step()(
            self.loss_fn,
            self.variables,
            self.trace,
            self.dtype,
            is_whole_batch=self.is_whole_batch,
            whole_batch=None if counts is None else denominators.Denominators(counts),
            loss_scale=loss_scale,
            is_uniform=is_uniform,
            measures_noise=self.measures_noise,
            compiled=self.compiled,
        )
        with _keras.stages.following(self.is_staged):
            start = step.start()
            accumulated = self._accumulated(step, start, step.finish(self._run(step, start)))
            # On one replica, it does not matter in what the weights are counted.
            if size is None or replicas.count() == 1:
                return accumulated
            return accumulated.times(size)

    def _kind_of_step(self) -> type[MicroBatchStep]:
        if self.trace.divided:
            return gathered_step.GatheredStep
        if self.is_staged:
            return staged_step.StagedStep
        return compiled_step.CompiledStep if self.compiles_each else MicroBatchStep

    def _accumulated(
        self, step: MicroBatchStep, start: Totals, totals: Totals
    ) -> AccumulatedGradients:
        """The totals of all micro-batches, with what they belong to."""
        gradients = zip(totals["gradients"], self.variables, self.trace.rows, strict=True)
        state = zip(self.trace.state, start["state"], totals["state"], strict=True)
        return AccumulatedGradients(
            variables=self.variables,
            gradients=[
                accumulators.result(total, variable, rows) if i in step.connected else None
                for i, (total, variable, rows) in enumerate(gradients)
            ],
            rows=self.trace.rows,
            weight=totals["weight"],
            loss_scale=step.loss_scale,
            loss=totals["loss"],
            values=totals["values"],
            samples=self.samples,
            state=[
                VariableUpdate(variable, before, after, is_metric=id(variable) in self.metric_ids)
                for variable, before, after in state
            ],
            logs=totals["logs"],
            noise_moments=totals["noise_moments"],
        )

    def _run(self, step: MicroBatchStep, start: Totals) -> Totals:
        totals: Totals
        if not isinstance(step, gathered_step.GatheredStep):
            early = _exchanged_early if self._overlaps_with_exchange() else None
            totals = self._for_each(step, start, early)
        elif self.unrolled:
            totals = self._for_each(step.always, start)
        else:
            totals = lockstep_loop.fold(self.split, self.data, step.counting, start)
        return totals

    def _for_each(
        self,
        step: Step,
        start: _types.Structure,
        early: Callable[[_types.Structure], _types.Structure] | None = None,
    ) -> _types.Structure:
        """What `step` makes of `start`, micro-batch by micro-batch; compiled if asked for.

        Args:
            step: What is called.
            start: What it begins with.
            early: See `micro_batch_loop.fold`.
        """

        def run() -> _types.Structure:
            if self.is_whole_batch:
                return step(self.data, self.samples, start)
            return micro_batch_loop.fold(
                self.split,
                self.data,
                step,
                start,
                static_sizes=self.compiled,
                unrolled=self.unrolled,
                valid_samples=self.valid_samples,
                in_flight=self.in_flight,
                early=early,
            )

        if not self.compiled or self.is_inline:
            return run()
        # The exchange stays outside of what XLA compiles, and so does the case of no
        # samples, for which some operations have no XLA program.
        compiled = tf.function(run, jit_compile=True, autograph=False)
        if replicas.count() == 1:
            return compiled()
        return tf.cond(self.samples > 0, compiled, lambda: start)

    def _uniform_micro_batch_size(self) -> tuple[_types.Tensor | None, _types.Tensor | None]:
        """Whether all micro-batches are of one size, and which, or else one; scalars.

        Then they weigh one each, and gradients are added up without a multiplication, which is
        a pass over all of them. None, None where that is not worth asking: XLA multiplies and
        adds in one pass.
        """
        if (
            self.is_whole_batch
            or self.compiled
            or self.trace.divided
            or self.valid_samples is not None
            or self.trace.has_weight
        ):
            return None, None
        if (static := self.split.of_one_size(_keras.batches.batch_size(self.data))) is not None:
            return tf.constant(True), tf.constant(static[0])
        (large, larges), (small, smalls) = self.split.segments(self.samples)
        is_uniform = tf.equal(larges, 0) | tf.equal(smalls, 0)
        return is_uniform, tf.where(is_uniform, tf.where(tf.equal(larges, 0), small, large), 1)

    def _overlaps_with_exchange(self) -> bool:
        """Whether the exchange begins while the last micro-batch runs.

        On stages, it does anyway.
        """
        is_followed = bool(self.variables) and replicas.count() > 1
        return is_followed and not (self.compiled or self.is_staged or tf.executing_eagerly())

    # --- What goes together -----------------------------------------------------

    def _is_each_worth_compiling(self) -> bool:
        return (
            not (self.is_whole_batch or self.compiled)
            # The parts of a gradient are told apart in the graph that made them.
            and all(len(rows) <= 1 for rows in self.trace.rows)
            and self.trace.is_faster_compiled
        )

    def _check_can_gather(self) -> None:
        if self.trace.divided and (self.compiled or tf.executing_eagerly()):
            raise errors.UnsupportedModelError(
                "Divided weights are gathered from other replicas in a graph, not in an XLA "
                "program and not eagerly. Received: shard='weights' and "
                f"{'compiled=True' if self.compiled else 'eager execution'}. Use one of them."
            )

    def _check_can_unroll(self) -> None:
        if not self.unrolled:
            return
        if self.split.gradient_accumulation_steps is None:
            raise errors.UnsupportedModelError(
                "A model with synchronized layers, whose micro-batches exchange with other "
                "replicas, needs a fixed number of them. Received: "
                f"micro_batch_size={self.split.micro_batch_size}. Use gradient_accumulation_steps."
            )
        if self.valid_samples is not None:
            raise errors.UnsupportedModelError(
                "On a TPU, a model with synchronized layers needs batches of one size: the padding "
                "of a smaller one would enter the statistics. Received: data whose last batch may "
                "be smaller. Use drop_remainder=True, or leave samples out."
            )


def _exchanged_early(totals: Totals) -> _types.Structure:
    """What the exchange begins with. What is assigned waits for the rest."""
    return [totals["gradients"], totals["weight"]]
