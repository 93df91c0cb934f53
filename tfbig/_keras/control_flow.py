"""Whether what is traced stands in a conditional or loop, which TensorFlow traces into graphs."""

from __future__ import annotations

import tensorflow as tf

__all__ = ("graph_outside", "is_within")


def is_within(graph: tf.Graph) -> bool:
    """Whether a conditional or loop of this graph is traced, or a function that one calls."""
    inner = tf.compat.v1.get_default_graph()
    while inner is not None and inner is not graph:
        if _is_of_control_flow(inner):
            return True
        inner = getattr(inner, "outer_graph", None)
    return False


def graph_outside() -> tf.Graph:
    """The graph around all conditionals and loops that are traced; without them, the present."""
    found = graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        if _is_of_control_flow(graph):
            found = graph.outer_graph
        graph = getattr(graph, "outer_graph", None)
    return found


def _is_of_control_flow(graph: tf.Graph) -> bool:
    return bool(getattr(graph, "is_control_flow_graph", False))
