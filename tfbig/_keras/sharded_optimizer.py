"""Keras's optimizers update whole variables on all replicas; here each replica updates its pieces.

The optimizer stays as it is, and is built on the model's own weights. Its state consists of
`ShardedVariable`s, and while a replica updates its pieces, the weights have the values of pieces:
what reads a weight or a part of the state reads the piece, and what assigns one assigns that.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer

from tfbig import _types, errors
from tfbig._keras import scaled_updates
from tfbig._keras import variables as _variables
from tfbig._keras.sharded_variable import ShardedVariable
from tfbig._keras.thread import current, holding

__all__ = (
    "apply_to_pieces",
    "build_divided",
    "clip_by_norm",
    "clip_by_value",
    "index_of",
    "is_elementwise",
    "is_overwritten",
    "refuse_state_in_no_list",
    "refuse_unsupported",
    "state_of",
    "weights_of",
)

# Optimizers that treat each element by itself, by the class that has the update.
_ELEMENTWISE = (
    keras.optimizers.SGD,
    keras.optimizers.Adam,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.Adadelta,
    keras.optimizers.Adamax,
    keras.optimizers.Ftrl,
    keras.optimizers.Lion,
)

# Methods that get all gradients or weights at once, or that tfbig does the work of. One of an
# optimizer's own would be passed over, or see those of one replica.
_WHOLE_UPDATE = (
    "_backend_apply_gradients",
    "_backend_update_step",
    "_clip_by_norm",
    "_clip_gradients",
    "_update_model_variables_moving_average",
    "apply",
    "apply_gradients",
)


def is_elementwise(optimizer: _types.Optimizer) -> bool:
    """Whether an optimizer is known to treat each element of a variable by itself.

    A subclass that has an update or a state of its own is not known to.
    """
    names = ("update_step", "build", "_apply_weight_decay", "_backend_update_step")
    known = {getattr(cls, name) for cls in (*_ELEMENTWISE, TFOptimizer) for name in names}
    return all(getattr(type(optimizer), name) in known for name in names)


def refuse_unsupported(optimizer: _types.Optimizer) -> None:
    """Raises for an optimizer whose state cannot be divided."""
    cls = type(optimizer)
    changed = [
        name
        for name in _WHOLE_UPDATE
        if getattr(cls, name) is not getattr(TFOptimizer, name)
        # Its scalar depends on the number of the update alone.
        and getattr(cls, name) is not getattr(keras.optimizers.Nadam, name)
    ]
    if cls._apply_weight_decay.__module__.split(".")[0] != "keras":
        # It is given all weights; each replica would see only its own.
        changed.append("_apply_weight_decay")
    if changed:
        raise errors.InvalidOptionError(
            "`shard` needs an optimizer that updates variables in `update_step` alone. Received: "
            f"{cls.__name__}, which has its own {', '.join(changed)}. Use shard=None."
        )


# --- What Keras's optimizers know ------------------------------------------------------


def weights_of(optimizer: _types.Optimizer) -> list[_types.KerasVariable]:
    """The weights that an optimizer was built on; none before that."""
    return list(optimizer._trainable_variables)


def index_of(optimizer: _types.Optimizer, variable: _types.KerasVariable) -> int:
    """The index of a weight among those of `weights_of`."""
    return int(optimizer._get_variable_index(variable))


def is_overwritten(optimizer: _types.Optimizer, variable: _types.KerasVariable) -> bool:
    """Whether the gradient of a weight is its new value."""
    return bool(optimizer._overwrite_variable_with_gradient(variable))


def clip_by_norm(optimizer: _types.Optimizer, rows: tf.IndexedSlices) -> tf.IndexedSlices:
    """Rows clipped as the optimizer's `clipnorm` says."""
    return optimizer._clip_by_norm(rows)


def clip_by_value(
    optimizer: _types.Optimizer, gradients: list[_types.Gradient]
) -> list[_types.Gradient]:
    """Gradients, or pieces of them, clipped as the optimizer's `clipvalue` says."""
    clipped: list[_types.Gradient] = optimizer._clip_gradients(gradients)
    return clipped


# --- State ---------------------------------------------------------------------------


_add_beside = TFOptimizer.add_variable_from_reference


def _add_variable_from_reference(
    self: TFOptimizer, reference_variable: _types.KerasVariable, *args: Any, **kwargs: Any
) -> _types.KerasVariable:  # Any: of Keras.
    # Keras puts it where the weight lies, which here is in several places.
    is_divided = isinstance(reference_variable, ShardedVariable)
    add = BaseOptimizer.add_variable_from_reference if is_divided else _add_beside
    return add(self, reference_variable, *args, **kwargs)


