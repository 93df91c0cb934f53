"""`tf.custom_gradient` keeps what it traced until the process ends; here that goes with its graph.

In a graph, each call registers its gradient by a name of its own in a table of the process, from
which nothing is ever taken. The gradient refers to the tensors of the graph, and through what it
computes them from to layers, model and optimizer: a process that trains one model after another, as
a search does, would keep all of them.
"""

import functools
import weakref
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops as _ops

from tfbig import _types

__all__ = ("custom_gradient", "let_go_with_graph")

_REGISTERED: dict[str, dict[str, Any]] = _ops.gradient_registry._registry  # Any: untyped.
_TYPE = "type"


def custom_gradient(function: _types.AnyFunction) -> _types.AnyFunction:
    """`tf.custom_gradient`, whose gradient lives as long as the graph in which it was called.

    Args:
        function: as for `tf.custom_gradient`: a function of tensors that returns its results and
            the function that computes gradients.
    """
    decorated = tf.custom_gradient(function)

    @functools.wraps(function)
    def call(*tensors: _types.Tensor) -> _types.Structure:
        results = decorated(*tensors)
        let_go_with_graph(results)
        return results

    return call


def let_go_with_graph(results: _types.Structure) -> None:
    """Has the gradient of one call of a custom gradient live no longer than its graph.

    Args:
        results: structure of the tensors that the call returned.
    """
    for result in tf.nest.flatten(results):
        if isinstance(result, tf.Tensor) and not hasattr(result, "numpy"):
            # All results are those of one operation.
            _keep_with(result.graph, result.op.get_attr("_gradient_op_type").decode())
            return


def _keep_with(graph: tf.Graph, name: str) -> None:
    """Lets a graph keep the gradient that is registered by a name, and nothing else."""
    gradient = _REGISTERED[name][_TYPE]
    if not hasattr(graph, "_tfbig_gradients"):
        graph._tfbig_gradients = []
    graph._tfbig_gradients.append(gradient)
    _REGISTERED[name] = _REGISTERED[name] | {_TYPE: _Weakly(gradient)}
    weakref.finalize(graph, _REGISTERED.pop, name, None).atexit = False


class _Weakly:
    """A function, without keeping it.

    Args:
        function: what is called, as long as it is there.
    """

    def __init__(self, function: _types.AnyFunction) -> None:
        self.function = weakref.ref(function)

    def __call__(self, *args: _types.Tensor) -> _types.Structure:
        function = self.function()
        assert function is not None, "the graph is there, so its gradients are"
        return function(*args)
