"""The only `train_step`, and its two halves.

global batch ── strategy ──> replica's share ── split ──> micro-batches
  for each micro-batch:   forward, loss x scale, backward,
                          add to float32 accumulators, metrics
  one exchange:           gradients + loss sums + weights + replica-local state
  finite everywhere?      yes: / weight, / scale, clip, apply once
                          no : skip, back off, count
"""

import contextlib
import functools
import warnings
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, errors
from tfbig._update import (
    apply,
    batch_split,
    exchange,
    fit_context,
    inexact,
    micro_batches,
    own_step,
    recomputation,
    step_options,
)

__all__ = ("TrainStep",)


# What the logs of an update hold beside Keras's own.
_ADDED_LOGS = ("loss_scale", "skipped_updates", "grad_norm", "gradient_noise_scale")


def check_strategy():
    """Refuses the current strategy if it is not supported."""
    strategy = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    if strategy is not None and not isinstance(strategy, _keras.devices.STRATEGIES):
        raise errors.UnsupportedStrategyError(
            "tfbig supports the default strategy, OneDeviceStrategy, MirroredStrategy, "
            "MultiWorkerMirroredStrategy and TPUStrategy. Received: "
            f"{type(strategy).__name__}. Use tfbig.distribute.get_strategy()."
        )


def _owner_of_other(cls, name):
    """The class that has a step of its own where Keras's is expected, or None."""
    after = cls.__mro__[cls.__mro__.index(TrainStep) + 1 :]
    owner = next((c for c in after if name in vars(c)), None)
    return None if owner is None or owner.__module__.split(".")[0] == "keras" else owner


def has_step_of_extended_class(cls):
    """Whether the `train_step` is that of a class which is extended, and knows nothing of tfbig."""
    owner = _owner_of_other(cls, "train_step")
    return owner is not None and cls.train_step is vars(owner)["train_step"]


