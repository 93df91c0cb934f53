"""Measures which operations take the time of an update, with one thread.

    python scripts/operation_times.py --markdown=table.md

A model of benchmark.py makes updates of eight micro-batches of 8 samples, in a process of its own
for each row, with TensorFlow's profiler on for some of them. With one thread, operations run one
after another, so that their times add up to that of the update: each is counted without what runs
within it. What XLA compiled has names of XLA's, which a fusion takes from one of its operations.
Takes a minute on two cores.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import command_line
from absl import flags
from benchmarks import markdown, models, provenance, rows

PROGRAM = "operation_times.py"

_MARKDOWN = flags.DEFINE_string("markdown", None, "File for the table, a .md.")
_MODEL = flags.DEFINE_enum("model", "gpt", sorted(models.MODELS), "Model to measure.")
_UPDATES = flags.DEFINE_integer("updates", 4, "Updates to take the time of.", lower_bound=1)
_OPERATIONS = flags.DEFINE_integer("operations", 12, "How many kinds to list.", lower_bound=1)

ROWS = ("micro", "no_jit", "tfbig")
STEPS, SAMPLES = 8, 8

# The kernels of TensorFlow, those of oneDNN, and what XLA calls them.
_PRODUCT = re.compile(r"(_Mkl|_?Fused)*(Batch)?(MatMul|Einsum|Conv2D)|dot|convolution")
PRODUCTS, SCHEDULING, OTHERS = "products, convolutions", "scheduling", "all others"

# What the profiler calls the loop of TensorFlow's executor between operations.
_EXECUTOR = "ExecutorState::Process"


@dataclasses.dataclass(frozen=True)
class Span:
    """From when to when something ran, in picoseconds; a span lies within another or beside it."""

    begin: int
    end: int
    name: str


def own_times(spans: list[Span]) -> Iterator[tuple[str, int]]:
    """The time of each span without those within it, in picoseconds, by its name."""
    open_: list[tuple[Span, int]] = []

    def closed(until: float) -> Iterator[tuple[str, int]]:
        while open_ and open_[-1][0].end <= until:
            span, within = open_.pop()
            yield span.name, span.end - span.begin - within
            if open_:
                outer, before = open_[-1]
                open_[-1] = outer, before + span.end - span.begin

    for span in sorted(spans, key=lambda s: (s.begin, -s.end)):
        yield from closed(span.begin)
        open_.append((span, 0))
    yield from closed(float("inf"))


def kind(name: str) -> str:
    """What an event of the profiler is counted as: "layer/mul:Mul" and "mul_fusion.3"."""
    if name == _EXECUTOR:
        return SCHEDULING
    operation = re.sub(r"\.\d+$", "", name.rpartition(":")[2])
    return PRODUCTS if _PRODUCT.match(operation) else operation


def _events(directory: str) -> Iterator[list[Span]]:
    """What ran, by thread, but the program's own, which waits for the others."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    (host,) = (plane for plane in space.planes if plane.name == "/host:CPU")
    names = {i: metadata.name for i, metadata in host.event_metadata.items()}
    for line in host.lines:
        if line.name == "python":
            continue
        yield [
            Span(e.offset_ps, e.offset_ps + e.duration_ps, names[e.metadata_id])
            for e in line.events
        ]


def _measure(name: str, row: str, updates: int) -> dict[str, tuple[float, float]]:
    """Of each kind, milliseconds per sample and how many run in an update."""
    import keras
    import tensorflow as tf
    from benchmarks import with_keras

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(0)
    model = with_keras.make_model(row, STEPS, *models.MODELS[name]())
    samples = STEPS * SAMPLES
    calls = STEPS if row == "micro" else 1
    x, y = (a.reshape(calls, -1, *a.shape[1:]) for a in models.data(name, samples))
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat(updates + 1)

    class Profile(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == calls:
                tf.profiler.experimental.start(directory)

    with tempfile.TemporaryDirectory() as directory:
        model.fit(data, shuffle=False, verbose=0)
        model.fit(data, shuffle=False, verbose=0, callbacks=[Profile()])
        tf.profiler.experimental.stop()
        times: collections.Counter[str] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        for spans in _events(directory):
            for what, picoseconds in own_times(spans):
                times[kind(what)] += picoseconds
                counts[kind(what)] += 1
    return {k: (times[k] / 1e9 / updates / samples, counts[k] / updates) for k in times}


def _in_process(name: str, row: str, updates: int) -> dict[str, tuple[float, float]]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_measure, name, row, updates).result()


def lines(
    row: str, found: dict[str, tuple[float, float]], most: int
) -> list[tuple[str, str, str, str, str]]:
    """The lines of a row: the kinds that take most, and the others together."""
    total = sum(time for time, _ in found.values())
    listed = sorted(found, key=lambda k: -found[k][0])[:most]
    rest = [found[k] for k in found if k not in listed]
    shown = [(k, *found[k]) for k in listed]
    shown.append((OTHERS, sum(time for time, _ in rest), sum(count for _, count in rest)))
    shown.append(("in all", total, sum(count for _, count in found.values())))
    return [
        (row, what, f"{count:,.0f}", f"{time:.2f}", f"{time / total:.1%}")
        for what, time, count in shown
    ]


def _run() -> int:
    if _MARKDOWN.value is not None:
        command_line.check_file(_MARKDOWN.value, "markdown")
    origin = provenance.collect(__file__, ("tensorflow", "keras", "tfbig"), [])
    table = []
    for row in ROWS:
        found = _in_process(_MODEL.value, row, _UPDATES.value)
        table += (of_row := lines(rows.ROWS[row], found, _OPERATIONS.value))
        for row_line in of_row:
            print("  ".join(row_line), flush=True)
    if _MARKDOWN.value is not None:
        heads = ("row", "operations", "in an update", "ms/sample", "share")
        title = f"{_MODEL.value}, {STEPS} micro-batches of {SAMPLES} samples, Adam, one thread"
        markdown.write(_MARKDOWN.value, origin, [markdown.Table(title, heads, table)], [])
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "nothing is written")
