"""The launcher: what it starts and how, what it prints, and that nothing keeps running.

The programs that it starts are plain Python, so each start takes a fraction of a second.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from tests import job
from tfbig.launch import _command_line, _environment, _membership, _private_network

# Far longer than any test takes, far shorter than a leftover worker would run.
LIMIT = 20

PREAMBLE = """
    import json, os, signal, subprocess, sys, time
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
"""
# A process is gone when it no longer holds the presence file open.
PRESENT = """
    presence = open(sys.argv[1], "w")
    def say(word):
        print(word, index, file=presence, flush=True)
"""
RUN_ON = "time.sleep(60)"
CHILD = "subprocess.Popen(['sleep', '60'], pass_fds=[presence.fileno()])"
STUBBORN = """
    signal.signal(signal.SIGTERM, lambda *_: say("asked"))
    signal.signal(signal.SIGINT, lambda *_: say("interrupted"))
    say("up")
    while True: time.sleep(60)
"""


@pytest.fixture
def program(tmp_path):
    """Returns a function that writes the program of a test."""

    def write(*parts):
        path = tmp_path / "program.py"
        path.write_text("\n".join(textwrap.dedent(part) for part in (PREAMBLE, *parts)))
        return path

    return write


# A user without rights, and without files.
NOBODY = 65534


def private_network_fails(*command):
    """Why a Python cannot make a private network; empty if it can."""
    done = subprocess.run(
        [*command, "-I", _private_network.__file__],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.stdout == "ready\n" else done.stdout + done.stderr or "no answer"


def needs_private_network():
    """Skips the test where this user cannot have one."""
    if why := private_network_fails(sys.executable):
        pytest.skip(f"no private network: {why}")


def python_without_root():
    """The command of a Python without root's rights, which can make a private network."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can give up its rights, with setpriv")
    before = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # env starts Python without rights, too: others may not see root's.
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        if not (why := private_network_fails(*before, "env", python)):
            return [*before, "env", python]
    pytest.skip(f"no private network: {why}")


