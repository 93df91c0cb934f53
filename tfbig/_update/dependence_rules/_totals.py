"""What is added up over the samples, and what becomes of it."""

from typing import Any

import numpy as np

from tfbig._update.dependence import (
    CONSTANT,
    Coupled,
    Dependence,
    Mixed,
    Samples,
    Shifted,
    Sizes,
    Total,
)
from tfbig._update.dependence_rules._rules import rank_of

__all__ = ("of_totals",)

# Of a sum or mean in the first input, they make that of what they would make of each sample.
_EACH_ALONE = """
BroadcastTo Cast CheckNumerics EnsureShape ExpandDims Identity Mean Neg PreventGradient Reshape
Snapshot Squeeze StopGradient StridedSlice Sum Tile Transpose
"""

_SUMS = ["Add", "AddN", "AddV2", "Sub"]

# Keras stacks losses before it adds them up.
_STACKED = ["ConcatV2", "Pack"]

_QUOTIENTS = ["Div", "DivNoNan", "RealDiv"]

# Functions that are not linear.
_BENT = """
Abs Cos Cosh Erf Erfc Exp Expm1 Log Log1p LogSoftmax Maximum Minimum Pow Reciprocal Relu Relu6
Rsqrt Sigmoid Sin Sinh Softmax Softplus Sqrt Square SquaredDifference Tan Tanh Xdivy Xlogy
"""

# Other functions of values.
_MORE = """
BatchMatMulV2 BiasAdd Einsum MatMul SelectV2 SoftmaxCrossEntropyWithLogits
SparseSoftmaxCrossEntropyWithLogits
"""


def of_totals(op: Any, inputs: list[Dependence]) -> Dependence:
    """The dependence of an operation's outputs on inputs of which one at least is `Mixed`.

    What it cannot tell, it does not guess.
    """
    if not op.outputs or not op.outputs[0].dtype.is_floating:
        return next((d for d in inputs if type(d) is Mixed), Mixed(op.type))
    # Other inputs say along which axes, or which shape.
    values = inputs[:1] if op.type in _EACH_ALONE.split() else inputs
    if op.type == "ConcatV2":
        values = inputs[:-1]
    coupled = next((d for d in values if isinstance(d, Coupled)), None)
    if coupled is not None:
        return coupled if _is_function(op) else Mixed(op.type)
    unknown = next((d for d in inputs if type(d) is Mixed), None)
    if unknown is not None:
        return unknown
    if not all(d is CONSTANT or isinstance(d, Mixed | Samples | Sizes) for d in values):
        return Mixed(op.type)
    return _of_known(op, values)


def _is_function(op: Any) -> bool:
    """Whether an operation computes values from those of all inputs that are not axes or shapes."""
    names = [*_SUMS, *_STACKED, *_QUOTIENTS, "Mul"]
    return op.type in names or op.type in f"{_EACH_ALONE} {_BENT} {_MORE}".split()


def _of_known(op: Any, values: list[Dependence]) -> Dependence:
    if op.type in _EACH_ALONE.split():
        return _of_each(op, values[0]) if isinstance(values[0], Mixed) else Mixed(op.type)
    if any(isinstance(d, Sizes) for d in values):
        return _per_sample(op, values) if op.type in _QUOTIENTS else Mixed(op.type)
    is_stacked = op.type in _STACKED and not any(isinstance(d, Samples) for d in values)
    if op.type in _SUMS or is_stacked:
        return _sum(op, values)
    if op.type == "Mul" or op.type in _QUOTIENTS:
        return _product(op, values)
    return Coupled(op.type) if op.type in _BENT.split() else Mixed(op.type)


def _of_each(op: Any, value: Dependence) -> Dependence:
    if not isinstance(value, Shifted) or op.type not in ("Mean", "Sum"):
        return value
    if op.type == "Mean":
        return Total(op.type, is_mean=True) if rank_of(op.outputs[0]) == 0 else value
    # What was added to each sample counts as often as there are samples.
    return Mixed(op.type)


def _per_sample(op: Any, inputs: list[Dependence]) -> Dependence:
    """A sum, divided by the number of samples."""
    total, size = inputs
    is_number = isinstance(size, Sizes) and bool(np.all(size.grows))
    if not isinstance(total, Total) or not is_number:
        return Mixed(op.type)
    # A mean that is divided by the number of samples once more is not one.
    return Coupled(op.type) if total.is_mean else Total(op.type, is_mean=True)


def _sum(op: Any, inputs: list[Dependence]) -> Dependence:
    are_means = {d.is_mean for d in inputs if isinstance(d, Total)}
    if len(are_means) == 2:
        return next(Coupled(d.operation) for d in inputs if isinstance(d, Total) and not d.is_mean)
    if any(isinstance(d, Samples | Shifted) for d in inputs):
        return Mixed(op.type) if False in are_means else Shifted(op.type)
    if are_means == {False} and CONSTANT in inputs:
        return Mixed(op.type)
    return Total(op.type, is_mean=are_means == {True})


def _product(op: Any, inputs: list[Dependence]) -> Dependence:
    if inputs[1] is CONSTANT and isinstance(inputs[0], Mixed):
        return inputs[0]
    if inputs[0] is CONSTANT and isinstance(inputs[1], Mixed) and op.type == "Mul":
        return inputs[1]
    if any(isinstance(d, Samples) and d.is_same for d in inputs):
        # Such as a mean that is repeated for each sample.
        return Mixed(op.type)
    return Coupled(op.type)
