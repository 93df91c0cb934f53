"""Values of hyperparameters as JSON that keeps their type.

A tuple stays a tuple, True is not 1, 1.0 is not 1, and a float stays the same to the bit.
"""

import hashlib
import json
import math
from typing import Any, TypeAlias

import numpy as np

from tfbig import errors
from tfbig.tuners import _tuner_types

__all__ = ("canonical", "dumps", "loads", "name_of")

# What `json` reads and writes.
_Json: TypeAlias = Any

# These keys mark what JSON cannot express: tuples, floats that are not finite, and dictionaries
# that look like one of these.
_TUPLE, _DICT, _FLOAT = "__tuple__", "__dict__", "__float__"

# Values of these types stay as they are.
_PLAIN = (type(None), bool, int, float, str)


def dumps(value: _tuner_types.Value) -> str:
    """A value as JSON.

    Raises:
        InvalidOptionError: If the value is not made of None, bool, int, float, str,
            tuples, lists and dictionaries with str keys.
    """
    return json.dumps(_encoded(value), sort_keys=True)


def loads(text: str) -> _tuner_types.Value:
    """The value that `dumps` received."""
    return _decoded(json.loads(text))


def canonical(value: _tuner_types.Value) -> _tuner_types.Value:
    """The value with NumPy's scalars converted to Python's."""
    # Each value of each trial comes here; most are of these.
    return value if type(value) in _PLAIN else loads(dumps(value))


def name_of(value: _tuner_types.Value) -> str:
    """A short name for a value, such as a combination of values, that no other has."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()[:40]


def _encoded(value: _tuner_types.Value) -> _Json:
    if type(value) in _PLAIN and type(value) is not float:
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(v) for v in value]}
    if isinstance(value, list):
        return [_encoded(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        items = {k: _encoded(v) for k, v in value.items()}
        return {_DICT: items} if len(items) == 1 and _is_marked(items) else items
    raise errors.InvalidOptionError(
        "Values of hyperparameters must be None, bool, int, float, str, or tuples, lists and "
        f"dictionaries of these. Received: {value!r} of type {type(value).__name__}."
    )


def _is_marked(items: dict[str, _Json]) -> bool:
    return next(iter(items)) in (_TUPLE, _DICT, _FLOAT)


def _decoded(value: _Json) -> _tuner_types.Value:
    if isinstance(value, list):
        return [_decoded(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (mark, content) = next(iter(value.items()))
        if mark == _TUPLE:
            return tuple(_decoded(v) for v in content)
        if mark == _FLOAT:
            return float(content)
        if mark == _DICT:
            value = content
    return {k: _decoded(v) for k, v in value.items()}
