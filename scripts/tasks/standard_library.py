"""Text that every machine has: the source of the running Python's standard library."""

import hashlib
import pathlib
import sysconfig

# Tests and encodings hold tables and repetitions; the rest is not the library itself.
_LEFT_OUT = {"encodings", "idlelib", "lib2to3", "test", "tests", "__pycache__"} | {
    "dist-packages",
    "site-packages",
}

# One of so many files is held out.
_HELD_OUT = 10

# Of one file no more than so many bytes: many files of many authors say more than a few.
_LONGEST = 2**15


def documents(train_bytes, held_out_bytes):
    """Files of the standard library, always the same of one version of Python.

    Whole files are held out: what is measured is text of which nothing was seen.

    Args:
        train_bytes: int, how many bytes to train on; all there are, if fewer.
        held_out_bytes: int, how many bytes to measure on.

    Returns:
        Two lists of UTF-8 bytes, one document a file; long ones are cut.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not _LEFT_OUT & set(name.parts)]
    # By a digest, so that neither the file system nor a seed decides which files they are.
    ordered = sorted(names, key=_digest)
    held_out = [name for name in ordered if _digest(name)[0] % _HELD_OUT == 0]
    train = [name for name in ordered if _digest(name)[0] % _HELD_OUT]
    return _read(root, train, train_bytes), _read(root, held_out, held_out_bytes)


def _digest(name):
    return hashlib.sha256(name.as_posix().encode()).digest()


def _read(root, names, limit):
    texts = []
    for name in names:
        if limit <= 0:
            break
        text = (root / name).read_bytes()[: min(limit, _LONGEST)]
        # A few files are not UTF-8, and a cut may go through a character.
        text = text.decode(errors="ignore").encode()
        if text:
            texts.append(text)
            limit -= len(text)
    return texts
