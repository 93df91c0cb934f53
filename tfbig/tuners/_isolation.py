"""Runs each trial in a process of its own: the program starts again, and runs up to `search`.

There it runs one trial, and exits. Nothing needs to be pickled but an error that ends the search,
and nothing that a trial leaves in memory remains.
"""

import contextlib
import contextvars
import dataclasses
import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import IO, NoReturn

from tfbig import _lifetime, errors
from tfbig.distribute._workers import Workers
from tfbig.tuners import _study

__all__ = (
    "Watch",
    "check",
    "end_trial_process",
    "is_trial_process",
    "run_trials",
    "searching",
    "telling",
    "was_run_before",
)

# Tells a trial process to which search it belongs.
_VARIABLE = "TFBIG_TRIAL_OF"
# Tells it the open file, by its descriptor, for an error that ends the search.
_ERROR_FILE = "TFBIG_TRIAL_ERROR"

# Whether a search runs in this thread.
_is_searching = contextvars.ContextVar("is_searching", default=False)

# The projects of searches in memory that this process has begun, but for those within others.
_in_memory: list[str] = []

# Exit codes of a trial process: there may be another trial; there is none; an error, which the file
# has, ends the search.
_ONE_MORE, _NONE_LEFT, _ERROR = 75, 76, 77

# Seconds after SIGTERM until SIGKILL.
_SECONDS_TO_END = 10.0


@dataclasses.dataclass(frozen=True)
class Watch:
    """Ends processes whose trial does not stop by itself.

    Attributes:
        interval: Seconds after which it looks; None if there is nothing to watch.
        why_overdue: Returns why the process of an id must be ended; None if it need not.
    """

    interval: float | None
    why_overdue: Callable[[int], str | None]

    def wait(self, process: subprocess.Popen[bytes]) -> tuple[int, str | None]:
        """Waits for a process; returns its exit code, and why this has ended it, if so."""
        while True:
            try:
                return process.wait(self.interval), None
            except subprocess.TimeoutExpired:
                why = self.why_overdue(process.pid)
            if why is not None:
                return _end(process), why


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def check(workers: Workers, storage: str | None) -> None:
    """Raises if a trial process would not be part of the search.

    Args:
        workers: Those that train a trial together.
        storage: That of the search.
    """
    if storage == _study.MEMORY:
        raise errors.InvalidOptionError(
            "`isolate` needs a storage that several processes share. Received: isolate=True, "
            "storage='memory'. Leave out `storage`, or use a database URL."
        )
    if workers.count > 1:
        raise errors.InvalidOptionError(
            "`isolate` needs a single worker: it cannot run the programs of other workers again. "
            f"Received: isolate=True and a distribution_strategy over {workers.count} workers."
        )
    if not hasattr(sys.modules["__main__"], "__file__"):
        raise errors.InvalidOptionError(
            "`isolate` needs a program that can be run again for each trial. Received: isolate="
            "True in an interactive session. Put the search into a file."
        )


@contextlib.contextmanager
def searching(project: str, is_isolated: bool, is_in_memory: bool = False) -> Iterator[None]:
    """Within, a search runs in this thread.

    Args:
        project: The directory of its project.
        is_isolated: Whether its trials run in processes of their own.
        is_in_memory: Whether no other process can see its results.

    Raises:
        InvalidOptionError: If an isolated search begins within another one, or after one in memory.
    """
    is_within = _is_searching.get()
    if is_isolated and is_within:
        raise errors.InvalidOptionError(
            "`isolate` needs a search that is not part of a trial of another one: the program "
            "that runs again would begin with the other search. Received: isolate=True within a "
            "search. Leave `isolate` out here, and give it to the other search."
        )
    if is_isolated and _in_memory:
        raise errors.InvalidOptionError(
            "`isolate` needs all searches before it to be stored: the program that runs again for "
            "each trial would run them again. Received: isolate=True after the search in "
            f"{_in_memory[0]} with storage='memory'. Leave out its `storage`."
        )
    if is_in_memory and not is_within:
        _in_memory.append(project)
    token = _is_searching.set(True)
    try:
        yield
    finally:
        _is_searching.reset(token)


def is_trial_process(search: str) -> bool:
    """Whether this process runs one trial of a search."""
    return os.environ.get(_VARIABLE) == search


def was_run_before(search: str) -> bool:
    """Whether this process runs one trial of a later search; then its parent has run this one."""
    later = os.environ.get(_VARIABLE)
    return later is not None and later != search and not _is_searching.get()


def end_trial_process(is_over: bool) -> NoReturn:
    """Exits from a trial process, before the program does what follows its search."""
    _exit(_NONE_LEFT if is_over else _ONE_MORE)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def telling(is_trial_process: bool) -> Iterator[None]:
    """Within, an error ends a trial process, and is raised by `run_trials` in its parent."""
    try:
        yield
    except BaseException as e:
        if is_trial_process:
            with open(int(os.environ[_ERROR_FILE]), "wb") as file:
                file.write(_pickled(e))
            _exit(_ERROR)
        raise


def _pickled(error: BaseException) -> bytes:
    """An error with its traceback; one that cannot be pickled becomes a `SearchError`."""
    error.add_note("In the process of a trial:\n" + traceback.format_exc())
    with contextlib.suppress(Exception):
        pickled = pickle.dumps(error)
        if str(pickle.loads(pickled)) == str(error):
            return pickled
    name = type(error).__name__
    replaced = errors.SearchError(f"{name}: {error}" if str(error) else name)
    replaced.add_note(error.__notes__[-1])
    return pickle.dumps(replaced)


def run_trials(
    search: str,
    may_begin: Callable[[], bool],
    on_death: Callable[[int, str, bool], bool],
    watch: Watch,
) -> None:
    """Runs one process after the other until no trials are left.

    Args:
        search: The name of the search.
        may_begin: Called before each process: whether another trial may begin. A trial process
            knows neither when the search began nor which trials have failed since.
        on_death: Called with the id of a process that died, a message, and whether it may have
            lacked memory. Returns whether it died in the middle of a trial.
        watch: Ends processes whose trial does not stop by itself.

    Raises:
        SearchError: If a process died before its trial began.
        BaseException: What ended the search in a trial process.
    """
    with tempfile.TemporaryFile() as error:
        _run_trials(search, may_begin, on_death, watch, error)


def _run_trials(
    search: str,
    may_begin: Callable[[], bool],
    on_death: Callable[[int, str, bool], bool],
    watch: Watch,
    error: IO[bytes],
) -> None:
    while may_begin():
        process = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, _VARIABLE: search, _ERROR_FILE: str(error.fileno())},
            pass_fds=[error.fileno()],
            preexec_fn=functools.partial(_lifetime.end_with_parent, os.getpid()),
        )
        try:
            code, why = watch.wait(process)
        except BaseException:
            # Ctrl-C reaches the process as well, which then releases its trial.
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if code == _NONE_LEFT:
            return
        if code == _ONE_MORE:
            continue
        if why is not None:
            # Its trial may just have ended by itself.
            on_death(process.pid, why, False)
            continue
        if code == _ERROR:
            error.seek(0)
            raise pickle.load(error)
        if code < 0:
            what = f"was ended by {signal.Signals(-code).name}"
        else:
            what = f"exited with code {code}"
        # So the kernel ends processes when memory is short.
        is_killed = code == -signal.SIGKILL
        if not on_death(process.pid, f"The process of the trial {what}.", is_killed):
            raise errors.SearchError(
                f"A trial process {what} before its trial began. With isolate=True, the program "
                "runs again for each trial, so see what it printed."
            )
