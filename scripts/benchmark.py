"""Measures tfbig against plain Keras, and against what one would pick instead of it.

Every row runs in a process of its own, the rows in turn, several times over; the table has
medians. Time is that of one effective batch after warm-up, memory the largest resident size
of the process. The ratio is to plain Keras at the micro-batch, which applies the optimizer
once per micro-batch. After the table, one line for each row of tfbig that another one beats
says in what.

Without --gradient_accumulation_steps, --batch_size is cut into micro-batches of
--micro_batch_size samples. With it, --batch_size is cut into so many; or, if
--micro_batch_size is given and --batch_size is not, the micro-batch stays and the effective
batch grows:

  benchmark.py --models=gpt --gradient_accumulation_steps=1,4,16,64 --micro_batch_size=8

Of several numbers of micro-batches there are also tables of memory, samples/s and start.

With --peers=torch,jax, the same models in PyTorch with Hugging Face Accelerate, and in Keras
on JAX with its built-in accumulation, in environments that are made on demand.

All have --threads threads for an operation, and on Linux as many cores. Elsewhere JAX may
take more, which has no setting for it.

With --in_turn, the rows of a model run in one process, an update of each in turn: for ratios on a
machine that others use too, which slows down both of two that follow each other.

With --network, tfbig over two workers and a narrow link between them: samples and bytes
sent against accumulation that exchanges each micro-batch. This needs Linux, iproute2 and
the right to make network namespaces, which root has; elsewhere it is skipped, which one
line says, with exit code 0.

With --tuners, searches without models: how good they get, and how long a suggestion takes.

Exit code 1 says that a row has failed, and which the table says.
"""

import importlib.util
import json
import os
import pathlib
import platform
import re
import signal
import sys

import benchmark_models
import benchmark_network
import benchmark_peers
import benchmark_plot
import benchmark_process
import benchmark_report
import benchmark_rows
import benchmark_tuners
import benchmark_turns
import command_line
from absl import flags

MODELS, PEERS = tuple(benchmark_models.MODELS), benchmark_peers.PEERS
ROWS = tuple(name for name in benchmark_rows.ROWS if name not in PEERS)


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# --- Flags -------------------------------------------------------------------

