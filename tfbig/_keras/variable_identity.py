"""Keras's optimizers know a weight by its `tf.Variable`; here one that is made anew is known, too.

They look at a key, such as those of weights that are excluded from weight decay, and at a name,
which begins with the names of the layers around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import tensorflow as tf

from tfbig import _types

__all__ = ("VariableIdentity",)


@dataclasses.dataclass(frozen=True)
class VariableIdentity:
    """What optimizers know a variable by.

    Attributes:
        key: unique among variables.
        scope: the beginning of its name, that of the layers around it; "" if there is none.
    """

    key: str
    scope: str

    @classmethod
    def of(cls, variable: _types.Variable) -> VariableIdentity:
        """That of a `tf.Variable`, which may have a copy on each replica."""
        return cls(variable._unique_id, str(variable.name).rpartition("/")[0])

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Within it, a variable that is made gets the name of this one, if that ends as its own."""
        # With a slash at the end, it is within no other.
        with tf.name_scope(f"{self.scope}/" if self.scope else ""):
            yield

    def give(self, copies: Iterable[_types.Variable]) -> None:
        """Has the copies or pieces of a variable be known as this one."""
        for copy in copies:
            copy._unique_id = self.key
