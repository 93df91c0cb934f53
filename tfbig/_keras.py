"""What Keras and tf.distribute do otherwise than tfbig needs.

This is the only module that touches `keras.src` or a private Keras name. Every
workaround states the reason; `tests/canaries_test.py` demonstrates each defect
and fails on the day upstream mends it.
"""

import collections
import contextlib
import functools
import importlib
import random
import threading
import typing
import weakref

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import trainer as _trainer_tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.backend.tensorflow.trackable import KerasAutoTrackable
from keras.src.losses import loss as _loss_module
from keras.src.models import cloning as _cloning
from keras.src.models import model as _model
from keras.src.models.functional import Functional as Functional
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer as LossScaleOptimizer
from keras.src.saving import object_registration
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.trainers import trainer as _trainer
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.utils import python_utils
from tensorflow.python.eager import context as tf_context

from tfbig import _backend, errors

# Messages of assertions in a graph, by which their errors are told apart.
TOO_MANY_SKIPS = "tfbig: too many skipped updates in a row."
NO_SAMPLES = "A batch must hold at least one sample. Received: a batch of 0 samples."


_backend.check(keras.backend.backend())


# --- Losses ------------------------------------------------------------------
#
# Keras reduces a loss over the samples it sees and divides it by the number of
# replicas. Both are wrong for a cut batch: a micro-batch must be divided by the
# denominator of the whole batch, which only the reduction knows (it depends on
# shapes, sample weights and masks). So the one function through which every
# `keras.Loss` reduces is replaced by one that asks the reducer of the running
# thread, if there is one. Without a reducer it is Keras's own.

_thread = threading.local()


def _reducer():
    return getattr(_thread, "reducer", None)


@contextlib.contextmanager
def intercepted_losses(reducer):
    """Within it, every Keras loss of this thread reduces through `reducer`.

    Args:
        reducer: A callable with the arguments of Keras's
            `reduce_weighted_values` and, first, that function itself, or None
            for Keras's own reduction. In both cases the division by the number
            of replicas is left out.
    """
    previous = _reducer()
    _thread.reducer = reducer or _keras_reduction
    try:
        yield
    finally:
        _thread.reducer = previous


def _keras_reduction(reduce_values, *args, **kwargs):
    return reduce_values(*args, **kwargs)


def _replace_in_loss_module(name, replacement):
    original = getattr(_loss_module, name)
    setattr(_loss_module, name, functools.wraps(original)(functools.partial(replacement, original)))


def _reduce_weighted_values(
    original,
    values,
    sample_weight=None,
    mask=None,
    reduction="sum_over_batch_size",
    dtype=None,
):
    reducer = _reducer() or _keras_reduction
    return reducer(
        original, values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype
    )


def _for_distribution(original, value):
    return original(value) if _reducer() is None else value


_replace_in_loss_module("reduce_weighted_values", _reduce_weighted_values)
_replace_in_loss_module("scale_loss_for_distribution", _for_distribution)
_replace_in_loss_module("unscale_loss_for_distribution", _for_distribution)

merge_mask = _loss_module.apply_mask
match_ranks = _loss_module.squeeze_or_expand_to_same_rank


@contextlib.contextmanager
def output_losses(model):
    """Collects the loss of each output instead of adding it to its metric.

    Keras adds the loss of every output of every call to a mean without weights,
    so that micro-batches of different sizes would count alike. Within the
    context the values are appended to the list that it yields, in the order of
    the metrics; the caller hands their whole-batch values to
    `update_losses`.
    """
    compile_loss = model._compile_loss
    values: list = []
    if compile_loss is None or not compile_loss.metrics:
        yield values
        return

    class Recorder:
        def update_state(self, value, sample_weight=None):
            del sample_weight
            values.append(value)

    metrics = compile_loss._metrics
    object.__setattr__(compile_loss, "_metrics", [Recorder() for _ in metrics])
    try:
        yield values
    finally:
        object.__setattr__(compile_loss, "_metrics", metrics)


