"""The only `train_step`, and its two halves.

global batch ── strategy ──> replica's share ── split ──> micro-batches
  for each micro-batch:   forward, loss x scale, backward,
                          add to float32 accumulators, metrics
  one exchange:           gradients + loss sums + weights + replica-local state
  finite everywhere?      yes: / weight, / scale, clip, apply once
                          no : skip, back off, count
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbig import _keras, _log, _types, errors
from tfbig._update import (
    apply,
    attention_option,
    empty_batch,
    exchange,
    exchange_and_apply,
    gathered_weights,
    head_option,
    inexact,
    option,
    own_step,
    recomputation,
    replicas,
    retried_batches,
    sharded_weights,
    staged_prediction,
    step_inheritance,
    training_checks,
)
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.apply import Update
from tfbig._update.batch_split import BatchSplit
from tfbig._update.loss_scale import LossScaleState
from tfbig._update.micro_batch_loss import LossFunction, MicroBatchLoss
from tfbig._update.micro_batches import MicroBatches
from tfbig._update.stop_request import StopRequest

__all__ = ("TrainStep",)


class TrainStep(training_checks.TrainingChecks):
    """The step of both mixins: overrides `train_step` and `test_step`.

    Not part of the public interface; `GradientAccumulationMixin` says how the
    batch is split, `DynamicLossScalingMixin` whether the loss is scaled.
    """

    _stop_request: StopRequest | None = None
    # That of `DynamicLossScalingMixin`; None without scaling.
    loss_scale_state: LossScaleState | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:  # Any: those of other base classes.
        super().__init_subclass__(**kwargs)
        step_inheritance.check_mixin_order(cls, TrainStep)
        step_inheritance.keep_extended_steps(cls, TrainStep)

    def loss_denominator(
        self,
        x: _types.Structure,
        y: _types.Structure,
        y_pred: _types.Structure,
        sample_weight: _types.Structure,
    ) -> _types.Tensor | None:
        """What a scalar loss of a micro-batch was divided by.

        Override it where an overridden `compute_loss` returns a mean over something else than
        samples, such as the valid tokens of a language model. Keras losses, which know their own
        denominators, do not need it.

        Args:
            x: Inputs of the micro-batch.
            y: Targets of the micro-batch.
            y_pred: Outputs of the model.
            sample_weight: Sample weights, or None.

        Returns:
            A scalar; or None, the default, for the number of samples.
        """
        del x, y, y_pred, sample_weight
        return None

    @property
    def stop_request(self) -> StopRequest | None:
        """The `StopRequest` of callbacks; None before the first, or without other workers."""
        return self._stop_request

    @stop_request.setter
    def stop_request(self, value: StopRequest | None) -> None:
        if value is not self._stop_request:
            self._stop_request = value
            self._rebuild_step()

    # --- Training ----------------------------------------------------------------

    def _make_train_function(self) -> _types.AnyFunction:
        state = self.loss_scale_state
        if state is None or not state.is_retrying:
            return super()._make_train_function()
        if self._has_own_step:
            raise errors.InvalidOptionError(retried_batches.NEEDS_TFBIG_STEP)
        return retried_batches.RetryingStepFunction(
            self, self._checked_train_step(), is_training=True
        )

    @_keras.replica_step.returns_global_logs
    def train_step(self, data: _types.Structure) -> _types.Logs:
        """One update, with this replica's share of the effective batch."""
        own_step.uses_all()
        apply.check_optimizer(self.optimizer)
        self._build_in_step(data)
        apply.build_optimizer(self.optimizer, self.trainable_variables)
        split = self._batch_split()
        needs_tfbig_step = self.loss_scale_state is not None or self._needs_tfbig_in("train_step")
        if not needs_tfbig_step and self._is_step_of_keras(split, data):
            return self._run_keras_step(super().train_step, data)
        if not self.trainable_variables:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        micro_batches = self._micro_batches(data, split, training=True)
        local_gradients = self._accumulate(micro_batches, micro_batches.exchanged_counts())
        return self._exchange_and_apply(local_gradients)

    def _accumulate(
        self, micro_batches: MicroBatches, counts: _types.Tensor | None
    ) -> AccumulatedGradients:
        """The first half of an update, on this replica; assigns nothing.

        Args:
            micro_batches: this replica's.
            counts: denominators of the whole batch, see `MicroBatches.counts`.
        """
        state = self.loss_scale_state
        return micro_batches.accumulate(None if state is None else state.loss_scale.value, counts)

    def _exchange_and_apply(self, local_gradients: AccumulatedGradients) -> _types.Logs:
        """The second half: exchanges, applies or skips, and returns the logs."""
        update = exchange_and_apply.exchange_and_apply(
            self.optimizer,
            local_gradients,
            self.loss_scale_state,
            needs_norm=self.log_grad_norm or self.log_gradient_noise_scale,
            exchange_dtype=self.exchange_dtype,
            bucket_bytes=self.exchange_bucket_bytes,
            stop_request=self.stop_request,
            guard=self.update_guard,
        )
        logs = self._report(update)
        if self.loss_scale_state is not None:
            logs |= self.loss_scale_state.logs()
        if self.log_grad_norm:
            logs["grad_norm"] = update.gradient_norm
        if self.noise_scale_state is not None:
            with _keras.variables.assigned_locally(self.noise_scale_state.variables()):
                logs["gradient_noise_scale"] = self.noise_scale_state.update(update)
        return logs

    # --- Evaluation --------------------------------------------------------------

    @_keras.replica_step.returns_global_logs
    def test_step(self, data: _types.Structure) -> _types.Logs:
        """Evaluates this replica's share of a batch, micro-batch by micro-batch."""
        self._build_in_step(data)
        split = self._evaluation_split()
        if self._is_step_of_keras(split, data):
            return self._run_keras_step(super().test_step, data)
        micro_batches = self._micro_batches(data, split, training=False)
        local = micro_batches.accumulate(None, micro_batches.exchanged_counts())
        return self._report(apply.assign_without_gradients(exchange.all_reduce_accumulated(local)))

    def predict_step(self, data: _types.Structure) -> _types.Structure:
        """Predicts for this replica's share of a batch."""
        step = functools.partial(self._predict, super().predict_step)
        # A model that is built now must not be built in a trace that tells of its outputs.
        if self.pipeline is not None and self.built:
            split = self._evaluation_split()
            if split.never_splits:
                # So many that the stages are busy most of the time.
                split = BatchSplit(gradient_accumulation_steps=4 * len(self.pipeline.devices))
            return staged_prediction.predict(step, data, split, self.pipeline.in_flight)
        with gathered_weights.in_prediction(
            self.weights, sharded_weights.layers_to_recompute(self)
        ):
            return step(data)

    def _predict(
        self, step: Callable[[_types.Structure], _types.Structure], data: _types.Structure
    ) -> _types.Structure:
        with attention_option.in_chunks(self, self.attention_chunk_size):
            return step(data)

    # --- Keras's own step ----------------------------------------------------------

    def _is_step_of_keras(self, split: BatchSplit, data: _types.Structure = None) -> bool:
        """Whether Keras's own step does it, number for number."""
        is_padded = isinstance(data, _keras.padding.PaddedBatch)
        needs_tfbig = is_padded or self._needs_tfbig_in("test_step")
        return split.never_splits and replicas.count() == 1 and not needs_tfbig

    def _run_keras_step(
        self, step: Callable[[_types.Structure], _types.Logs], data: _types.Structure
    ) -> _types.Logs:
        """Runs a step of Keras, compiled by XLA if asked for."""
        data = empty_batch.refuse_empty_data(data)
        if self.jit_compile and not _keras.devices.is_compiled_as_a_whole():
            step = tf.function(step, jit_compile=True, autograph=False)
        # An optimizer's counter does not depend on the data otherwise.
        with tf.control_dependencies(
            [v for v in tf.nest.flatten(data, expand_composites=True) if v is not None]
        ):
            return step(data)

    @property
    def _has_own_step(self) -> bool:
        return getattr(self.train_step, "__func__", None) is not TrainStep.train_step

    @classmethod
    def _owner_of_extended_train_step(cls) -> type | None:
        owner = step_inheritance.owner_of_extended_step(cls, TrainStep, "train_step")
        is_run = owner is not None and cls.train_step is vars(owner)["train_step"]
        return owner if is_run else None

    # --- Micro-batches ---------------------------------------------------------------

    def _micro_batches(
        self, data: _types.Structure, split: BatchSplit, training: bool
    ) -> MicroBatches:
        """The micro-batches of this replica's share of a batch."""
        if not self._is_step_of_keras(split, data):
            inexact.refuse_divided_loss(self)
        synchronized = training and _keras.layers.has_synchronized_layers(self)
        # An exchange may stand neither in a loop nor in an XLA program.
        compiled = bool(self.jit_compile) and not synchronized
        data, valid_samples = _keras.padding.without_padding(data)
        micro_batches = MicroBatches(
            self._loss_function(training, compiled),
            data,
            split,
            self.trainable_variables if training else [],
            metric_variables=self.metrics_variables,
            compiled=compiled,
            may_compile_each=training and not synchronized and self._may_compile_each_micro_batch(),
            unrolled=synchronized,
            trace_scope=functools.partial(_keras.layers.without_synchronization, self),
            measures_noise=training and self.log_gradient_noise_scale,
            valid_samples=valid_samples,
            in_flight=None if self.pipeline is None else self.pipeline.in_flight,
        )
        if training:
            self._inexact_parts = inexact.warn_of_what_the_trace_shows(
                self,
                micro_batches.trace,
                self._inexact_parts,
                is_whole_batch=micro_batches.is_whole_batch,
            )
        if micro_batches.compiles_each:
            _say_that_each_is_compiled()
        return micro_batches

    def _may_compile_each_micro_batch(self) -> bool:
        """Whether `jit_compile="auto"` is left to tfbig, which knows a CPU and one replica."""
        return (
            self._compile_config is not None
            and self._compile_config.config["jit_compile"] == "auto"
            and replicas.count_of(self) == 1
            and self.pipeline is None
            and _keras.devices.is_on_cpu(self.distribute_strategy)
            # Every size is a program of its own.
            and self.sizes_of_updates is None
            # On a CPU, XLA removes its barriers, and computes nothing twice.
            and not self._recomputed_layers()
        )

    def _recomputed_layers(self) -> list[_types.Layer]:
        chosen = recomputation.layers_of(self, self.recompute)
        return recomputation.without_inner([*chosen, *sharded_weights.layers_to_recompute(self)])

    def _loss_function(self, training: bool, compiled: bool) -> LossFunction:
        """The loss of a micro-batch, as a function."""
        is_xla = compiled or _keras.devices.is_compiled_as_a_whole()
        recomputed = (
            self._recomputed_layers() if training else sharded_weights.layers_to_recompute(self)
        )
        in_chunks = head_option.context_of(self, self.head_chunk_size, is_xla)

        def loss_fn(micro_batch: _types.Structure) -> MicroBatchLoss:
            with in_chunks(micro_batch):
                with (
                    attention_option.in_chunks(self, self.attention_chunk_size),
                    _keras.losses.output_losses(self) as output_losses,
                    _keras.recomputation.recomputed(recomputed, is_xla),
                ):
                    loss, *batch = _keras.layers.forward(self, micro_batch, training)
                return MicroBatchLoss(
                    tf.convert_to_tensor(loss),
                    weight=self.loss_denominator(*batch),
                    values=output_losses,
                    logs=_keras.losses.update_metrics(self, *batch),
                )

        return loss_fn

    # --- Logs --------------------------------------------------------------------------

    def _report(self, update: Update) -> dict[str, _types.Tensor]:
        """Counts the losses of an update in the metrics of the epoch; returns the logs."""
        # A skipped update's loss is left out of the mean if it is not finite:
        # one bad batch would otherwise hide the loss of the whole epoch.
        reported = apply.is_reported(update)
        loss, *values = (
            tf.where(reported, v, tf.zeros_like(v)) for v in (update.loss, *update.values)
        )
        weight = tf.cast(reported, loss.dtype)
        samples = weight * tf.cast(update.samples, loss.dtype) / replicas.count()
        _keras.losses.update_losses(self, loss, samples, values, weight)
        # The losses in the logs of a micro-batch are those before this update.
        own = {k: v for k, v in update.logs.items() if k not in _keras.losses.loss_names(self)}
        results: dict[str, _types.Tensor] = _keras.losses.metrics_results(self, replicas.count())
        self._warn_of_values_of_one_micro_batch(own.keys() - results.keys())
        return results | own

    def _warn_of_values_of_one_micro_batch(self, names: set[str]) -> None:
        if names and not self._is_step_of_keras(self._batch_split()):
            warnings.warn(
                "`compute_metrics` should return only results of the model's metrics when a batch "
                "is split. Any other value is that of the last micro-batch, averaged over the "
                f"replicas. Received: {sorted(names)}. Make it a keras.metrics.Metric of the same "
                "name, an attribute of the model.",
                stacklevel=3,
            )

    def _flatten_metrics_in_order(self, logs: _types.Logs) -> _types.Structure:
        # A list has no names: a program that unpacks what Keras returns must find that.
        own = {m.name for outer in self.metrics for m in getattr(outer, "metrics", [outer])}
        options = () if self._has_own_step else option.declared(type(self)).values()
        added = {name for o in options for name in o.logs} - own
        return super()._flatten_metrics_in_order({k: v for k, v in logs.items() if k not in added})


@functools.cache
def _say_that_each_is_compiled() -> None:
    _log.logger().info(
        "tfbig: jit_compile='auto' has XLA compile each micro-batch, which is faster here; "
        "jit_compile=False does not"
    )
