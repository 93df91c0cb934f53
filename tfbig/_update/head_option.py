"""`head_chunk_size`: the last layer, loss and metrics of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras

from tfbig import _integers, _keras, _types
from tfbig._update import option

__all__ = ("checked", "context_of")


def checked(size: object) -> int | None:
    """Returns the option, checked."""
    if size is None:
        return None
    remedy = "Pass the tokens that the last layer and the loss compute at a time, or None for all."
    return _integers.checked("head_chunk_size", size, remedy)


# Any: what the context yields is not used.
def context_of(
    model: keras.Model, size: int | None, is_xla: bool
) -> Callable[[_types.Structure], AbstractContextManager[Any]]:
    """Makes the context in which the loss and the metrics of a micro-batch are traced.

    Args:
        model: the model.
        size: the option, checked.
        is_xla: whether XLA compiles them.

    Raises:
        InvalidOptionError: If `compile` was given a setting that does not go with it.
        UnsupportedModelError: If a loss or a metric needs all predictions at once.
    """
    if size is None:
        return lambda _: nullcontext()
    option.refuse_compile_settings(
        model, "head_chunk_size", run_eagerly="without a graph, all predictions are computed"
    )
    _keras.chunked_head.check_compiled(model)
    return _keras.chunked_head.ChunkedHead(model, size, is_xla)
