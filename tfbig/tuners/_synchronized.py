"""One call of an oracle's methods at a time, for oracles that several threads use."""

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ("synchronized",)

_Arguments = ParamSpec("_Arguments")
_Returned = TypeVar("_Returned")


def synchronized(
    method: Callable[Concatenate[Any, _Arguments], _Returned],
) -> Callable[Concatenate[Any, _Arguments], _Returned]:
    """A method of an oracle that no two threads are in at once.

    All such methods of an object share one lock. A method may call others, and `super()`. An
    exception frees the lock.

    Args:
        method: Overrides a method of an oracle, such as `create_trial`.

    Example:

    >>> from tfbig import tuners
    >>> class Counting(tuners.oracles.RandomSearchOracle):
    ...     created = 0
    ...     @tuners.synchronized
    ...     def create_trial(self, tuner_id):
    ...         self.created += 1
    ...         return super().create_trial(tuner_id)
    """

    # The object is an oracle of any class.
    @functools.wraps(method)
    def locked(self: Any, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Returned:
        with self.__dict__.setdefault("_lock_of_calls", threading.RLock()):
            return method(self, *args, **kwargs)

    return locked