def update_losses(model, loss, samples, output_losses, weight):
    """Adds whole-batch losses to the model's metrics.

    Keras weights the loss by samples, the losses of outputs by updates (in a
    compiled step, where it does not know the number of samples).
    """
    model._loss_tracker.update_state(loss, sample_weight=samples)
    if output_losses:
        for metric, value in zip(model._compile_loss.metrics, output_losses, strict=True):
            metric.update_state(value, sample_weight=weight)


def is_summed(variable):
    """Whether a metric's variable stands for the sum over the replicas, as most do."""
    return variable.aggregation == "sum" and variable.dtype.startswith(("float", "bfloat"))


def metrics_results(model, replicas):
    """Results of the metrics, in replica context, for the samples of all replicas.

    Each replica holds an equal part of every sum; see `_reduction.exchange`.
    """
    if replicas == 1:
        return dict(model.get_metrics_result())
    totals = [(v, v.value * replicas) for v in model.metrics_variables if is_summed(v)]
    with VariableValues(totals):
        return dict(model.get_metrics_result())


def returns_global_logs(step):
    """Marks a step whose logs are those of all replicas, on every replica."""
    step.returns_global_logs = True
    return step


def loss_names(model):
    """Names in the logs of the losses that `update_losses` adds."""
    metrics = model._compile_loss.metrics if model._compile_loss is not None else []
    return {model._loss_tracker.name, *(m.name for m in metrics)}


def check_losses(model):
    """Refuses losses that return one value per sample."""
    for loss in keras.tree.flatten(model.loss):
        if isinstance(loss, keras.Loss) and loss.reduction in (None, "none"):
            raise errors.InvalidOptionError(
                "A loss given to `compile` must reduce to a scalar. Received: "
                f"{type(loss).__name__}(reduction={loss.reduction!r}). Use "
                "reduction='sum_over_batch_size', or reduce it in `compute_loss`."
            )


def check_is_scalar(loss):
    """Refuses a loss of one value per sample."""
    if loss is not None and loss.shape.rank != 0:
        raise errors.UnsupportedModelError(
            f"The loss must be a scalar. Received: a loss of shape {tuple(loss.shape)}. A Keras "
            "loss with reduction 'none' returns one value per sample; use "
            "reduction='sum_over_batch_size', or reduce it in `compute_loss`."
        )


# --- Forward pass ------------------------------------------------------------


