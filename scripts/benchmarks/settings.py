"""The flags of benchmark.py, and what they ask to measure."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import command_line
from absl import flags

from benchmarks import in_turn, network, peers, rows, table_searches, tables
from benchmarks.models import MODELS
from benchmarks.process import Task

_ROWS_OF_TFBIG_AND_KERAS = tuple(name for name in rows.ROWS if name not in peers.PEERS)
_DEFAULT_ROWS = tuple(name for name in _ROWS_OF_TFBIG_AND_KERAS if name not in rows.ON_REQUEST)

MODELS_FLAG = flags.DEFINE_list(
    "models", list(MODELS)[:-1], f"What to measure, of {', '.join(MODELS)}."
)
ROWS = flags.DEFINE_list(
    "rows",
    list(_DEFAULT_ROWS),
    f"How to train it, of {', '.join(_ROWS_OF_TFBIG_AND_KERAS)}. pipeline divides the threads of "
    "an operation between two stages; with --in_turn, all rows have the same ones.",
)
PEERS = flags.DEFINE_list(
    "peers",
    [],
    f"Also measure alternatives to tfbig, of {', '.join(peers.PEERS)}: installs what is missing "
    "into .venv-PEER. Point pip's settings at the CPU build of PyTorch; the other one is large.",
)
PEERS_DIRECTORY = flags.DEFINE_string(
    "peers_directory", str(peers.ROOT), "Where the .venv-PEER are."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Effective batch, samples.", lower_bound=1)
MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size", 32, "Samples of a micro-batch; divides --batch_size.", lower_bound=1
)
_STEPS_LIST = flags.DEFINE_list(
    "gradient_accumulation_steps",
    None,
    "Micro-batches per update: one number, or several as 2,8,32. Each has --micro_batch_size "
    "samples if that is given; otherwise --batch_size is split.",
)
RUNS = flags.DEFINE_integer("runs", 3, "Processes for each row.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 5, "Effective batches timed in a run.", lower_bound=1)
_THREADS = flags.DEFINE_integer(
    "threads", None, "Threads of an operation; by default all cores.", lower_bound=1
)
HARDWARE = flags.DEFINE_enum(
    "hardware",
    "cpu",
    ["cpu", "gpu"],
    "Where to train. gpu is the first GPU of TensorFlow; memory is then that of the GPU. There are "
    "no --peers and no row pipeline for it.",
)
TIMEOUT = flags.DEFINE_float(
    "timeout", 900.0, "Seconds after which a process is killed.", lower_bound=0.0
)
JSON = flags.DEFINE_string("json", None, "File to write all measurements to.")
MARKDOWN = flags.DEFINE_string(
    "markdown",
    None,
    "File to write the table to as Markdown, below the command, date, commit, machine and "
    "versions.",
)
PNG = flags.DEFINE_string("png", None, "File to draw the table to, a .png.")
IN_TURN = flags.DEFINE_boolean(
    "in_turn",
    False,
    "Measure the --rows of one of --models in one process, --steps updates of each in turn; ratios "
    "are to the first row.",
)
NETWORK = flags.DEFINE_boolean(
    "network",
    False,
    "Measure an MLP over workers that a narrow network joins instead (as root, on Linux). "
    "--gradient_accumulation_steps is then 1,4,16 by default, --micro_batch_size is per worker, "
    "and all --runs use the same processes.",
)
NETWORK_HOSTS = flags.DEFINE_integer(
    "network_hosts",
    2,
    "Workers of --network.",
    lower_bound=2,
    upper_bound=network.MOST_HOSTS,
)
NETWORK_MEGABITS = flags.DEFINE_integer(
    "network_megabits", 100, "Mbit/s of each worker of --network.", lower_bound=1
)
SCALING = flags.DEFINE_boolean(
    "scaling",
    False,
    "Measure nothing: print what updates of a model of --model_parameters would take on up to "
    "4,096 replicas. --gradient_accumulation_steps is then 1,4,16,64 by default.",
)
PARAMETERS = flags.DEFINE_integer(
    "model_parameters", 1_000_000_000, "Parameters of the model, for --scaling.", lower_bound=1
)
MICRO_BATCH_SECONDS = flags.DEFINE_float(
    "micro_batch_seconds",
    0.8,
    "Seconds of a micro-batch, forward and backward, for --scaling.",
    lower_bound=1e-9,
)
TUNERS = flags.DEFINE_boolean(
    "tuners", False, "Measure searches for the minimum of two functions instead."
)
TABLES = flags.DEFINE_boolean(
    "tables",
    False,
    "With --tuners: search in tables of measured models instead, and in learning curves. Downloads "
    "the tables, 37 MB, if they are not there.",
)
SEARCHES = flags.DEFINE_multi_string(
    "search",
    [],
    "With --tables: only this search, of the names in the first column; may be given several "
    "times. Leaves out learning curves.",
)
TABLES_DIRECTORY = flags.DEFINE_string(
    "tables_directory", str(tables.DIRECTORY), "Where the tables are."
)
TRIALS = flags.DEFINE_integer("trials", 50, "Trials of a search, for --tuners.", lower_bound=1)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Searches of each kind, for --tuners; by default 10, with --tables 20.",
    lower_bound=1,
)
ROW = flags.DEFINE_string("row", None, "Internal: the file that this worker writes to.")


for _flag, _known in (
    ("models", tuple(MODELS)),
    ("rows", _ROWS_OF_TFBIG_AND_KERAS),
    ("peers", peers.PEERS),
):
    flags.register_validator(
        _flag,
        lambda given, known=_known: set(given) <= set(known),
        f"they must be some of {', '.join(_known)}",
    )


flags.register_validator(
    "gradient_accumulation_steps",
    lambda given: given is None or (given and all(re.fullmatch("0*[1-9][0-9]*", k) for k in given)),
    "they must be integers >= 1",
)


def numbers() -> tuple[int, int, int]:
    """Samples of a micro-batch, updates of a run, and runs."""
    return MICRO_BATCH_SIZE.value, STEPS.value, RUNS.value


def steps_list(default: tuple[int, ...] = ()) -> list[int]:
    """The numbers of --gradient_accumulation_steps."""
    return [int(k) for k in _STEPS_LIST.value or default]


def check() -> None:
    """Refuses what does not go together, and files that cannot be written.

    Raises:
        UsageError: In that case.
    """
    try:
        _check_modes()
        _check_files()
    except ValueError as e:
        raise command_line.UsageError(e) from None


def seeds() -> int:
    """Searches of each kind."""
    return _SEEDS.value or (20 if TABLES.value else 10)


def tasks() -> list[Task]:
    """What to measure for the table, or with --in_turn.

    Raises:
        UsageError: If that is impossible.
    """
    try:
        found = _tasks()
        if IN_TURN.value:
            _check_in_turn(found)
    except ValueError as e:
        raise command_line.UsageError(e) from None
    return found


def _check_modes() -> None:
    if TABLES.value and not TUNERS.value:
        raise ValueError("--tables needs --tuners")
    if SEARCHES.value and not TABLES.value:
        raise ValueError("--search needs --tables")
    if unknown := set(SEARCHES.value) - set(table_searches.rows()):
        raise ValueError(
            f"--search must be one of {'; '.join(table_searches.rows())}. Received: {unknown.pop()}"
        )
    if TUNERS.value and NETWORK.value:
        raise ValueError("--tuners does not go with --network")
    if SCALING.value:
        for name in ("tuners", "network", "in_turn", "micro_batch_size", "steps", "runs"):
            if flags.FLAGS[name].present:
                raise ValueError(f"--{name} does not go with --scaling")
    for name, mode in {
        "model_parameters": SCALING,
        "micro_batch_seconds": SCALING,
        "network_hosts": NETWORK,
        "network_megabits": NETWORK,
    }.items():
        if flags.FLAGS[name].present and not mode.value:
            raise ValueError(f"--{name} needs --{mode.name}")
    for mode in (TUNERS, NETWORK, SCALING):
        for name in ("models", "batch_size", "rows", "peers", "threads", "png"):
            if mode.value and flags.FLAGS[name].present:
                raise ValueError(f"--{name} does not go with --{mode.name}")
    if HARDWARE.value == "gpu":
        _check_gpu()
    if IN_TURN.value and PNG.value is not None:
        raise ValueError("--png does not go with --in_turn")


def _check_gpu() -> None:
    for mode in (TUNERS, NETWORK, SCALING):
        if mode.value:
            raise ValueError(f"--hardware=gpu does not go with --{mode.name}")
    if PEERS.value:
        raise ValueError("--hardware=gpu does not go with --peers: they are installed for CPUs")
    if "pipeline" in ROWS.value:
        raise ValueError("--hardware=gpu does not go with the row pipeline: its stages are CPUs")
    # In a process of its own, since one that has looked may keep memory of the GPU.
    look = "import sys, tensorflow as tf; sys.exit(not tf.config.list_physical_devices('GPU'))"
    if subprocess.run([sys.executable, "-c", look], capture_output=True, check=False).returncode:
        raise ValueError(
            "--hardware=gpu needs a GPU that TensorFlow sees, and there is none. Leave it out to "
            "measure on the CPU"
        )


def _check_files() -> None:
    for flag in (JSON, MARKDOWN, PNG):
        if flag.value is not None:
            command_line.check_file(flag.value, flag.name)
    if PNG.value is not None and pathlib.Path(PNG.value).suffix.lower() != ".png":
        raise ValueError(f"--png must end in .png. Received: {PNG.value}")
    if PNG.value and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--png needs matplotlib: pip install 'tfbig[plots]'")


def _tasks() -> list[Task]:
    names = [name for name in rows.ROWS if name in (*ROWS.value, *PEERS.value)]
    if not names or not MODELS_FLAG.value:
        raise ValueError("there is nothing to measure: --models, or --rows and --peers, are empty")
    return [
        Task(name, model, whole, k, STEPS.value, _THREADS.value or _cores(), HARDWARE.value)
        for model in MODELS_FLAG.value
        for k, whole in _splits()
        for name in names
    ]


def _splits() -> list[tuple[int, int]]:
    """Pairs of micro-batches per update and effective batch."""
    whole, micro = BATCH_SIZE.value, MICRO_BATCH_SIZE.value
    if _STEPS_LIST.value and flags.FLAGS["micro_batch_size"].present:
        if flags.FLAGS["batch_size"].present:
            raise ValueError(
                "--batch_size, --micro_batch_size and --gradient_accumulation_steps do not go "
                "together: two of them determine the third"
            )
        return [(k, k * micro) for k in steps_list()]
    counts = steps_list((1,)) if _STEPS_LIST.value else [whole / micro]
    for k in counts:
        if k != int(k) or whole % k:
            raise ValueError(
                f"--batch_size={whole} must be a multiple of the micro-batch. Received: {k:g} "
                "micro-batches"
            )
    return [(int(k), whole) for k in counts]


def _check_in_turn(found: list[Task]) -> None:
    if len({(task.model, task.gradient_accumulation_steps) for task in found}) > 1:
        raise ValueError("--in_turn measures one model and one number of micro-batches")
    if wrong := [task.row for task in found if task.row not in in_turn.ROWS]:
        raise ValueError(
            f"--in_turn measures rows of {', '.join(in_turn.ROWS)}. Received: {', '.join(wrong)}"
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
