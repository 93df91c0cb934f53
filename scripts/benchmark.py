"""Measures tfbig against plain Keras: time and peak memory of one effective batch.

Every row runs in a process of its own, the rows in turn, several times over. Time is
that of one effective batch after warm-up, memory the largest resident size of the
process. The ratio is to plain Keras at the micro-batch, which applies the optimizer
once per micro-batch.

With --network, tfbig over two workers and a narrow link between them: samples and bytes
sent against accumulation that exchanges each micro-batch. This needs Linux, iproute2 and
the right to make network namespaces, which root has; elsewhere it is skipped, which one
line says, with exit code 0.

With --tuners, searches without models: how good they get, and how long a suggestion takes.
"""

import collections
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import benchmark_network
import benchmark_tuners
import command_line
from absl import flags

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_MIB = 2**20 if sys.platform == "darwin" else 2**10
_WARM_UP = 2  # Effective batches.

WHOLE = "plain, whole batch"
BUILT_IN = "plain, built-in accumulation"
MICRO = "plain, micro-batch"
TFBIG = "tfbig"
JIT = "tfbig, jit_compile"
ROWS = (WHOLE, BUILT_IN, MICRO, TFBIG, JIT)
SKIPPED = {("cnn", JIT): "XLA on CPU runs convolutions in a loop very slowly"}


# --- Models: layers, and `n` samples of data ---------------------------------


def mlp(n):
    """Four layers of 512 units."""
    import numpy as np
    from keras import Input, layers, losses

    def make():
        inputs = x = Input((512,))
        for _ in range(4):
            x = layers.Dense(512, activation="relu")(x)
        return inputs, layers.Dense(10)(x)

    random = np.random.default_rng(0)
    x = random.normal(size=(n, 512)).astype("float32")
    return make, x, random.integers(10, size=n), losses.SparseCategoricalCrossentropy(True)


def transformer(n, length=32, width=64, tokens=1000):
    """A language model: an embedding and two blocks of causal attention."""
    import numpy as np
    from keras import Input, layers, losses

    def make():
        inputs = Input((length,), dtype="int32")
        x = layers.Embedding(tokens, width)(inputs)
        for _ in range(2):
            y = layers.LayerNormalization()(x)
            x += layers.MultiHeadAttention(4, width // 4)(y, y, use_causal_mask=True)
            y = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
            x += layers.Dense(width)(y)
        return inputs, layers.Dense(tokens)(layers.LayerNormalization()(x))

    text = np.random.default_rng(0).integers(tokens, size=(n, length + 1))
    return make, text[:, :-1], text[:, 1:], losses.SparseCategoricalCrossentropy(True)


def cnn(n):
    """Four strided convolutions of 64x64 pixels in three colours."""
    import numpy as np
    from keras import Input, layers, losses

    def make():
        inputs = x = Input((64, 64, 3))
        for filters in (16, 32, 64, 64):
            x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
        return inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))

    random = np.random.default_rng(0)
    x = random.normal(size=(n, 64, 64, 3)).astype("float32")
    return make, x, random.integers(10, size=n), losses.SparseCategoricalCrossentropy(True)


MODELS = {"mlp": mlp, "transformer": transformer, "cnn": cnn}


# --- Flags -------------------------------------------------------------------

_MODELS = flags.DEFINE_list("models", list(MODELS), f"What to measure, of {', '.join(MODELS)}.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Effective batch, samples.", lower_bound=1)
_MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size", 32, "Samples of a micro-batch; divides --batch_size.", lower_bound=1
)
_STEPS_LIST = flags.DEFINE_list(
    "gradient_accumulation_steps",
    None,
    "Micro-batches per update, instead of --micro_batch_size: one number, or several as 2,8,32.",
)
_RUNS = flags.DEFINE_integer("runs", 3, "Processes for each row.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 5, "Effective batches timed in a run.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write all measurements to.")
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
_ROW = flags.DEFINE_string("row", None, "Internal: the row that this process measures.")


@flags.validator("models", f"they must be some of {', '.join(MODELS)}")
def _are_models(names):
    return bool(names) and set(names) <= set(MODELS)


def _counts():
    """The numbers of micro-batches per update; ValueError if one cannot be."""
    if _NETWORK.value:
        for name in ("models", "batch_size"):
            if flags.FLAGS[name].present:
                raise ValueError(f"--{name} does not go with --network")
        counts = [int(k) for k in _STEPS_LIST.value or (1, 4, 16)]
        if min(counts) < 1:
            raise ValueError(f"--gradient_accumulation_steps must be positive: {min(counts)}")
        return counts
    whole = _BATCH_SIZE.value
    if _STEPS_LIST.value is None:
        counts = [whole / _MICRO_BATCH_SIZE.value]
    else:
        counts = [int(k) for k in _STEPS_LIST.value]
    for k in counts:
        if k < 1 or k != int(k) or whole % k:
            raise ValueError(
                f"--batch_size={whole} must be divided by the micro-batch without a rest: "
                f"{k:g} micro-batches"
            )
    return [int(k) for k in counts]


# --- One row, in its own process ---------------------------------------------


def _peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_MIB


def measure(model_name, row, k):
    """Seconds of each effective batch and peak memory, in this process."""
    import keras

    import tfbig

    keras.utils.set_random_seed(0)
    imported = _peak_mib()
    whole, batches = _BATCH_SIZE.value, _WARM_UP + _STEPS.value
    make, x, y, loss = MODELS[model_name](whole * batches)
    inputs, outputs = make()
    is_tfbig = row in (TFBIG, JIT)
    if is_tfbig:
        model = tfbig.Model(inputs, outputs, gradient_accumulation_steps=k)
    else:
        model = keras.Model(inputs, outputs)
    accumulation = k if row == BUILT_IN and k > 1 else None
    model.compile(
        keras.optimizers.Adam(1e-3, gradient_accumulation_steps=accumulation),
        loss,
        jit_compile=row == JIT,
    )
    calls = k if row in (BUILT_IN, MICRO) else 1
    ends = []
    model.fit(
        x,
        y,
        batch_size=whole // calls,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
            )
        ],
    )
    ends = ends[calls - 1 :: calls][_WARM_UP - 1 :]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    peak = _peak_mib()
    return {"seconds": seconds, "peak_mib": peak, "growth_mib": peak - imported}


