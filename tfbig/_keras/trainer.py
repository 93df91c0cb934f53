"""`fit`, `evaluate` and `predict` of Keras fail or deviate under strategies; here they do not."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import trainer as _trainer_tf
from keras.src.trainers import trainer as _trainer
from keras.src.trainers.epoch_iterator import EpochIterator

from tfbig import _types, errors
from tfbig._keras import building, graph_errors, replica_step, resized_batches, shuffling
from tfbig._keras.batches import (
    as_tensor,
    batch_size,
    spec_of_any_size,
    without_optionals,
)
from tfbig._keras.compiling import CompileHooks
from tfbig._keras.devices import is_on_cpu, is_tpu
from tfbig._keras.epoch_iterator import effective_batch_size, specs_of
from tfbig._keras.finished_iterators import released
from tfbig._keras.input_clock import InputClock
from tfbig._keras.losses import added_loss, check_is_scalar
from tfbig._keras.padding import check_divides, fix_batch_size
from tfbig._keras.stage_clock import StageClock
from tfbig._keras.step_function import StepFunction


class TrainerOverrides(CompileHooks):
    """Replaces the parts of `keras.Model` that fail under `tf.distribute`.

    - `_maybe_symbolic_build` takes shapes from the dataset's specification. Keras reduces the
      first batch with MEAN, which crashes when it splits unevenly and for bool inputs.
    - `jit_compile="auto"` follows the replicas' devices, under a strategy too.
    - The train, test and predict functions: `steps_per_execution > 1` and `jit_compile=True` fail
      under MirroredStrategy, and logs are the mean of the replicas' results, which is not the
      result of the whole batch.
    - A batch passed to `train_on_batch`, `test_on_batch` and `predict_on_batch` is shared out
      over the replicas. Keras gives all of it to each.
    """

    # The iterator of the running `fit` or `evaluate`: see `_keras.epoch_iterator.of_fit`.
    _epoch_iterator: EpochIterator | None = None
    _batch_size: int | None = None
    # The `_batch_size` of the last `fit`, whatever a validation within it had.
    _training_batch_size: int | None = None
    # For which data losses and metrics were built before any step saw data; None if that is past.
    specs_built_for: _types.Structure = None
    # Set by a callback that reads it; None while none does.
    input_clock: InputClock | None = None
    # Those that the last call of the function that trains took: `steps_per_execution`, or fewer
    # where the data ended. A tensor need not be computed yet. None before the first call.
    batches_of_execution: int | _types.Tensor | None = None
    # How often a function that trains was traced.
    times_traced = 0
    # Of the passes of a pipeline's stages; None while nobody reads it.
    stage_clock: StageClock | None = None
    # Set by a callback that decides the size of each update; None while none does.
    sizes_of_updates: resized_batches.Sizes | None = None

    @property
    def batch_size_of_updates(self) -> int | None:
        """Samples of a full batch of the last `fit` or `evaluate`; None if not known."""
        return self._batch_size

    # --- Hooks ------------------------------------------------------------------

    def _check_before_run(self) -> None:
        """Raises if the model cannot run."""

    def _prepare_training(self, batch_size: int | None) -> None:
        """Called before training with the number of samples of a batch, if that is known."""

    def _build_for(self, specs: _types.Structure) -> None:
        """Builds the model, its losses and its metrics for batches of these specifications."""
        building.build_for(self, specs)

    def _make_train_function(self) -> _types.AnyFunction:
        """The function of an iterator that trains."""
        return StepFunction(self, self._checked_train_step(), is_training=True)

    def _checked_train_step(self) -> _types.AnyFunction:
        """The `train_step` that runs."""
        step: _types.AnyFunction = self.train_step
        return step

    # --- Before a run -----------------------------------------------------------

    def _resolve_auto_jit_compile(self) -> bool:
        # Keras never compiles under a strategy, since it would compile the exchange too; here
        # each replica compiles the part before the exchange. Not with embeddings: XLA adds up
        # the rows of their gradients, which Keras's optimizers square one by one.
        return (
            not is_on_cpu(self.distribute_strategy)
            and bool(_trainer.model_supports_jit(self))
            and not self._has_embeddings()
        )

    def _compile_no_sparse_data(self, specs: _types.Structure) -> None:
        """Turns off `jit_compile="auto"` for inputs whose operations XLA does not know."""
        kinds = tf.SparseTensorSpec | tf.RaggedTensorSpec
        config = self._compile_config.config if self._compile_config is not None else {}
        if config.get("jit_compile") == "auto" and any(
            isinstance(spec, kinds) for spec in keras.tree.flatten(specs)
        ):
            # Not by the property, which would forget "auto".
            self._jit_compile = False

    def _has_embeddings(self) -> bool:
        return any(isinstance(x, keras.layers.Embedding) for x in self._flatten_layers())

    def _maybe_symbolic_build(
        self, iterator: EpochIterator | None = None, data_batch: _types.Structure = None
    ) -> None:
        size = None
        if iterator is not None:
            size, data_batch = self._size_and_specs(iterator)
        elif data_batch is not None:
            data_batch = keras.tree.map_structure(as_tensor, data_batch)
            size = int(batch_size(data_batch))
            if is_tpu(self.distribute_strategy):
                check_divides(size, self.distribute_strategy.num_replicas_in_sync)
            data_batch = keras.tree.map_structure(spec_of_any_size, data_batch)
        if size == 0:
            raise errors.InvalidOptionError(graph_errors.NO_SAMPLES)
        self._batch_size = size
        self._compile_no_sparse_data(data_batch)
        self._check_before_run()
        with self.distribute_strategy.scope():
            self._build_for(data_batch)

    def _size_and_specs(self, iterator: EpochIterator) -> tuple[int | None, _types.Structure]:
        """The number of samples of an iterator's batches, and the specification of their data."""
        strategy = self.distribute_strategy
        self._epoch_iterator = iterator
        shuffling.reseed(iterator)
        specs = specs_of(iterator)
        sizes = self.sizes_of_updates
        size: int | None
        if iterator.num_batches == 0:
            size = 0
        elif sizes is not None and not sizes.is_used:
            resized_batches.resize(iterator, specs, sizes, strategy)
            size = sizes.largest
        else:
            size = effective_batch_size(iterator)
        if is_tpu(strategy) and fix_batch_size(iterator, size, strategy):
            self._warn_of_single_samples()
            specs = specs_of(iterator)
        if strategy.num_replicas_in_sync > 1 and None in keras.tree.flatten(specs):
            raise errors.UnsupportedStrategyError(
                "None among the inputs is not supported with several replicas: "
                "tf.distribute's iterators fail on it. Received: a dataset of "
                f"{specs}. Use one replica, or a tensor in place of None."
            )
        return size, specs

    def _warn_of_single_samples(self) -> None:
        found = [
            layer.name
            for layer in self._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        if found:
            warnings.warn(
                "The last batch of an epoch may be smaller. On a TPU, its samples beyond full "
                "micro-batches are processed one by one, and BatchNormalization then computes "
                f"statistics of single samples. Received: {', '.join(found)}. Use "
                "drop_remainder=True, or leave samples out.",
                stacklevel=6,
            )

    # --- Losses and logs --------------------------------------------------------

    def _get_metrics_result_or_logs(self, logs: _types.Logs | None) -> _types.Logs:
        # There are none if the epoch was resumed after its last batch.
        logs = logs or self._with_batch_size(self.get_metrics_result())
        result: _types.Logs = super()._get_metrics_result_or_logs(logs)
        return result

    def _with_batch_size(self, logs: _types.Logs) -> _types.Logs:
        if self.sizes_of_updates is None:
            return logs
        return {**logs, "batch_size": self.sizes_of_updates.size}

    def _compute_loss(self, *args: object, **kwargs: object) -> _types.Tensor:
        loss = super()._compute_loss(*args, **kwargs)
        check_is_scalar(loss)
        return loss

    def _aggregate_additional_loss(self, loss: _types.Tensor) -> _types.Tensor:
        if not keras.backend.is_float_dtype(loss.dtype):
            loss = keras.ops.cast(loss, keras.config.floatx())
        return added_loss(loss)

    # --- Functions of an iterator -----------------------------------------------

    def _explained(self, function: _types.AnyFunction) -> _types.AnyFunction:
        """A train or test function whose assertions in the graph raise tfbig's errors."""

        def explained(iterator: Iterator[_types.Structure]) -> _types.Structure:
            try:
                return function(iterator)
            except tf.errors.InvalidArgumentError as e:
                error = graph_errors.error_of(str(e), self)
                if error is None:
                    raise
                raise error from None

        return explained

    def make_train_function(self, force: bool = False) -> None:
        self._training_batch_size = self._batch_size
        self._prepare_training(self._training_batch_size)
        if self.train_function is None or force:
            self.train_function = self._new_train_function()

    def _new_train_function(self) -> _types.AnyFunction:
        function = self._explained(self._make_train_function())

        def train(iterator: Iterator[_types.Structure]) -> _types.Structure:
            logs = function(iterator)
            is_resized = isinstance(iterator, resized_batches.ResizedBatches)
            return self._with_batch_size(logs) if is_resized else logs

        return train

    def make_test_function(self, force: bool = False) -> None:
        if self.test_function is None or force:
            step = self.test_step
            if not replica_step.has_global_logs(step):
                step = replica_step.leaving_out_empty_shares(self, step)
            self.test_function = self._explained(StepFunction(self, step))

    def _rebuild_step(self) -> None:
        """Has the train, test and predict functions rebuilt when they are next called."""

        def train(iterator: Iterator[_types.Structure]) -> _types.Structure:
            self._prepare_training(self._training_batch_size)
            self.train_function = self._new_train_function()
            return self.train_function(iterator)

        def test(iterator: Iterator[_types.Structure]) -> _types.Structure:
            self.make_test_function(force=True)
            assert self.test_function is not None
            return self.test_function(iterator)

        # Not None if they were set: the loop of a running `fit` goes on calling them.
        self.train_function = self.train_function and train
        self.test_function = self.test_function and test
        self.predict_function = None

    # --- Evaluation and prediction ----------------------------------------------

    if not TYPE_CHECKING:
        # Editors show Keras's own. Any: a class that is extended may take other arguments.

        @functools.wraps(keras.Model.evaluate)
        def evaluate(self, *args: Any, **kwargs: Any) -> _types.Structure:
            iterator_of_fit = self._epoch_iterator
            try:
                with released():
                    return super().evaluate(*args, **kwargs)
            finally:
                self._epoch_iterator = iterator_of_fit

        @functools.wraps(keras.Model.predict)
        def predict(self, *args: Any, **kwargs: Any) -> _types.Structure:
            with released():
                return super().predict(*args, **kwargs)

    def predict_on_batch(self, x: _types.Structure) -> _types.Structure:
        if self.distribute_strategy.num_replicas_in_sync == 1:
            return super().predict_on_batch(x)
        # In a dataset, a list would be one tensor.
        x = keras.tree.lists_to_tuples(x)
        return self.predict(tf.data.Dataset.from_tensors((x,)), verbose=0)

    def make_predict_function(self, force: bool = False) -> None:
        # Keras compiles one function for all replicas; XLA then finds the variables of the first
        # replica on another device than the second's.
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1 or not self.jit_compile:
            super().make_predict_function(force)
        elif self.predict_function is None or force:
            self.predict_function = self._compiled_predict_function(strategy)

    def _compiled_predict_function(
        self, strategy: _types.Strategy
    ) -> Callable[[list[_types.Structure]], _types.Structure]:
        """A function that each replica compiles for itself."""

        def replica_step(data: _types.Structure) -> _types.Structure:
            step = tf.function(self.predict_step, jit_compile=True, autograph=False)
            return step(without_optionals(data))

        def one_step(data: _types.Structure) -> _types.Structure:
            outputs = strategy.run(replica_step, args=(data,))
            return _trainer_tf.reduce_per_replica(outputs, strategy, reduction="concat")

        program = tf.function(one_step, reduce_retracing=True, autograph=False)

        def predict_function(steps: list[_types.Structure]) -> _types.Structure:
            outputs = [program(data) for data in steps]
            return keras.tree.map_structure(lambda *parts: _trainer_tf.concat(parts), *outputs)

        return predict_function
