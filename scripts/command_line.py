"""The command line of the programs in this directory: flags, and errors of one line.

Of the standard library and absl until it is asked for more, so that `--help` and a mistyped
flag take no time.
"""

import contextlib
import os
import pathlib
import sys
import tempfile

from absl import app, flags


class UsageError(Exception):
    """What the user asked for cannot be done; the text says what can."""


class MissingExtraError(UsageError):
    """A package is missing that an extra of tfbig installs; the text says which."""

    def __init__(self, what, extra):
        super().__init__(f"{what} needs a package that is not there: pip install 'tfbig[{extra}]'")


def run(program, work, nothing_done):
    """Runs a program of flags, and ends the process with its exit code.

    Args:
        program: str, its name for messages.
        work: function without arguments that returns an exit code. A `UsageError` of it is a
            line and exit code 2.
        nothing_done: str, what to say where Ctrl-C comes before `work` knows of it.
    """

    def main(arguments):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            if len(arguments) > 1:
                raise UsageError(f"there are only flags, no arguments. Received: {arguments[1]}")
            return work()
        except UsageError as e:
            print(f"{program}: {' '.join(str(e).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return interrupted(program, nothing_done)

    def parse(arguments):
        # absl would print a traceback's worth and exit with 1.
        if {"--help", "-help", "-h"} & set(arguments[1:]):
            app.usage(shorthelp=True, writeto_stdout=True)
            sys.exit(0)
        try:
            return flags.FLAGS(arguments)
        except flags.Error as e:
            print(f"{program}: {' '.join(str(e).split())} (see --help)", file=sys.stderr)
            sys.exit(2)

    app.run(main, flags_parser=parse)


def interrupted(program, what):
    """Says what became of a program that Ctrl-C ended; returns its exit code."""
    print(f"\n{program}: interrupted; {what}", file=sys.stderr)
    return 130


def make_writable(path, flag="output_dir"):
    """Makes the directory of a flag if there is none, and checks that it can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise UsageError(f"--{flag}={path} cannot be written to: {e.strerror}.") from None


def check_file(name, flag):
    """Checks that the file of a flag can be written to, before what takes long."""
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
def quiet_start():
    """Keeps what TensorFlow writes to stderr while it starts, unless that fails.

    Some lines appear below any TF_CPP_MIN_LOG_LEVEL (2.21), so the file
    descriptor is turned aside.
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