_MODELS = flags.DEFINE_list(
    "models", list(MODELS[:-1]), f"What to measure, of {', '.join(MODELS)}."
)
_ROWS = flags.DEFINE_list("rows", list(ROWS), f"How to train it, of {', '.join(ROWS)}.")
_PEERS = flags.DEFINE_list(
    "peers",
    [],
    f"Also what one would pick instead, of {', '.join(PEERS)}: installs into .venv-PEER what is "
    "not there. pip's settings say where the CPU build of PyTorch is; the other is large.",
)
_PEERS_DIRECTORY = flags.DEFINE_string(
    "peers_directory", str(benchmark_peers.ROOT), "Where the .venv-PEER are."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Effective batch, samples.", lower_bound=1)
_MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size", 32, "Samples of a micro-batch; divides --batch_size.", lower_bound=1
)
_STEPS_LIST = flags.DEFINE_list(
    "gradient_accumulation_steps",
    None,
    "Micro-batches per update: one number, or several as 2,8,32. Of --micro_batch_size samples "
    "each if that is given, else parts of --batch_size.",
)
_RUNS = flags.DEFINE_integer("runs", 3, "Processes for each row.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 5, "Effective batches timed in a run.", lower_bound=1)
_THREADS = flags.DEFINE_integer(
    "threads", None, "Threads of an operation; by default all cores.", lower_bound=1
)
_TIMEOUT = flags.DEFINE_float(
    "timeout", 900.0, "Seconds after which a process is killed.", lower_bound=0.0
)
_JSON = flags.DEFINE_string("json", None, "File to write all measurements to.")
_PNG = flags.DEFINE_string("png", None, "File to draw the table to, a .png.")
_IN_TURN = flags.DEFINE_boolean(
    "in_turn",
    False,
    "Measure the --rows of one of --models in one process, --steps updates of each in turn; ratios "
    "are to the first row.",
)
_NETWORK = flags.DEFINE_boolean(
    "network",
    False,
    "Measure an MLP over two workers and a link of 100 Mbit/s instead (as root, on Linux). "
    "--gradient_accumulation_steps is then 1,4,16 by default, --micro_batch_size that of a "
    "worker, and all --runs are of the same two processes.",
)
_TUNERS = flags.DEFINE_boolean(
    "tuners", False, "Measure searches for the least value of two functions instead."
)
_TRIALS = flags.DEFINE_integer("trials", 50, "Trials of a search, for --tuners.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 10, "Searches of each kind, for --tuners.", lower_bound=1)
_ROW = flags.DEFINE_string("row", None, "Internal: the file that this worker writes to.")


for _flag, _known in (("models", MODELS), ("rows", ROWS), ("peers", PEERS)):
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


def _steps_list(default):
    """The numbers of --gradient_accumulation_steps."""
    return [int(k) for k in _STEPS_LIST.value or default]


def _cuts():
    """Pairs: micro-batches per update, effective batch; ValueError if one cannot be."""
    whole, micro = _BATCH_SIZE.value, _MICRO_BATCH_SIZE.value
    if _STEPS_LIST.value and flags.FLAGS["micro_batch_size"].present:
        if flags.FLAGS["batch_size"].present:
            raise ValueError(
                "--batch_size, --micro_batch_size and --gradient_accumulation_steps do not go "
                "together: each follows from the others"
            )
        return [(k, k * micro) for k in _steps_list(())]
    counts = _steps_list((1,)) if _STEPS_LIST.value else [whole / micro]
    for k in counts:
        if k != int(k) or whole % k:
            raise ValueError(
                f"--batch_size={whole} must be divided by the micro-batch without a rest: "
                f"{k:g} micro-batches"
            )
    return [(int(k), whole) for k in counts]


def _tasks():
    """What to measure; ValueError if that cannot be."""
    names = [name for name in benchmark_rows.ROWS if name in (*_ROWS.value, *_PEERS.value)]
    if not names or not _MODELS.value:
        raise ValueError("there is nothing to measure: --models, or --rows and --peers, are empty")
    return [
        benchmark_process.Task(name, model, whole, k, _STEPS.value, _THREADS.value or _cores())
        for model in _MODELS.value
        for k, whole in _cuts()
        for name in names
    ]


def _tasks_in_turn():
    tasks = _tasks()
    if len({(task.model, task.gradient_accumulation_steps) for task in tasks}) > 1:
        raise ValueError("--in_turn measures one model and one number of micro-batches")
    if wrong := [task.row for task in tasks if task.row not in benchmark_turns.ROWS]:
        raise ValueError(
            f"--in_turn measures rows of {', '.join(benchmark_turns.ROWS)}: {', '.join(wrong)}"
        )
    return tasks


# --- All rows ----------------------------------------------------------------


def _environment():
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("tensorflow", "keras", "tfbig")}
    peers = {peer: benchmark_peers.requirements(peer) for peer in _PEERS.value}
    return {"python": platform.python_version(), "cpus": os.cpu_count(), **versions, **peers}


def _document(rows):
    """The rows as they are written to --json."""
    written = []
    for row, ratio in zip(rows, benchmark_report.ratios(rows), strict=True):
        model, k = row.group
        head = {"model": model, "gradient_accumulation_steps": k, "row": row.title}
        head["effective_batch"] = row.task.batch_size
        if row.skipped or row.error:
            head |= {"skipped": row.skipped} if row.skipped else {"error": row.error}
            written.append(head)
        else:
            written.append(head | row.summary() | {"ratio": ratio, "runs": row.runs})
    return written


def _measure_rows(tasks):
    """Measures every row and prints the table.

    Returns:
        What is written to --json, and whether all rows were measured.
    """
    # `timeout` sends it; as an exception it ends the process that is being measured, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rows = benchmark_rows.make(tasks)
    benchmark_rows.measure(rows, _RUNS.value, _TIMEOUT.value, _PEERS_DIRECTORY.value)
    print(
        f"{_RUNS.value} runs of {_STEPS.value} effective batches each, {tasks[0].threads} threads"
    )
    for k, whole in dict.fromkeys(
        (task.gradient_accumulation_steps, task.batch_size) for task in tasks
    ):
        print(f"K={k}: effective batch {whole}, micro-batch {whole // k}")
    benchmark_report.show(rows)
    if _PNG.value is not None:
        benchmark_plot.draw(rows, _PNG.value)
    return _document(rows), not any(row.error for row in rows)


def _prepare():
    """What to measure (counts, tasks or nothing), and where to write to, or None."""
    try:
        if _TUNERS.value and _NETWORK.value:
            raise ValueError("--tuners does not go with --network")
        for mode in (_TUNERS, _NETWORK):
            for name in ("models", "batch_size", "rows", "peers", "threads", "png"):
                if mode.value and flags.FLAGS[name].present:
                    raise ValueError(f"--{name} does not go with --{mode.name}")
        if _IN_TURN.value and _PNG.value is not None:
            raise ValueError("--png does not go with --in_turn")
        for flag in (_JSON, _PNG):
            if flag.value is not None:
                command_line.check_file(flag.value, flag.name)
        if _PNG.value is not None and pathlib.Path(_PNG.value).suffix.lower() != ".png":
            raise ValueError(f"--png must end in .png. Received: {_PNG.value}")
        if _PNG.value and not importlib.util.find_spec("matplotlib"):
            raise ValueError("--png needs matplotlib: pip install 'tfbig[plots]'")
        if _TUNERS.value:
            return None
        if _IN_TURN.value and not _NETWORK.value:
            return _tasks_in_turn()
        return _steps_list((1, 4, 16)) if _NETWORK.value else _tasks()
    except ValueError as e:
        raise command_line.UsageError(e) from None


def _mlp(n):
    """Of `n` samples: the function that makes the model, the data and the loss."""
    from keras import losses

    data = benchmark_models.data("mlp", n)
    return benchmark_models.mlp, *data, losses.SparseCategoricalCrossentropy(from_logits=True)


def _benchmark():
    # On a GPU, ru_maxrss would be the memory of the host.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    numbers = (_MICRO_BATCH_SIZE.value, _STEPS.value, _RUNS.value)
    if _ROW.value is not None:
        rows = benchmark_network.measure(_mlp, _steps_list(()), *numbers)
        pathlib.Path(_ROW.value).write_text(json.dumps(rows))
        return 0
    what, complete = _prepare(), True
    try:
        if _IN_TURN.value:
            rows, settings = benchmark_turns.measure(what), {"threads": what[0].threads}
        elif _TUNERS.value:
            rows = benchmark_tuners.compare(_TRIALS.value, _SEEDS.value)
            settings = {"trials": _TRIALS.value, "seeds": _SEEDS.value}
        elif _NETWORK.value:
            rows = benchmark_network.compare(__file__, what, *numbers)
            settings = {"micro_batch_size": _MICRO_BATCH_SIZE.value}
        else:
            rows, complete = _measure_rows(what)
            settings = {"threads": what[0].threads}
    except benchmark_network.UnavailableError as e:
        print(f"benchmark.py: --network skipped: {e}", file=sys.stderr)
        return 0
    except (RuntimeError, benchmark_rows.DifferentModelsError) as e:
        print(f"benchmark.py: {e}", file=sys.stderr)
        return 1
    if _JSON.value is not None:
        settings |= {"runs": _RUNS.value, "steps": _STEPS.value}
        document = {"environment": _environment(), "settings": settings, "rows": rows}
        pathlib.Path(_JSON.value).write_text(json.dumps(document, indent=2) + "\n")
    return 0 if complete else 1


if __name__ == "__main__":
    command_line.run("benchmark.py", _benchmark, "nothing is written")
