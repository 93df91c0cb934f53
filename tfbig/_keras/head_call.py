"""A call of the last layer, computed together with losses and metrics, in chunks of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import keras
import tensorflow as tf
from keras.src.backend.common import masking
from keras.src.backend.common.variables import AutocastScope
from tensorflow.python.eager import record as _record

from tfbig import _types, errors
from tfbig._keras import recomputation, stages
from tfbig._keras.sharded_variable import Gathering, ShardedWeight
from tfbig._keras.thread import current, holding
from tfbig._keras.variables import VariableValues

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
    """

    layer: _types.Layer
    inputs: _types.Tensor
    arguments: tuple[object, ...]
    options: dict[str, object]
    autocast: str | None
    size: int

    def values(self, functions: Sequence[TokenFunction]) -> list[_types.Tensor]:
        """What the functions return for all tokens; only the first is differentiable."""
        first = functions[0]
        if _record.should_record_backprop([first.targets]):
            raise errors.UnsupportedModelError(
                "With `head_chunk_size`, the targets of a loss must not depend on weights. "
                f"Received: targets {first.targets.name} that do. Wrap them in "
                "keras.ops.stop_gradient, or leave the option out."
            )
        variables = list(self.layer.variables)
        gathering: Gathering | None = current("gathering")
        if gathering is not None:
            gathering.reach([self.inputs])
        sources = [self._source_of(v, gathering) for v in variables]
        chunks = _Chunks.of(self.inputs, self.size)
        # Of the first pass. Masks of the values are no results of a custom gradient.
        masks: list[_types.Tensor | None] = []

        @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow has no types.
        def function(
            inputs: _types.Tensor, *sources: _types.Tensor
        ) -> tuple[list[_types.Tensor], _types.AnyFunction]:
            with _record.stop_recording():
                weights = _whole(gathering, variables, sources)
                values, masks[:] = self._forward(chunks, inputs, weights, functions)

            def gradient(*upstream: _types.Tensor) -> list[_types.Gradient | None]:
                return self._backward(chunks, inputs, sources, gathering, first, upstream[0])

            return values, gradient

        values = function(self.inputs, *sources)
        values = [values[0], *map(tf.stop_gradient, values[1:])]
        for value, mask in zip(values, masks, strict=True):
            if mask is not None:
                masking.set_keras_mask(value, mask)
        return values

    def _source_of(
        self, variable: _types.KerasVariable, gathering: Gathering | None
    ) -> _types.Tensor:
        """What the gradient of a variable is taken of: its value, or its piece."""
        if gathering is not None and isinstance(variable, ShardedWeight):
            return gathering.source_of(variable)
        with AutocastScope(None):
            return tf.convert_to_tensor(variable.value)

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

    def _forward(
        self,
        chunks: _Chunks,
        inputs: _types.Tensor,
        weights: Sequence[_types.Tensor],
        functions: Sequence[TokenFunction],
    ) -> tuple[list[_types.Tensor], list[_types.Tensor | None]]:
        """The values of all functions, and their masks."""

        def compute(elements: Sequence[_types.Tensor]) -> list[_types.Tensor]:
            chunk, *targets = elements
            predictions = self._predictions(chunk, weights)
            values = [
                f.function(target, tf.cast(predictions, f.dtype))
                for f, target in zip(functions, targets, strict=True)
            ]
            masks = [masking.get_keras_mask(v) for v in values]
            has_mask[:] = [m is not None for m in masks]
            return [*values, *(m for m in masks if m is not None)]

        has_mask: list[bool] = []
        elements = [chunks.cut(inputs), *(chunks.cut(f.targets) for f in functions)]
        # Nothing computes this: it tells the dtypes of the results.
        results = compute([tf.zeros_like(e[0]) for e in elements])
        joined = tf.map_fn(
            compute,
            elements,
            fn_output_signature=[tf.TensorSpec(None, r.dtype) for r in results],
            parallel_iterations=1,
        )
        whole = [chunks.join(j, r) for j, r in zip(joined, results, strict=True)]
        values, rest = whole[: len(functions)], iter(whole[len(functions) :])
        return values, [next(rest) if has else None for has in has_mask]

    def _backward(
        self,
        chunks: _Chunks,
        inputs: _types.Tensor,
        sources: Sequence[_types.Tensor],
        gathering: Gathering | None,
        function: TokenFunction,
        upstream: _types.Tensor,
    ) -> list[_types.Gradient | None]:
        """Gradients of the first function's values, times `upstream`; computes them again."""
        variables = list(self.layer.variables)
        trained = {id(v) for v in self.layer.trainable_variables}
        if gathering is not None:
            gathering.reach([upstream])
            # Gathered again, not kept from the forward pass.
            with tf.control_dependencies([upstream]):
                sources = [tf.identity(s) for s in sources]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            weights = _whole(gathering, variables, sources)
        wanted = [i for i, v in enumerate(variables) if id(v) in trained]

        def of_chunk(
            chunk: _types.Tensor, targets: _types.Tensor, factor: _types.Tensor
        ) -> list[_types.Tensor | None]:
            watched = [chunk, *(weights[i] for i in wanted)]
            with tf.GradientTape() as inner:
                inner.watch(watched)
                predictions = self._predictions(chunk, weights)
                values = function.function(targets, tf.cast(predictions, function.dtype))
            gradients: list[_types.Tensor | None] = inner.gradient(values, watched, factor)
            return gradients

        elements = [chunks.cut(t) for t in (inputs, function.targets, upstream)]
        # Nothing computes this: it tells which weights have a gradient. To others, such as a table
        # that is looked up in elsewhere, zeros would add what they are not: dense gradients.
        connected = [g is not None for g in of_chunk(*(tf.zeros_like(e[0]) for e in elements))[1:]]
        wanted = [i for i, is_connected in zip(wanted, connected, strict=True) if is_connected]
        of_inputs, of_weights = chunks.sums(of_chunk, elements, [weights[i] for i in wanted])
        result: list[_types.Gradient | None] = [of_inputs, *(None for _ in variables)]
        if gathering is not None:
            of_weights = tape.gradient(
                [weights[i] for i in wanted], [sources[i] for i in wanted], of_weights
            )
        for i, gradient in zip(wanted, of_weights, strict=True):
            result[1 + i] = gradient
        return result


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


