"""What KerasTuner keeps itself, and here only the study knows."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

__all__ = ("FromStudy", "StoredAtOnce")

# An oracle, and what the property returns.
Oracle = TypeVar("Oracle")
T = TypeVar("T")


class FromStudy(Generic[Oracle, T]):
    """A property of an oracle, as a decorator; assigning to it has no effect."""

    def __init__(self, read: Callable[[Oracle], T]) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    @overload
    def __get__(self, oracle: None, owner: type) -> "FromStudy[Oracle, T]": ...

    @overload
    def __get__(self, oracle: Oracle, owner: type) -> T: ...

    def __get__(self, oracle: Oracle | None, owner: type) -> "FromStudy[Oracle, T] | T":
        return self if oracle is None else self._read(oracle)

    def __set__(self, oracle: Oracle, value: T) -> None:
        del oracle, value


class StoredAtOnce:
    """The study stores everything at once, so that there is no other state to save."""

    def save(self) -> None:
        """Does nothing."""

    def reload(self) -> None:
        """Does nothing."""

    def get_state(self) -> dict[str, Any]:  # As in KerasTuner: any JSON.
        """An empty dictionary."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:  # As in KerasTuner: any JSON.
        """Does nothing."""