def forward(model, data, training):
    """Calls the model and its loss on one micro-batch.

    Returns:
        A tuple `(loss, x, y, y_pred, sample_weight)`.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y_pred = model(x, training=training) if model._call_has_training_arg else model(x)
    loss = model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )
    return loss, x, y, y_pred, sample_weight


def update_metrics(model, x, y, y_pred, sample_weight):
    """Updates the metrics; returns the logs of an overridden `compute_metrics`.

    Keras's own `compute_metrics` also computes the result of every metric,
    which is wanted once per update, not once per micro-batch.
    """
    if type(model).compute_metrics is not _trainer.Trainer.compute_metrics:
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight=sample_weight)
    return {}


def has_synchronized_layers(model):
    """Whether a layer exchanges with the other replicas in its forward pass.

    `BatchNormalization(synchronized=True)` does, which fails in a
    `tf.while_loop`.
    """
    return any(getattr(layer, "synchronized", False) for layer in model._flatten_layers())


@contextlib.contextmanager
def without_synchronization(model):
    """Within it, no layer exchanges: a nested graph may not hold an exchange."""
    layers = [x for x in model._flatten_layers() if getattr(x, "synchronized", False)]
    for layer in layers:
        layer.synchronized = False
    try:
        yield
    finally:
        for layer in layers:
            layer.synchronized = True


class VariableValues(keras.StatelessScope):
    """A scope in which assignments to Keras variables change nothing outside.

    `assigned` lists the variables that were assigned, in order. What is
    assigned inside a `tf.while_loop` or an XLA program thereby becomes a value
    that can be carried, averaged over the replicas, or dropped.
    """

    def __init__(self, values=()):
        super().__init__(state_mapping=list(values), collect_losses=True)
        self.assigned = []

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        # Keras takes regularized weights from the scope, and expects all in it.
        return variable._value if value is None else value

    def add_update(self, update):
        super().add_update(update)
        if not any(update[0] is v for v in self.assigned):
            self.assigned.append(update[0])

    def __exit__(self, *args, **kwargs):
        # The regular exit would initialize variables of an outer eager scope.
        global_state.set_global_attribute("stateless_scope", self.original_scope)


def all_layers(model):
    """All layers inside a model, at any depth."""
    return list(model._flatten_layers(include_self=False))


def draws_random_numbers(layer):
    """Whether a layer has a random stream of its own and a use for it."""
    return bool(layer._seed_generators) and getattr(layer, "rate", 1) != 0


def owns(layer, variable):
    """Whether a variable belongs to this very layer, not to one inside it."""
    return any(variable is v for v in layer._non_trainable_variables)


def computes_in_float16(model):
    """Whether the model, or a layer of it, computes in float16."""
    return any(layer.compute_dtype == "float16" for layer in model._flatten_layers())


def check_scope(model):
    """Refuses a model or optimizer that was made outside of the strategy's scope."""
    strategy = model._distribute_strategy
    if tf.distribute.has_strategy() and tf.distribute.get_strategy() is not strategy:
        raise errors.UnsupportedStrategyError(
            "The model must be built in the scope of the strategy that it runs under. "
            f"Received: a model built under {_name(strategy)}, run under "
            f"{_name(tf.distribute.get_strategy())}. Build and compile it inside "
            "`with strategy.scope():`."
        )
    optimizer = model.optimizer
    owner = getattr(optimizer, "_distribution_strategy", None)
    if owner is not None and owner is not model.distribute_strategy:
        raise errors.UnsupportedStrategyError(
            "The optimizer must be made in the scope of the model's strategy. Received: "
            f"{type(optimizer).__name__} made under {_name(owner)}, model under "
            f"{_name(strategy)}. Make it inside `with strategy.scope():`."
        )
    if strategy is None:
        return
    for variable in model.variables:
        if not strategy.extended.variable_created_in_scope(native(variable)):
            raise errors.UnsupportedStrategyError(
                "All variables must be made in the scope of the model's strategy. Received: "
                f"{variable.path}, made outside of {_name(strategy)}. Build the layers inside "
                "`with strategy.scope():`."
            )


def _name(strategy):
    return "no strategy" if strategy is None else type(strategy).__name__


