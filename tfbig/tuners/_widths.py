"""A search at a small width, for a model of a large one."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tfbig import _integers, errors
from tfbig.tuners import _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("BuildAtWidth", "Widths")

# A function of hyperparameters and a width, or an object that has one.
BuildAtWidth = Callable[[HyperParameters, int], keras.Model] | _tuner_types.HyperModel


class Widths:
    """The width at which a search builds models, and the one at which it ends.

    Args:
        search: The width of the search.
        wide: The width of the model that is wanted.

    Raises:
        InvalidOptionError: If these are not two widths, the second larger than the first.
    """

    def __init__(self, search: int, wide: int) -> None:
        self.search, self.wide = search, wide
        self._current = search

    @classmethod
    def of(cls, option: Any) -> Widths:  # Any: what a user has passed.
        """Those of the option `scale_width`."""
        is_pair = isinstance(option, tuple | list) and len(option) == 2
        search, wide = map(_integers.as_integer, option) if is_pair else (None, None)
        if search is None or wide is None:
            raise errors.InvalidOptionError(
                "`scale_width` must be two integers, the width of the search and that of the model "
                f"that is wanted. Received: scale_width={option!r}."
            )
        if not 1 <= search < wide:
            raise errors.InvalidOptionError(
                f"`scale_width` must be a width and a larger one. Received: scale_width={option!r}."
            )
        return cls(search, wide)

    @contextlib.contextmanager
    def at(self, width: int) -> Iterator[None]:
        """Within it, models have another width."""
        self._current = width
        try:
            yield
        finally:
            self._current = self.search

    def builder(self, hypermodel: Any) -> Any:  # As given; KerasTuner has no types.
        """What builds models of hyperparameters alone, at the current width.

        Args:
            hypermodel: `BuildAtWidth`.
        """
        is_object = hasattr(hypermodel, "build")
        function = hypermodel.build if is_object else hypermodel
        try:
            inspect.signature(function).bind(None, 1)
        except (TypeError, ValueError):
            raise errors.InvalidOptionError(
                "`scale_width` needs a function of hyperparameters and a width, such as "
                f"`def build(hp, width)`. Received: hypermodel={hypermodel!r}."
            ) from None

        def build(hp: HyperParameters) -> keras.Model:
            model: keras.Model = function(hp, self._current)
            return model

        if not is_object:
            return build
        made = copy.copy(hypermodel)
        made.build = build
        return made