TFOptimizer.add_variable_from_reference = _add_variable_from_reference


class _LaterVariable(keras.Variable):  # type: ignore[misc]  # Keras has no types.
    """A part of the state before it is known where it lies: it has no value yet."""

    def _initialize_with_initializer(self, initializer: _types.AnyFunction) -> None:
        self._initial = initializer
        self._value = None

    @property
    def value(self) -> _types.Tensor:
        raise _ReadInBuildError


class _ReadInBuildError(Exception):
    """An optimizer reads or assigns its state in `build`."""


def build_divided(
    optimizer: _types.Optimizer,
    build: Callable[[], object],
    place: Callable[[int, _types.KerasVariable, Callable[[], _types.Tensor]], None],
) -> None:
    """Builds an optimizer whose state is never whole: it is placed part by part.

    Args:
        optimizer: the optimizer.
        build: builds it.
        place: function of the index of a weight, a part of the state that belongs to it, and a
            function without arguments that returns the initial value of that part, which it
            divides.

    Raises:
        InvalidOptionError: If it reads its state in `build`, or it cannot be told to which weight
            a part of the state belongs.
    """
    later: list[_LaterVariable] = []

    def add_later(
        shape: Sequence[int],
        initializer: Any = "zeros",  # Any: a name, a function or an object.
        dtype: str | None = None,
        aggregation: str = "none",
        layout: object = None,
        name: str | None = None,
    ) -> _types.KerasVariable:
        with keras.name_scope(optimizer.name):
            variable = _LaterVariable(
                keras.initializers.get(initializer),
                shape=tuple(shape),
                dtype=dtype,
                trainable=False,
                aggregation=aggregation,
                name=name,
            )
        optimizer._track_variable(variable)
        later.append(variable)
        return variable

    vars(optimizer)["add_variable"] = add_later
    waiting = _set_aside_checkpoint(optimizer)
    try:
        build()
        refuse_state_in_no_list(optimizer)
    except (_ReadInBuildError, errors.InvalidOptionError) as e:
        # As it was, so that it can be built without `shard`.
        for variable in later:
            optimizer._untrack_variable(variable)
        optimizer._trainable_variables_indices.clear()
        optimizer.built = False
        if isinstance(e, errors.InvalidOptionError):
            raise
        raise errors.InvalidOptionError(
            "`shard` needs an optimizer that makes its state in `build` without reading it. "
            f"Received: {type(optimizer).__name__}, which copies variables in `build`. Use "
            "shard=None, or another optimizer."
        ) from None
    finally:
        del vars(optimizer)["add_variable"]
        for holder, positions in waiting:
            holder._self_unconditional_deferred_dependencies = positions
    owners = _weights_of_state(optimizer)
    for variable in later:
        initial = functools.partial(variable._initial, tuple(variable.shape), dtype=variable._dtype)
        if id(variable) in owners:
            place(owners[id(variable)], variable, initial)
        else:
            # A scalar of the optimizer as a whole: each replica has it.
            variable.__class__ = keras.Variable
            variable._initialize(initial)
    for holder, _ in waiting:
        for name, part in holder._trackable_children().items():
            holder._handle_deferred_dependencies(name, part)


# Any: TensorFlow has no types.
def _set_aside_checkpoint(optimizer: _types.Optimizer) -> list[tuple[Any, dict[str, Any]]]:
    """Has what is tracked next not be restored from a `tf.train.Checkpoint` that waits for it.

    Returns:
        The optimizer, the lists that it keeps, and what waits for each.
    """
    waiting = []
    for holder in (optimizer, *optimizer._trackable_children().values()):
        positions = getattr(holder, "_self_unconditional_deferred_dependencies", {})
        if positions:
            waiting.append((holder, positions))
            holder._self_unconditional_deferred_dependencies = collections.defaultdict(list)
    return waiting


def refuse_state_in_no_list(optimizer: _types.Optimizer) -> None:
    """Raises for a built optimizer of which it is not known what part of the state is whose."""
    owners = _weights_of_state(optimizer)
    for variable in optimizer.variables:
        if id(variable) not in owners and tuple(variable.shape):
            raise errors.InvalidOptionError(
                "`shard` needs an optimizer that keeps its state in lists with an entry for each "
                f"weight. Received: {type(optimizer).__name__}, whose {variable.path} is in none. "
                "Use shard=None."
            )


def _weights_of_state(optimizer: _types.Optimizer) -> dict[int, int]:
    """The index of the weight that a part of the state belongs to, by the identity of the part.

    Keras keeps the state in lists with an entry for each weight.
    """
    number = len(optimizer._trainable_variables)
    found: dict[int, int] = {}
    for name, value in vars(optimizer).items():
        if (
            name not in ("_variables", "_trainable_variables")
            and isinstance(value, list | tuple)
            and len(value) == number
        ):
            found |= {id(v): i for i, v in enumerate(value) if isinstance(v, keras.Variable)}
    return found


