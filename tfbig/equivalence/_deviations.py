"""How far apart two results are, and what of it rounding explains."""

from typing import TypeAlias

import numpy as np
from numpy import typing as npt

from tfbig import _types
from tfbig.equivalence._report import Deviation

__all__ = ("of_changes", "of_values", "root_mean_square")

Arrays: TypeAlias = list[npt.NDArray[np.float64]]

# How many times further apart the cut and the whole batch may be than two trainings that start
# one rounding apart: the cut one adds up in another order throughout.
MARGIN = 30


def root_mean_square(array: npt.NDArray[np.float64]) -> float:
    """The root of the mean of the squares; 0 for an empty array."""
    return float(np.sqrt(np.mean(np.square(array)))) if np.size(array) else 0.0


def _relative(deviation: float, reference: float) -> float:
    if not np.isfinite(deviation):
        return float("inf")  # Numbers that are not finite cannot be compared.
    return deviation / reference if reference > 0 else float(deviation > 0)


def of_values(
    kind: str, names: list[str], whole: Arrays, cut: Arrays, tolerance: float
) -> list[Deviation]:
    """Deviations of values that one update computes."""
    sizes = [float(np.max(np.abs(a), initial=0)) for a in whole]
    floor = 1e-3 * max(sizes, default=0)
    found = []
    for name, size, a, b in zip(names, sizes, whole, cut, strict=True):
        absolute = float(np.max(np.abs(a - b), initial=0))
        relative = _relative(absolute, max(size, floor))
        found.append(Deviation(name, kind, absolute, relative, tolerance))
    return found


def of_changes(
    kind: str,
    variables: list[_types.KerasVariable],
    whole: Arrays,
    cut: Arrays,
    rounded: Arrays,
    tolerance: float,
) -> list[Deviation]:
    """Deviations of what several updates changed.

    Args:
        kind: "weight" or "optimizer"; state of the optimizer that no update changes, such as a
            learning rate, is left out.
        variables: What was changed.
        whole: Changes that the whole batch makes.
        cut: Changes that the cut batch makes.
        rounded: Changes that the whole batch makes to weights moved by a rounding.
        tolerance: The relative deviation that counts as rounding.
    """
    found = []
    for variable, a, b, c in zip(variables, whole, cut, rounded, strict=True):
        if kind == "optimizer" and not (np.any(a) or np.any(b)):
            continue
        absolute = float(np.max(np.abs(a - b), initial=0))
        relative = _relative(root_mean_square(a - b), root_mean_square(a))
        allowed = max(tolerance, MARGIN * _relative(root_mean_square(a - c), root_mean_square(a)))
        found.append(Deviation(variable.path, kind, absolute, relative, allowed))
    return found
