"""`fit`, `evaluate` and `predict` under strategies, as `keras.Model` should do them."""

import typing
import warnings

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.backend.tensorflow import trainer as _trainer_tf
from keras.src.trainers import trainer as _trainer

from tfbig import errors
from tfbig._keras.compiling import CompileHooks
from tfbig._keras.data import (
    NO_SAMPLES,
    as_tensor,
    batch_size,
    effective_batch_size,
    samples_of,
    spec_of_any_size,
    specs_of_one_replica,
    without_optionals,
)
from tfbig._keras.devices import is_on_cpu, is_tpu
from tfbig._keras.input_clock import timed
from tfbig._keras.losses import added_loss, check_is_scalar
from tfbig._keras.padding import check_divides, data_of, fix_batches
from tfbig._keras.variables import is_summed

# Messages of assertions in a graph, by which their errors are told apart.
TOO_MANY_SKIPS = "tfbig: too many skipped updates in a row."
LENGTHS_DIFFER = "tfbig: replicas looked up a table at positions that differ."
# TensorFlow's own.
_NO_SPARSE_SAMPLES = "Serialized sparse should have at least 1 serialized tensor"
OVERFLOW = "tfbig: gradients are not finite after their exchange in half precision."


def _is_composite(spec):
    return isinstance(spec, tf.RaggedTensorSpec | tf.SparseTensorSpec)


def _placeholder(spec):
    if isinstance(spec, tf.RaggedTensorSpec):
        inner = spec.shape[spec.ragged_rank + 1 :]
        return tf.compat.v1.ragged.placeholder(spec.dtype, spec.ragged_rank, inner)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.compat.v1.sparse_placeholder(spec.dtype, spec.shape)
    return spec if spec is None else tf.compat.v1.placeholder(spec.dtype, spec.shape)


def _build_by_call(model, specs):
    """Builds a model for ragged or sparse inputs by tracing a call.

    Keras builds it for dense ones of the same shape, on which `to_tensor()` and
    the like fail.
    """

    def call():
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            keras.tree.map_structure(_placeholder, specs)
        )
        y_pred = model(x, training=False)
        if model._compile_metrics is not None:
            model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        if model._compile_loss is not None:
            model._compute_loss(x, y, y_pred, sample_weight, training=False)

    layers = [*model._flatten_layers(), model._compile_metrics, model._compile_loss]
    if not all(layer is None or layer.built for layer in layers):
        backend.compute_output_spec(call)


def is_placed(data):
    """Whether a batch is a value of `tf.distribute` that holds the part of each replica."""
    return any(isinstance(v, tf.distribute.DistributedValues) for v in tf.nest.flatten(data))


def build_for(model, specs):
    """Builds a model, its losses and its metrics for batches of these specifications."""
    model._symbolic_build(data_batch=specs)


def set_initial_epoch(model, epoch):
    """Has the next `fit`, or the one that begins, start with this epoch."""
    model._initial_epoch = epoch


def data_of_fit(model):
    """The epoch iterator of the `fit` that begins, in `on_train_begin`."""
    return model._epoch_iterator


def globally_logged(step):
    """Whether a step is marked with `returns_global_logs`."""
    return getattr(step, "returns_global_logs", False)


def returns_global_logs(step):
    """Marks a step whose logs are those of all replicas, on every replica."""
    step.returns_global_logs = True
    return step


