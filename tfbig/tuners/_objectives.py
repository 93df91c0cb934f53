"""What a search optimizes."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias, TypeVar

from keras_tuner.src.engine import objective as kt_objective
from optuna.trial import FrozenTrial

from tfbig.tuners import _tuner_types

__all__ = ("Direction", "Objectives", "nan_allowed", "pareto_front")

_T = TypeVar("_T")

Direction: TypeAlias = Literal["minimize", "maximize"]


class Objectives:
    """The objectives of a search, in order.

    Args:
        objective: KerasTuner's: one objective, or several in one.
    """

    def __init__(self, objective: _tuner_types.Objective) -> None:
        # KerasTuner's, which of several objectives has the sum.
        self.combined = objective
        self._all = getattr(objective, "objectives", [objective])
        self._is_default = isinstance(objective, kt_objective.DefaultObjective)

    @property
    def is_single(self) -> bool:
        return len(self._all) == 1

    @property
    def names(self) -> list[str]:
        return [o.name for o in self._all]

    @property
    def logged_names(self) -> list[str]:
        """Names that the logs of an epoch must contain; none if training returns a number."""
        return [] if self._is_default else self.names

    @property
    def directions(self) -> list[Direction]:
        return ["maximize" if o.direction == "max" else "minimize" for o in self._all]

    def direction_of(self, name: str) -> str | None:
        """KerasTuner's "min" or "max"; None for a metric that is not an objective."""
        return {o.name: o.direction for o in self._all}.get(name)

    def rank(self, trial: FrozenTrial) -> list[float]:
        """A sort key by which better trials come first; with several objectives, by the first."""
        signs = [-1 if o.direction == "max" else 1 for o in self._all]
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    def described(self) -> str:
        """The names with their directions."""
        return ", ".join(f"{o.name} ({o.direction})" for o in self._all)


def pareto_front(found: Iterable[_T], rank: Callable[[_T], list[float]]) -> list[_T]:
    """Those that none of the others beats, in the order of their ranks.

    Args:
        found: What is compared.
        rank: Returns values of which smaller ones are better.
    """
    front: list[_T] = []
    # In this order, none is beaten by one that comes later.
    for one in sorted(found, key=rank):
        if not any(_beats(rank(other), rank(one)) for other in front):
            front.append(one)
    return front


def _beats(a: list[float], b: list[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def nan_allowed() -> Iterator[None]:
    """Ignores NumPy's warning that all values are NaN; such a trial is infeasible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