def _run_row(model, row, k):
    """Starts a process for a row; returns what it measured."""
    settings = [
        f"--row={model}/{k}/{row}",
        f"--batch_size={_BATCH_SIZE.value}",
        f"--steps={_STEPS.value}",
    ]
    process = subprocess.run(
        [sys.executable, __file__, *settings], capture_output=True, text=True, check=False
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RuntimeError(f"{model}, {row}: {lines[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


# --- All rows ----------------------------------------------------------------


def _summary(runs):
    seconds = [statistics.median(run["seconds"]) for run in runs]
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "growth_mib": statistics.median(run["growth_mib"] for run in runs),
    }


def _print_table(summaries):
    columns = "{:<12} {:>4}  {:<29} {:>9} {:>19} {:>6} {:>9} {:>8}"
    print(columns.format("model", "K", "row", "s/batch", "min-max", "ratio", "peak MiB", "growth"))
    for (model, k, row), s in summaries.items():
        if s is None:
            print(columns.format(model, k, row, "-", "", "", "", "") + SKIPPED[model, row])
            continue
        spread = f"{s['seconds_min']:.4f}-{s['seconds_max']:.4f}"
        print(
            columns.format(
                model,
                k,
                row,
                f"{s['seconds']:.4f}",
                spread,
                f"{s['ratio']:.2f}",
                f"{s['peak_mib']:.0f}",
                f"{s['growth_mib']:.0f}",
            )
        )


def _measure_all(counts):
    rows = [(m, k, row) for m in _MODELS.value for k in counts for row in ROWS]
    runs = collections.defaultdict(list)
    for i in range(_RUNS.value):
        for model, k, row in rows:
            if (model, row) in SKIPPED:
                continue
            print(f"run {i + 1}/{_RUNS.value}: {model}, K={k}, {row}", file=sys.stderr, flush=True)
            runs[model, k, row].append(_run_row(model, row, k))
    summaries = {key: _summary(runs[key]) if key in runs else None for key in rows}
    for (model, k, _), summary in summaries.items():
        if summary is not None:
            summary["ratio"] = summary["seconds"] / summaries[model, k, MICRO]["seconds"]
    return summaries, runs


def _environment():
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("tensorflow", "keras", "tfbig")}
    return {"python": platform.python_version(), "cpus": os.cpu_count(), **versions}


def _rows(summaries, runs):
    rows = []
    for key, summary in summaries.items():
        row = dict(zip(("model", "gradient_accumulation_steps", "row"), key, strict=True))
        if summary is None:
            row["skipped"] = SKIPPED[key[0], key[2]]
        else:
            row |= summary | {"runs": runs[key]}
        rows.append(row)
    return rows


def _write_json(path, rows, settings):
    settings |= {"runs": _RUNS.value, "steps": _STEPS.value}
    document = {"environment": _environment(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(document, indent=2) + "\n")


def _measure_rows(counts):
    """Measures every row; returns those of the table, which it prints."""
    summaries, runs = _measure_all(counts)
    print(
        f"effective batch {_BATCH_SIZE.value}, {_RUNS.value} runs of {_STEPS.value} batches each; "
        f"ratio to '{MICRO}'\n"
    )
    _print_table(summaries)
    return _rows(summaries, runs)


def _prepare():
    """The numbers of micro-batches, None for --tuners, and where to write to, or None."""
    try:
        if _TUNERS.value and _NETWORK.value:
            raise ValueError("--tuners does not go with --network")
        counts = None if _TUNERS.value else _counts()
        path = pathlib.Path(_JSON.value) if _JSON.value else None
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--json={path}: there is no directory {path.parent}")
    except ValueError as e:
        raise command_line.UsageError(e) from None
    return counts, path


def _benchmark():
    # On a GPU, ru_maxrss would be the memory of the host.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    numbers = (_MICRO_BATCH_SIZE.value, _STEPS.value, _RUNS.value)
    if _ROW.value is not None and _NETWORK.value:
        rows = benchmark_network.measure(mlp, _counts(), *numbers)
        pathlib.Path(_ROW.value).write_text(json.dumps(rows))
        return 0
    if _ROW.value is not None:
        model, k, row = _ROW.value.split("/", 2)
        print(json.dumps(measure(model, row, int(k))))
        return 0
    counts, path = _prepare()
    try:
        if _TUNERS.value:
            rows = benchmark_tuners.compare(_TRIALS.value, _SEEDS.value)
            settings = {"trials": _TRIALS.value, "seeds": _SEEDS.value}
        elif _NETWORK.value:
            rows = benchmark_network.compare(__file__, counts, *numbers)
            settings = {"micro_batch_size": _MICRO_BATCH_SIZE.value}
        else:
            rows = _measure_rows(counts)
            settings = {"batch_size": _BATCH_SIZE.value}
    except benchmark_network.UnavailableError as e:
        print(f"benchmark.py: --network skipped: {e}", file=sys.stderr)
        return 0
    except RuntimeError as e:
        print(f"benchmark.py: {e}", file=sys.stderr)
        return 1
    if path is not None:
        _write_json(path, rows, settings)
    return 0


if __name__ == "__main__":
    command_line.run("benchmark.py", _benchmark, "nothing is written")
