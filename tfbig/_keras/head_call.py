"""A call of the last layer, computed together with losses and metrics, in chunks of tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import keras
import tensorflow as tf
from keras.src.backend.common import masking
from keras.src.backend.common.variables import AutocastScope
from tensorflow.python.eager import record as _record

from tfbig import _types, errors
from tfbig._keras import logits, matrix_product, recomputation, stages
from tfbig._keras.gradients import custom_gradient
from tfbig._keras.sharded_variable import Gathering, ShardedWeight
from tfbig._keras.thread import current, holding
from tfbig._keras.token_chunks import TokenChunks
from tfbig._keras.variables import VariableValues

# Pieces of a chunk that a metric computes one after another.
_PIECES = 4

# A function of targets and predictions, as losses and metrics have it.
Function: TypeAlias = Callable[[_types.Tensor, _types.Tensor], _types.Tensor]


@dataclasses.dataclass(frozen=True)
class TokenFunction:
    """A function that treats each token by itself, and its targets.

    Attributes:
        function: of targets and predictions, `(tokens, ...)`, returning values `(tokens, ...)`.
        targets: `(..., *)`, with the leading dimensions of the layer's inputs.
        dtype: dtype of the predictions that it takes.
    """

    function: Function
    targets: _types.Tensor
    dtype: _types.DType


@dataclasses.dataclass(frozen=True, eq=False)
class HeadCall:
    """One call of the last layer.

    Attributes:
        layer: the layer.
        inputs: float tensor `(..., features)`.
        arguments: its further positional arguments, none of them a tensor.
        options: its keyword arguments, none of them a tensor.
        autocast: the dtype to which its variables are cast; None for no cast.
        size: tokens that are computed at a time.
        is_xla: whether XLA compiles the computation.
    """

    layer: _types.Layer
    inputs: _types.Tensor
    arguments: tuple[object, ...]
    options: dict[str, object]
    autocast: str | None
    size: int
    is_xla: bool

    def example(self, function: TokenFunction) -> tuple[_types.Tensor, bool]:
        """A function's values as zeros, and whether they have a mask."""
        chunks = TokenChunks.of(self.inputs, self.size)
        chunk, targets = (tf.zeros_like(chunks.cut(t)[0]) for t in (self.inputs, function.targets))
        # Nothing computes this. The weights themselves might be gathered for it.
        weights = [tf.zeros(v.shape, v.dtype) for v in self.layer.variables]
        with _record.stop_recording():
            (value,) = self._computed(chunk, weights, [function], [targets])
        return chunks.zeros(value), masking.get_keras_mask(value) is not None

    def values(self, functions: Sequence[TokenFunction]) -> list[_types.Tensor]:
        """What the functions return for all tokens; only the first is differentiable.

        The backward pass computes all chunks again.
        """
        _check_targets(functions[0])
        weights = _Weights(self.layer, self.inputs)
        chunks = TokenChunks.of(self.inputs, self.size)
        # Masks of the values are no results of a custom gradient.
        masks: list[_types.Tensor | None] = []

        @custom_gradient
        def function(
            inputs: _types.Tensor, *sources: _types.Tensor
        ) -> tuple[list[_types.Tensor], _types.AnyFunction]:
            with _record.stop_recording():
                values, masks[:] = self._forward(
                    chunks, inputs, weights.gathered(sources), functions
                )

            def gradient(*upstream: _types.Tensor) -> list[_types.Gradient | None]:
                with _record.stop_recording():
                    again, gathered = weights.gathered_again(sources, upstream[0])
                    of_inputs, _, of_weights = self._gradients(
                        chunks, inputs, gathered, functions[:1], upstream[0]
                    )
                    return [of_inputs, *weights.of_sources(again, gathered, of_weights)]

            return values, gradient

        values = function(self.inputs, *weights.sources)
        values = [values[0], *map(tf.stop_gradient, values[1:])]
        for value, mask in zip(values, masks, strict=True):
            if mask is not None:
                masking.set_keras_mask(value, mask)
        return values

    def total(
        self, functions: Sequence[TokenFunction], factors: _types.Tensor
    ) -> tuple[_types.Tensor, list[_types.Tensor]]:
        """The sum over all tokens of the first function's values times factors, and the others'.

        As the factors are known, one pass over the chunks computes the gradients, too.

        Args:
            functions: of which only the first is differentiable.
            factors: of the shape of its values.
        """
        _check_targets(functions[0])
        weights = _Weights(self.layer, self.inputs)
        chunks = TokenChunks.of(self.inputs, self.size)

        @custom_gradient
        def function(
            inputs: _types.Tensor, factors: _types.Tensor, *sources: _types.Tensor
        ) -> tuple[list[_types.Tensor], _types.AnyFunction]:
            with _record.stop_recording():
                # Gradients near one, so that half precision does not lose small ones.
                largest = tf.reduce_max(tf.abs(factors))
                unit = tf.where(largest > 0, largest, tf.ones_like(largest))
                gathered = weights.gathered(sources)
                of_inputs, values, of_weights = self._gradients(
                    chunks, inputs, gathered, functions, factors / unit
                )
                total = tf.reduce_sum(factors * values[0])

            def gradient(*upstream: _types.Tensor) -> list[_types.Gradient | None]:
                def scaled(gradient: _types.Tensor) -> _types.Tensor:
                    wide = tf.cast(gradient, upstream[0].dtype)
                    return tf.cast(wide * unit * upstream[0], gradient.dtype)

                with _record.stop_recording():
                    of_values = {i: scaled(g) for i, g in of_weights.items()}
                    return [
                        scaled(of_inputs),
                        values[0] * upstream[0],
                        *weights.of_sources(sources, gathered, of_values),
                    ]

            return [total, *values[1:]], gradient

        total, *others = function(self.inputs, factors, *weights.sources)
        return total, list(map(tf.stop_gradient, others))

    def _predictions(
        self, inputs: _types.Tensor, weights: Sequence[_types.Tensor]
    ) -> _types.Tensor:
        """The layer's output for a chunk of inputs, `(tokens, features)`."""
        scope = VariableValues(zip(self.layer.variables, weights, strict=True))
        with (
            scope,
            AutocastScope(self.autocast),
            holding("recomputation", None),
            holding("head", None),
        ):
            if getattr(self.layer, "tie_weights", False):
                with stages.placing(self.layer):
                    return _similarities(self.layer, inputs)
            return recomputation.keras_call(self.layer, inputs, *self.arguments, **self.options)

    def _computed(
        self,
        inputs: _types.Tensor,
        weights: Sequence[_types.Tensor],
        functions: Sequence[TokenFunction],
        targets: Sequence[_types.Tensor],
    ) -> list[_types.Tensor]:
        """The values of functions for a chunk."""
        predictions = self._predictions(inputs, weights)
        values: list[_types.Tensor] = []
        # One after another, and last the one that is differentiated: its gradient is the largest
        # tensor, and comes when those that metrics make are gone.
        for number in reversed(range(len(functions))):
            with tf.control_dependencies(values):
                predictions = logits.copied(predictions)
            compute = _values if number == 0 else _values_in_pieces
            values.append(compute(functions[number], targets[number], predictions))
        return values[::-1]

    def _forward(
        self,
        chunks: TokenChunks,
        inputs: _types.Tensor,
        weights: Sequence[_types.Tensor],
        functions: Sequence[TokenFunction],
    ) -> tuple[list[_types.Tensor], list[_types.Tensor | None]]:
        """The values of all functions, and their masks."""

        def compute(
            chunk: _types.Tensor, *targets: _types.Tensor
        ) -> tuple[list[_types.Tensor], tuple[()]]:
            values = self._computed(chunk, weights, functions, targets)
            masks = [masking.get_keras_mask(v) for v in values]
            has_mask[:] = [m is not None for m in masks]
            return [*values, *(m for m in masks if m is not None)], ()

        has_mask: list[bool] = []
        elements = [chunks.cut(t) for t in (inputs, *(f.targets for f in functions))]
        # Nothing computes this: it tells shapes and dtypes.
        examples, _ = compute(*(tf.zeros_like(e[0]) for e in elements))
        whole, _ = chunks.for_each(compute, elements, examples)
        values, rest = whole[: len(functions)], iter(whole[len(functions) :])
        return values, [next(rest) if has else None for has in has_mask]

    def _gradients(
        self,
        chunks: TokenChunks,
        inputs: _types.Tensor,
        weights: Sequence[_types.Tensor],
        functions: Sequence[TokenFunction],
        factors: _types.Tensor,
    ) -> tuple[_types.Tensor, list[_types.Tensor], dict[int, _types.Tensor]]:
        """Gradients of the first function's values times factors, and the values of all.

        Returns:
            The gradient of the inputs; the values; the gradients of those weights that have one,
            by their number. Zeros for others, such as a table that is looked up in elsewhere, would
            turn its rows into a dense gradient.
        """
        trained = {id(v) for v in self.layer.trainable_variables}
        wanted = [i for i, v in enumerate(self.layer.variables) if id(v) in trained]

        def compute(
            chunk: _types.Tensor, factors: _types.Tensor, *targets: _types.Tensor
        ) -> tuple[list[_types.Tensor], list[_types.Gradient | None]]:
            # Tensors of this graph, which is the body of a loop.
            chunk, own = tf.identity(chunk), list(weights)
            for i in wanted:
                own[i] = tf.identity(own[i])
            values = self._computed(chunk, own, functions, targets)
            of_chunk, *of_weights = tf.gradients(
                values[0], [chunk, *(own[i] for i in wanted)], grad_ys=factors
            )
            return [of_chunk, *values], of_weights

        def compute_parts(
            *elements: _types.Tensor,
        ) -> tuple[list[_types.Tensor], list[Callable[[], _types.Tensor]]]:
            results, of_weights = compute(*elements)
            return results, [part for g in of_weights for part in self._parts_of(g)[0]]

        elements = [chunks.cut(t) for t in (inputs, factors, *(f.targets for f in functions))]
        # Nothing computes this: it tells shapes, dtypes, and which weights have a gradient.
        examples, found = compute(*(tf.zeros_like(e[0]) for e in elements))
        wanted = [i for i, g in zip(wanted, found, strict=True) if g is not None]
        parts = [self._parts_of(g) for g in found if g is not None]
        (of_inputs, *values), sums = chunks.for_each(
            compute_parts, elements, examples, [part() for own, _ in parts for part in own]
        )
        rest = iter(sums)
        of_weights = [
            matrix_product.joined(list(itertools.islice(rest, len(own))), axis)
            for own, axis in parts
        ]
        return of_inputs, values, dict(zip(wanted, of_weights, strict=True))

    def _parts_of(self, gradient: _types.Tensor) -> tuple[list[Callable[[], _types.Tensor]], int]:
        # With XLA, a whole product takes no more memory, and less time.
        return ([lambda: gradient], 0) if self.is_xla else matrix_product.parts_of(gradient)


