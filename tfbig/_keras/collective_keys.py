"""Keys by which the calls of a collective on all replicas find each other, and which come back.

TensorFlow gives every call a new key, keeps a record of each for as long as the process lives, and
has the workers ask the first of them for it. That is 1.7 KB and a message for each part of each
exchange. Here a part has the same sixteen keys in all updates.
"""

from __future__ import annotations

import collections
import itertools
import zlib
from collections.abc import Iterator

import tensorflow as tf

from tfbig import _types

__all__ = ("next_keys",)

# The key of an instance is made of the round of a call, and the position in the function.
_ROUNDS = 16
_POSITIONS = 2**26

# TensorFlow counts its groups from 1.
_GROUPS = 2**30


def next_keys(
    launcher: _types.Launcher, operation: _types.AnyFunction, tensor: _types.Tensor
) -> tuple[int, _types.Tensor]:
    """The keys of the group and of the instance of the collective that is traced next. In a graph.

    No two collectives that can run at once have the same. Those of one function differ, and the
    functions that it calls wait for each other. All workers have the same keys, whenever they trace
    a function, since they call functions with collectives in the same order.

    Args:
        launcher: that of this replica.
        operation: the collective.
        tensor: what it exchanges.
    """
    # TensorFlow wants what has one key to be of one kind. Should two kinds ever be one group, it
    # refuses the second.
    kind = f"{launcher._group_key} {operation.__name__} {tensor.dtype.name} {tensor.shape}"
    group = _GROUPS + zlib.crc32(kind.encode()) % _GROUPS
    graph = _function_graph()
    if not hasattr(graph, "_tfbig_collective_keys"):
        graph._tfbig_collective_keys = {}
    known: dict[_types.Launcher, tuple[_types.Tensor, dict[int, Iterator[int]]]]
    known = graph._tfbig_collective_keys
    if launcher not in known:
        _take_turns(launcher, graph)
        known[launcher] = _round(launcher) * _POSITIONS, collections.defaultdict(itertools.count)
    first, positions = known[launcher]
    return group, first + next(positions[group])


def _take_turns(launcher: _types.Launcher, graph: tf.Graph) -> None:
    """Has functions with collectives wait for each other where another one calls them.

    They all assign one variable, which the strategy has for this purpose.
    """
    with graph.as_default(), tf.device(launcher._device):
        launcher._ordering_token.assign(0.0, read_value=False)


def _round(launcher: _types.Launcher) -> _types.Tensor:
    """A number that each call of the function that is traced gets anew; eagerly, the next one."""
    if not tf.executing_eagerly():
        graph = _function_graph()
        with graph.as_default():
            return graph.capture_call_time_value(
                lambda: _round(launcher), tf.TensorSpec([], tf.int32)
            )
    rounds = vars(launcher).setdefault("_tfbig_rounds", itertools.cycle(range(_ROUNDS)))
    with tf.device("CPU:0"):
        return tf.constant(next(rounds))


def _function_graph() -> tf.Graph:
    """The graph of the function that is traced, not that of a loop or conditional in it."""
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "is_control_flow_graph", False):
        # Nothing fills their placeholders at each call.
        graph = graph.outer_graph
    return graph