class TrainerOverrides(CompileHooks):
    """Replaces what of `keras.Model` fails under `tf.distribute`.

    - `_maybe_symbolic_build` takes shapes from the dataset's specification.
      Keras reduces the first batch with MEAN, which crashes when it splits
      unevenly and for bool inputs.
    - `jit_compile="auto"` follows the replicas' devices, also under a strategy.
    - The train, test and predict functions: `steps_per_execution > 1` and
      `jit_compile=True` fail under MirroredStrategy, and logs are the mean of
      the replicas' results, which is not the result of the whole batch.
    - A batch passed to `train_on_batch`, `test_on_batch` and
      `predict_on_batch` is cut over the replicas. Keras gives all of it to
      each.
    """

    train_function: typing.Any
    test_function: typing.Any
    predict_function: typing.Any

    _batch_size: int | None = None
    # The same of the last `fit`, also after a validation in it.
    _training_batch_size: int | None = None
    # The iterator of the running, or last, `fit` or `evaluate`.
    _epoch_iterator: typing.Any = None
    # The `InputClock` of a callback, if one wants to know.
    input_clock: typing.Any = None

    @property
    def batch_size_of_updates(self):
        """int, samples of a full batch of the last `fit` or `evaluate`; None if not known."""
        return self._batch_size

    def _check_before_run(self):
        """Hook: raises for what cannot run."""

    def _prepare_training(self, batch_size):
        """Hook: called before training. `batch_size` may be None."""

    def _resolve_auto_jit_compile(self):
        # Keras never compiles under a strategy, since it would compile the exchange too; here
        # each replica compiles what comes before it. Not for embeddings: XLA adds the rows of
        # their gradients up, which Keras's optimizers square one by one.
        return (
            not is_on_cpu(self.distribute_strategy)
            and _trainer.model_supports_jit(self)
            and not self._has_embeddings()
        )

    def _has_embeddings(self):
        return any(isinstance(x, keras.layers.Embedding) for x in self._flatten_layers())

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self.distribute_strategy
        size = None
        if iterator is not None:
            self._epoch_iterator = iterator
            size = 0 if iterator.num_batches == 0 else effective_batch_size(iterator)
            if is_tpu(strategy) and fix_batches(iterator, size, strategy):
                self._warn_of_single_samples()
            data_batch = data_of(specs_of_one_replica(iterator._distributed_dataset))
            if strategy.num_replicas_in_sync > 1 and None in keras.tree.flatten(data_batch):
                raise errors.UnsupportedStrategyError(
                    "None among the inputs cannot be handed to several replicas: "
                    "tf.distribute's iterators fail on it. Received: a dataset of "
                    f"{data_batch}. Use one replica, or a tensor in place of None."
                )
        elif data_batch is not None:
            data_batch = keras.tree.map_structure(as_tensor, data_batch)
            size = int(batch_size(data_batch))
            if is_tpu(strategy):
                check_divides(size, strategy.num_replicas_in_sync)
            data_batch = keras.tree.map_structure(spec_of_any_size, data_batch)
        if size == 0:
            raise errors.InvalidOptionError(NO_SAMPLES)
        self._batch_size = size
        self._check_before_run()
        with strategy.scope():
            self._build_for(data_batch)

    def _build_for(self, specs):
        """Hook: builds the model, its losses and its metrics for batches of these specs."""
        if any(_is_composite(spec) for spec in keras.tree.flatten(specs)):
            _build_by_call(self, specs)
        self._symbolic_build(data_batch=specs)

    def _warn_of_single_samples(self):
        found = [
            layer.name
            for layer in self._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        if found:
            warnings.warn(
                "The last batch of an epoch may be smaller. What it has beyond full micro-batches "
                "goes one by one on a TPU, and BatchNormalization takes statistics of single "
                f"samples there. Received: {', '.join(found)}. Use drop_remainder=True, or leave "
                "samples out.",
                stacklevel=5,
            )

    def _get_metrics_result_or_logs(self, logs):
        # Without logs the epoch was resumed after its last batch.
        return super()._get_metrics_result_or_logs(logs or self.get_metrics_result())

    def _compute_loss(self, *args, **kwargs):
        loss = super()._compute_loss(*args, **kwargs)
        check_is_scalar(loss)
        return loss

    def _aggregate_additional_loss(self, loss):
        if not keras.backend.is_float_dtype(loss.dtype):
            loss = keras.ops.cast(loss, keras.config.floatx())
        return added_loss(loss)

    def _share_of_replica(self, data):
        """The part of a batch that this replica trains on."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        if replicas == 1:
            return data
        size = batch_size(data)
        index = tf.cast(context.replica_id_in_sync_group, tf.int32)
        if isinstance(size, int) and size % replicas == 0:
            # Of a shape that is known, which a TPU needs.
            return samples_of(data, index * (size // replicas), size // replicas)
        # The first replicas get more, as from a distributed dataset. A share that is known to be
        # empty while tracing would leave out what the other replicas do.
        size = tf.compat.v1.placeholder_with_default(tf.cast(size, tf.int32), [])
        begin, end = ((i * size + replicas - 1) // replicas for i in (index, index + 1))
        return samples_of(data, begin, end - begin)

    def _global_logs(self, replica_step, data, is_share=False):
        """Runs a step on all replicas; returns its logs, those of all replicas as one.

        Args:
            replica_step: function of a replica's share of `data`.
            data: a batch, or the values of each replica.
            is_share: whether `data` is what a step returned, and not a batch.
        """
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1:
            return strategy.run(replica_step, args=(data,))
        is_global = globally_logged(replica_step) and all(
            is_summed(v) for v in self.metrics_variables
        )

        is_cut = is_share or is_placed(data)

        def step(data):
            logs = replica_step(data if is_cut else self._share_of_replica(data))
            if is_global or not logs:
                return logs
            dtype = "float64" if keras.config.floatx() == "float64" else "float32"
            mean = tf.distribute.get_replica_context().all_reduce(
                "MEAN", [tf.cast(v, dtype) for v in tf.nest.flatten(logs)]
            )
            return tf.nest.pack_sequence_as(logs, mean)

        logs = tf.nest.map_structure(
            lambda v: strategy.experimental_local_results(v)[0], strategy.run(step, args=(data,))
        )
        if isinstance(logs, dict) and not is_global:
            results = self.get_metrics_result()
            logs |= {k: v for k, v in results.items() if k in logs}
        return logs

    def _step_function(self, replica_step, is_training=False):
        def one_step(data):
            return self._global_logs(replica_step, without_optionals(data))

        def many_steps(iterator):
            # Keras nests two tf.functions here, which fails under
            # MirroredStrategy. Optionals tell the end of the data: an exception
            # would lose the logs of the steps before it.
            data, waited = timed(iterator.get_next, is_training)
            logs = one_step(data)

            def more(step, _, upcoming, *__):
                return (step < self.steps_per_execution) & upcoming.has_value()

            def next_step(step, waited, upcoming, *_):
                new = tf.nest.flatten(one_step(upcoming.get_value()))
                following, more_waited = tf.cond(
                    step + 1 < self.steps_per_execution,
                    lambda: timed(iterator.get_next_as_optional, is_training),
                    lambda: (upcoming, tf.zeros_like(waited)),
                )
                return (step + 1, waited + more_waited, following, *new)

            upcoming, more_waited = timed(iterator.get_next_as_optional, is_training)
            carried = (tf.constant(1), waited + more_waited, upcoming, *tf.nest.flatten(logs))
            _, waited, _, *last = tf.while_loop(more, next_step, carried, parallel_iterations=1)
            return tf.nest.pack_sequence_as(logs, last), waited

        def one_step_of(iterator):
            data, waited = timed(iterator.get_next, is_training)
            return one_step(data), waited

        # Replicas gather the rows of an embedding's gradient, and in a loop of the graph their
        # number must stay what it is, which that of a smaller last batch does not.
        replicas = self.distribute_strategy.num_replicas_in_sync
        gathers = is_training and replicas > 1 and self._has_embeddings()
        calls = self.steps_per_execution if gathers else 1
        on_iterator = many_steps if self.steps_per_execution > calls else one_step_of

        if not self.run_eagerly:
            one_step_on_data = tf.function(one_step, reduce_retracing=True, autograph=False)
            on_iterator = tf.function(on_iterator, reduce_retracing=True, autograph=False)
        else:
            one_step_on_data = one_step

        def run(iterator):
            if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
                logs, waited = on_iterator(iterator)
                for _ in range(calls - 1):
                    try:
                        logs, more_waited = on_iterator(iterator)
                    except tf.errors.OutOfRangeError:
                        break
                    waited += more_waited
                if is_training and self.input_clock is not None:
                    self.input_clock.add(waited)
                return logs
            for _, data in zip(range(self.steps_per_execution), iterator, strict=False):
                logs = one_step_on_data(data)
            return logs

        return run

    def _explained(self, function):
        """A train or test function whose assertions in the graph raise tfbig's errors."""

        def explained(iterator):
            try:
                return function(iterator)
            except tf.errors.InvalidArgumentError as e:
                error = self._error_of(str(e))
                if error is None:
                    raise
                raise error from None

        return explained

    def _error_of(self, message):
        """What an assertion in the graph stands for; None if it is another's."""
        if NO_SAMPLES in message:
            return errors.InvalidOptionError(NO_SAMPLES)
        if _NO_SPARSE_SAMPLES in message:
            return errors.UnsupportedStrategyError(
                "tf.data cannot hand a worker a sparse batch of no samples. Received: a batch of "
                "fewer samples than workers, the last of an epoch. Use drop_remainder=True, or "
                "leave samples out."
            )
        if LENGTHS_DIFFER in message:
            return errors.UnsupportedModelError(
                "Replicas looked up a table at constant positions of different lengths, in which "
                "an index stands several times, such as the relative positions of sequences that "
                "each worker pads to its own longest. Which rows of its gradient are one cannot be "
                "told. Pad the sequences of all workers to one length."
            )
        if OVERFLOW in message:
            return errors.GradientOverflowError(
                f"A gradient is not finite after the exchange in {self.exchange_dtype}: it "
                "overflows there, or training diverged. Use exchange_dtype='bfloat16' or None, or "
                "a loss scale, which skips such updates."
            )
        if TOO_MANY_SKIPS in message:
            return self.loss_scale_state.error(self.trainable_variables)
        return None

    def make_train_function(self, force=False):
        self._training_batch_size = self._batch_size
        self._prepare_training(self._training_batch_size)
        if self.train_function is None or force:
            self.train_function = self._explained(self._make_train_function())

    def _rebuild_step(self):
        """Has the functions that train and test made anew at their next call."""

        def train(iterator):
            self._prepare_training(self._training_batch_size)
            self.train_function = self._explained(self._make_train_function())
            return self.train_function(iterator)

        def test(iterator):
            self.make_test_function(force=True)
            return self.test_function(iterator)

        # Not None where there were any: in the loop of `fit` Keras goes on calling them.
        self.train_function = self.train_function and train
        self.test_function = self.test_function and test

    def _make_train_function(self):
        """Hook: the function of an iterator that trains."""
        return self._step_function(self._checked_train_step(), is_training=True)

    def _checked_train_step(self):
        """Hook: the `train_step` that runs."""
        return self.train_step

    def predict_on_batch(self, x):
        if self.distribute_strategy.num_replicas_in_sync == 1:
            return super().predict_on_batch(x)
        return self.predict(tf.data.Dataset.from_tensors((x,)), verbose=0)

    def make_predict_function(self, force=False):
        # Keras compiles one function for all replicas; XLA finds the variables
        # of the first replica on another device than the second's.
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1 or not self.jit_compile:
            super().make_predict_function(force)
            return
        if self.predict_function is not None and not force:
            return

        def replica_step(data):
            step = tf.function(self.predict_step, jit_compile=True, autograph=False)
            return step(without_optionals(data))

        def one_step(data):
            outputs = strategy.run(replica_step, args=(data,))
            return _trainer_tf.reduce_per_replica(outputs, strategy, reduction="concat")

        one_step = tf.function(one_step, reduce_retracing=True, autograph=False)

        def predict_function(steps):
            outputs = [one_step(data) for data in steps]
            return keras.tree.map_structure(lambda *parts: _trainer_tf.concat(parts), *outputs)

        self.predict_function = predict_function

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            self.test_function = self._explained(self._step_function(self.test_step))