class _Weights:
    """The variables of a layer, perhaps divided over the replicas, as tensors.

    Args:
        layer: the layer.
        inputs: what it is called with.

    Attributes:
        sources: what their gradients are taken of: their values, or this replica's pieces.
    """

    def __init__(self, layer: _types.Layer, inputs: _types.Tensor) -> None:
        self._variables = list(layer.variables)
        self._gathering: Gathering | None = current("gathering")
        if self._gathering is not None:
            self._gathering.reach([inputs])
        self.sources = [self._source_of(v) for v in self._variables]

    def _source_of(self, variable: _types.KerasVariable) -> _types.Tensor:
        if self._gathering is not None and isinstance(variable, ShardedWeight):
            return self._gathering.source_of(variable)
        with AutocastScope(None):
            return tf.convert_to_tensor(variable.value)

    def gathered(self, sources: Sequence[_types.Tensor]) -> list[_types.Tensor]:
        """Their values."""
        if self._gathering is None:
            return list(sources)
        return self._gathering.values_of(self._variables, sources)

    def gathered_again(
        self, sources: Sequence[_types.Tensor], upstream: _types.Tensor
    ) -> tuple[list[_types.Tensor], list[_types.Tensor]]:
        """The sources and the values in a backward pass, where they were not kept for it."""
        if self._gathering is not None:
            self._gathering.reach([upstream])
            with tf.control_dependencies([upstream]):
                sources = [tf.identity(s) for s in sources]
        return list(sources), self.gathered(sources)

    def of_sources(
        self,
        sources: Sequence[_types.Tensor],
        values: Sequence[_types.Tensor],
        gradients: dict[int, _types.Tensor],
    ) -> list[_types.Gradient | None]:
        """Gradients of the sources, given those of the values by their number."""
        result: list[_types.Gradient | None] = [None] * len(sources)
        for i, gradient in gradients.items():
            if self._gathering is not None:
                (gradient,) = tf.gradients(values[i], sources[i], grad_ys=gradient)
            result[i] = gradient
        return result


