"""The floor of a row of benchmark.py: the time of the model's matrix products and convolutions.

A model is traced, forward and backward, for one micro-batch. What it multiplies is then multiplied
again, in the same shapes and dtypes, with nothing between: what TensorFlow's kernels need at least
on this machine. How many times as long a row takes says the same on another machine, which its
seconds do not.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks import models

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

_KINDS = (
    *("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"),
    *("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"),
)
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_LOOPS = ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase")

# Calls that are timed: at least so many, and for so long.
_LEAST_CALLS, _SECONDS = 10, 1.0


@dataclasses.dataclass(frozen=True)
class Product:
    """An operation of TensorFlow that multiplies matrices, or is a convolution.

    Attributes:
        kind: As TensorFlow calls it.
        shapes: Of what it multiplies.
        dtype: Of what it multiplies.
        attributes: What else it is told: transpositions, an equation, strides.
        result: Shape of what it returns.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    attributes: tuple[tuple[str, Any], ...]
    result: tuple[int, ...]

    def __call__(self, *factors: tf.Tensor) -> tf.Tensor:
        import tensorflow as tf

        attributes = dict(self.attributes)
        operation = getattr(tf.raw_ops, self.kind)
        if self.kind == "Einsum":
            return operation(inputs=list(factors), **attributes)
        if self.kind == "Conv2D":
            names: tuple[str, ...] = ("input", "filter")
        elif self.kind == "Conv2DBackpropInput":
            names, attributes["input_sizes"] = ("filter", "out_backprop"), self.result
        elif self.kind == "Conv2DBackpropFilter":
            names, attributes["filter_sizes"] = ("input", "out_backprop"), self.result
        else:
            names = ("a", "b") if self.kind == "MatMul" else ("x", "y")
        return operation(**dict(zip(names, factors, strict=True)), **attributes)


def milliseconds_per_sample(name: str, micro_batch_size: int) -> float:
    """Measures the floor of a model in this process.

    Args:
        name: A key of `models.MODELS`.
        micro_batch_size: Samples of a micro-batch.
    """
    multiply = warm_multiplication(name, micro_batch_size)
    seconds: list[float] = []
    while len(seconds) < _LEAST_CALLS or sum(seconds) < _SECONDS:
        begin = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds) / micro_batch_size


def warm_multiplication(name: str, micro_batch_size: int) -> Callable[[], None]:
    """A function that computes all products of a micro-batch; see `milliseconds_per_sample`."""
    import keras

    model = keras.Model(*models.MODELS[name]())
    found = products(model, *models.data(name, micro_batch_size))
    function, factors = multiplication(found)

    def multiply() -> None:
        # Waits until it is computed.
        float(function(*factors))

    # The first calls optimize the graph, and take memory.
    for _ in range(2):
        multiply()
    return multiply


def products(model: keras.Model, x: Any, y: Any) -> collections.Counter[Product]:
    """What the gradient of a model multiplies, and how often; nothing is computed.

    Args:
        model: A built model that classifies.
        x: A micro-batch, as arrays or specs of static shape.
        y: Its classes.
    """
    import keras
    import tensorflow as tf

    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = [v.value for v in model.trainable_variables]

    def gradients(x: tf.Tensor, y: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return tape.gradient(loss, variables)

    specs = [tf.TensorSpec(a.shape, a.dtype) for a in (x, y)]
    graph = tf.function(gradients, autograph=False).get_concrete_function(*specs).graph
    return collections.Counter(_product(o) for o in _operations(graph) if o.type in _KINDS)


def _operations(graph: Any) -> Iterator[tf.Operation]:
    """What runs when a function is called, what it calls included.

    The gradient of a convolution with respect to the images is in the graph, for example, and never
    computed.
    """
    needed, waiting = set(), [tensor.op for tensor in graph.outputs]
    while waiting:
        operation = waiting.pop()
        if operation in needed:
            continue
        needed.add(operation)
        waiting += [tensor.op for tensor in operation.inputs] + operation.control_inputs
        if operation.type in _CALLS:
            yield from _operations(graph._get_function(operation.get_attr("f").name).graph)
        elif operation.type in _LOOPS:
            raise ValueError(f"the floor of a loop or a condition is unknown: {operation.name}")
        yield operation


def _product(operation: tf.Operation) -> Product:
    # The sizes that the gradients of a convolution are told are those of their results.
    factors = [t for t in operation.inputs if t.dtype.is_floating]
    attributes = {
        attribute.name: _plain(operation.get_attr(attribute.name))
        for attribute in operation.op_def.attr
        # Types and numbers follow from what is passed.
        if attribute.type != "type" and attribute.name != "N"
    }
    return Product(
        operation.type,
        tuple(tuple(t.shape.as_list()) for t in factors),
        factors[0].dtype.name,
        tuple(attributes.items()),
        tuple(operation.outputs[0].shape.as_list()),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, list) else value


def multiplication(
    found: collections.Counter[Product],
) -> tuple[Callable[..., tf.Tensor], list[tf.Tensor]]:
    """A traced function that computes all products, and what it takes."""
    import tensorflow as tf

    in_order = list(found.elements())
    shapes = [(shape, p.dtype) for p in in_order for shape in p.shapes]

    def multiply(*factors: tf.Tensor) -> tf.Tensor:
        left = iter(factors)
        results: list[tf.Tensor] = []
        for product in in_order:
            # One number of each, so that all are computed. Products of their own factors, since
            # TensorFlow computes equal ones once.
            result = product(*itertools.islice(left, len(product.shapes)))
            results.append(tf.cast(tf.reshape(result, [-1])[0], tf.float32))
        return tf.add_n(results)

    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in shapes]
    function = tf.function(multiply, autograph=False).get_concrete_function(*specs)
    return function, [tf.cast(tf.random.normal(shape), dtype) for shape, dtype in shapes]
