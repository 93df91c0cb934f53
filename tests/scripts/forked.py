"""Runs scripts in forks of a process that has imported TensorFlow, which takes seconds.

A fork is a process of its own in all but its start. What concerns the start, such as the flags,
a missing package or what TensorFlow writes to stderr, is tested with `scripts_test.run`.
"""

import atexit
import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile

# Forks for each line that it reads, and writes two: the id of the child, and its exit status.
SERVER = """
import gc, json, os, pathlib, runpy, sys
import absl.app, keras, tensorflow, tfbig
# Scripts import TensorFlow after absl has started, which then does not run what it asks for.
absl.app._init_callbacks.clear()
# A child would copy the memory that it collects garbage in.
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(order["cwd"])
os.environ.clear()
os.environ.update(order["environ"])
for number, name in enumerate([os.devnull, order["stdout"], order["stderr"]]):
    os.dup2(os.open(name, os.O_RDWR), number)
sys.argv = order["command"]
sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
# As a script it ends like one: with an exit code or a traceback.
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def server():
    """The process of which scripts are forks; it ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # `readline` must leave the next line to `select`.
        bufsize=0,
    )

    def stop():
        process.stdin.close()
        process.wait(timeout=60)

    atexit.register(stop)
    return process


def run(script, *arguments, cwd=None, timeout=120):
    """Runs a script to its end; takes and returns what `scripts_test.run` does."""
    command = [str(part) for part in (script, *arguments)]
    with tempfile.TemporaryDirectory() as directory:
        files = {name: pathlib.Path(directory, name) for name in ("stdout", "stderr")}
        for file in files.values():
            file.touch()
        order = {"command": command, "cwd": str(cwd or os.getcwd()), "environ": dict(os.environ)}
        order |= {name: str(file) for name, file in files.items()}
        process = server()
        process.stdin.write(json.dumps(order).encode() + b"\n")
        child = int(process.stdout.readline())
        if not select.select([process.stdout], [], [], timeout)[0]:
            os.kill(child, signal.SIGKILL)
            process.stdout.readline()
            raise subprocess.TimeoutExpired(command, timeout)
        code = int(process.stdout.readline())
        output = {name: file.read_text() for name, file in files.items()}
    return subprocess.CompletedProcess(command, code, **output)
