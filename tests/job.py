"""Starting multi-worker jobs of this repository's test programs, with a time limit."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
JOBS = ROOT / "tests" / "jobs"
LAUNCH = JOBS / "launch.py"


def environment(**variables):
    """That of a program of the tests: the CPU, this repository, little noise."""
    variables = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"} | variables
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def start(command, **variables):
    """A process in a group of its own, whose output can be read."""
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout):
    """Waits for a process; kills it, and all that it started, when the time is over."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The launcher ends its workers at SIGTERM.
        process.terminate()
        try:
            out, err = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        raise AssertionError(f"{process.args} took more than {timeout} s:\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launcher(program, *arguments, workers=2, options=()):
    """The command that starts a program of `tests/jobs` on several workers."""
    program = JOBS / f"{program}.py"
    return [sys.executable, LAUNCH, "--workers", workers, *options, program, *arguments]


def run(program, *arguments, workers=2, options=(), timeout=120):
    """Runs a program of `tests/jobs` on several workers to its end."""
    command = launcher(program, *arguments, workers=workers, options=options)
    return finish(start(command), timeout)


def results(directory):
    """What the workers left with `leave`, in the order of the workers."""
    return [json.loads(p.read_text()) for p in sorted(pathlib.Path(directory).glob("*.json"))]


def leave(directory, result):
    """Leaves a result of this worker for the test that started it."""
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    pathlib.Path(directory, f"{index}.json").write_text(json.dumps(result))


def children(pid):
    """Ids of the processes that a process has started."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def send(pid, number):
    """Sends a signal to a process, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def alive(text):
    """Ids of running processes whose command line holds a text."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found