class TrainStep(step_options.StepOptions):
    """The step of both mixins: overrides `train_step` and `test_step`.

    Not part of the public interface; `GradientAccumulationMixin` says how the
    batch is split, `DynamicLossScalingMixin` whether the loss is scaled.
    """

    def _batch_split(self):
        """Hook: the `BatchSplit` of an update."""
        return batch_split.BatchSplit(gradient_accumulation_steps=1)

    def _evaluation_split(self):
        """Hook: the `BatchSplit` of a batch that is evaluated."""
        return self._batch_split()

    def loss_denominator(self, x, y, y_pred, sample_weight):
        """What a scalar loss of a micro-batch was divided by.

        To be overridden where an overridden `compute_loss` returns a mean over
        something else than samples, such as the valid tokens of a language
        model. Not wanted for Keras losses, which know their own.

        Args:
            x: Inputs of the micro-batch.
            y: Targets of the micro-batch.
            y_pred: Outputs of the model.
            sample_weight: Sample weights, or None.

        Returns:
            A scalar; or None, the default, for the number of samples.
        """
        del x, y, y_pred, sample_weight

    _stop_request: Any = None
    _has_said_what_is_inexact = False
    # The `LossScaleState` of `DynamicLossScalingMixin`; None without scaling.
    loss_scale_state: Any = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        if keras.Model in mro and mro.index(keras.Model) < mro.index(TrainStep):
            bases = ", ".join(b.__name__ for b in cls.__bases__)
            correct = sorted(cls.__bases__, key=lambda b: not issubclass(b, TrainStep))
            raise errors.MixinOrderError(
                "tfbig's mixins must stand before the Keras class. Received: "
                f"class {cls.__name__}({bases}). Write class {cls.__name__}"
                f"({', '.join(b.__name__ for b in correct)})."
            )
        for name in ("train_step", "test_step"):
            owner = _owner_of_other(cls, name)
            if owner is not None and getattr(cls, name) is getattr(TrainStep, name):
                setattr(cls, name, vars(owner)[name])

    def __init__(self, *args, **kwargs):
        check_strategy()
        super().__init__(*args, **kwargs)

    @property
    def stop_request(self):
        """The `StopRequest` of callbacks; None before the first, or without other workers."""
        return self._stop_request

    @stop_request.setter
    def stop_request(self, value):
        if value is not self._stop_request:
            self._stop_request = value
            self._rebuild_step()

    @property
    def _has_own_step(self):
        """Whether a `train_step` runs that is not tfbig's."""
        return getattr(self.train_step, "__func__", None) is not TrainStep.train_step

    @property
    def _scale_settings(self):
        """Hook: settings of the loss scale; None without."""
        return None

    def _prepare_compile(self, settings):
        optimizer = settings["optimizer"] = keras.optimizers.get(settings["optimizer"])
        if not self._has_own_step:
            apply.check_optimizer(optimizer)
        if not self._has_own_step or self._scale_settings is not None:
            # tfbig scales the loss itself, or not at all.
            settings["auto_scale_loss"] = False
        if _keras.devices.is_tpu(self.distribute_strategy):
            # A TPU's programs are compiled anyway; Keras's own compilation fails there.
            settings["jit_compile"] = False

    def _finish_compile(self):
        _keras.losses.check_losses(self)
        is_scaled = hasattr(self, "loss_scale") or isinstance(
            self.optimizer, _keras.optimizer.LossScaleOptimizer
        )
        if not is_scaled and _keras.layers.computes_in_float16(self):
            warnings.warn(
                "The model computes in float16 without loss scaling, so small gradients become "
                "zero. Add tfbig.DynamicLossScalingMixin, or use mixed_bfloat16.",
                stacklevel=3,
            )
        self.seed_states = _keras.saving.SeedStates(self)
        self._reset_noise_scale()
        if self.optimizer is not None:
            _keras.saving.track_for_checkpoint(self, "optimizer", self.optimizer)

    def _check_before_run(self):
        _keras.layers.check_scope(self)
        if exchange.replicas_of(self) > 1:
            inexact.refuse_stateful_layers(self, self._batch_split())

    def _prepare_training(self, batch_size):
        split = self._batch_split()
        is_one = not self._may_be_split(split, batch_size)
        if is_one and self.log_gradient_noise_scale and exchange.replicas_of(self) == 1:
            raise errors.InvalidOptionError(
                "`log_gradient_noise_scale` compares micro-batches, or replicas, with the whole "
                f"batch, and needs two of them. Received: one micro-batch for a batch of "
                f"{batch_size}. Use gradient_accumulation_steps=2 or more."
            )
        if not is_one or exchange.replicas_of(self) > 1:
            self._check_split(split)

    def _may_be_split(self, split, batch_size):
        """Whether a batch may come to more than one micro-batch on a replica."""
        size = split.micro_batch_size
        return not (
            split.is_whole or batch_size == 1 or (size and batch_size and size >= batch_size)
        )

    def _check_split(self, split):
        """Refuses, or says once, what is not the same for a batch that is split."""
        inexact.refuse_stateful_layers(self, split)
        if not self._has_said_what_is_inexact:
            self._has_said_what_is_inexact = True
            inexact.warn_of_what_is_not_exact(self)

    def _build_for(self, specs):
        if not self._has_own_step:
            super()._build_for(specs)
        elif self._distribute_strategy is not None:
            # Its step may take the data otherwise than `call` does, which may be missing.
            with contextlib.suppress(RuntimeError):
                super()._build_for(specs)
        elif not has_step_of_extended_class(type(self)):
            # Nor need it use this optimizer, of which Keras saves what is built.
            with contextlib.suppress(RuntimeError), _keras.optimizer.with_optimizer(self, None):
                super()._build_for(specs)

    def make_train_function(self, force=False):
        self.check_train_step()
        super().make_train_function(force)

    def make_test_function(self, force=False):
        split = self._evaluation_split()
        if self._may_be_split(split, self._batch_size):
            inexact.refuse_stateful_layers(self, split)
        super().make_test_function(force)

    def check_train_step(self):
        """Refuses options that the `train_step` of a class that is extended knows nothing of."""
        if not has_step_of_extended_class(type(self)):
            return
        given, replicas = own_step.given(self), exchange.replicas_of(self)
        if given or replicas > 1:
            said = ", ".join(f"{k}={v!r}" for k, v in given.items())
            raise errors.UnsupportedModelError(
                f"{_owner_of_other(type(self), 'train_step').__name__} has a `train_step` of its "
                f"own, which tfbig's would replace. Received: {said or 'no options'}, {replicas} "
                "replica(s). Write it in a subclass of tfbig.Model from "
                "tfbig.accumulate_gradients and tfbig.apply_gradients, or leave the options out, "
                "on one replica."
            )

    def _checked_train_step(self):
        step = super()._checked_train_step()
        if has_step_of_extended_class(type(self)):
            return functools.partial(self._plain, step)
        if not self._has_own_step:
            return step
        own_step.warn_of_jit_compile(self)
        return own_step.checked(self, step)

    def fit(self, *args, **kwargs):
        arguments = fit_context.arguments_of(super().fit, args, kwargs)
        with fit_context.prepare_fit(self, arguments, self._options()) as arguments:
            try:
                return super().fit(**arguments)
            finally:
                # Of a callback that was not told that training ended.
                self.input_clock = None

    @_keras.trainer.returns_global_logs
    def train_step(self, data):
        """One update, with this replica's share of the effective batch."""
        own_step.uses_all()
        apply.check_optimizer(self.optimizer)
        if not self.optimizer.built:
            with tf.init_scope():
                self.optimizer.build(self.trainable_variables)
        is_plain = self._is_plain(self._batch_split(), data)
        if is_plain and self.loss_scale_state is None and self._is_default:
            return self._plain(super().train_step, data)
        return self._apply(self._accumulate(data, self._batch_split()))

    def _accumulate(self, data, split, **counts):
        """The first half of an update: `AccumulatedGradients` of this replica; assigns nothing."""
        scale = self.loss_scale_state
        scale = None if scale is None else scale.loss_scale.value
        return self._share(data, split, training=True).accumulate(scale, **counts)

    def _counts(self, data, split):
        """What `_accumulate` takes as `counts`, before it is exchanged."""
        return self._share(data, split, training=True).counts()

    def _apply(self, share):
        """The second half: exchanges, applies or skips, and returns the logs."""
        scale = self.loss_scale_state
        if self.stop_request is not None:
            share.stop = self.stop_request.sent()
        update = apply.apply_gradients(
            self.optimizer,
            share,
            loss_scale=scale,
            log_grad_norm=self.log_grad_norm,
            exchange_dtype=self.exchange_dtype,
        )
        if update.stop is not None:
            self.stop_request.receive(update.stop)
        logs = self._logs(update)
        if scale is not None:
            logs |= scale.logs()
        if self.log_grad_norm:
            logs["grad_norm"] = update.gradient_norm
        if self.noise_scale_state is not None:
            with _keras.variables.exchanged_already(self.noise_scale_state.variables()):
                logs["gradient_noise_scale"] = self.noise_scale_state.update(update)
        return logs

    def _flatten_metrics_in_order(self, logs):
        # A list has no names: a program that unpacks what Keras returns must find that.
        own = {m.name for outer in self.metrics for m in getattr(outer, "metrics", [outer])}
        added = set() if self._has_own_step else set(_ADDED_LOGS) - own
        return super()._flatten_metrics_in_order({k: v for k, v in logs.items() if k not in added})

    @_keras.trainer.returns_global_logs
    def test_step(self, data):
        """Evaluates this replica's share of a batch, micro-batch by micro-batch."""
        if self._is_plain(self._evaluation_split(), data):
            return self._plain(super().test_step, data)
        share = self._share(data, self._evaluation_split(), training=False).accumulate()
        return self._logs(apply.without_gradients(share))

    def _is_plain(self, split, data=None):
        # Then Keras's own step does it, number for number.
        is_padded = isinstance(data, _keras.padding.PaddedBatch)
        return split.is_whole and exchange.replicas() == 1 and not is_padded

    def _plain(self, step, data):
        """Runs a step of Keras, compiled by XLA if asked for."""
        data = exchange.checked_data(data)
        if self.jit_compile and not _keras.devices.is_compiled_as_a_whole():
            step = tf.function(step, jit_compile=True, autograph=False)
        # An optimizer's counter does not depend on the data otherwise.
        with tf.control_dependencies(
            [v for v in tf.nest.flatten(data, expand_composites=True) if v is not None]
        ):
            return step(data)

    def _share(self, data, split, training):
        """This replica's share of a batch, as `MicroBatches`."""
        if not self._is_plain(split, data):
            inexact.refuse_divided_loss(self)
        synchronized = training and _keras.layers.has_synchronized_layers(self)
        # An exchange may stand neither in a loop nor in an XLA program.
        compiled = bool(self.jit_compile) and not synchronized
        is_xla = compiled or _keras.devices.is_compiled_as_a_whole()
        data, counted = _keras.padding.without_padding(data)
        recomputed = recomputation.layers_of(self, self.recompute if training else None)

        def loss_fn(micro_batch):
            with (
                _keras.losses.output_losses(self) as output_losses,
                _keras.recomputation.recomputed(recomputed, is_xla),
            ):
                loss, *batch = _keras.layers.forward(self, micro_batch, training)
            return micro_batches.Loss(
                tf.convert_to_tensor(loss),
                weight=self.loss_denominator(*batch),
                values=output_losses,
                logs=_keras.losses.update_metrics(self, *batch),
            )

        return micro_batches.MicroBatches(
            loss_fn,
            data,
            split,
            self.trainable_variables if training else [],
            metric_variables=self.metrics_variables,
            compiled=compiled,
            unrolled=synchronized,
            trace_scope=functools.partial(_keras.layers.without_synchronization, self),
            measures_noise=training and self.log_gradient_noise_scale,
            counted=counted,
        )

    def _logs(self, update):
        # A skipped update's loss is left out of the mean if it is not finite:
        # one bad batch would otherwise hide the loss of the whole epoch.
        reported = apply.is_reported(update)
        loss, *values = (
            tf.where(reported, v, tf.zeros_like(v)) for v in (update.loss, *update.values)
        )
        weight = tf.cast(reported, loss.dtype)
        samples = weight * tf.cast(update.samples, loss.dtype) / exchange.replicas()
        _keras.losses.update_losses(self, loss, samples, values, weight)
        # The losses in the logs of a micro-batch are those before this update.
        own = {k: v for k, v in update.logs.items() if k not in _keras.losses.loss_names(self)}
        results = _keras.losses.metrics_results(self, exchange.replicas())
        if own.keys() - results.keys() and not self._is_plain(self._batch_split()):
            warnings.warn(
                "`compute_metrics` should return results of the model's metrics only, when a "
                "batch is split. A value of its own is that of the last micro-batch, averaged "
                f"over the replicas. Received: {sorted(own.keys() - results.keys())}. Make a "
                "keras.metrics.Metric of it, an attribute of the model, with the same name.",
                stacklevel=2,
            )
        return results | own
