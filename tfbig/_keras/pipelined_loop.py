"""TensorFlow's loops wait for what they need not wait for; here iterations, or their ends, overlap.

An iteration begins once all operations with side effects of the one before it have run, and
TensorFlow counts among these whatever reads a variable: a recurrent layer is a loop that does, and
would keep micro-batches from overtaking each other.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Set
from typing import TypeAlias

import tensorflow as tf
from tensorflow.python.framework import op_def_registry as _op_def_registry
from tensorflow.python.ops import while_v2 as _while_v2

from tfbig import _types
from tfbig._keras.thread import current, holding

__all__ = ("while_loop", "while_loop_with_early_results")

_Body: TypeAlias = Callable[..., tuple[_types.Structure, ...]]

# Stateful operations that change nothing.
_READ_ONLY = frozenset(
    [
        *("LookupTableFindV2", "LookupTableSizeV2", "ReadVariableOp", "ResourceGather"),
        *("ResourceGatherNd", "Timestamp", "VarIsInitializedOp", "VariableShape"),
    ]
)


def while_loop(
    is_left: Callable[..., _types.Tensor],
    body: _Body,
    start: tuple[_types.Structure, ...],
    in_flight: int,
) -> tuple[_types.Structure, ...]:
    """A `tf.while_loop` of which several iterations run at the same time.

    Warns of operations that keep them from it.

    Args:
        is_left: whether another iteration is left.
        body: an iteration.
        start: what the first iteration gets.
        in_flight: the most iterations that run at the same time.
    """
    loop = _Loop()

    def checked_body(
        checked: _types.Tensor, *carry: _types.Structure
    ) -> tuple[_types.Structure, ...]:
        checked = tf.identity(checked)
        loop.checked = checked.op
        return (checked, *body(*carry))

    results = _while_loop(loop, is_left, checked_body, start, in_flight)
    if loop.waited_for:
        names = sorted({f"{_path(op)} ({op.type})" for op in loop.waited_for})
        warnings.warn(
            "Operations with side effects run one micro-batch after another, so stages may wait "
            f"for each other. Received: {', '.join(names)}. Leave prints, stateful functions and "
            "the like out of the layers of a pipeline.",
            stacklevel=2,
        )
    return results


def while_loop_with_early_results(
    is_left: Callable[..., _types.Tensor],
    body: _Body,
    start: tuple[_types.Structure, ...],
    early: Callable[..., _types.Structure],
) -> tuple[_types.Structure, ...]:
    """A `tf.while_loop` that hands on some results of the last iteration as soon as they are there.

    TensorFlow hands on what an iteration has made when the next one may begin, and a loop whose
    iterations run one by one would do so when all of it is made. Here the next one may begin at
    once, but what it computes waits for all that the iteration before it makes.

    Args:
        is_left: whether another iteration is left.
        body: an iteration.
        start: what the first iteration gets.
        early: function of what an iteration hands on; returns what is handed on as soon as it is
            there, what `is_left` needs among it. The rest waits until all is made, and all
            assertions hold.
    """
    loop = _Loop()

    def body_in_turn(turn: _types.Tensor, *carry: _types.Structure) -> tuple[_types.Structure, ...]:
        with tf.control_dependencies([turn]):
            made = body(*carry)
        leaves = tf.nest.flatten(made, expand_composites=True)
        with tf.control_dependencies([_flow(v) for v in leaves]):
            turn = tf.identity(turn)
        loop.checked = turn.op
        are_early = {id(v) for v in tf.nest.flatten(early(*made))}
        # Not outside of the loop: TensorFlow has what takes one of its results wait for no other.
        with tf.control_dependencies([turn]):
            made = tf.nest.map_structure(
                lambda v: v if id(v) in are_early else tf.identity(v), tuple(made)
            )
        return (turn, *made)

    return _while_loop(loop, is_left, body_in_turn, start, in_flight=2)


def _flow(value: _types.Tensor | tf.TensorArray) -> _types.Tensor:
    return value.flow if isinstance(value, tf.TensorArray) else value


def _while_loop(
    loop: _Loop,
    is_left: Callable[..., _types.Tensor],
    body: _Body,
    start: tuple[_types.Structure, ...],
    in_flight: int,
) -> tuple[_types.Structure, ...]:
    """A loop as of `while_loop`, whose iterations carry one more scalar, the first."""
    with holding("pipelined_loop", loop):
        results: tuple[_types.Structure, ...] = tf.while_loop(
            lambda _, *carry: is_left(*carry),
            body,
            (tf.zeros(()), *start),
            parallel_iterations=in_flight,
        )
    return results[1:]


class _Loop:
    """What is known of a loop while it is built.

    Attributes:
        checked: the operation of an iteration that waits for its assertions, and for which only
            that of the next iteration waits.
        waited_for: the operations for which the next iteration waits.
    """

    def __init__(self) -> None:
        self.checked: tf.Operation | None = None
        self.waited_for: list[tf.Operation] = []

    def prune(self, body_graph: tf.Graph) -> None:
        """Has an iteration, or a loop within, wait only for operations with side effects."""
        must_run = list(body_graph.control_outputs)
        names = {op.name for op in must_run}
        running = [op for op in must_run if _has_effect(op, _READ_ONLY)]
        kept = running
        if self.checked is not None and self.checked.graph is body_graph:
            kept = [op for op in running if _has_effect(op, _READ_ONLY | {"Assert"})]
            self.checked._add_control_inputs([op for op in running if op not in kept])
            self.waited_for = kept
        # What reads something that is assigned must come before it is assigned again.
        assigned = {id(t) for op in kept for t in op.inputs if t.dtype == tf.resource}
        reading = [op for op in must_run if any(id(t) in assigned for t in op.inputs)]
        kept = [*kept, *(op for op in reading if op not in kept)]
        body_graph.control_outputs[:] = kept
        for operation in body_graph.get_operations():
            # The results of an iteration wait for an operation that waits for all of these.
            waits_for = {op.name for op in operation.control_inputs}
            if operation.type == "NoOp" and names and waits_for == names:
                operation._remove_all_control_inputs()
                operation._add_control_inputs(kept)


_build_of_tensorflow = _while_v2._build_while_op


@functools.wraps(_build_of_tensorflow)
def _build_while_op(
    loop_vars: object,
    cond_graph: tf.Graph,
    body_graph: tf.Graph,
    *args: object,
    **kwargs: object,
) -> object:
    loop: _Loop | None = current("pipelined_loop")
    if loop is not None:
        loop.prune(body_graph)
    return _build_of_tensorflow(loop_vars, cond_graph, body_graph, *args, **kwargs)


_while_v2._build_while_op = _build_while_op


def _has_effect(operation: tf.Operation, harmless: Set[str]) -> bool:
    """Whether an operation does more than to compute a result, or what these kinds do."""
    return _any_has_effect([(operation.type, operation.node_def)], operation.graph, harmless)


def _any_has_effect(
    nodes: Iterable[tuple[str, object]], graph: tf.Graph, harmless: Set[str]
) -> bool:
    for kind, node in nodes:
        functions = [f for a in node.attr.values() for f in _functions_of(a)]  # type: ignore[attr-defined]
        if _op_def_registry.get(kind) is None:
            # A call of a function by its name.
            functions.append(kind)
        if functions:
            for name in functions:
                definition = graph._get_function(name).cached_definition
                if _any_has_effect([(n.op, n) for n in definition.node_def], graph, harmless):
                    return True
        elif kind not in harmless and _op_def_registry.get(kind).is_stateful:
            return True
    return False


def _functions_of(attribute: object) -> list[str]:
    """The names of functions in an attribute of an operation."""
    functions = [attribute.func, *attribute.list.func]  # type: ignore[attr-defined]
    return [f.name for f in functions if f.name]


def _path(operation: tf.Operation) -> str:
    """The layers in which an operation is, and its name, without the loop's."""
    return str(operation.name.removeprefix("while/"))