class Presence:
    """A named pipe that processes write to, and hold open while they run."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path = path
        self.end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.said = ""

    def _read(self):
        """Returns whether a process still holds it."""
        try:
            text = os.read(self.end, 65536).decode()
        except BlockingIOError:
            return True
        self.said += text
        return bool(text)

    def wait_for(self, *lines):
        deadline = time.monotonic() + LIMIT
        while not set(lines) <= set(self.said.splitlines()):
            assert time.monotonic() < deadline, f"{lines} not among {self.said!r}"
            self._read()
            time.sleep(0.01)

    def wait_until_all_are_gone(self, within=5):
        deadline = time.monotonic() + within
        while self._read():
            assert time.monotonic() < deadline, f"still running of {self.said!r}"
            time.sleep(0.01)


@pytest.fixture
def presence(tmp_path):
    presence = Presence(tmp_path / "presence")
    yield presence
    os.close(presence.end)


def command(script, *arguments, workers=2, options=(), before=(), python=(sys.executable,)):
    # The warning about open ports has a test of its own.
    launcher = [*before, *python, job.LAUNCH, "--network", "host"]
    return [*launcher, "--workers", workers, *options, script, *arguments]


def launch(*args, timeout=LIMIT, **kwargs):
    return job.finish(job.start(command(*args, **kwargs)), timeout)


@contextlib.contextmanager
def launching(*args, **kwargs):
    """Runs a launcher, which is killed if the test fails."""
    process = job.start(command(*args, **kwargs))
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def by_worker(text):
    """Returns the lines of each worker; every line must come from a worker."""
    lines = collections.defaultdict(list)
    for line in text.splitlines():
        match = re.fullmatch(r"\[worker (\d)\] (.*)", line)
        assert match, line
        lines[int(match[1])].append(match[2])
    return dict(lines)


def of_launcher(text):
    """Returns the lines that no worker wrote."""
    return [line for line in text.splitlines() if not line.startswith("[worker ")]


# --- What workers are given --------------------------------------------------


def test_each_worker_has_the_same_cluster_and_its_own_index(program):
    done = launch(program("print(os.environ['TF_CONFIG'])"), workers=3)
    assert done.returncode == 0, done.stderr
    configs = {i: json.loads(line) for i, (line,) in by_worker(done.stdout).items()}
    assert sorted(configs) == [0, 1, 2]
    cluster = configs[0]["cluster"]
    for i, config in configs.items():
        assert config == {"cluster": cluster, "task": {"type": "worker", "index": i}}
    assert list(cluster) == ["worker"]
    hosts, ports = zip(*(a.split(":") for a in cluster["worker"]), strict=True)
    assert set(hosts) == {"127.0.0.1"}
    assert len(set(ports)) == 3
    assert all(1024 <= int(p) < 65536 for p in ports)


def test_it_runs_as_a_module(program):
    script = program("print(index)")
    line = [sys.executable, "-W", "error", "-m", "tfbig.launch", "--workers", 1, script]
    # Python imports tfbig, and thus TensorFlow, before the launcher.
    done = job.finish(job.start(line), timeout=60)
    assert (done.returncode, done.stdout) == (0, "[worker 0] 0\n"), done.stderr


def test_arguments_after_the_script_are_the_script_s(program):
    arguments = ["--workers", "7", "-h", "--help", "--max", "--max_restarts=x", "--", "-1", "--=x"]
    arguments += ["", "a b", "*", "--grace_period"]
    done = launch(program("print(json.dumps(sys.argv[1:]))"), *arguments)
    assert done.returncode == 0, done.stderr
    assert {i: json.loads(line) for i, (line,) in by_worker(done.stdout).items()} == {
        0: arguments,
        1: arguments,
    }


@pytest.mark.parametrize(
    ("visible", "options", "expected"),
    [
        (None, (), [None, None]),
        ("3,5", (), ["3,5", "3,5"]),
        (None, ("--per_worker_devices", 2), ["0,1", "2,3"]),
        ("7,5,GPU-1a2b", ("--per_worker_devices", 1), ["7", "5"]),
        ("4, 5,6,7", ("--per_worker_devices", 2), ["4,5", "6,7"]),
        # All devices are hidden, for each worker too.
        ("-1", ("--per_worker_devices", 1), ["-1", "-1"]),
        ("", ("--per_worker_devices", 1), ["-1", "-1"]),
    ],
)
def test_devices_are_divided_on_request(program, visible, options, expected):
    script = program("print(json.dumps(os.environ.get('CUDA_VISIBLE_DEVICES')))")
    before = ["env", "-u", "CUDA_VISIBLE_DEVICES"]
    before += [] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"]
    done = launch(script, options=options, before=before)
    assert done.returncode == 0, done.stderr
    got = by_worker(done.stdout)
    assert [json.loads(got[i][0]) for i in (0, 1)] == expected


ONE = ["--workers", "1"]
WRONG = {
    "no worker": (["--workers", "0"], "--workers: must be an integer >= 1. Received: 0"),
    "negative": (["--workers", "-1"], "--workers: must be an integer >= 1. Received: -1"),
    "no number": (["--workers", "x"], "--workers: must be an integer >= 1. Received: x"),
    "fraction": (["--workers", "1.5"], "--workers: must be an integer >= 1. Received: 1.5"),
    "missing": ([], "the following arguments are required: --workers"),
    "short form": (["--work", "2"], "the following arguments are required: --workers"),
    "grace": ([*ONE, "--grace_period", "-1"], "must be a number of seconds >= 0. Received: -1"),
    "endless": ([*ONE, "--grace_period", "inf"], "a number of seconds >= 0. Received: inf"),
    "nan": ([*ONE, "--grace_period", "nan"], "a number of seconds >= 0. Received: nan"),
    "restarts": ([*ONE, "--max_restarts", "-1"], "must be an integer >= 0. Received: -1"),
    "network": ([*ONE, "--network", "none"], "invalid choice: 'none'"),
    "few": ([*ONE, "--min_workers", "0"], "--min_workers: must be an integer >= 1. Received: 0"),
    "many": ([*ONE, "--min_workers", "2"], "must be at most --workers=1. Received: 2"),
    "never": ([*ONE, "--min_workers", "1"], "it requires --max_restarts, and no --independent"),
    "alone": (
        [*ONE, "--min_workers", "1", "--max_restarts", "1", "--independent"],
        "it requires --max_restarts, and no --independent",
    ),
    "devices": ([*ONE, "--per_worker_devices", "0"], "must be an integer >= 1. Received: 0"),
}


def refused(done, message):
    """Asserts exit code 2 and one line with the reason, after the usage."""
    assert done.returncode == 2
    assert done.stdout == ""
    usage, *_, last = done.stderr.splitlines()
    assert usage.startswith("usage: python -m tfbig.launch")
    assert last.startswith("python -m tfbig.launch: error: ")
    assert message in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("case", WRONG)
def test_invalid_arguments_are_errors(program, case):
    arguments, message = WRONG[case]
    line = [sys.executable, job.LAUNCH, *arguments, program("print('started')")]
    refused(job.finish(job.start(line), LIMIT), message)


def test_the_script_must_be_a_file(tmp_path):
    for path in (tmp_path / "missing.py", tmp_path):
        refused(launch(path), f"script must be a Python file. Received: {path}")


def test_too_few_devices_are_an_error(program):
    before = ["env", "CUDA_VISIBLE_DEVICES=0,1,2"]
    options = ["--per_worker_devices", 2]
    done = launch(program("print('started')"), options=options, before=before)
    refused(done, "requires 4 devices. Received: CUDA_VISIBLE_DEVICES=0,1,2")


# --- What is printed ---------------------------------------------------------


def test_output_is_labeled_and_errors_stay_separate(program):
    done = launch(
        program("""
            print("out", index)
            print("err", index, file=sys.stderr)
            print("input", repr(sys.stdin.read()))
            sys.stdout.write("no end")
        """)
    )
    assert done.returncode == 0
    assert by_worker(done.stdout) == {i: [f"out {i}", "input ''", "no end"] for i in (0, 1)}
    assert by_worker(done.stderr) == {i: [f"err {i}"] for i in (0, 1)}
    assert done.stdout.endswith("no end\n")


def test_lines_are_not_interleaved(program):
    script = program("""
        for i in range(500):
            for stream in (1, 2):
                line = f"{stream} {i} {'x' * (i % 300)} end\\n".encode()
                # In two parts, like a program with its own buffer.
                os.write(stream, line[: i % 7])
                os.write(stream, line[i % 7 :])
    """)
    # Both streams to one place, as in a terminal.
    done = launch(script, workers=4, before=["sh", "-c", 'exec "$@" 2>&1', "sh"])
    assert done.returncode == 0
    got = by_worker(done.stdout)
    assert sorted(got) == [0, 1, 2, 3]
    for lines in got.values():
        for stream in "12":
            assert [line for line in lines if line[0] == stream] == [
                f"{stream} {i} {'x' * (i % 300)} end" for i in range(500)
            ]


def test_a_slow_reader_gets_everything(program, presence):
    # More than the pipe to the reader holds, but less than it and the worker's pipe together.
    script = program(PRESENT, "say('up'); print(('x' * 99 + '\\n') * 1000, end='')")
    with launching(script, presence.path, workers=1) as process:
        presence.wait_for("up 0")
        presence.wait_until_all_are_gone()
        time.sleep(1.5)  # The launcher waits 1 s for unread output.
        assert process.poll() is None
        out, err = process.communicate(timeout=LIMIT)
    assert by_worker(out) == {0: ["x" * 99] * 1000}
    assert (process.returncode, err) == (0, "")


def test_a_reader_who_leaves_ends_the_job(program):
    script = program("while True: print(index); time.sleep(0.01)")
    with launching(script) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        # Python's exit code after a BrokenPipeError, as without a launcher.
        assert process.wait(timeout=LIMIT) == 1
    assert "BrokenPipeError" in err
    (line,) = of_launcher(err)
    assert re.fullmatch(r"tfbig.launch: worker \d failed with exit code 1; .* ended", line)


# --- A worker that fails -----------------------------------------------------


KILL = "os.kill(os.getpid(), signal.{})"
FAILURES = {
    "sys.exit(3)": (3, "worker 1 failed with exit code 3"),
    "sys.exit(-1)": (255, "worker 1 failed with exit code 255"),
    "raise ValueError": (1, "worker 1 failed with exit code 1"),
    KILL.format("SIGKILL"): (137, "worker 1 was killed by SIGKILL"),
    KILL.format("SIGSEGV"): (139, "worker 1 was killed by SIGSEGV"),
    KILL.format("SIGTERM"): (143, "worker 1 was killed by SIGTERM"),
}
if sys.platform == "linux":
    # This signal has no name.
    FAILURES[KILL.format("SIGRTMIN + 1")] = (163, "worker 1 was killed by signal 35")


@pytest.mark.parametrize("end", FAILURES)
def test_the_first_failure_ends_the_job_with_its_exit_code(program, presence, end):
    code, what = FAILURES[end]
    done = launch(
        program(
            PRESENT,
            f"if index == 1: {end}",
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit('asked to end'))",
            RUN_ON,
        ),
        presence.path,
        workers=3,
    )
    assert done.returncode == code
    presence.wait_until_all_are_gone(within=1)
    assert of_launcher(done.stderr) == [f"tfbig.launch: {what}; all workers have ended"]


def test_the_others_have_time_to_exit(program, presence):
    script = program(
        PRESENT,
        """
            def end(*_):
                time.sleep(0.3)
                print("saved")
                sys.exit(0)
            if index == 1:
                while not os.path.exists(sys.argv[2]): time.sleep(0.01)
                sys.exit(4)
            signal.signal(signal.SIGTERM, end)
            open(sys.argv[2], "w").close()
        """,
        RUN_ON,
    )
    done = launch(script, presence.path, script.with_name("ready"))
    assert done.returncode == 4
    assert by_worker(done.stdout) == {0: ["saved"]}


def test_workers_that_do_not_exit_are_killed(program, presence):
    script = program(
        PRESENT,
        """
            if index == 1:
                while not os.path.exists(sys.argv[2]): time.sleep(0.01)
                sys.exit(4)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open(sys.argv[2], "w").close()
        """,
        RUN_ON,
    )
    start = time.monotonic()
    options = ["--grace_period", 0.5]
    done = launch(script, presence.path, script.with_name("ready"), options=options)
    assert done.returncode == 4
    assert 0.5 < time.monotonic() - start < 10
    presence.wait_until_all_are_gone(within=1)


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), (KILL.format("SIGKILL"), 137)]
)
def test_children_of_workers_are_killed_too(program, presence, end, code):
    done = launch(program(PRESENT, CHILD, "say('up')", end), presence.path)
    assert done.returncode == code
    presence.wait_until_all_are_gone()
    assert "up" in presence.said


def test_a_process_that_left_its_worker_does_not_block_the_launcher(program, presence):
    script = program(
        PRESENT,
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)",
        "say(child.pid)",
        "print('last')",
    )
    done = launch(script, presence.path, workers=1)
    assert (done.returncode, done.stdout) == (0, "[worker 0] last\n")
    presence.wait_until_all_are_gone()
    # It runs until here, because it no longer belongs to the job.
    os.kill(int(presence.said.split()[0]), signal.SIGKILL)


# --- Signals to the launcher -------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
@pytest.mark.parametrize("network", ["host", "private"])
def test_workers_die_with_a_killed_launcher(program, presence, network):
    if network == "private":
        needs_private_network()
    options = ["--network", network]
    with launching(program(PRESENT, STUBBORN), presence.path, options=options) as process:
        presence.wait_for("up 0", "up 1")
        process.kill()
        presence.wait_until_all_are_gone()
        assert process.wait(timeout=LIMIT) == -signal.SIGKILL


ENDINGS = {
    signal.SIGINT: (130, "interrupted", "interrupted"),
    signal.SIGTERM: (143, "terminated", "asked"),
    signal.SIGHUP: (129, "terminated", "asked"),
}


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_ends_the_job(program, presence, number):
    code, what, said = ENDINGS[number]
    options = ["--grace_period", 0.3, "--max_restarts", 3]
    script = program(PRESENT, CHILD, STUBBORN)
    with launching(script, presence.path, options=options) as process:
        presence.wait_for("up 0", "up 1")
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
        presence.wait_until_all_are_gone()
    assert process.returncode == code
    # The workers were asked to end first, and were not restarted.
    presence.wait_for(f"{said} 0", f"{said} 1")
    assert presence.said.count("up 0") == 1
    assert (out, err) == ("", f"tfbig.launch: {what}; all workers have ended\n")


@pytest.mark.parametrize("form", [["-m", "tfbig.launch"], ["-mtfbig.launch"]], ids=str)
def test_ctrl_c_while_the_launcher_starts_leaves_no_traceback(program, tmp_path, form):
    # Its own package takes seconds to import: here until the signal has come.
    (tmp_path / "keras.py").write_text(
        "import time; print('importing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, *form, "--workers", "1", program(RUN_ON)]
    path = os.pathsep.join([str(tmp_path), str(job.ROOT)])
    process = job.start(command, PYTHONPATH=path)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    done = job.finish(process, LIMIT)
    assert done.returncode == 130
    assert done.stderr == "tfbig.launch: interrupted before any worker was started\n"


@pytest.mark.parametrize("number", ENDINGS)
def test_a_second_signal_does_not_wait(program, presence, number):
    code, what, said = ENDINGS[number]
    script = program(PRESENT, CHILD, STUBBORN)
    with launching(script, presence.path, options=["--grace_period", 1000]) as process:
        presence.wait_for("up 0", "up 1")
        process.send_signal(number)
        presence.wait_for(f"{said} 0", f"{said} 1")
        assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
        presence.wait_until_all_are_gone()
    assert process.returncode == code
    assert (out, err) == ("", f"tfbig.launch: {what}; all workers have ended\n")


def test_a_signal_after_a_failure_prevents_the_restart(program, presence):
    options = ["--grace_period", 1000, "--max_restarts", 3]
    script = program(
        PRESENT,
        """
            if index == 1:
                while not os.path.exists(sys.argv[2]): time.sleep(0.01)
                sys.exit(4)
            signal.signal(signal.SIGTERM, lambda *_: say("asked"))
            say("up")
            open(sys.argv[2], "w").close()
            while True: time.sleep(60)
        """,
    )
    with launching(script, presence.path, script.with_name("r"), options=options) as process:
        presence.wait_for("asked 0")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT)
        presence.wait_until_all_are_gone()
    assert process.returncode == 130
    assert presence.said.count("up 0") == 1
    assert err == "tfbig.launch: interrupted; all workers have ended\n"


def test_nohup_is_honored(program, presence):
    before = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    script = program(PRESENT, STUBBORN)
    options = ["--grace_period", 0.1]
    with launching(script, presence.path, options=options, before=before) as process:
        presence.wait_for("up 0", "up 1")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=LIMIT) == 143
    presence.wait_until_all_are_gone()


# --- Who reaches a worker ----------------------------------------------------


# A worker listens as TensorFlow does, and the next one connects to it.
SERVER = """
    import socket
    addresses = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
    ports = [int(a.rpartition(":")[2]) for a in addresses]
    server = socket.create_server(("0.0.0.0", ports[index]))
    while True:
        try:
            socket.create_connection(("127.0.0.1", ports[1 - index])).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    say(f"port {ports[index]}")
    say("reached")
    time.sleep(60)
