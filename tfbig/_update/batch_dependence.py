"""How a tensor of a traced graph depends on the batch: read off the operations behind it.

A function of a batch is *cut exactly* if its value for two batches, one behind the other, follows
from its values for each. What a tensor does when batches are joined is one of these:

- `CONSTANT`: it is the same for every batch, as positions, masks of a causal attention and
  variables are;
- `Samples(axis)`: it is joined along an axis, as tokens and their embeddings are;
- `Sizes(...)`: it holds sizes, of which some grow with the number of samples;
- `DISTINCT`: it is a set, of which the union is taken, as the columns of a sparse batch are;
- `Mixed(operation)`: something else, or not known, from this operation on. Of some it is known
  what they are: a `Total` over the samples, or `Coupled`, which is none.

Nothing is guessed: an operation without a rule here makes its result `Mixed`.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tensorflow as tf

from tfbig._update import dependence_rules
from tfbig._update.dependence import (
    CONSTANT,
    DISTINCT,
    MEAN,
    SPARSE_INDICES,
    Coupled,
    Dependence,
    Mixed,
    Samples,
    Sizes,
    Total,
)

__all__ = (
    "CONSTANT",
    "DISTINCT",
    "MEAN",
    "Coupled",
    "Dependence",
    "Dependences",
    "Mixed",
    "Samples",
    "Total",
)


class Dependences:
    """The dependences of the tensors of one graph, each found when it is asked for.

    Args:
        data: structure of the tensors, `tf.RaggedTensor` and `tf.SparseTensor` that the graph
            takes for a batch.
        captured: function that says of a tensor which the graph captured whether it is the same
            for every batch.
        assigned: handles of variables that the graph assigns.
        known: dependences of tensors, by their names.
        are_draws_joined: whether random numbers for each sample count as joined: those of the
            joined batch are others, but just as good.
    """

    def __init__(
        self,
        data: Any,
        captured: Callable[[Any], bool],
        assigned: Iterable[tf.Tensor] = (),
        known: Mapping[str, Dependence] = types.MappingProxyType({}),
        are_draws_joined: bool = False,
    ) -> None:
        self._known = dict(known)
        self._are_draws_joined = are_draws_joined
        self._captured = captured
        # By their identities; by the names of the arguments that they are, in a function.
        self._assigned: set[int | str] = {id(handle) for handle in assigned}
        for leaf in tf.nest.flatten(data):
            if isinstance(leaf, tf.SparseTensor):
                self._known[leaf.indices.name] = SPARSE_INDICES
                self._known[leaf.values.name] = Samples()
                rank = leaf.dense_shape.shape[0]
                self._known[leaf.dense_shape.name] = (
                    Mixed("Placeholder") if rank is None else Sizes((True,) + (False,) * (rank - 1))
                )
            elif isinstance(leaf, tf.RaggedTensor):
                self._known[leaf.flat_values.name] = Samples()
            elif leaf is not None:
                self._known[leaf.name] = Samples() if leaf.shape.rank else Mixed("Placeholder")

    def of(self, tensor: tf.Tensor) -> Dependence:
        """The dependence of a tensor of the graph."""
        # Not by recursion: what is behind a tensor may be a whole model.
        stack = [tensor.op]
        while stack:
            op = stack[-1]
            unknown = [t.op for t in op.inputs if t.name not in self._known]
            if not unknown or all(t.name in self._known for t in op.outputs):
                stack.pop()
                self._derive(op)
            else:
                stack += unknown
        return self._known[tensor.name]

    def _derive(self, op: Any) -> None:
        if all(t.name in self._known for t in op.outputs):
            return
        found: list[Dependence]
        if op.type == "Placeholder":
            found = [self._of_capture(op)]
        else:
            inputs = [self._known[t.name] for t in op.inputs]
            if op.type in _DRAWS and self._are_draws_joined:
                found = [dependence_rules.of_draws(op, inputs[0])]
            elif op.type in _CALLS:
                found = self._of_call(op, inputs)
            else:
                found = _results(op, inputs, op.type in _READS and self._is_assigned(op.inputs[0]))
        for output, dependence in zip(op.outputs, found, strict=True):
            self._known.setdefault(output.name, dependence)

    def _external(self, op: Any) -> Any:
        """What the graph captured in this placeholder; None if it captured nothing."""
        pairs = getattr(op.graph, "captures", ())
        return next((outer for outer, inner in pairs if inner is op.outputs[0]), None)

    def _of_capture(self, op: Any) -> Dependence:
        outer = self._external(op)
        is_constant = outer is not None and (
            op.outputs[0].dtype == tf.resource or self._captured(outer)
        )
        return CONSTANT if is_constant else Mixed(op.type)

    def _of_call(self, op: Any, inputs: list[Dependence]) -> list[Dependence]:
        """The dependences of what a function returns that an operation calls."""
        graph = _function_of(op)
        # An order of samples has the name of an operation, which the function may have as well.
        if graph is None or any(isinstance(d, Samples) and d.order for d in inputs):
            return [Mixed(op.type)] * len(op.outputs)
        arguments = list(zip(op.inputs, graph.inputs, strict=True))
        called = Dependences(
            (),
            captured=self._captured,
            known={inner.name: d for (_, inner), d in zip(arguments, inputs, strict=True)},
            are_draws_joined=self._are_draws_joined,
        )
        called._assigned = {inner.name for outer, inner in arguments if self._is_assigned(outer)}
        found = [called.of(tensor) for tensor in graph.outputs]
        return [
            dataclasses.replace(d, order=f"{op.name}/{d.order}")
            if isinstance(d, Samples) and d.order
            else d
            for d in found
        ]

    def _is_assigned(self, handle: tf.Tensor) -> bool:
        """Whether a tensor is the handle of a variable that is assigned."""
        if handle.op.type != "Placeholder":
            return False
        return handle.name in self._assigned or id(self._external(handle.op)) in self._assigned


def _function_of(op: Any) -> Any:
    """The graph of the function that an operation calls; None if it cannot be looked into."""
    graph = op.graph
    # Which of the graphs registers a function depends on who traced it.
    while graph is not None:
        function = graph._get_function(op.get_attr("f").name)
        if function is not None:
            return getattr(function, "graph", None)
        graph = getattr(graph, "outer_graph", None)
    return None


def _results(op: Any, inputs: list[Dependence], is_assigned: bool) -> list[Dependence]:
    """The dependences of the outputs of an operation."""
    number = len(op.outputs)
    if is_assigned:
        return [Mixed(op.type)] * number
    mixed = next((d for d in inputs if isinstance(d, Mixed)), None)
    if mixed is not None and op.type not in _LAY_OUT:
        return [dependence_rules.of_totals(op, inputs)] * number
    if all(d is CONSTANT for d in inputs):
        # An operation with state may return something else each time. Reading has none.
        has_state = op.op_def.is_stateful and op.type not in _READERS
        return [Mixed(op.type) if has_state else CONSTANT] * number
    rule = dependence_rules.RULES.get(op.type)
    result = None if rule is None else rule(op, inputs)
    if result is None:
        return [Mixed(op.type)] * number
    return list(result) if isinstance(result, list) else [result] * number


# The operations that read a variable, whose handle is the first input.
_READS = frozenset(["ReadVariableOp", "ResourceGather", "ResourceGatherNd"])

_READERS = frozenset(["ReadVariableOp", "LookupTableFindV2", "LookupTableSizeV2", "ResourceGather"])

# The operations that call a function.
_CALLS = frozenset(["PartitionedCall", "StatefulPartitionedCall"])

# The operations that draw random numbers, whose shape is the first input.
_DRAWS = frozenset(
    [
        *("RandomStandardNormal", "RandomUniform", "TruncatedNormal"),
        *("StatelessRandomNormalV2", "StatelessRandomUniformV2", "StatelessTruncatedNormalV2"),
    ]
)

# Where an input that is `Mixed` may say only how the values of another are laid out.
_LAY_OUT = frozenset(["RaggedTensorToTensor", "Reshape"])
