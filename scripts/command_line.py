"""The command line of the programs in this directory: flags, and errors of one line.

It imports nothing slow, so that `--help` and a mistyped flag take no time.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

from absl import app, flags


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what to do instead."""


class MissingExtraError(UsageError):
    """A package is missing that an extra of tfbig installs; the message says which."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs a package that is not there: pip install 'tfbig[{extra}]'")


def run(program: str, work: Callable[[], int], nothing_done: str) -> None:
    """Runs a program that takes flags, and ends the process with its exit code.

    Args:
        program: Its name for messages.
        work: Returns the exit code. If it raises `UsageError`, one line is printed and the exit
            code is 2.
        nothing_done: What to say if Ctrl-C comes before `work` handles it.
    """

    def main(arguments: list[str]) -> int:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            if len(arguments) > 1:
                raise UsageError(f"it takes flags, no arguments. Received: {arguments[1]}")
            return work()
        except UsageError as e:
            print(f"{program}: {' '.join(str(e).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return interrupted(program, nothing_done)

    def parse(arguments: list[str]) -> list[str]:
        # absl itself would print many lines and exit with 1.
        if {"--help", "-help", "-h"} & set(arguments[1:]):
            app.usage(shorthelp=True, writeto_stdout=True)
            sys.exit(0)
        try:
            return flags.FLAGS(arguments)
        except flags.Error as e:
            print(f"{program}: {' '.join(str(e).split())} (see --help)", file=sys.stderr)
            sys.exit(2)

    app.run(main, flags_parser=parse)


def interrupted(program: str, what: str) -> int:
    """Says what Ctrl-C left of a program; returns its exit code."""
    print(f"\n{program}: interrupted; {what}", file=sys.stderr)
    return 130


def make_writable(path: pathlib.Path, flag: str = "output_dir") -> None:
    """Makes the directory of a flag if there is none, and checks that it is writable.

    Raises:
        UsageError: If it is not.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise UsageError(f"--{flag}={path} cannot be written to: {e.strerror}.") from None


def check_file(name: str, flag: str) -> None:
    """Checks that the file of a flag is writable.

    Raises:
        UsageError: If it is not.
    """
    path = pathlib.Path(name)
    if path.is_dir() or not name:
        raise UsageError(f"--{flag} must be a file. Received: {name or 'nothing'}.")
    if not path.parent.is_dir():
        raise UsageError(f"--{flag}={path}: there is no directory {path.parent}.")
    if not path.exists():
        make_writable(path.parent, flag)
        return
    try:
        path.open("ab").close()
    except OSError as e:
        raise UsageError(f"--{flag}={path} cannot be written to: {e.strerror}.") from None


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Hides what TensorFlow writes to stderr while it starts, unless that fails.

    TensorFlow 2.21 writes some lines at every TF_CPP_MIN_LOG_LEVEL, so the file descriptor is
    redirected.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException as e:
            if not isinstance(e, UsageError | KeyboardInterrupt):
                aside.seek(0)
                os.write(stderr, aside.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
