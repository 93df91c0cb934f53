"""`keras.RematScope` fails in `fit`; here a layer's call is a pure function that can be repeated.

`tf.recompute_grad` would draw other random numbers in the repetition, and make assignments again:
the dropout mask would differ, and moving statistics would move twice. Here the call of a layer is a
function of its inputs, its variables and the state around it, which are all passed to it; so the
second pass computes the same as the first.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import tensorflow as tf
from keras.src.backend.common import global_state, masking
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.ops.operation import Operation
from tensorflow.compiler.tf2xla.ops import gen_xla_ops as _xla_ops
from tensorflow.python.eager import record as _record

from tfbig import _types, errors
from tfbig._keras import logits, stages
from tfbig._keras.devices import is_on_cpu
from tfbig._keras.gradients import custom_gradient
from tfbig._keras.sharded_variable import Gathering, ShardedWeight
from tfbig._keras.thread import current, holding
from tfbig._keras.variables import VariableValues

# Operations that draw different numbers each time they run.
_DRAWS = (
    "Multinomial",
    "ParameterizedTruncatedNormal",
    "RandomGamma",
    "RandomPoissonV2",
    "RandomShuffle",
    "RandomStandardNormal",
    "RandomUniform",
    "RandomUniformInt",
    "TruncatedNormal",
)

# What a `VariableValues` maps: the identities of variables to their values.
_State = dict[int, _types.Tensor]


def recomputed(
    layers: Sequence[_types.Layer], compiled: bool = False
) -> contextlib.AbstractContextManager[None]:
    """A context in which calls of these layers keep no activations for the backward pass.

    To be entered inside a `VariableValues`.

    Args:
        layers: the layers, none inside another.
        compiled: whether XLA compiles what is traced.
    """
    return holding("recomputation", (frozenset(map(id, layers)), compiled))


# The second pass is on the layer's stage, too.
keras_call = stages.placed_call


@functools.wraps(keras_call)
def _call(self: Operation, *args: object, **kwargs: object) -> _types.Structure:
    layers, compiled = current("recomputation") or ((), False)
    if id(self) not in layers:
        return keras_call(self, *args, **kwargs)
    return _RepeatableCall(self, args, kwargs, compiled)()


Operation.__call__ = _call


class _RepeatableCall:
    """One call of a layer, which can be made a second time.

    Args:
        layer: the layer.
        args: its positional arguments.
        kwargs: its keyword arguments.
        compiled: whether XLA compiles what is traced.
    """

    def __init__(
        self,
        layer: _types.Layer,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        compiled: bool,
    ) -> None:
        self.layer = layer
        self.arguments = (args, kwargs)
        self.compiled = compiled
        self.scope = get_stateless_scope()
        self.state: _State = dict(self.scope.state_mapping)
        self.variables = list(layer.variables)
        self.gathering: Gathering | None = current("gathering")
        leaves = tf.nest.flatten(self.arguments, expand_composites=True)
        self.is_tensor = [tf.is_tensor(x) for x in leaves]
        self.leaves = leaves
        self.inputs = [x for x in leaves if tf.is_tensor(x)]
        # Tensors carry their masks as attributes, which copies of them lose.
        self.masks = [masking.get_keras_mask(x) for x in self.inputs]
        # What the layers inside take from the layers around them.
        self.call_context = copy.copy(global_state.get_global_attribute("current_call_ctx"))
        self.attention: object = current("chunked_attention")
        # None outside of mixed precision, which is not the same as a scope without a dtype: in
        # that, Keras takes all variables to be of `floatx`.
        self.autocast: object = get_autocast_scope()

    def __call__(self) -> _types.Structure:
        if self.gathering is not None:
            self.gathering.reach(self.inputs)
        values = [tf.convert_to_tensor(self._source_of(v)) for v in self.variables]
        # Of the first pass: the outputs, and the scope with what it assigned. Any: of two types.
        first: list[Any] = []

        @custom_gradient
        def function(*tensors: _types.Tensor) -> tuple[list[_types.Tensor], _types.AnyFunction]:
            known = [*tensors, *self.inputs, *self.masks, *self.state.values()]
            with _record.stop_recording(), _only_of(self.layer, known):
                outputs, scope = self._run(tensors, self.state)
            first.extend((outputs, scope))

            def gradient(
                *upstream: _types.Tensor, variables: Sequence[_types.Variable] | None = None
            ) -> list[_types.Gradient | None]:
                if variables:
                    raise self._error(f"it uses a tf.Variable, {variables[0].name}")
                return self._gradient(tensors, upstream)

            return _differentiable(outputs, scope), gradient

        passed = iter(function(*values, *self.inputs))
        outputs, scope = first
        for variable in scope.assigned:
            value = scope.get_current_value(variable)
            self.scope.add_update((variable, tf.stop_gradient(value)))

        def result(output: _types.Tensor) -> _types.Tensor:
            if not _is_differentiable(output):
                return output
            mask, output = masking.get_keras_mask(output), logits.joined(output, passed)
            if mask is not None:
                masking.set_keras_mask(output, mask)
            return output

        outputs = tf.nest.map_structure(result, outputs, expand_composites=True)
        for old, new in zip(scope.losses, passed, strict=True):
            self._replace_loss(old, new)
        return outputs

    def _source_of(self, variable: _types.KerasVariable) -> _types.Tensor:
        """What the call is a function of in place of a variable: its value, or its piece."""
        if self.gathering is not None and isinstance(variable, ShardedWeight):
            return self.gathering.source_of(variable)
        return self.scope.get_current_value(variable)

    def _run(
        self, tensors: Sequence[_types.Tensor], state: _State
    ) -> tuple[_types.Structure, VariableValues]:
        """Calls the layer; returns its outputs and the scope with what it assigned.

        Args:
            tensors: the values of its variables, and then its inputs.
            state: what the `VariableValues` around the call maps.
        """
        values, inputs = tensors[: len(self.variables)], tensors[len(self.variables) :]
        if self.gathering is not None:
            values = self.gathering.values_of(self.variables, values)
        for tensor, mask in zip(inputs, self.masks, strict=True):
            if mask is not None:
                masking.set_keras_mask(tensor, mask)
        rest = iter(inputs)
        leaves = [
            next(rest) if is_tensor else x
            for x, is_tensor in zip(self.leaves, self.is_tensor, strict=True)
        ]
        args, kwargs = tf.nest.pack_sequence_as(self.arguments, leaves, expand_composites=True)
        with (
            VariableValues() as scope,
            holding("recomputation", None),
            holding("reducer", self._refuse_loss),
        ):
            # Past the constructor, which casts to what the layer computes in. A layer inside may
            # compute in something else.
            scope.state_mapping = state | {
                id(v): value for v, value in zip(self.variables, values, strict=True)
            }
            outputs = keras_call(self.layer, *args, **kwargs)
        return outputs, scope

    def _gradient(
        self, tensors: Sequence[_types.Tensor], upstream: Sequence[_types.Tensor]
    ) -> list[_types.Gradient | None]:
        """Gradients of the differentiable outputs, times `upstream`; None for integers."""
        is_float = [t.dtype.is_floating for t in tensors]
        is_connected: list[bool] = []

        def second_pass() -> list[_types.Gradient]:
            # The second pass must wait until the backward pass reaches it, and must not be
            # taken for a repetition of the first.
            if self.gathering is not None:
                self.gathering.reach(upstream)
            again, values = _after(upstream, [tensors, [*self.state.values()]], self.compiled)
            if self.gathering is not None:
                # What it gathers may be on its way before the backward pass reaches the layer.
                again = list(again)
                for i, variable in enumerate(self.variables):
                    if isinstance(variable, ShardedWeight):
                        again[i] = tf.identity(tensors[i])
            state = dict(zip(self.state, values, strict=True))
            wanted = [t for t, f in zip(again, is_float, strict=True) if f]
            with tf.GradientTape() as tape:
                tape.watch(wanted)
                with self._surroundings(), holding("gathering", self.gathering):
                    outputs, scope = self._run(again, state)
                for loss in scope.losses:
                    self._forget_loss(loss)
            gradients = tape.gradient(_differentiable(outputs, scope), wanted, upstream)
            is_connected[:] = [g is not None for g in gradients]
            return [g for g in gradients if g is not None]

        if self.compiled and is_on_cpu(tf.distribute.get_strategy()):
            # On CPU, XLA removes its barriers before it looks for repetitions.
            def never() -> list[_types.Tensor]:
                floats = [t for t, f in zip(tensors, is_float, strict=True) if f]
                return [tf.zeros_like(t) for t, c in zip(floats, is_connected, strict=True) if c]

            gradients = tf.cond(
                _always(upstream), lambda: [tf.convert_to_tensor(g) for g in second_pass()], never
            )
        else:
            gradients = second_pass()
        found, connected = iter(gradients), iter(is_connected)
        return [next(found) if f and next(connected) else None for f in is_float]

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What surrounded the layer in the forward pass."""
        surroundings = {
            "current_call_ctx": copy.copy(self.call_context),
            "autocast_scope": self.autocast,
        }
        previous = {name: global_state.get_global_attribute(name) for name in surroundings}
        try:
            for name, value in surroundings.items():
                global_state.set_global_attribute(name, value)
            with holding("chunked_attention", self.attention):
                yield
        finally:
            for name, value in previous.items():
                global_state.set_global_attribute(name, value)

    def _replace_loss(self, old: _types.Tensor, new: _types.Tensor) -> None:
        """Puts another tensor in place of a loss, which `add_loss` knows by its identity."""
        for layer in self._forget_loss(old):
            layer._loss_ids.add(id(new))
        self.scope.add_loss(new)

    def _forget_loss(self, loss: _types.Tensor) -> list[_types.Layer]:
        owners = [x for x in self.layer._flatten_layers() if id(loss) in x._loss_ids]
        for layer in owners:
            layer._loss_ids.discard(id(loss))
        return owners

    def _refuse_loss(self, *args: object, **kwargs: object) -> NoReturn:
        raise self._error("it computes a Keras loss in its call")

    def _error(self, reason: str) -> errors.UnsupportedModelError:
        return errors.UnsupportedModelError(_cannot(self.layer, reason))