def state_of(optimizer: _types.Optimizer) -> list[tuple[int, _types.KerasVariable]]:
    """The parts of an optimizer's state that belong to one weight, with the index of it."""
    owners = _weights_of_state(optimizer)
    return [
        (owners[id(v)], v)
        for v in optimizer.variables
        # Adafactor has integers where it needs nothing.
        if id(v) in owners and tf.as_dtype(v.dtype).is_floating
    ]


# --- One update ------------------------------------------------------------------------


def apply_to_pieces(
    optimizer: _types.Optimizer,
    gradients: list[_types.Gradient | None],
    variables: list[_types.KerasVariable],
    values: list[_types.Tensor | None],
) -> list[_types.Tensor]:
    """Updates the pieces of a replica; returns the new ones. In replica context.

    Nothing is exchanged with other replicas. What the replica has of the optimizer's state is
    assigned, and so is its copy of what the optimizer does not divide, such as `iterations`.

    Args:
        optimizer: built, with a divided state.
        gradients: the replica's piece of each gradient; None where there is none. Those of the
            first weights; the others are only averaged.
        variables: the weights of which the replica has pieces.
        values: the pieces; None for what the replica has of a divided weight, which is assigned.
    """
    weights = {id(v) for v in variables}
    with _variables.VariableValues() as scope, holding("own_pieces", weights):
        for variable, value in zip(variables, values, strict=True):
            if value is not None:
                # Past the constructor of the scope, which wants values of the variable's shape.
                scope.state_mapping[id(variable)] = value
        if any(g is not None for g in gradients):
            optimizer.apply(gradients, variables[: len(gradients)])
        else:
            # Keras takes that for a mistake; other replicas may have pieces.
            optimizer._backend_apply_gradients([], [])
            optimizer._iterations.assign_add(1)
        new = [tf.convert_to_tensor(v.value) for v in variables]
    for variable in scope.assigned:
        if id(variable) not in weights:
            _variables.own_copy(variable).assign(scope.get_current_value(variable))
    return new


def _own_pieces() -> set[int] | None:
    """Identities of the weights of which this replica has pieces, while it updates them."""
    pieces: set[int] | None = current("own_pieces")
    return pieces


_key_of_keras = TFOptimizer._var_key


def _var_key(self: TFOptimizer, variable: _types.KerasVariable | _types.Variable) -> object:
    if isinstance(variable, ShardedVariable):
        return variable.key
    if isinstance(variable, keras.Variable) and _own_pieces() is not None:
        # What has the value of a piece is known by the variable itself.
        variable = variable._value
    return _key_of_keras(self, variable)


TFOptimizer._var_key = _var_key


def _replaced_for_pieces(name: str) -> Callable[[_types.AnyFunction], _types.AnyFunction]:
    """Has a method of Keras's optimizers replaced while a replica updates its pieces."""
    original = getattr(TFOptimizer, name)

    def decorate(replacement: _types.AnyFunction) -> _types.AnyFunction:
        @functools.wraps(original)
        def method(self: TFOptimizer, *args: Any, **kwargs: Any) -> object:  # Any: Keras's own.
            chosen = original if _own_pieces() is None else replacement
            return chosen(self, *args, **kwargs)

        setattr(TFOptimizer, name, method)
        return replacement

    return decorate


def _assigns(kind: str) -> _types.AnyFunction:
    """What replaces `assign`, `assign_add` or `assign_sub` of an optimizer."""

    def assign(
        self: TFOptimizer, variable: _types.KerasVariable, value: _types.Gradient | float
    ) -> None:
        is_in_place = id(variable) not in get_stateless_scope().state_mapping
        if isinstance(variable, ShardedVariable) and is_in_place:
            variable.update_own(kind, value)
        else:
            # Of a weight, the new piece; of what is not divided, the new value.
            new = _variables.updated(tf.convert_to_tensor(variable.value), kind, value)
            get_stateless_scope().add_update((variable, new))

    return assign


_replaced_for_pieces("assign")(_assigns("update"))
_replaced_for_pieces("assign_add")(_assigns("add"))
_replaced_for_pieces("assign_sub")(_assigns("sub"))


@_replaced_for_pieces("_clip_gradients")
def _clip_gradients(
    self: TFOptimizer, gradients: list[_types.Gradient | None]
) -> list[_types.Gradient | None]:
    # They are clipped already: a norm is that of whole gradients.
    return gradients


