"""Python environments that lower, compile and run programs, created when a user asks for them.

Their versions are pinned, because the programs in `external` use private APIs. libtpu comes from
the package index under its own license; it is not part of tfbig.
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
from collections.abc import Iterator, Sequence

from tfbig import _log, errors

__all__ = ("PROGRAMS", "Environments", "ExternalError", "UnavailableError", "is_in_use")

# The programs, and the packages that each needs in its environment.
_LOWERING = ("tensorflow-tpu==2.20.0", "libtpu==0.0.18", "numpy==2.4.6", "protobuf==7.36.2")
_COMPILING = ("jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.42.1", "numpy==2.4.6")
PROGRAMS = {"with_tensorflow": _LOWERING, "with_jax": _COMPILING}

_EXTERNAL = pathlib.Path(__file__).parent / "external"

_SECONDS_TO_INSTALL = 1800  # It may download two gigabytes.
_ATTEMPTS = 5

# What libtpu prints while another process uses it, even one that does not take our lock.
_IN_USE = ("libtpu_lockfile", "already in use")


class UnavailableError(errors.TfbigError, RuntimeError):
    """An environment cannot be created or used."""


class ExternalError(errors.TfbigError, RuntimeError):
    """A program in another environment failed.

    Attributes:
        output: What it printed to stderr.
    """

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


class Environments:
    """The environments, in a directory.

    Args:
        directory: Their directory, created if there is none.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory).expanduser()

    def python(self, program: str) -> pathlib.Path:
        """Returns the interpreter that a program of `external` needs; creates it if necessary.

        Args:
            program: One of `PROGRAMS`.

        Raises:
            UnavailableError: If it cannot be created, or locked.
        """
        environment = self.directory / program.removeprefix("with_")
        interpreter = environment / "bin" / "python"
        packages = PROGRAMS[program]
        # Written last, so that an interrupted installation is repeated.
        stamp = environment / "installed.txt"
        # Before locking, because the directory may belong to another user.
        if _is_installed(interpreter, stamp, packages):
            return interpreter
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UnavailableError(f"{self.directory} cannot be created: {e}") from e
        with _locked(self.directory / "lock"):
            if _is_installed(interpreter, stamp, packages):
                return interpreter
            _log.logger().info("tfbig: installing %s: %s", environment, ", ".join(packages))
            try:
                _install(environment, [sys.executable, "-m", "venv", "--clear", str(environment)])
                pip = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check"]
                _install(environment, [*pip, "--quiet", *packages])
                stamp.write_text("\n".join(packages) + "\n")
            except BaseException as e:
                shutil.rmtree(environment, ignore_errors=True)
                if isinstance(e, OSError):
                    raise UnavailableError(f"{environment} cannot be created: {e}") from e
                raise
        return interpreter

    def run(self, program: str, *arguments: object, timeout: float = 900) -> None:
        """Runs a program of `external` to its end, one at a time on this machine.

        Args:
            program: One of `PROGRAMS`.
            *arguments: Its command-line arguments.
            timeout: Seconds that it may take.

        Raises:
            UnavailableError: If its environment cannot be created or used.
            ExternalError: If it fails, or exceeds the timeout.
        """
        path = _EXTERNAL / f"{program}.py"
        command = [str(part) for part in (self.python(program), path, *arguments)]
        # Only one process on a machine can use libtpu.
        with _locked(pathlib.Path(tempfile.gettempdir()) / "tfbig_tpu_check.lock"):
            for attempt in range(1, _ATTEMPTS + 1):
                done = _finish(command, timeout)
                if done.returncode == 0:
                    return
                if not is_in_use(done.stderr) or attempt == _ATTEMPTS:
                    break
                time.sleep(2**attempt)
        raise ExternalError(f"{program} failed: {_cause(done)}", done.stderr)


def is_in_use(output: str) -> bool:
    """Returns whether a program's output says that another process uses libtpu."""
    return any(text in output for text in _IN_USE)


def _is_installed(interpreter: pathlib.Path, stamp: pathlib.Path, packages: Sequence[str]) -> bool:
    try:
        # The interpreter is a link to another one, which may be gone.
        return interpreter.exists() and stamp.read_text().split() == list(packages)
    except OSError:
        return False


def _environment() -> dict[str, str]:
    # This environment's packages and settings do not apply to the other one.
    names = ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS", "TF_CONFIG", "KERAS_BACKEND")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return kept | {"TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


def _finish(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
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


def _cause(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the last error of a program, as one line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    raised = lines[starts[-1] :] if starts else []
    # The line that names the exception: many lines may follow it.
    named = [line for line in raised if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (named or lines or [f"exit code {done.returncode}"])[-1][:2000]


def _install(environment: pathlib.Path, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS_TO_INSTALL
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UnavailableError(f"{environment} cannot be created: {e}") from e
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        # pip names the cause in a line of its own, followed by hints.
        found = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = found[-1].strip() if found else f"exit code {done.returncode}"
        raise UnavailableError(f"{environment} cannot be created: {reason}")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other process locks the file, then locks it."""
    try:
        lock = _open(path)
    except OSError as e:
        raise UnavailableError(
            f"The lock file must be readable. Received: {path}: {e.strerror}. Ask its owner to "
            "remove it or to make it readable."
        ) from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            raise UnavailableError(f"{path} cannot be locked: {e}") from e
        yield
    finally:
        os.close(lock)


def _open(path: pathlib.Path) -> int:
    """Returns the descriptor of a lock file, which may belong to another user."""
    try:
        # NFS only locks files that are open for writing.
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        # Without O_CREAT, which Linux may refuse for another user's file in a shared directory.
        return os.open(path, os.O_RDONLY)
