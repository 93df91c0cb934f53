"""Keras does not tell what a layer costs; here the operations of its forward pass are counted."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator

import keras
import tensorflow as tf
from keras.src.ops.operation import Operation

from tfbig import _types
from tfbig._keras.saving import Functional
from tfbig._keras.thread import current, holding
from tfbig._keras.variables import VariableValues

__all__ = ("calls_of", "floating_point_operations", "of_operations", "products_of_forward_pass")

# As types, which what comes from Keras has none of for mypy.
_CHAINS: tuple[type, ...] = (Functional, keras.Sequential)

# An unknown dimension is that of a sequence.
_UNKNOWN_DIMENSION = 128


def calls_of(model: keras.Model) -> list[Operation]:
    """The layers and operations of a model in the order in which they run, without inputs.

    Those of Functional and Sequential models inside it take the place of the models.

    Raises:
        TypeError: If the model is neither Functional nor Sequential.
    """
    found: dict[int, Operation] = {}
    for operation in _functional(model).operations:
        if isinstance(operation, keras.layers.InputLayer):
            continue
        inner = [operation]
        if _is_chain(operation):
            inner = calls_of(operation)
        for each in inner:
            found.setdefault(id(each), each)
    return list(found.values())


def _is_chain(operation: Operation) -> bool:
    return isinstance(operation, _CHAINS)


def _functional(model: keras.Model) -> Functional:
    if isinstance(model, keras.Sequential):
        model = model._functional
    if not isinstance(model, _CHAINS[0]):
        raise TypeError(f"{type(model).__name__} is neither Functional nor Sequential")
    return model


def floating_point_operations(model: keras.Model, calls: Iterable[Operation]) -> dict[int, float]:
    """The work of layers for one sample, by their identities.

    Args:
        model: a built Functional or Sequential model; it is traced, and nothing runs.
        calls: the layers and operations to count, none inside another.
    """
    meter = _Meter({id(call) for call in calls})
    functional = _functional(model)
    specs = [_spec_of_one(x) for x in functional.inputs]

    def forward(*inputs: _types.Tensor) -> _types.Structure:
        with VariableValues(), holding("work", meter):
            packed = keras.tree.pack_sequence_as(functional._inputs_struct, list(inputs))
            return model(packed, training=False)

    return meter.work(tf.function(forward, autograph=False).get_concrete_function(*specs).graph)


def products_of_forward_pass(
    model: keras.Model, specs: _types.Structure, layers: Iterable[Operation] = ()
) -> tuple[float, float]:
    """The work of matrix products and convolutions for one sample: of a model, and of some layers.

    Args:
        model: any built model; it is traced, and nothing runs.
        specs: what its `call` takes, with a batch of one sample. A dimension that is not known
            counts as 128.
        layers: the layers, none inside another.
    """
    meter = _Meter({id(layer) for layer in layers}, are_all_counted=False)

    def forward(inputs: _types.Structure) -> _types.Structure:
        with VariableValues() as scope, holding("work", meter):
            return model(inputs, training=False), list(scope.losses)

    graph = tf.function(forward, autograph=False).get_concrete_function(specs).graph
    whole = sum(_work_of(operation, False) for operation in _running(graph))
    return whole, sum(meter.work(graph).values())


@dataclasses.dataclass(frozen=True)
class Work:
    """Multiplications and additions for one sample.

    Attributes:
        products: of matrix products and convolutions.
        convolutions: of convolutions alone.
        others: of all other operations, one for each value.
    """

    products: float
    convolutions: float
    others: float


def of_operations(operations: Iterable[tf.Operation]) -> Work:
    """The work of operations of a graph whose number of samples is not known."""
    products = convolutions = everything = 0.0
    for operation in operations:
        work = _work_of(operation, False) / _UNKNOWN_DIMENSION
        products += work
        if operation.type.startswith(("Conv", "Depthwise")):
            convolutions += work
        everything += _work_of(operation, True) / _UNKNOWN_DIMENSION
    return Work(products, convolutions, everything - products)


def _spec_of_one(tensor: keras.KerasTensor) -> tf.TypeSpec:
    shape = [_UNKNOWN_DIMENSION if n is None else n for n in tensor.shape[1:]]
    return tf.TensorSpec([1, *shape], tensor.dtype)


class _Meter:
    """Adds up what layers do in a trace.

    Args:
        wanted: identities of the layers.
        are_all_counted: whether all operations count, or matrix products and convolutions alone.
    """

    def __init__(self, wanted: set[int], are_all_counted: bool = True) -> None:
        self._are_all_counted = are_all_counted
        self._made: dict[int, list[tf.Operation]] = {identity: [] for identity in wanted}
        self._is_within = False

    @contextlib.contextmanager
    def measuring(self, operation: Operation) -> Iterator[None]:
        """Within it, what is added to the graph is work of a layer."""
        if self._is_within or id(operation) not in self._made:
            yield
            return
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        self._is_within = True
        try:
            yield
        finally:
            self._is_within = False
        self._made[id(operation)] += graph.get_operations()[before:]

    def work(self, graph: tf.Graph) -> dict[int, float]:
        """The work of each layer, by its identity.

        Args:
            graph: what was traced.
        """
        running = {operation.name for operation in _running(graph)}
        return {
            identity: sum(
                _work_of(o, self._are_all_counted)
                for o in made
                if o.graph is not graph or o.name in running
            )
            for identity, made in self._made.items()
        }


_call_of_operation = Operation.__call__


def _call(self: Operation, *args: object, **kwargs: object) -> _types.Structure:
    meter: _Meter | None = current("work")
    if meter is None:
        return _call_of_operation(self, *args, **kwargs)
    with meter.measuring(self):
        return _call_of_operation(self, *args, **kwargs)


Operation.__call__ = _call


def _work_of(operation: tf.Operation, are_all_counted: bool) -> float:
    """Multiplications and additions of an operation; of most, one for each element of a result."""
    kind = operation.type
    inner = [
        sum(_work_of(o, are_all_counted) for o in _running(graph))
        for graph in _graphs_within(operation)
    ]
    if kind in ("StatelessWhile", "While"):
        return sum(inner) * _iterations(operation)
    if inner:
        # Of a conditional, the branch with most work.
        return max(inner)
    results = float(sum(_size(t) for t in operation.outputs))
    if kind == "MatMul":
        rows = operation.inputs[0]
        # Samples and positions are one dimension of a product, which may hide how many there are.
        while rows.op.type == "Reshape":
            rows = rows.op.inputs[0]
        return 2.0 * _size(rows) * _dimensions(operation.outputs[0])[-1]
    if kind in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        is_transposed = operation.get_attr("adj_x")
        return 2 * results * _dimensions(operation.inputs[0])[-2 if is_transposed else -1]
    if kind == "Einsum":
        return 2 * _size_of_einsum(operation)
    if kind in ("Conv2D", "Conv3D"):
        *window, channels, _ = _dimensions(operation.inputs[1])
        return 2 * results * math.prod(window) * channels
    if kind in ("Conv2DBackpropInput", "Conv3DBackpropInputV2"):
        # A transposed convolution, of the third input.
        *window, channels, _ = _dimensions(operation.inputs[1])
        return 2.0 * _size(operation.inputs[2]) * math.prod(window) * channels
    if kind == "CudnnRNNV3":
        return _work_of_recurrent_layer(operation)
    if kind == "DepthwiseConv2dNative":
        return 2 * results * math.prod(_dimensions(operation.inputs[1])[:2])
    return 0.0 if kind in _FREE or not are_all_counted else results


def _work_of_recurrent_layer(operation: tf.Operation) -> float:
    """The products of what an LSTM or a GRU is on a GPU: one layer, in one direction."""
    features, units = (_dimensions(t)[-1] for t in operation.inputs[:2])
    gates = {b"lstm": 4, b"gru": 3}[operation.get_attr("rnn_mode")]
    steps = _size(operation.inputs[0]) // features
    return 2.0 * steps * gates * units * (features + units)


def _running(graph: tf.Graph) -> list[tf.Operation]:
    """The operations on which the results of a graph depend: TensorFlow leaves out others.

    Keras calls the cell of a recurrent layer once more, to see what it returns.
    """
    found: dict[str, tf.Operation] = {}
    waiting = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    while waiting:
        operation = waiting.pop()
        if operation.name not in found:
            found[operation.name] = operation
            waiting += [t.op for t in operation.inputs] + list(operation.control_inputs)
    return list(found.values())


def _graphs_within(operation: tf.Operation) -> list[tf.Graph]:
    """The graphs of a loop's body, of a conditional's branches, or of a function that is called."""
    if operation.type in ("PartitionedCall", "StatefulPartitionedCall"):
        name = operation.get_attr("f").name
        found = [getattr(operation.graph._get_function(name), "graph", None)]
    else:
        names = ("_body_graph", "_true_graph", "_false_graph")
        found = [getattr(operation, name, None) for name in names]
    return [graph for graph in found if graph is not None]


def _iterations(loop: tf.Operation) -> int:
    """How often a loop runs, as far as is known: as many times as it reads or writes a list."""
    for tensor in loop.inputs:
        if tensor.op.type == "TensorListFromTensor" and tensor.op.inputs[0].shape.rank:
            return _dimensions(tensor.op.inputs[0])[0]
    most = tf.get_static_value(loop.inputs[1])
    return _UNKNOWN_DIMENSION if most is None or most < 1 else int(most)


# They move or name values, and compute none.
_FREE = frozenset(
    [
        *("Const", "ExpandDims", "Identity", "Placeholder", "ReadVariableOp", "Reshape"),
        *("Shape", "Squeeze", "StopGradient"),
    ]
)


def _size_of_einsum(operation: tf.Operation) -> float:
    """The product of all dimensions that a summation runs over."""
    equation = operation.get_attr("equation").decode()
    sizes: dict[str, int] = {}
    for names, tensor in zip(equation.split("->")[0].split(","), operation.inputs, strict=True):
        if len(names) == tensor.shape.rank:
            sizes |= dict(zip(names, _dimensions(tensor), strict=True))
    return float(math.prod(sizes.values()))


def _dimensions(tensor: _types.Tensor) -> list[int]:
    if tensor.shape.rank is None:
        return [1]
    return [_UNKNOWN_DIMENSION if n is None else n for n in tensor.shape]


def _size(tensor: _types.Tensor) -> int:
    return 0 if tensor.dtype in (tf.resource, tf.variant) else math.prod(_dimensions(tensor))
