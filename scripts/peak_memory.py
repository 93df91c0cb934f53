"""Measures what the memory of a training is made of: tensors, programs, and what the start leaves.

    python scripts/peak_memory.py --markdown=table.md

Each model of benchmark.py makes a few updates of eight micro-batches of 16 samples, in a process of
its own for each row. The table has the growth of the process over the imports at its peak; the
tensors, as TensorFlow's allocator counts them at the peak of an update, and keeps their memory for
the next; what else stays after the first update: graphs, kernels and compiled code; and what has
been freed by then and is given back. Takes two minutes on two cores.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing

import command_line
from absl import flags
from benchmarks import markdown, models, process, provenance, rows

PROGRAM = "peak_memory.py"

_MARKDOWN = flags.DEFINE_string("markdown", None, "File for the table, a .md.")
_MODELS = flags.DEFINE_multi_enum(
    "measured_model", ["gpt", "vit", "cnn"], sorted(models.MODELS), "Models to measure."
)

ROWS = {row: rows.ROWS[row] for row in ("micro", "no_jit", "tfbig")}
STEPS, SAMPLES, UPDATES = 8, 16, 4


def _measure(name: str, row: str) -> tuple[float, float, float, float]:
    """In MiB: the growth at the peak, tensors, what else stays, and what is given back."""
    import keras
    import tensorflow as tf
    from benchmarks import with_keras

    import tfbig  # noqa: F401  In every row, since memory is counted from here.
    from tfbig._keras import start

    before = process.resident_mib()
    freed: list[float] = []
    kept: list[float] = []
    give_back = start.give_back_memory

    def given_back() -> None:
        held = process.resident_mib()
        give_back()
        freed.append(held - process.resident_mib())

    start.give_back_memory = given_back

    def tensors() -> float:
        return tf.config.experimental.get_memory_info("CPU:0")["peak"] / 2**20

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            if batch == 0:
                if row == "micro":
                    given_back()
                kept.append(process.resident_mib() - before - tensors())

    keras.utils.set_random_seed(0)
    model = with_keras.make_model(row, STEPS, *models.MODELS[name]())
    x, y = models.data(name, STEPS * SAMPLES)
    model.fit(
        tf.data.Dataset.from_tensors(
            (x, y) if row != "micro" else (x[:SAMPLES], y[:SAMPLES])
        ).repeat(UPDATES),
        shuffle=False,
        verbose=0,
        callbacks=[Watch()],
    )
    return process.peak_mib() - before, tensors(), kept[0], freed[0]


def _in_process(name: str, row: str) -> tuple[float, float, float, float]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_measure, name, row).result()


def _run() -> int:
    if _MARKDOWN.value is not None:
        command_line.check_file(_MARKDOWN.value, "markdown")
    origin = provenance.collect(__file__, ("tensorflow", "keras", "tfbig"), [])
    lines = []
    for name in _MODELS.value:
        for row, label in ROWS.items():
            parts = _in_process(name, row)
            lines.append((name, label, *(f"{part:.0f}" for part in parts)))
            print(" ".join(lines[-1]), flush=True)
    if _MARKDOWN.value is not None:
        heads = ("model", "row", "growth at the peak", "tensors", "programs", "given back")
        title = f"MiB; {STEPS} micro-batches of {SAMPLES} samples, Adam"
        markdown.write(_MARKDOWN.value, origin, [markdown.Table(title, heads, lines)], [])
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "nothing is written")