def _whole(
    gathering: Gathering | None,
    variables: Sequence[_types.KerasVariable],
    sources: Sequence[_types.Tensor],
) -> list[_types.Tensor]:
    """The values of variables, gathered where they are divided over the replicas."""
    if gathering is None:
        return list(sources)
    return gathering.values_of(variables, sources)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How tokens, the leading dimensions of a tensor, are cut into chunks of one length.

    Attributes:
        shape: static leading dimensions, None where they are not known.
        dimensions: int32 vector, the leading dimensions.
        number: chunks, an integer or an int32 scalar.
        length: tokens of a chunk, an integer or an int32 scalar.
        tokens: all of them, an integer or an int32 scalar.
    """

    shape: tuple[int | None, ...]
    dimensions: _types.Tensor
    number: int | _types.Tensor
    length: int | _types.Tensor
    tokens: int | _types.Tensor

    @classmethod
    def of(cls, inputs: _types.Tensor, size: int) -> _Chunks:
        """How the tokens of inputs `(..., features)` are cut into chunks of at most `size`."""
        shape = inputs.shape[:-1]
        dimensions = tf.shape(inputs)[:-1]
        tokens = shape.num_elements() if shape.is_fully_defined() else tf.reduce_prod(dimensions)
        number = -(-tokens // size)
        number = max(number, 1) if isinstance(number, int) else tf.maximum(number, 1)
        return cls(tuple(shape), dimensions, number, -(-tokens // number), tokens)

    def cut(self, tensor: _types.Tensor) -> _types.Tensor:
        """`(number, length, ...)`, padded with zeros."""
        if not tensor.shape[: len(self.shape)].is_compatible_with(self.shape):
            raise ValueError(
                "Targets must have a value for each token of the last layer's inputs. Received: "
                f"targets of shape {tensor.shape} for inputs of shape ({self.shape}, features)."
            )
        inner = tensor.shape[len(self.shape) :]
        flat = tf.reshape(tensor, [self.tokens, *inner])
        padding = self.number * self.length - self.tokens
        if not (isinstance(padding, int) and padding == 0):
            flat = tf.pad(flat, [[0, padding], *([0, 0] for _ in inner)])
        return tf.reshape(flat, [self.number, self.length, *inner])

    def join(self, tensor: _types.Tensor, example: _types.Tensor) -> _types.Tensor:
        """What `cut` was made of; `example` has the shape of a chunk of it."""
        inner = example.shape[1:]
        flat = tf.reshape(tensor, [self.number * self.length, *inner])[: self.tokens]
        whole = tf.reshape(flat, tf.concat([self.dimensions, inner], 0))
        return tf.ensure_shape(whole, [*self.shape, *inner])

    def sums(
        self,
        of_chunk: Callable[..., Sequence[_types.Tensor]],
        elements: Sequence[_types.Tensor],
        weights: Sequence[_types.Tensor],
    ) -> tuple[_types.Tensor, list[_types.Tensor]]:
        """Gradients of all chunks: those of the inputs joined, those of weights added up.

        Args:
            of_chunk: function of a chunk of each element, which returns the gradients.
            elements: what `cut` returned, that of the inputs first.
            weights: tensors of the shapes and dtypes of the gradients of weights.
        """
        inputs = elements[0]

        def body(
            i: _types.Tensor, joined: tf.TensorArray, totals: list[_types.Tensor]
        ) -> tuple[_types.Tensor, tf.TensorArray, list[_types.Tensor]]:
            of_inputs, *of_weights = of_chunk(*(e[i] for e in elements))
            added = [t + tf.cast(g, t.dtype) for t, g in zip(totals, of_weights, strict=True)]
            return i + 1, joined.write(i, of_inputs), added

        joined = tf.TensorArray(inputs.dtype, self.number, element_shape=inputs.shape[1:])
        # As wide as the gradients of micro-batches are added up.
        wide = [tf.float64 if w.dtype == tf.float64 else tf.float32 for w in weights]
        _, joined, totals = tf.while_loop(
            lambda i, *_: i < self.number,
            body,
            (
                tf.constant(0),
                joined,
                [tf.zeros(w.shape, t) for w, t in zip(weights, wide, strict=True)],
            ),
            parallel_iterations=1,
        )
        whole = self.join(joined.stack(), inputs[0])
        return whole, [tf.cast(t, w.dtype) for t, w in zip(totals, weights, strict=True)]
