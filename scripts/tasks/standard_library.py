"""Text that every machine has: the source of Python's standard library."""

from __future__ import annotations

import hashlib
import pathlib
import sysconfig

# Tests and encodings are tables and repetitions; the others are not the library itself.
_LEFT_OUT = {"encodings", "idlelib", "lib2to3", "test", "tests", "__pycache__"} | {
    "dist-packages",
    "site-packages",
}

# One file of so many is held out.
_HELD_OUT = 10

# At most so many bytes of a file: many files by many authors teach more than a few.
_LONGEST = 2**15


def documents(train_bytes: int, held_out_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """Files of the standard library, always the same ones in one version of Python.

    Whole files are held out, so that the measured text is new to the model.

    Args:
        train_bytes: How many bytes to train on; all, if there are fewer.
        held_out_bytes: How many bytes to measure on.

    Returns:
        Two lists of UTF-8 documents, one for each file; long ones are truncated.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not _LEFT_OUT & set(name.parts)]
    # By a digest, so that the choice depends neither on the file system nor on a seed.
    ordered = sorted(names, key=_digest)
    held_out = [name for name in ordered if _digest(name)[0] % _HELD_OUT == 0]
    train = [name for name in ordered if _digest(name)[0] % _HELD_OUT]
    return _read(root, train, train_bytes), _read(root, held_out, held_out_bytes)


def _digest(name: pathlib.Path) -> bytes:
    return hashlib.sha256(name.as_posix().encode()).digest()


def _read(root: pathlib.Path, names: list[pathlib.Path], limit: int) -> list[bytes]:
    texts = []
    for name in names:
        if limit <= 0:
            break
        text = (root / name).read_bytes()[: min(limit, _LONGEST)]
        # A few files are not UTF-8, and truncation may split a character.
        text = text.decode(errors="ignore").encode()
        if text:
            texts.append(text)
            limit -= len(text)
    return texts
