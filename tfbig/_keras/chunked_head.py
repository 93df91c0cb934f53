"""Keras hands all logits from the last layer to the loss; here losses and metrics take chunks.

The logits of a language model, `(batch, length, vocabulary)`, are the largest tensor of an update,
and the loss makes more of that size. Where the last layer and a loss treat each token by itself, a
chunk of tokens can be computed at a time. A reduction of the loss is linear in its values, so what
each value is multiplied by is known before the values are, and gradients are computed with them.

In `ChunkedHead`, the call of the last layer returns a stand-in that nothing may read, and functions
of losses and metrics that are given the stand-in compute in chunks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.losses.loss import squeeze_or_expand_to_same_rank
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.metrics.reduction_metrics import MeanMetricWrapper
from keras.src.ops.operation import Operation
from tensorflow.python.eager import record as _record

from tfbig import _types, errors
from tfbig._keras.head_call import HeadCall, TokenFunction
from tfbig._keras.thread import current, holding

# Functions of Keras whose value at a token, along the last axis, depends on that token alone.
_OF_A_TOKEN = frozenset(
    function
    for module, names in {
        keras.losses: """
            binary_crossentropy binary_focal_crossentropy categorical_crossentropy
            categorical_focal_crossentropy categorical_generalized_cross_entropy categorical_hinge
            cosine_similarity hinge huber kl_divergence log_cosh mean_absolute_error
            mean_absolute_percentage_error mean_squared_error mean_squared_logarithmic_error
            poisson sparse_categorical_crossentropy squared_hinge""",
        keras.metrics: """
            binary_accuracy categorical_accuracy sparse_categorical_accuracy
            sparse_top_k_categorical_accuracy top_k_categorical_accuracy""",
        keras.activations: """
            elu exponential gelu hard_sigmoid leaky_relu linear log_sigmoid log_softmax relu sigmoid
            silu softmax softplus softsign tanh""",
    }.items()
    for name in names.split()
    if (function := getattr(module, name, None)) is not None
)

# The layers that may be the last.
_LAST_LAYERS = (keras.layers.Dense, keras.layers.ReversibleEmbedding)


def _is_of_a_token(function: object, arguments: dict[str, object]) -> bool:
    """Whether the function of a loss or a metric treats each token by itself."""
    return function in _OF_A_TOKEN and arguments.get("axis", -1) == -1


def check_compiled(model: keras.Model) -> None:
    """Raises for losses and metrics given to `compile` that need all predictions at once."""
    compiled = model._compile_loss
    losses = [x.loss for x in (compiled._flat_losses or ())] if compiled is not None else []
    found = [
        x.name
        for x, function in [
            *((x, getattr(x, "fn", None)) for x in losses if x is not None),
            *((x, getattr(x, "_fn", None)) for x in _compiled_metrics(model)),
        ]
        if not _is_of_a_token(function, getattr(x, "_fn_kwargs", {}))
    ]
    if found:
        raise errors.UnsupportedModelError(
            "With `head_chunk_size`, losses and metrics must be functions of Keras that treat each "
            "token by itself, such as crossentropies and accuracies with axis=-1. Received: "
            f"{', '.join(found)}. Use such losses and metrics, or leave the option out."
        )


def _compiled_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    return [] if model._compile_metrics is None else model._compile_metrics.metrics


@dataclasses.dataclass(eq=False)
class _Pending:
    """The values of a loss that are computed when it is known how they are reduced.

    Attributes:
        call: the call of the last layer.
        functions: those of the loss and of the metrics.
        metrics: the metrics.
        zeros: what stands for the values.
    """

    call: HeadCall
    functions: list[TokenFunction]
    metrics: list[MeanMetricWrapper]
    zeros: _types.Tensor


class ChunkedHead:
    """The last layer of a model, whose output losses and metrics take in chunks.

    To be entered around the call of the model, its loss and its metrics, each time that these are
    traced.

    Args:
        model: the model.
        size: tokens that are computed at a time.
        is_xla: whether XLA compiles the computation.
    """

    def __init__(self, model: keras.Model, size: int, is_xla: bool) -> None:
        self.model = model
        self.size = size
        self.is_xla = is_xla
        # The calls of the last layers: a layer and which of its calls in a forward pass it is,
        # and the width and the dtype of its output. None before the first trace.
        self._last: dict[tuple[int, int], tuple[int, _types.DType]] | None = None
        self._calls: dict[tuple[int, int], tuple[HeadCall, _types.Tensor]] = {}
        self._made_by: dict[int, str] = {}
        self._targets: dict[int, _types.Tensor] = {}
        self._ready: dict[int, _types.Tensor] = {}
        self._pending: list[_Pending] = []

    @contextlib.contextmanager
    def __call__(self, data: _types.Structure) -> Iterator[ChunkedHead]:
        """A context in which a micro-batch of data is computed."""
        self._calls, self._made_by, self._ready, self._pending = {}, {}, {}, []
        self._targets = self._targets_of_metrics(data)
        with holding("head", self):
            yield self
        self._check_stand_ins()

    def _targets_of_metrics(self, data: _types.Structure) -> dict[int, _types.Tensor]:
        """The targets of compiled metrics, by the identity of the metric."""
        y = keras.tree.flatten(keras.utils.unpack_x_y_sample_weight(data)[1])
        compiled = self.model._compile_metrics
        if compiled is None or not compiled.built or len(y) != 1:
            return {}
        return {id(m): y[0] for m in compiled.metrics}

    # --- The call of the last layer ------------------------------------------------

    def called(
        self, layer: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _types.Structure:
        """The output of a layer or an operation, or a stand-in if it is the last one."""
        if not _may_be_last(layer, args, kwargs):
            output = _keras_call(layer, *args, **kwargs)
            for tensor in tf.nest.flatten(output, expand_composites=True):
                # The innermost, not the models around it.
                self._made_by.setdefault(id(tensor), f"{type(layer).__name__} {layer.name!r}")
            return output
        key = (id(layer), sum(known == id(layer) for known, _ in self._calls))
        autocast = get_autocast_scope()
        inputs, *arguments = args
        call = HeadCall(
            layer,
            inputs,
            tuple(arguments),
            kwargs,
            None if autocast is None else autocast.dtype,
            self.size,
            self.is_xla,
        )
        if self._last is not None and key in self._last:
            width, dtype = self._last[key]
            shape = tf.concat([tf.shape(inputs)[:-1], [width]], 0)
            output = tf.ensure_shape(tf.zeros(shape, dtype), [*inputs.shape[:-1], width])
        else:
            output = _keras_call(layer, *args, **kwargs)
        self._calls[key] = call, output
        return output

    def find(self, outputs: _types.Structure) -> None:
        """Finds the calls of last layers among the outputs of the model.

        Raises:
            UnsupportedModelError: If no output is that of a layer that can be computed in chunks.
        """
        leaves = keras.tree.flatten(outputs)
        ids = {id(tensor) for tensor in leaves}
        last = {k: output for k, (_, output) in self._calls.items() if id(output) in ids}
        if not last:
            names = [self._made_by.get(id(t), t.name) for t in leaves]
            raise errors.UnsupportedModelError(
                "With `head_chunk_size`, the last layer must be a Dense layer with an activation "
                "of Keras, or a ReversibleEmbedding, neither quantized nor with an activity "
                f"regularizer. Received: an output of {', '.join(names)}. Make the activation an "
                "argument of the layer, or leave the option out."
            )
        self._last = {k: (output.shape[-1], output.dtype) for k, output in last.items()}
        self._calls = {k: v for k, v in self._calls.items() if k in last}

    def call_of(self, predictions: _types.Structure) -> HeadCall | None:
        """The call whose output, perhaps cast, a tensor is; None for others."""
        tensor = predictions
        while tf.is_tensor(tensor) and not hasattr(tensor, "numpy"):
            for call, output in self._calls.values():
                if tensor is output:
                    return call
            if tensor.op.type not in ("Cast", "Identity"):
                break
            tensor = tensor.op.inputs[0]
        return None

    # --- Losses and metrics ----------------------------------------------------------

    def loss_values(
        self, call: HeadCall, loss: keras.Loss, y_true: _types.Tensor, y_pred: _types.Tensor
    ) -> _types.Tensor:
        """The values of a Keras loss, or zeros in their place that `reduced` knows."""
        y_true, y_pred = squeeze_or_expand_to_same_rank(y_true, y_pred)
        metrics = [
            m
            for m in _compiled_metrics(self.model)
            if id(m) in self._targets and _is_of_a_token(getattr(m, "_fn", None), m._fn_kwargs)
        ]
        functions = [
            TokenFunction(_with(loss.fn, loss._fn_kwargs), y_true, y_pred.dtype),
            *(self._function_of(m, call) for m in metrics),
        ]
        if _record.could_possibly_record():
            # A gradient may be asked for.
            zeros, has_mask = call.example(functions[0])
            if not has_mask:
                self._pending.append(_Pending(call, functions, metrics, zeros))
                return zeros
        return self._ready_with(metrics, call.values(functions))

    def _ready_with(
        self, metrics: Sequence[MeanMetricWrapper], values: Sequence[_types.Tensor]
    ) -> _types.Tensor:
        """Keeps the values of metrics, which follow the first one; returns that."""
        first, *others = values
        self._ready |= {id(m): v for m, v in zip(metrics, others, strict=True)}
        return first

    def reduced(
        self,
        values: _types.Tensor,
        reduction: str | None,
        reduce: Callable[[_types.Tensor], _types.Tensor],
    ) -> _types.Tensor:
        """What a reduction makes of a loss's values, or of those that zeros stand for.

        Args:
            values: of a loss.
            reduction: that of the loss.
            reduce: a linear function of the values.
        """
        found = next((p for p in self._pending if p.zeros is values), None)
        if found is None:
            return reduce(values)
        self._pending.remove(found)
        if reduction in (None, "none"):
            return reduce(self._ready_with(found.metrics, found.call.values(found.functions)))
        with tf.GradientTape() as tape:
            tape.watch(values)
            nothing = reduce(values)
        factors = tape.gradient(nothing, values, unconnected_gradients="zero")
        total, metrics = found.call.total(found.functions, factors)
        return tf.cast(self._ready_with(found.metrics, [total, *metrics]), nothing.dtype)

    def _function_of(self, metric: MeanMetricWrapper, call: HeadCall) -> TokenFunction:
        dtype = next(output.dtype for c, output in self._calls.values() if c is call)
        return TokenFunction(_with(metric._fn, metric._fn_kwargs), self._targets[id(metric)], dtype)

    def metric_values(
        self,
        call: HeadCall,
        metric: MeanMetricWrapper,
        y_true: _types.Tensor,
        y_pred: _types.Tensor,
    ) -> _types.Tensor:
        """The values of a metric, which may be there already."""
        if id(metric) in self._ready and self._targets[id(metric)] is y_true:
            return self._ready[id(metric)]
        function = _with(metric._fn, metric._fn_kwargs)
        targets = tf.stop_gradient(tf.convert_to_tensor(y_true))
        return tf.stop_gradient(call.values([TokenFunction(function, targets, y_pred.dtype)])[0])

    def _check_stand_ins(self) -> None:
        """Raises if anything reads the output of the last layer as a whole."""
        readers = {"`call` of a loss"} if self._pending else set()
        readers |= {
            reader.name for call, output in self._calls.values() for reader in _readers_of(output)
        }
        if readers:
            raise errors.UnsupportedModelError(
                "With `head_chunk_size`, only functions of Keras that treat each token by itself "
                "may take the output of the last layer. Received: a loss, metric or method that "
                f"reads all of it ({', '.join(sorted(readers)[:3])}). Use losses such as "
                "keras.losses.SparseCategoricalCrossentropy and metrics such as "
                "keras.metrics.SparseCategoricalAccuracy, or leave the option out."
            )


def _readers_of(tensor: _types.Tensor) -> Iterator[tf.Operation]:
    """The operations that read a tensor, other than casts that nothing reads."""
    for operation in tensor.consumers():
        if operation.type in ("Cast", "Identity"):
            yield from _readers_of(operation.outputs[0])
        else:
            yield operation


def _may_be_last(layer: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the output of this call, at a token, depends on nothing else than that token."""
    if not isinstance(layer, _LAST_LAYERS) or layer.quantization_mode is not None:
        return False
    if layer.activity_regularizer is not None or not (args and tf.is_tensor(args[0])):
        return False
    if any(tf.is_tensor(x) for x in tf.nest.flatten((args[1:], kwargs))):
        return False
    if isinstance(layer, keras.layers.Dense):
        return type(layer).call is keras.layers.Dense.call and layer.activation in _OF_A_TOKEN
    is_reversed = kwargs.get("reverse", args[1] if len(args) > 1 else False)
    return type(layer).call is keras.layers.ReversibleEmbedding.call and bool(is_reversed)


