"""What KerasTuner keeps itself, and here only the study knows."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

from tfbig import errors

__all__ = ("FromStudy", "StoredAtOnce")

# An oracle, and what the property returns.
Oracle = TypeVar("Oracle")
T = TypeVar("T")


class FromStudy(Generic[Oracle, T]):
    """A property of an oracle, as a decorator.

    Args:
        read: Returns the value.
        write: Called with an assigned value. Without it, only an empty value may be assigned, as
            KerasTuner's constructor does; that has no effect.
    """

    def __init__(
        self, read: Callable[[Oracle], T], write: Callable[[Oracle, T], None] | None = None
    ) -> None:
        self._read = read
        self._write = write
        self.__doc__ = read.__doc__

    @classmethod
    def written_by(
        cls, write: Callable[[Oracle, T], None]
    ) -> Callable[[Callable[[Oracle], T]], "FromStudy[Oracle, T]"]:
        """A decorator for a property that may be assigned to."""
        return lambda read: cls(read, write)

    @overload
    def __get__(self, oracle: None, owner: type) -> "FromStudy[Oracle, T]": ...

    @overload
    def __get__(self, oracle: Oracle, owner: type) -> T: ...

    def __get__(self, oracle: Oracle | None, owner: type) -> "FromStudy[Oracle, T] | T":
        return self if oracle is None else self._read(oracle)

    def __set__(self, oracle: Oracle, value: T) -> None:
        if self._write is not None:
            self._write(oracle, value)
        elif value:
            raise errors.InvalidOptionError(
                f"`{self._read.__name__}` is what the study says, and must not be assigned. "
                f"Received: {value!r}."
            )


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