def native(variable):
    """The `tf.Variable` behind a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


# --- Optimizer ---------------------------------------------------------------


@contextlib.contextmanager
def aggregated_gradients():
    """Within it, optimizers of this thread take gradients as they are.

    Keras sums the gradients over the replicas inside `apply`, after clipping
    each replica's own. tfbig exchanges them before, once.
    """
    previous = getattr(_thread, "aggregated", False)
    _thread.aggregated = True
    try:
        yield
    finally:
        _thread.aggregated = previous


def _all_reduce_sum_gradients(
    self, grads_and_vars, _original=TFOptimizer._all_reduce_sum_gradients
):
    if getattr(_thread, "aggregated", False):
        return list(grads_and_vars)
    return _original(self, grads_and_vars)


TFOptimizer._all_reduce_sum_gradients = _all_reduce_sum_gradients

_overwrite_in_cross_replica_context = TFOptimizer._overwrite_model_variables_with_average_value


def _overwrite_with_average(self, trainable_variables):
    # `ema_overwrite_frequency` calls it in replica context, where Keras's own
    # raises; every replica writes its own copy there.
    if tf.distribute.in_cross_replica_context():
        _overwrite_in_cross_replica_context(self, trainable_variables)
        return
    averages = self._model_variables_moving_average
    for variable, average in zip(trainable_variables, averages, strict=True):
        native(variable).assign(native(average))


TFOptimizer._overwrite_model_variables_with_average_value = _overwrite_with_average


def needs_no_merge_call():
    """Whether the strategy updates variables in replica context (TPU does)."""
    return tf.__internal__.distribute.strategy_supports_no_merge_call()


# --- Saving ------------------------------------------------------------------


class ConfigWith:
    """A `get_config` that adds to that of the classes after `owner`.

    Keras records constructor arguments by itself if `get_config` is the default
    one, which it tells by an attribute of the method; so what is added must have
    the attribute of what it is added to.

    Args:
        owner: Function that returns the class which holds the method.
        additions: Name of the method that returns what is added, a dictionary.
    """

    def __init__(self, owner, additions):
        self.owner = owner
        self.additions = additions

    def __get__(self, instance, cls=None):
        if instance is None:
            return self
        inherited = getattr(super(self.owner(), instance), "get_config")  # noqa: B009

        def get_config():
            return {**inherited(), **getattr(instance, self.additions)()}

        vars(get_config)["_is_default"] = python_utils.is_default(inherited)
        return get_config


class SavedState(KerasAutoTrackable, KerasSaveable):
    """Variables that are saved with the model but are not among its weights.

    An attribute of this type goes into `.keras` files, `save_weights` and
    `tf.train.Checkpoint`; `model.weights` stays what the plain Keras model has.
    """

    _names: tuple[str, ...] = ()

    def _obj_type(self):
        return "Metric"  # Which private attributes Keras passes over.

    def variables(self):
        """The variables, in the order of their names."""
        return [getattr(self, name) for name in self._names]

    def save_own_variables(self, store):
        for name in self._names:
            store[name] = getattr(self, name).numpy()

    def load_own_variables(self, store):
        # Files of the plain Keras model have none of it.
        for name in self._names:
            if name in store.keys():  # noqa: SIM118  A store is no dictionary.
                getattr(self, name).assign(store[name])


class SeedStates(SavedState):
    """The states of a model's seed generators, which Keras saves nowhere.

    Without them a resumed run would draw its dropout masks from the start again.
    """

    def __init__(self, model):
        self._model: typing.Any = weakref.ref(model)

    def variables(self):
        return list(self._states().values())

    def _states(self):
        # Looked up late: a layer may make its generator in `build`.
        layers = self._model()._flatten_layers()
        generators = [g for layer in layers for g in getattr(layer, "_seed_generators", ())]
        return {str(k): g.state for k, g in enumerate(generators)}

    def save_own_variables(self, store):
        for name, state in self._states().items():
            store[name] = state.numpy()

    def load_own_variables(self, store):
        for name, state in self._states().items():
            if name in store.keys():  # noqa: SIM118  A store is no dictionary.
                state.assign(store[name])

    def _trackable_children(self, *args, **kwargs):
        return {name: native(state) for name, state in self._states().items()}


def track_for_checkpoint(model, name, value):
    """Makes `value` part of `tf.train.Checkpoint(model=model)`.

    Keras sets the optimizer inside `compile`, where tracking is off.
    """
    model._track_trackable(value, name=name, overwrite=True)


# --- Cloning -----------------------------------------------------------------


def after_cloning(finish):
    """Has `finish(original, clone)` make every clone of `keras.models.clone_model`.

    Keras clones a Sequential subclass into a plain Sequential, and a Functional
    subclass without its constructor arguments.
    """

    def wrap(clone):
        @functools.wraps(clone)
        def cloned(model, *args, **kwargs):
            return finish(model, clone(model, *args, **kwargs))

        return cloned

    for name in ("_clone_functional_model", "_clone_sequential_model"):
        setattr(_cloning, name, wrap(getattr(_cloning, name)))


is_functional = _model.functional_init_arguments


def with_class(model, cls):
    """A model of another class around the same layers, variables and state.

    Keras has no way to put a subclass around a model of any kind (functional,
    sequential, subclassed). The copy is shallow, but for what tracking appends
    to.
    """
    copy = cls.__new__(cls)
    # Keras wraps these methods of every layer; the model's would build the model.
    own = {n: copy.__dict__[n] for n in ("build", "quantize") if n in copy.__dict__}
    copy.__dict__.update(model.__dict__)
    copy.__dict__.update(own)
    for name, value in model.__dict__.items():
        if name.startswith("_self_") and isinstance(value, list | dict):
            copy.__dict__[name] = value.copy()
    copy.train_function = copy.test_function = copy.predict_function = None
    return copy


def recompile(model, optimizer):
    """Compiles a model anew with the settings it has."""
    if model.compiled:
        model.compile(**{**model._compile_config.config, "optimizer": optimizer})


def is_compile_of(model, module):
    """Whether `model.compile` is the one of a module's class, not a user's."""
    return type(model).compile.__module__.startswith(module)


def register_as(cls, name):
    """Saves objects of `cls` under a registered name that is another class's."""
    object_registration.GLOBAL_CUSTOM_NAMES[cls] = name