def _with(function: _types.AnyFunction, arguments: dict[str, Any]) -> _types.AnyFunction:
    return functools.partial(function, **arguments) if arguments else function


# --- What Keras calls ------------------------------------------------------------------


_keras_call = Operation.__call__


@functools.wraps(_keras_call)
def _call(self: Operation, *args: Any, **kwargs: Any) -> _types.Structure:
    head: ChunkedHead | None = current("head")
    return _keras_call(self, *args, **kwargs) if head is None else head.called(self, args, kwargs)


Operation.__call__ = _call


_keras_loss = LossFunctionWrapper.call


@functools.wraps(_keras_loss)
def _loss(
    self: LossFunctionWrapper, y_true: _types.Structure, y_pred: _types.Structure
) -> _types.Tensor:
    head: ChunkedHead | None = current("head")
    call = None if head is None else head.call_of(y_pred)
    if head is None or call is None or not _is_of_a_token(self.fn, self._fn_kwargs):
        return _keras_loss(self, y_true, y_pred)
    return head.loss_values(call, self, y_true, y_pred)


LossFunctionWrapper.call = _loss


_keras_update = MeanMetricWrapper.update_state


@functools.wraps(_keras_update)
def _update_state(
    self: MeanMetricWrapper,
    y_true: _types.Structure,
    y_pred: _types.Structure,
    sample_weight: _types.Structure = None,
) -> object:
    head: ChunkedHead | None = current("head")
    call = None if head is None else head.call_of(y_pred)
    if head is None or call is None or not _is_of_a_token(self._fn, self._fn_kwargs):
        return _keras_update(self, y_true, y_pred, sample_weight)
    values = head.metric_values(call, self, y_true, y_pred)
    function = self._fn
    # Past Keras, which would look for what it tracks.
    object.__setattr__(self, "_fn", lambda *_, **__: values)
    try:
        return _keras_update(self, y_true, y_pred, sample_weight)
    finally:
        object.__setattr__(self, "_fn", function)


MeanMetricWrapper.update_state = _update_state