"""


def reaches(port):
    """Whether something listens at a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize("network", ["host", "private"])
def test_who_reaches_a_worker(program, presence, network):
    if network == "private":
        needs_private_network()
    options = ["--network", network]
    with launching(program(PRESENT, SERVER), presence.path, options=options) as process:
        presence.wait_for("reached 0", "reached 1")
        ports = re.findall(r"port (\d+)", presence.said)
        assert [reaches(int(port)) for port in ports] == [network == "host"] * 2
        process.terminate()
        process.communicate(timeout=LIMIT)
    presence.wait_until_all_are_gone()


def test_a_private_network_does_not_need_root(program):
    python = python_without_root()
    script = program(
        """
        import socket
        socket.create_server(("127.0.0.1", 0)).close()
        print(socket.if_nameindex(), os.getuid(), os.getgid())
        """
    )
    # Others may not read pytest's directories.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        readable = pathlib.Path(shutil.copy(script, directory))
        done = launch(readable, options=["--network", "private"], python=python)
    assert done.returncode == 0, done.stderr
    assert by_worker(done.stdout) == {i: [f"[(1, 'lo')] {NOBODY} {NOBODY}"] for i in (0, 1)}


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        (["--workers", 2], True),
        (["--workers", 2, "--network", "host"], False),
        (["--workers", 2, "--independent"], False),
        (["--workers", 1], False),
    ],
    ids=str,
)
def test_open_ports_are_said(tmp_path, options, warns):
    script = tmp_path / "program.py"
    script.write_text("")
    done = job.finish(job.start([sys.executable, job.LAUNCH, *options, script]), LIMIT)
    assert done.returncode == 0
    assert done.stderr == f"tfbig.launch: {_command_line.OPEN}\n" * warns


