"""Python environments for lowering, compiling and running, made when a user asks for them.

Their versions are pinned: the programs in `external` use what is not public. libtpu comes from
the package index, under its own licence; it is no part of tfbig.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from tfbig import _log, errors

__all__ = ("PROGRAMS", "Environments", "ExternalError", "UnavailableError", "is_in_use")

# The program that runs in each, and what it needs.
_LOWERING = ("tensorflow-tpu==2.20.0", "libtpu==0.0.18", "numpy==2.4.6", "protobuf==7.36.2")
_COMPILING = ("jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.42.1", "numpy==2.4.6")
PROGRAMS = {"with_tensorflow": _LOWERING, "with_jax": _COMPILING}

_EXTERNAL = pathlib.Path(__file__).parent / "external"

_SECONDS_TO_INSTALL = 1800  # Two gigabytes may be downloaded.
_ATTEMPTS = 5

# In what libtpu says where another process uses it, also one that does not take our lock.
_IN_USE = ("libtpu_lockfile", "already in use")


class UnavailableError(errors.TfbigError, RuntimeError):
    """An environment cannot be made or used."""


class ExternalError(errors.TfbigError, RuntimeError):
    """A program in another environment failed; `output` is what it said."""

    def __init__(self, message, output):
        super().__init__(message)
        self.output = output


class Environments:
    """The environments, in a directory.

    Args:
        directory: path; made where there is none.
    """

    def __init__(self, directory):
        self.directory = pathlib.Path(directory).expanduser()

    def python(self, program):
        """Path of the interpreter that a program of `external` needs; makes it if need be.

        Args:
            program: str, one of `PROGRAMS`.

        Raises:
            UnavailableError: If it cannot be made, or waited for.
        """
        environment = self.directory / program.removeprefix("with_")
        interpreter = environment / "bin" / "python"
        wanted = PROGRAMS[program]
        # Written last, so that an interrupted attempt is repeated.
        stamp = environment / "installed.txt"
        # Without the lock: the directory may be another user's.
        if _is_made(interpreter, stamp, wanted):
            return interpreter
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UnavailableError(f"{self.directory} cannot be made: {e}") from e
        with _locked(self.directory / "lock"):
            if _is_made(interpreter, stamp, wanted):
                return interpreter
            _log.logger().info("tfbig: making %s: %s", environment, ", ".join(wanted))
            try:
                _install(environment, [sys.executable, "-m", "venv", "--clear", str(environment)])
                pip = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check"]
                _install(environment, [*pip, "--quiet", *wanted])
                stamp.write_text("\n".join(wanted) + "\n")
            except BaseException as e:
                shutil.rmtree(environment, ignore_errors=True)
                if isinstance(e, OSError):
                    raise UnavailableError(f"{environment} cannot be made: {e}") from e
                raise
        return interpreter

    def run(self, program, *arguments, timeout=900):
        """Runs a program of `external` to its end, one at a time on this machine.

        Raises:
            UnavailableError: If its environment cannot be made or used.
            ExternalError: If it fails, or takes more than `timeout` seconds.
        """
        path = _EXTERNAL / f"{program}.py"
        command = [str(part) for part in (self.python(program), path, *arguments)]
        # libtpu lets one process of a machine use it.
        with _locked(pathlib.Path(tempfile.gettempdir()) / "tfbig_tpu_check.lock"):
            for attempt in range(1, _ATTEMPTS + 1):
                done = _finished(command, timeout)
                if done.returncode == 0:
                    return
                if not is_in_use(done.stderr) or attempt == _ATTEMPTS:
                    break
                time.sleep(2**attempt)
        raise ExternalError(f"{program} failed: {_cause(done)}", done.stderr)


def is_in_use(output):
    """Whether what a program said tells that another process uses libtpu."""
    return any(text in output for text in _IN_USE)


def _is_made(interpreter, stamp, wanted):
    try:
        # The interpreter is a link to another, which may be gone.
        return interpreter.exists() and stamp.read_text().split() == list(wanted)
    except OSError:
        return False


def _environment():
    # Packages of this environment are none of the other's.
    names = ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS", "TF_CONFIG", "KERAS_BACKEND")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return kept | {"TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


def _finished(command, timeout):
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=_environment(),
        )
    except subprocess.TimeoutExpired as e:
        raise ExternalError(f"{command[1]} took more than {timeout} s", "") from e
    except OSError as e:
        raise UnavailableError(f"{command[0]} cannot be started: {e}") from e


def _cause(done):
    """The last error of a program, in a line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    raised = lines[starts[-1] :] if starts else []
    # The line that names the exception: what follows it may be many.
    named = [line for line in raised if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (named or lines or [f"exit code {done.returncode}"])[-1][:2000]


def _install(environment, command):
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS_TO_INSTALL
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UnavailableError(f"{environment} cannot be made: {e}") from e
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        # pip names the cause in lines of its own, and hints after them.
        found = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = found[-1].strip() if found else f"exit code {done.returncode}"
        raise UnavailableError(f"{environment} cannot be made: {reason}")


@contextlib.contextmanager
def _locked(path):
    """Waits until no other process has the file, then keeps it."""
    try:
        lock = _opened(path)
    except OSError as e:
        raise UnavailableError(
            f"The lock file must be readable. Received: {path}: {e.strerror}. Have its owner "
            "remove it or make it readable."
        ) from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            raise UnavailableError(f"{path} cannot be locked: {e}") from e
        yield
    finally:
        os.close(lock)


def _opened(path):
    """Descriptor of a lock file, which may be another user's."""
    try:
        # To be written, as NFS asks of what is locked.
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        # Not with O_CREAT: in a shared directory, Linux may refuse it for another user's file.
        return os.open(path, os.O_RDONLY)
