"""Indices out of range, which TensorFlow refuses on a CPU and XLA replaces by others.

An XLA program cannot raise an error: what it looks up is handed out of it, and checked there.
"""

from __future__ import annotations

import tensorflow as tf

from tfbig import _types
from tfbig._update import xla_on_cpu

__all__ = ("assertions", "ranges_of_look_ups")


def ranges_of_look_ups() -> dict[str, _types.Tensor]:
    """What the graph being traced looks up, by the names of the operations.

    Returns:
        int64 vectors of the smallest index, the largest, and the number of values to choose from.
    """
    operations = tf.compat.v1.get_default_graph().get_operations()
    of_values = xla_on_cpu.depending_on_values(operations)
    found = {}
    for operation in operations:
        look_up = _look_up(operation)
        if look_up is None or (
            # Shapes are computed so.
            operation.inputs[0].dtype.is_integer and look_up[0].op.name not in of_values
        ):
            continue
        indices, limit = look_up
        if not _is_known_to_be_in_range(indices, limit):
            found[operation.name] = tf.stack(
                [
                    tf.cast(t, tf.int64)
                    for t in (tf.reduce_min(indices), tf.reduce_max(indices), limit)
                ]
            )
    return found


def assertions(ranges: dict[str, _types.Tensor]) -> list[tf.Operation]:
    """Operations of a graph that fail unless all indices are in range."""
    return [
        tf.debugging.Assert(
            # Of no indices, the smallest is the largest integer.
            (found[0] >= 0) & (found[1] < found[2]),
            [
                f"indices are out of range: the smallest and the largest of {name}, and of how "
                "many values:",
                found,
            ],
        )
        for name, found in ranges.items()
    ]


def _look_up(operation: tf.Operation) -> tuple[_types.Tensor, _types.Tensor] | None:
    """The indices that an operation looks up, and the number of values; None for others."""
    if operation.type == "SparseSoftmaxCrossEntropyWithLogits":
        logits, labels = operation.inputs
        return labels, tf.shape(logits)[1]
    if operation.type == "GatherV2":
        values, indices, axis = operation.inputs
        return indices, tf.shape(values)[axis]
    return None


def _is_known_to_be_in_range(indices: _types.Tensor, limit: _types.Tensor) -> bool:
    """Whether the graph tells without running."""
    constant, size = tf.get_static_value(indices), tf.get_static_value(limit)
    if constant is None or size is None:
        return False
    return bool((constant >= 0).all() and (constant < size).all())
