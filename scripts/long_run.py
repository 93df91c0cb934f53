"""Trains a language model while everything happens to it, and once more while nothing does.

    python scripts/long_run.py --markdown=table.md

The first run is one training in several sessions: each is killed in another way, the next resumes
its backup on another number of workers, a spike is injected, and the batch grows. The second run is
the same training without kills and spike. Both end in directories that scripts/train.py writes, and
a table compares bits per byte of held-out files after each epoch.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import command_line
from absl import flags
from benchmarks import markdown, provenance

PROGRAM = "long_run.py"
ROOT = pathlib.Path(__file__).parents[1]

_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "runs/long", "Where both runs go, into `disturbed` and `undisturbed`."
)
_SESSIONS = flags.DEFINE_list(
    "sessions",
    ["1:500:SIGKILL", "2:700:worker", "1:300:SIGTERM", "2:400:SIGKILL", "1"],
    "Sessions of the disturbed run, as WORKERS:SECONDS:END. END is SIGKILL or SIGTERM, which the "
    "whole job gets, or worker: one worker is killed. SECONDS count from the session's first "
    "update. The last session is WORKERS alone, and runs to the end.",
)
_TRAIN = flags.DEFINE_string(
    "train",
    "--task=language --parameters=25M --corpus_bytes=1500000 --batch_size=32 "
    "--micro_batch_size=8 --batch_growth=150:64 --spike_guard --backup_on_background "
    "--keep_backups=2 --backup_freq=20 --verbose=2",
    "Flags of scripts/train.py for both runs.",
)
_SPIKE = flags.DEFINE_integer(
    "inject_spike", 135, "The update before which the signs of all weights flip.", lower_bound=1
)
_MEASURE = flags.DEFINE_string(
    "measure", "val_bits_per_byte", "The column of history.csv to compare."
)
_MARKDOWN = flags.DEFINE_string("markdown", None, "File for the tables, a .md.")

_ENDS = ("SIGKILL", "SIGTERM", "worker")


@dataclasses.dataclass
class _Session:
    """One session of a run.

    Attributes:
        workers: Processes.
        seconds: After its first update, when it ends; None: when training does.
        end: One of `_ENDS`.
    """

    workers: int
    seconds: float | None = None
    end: str = ""


def _sessions(texts: list[str]) -> list[_Session]:
    sessions = []
    for text in texts:
        found = re.fullmatch(rf"([1-9]\d*)(?::(\d+(?:\.\d+)?):({'|'.join(_ENDS)}))?", text)
        if found is None:
            raise ValueError(text)
        sessions.append(_Session(int(found[1]), found[2] and float(found[2]), found[3] or ""))
    if [session.seconds is None for session in sessions] != [False] * (len(texts) - 1) + [True]:
        raise ValueError(texts)
    return sessions


@flags.validator("sessions", "it must be WORKERS:SECONDS:END,...,WORKERS (see --help)")
def _are_sessions(texts: list[str]) -> bool:
    try:
        return bool(_sessions(texts))
    except ValueError:
        return False


def _command(session: _Session, arguments: list[str]) -> list[str]:
    program = [str(ROOT / "scripts" / "train.py"), *arguments]
    if session.workers == 1:
        return [sys.executable, *program]
    launcher = [sys.executable, "-m", "tfbig.launch", f"--workers={session.workers}"]
    return [*launcher, *program]


def _processes(parent: int) -> list[int]:
    """The children of a process, oldest first."""
    done = subprocess.run(
        ["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False, timeout=10
    )
    return [int(line) for line in done.stdout.split()]


def _kill(process: subprocess.Popen[bytes], session: _Session) -> None:
    workers = _processes(process.pid) if session.workers > 1 else []
    if session.end == "SIGTERM":
        process.terminate()
    elif session.end == "worker" and workers:
        os.kill(workers[-1], signal.SIGKILL)  # The launcher ends the others.
    else:
        for pid in [*workers, process.pid]:
            os.kill(pid, signal.SIGKILL)


def _train(session: _Session, arguments: list[str], directory: pathlib.Path) -> tuple[str, ...]:
    """Runs a session; returns a line of the table."""
    begin = time.monotonic()
    before = _last_update(directory)
    process = subprocess.Popen(_command(session, arguments), cwd=ROOT)
    try:
        if session.seconds is not None:
            while process.poll() is None and _last_update(directory) <= before:
                time.sleep(0.1)
        process.wait(session.seconds)
        how = "ended"
    except subprocess.TimeoutExpired:
        _kill(process, session)
        process.wait()
        how = {"worker": "a worker is killed"}.get(session.end, session.end)
    except KeyboardInterrupt:
        process.wait()  # It got the signal as well.
        raise
    seconds = time.monotonic() - begin
    if how == "ended" and process.returncode not in (0, 3):
        raise command_line.UsageError(f"training failed with exit code {process.returncode}")
    after = _last_update(directory)
    return (str(session.workers), f"{seconds:.0f}", f"{before}-{after}", how)


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _last_update(directory: pathlib.Path) -> int:
    """The last update that the monitor has seen; 0 without one."""
    rows = _rows(directory / "monitor" / "training.csv")
    return int(rows[-1]["update"]) if rows else 0


def _run_all(
    sessions: list[_Session], directory: pathlib.Path, more: list[str]
) -> list[tuple[str, ...]]:
    arguments = [*shlex.split(_TRAIN.value), f"--output_dir={directory}", *more]
    lines = []
    for index, session in enumerate(sessions):
        # A session that is killed early leaves nothing.
        resume = ["--resume"] if index and (directory / "run.json").exists() else []
        lines.append((directory.name, *_train(session, [*arguments, *resume], directory)))
        print(f"{PROGRAM}: {' | '.join(lines[-1])}", flush=True)
        _check_measure(directory / "history.csv")
        if lines[-1][-1] == "ended":
            break
    return lines


def _check_measure(path: pathlib.Path) -> None:
    """Checks, after the first epoch and not after all, that the history has what is compared."""
    rows = _rows(path)
    if rows and _MEASURE.value not in rows[0]:
        raise command_line.UsageError(
            f"--measure must be a column of {path}: {', '.join(rows[0])}. Received: "
            f"{_MEASURE.value}."
        )


def _epochs(directories: list[pathlib.Path]) -> list[tuple[str, ...]]:
    """The measure of all runs, by epoch."""
    histories = [_rows(directory / "history.csv") for directory in directories]
    lines = []
    for rows in zip(*histories, strict=True):
        values = [f"{float(row[_MEASURE.value]):.4f}" for row in rows]
        guards = [f"{float(row.get('spikes', 0)):.0f}" for row in rows]
        backs = [f"{float(row.get('rollbacks', 0)):.0f}" for row in rows]
        sizes = [f"{float(row.get('batch_size', 'nan')):.0f}" for row in rows]
        lines.append((rows[0]["epoch"], sizes[0], *values, guards[0], backs[0]))
    return lines


def _run() -> int:
    if _MARKDOWN.value is not None:
        command_line.check_file(_MARKDOWN.value, "markdown")
    directory = pathlib.Path(_OUTPUT_DIR.value).resolve()
    origin = provenance.collect(__file__, ("tensorflow", "keras", "tfbig"), [])
    disturbed, undisturbed = directory / "disturbed", directory / "undisturbed"
    spike = [f"--inject_spike={_SPIKE.value}"]
    lines = _run_all(_sessions(_SESSIONS.value), disturbed, spike)
    lines += _run_all([_Session(1)], undisturbed, [])
    epochs = _epochs([disturbed, undisturbed])
    heads = ("epoch", "batch", "disturbed", "undisturbed", "spikes", "rollbacks")
    tables = [
        markdown.Table("Sessions", ("run", "workers", "seconds", "updates", "end"), lines),
        markdown.Table(_MEASURE.value, heads, epochs),
    ]
    for table in tables:
        print("\n" + "\n".join("  ".join(line) for line in (table.heads, *table.lines)))
    if _MARKDOWN.value:
        markdown.write(_MARKDOWN.value, origin, tables, [])
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "nothing is lost: its directories stay")