def registered_name(cls):
    return object_registration.get_registered_name(cls)


def registered_class(name, module, class_name):
    """The class that was saved under these names, or None."""
    found = object_registration.get_registered_object(name)
    if found is None:
        found = getattr(importlib.import_module(module), class_name, None)
    return found


# --- Data --------------------------------------------------------------------


def batch_size(data):
    """Number of samples of a (nested) batch: an int if static, else a tensor."""
    first = next(v for v in keras.tree.flatten(data) if v is not None)
    if isinstance(first, tf.SparseTensor):
        return (
            first.shape[0]
            if first.shape[0] is not None
            else tf.cast(first.dense_shape[0], tf.int32)
        )
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def _without_optionals(data):
    """Keras stands a `tf.experimental.Optional` for a None in a dataset."""
    return keras.tree.map_structure(
        lambda v: None if isinstance(v, tf.experimental.Optional) else v, data
    )


def _specs_of_one_replica(dataset):
    def spec(s):
        # A PerReplicaSpec holds one spec per replica.
        parts = getattr(s, "_value_specs", None)
        s = parts[0] if parts else s
        # What stands for None has no shape.
        return s if hasattr(s, "shape") and not isinstance(s, tf.OptionalSpec) else None

    return tf.nest.map_structure(spec, dataset.element_spec)


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
        keras.src.backend.compute_output_spec(call)


def _effective_batch_size(iterator):
    """The batch size of an epoch iterator, or None where it is not known."""
    size = iterator.data_adapter.batch_size
    if size is None:
        dataset = iterator.data_adapter.get_tf_dataset()
        variant = getattr(dataset, "_variant_tensor", None)
        if variant is not None:
            size = int(tf.raw_ops.ComputeBatchSize(input_dataset=variant))
    return size if size is not None and size > 0 else None


def global_seed():
    """The seed of `tf.random.set_seed` or `keras.utils.set_random_seed`, or None."""
    return tf_context.global_seed()


def is_sharded(dataset):
    """Whether `shard` was called on a dataset, or on one it is made from."""
    return type(dataset).__name__ == "_ShardDataset" or any(
        is_sharded(source) for source in dataset._inputs()
    )


def compile_settings(model):
    """The settings of `compile` as a dictionary of what JSON takes."""

    def serialized(value):
        try:
            return keras.saving.serialize_keras_object(value)
        except (TypeError, ValueError):
            return type(value).__name__

    config = model._compile_config.config if model._compile_config is not None else {}
    return {name: serialized(value) for name, value in config.items()}