def _cannot(layer: _types.Layer, reason: str) -> str:
    return (
        f"A layer in `recompute` must be a function of its inputs and its variables. Received: "
        f"{type(layer).__name__} {layer.path or layer.name!r}: {reason}. Leave it out of "
        "`recompute`; with shard='weights', which recomputes every layer that has divided weights, "
        "use shard='optimizer'."
    )


@contextlib.contextmanager
def _only_of(layer: _types.Layer, tensors: Sequence[_types.Tensor]) -> Iterator[None]:
    """Raises if a call uses other tensors than these, or could not be repeated."""

    def refuse(next_creator: _types.AnyFunction, **kwargs: object) -> NoReturn:
        raise errors.UnsupportedModelError(_cannot(layer, "it makes a variable in its call"))

    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    before = set() if graph is None else {op.name for op in graph.get_operations()}
    with tf.variable_creator_scope(refuse):
        yield
    if graph is None:
        return
    known = {id(t) for t in tensors}
    for operation in graph.get_operations():
        if operation.name in before:
            continue
        if operation.type in _DRAWS:
            reason = (
                f"it draws other numbers in each call ({operation.type}); use keras.random with a "
                "seed"
            )
            raise errors.UnsupportedModelError(_cannot(layer, reason))
        for t in operation.inputs:
            # Tensors from outside the graph are constant in it; integers have no gradient.
            has_no_gradient = t.op.type in ("Const", "Placeholder") or not t.dtype.is_floating
            if t.op.name in before and id(t) not in known and not has_no_gradient:
                reason = f"it uses a tensor that is not among its arguments ({t.name})"
                raise errors.UnsupportedModelError(_cannot(layer, reason))


