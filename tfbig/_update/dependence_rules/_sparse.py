"""Operations on sparse and ragged batches, and on those of text that is split."""

from typing import Any

import numpy as np

from tfbig._update.dependence import (
    CONSTANT,
    DISTINCT,
    SPARSE_INDICES,
    Dependence,
    Mixed,
    Samples,
)
from tfbig._update.dependence_rules._rules import (
    Rules,
    growing_sizes,
)

__all__ = ("RULES",)

RULES = Rules()


@RULES.of("Unique", "UniqueV2")
def _unique(op: Any, inputs: list[Dependence]) -> Dependence | list[Dependence] | None:
    if not isinstance(inputs[0], Samples) and inputs[0] is not DISTINCT:
        return None
    return [DISTINCT, *[Mixed(op.type)] * (len(op.outputs) - 1)]


@RULES.of("SparseFillEmptyRows")
def _fill_empty_rows(op: Any, inputs: list[Dependence]) -> list[Dependence] | None:
    if inputs[0] is not SPARSE_INDICES:
        return None
    indices, values, is_empty, _ = op.outputs
    del indices, values, is_empty
    return [SPARSE_INDICES, Samples(), Samples(), Mixed(op.type)]


@RULES.of("SparseToDense")
def _sparse_to_dense(op: Any, inputs: list[Dependence]) -> Dependence | None:
    grows = growing_sizes(inputs[1], op.inputs[1])
    is_batch = inputs[0] is SPARSE_INDICES and isinstance(inputs[2], Samples)
    return (
        Samples() if is_batch and grows is not None and list(np.nonzero(grows)[0]) == [0] else None
    )


@RULES.of("StringSplitV2")
def _split(op: Any, inputs: list[Dependence]) -> list[Dependence] | None:
    if not isinstance(inputs[0], Samples) or inputs[1] is not CONSTANT:
        return None
    # The length of the longest sample is part of the shape.
    return [SPARSE_INDICES, inputs[0], Mixed(op.type)]


@RULES.of("RaggedTensorToTensor")
def _to_tensor(op: Any, inputs: list[Dependence]) -> Dependence | None:
    # The row partitions, which are `Mixed`, say only where samples end.
    is_constant = inputs[0] is CONSTANT and inputs[2] is CONSTANT
    return Samples() if is_constant and isinstance(inputs[1], Samples) else None
