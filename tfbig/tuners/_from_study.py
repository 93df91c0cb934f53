"""Attributes that KerasTuner's constructor assigns, but that only the study knows."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar, overload

if TYPE_CHECKING:
    from tfbig.tuners._oracle import StudyOracle

__all__ = ("FromStudy",)

T = TypeVar("T")


class FromStudy(Generic[T]):
    """A property of an oracle, as a decorator; assigning to it has no effect."""

    def __init__(self, read: "Callable[[StudyOracle], T]") -> None:
        self._read = read
        self.__doc__ = read.__doc__

    @overload
    def __get__(self, oracle: None, owner: type) -> "FromStudy[T]": ...

    @overload
    def __get__(self, oracle: "StudyOracle", owner: type) -> T: ...

    def __get__(self, oracle: "StudyOracle | None", owner: type) -> "FromStudy[T] | T":
        return self if oracle is None else self._read(oracle)

    def __set__(self, oracle: "StudyOracle", value: T) -> None:
        del oracle, value
