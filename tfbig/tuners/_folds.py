"""The data of a search, split into folds."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from tfbig import errors
from tfbig._update import fit_context

__all__ = ("arguments",)

# Arrays in any structure that `fit` takes.
_Arrays: TypeAlias = Any


# The values are arguments of `fit`, of any type.
def arguments(
    folds: int, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of `fit` for each fold.

    Args:
        folds: How many.
        seed: By which samples are assigned to folds.
        args: Positional arguments of `fit`, with all the data.
        kwargs: Its keyword arguments.

    Yields:
        Positional arguments, always none, and keyword arguments.

    Raises:
        SearchError: If the data are not arrays, or if there are validation data as well.
    """
    given = fit_context.arguments_of(keras.Model.fit, (None, *args), kwargs)
    given.pop("self", None)
    data = {name: given.pop(name, None) for name in ("x", "y", "sample_weight")}
    arrays = [v for v in keras.tree.flatten(data) if v is not None]
    if data["x"] is None or not all(
        hasattr(v, "shape") and hasattr(v, "__getitem__") for v in arrays
    ):
        raise errors.SearchError(
            f"With folds={folds}, the data must be arrays. Received: {type(data['x']).__name__} "
            "for x."
        )
    extra = [n for n in ("validation_data", "validation_split") if given.get(n)]
    if extra:
        raise errors.SearchError(
            f"With folds={folds}, each fold is used for validation in turn. Received: {extra[0]} "
            f"as well. Leave {extra[0]} out."
        )
    samples = len(arrays[0])
    if samples < folds:
        raise errors.SearchError(
            f"`folds` must not exceed the number of samples. Received: folds={folds} and {samples} "
            "samples."
        )
    order = np.random.default_rng(seed).permutation(samples)
    for part in np.array_split(order, folds):
        held_out = np.zeros(samples, bool)
        held_out[part] = True
        train, validation = (_taken(data, mask) for mask in (~held_out, held_out))
        used = [validation[n] for n in ("x", "y", "sample_weight") if validation[n] is not None]
        yield (), given | train | {"validation_data": tuple(used)}


def _taken(data: dict[str, _Arrays], mask: np.ndarray) -> dict[str, _Arrays]:
    indices = np.flatnonzero(mask)

    def part(value: _Arrays) -> _Arrays:
        if value is None or isinstance(value, np.ndarray):
            return value if value is None else value[indices]
        return keras.ops.take(value, indices, axis=0)

    taken: dict[str, _Arrays] = keras.tree.map_structure(part, data)
    return taken