@_replaced_for_pieces("_apply_weight_decay")
def _apply_weight_decay(self: TFOptimizer, variables: Sequence[_types.KerasVariable]) -> None:
    if self.weight_decay is None:
        return
    for variable in variables:
        # By its TensorFlow name, as without pieces.
        is_divided = isinstance(variable, ShardedVariable)
        if self._use_weight_decay(_variables.own_copy(variable) if is_divided else variable._value):
            rate = tf.cast(self.learning_rate, variable.dtype)
            decay = tf.cast(self.weight_decay, variable.dtype)
            self.assign_sub(variable, variable * decay * rate)


@_replaced_for_pieces("_backend_update_step")
def _backend_update_step(
    self: TFOptimizer,
    gradients: Sequence[_types.Gradient],
    variables: Sequence[_types.KerasVariable],
    learning_rate: _types.Tensor,
) -> None:
    scope, own = get_stateless_scope(), _own_pieces() or set()
    before = {id(v) for v in scope.assigned}
    for gradient, variable in zip(gradients, variables, strict=True):
        scaled_updates.update_step(self, gradient, variable, learning_rate)
    shared = [v.path for v in scope.assigned if id(v) not in before | own]
    if shared:
        # Each replica would make of it something else.
        raise errors.InvalidOptionError(
            "`shard` needs an optimizer whose `update_step` assigns only the weight and state of "
            "that weight, in lists with an entry for each. Received: "
            f"{type(self).__name__}, which assigns {', '.join(shared)}. Use shard=None."
        )


@_replaced_for_pieces("_update_model_variables_moving_average")
def _update_averages(self: TFOptimizer, variables: Sequence[_types.KerasVariable]) -> None:
    if not self.use_ema:
        return
    frequency, own = self.ema_overwrite_frequency, _own_pieces() or set()
    for variable, average in zip(variables, self._model_variables_moving_average, strict=True):
        if average is None or id(variable) not in own:
            continue
        dtype = tf.as_dtype(variable.dtype)
        # The first update sets the average.
        is_later = tf.cast(tf.not_equal(tf.convert_to_tensor(self.iterations), 0), dtype)
        momentum = is_later * self.ema_momentum
        value = tf.convert_to_tensor(variable.value)
        mean = momentum * tf.convert_to_tensor(average.value) + (1 - momentum) * value
        average.update_own("update", mean)
        if frequency:
            # Keras overwrites in a conditional, out of which no piece could be handed.
            overwrites = tf.equal((self.iterations + 1) % frequency, 0)
            self.assign(variable, tf.where(overwrites, mean, value))


@_replaced_for_pieces("_overwrite_model_variables_with_average_value")
def _overwrite_with_average(self: TFOptimizer, variables: object) -> None:
    # Done with the averages.
    del self, variables


_apply_of_keras = TFOptimizer._backend_apply_gradients


def _backend_apply_gradients(self: TFOptimizer, gradients: object, variables: object) -> None:
    if _own_pieces() is None and any(isinstance(v, ShardedVariable) for v in self._variables):
        raise errors.UnsupportedModelError(
            f"The state of this {type(self).__name__} is divided over the replicas, and only "
            "tfbig's update can apply it. Train the model that has `shard`, or, in a `train_step` "
            "of your own, use tfbig.apply_gradients."
        )
    _apply_of_keras(self, gradients, variables)


TFOptimizer._backend_apply_gradients = _backend_apply_gradients


_swap_of_keras = keras.callbacks.SwapEMAWeights._tf_swap_variables


def _swap_averages(self: keras.callbacks.SwapEMAWeights, optimizer: _types.Optimizer) -> None:
    averages = optimizer._model_variables_moving_average
    if not any(isinstance(v, ShardedVariable) for v in averages):
        _swap_of_keras(self, optimizer)
        return
    for weight, average in zip(optimizer._trainable_variables, averages, strict=True):
        if average is not None:
            kept, mean = _variables.values_of([weight, average])
            _variables.assign_all([weight, average], [mean, kept])


_finalize_of_keras = keras.callbacks.SwapEMAWeights._tf_finalize_ema_values


def _finalize_averages(self: keras.callbacks.SwapEMAWeights, optimizer: _types.Optimizer) -> None:
    averages = optimizer._model_variables_moving_average
    if not any(isinstance(v, ShardedVariable) for v in averages):
        _finalize_of_keras(self, optimizer)
        return
    for weight, average in zip(optimizer._trainable_variables, averages, strict=True):
        if average is not None:
            _variables.assign_all([average], _variables.values_of([weight]))


keras.callbacks.SwapEMAWeights._tf_swap_variables = _swap_averages
keras.callbacks.SwapEMAWeights._tf_finalize_ema_values = _finalize_averages
