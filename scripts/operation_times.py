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
import multiprocessing
import tempfile
from typing import Any

import command_line
from absl import flags
from benchmarks import markdown, models, operations, provenance, rows

PROGRAM = "operation_times.py"

_MARKDOWN = flags.DEFINE_string("markdown", None, "File for the table, a .md.")
_MODEL = flags.DEFINE_enum("model", "gpt", sorted(models.MODELS), "Model to measure.")
_UPDATES = flags.DEFINE_integer("updates", 4, "Updates to take the time of.", lower_bound=1)
_OPERATIONS = flags.DEFINE_integer("operations", 12, "How many kinds to list.", lower_bound=1)

ROWS = ("micro", "no_jit", "tfbig")
STEPS, SAMPLES = 8, 8


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
        for spans in operations.events(directory):
            for what, picoseconds in operations.own_times(spans):
                times[operations.kind(what)] += picoseconds
                counts[operations.kind(what)] += 1
    return {k: (times[k] / 1e9 / updates / samples, counts[k] / updates) for k in times}


def _in_process(name: str, row: str, updates: int) -> dict[str, tuple[float, float]]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_measure, name, row, updates).result()


def _run() -> int:
    if _MARKDOWN.value is not None:
        command_line.check_file(_MARKDOWN.value, "markdown")
    origin = provenance.collect(__file__, ("tensorflow", "keras", "tfbig"), [])
    table = []
    for row in ROWS:
        found = _in_process(_MODEL.value, row, _UPDATES.value)
        table += (of_row := operations.lines(rows.ROWS[row], found, _OPERATIONS.value))
        for row_line in of_row:
            print("  ".join(row_line), flush=True)
    if _MARKDOWN.value is not None:
        heads = ("row", "operations", "in an update", "ms/sample", "share")
        title = f"{_MODEL.value}, {STEPS} micro-batches of {SAMPLES} samples, Adam, one thread"
        markdown.write(_MARKDOWN.value, origin, [markdown.Table(title, heads, table)], [])
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "nothing is written")
