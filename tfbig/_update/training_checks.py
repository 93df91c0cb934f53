"""What must hold before a step runs, from `compile` to the first batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig._update import (
    apply,
    fit_context,
    inexact,
    own_step,
    pipeline_option,
    replicas,
    shard_option,
    step_options,
)
from tfbig._update.batch_split import BatchSplit

__all__ = ("TrainingChecks", "check_strategy")

# The step of a user or of Keras: takes data, returns logs.
_Step: TypeAlias = Callable[[_types.Structure], _types.Logs]


class _Meter(Protocol):
    """Measures a `fit`, which tells it that it has ended, also by an exception."""

    def on_end(self) -> object: ...


def check_strategy() -> None:
    """Refuses the current strategy if it is not supported."""
    strategy = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    if strategy is not None and not isinstance(strategy, _keras.devices.STRATEGIES):
        raise errors.UnsupportedStrategyError(
            "tfbig supports the default strategy, OneDeviceStrategy, MirroredStrategy, "
            "MultiWorkerMirroredStrategy and TPUStrategy. Received: "
            f"{type(strategy).__name__}. Use tfbig.distribute.get_strategy()."
        )


class TrainingChecks(step_options.StepOptions):
    """Checks a model before it trains or evaluates; `TrainStep` is its only direct subclass."""

    # What was warned of.
    _inexact_parts: frozenset[str] = frozenset()
    # What measures where the time of the running `fit` goes.
    goodput_meters: tuple[_Meter, ...] = ()

    def _batch_split(self) -> BatchSplit:
        """Hook: how the batch of an update is split."""
        return BatchSplit(gradient_accumulation_steps=1)

    def _evaluation_split(self) -> BatchSplit:
        """Hook: how a batch that is evaluated is split."""
        return self._batch_split()

    @property
    def _scale_settings(self) -> Any:  # Any: the mixin that has settings narrows it.
        """Hook: settings of the loss scale; None without."""
        return None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: whatever the Keras class takes.
        check_strategy()
        super().__init__(*args, **kwargs)

    @property
    def _has_own_step(self) -> bool:
        """Hook: whether a `train_step` runs that is not tfbig's."""
        raise NotImplementedError

    @classmethod
    def _owner_of_extended_train_step(cls) -> type | None:
        """Hook: the extended class whose `train_step` runs, which knows nothing of tfbig."""
        raise NotImplementedError

    def _run_keras_step(self, step: _Step, data: _types.Structure) -> _types.Logs:
        """Hook: runs a step that knows nothing of tfbig."""
        raise NotImplementedError

    # --- compile ---------------------------------------------------------------

    def _prepare_compile(self, settings: dict[str, Any]) -> None:  # Any: arguments of `compile`.
        optimizer = settings["optimizer"] = keras.optimizers.get(settings["optimizer"])
        if not self._has_own_step:
            apply.check_optimizer(optimizer)
        if not self._has_own_step or self._scale_settings is not None:
            # tfbig scales the loss itself, or not at all.
            settings["auto_scale_loss"] = False
        if _keras.devices.is_tpu(self.distribute_strategy):
            # A TPU's programs are compiled anyway; Keras's own compilation fails there.
            settings["jit_compile"] = False

    def _finish_compile(self) -> None:
        _keras.losses.check_losses(self)
        is_scaled = hasattr(self, "loss_scale") or isinstance(
            self.optimizer, keras.optimizers.LossScaleOptimizer
        )
        if not is_scaled and _keras.layers.computes_in_float16(self):
            warnings.warn(
                "The model computes in float16 without loss scaling, so small gradients become "
                "zero. Add tfbig.DynamicLossScalingMixin, or use mixed_bfloat16.",
                stacklevel=3,
            )
        self.seed_states = _keras.saving.SeedStates(self)
        self._reset_noise_scale()
        shard_option.apply(self)
        pipeline_option.apply(self)
        if self.optimizer is not None:
            _keras.saving.track_for_checkpoint(self, "optimizer", self.optimizer)

    def _resolve_auto_jit_compile(self) -> bool:
        # XLA cannot gather weights from other replicas, and compiles for one device.
        return (
            self.shard != "weights"
            and self.pipeline is None
            and super()._resolve_auto_jit_compile()
        )

    # --- fit -------------------------------------------------------------------

    if TYPE_CHECKING:
        # What editors show. A class that is extended may have a `fit` with other arguments.
        def fit(
            self,
            x: _types.Structure = None,
            y: _types.Structure = None,
            batch_size: int | None = None,
            epochs: int = 1,
            verbose: int | str = "auto",
            callbacks: Sequence[_types.Callback] | None = None,
            validation_split: float = 0.0,
            validation_data: _types.Structure = None,
            shuffle: bool | str = True,
            class_weight: Mapping[int, float] | None = None,
            sample_weight: _types.Structure = None,
            initial_epoch: int = 0,
            steps_per_epoch: int | None = None,
            validation_steps: int | None = None,
            validation_batch_size: int | None = None,
            validation_freq: int = 1,
        ) -> keras.callbacks.History: ...

    else:

        def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:  # Any: of Keras.
            arguments = fit_context.arguments_of(super().fit, args, kwargs)
            with (
                _keras.finished_iterators.released(),
                fit_context.prepare_fit(self, arguments, self._options()) as arguments,
            ):
                pipeline_option.measure(self, fit_context.measures_stages(arguments))
                try:
                    return super().fit(**arguments)
                finally:
                    for meter in self.goodput_meters:
                        meter.on_end()
                    self.goodput_meters = ()
                    # Of a callback that was not told that training ended.
                    self.input_clock = None
                    # It would keep the data.
                    self._epoch_iterator = None

        fit.__doc__ = keras.Model.fit.__doc__

    def _build_for(self, specs: _types.Structure) -> None:
        if not self._has_own_step:
            super()._build_for(specs)
        elif self._distribute_strategy is not None:
            # Its step may take the data otherwise than `call` does, which may be missing.
            _keras.building.build_if_possible(self, specs)
        elif self._owner_of_extended_train_step() is None:
            # Nor need it use this optimizer, of which Keras saves what is built.
            with _keras.optimizer.temporary_optimizer(self, None):
                _keras.building.build_if_possible(self, specs)
        _keras.optimizer.begin_at_the_weights(self.optimizer)
        # What was built now.
        shard_option.apply(self)
        pipeline_option.check_before_run(self)

    def _build_in_step(self, data: _types.Structure) -> None:
        """Builds what a step of the user's own, which calls this one, left to be built."""
        if self._has_own_step and self._owner_of_extended_train_step() is None:
            _keras.building.build_in_step(self, _keras.padding.data_of(data))

    def build_by_step(self) -> None:
        """Builds, in a running `fit`, what only a step of the user's own builds.

        Such as the optimizer that it uses, and metrics of data that only it knows.
        """
        if self._has_own_step:
            data = _keras.epoch_iterator.dataset_of(_keras.epoch_iterator.of_fit(self))
            _keras.step_function.trace_without_running(self, self._checked_train_step(), data)

    def _check_before_run(self) -> None:
        _keras.layers.check_scope(self)
        # Those too that a `compile` of the model's own has set.
        shard_option.apply(self)
        if replicas.count_of(self) > 1:
            inexact.refuse_stateful_layers(self, self._batch_split())

    def make_train_function(self, force: bool = False) -> None:
        self.check_train_step()
        super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> None:
        split = self._evaluation_split()
        if split.may_split(self._batch_size):
            inexact.refuse_stateful_layers(self, split)
        super().make_test_function(force)

    def _prepare_training(self, batch_size: int | None) -> None:
        shard_option.say_if_nothing_is_divided(self)
        split, number = self._batch_split(), replicas.count_of(self)
        is_split = split.may_split(batch_size)
        if self.log_gradient_noise_scale and not is_split and number == 1:
            raise errors.InvalidOptionError(
                "`log_gradient_noise_scale` compares micro-batches, or replicas, with the whole "
                f"batch, and needs two of them. Received: one micro-batch for a batch of "
                f"{batch_size}. Use gradient_accumulation_steps=2 or more."
            )
        if is_split or number > 1:
            self._check_split(split)
        if self.pipeline is not None and batch_size is not None:
            larger, smaller = split.segments(-(-batch_size // number))
            pipeline_option.say_bubble(self, int(larger[1] + smaller[1]))

    def _check_split(self, split: object) -> None:
        """Refuses what no split batch can compute, and warns once of each part that is not exact.

        Args:
            split: how the batch is split, for the message.
        """
        inexact.refuse_stateful_layers(self, split)
        # Layers may be frozen, and other settings compiled, between two trainings.
        self._inexact_parts = inexact.warn_of_what_is_not_exact(self, self._inexact_parts)

    # --- A `train_step` that is not tfbig's --------------------------------------

    def check_train_step(self) -> None:
        """Raises for options that the `train_step` of an extended class knows nothing of."""
        owner = self._owner_of_extended_train_step()
        if owner is None:
            return
        given, number = self._asked_options(), replicas.count_of(self)
        if given or number > 1:
            options = ", ".join(f"{k}={v!r}" for k, v in given.items())
            raise errors.UnsupportedModelError(
                f"{owner.__name__} has a `train_step` of its "
                f"own, which tfbig's would replace. Received: {options or 'no options'}, {number} "
                "replica(s). Write it in a subclass of tfbig.Model from "
                "tfbig.accumulate_gradients and tfbig.apply_gradients, or leave the options out, "
                "on one replica."
            )

    def _checked_train_step(self) -> _Step:
        step: _Step = super()._checked_train_step()
        if self._owner_of_extended_train_step() is not None:
            return functools.partial(self._run_keras_step, step)
        if not self._has_own_step:
            return step
        own_step.warn_of_jit_compile(self)
        checked: _Step = own_step.checked(self, step)
        return checked