def _is_differentiable(tensor: _types.Tensor) -> bool:
    return bool(tf.is_tensor(tensor) and tensor.dtype.is_floating)


def _differentiable(outputs: _types.Structure, scope: VariableValues) -> list[_types.Tensor]:
    """The parts of the floating-point outputs, then the losses that were added."""
    leaves = tf.nest.flatten(outputs, expand_composites=True)
    parts = (logits.parts_of(x) for x in leaves if _is_differentiable(x))
    return [*itertools.chain.from_iterable(parts), *scope.losses]


def _after(
    upstream: Sequence[_types.Tensor | None], tensors: _types.Structure, compiled: bool
) -> _types.Structure:
    """The tensors of a structure, but not before those of `upstream` are there."""
    flat = tf.nest.flatten(tensors)
    if compiled:
        upstream = [t for t in upstream if t is not None]
        flat = _xla_ops.xla_optimization_barrier(input=[*flat, *upstream])[: len(flat)]
    else:
        with tf.control_dependencies([t for t in upstream if t is not None]):
            flat = [tf.identity(t) for t in flat]
    return tf.nest.pack_sequence_as(tensors, flat)


def _always(tensors: Sequence[_types.Tensor]) -> _types.Tensor:
    """True, but XLA cannot know it before the program runs."""
    value = tf.reshape(tensors[0], [-1])[0]
    return (value == value) | (value != value)


def check_can_recompute(layer: _types.Layer) -> None:
    """Raises if a layer keeps state between calls that its result depends on."""
    for inner in layer._flatten_layers():
        if getattr(inner, "stateful", False):
            raise errors.UnsupportedModelError(
                _cannot(inner, "it continues from the state of the previous batch (stateful=True)")
            )