@contextlib.contextmanager
def reseeded_shuffling(seed):
    """Within it, `fit` on arrays shuffles by this seed, in each epoch anew.

    Keras shuffles in each epoch alike once a seed is set, and in ways that cannot
    be repeated if none is.
    """
    previous = getattr(_thread, "shuffle_seed", None)
    _thread.shuffle_seed = seed
    try:
        yield
    finally:
        _thread.shuffle_seed = previous


_get_tf_dataset = ArrayDataAdapter.get_tf_dataset


def _reseeded_tf_dataset(self):
    seed = getattr(_thread, "shuffle_seed", None)
    if seed is None or self._shuffle is not True:
        return _get_tf_dataset(self)
    inputs = array_slicing.convert_to_sliceable(self._inputs, target_backend="tensorflow")
    inputs = keras.tree.lists_to_tuples(inputs)

    def permutation(digits):
        # Another one each time the dataset is iterated, in the order of these times.
        key = tf.reduce_sum(digits * [1, 2**10, 2**20, 2**30])
        indices = tf.range(self._num_samples, dtype=tf.int64)
        return tf.random.experimental.stateless_shuffle(indices, tf.stack([seed, key]))

    def batches(indices):
        return tf.data.Dataset.from_tensor_slices(indices).batch(self._batch_size)

    def samples(indices, arrays):
        def part(value):
            if isinstance(value, array_slicing.TensorflowSparseWrapper):
                return array_slicing.slice_tensorflow_sparse_wrapper(value, indices)
            return tf.gather(value, indices)

        return keras.tree.map_structure(part, arrays)

    # `shuffle` draws when an iterator is made, `Dataset.random` when it is first read: with
    # replicas, that happens in the background, and iterators that Keras drops unread race.
    keys = tf.data.Dataset.range(2**10).shuffle(2**10, seed).batch(4).take(1)
    whole = tf.data.Dataset.from_tensors(inputs).repeat()
    return (
        tf.data.Dataset.zip(keys.map(permutation).flat_map(batches), whole)
        .map(samples, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


ArrayDataAdapter.get_tf_dataset = _reseeded_tf_dataset


def new_seed():
    """A seed to shuffle by: made from the global one, else from the system's entropy."""
    seed = global_seed()
    return random.SystemRandom().getrandbits(62) if seed is None else seed


def set_initial_epoch(model, epoch):
    """Has the next `fit`, or the one that begins, start with this epoch."""
    model._initial_epoch = epoch


def data_of_fit(model):
    """The epoch iterator of the `fit` that begins, in `on_train_begin`."""
    return model._epoch_iterator


def known_batches(iterator):
    """Batches of an epoch of an epoch iterator, where that is known, else None."""
    return iterator._num_batches


def resume_data(iterator, epochs, batches, num_batches):
    """Moves the data of the `fit` that begins to where an earlier one was.

    Args:
        iterator: its epoch iterator.
        epochs: int, epochs that are complete.
        batches: int, batches of the next one that are consumed.
        num_batches: int, what `known_batches` was there; or None.
    """
    enumerate_epoch = iterator._enumerate_iterator
    # Makes the iterators that the epochs made, which moves seeds on, and reads nothing.
    if iterator._num_batches is None and not iterator.steps_per_epoch:
        for _ in range(epochs):
            iterator.data_adapter.on_epoch_begin()
            iter(iterator._get_iterator())
            iterator.data_adapter.on_epoch_end()
        # What Keras takes it for once the data have ended.
        iterator._num_batches = num_batches
    else:
        for _ in range(epochs):
            collections.deque(enumerate_epoch(), maxlen=0)

    def rest_of_epoch():
        iterator._enumerate_iterator = enumerate_epoch
        is_first = True
        for begin, end, data in enumerate_epoch():
            if is_first:
                # With steps_per_epoch, one iterator goes on through all epochs.
                _read(data, iterator._steps_seen - iterator.steps_per_execution)
                is_first = False
            if begin < batches:
                _read(data, end + 1 - begin)
            else:
                yield begin, end, data

    iterator._enumerate_iterator = rest_of_epoch


def _read(data, batches):
    for _ in range(batches):
        next(data, None)


def values_of(variables):
    """NumPy values of variables that are the same on all replicas.

    Of what is summed over the replicas, such as metrics, the sum.
    """
    return [_copies(v)[0].numpy() * _parts(v) for v in variables]


def assign_all(variables, values):
    """Assigns what `values_of` returned; nothing is exchanged with other workers."""
    for variable, value in zip(variables, values, strict=True):
        for copy in _copies(variable):
            copy.assign(value / _parts(variable) if _parts(variable) > 1 else value)


def _copies(variable):
    """The `tf.Variable` of each replica of this process."""
    variable = native(variable)
    is_distributed = isinstance(variable, tf.distribute.DistributedValues)
    return variable.values if is_distributed else (variable,)


def _parts(variable):
    """How many replicas hold a part of what the variable stands for."""
    is_distributed = isinstance(native(variable), tf.distribute.DistributedValues)
    if not is_distributed or not is_summed(variable):
        return 1
    return native(variable).distribute_strategy.num_replicas_in_sync


# --- fit, evaluate, predict --------------------------------------------------


# To mypy the mixins are Keras models; in truth they stand before one.
_KerasModel: typing.Any = keras.Model if typing.TYPE_CHECKING else object


class TrainerOverrides(_KerasModel):
    """Replaces what of `keras.Model` fails under `tf.distribute`.

    - `_maybe_symbolic_build` takes shapes from the dataset's specification.
      Keras reduces the first batch with MEAN, which crashes when it splits
      unevenly and for bool inputs.
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
    # The iterator of the running, or last, `fit` or `evaluate`.
    _epoch_iterator: typing.Any = None

    def _check_before_run(self):
        """Hook: raises for what cannot run."""

    def _prepare_training(self, batch_size):
        """Hook: called before training. `batch_size` may be None."""

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self.distribute_strategy
        size = None
        if iterator is not None:
            self._epoch_iterator = iterator
            size = 0 if iterator.num_batches == 0 else _effective_batch_size(iterator)
            data_batch = _specs_of_one_replica(iterator._distributed_dataset)
            if strategy.num_replicas_in_sync > 1 and None in keras.tree.flatten(data_batch):
                raise errors.UnsupportedStrategyError(
                    "None among the inputs cannot be handed to several replicas: "
                    "tf.distribute's iterators fail on it. Received: a dataset of "
                    f"{data_batch}. Use one replica, or a tensor in place of None."
                )
        elif data_batch is not None:
            data_batch = keras.tree.map_structure(
                lambda v: v if v is None else tf.convert_to_tensor(v), data_batch
            )
            size = batch_size(data_batch)
            data_batch = keras.tree.map_structure(
                lambda v: v if v is None else tf.TensorSpec([None, *v.shape[1:]], v.dtype),
                data_batch,
            )
        if size == 0:
            raise errors.InvalidOptionError(NO_SAMPLES)
        self._batch_size = size
        self._check_before_run()
        with strategy.scope():
            if any(_is_composite(spec) for spec in keras.tree.flatten(data_batch)):
                _build_by_call(self, data_batch)
            self._symbolic_build(data_batch=data_batch)

    def _get_metrics_result_or_logs(self, logs):
        # Without logs the epoch was resumed after its last batch.
        return super()._get_metrics_result_or_logs(logs or self.get_metrics_result())

    def _compute_loss(self, *args, **kwargs):
        loss = super()._compute_loss(*args, **kwargs)
        check_is_scalar(loss)
        return loss

    def _share_of_replica(self, data):
        """The part of a batch that this replica trains on."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        if replicas == 1:
            return data
        size = batch_size(data)
        index = tf.cast(context.replica_id_in_sync_group, tf.int32)
        # The first replicas get more, as from a distributed dataset.
        begin, end = ((i * size + replicas - 1) // replicas for i in (index, index + 1))
        return keras.tree.map_structure(lambda v: v if v is None else v[begin:end], data)

    def _global_logs(self, replica_step, data):
        """Runs a step on all replicas; returns its logs, those of all replicas as one."""
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1:
            return strategy.run(replica_step, args=(data,))
        is_global = getattr(replica_step, "returns_global_logs", False) and all(
            is_summed(v) for v in self.metrics_variables
        )

        is_placed = any(
            isinstance(v, tf.distribute.DistributedValues) for v in tf.nest.flatten(data)
        )

        def step(data):
            logs = replica_step(data if is_placed else self._share_of_replica(data))
            if is_global or not logs:
                return logs
            mean = tf.distribute.get_replica_context().all_reduce(
                "MEAN", [tf.cast(v, tf.float32) for v in tf.nest.flatten(logs)]
            )
            return tf.nest.pack_sequence_as(logs, mean)

        logs = tf.nest.map_structure(
            lambda v: strategy.experimental_local_results(v)[0], strategy.run(step, args=(data,))
        )
        if isinstance(logs, dict) and not is_global:
            results = self.get_metrics_result()
            logs |= {k: v for k, v in results.items() if k in logs}
        return logs

    def _step_function(self, replica_step):
        def one_step(data):
            return self._global_logs(replica_step, _without_optionals(data))

        def many_steps(iterator):
            # Keras nests two tf.functions here, which fails under
            # MirroredStrategy. Optionals tell the end of the data: an exception
            # would lose the logs of the steps before it.
            logs = one_step(iterator.get_next())

            def more(step, upcoming, *_):
                return (step < self.steps_per_execution) & upcoming.has_value()

            def next_step(step, upcoming, *_):
                new = tf.nest.flatten(one_step(upcoming.get_value()))
                following = tf.cond(
                    step + 1 < self.steps_per_execution,
                    iterator.get_next_as_optional,
                    lambda: upcoming,
                )
                return (step + 1, following, *new)

            carried = (tf.constant(1), iterator.get_next_as_optional(), *tf.nest.flatten(logs))
            _, _, *last = tf.while_loop(more, next_step, carried, parallel_iterations=1)
            return tf.nest.pack_sequence_as(logs, last)

        def on_iterator(iterator):
            if self.steps_per_execution == 1:
                return one_step(iterator.get_next())
            return many_steps(iterator)

        if not self.run_eagerly:
            one_step_on_data = tf.function(one_step, reduce_retracing=True, autograph=False)
            on_iterator = tf.function(on_iterator, reduce_retracing=True, autograph=False)
        else:
            one_step_on_data = one_step

        def run(iterator):
            if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
                return on_iterator(iterator)
            for _, data in zip(range(self.steps_per_execution), iterator, strict=False):
                logs = one_step_on_data(data)
            return logs

        def function(iterator):
            try:
                return run(iterator)
            except tf.errors.InvalidArgumentError as e:
                if NO_SAMPLES in str(e):
                    raise errors.InvalidOptionError(NO_SAMPLES) from None
                raise

        return function

    def make_train_function(self, force=False):
        self._prepare_training(self._batch_size)
        if self.train_function is not None and not force:
            return
        function = self._step_function(self.train_step)

        def train_function(iterator):
            try:
                return function(iterator)
            except tf.errors.InvalidArgumentError as e:
                if TOO_MANY_SKIPS not in str(e):
                    raise
                raise self.loss_scale_state.error(self.trainable_variables) from None

        self.train_function = train_function

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
            return step(_without_optionals(data))

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
            self.test_function = self._step_function(self.test_step)