def test_a_private_network_that_cannot_be_made_is_an_error(program, tmp_path, monkeypatch, capsys):
    refusing = tmp_path / "refusing"
    refusing.write_text("#!/bin/sh\necho unshare: Operation not permitted\n")
    refusing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(refusing))
    with pytest.raises(SystemExit) as info:
        _command_line.main(["--workers", "2", "--network", "private", str(program("pass"))])
    assert info.value.code == 2
    message = capsys.readouterr().err
    assert "--network=private requires Linux, and the right to make" in message
    assert "Received: unshare: Operation not permitted. Use --network=host" in message


# --- Restarts ----------------------------------------------------------------


FAILS_AT_FIRST = """
    with open(sys.argv[1] + str(index), "a") as file:
        print(os.environ["TF_CONFIG"], file=file)
    starts = len(open(sys.argv[1] + str(index)).readlines())
    if index == 0 and starts <= int(sys.argv[2]):
        # Wait until the other worker has started, too.
        while True:
            try:
                if len(open(sys.argv[1] + "1").readlines()) == starts: break
            except FileNotFoundError: pass
            time.sleep(0.01)
        sys.exit(7)
    if index == 1 and starts <= int(sys.argv[2]): time.sleep(60)
"""


@pytest.mark.parametrize(
    ("failures", "restarts", "code", "left"),
    [(1, 3, 0, [3]), (2, 2, 0, [2, 1]), (9, 1, 7, [1, 0]), (1, 0, 7, [None])],
)
def test_the_job_is_restarted(program, tmp_path, failures, restarts, code, left):
    script = program(FAILS_AT_FIRST)
    done = launch(script, tmp_path / "start", failures, options=["--max_restarts", restarts])
    assert done.returncode == code
    assert of_launcher(done.stderr) == [
        "tfbig.launch: worker 0 failed with exit code 7; all workers have ended"
        + ("" if n is None else f"; restarts left: {n}")
        for n in left
    ]
    starts = [
        [json.loads(line)["cluster"]["worker"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "start0", tmp_path / "start1")
    ]
    assert starts[0] == starts[1]
    assert len(starts[0]) == min(failures, restarts) + 1
    # New ports, because the old ones may still be in use.
    assert len({tuple(addresses) for addresses in starts[0]}) == len(starts[0])


# Which worker fails first, start by start -> the workers of the next starts.
FAILURES_AND_STARTS = {
    "each once": (4, 1, [0, 1, 2, 3], [4, 4, 4, 4]),
    "one for good": (4, 2, [1, 1], [4, "0 2 3"]),
    "one is taken back": (4, 2, [1, 1, 0], [4, "0 2 3", 4]),
    "and left out at once": (4, 2, [1, 1, 0, 1], [4, "0 2 3", 4, "0 2 3"]),
    "and trusted again": (4, 2, [1, 1, 0, 2, 1], [4, "0 2 3", 4, 4, 4]),
    # After its failure, 3 is not forgotten because of 1, of whose failures there was no doubt.
    "two for good": (4, 2, [1, 1, 3, 1, 3], [4, "0 2 3", 4, "0 2 3", "0 2"]),
    "two of which one may go": (4, 3, [1, 1, 3, 1, 3], [4, "0 2 3", 4, "0 2 3", "0 1 2"]),
    "none may go": (4, 4, [1, 1, 1], [4, 4, 4]),
    "down to one": (2, 1, [0, 0, 1, 1], [2, "1", 2, "0"]),
}


@pytest.mark.parametrize("case", FAILURES_AND_STARTS)
def test_a_worker_that_fails_again_is_left_out(case):
    workers, least, failures, starts = FAILURES_AND_STARTS[case]
    membership, got = _membership.Membership(workers, least), []
    assert list(membership.present) == list(range(workers))
    for failure in failures:
        membership.record_failure(failure)
        got.append(list(membership.present))
    assert got == [
        list(range(s)) if isinstance(s, int) else [int(i) for i in s.split()] for s in starts
    ]


def test_the_job_continues_without_a_lost_worker(program, tmp_path):
    # Device 5 is broken. When that is known, worker 2 fails once.
    script = program(
        """
        config = json.loads(os.environ["TF_CONFIG"])
        device, count = os.environ["CUDA_VISIBLE_DEVICES"], len(config["cluster"]["worker"])
        print(f"{index} of {count}, device {device}")
        if device == "5":
            sys.exit(3)
        if count == 4:
            time.sleep(60)
        if device == "6" and not os.path.exists(sys.argv[1]):
            open(sys.argv[1], "w").close()
            sys.exit(4)
        """
    )
    before = ["env", "CUDA_VISIBLE_DEVICES=4,5,6,7"]
    options = ["--per_worker_devices", 1, "--min_workers", 2, "--max_restarts", 4]
    done = launch(script, tmp_path / "once", workers=4, options=options, before=before)
    assert done.returncode == 0, done.stderr
    failed = "tfbig.launch: worker {} failed with exit code {}; all workers have ended; "
    without = (
        "tfbig.launch: until the next restart, the job continues without worker(s) 1; "
        "worker(s) 0, 2, 3 are its task(s) 0 to 2"
    )
    assert of_launcher(done.stderr) == [
        failed.format(1, 3) + "restarts left: 4",
        failed.format(1, 3) + "restarts left: 3",
        without,
        failed.format(2, 4) + "restarts left: 2",
        failed.format(1, 3) + "restarts left: 1",
        without,
    ]
    # Each worker has its label and its device in every start.
    out = by_worker(done.stdout)
    assert out[0][-1] == "0 of 3, device 4"
    assert out[1] == ["1 of 4, device 5"] * 3
    assert out[2][-1] == "1 of 3, device 6"
    assert out[3][-1] == "2 of 3, device 7"


def test_a_preempted_worker_is_not_lost(program):
    options = ["--min_workers", 1, "--max_restarts", 2]
    done = launch(program("time.sleep(60) if index else sys.exit(138)"), options=options)
    assert done.returncode == 138
    assert of_launcher(done.stderr) == [
        f"tfbig.launch: worker 0 failed with exit code 138; all workers have ended; {left}"
        for left in ("restarts left: 2", "restarts left: 1", "restarts left: 0")
    ]


@pytest.mark.parametrize(
    ("visible", "own"), [("3,5", ["3", "5", "3"]), ("-1", ["-1", "-1", "-1"])], ids=str
)
def test_independent_workers_get_gpus_in_turn(visible, own, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    # A task of SLURM, or a pod, may have started the launcher.
    variables = "TF_CONFIG", "SLURM_STEP_NUM_TASKS", "TFBIG_JOB", "TFBIG_SERVICE", "TFBIG_WORKERS"
    for name in variables:
        monkeypatch.setenv(name, "2")
    environments = [_environment.of_independent(i, None) for i in range(3)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == own
    assert [e["TFBIG_WORKER"] for e in environments] == ["0", "1", "2"]
    assert not any(name in e for e in environments for name in variables)


@pytest.mark.parametrize(("cores", "heaps"), [(64, "16"), (2, "1"), (None, "1")])
def test_workers_on_one_machine_share_its_heaps(cores, heaps, monkeypatch):
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    addresses = [f"127.0.0.1:{port}" for port in range(4)]
    assert _environment.of_job(0, addresses, None)["MALLOC_ARENA_MAX"] == heaps
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=3")
    assert "MALLOC_ARENA_MAX" not in _environment.of_job(0, addresses, None)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "5")
    assert _environment.of_job(0, addresses, None)["MALLOC_ARENA_MAX"] == "5"
