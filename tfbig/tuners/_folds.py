"""The data of a search, cut into folds."""

import keras
import numpy as np

from tfbig import errors
from tfbig._update import fit_context

__all__ = ("arguments",)


def arguments(folds, seed, args, kwargs):
    """The arguments of `fit` for each fold.

    Args:
        folds: int, how many.
        seed: int, what samples are dealt out by.
        args: positional arguments of `fit`, with all the data.
        kwargs: its other arguments.

    Yields:
        Positional arguments, always none, and the others.

    Raises:
        SearchError: If the data are not arrays, or come with validation data.
    """
    given = fit_context.arguments_of(keras.Model.fit, (None, *args), kwargs)
    given.pop("self", None)
    data = {name: given.pop(name, None) for name in ("x", "y", "sample_weight")}
    arrays = [v for v in keras.tree.flatten(data) if v is not None]
    if data["x"] is None or not all(
        hasattr(v, "shape") and hasattr(v, "__getitem__") for v in arrays
    ):
        raise errors.SearchError(
            f"folds={folds} needs arrays to cut. Received: {type(data['x']).__name__} for x."
        )
    extra = [n for n in ("validation_data", "validation_split") if given.get(n)]
    if extra:
        raise errors.SearchError(
            f"folds={folds} validates on each fold in turn. Received: {extra[0]} besides."
        )
    samples = len(arrays[0])
    if samples < folds:
        raise errors.SearchError(f"folds={folds} needs as many samples. Received: {samples}.")
    order = np.random.default_rng(seed).permutation(samples)
    for part in np.array_split(order, folds):
        held_out = np.zeros(samples, bool)
        held_out[part] = True
        train, validation = (_taken(data, mask) for mask in (~held_out, held_out))
        used = [validation[n] for n in ("x", "y", "sample_weight") if validation[n] is not None]
        yield (), given | train | {"validation_data": tuple(used)}


def _taken(data, mask):
    indices = np.flatnonzero(mask)

    def part(value):
        if value is None or isinstance(value, np.ndarray):
            return value if value is None else value[indices]
        return keras.ops.take(value, indices, axis=0)

    return keras.tree.map_structure(part, data)