def _values(
    function: TokenFunction, targets: _types.Tensor, predictions: _types.Tensor
) -> _types.Tensor:
    """What a function makes of the predictions for some tokens."""
    return function.function(targets, tf.cast(predictions, function.dtype))


def _values_in_pieces(
    function: TokenFunction, targets: _types.Tensor, predictions: _types.Tensor
) -> _types.Tensor:
    """The same for a few tokens at a time: an argmax of Keras copies what it reads."""
    length = predictions.shape[0]
    length = tf.shape(predictions)[0] if length is None else length
    # Where a piece begins at a multiple of 64 bytes, TensorFlow does not copy it.
    size = -(-length // (16 * _PIECES)) * 16
    values: list[_types.Tensor] = []
    for begin in (size * i for i in range(_PIECES)):
        if isinstance(length, int) and begin >= length > 0:
            break
        with tf.control_dependencies(values):
            piece = logits.copied(predictions, slice(begin, begin + size))
        values.append(_values(function, targets[begin : begin + size], piece))
    whole = tf.concat(values, 0)
    masks = [masking.get_keras_mask(v) for v in values]
    if masks[0] is not None:
        masking.set_keras_mask(whole, tf.concat(masks, 0))
    return whole


def _similarities(layer: keras.layers.ReversibleEmbedding, inputs: _types.Tensor) -> _types.Tensor:
    """What a `ReversibleEmbedding` returns in reverse with the table of its lookups.

    Keras transposes the table, and TensorFlow its gradient: a copy of each for every chunk.
    """
    table = tf.convert_to_tensor(layer.embeddings)
    # The layer does not cast its table to the dtype of its inputs.
    dtype = layer.reverse_dtype or keras.backend.result_type(inputs.dtype, table.dtype)
    inputs, table = (tf.cast(t, dtype) for t in (inputs, table))
    predictions = tf.matmul(inputs, table, transpose_b=True)
    if layer.logit_soft_cap is None:
        return predictions
    return tf.tanh(predictions / layer.logit_soft_cap) * layer.logit_soft_cap


def _check_targets(function: TokenFunction) -> None:
    if _record.should_record_backprop([function.targets]):
        raise errors.UnsupportedModelError(
            "With `head_chunk_size`, the targets of a loss must not depend on weights. "
            f"Received: targets {function.targets.name} that do. Wrap them in "
            "keras.ops.stop_gradient, or leave the option out."
        )
