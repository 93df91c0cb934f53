"""Keras's crossentropies look for the logits behind probabilities; here copies keep them.

A softmax or sigmoid of Keras leaves its logits on the tensor that it returns; one of TensorFlow is
known by its operation. A crossentropy then computes with the logits, so that probabilities that
round to 0 or 1 have a gradient, too. A copy of the tensor tells it nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow as tf

from tfbig import _types

__all__ = ("copied", "joined", "parts_of")

_NAME = "_keras_logits"

# Operations that Keras knows.
_OPERATIONS = {"Sigmoid": tf.sigmoid, "Softmax": tf.nn.softmax}


def parts_of(tensor: _types.Tensor) -> list[_types.Tensor]:
    """The tensors to be copied in place of one behind which a crossentropy may find logits."""
    if _is_computed_from_logits(tensor):
        return [tensor.op.inputs[0]]
    return [tensor, *([getattr(tensor, _NAME)] if hasattr(tensor, _NAME) else [])]


def joined(original: _types.Tensor, copies: Iterator[_types.Tensor]) -> _types.Tensor:
    """A copy of a tensor, behind which a crossentropy finds a copy of the same logits.

    Args:
        original: the tensor.
        copies: yields copies of `parts_of(original)`.
    """
    copy = logits = next(copies)
    if _is_computed_from_logits(original):
        copy = _OPERATIONS[original.op.type](logits)
    elif hasattr(original, _NAME):
        logits = next(copies)
    if hasattr(original, _NAME):
        setattr(copy, _NAME, logits)
    return copy


def _is_computed_from_logits(tensor: _types.Tensor) -> bool:
    """Whether the operation of a tensor makes it of its logits alone."""
    if hasattr(tensor, "numpy") or tensor.op.type not in _OPERATIONS:
        return False
    logits = tensor.op.inputs[0]
    return getattr(tensor, _NAME, logits) is logits


def copied(tensor: _types.Tensor, rows: slice = slice(None)) -> _types.Tensor:
    """A copy of some rows of a tensor, in a graph, with the logits that Keras has left on it."""
    copy = tf.identity(tensor if rows == slice(None) else tensor[rows])
    if hasattr(tensor, _NAME):
        setattr(copy, _NAME, copied(getattr(tensor, _NAME), rows))
    return copy
