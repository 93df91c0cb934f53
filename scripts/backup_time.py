"""Measures how long backups keep training from its updates, at 100 million parameters with Adam.

    python scripts/backup_time.py --markdown=table.md

Trains dense layers in blocks of updates: without a backup, with one that is written at once, and
with one that a thread writes, in turn in one process. What a block takes longer than its neighbour
without a backup is what the backup takes. Blocks are long enough for the thread to end within
them, so that its share of the processor counts. As many updates come before each, with the first
backup of a `fit`, for which the memory of the copy is got from the system. Needs 5 GB of memory and
1.2 GB of disk.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

import command_line
from absl import flags
from benchmarks import markdown, provenance

if TYPE_CHECKING:
    import keras

PROGRAM = "backup_time.py"

_MARKDOWN = flags.DEFINE_string("markdown", None, "File for the table, a .md.")
_DIRECTORY = flags.DEFINE_string("directory", None, "Where backups go. By default to /tmp.")
_LAYERS = flags.DEFINE_integer("layers", 6, "Layers of 16.8 million parameters.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 512, "Samples of an update.", lower_bound=1)
_UPDATES = flags.DEFINE_integer("updates", 24, "Updates of a block.", lower_bound=4)
_BLOCKS = flags.DEFINE_integer("blocks", 5, "Blocks of each kind.", lower_bound=1)
_SECONDS = flags.DEFINE_integer(
    "every", 60, "Seconds between backups, for the ratio.", lower_bound=1
)

WIDTH = 4096

KINDS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "at once": {"save_on_background": False},
    "save_on_background": {"save_on_background": True},
}


def _block(model: keras.Model, data: Any, options: dict[str, Any] | None) -> dict[str, float]:
    """Seconds of a block of updates: on the clock, of the processor, and with training stopped."""
    import keras

    import tfbig

    class Clock(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.begin = self.begin_cpu = self.end = self.end_cpu = 0.0
            self.last = self.between = 0.0

        def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
            now = time.perf_counter()
            if batch == _UPDATES.value:
                self.begin, self.begin_cpu = now, sum(os.times()[:2])
            elif batch > _UPDATES.value:
                self.between += now - self.last

        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            self.last = self.end = time.perf_counter()
            self.end_cpu = sum(os.times()[:2])
            names = [thread.name for thread in threading.enumerate()]
            if batch + 1 in (_UPDATES.value, 2 * _UPDATES.value) and "tfbig backup" in names:
                raise RuntimeError("The thread is still writing: pass more --updates.")

    clock = Clock()
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
        callbacks: list[keras.callbacks.Callback] = [clock]
        if options is not None:
            # One before the block, one in its middle; the next would be after its end.
            freq = 3 * _UPDATES.value // 4
            callbacks.append(tfbig.callbacks.BackupAndRestore(directory, freq, **options))
        model.fit(data, verbose=0, callbacks=callbacks)
    return {
        "wall": clock.end - clock.begin,
        "cpu": clock.end_cpu - clock.begin_cpu,
        "stopped": clock.between,
    }


def _measure() -> tuple[int, dict[str, list[dict[str, float]]]]:
    import keras
    import numpy as np
    import tensorflow as tf

    import tfbig

    keras.utils.set_random_seed(0)
    model = tfbig.Sequential(
        [keras.Input((WIDTH,)), *(keras.layers.Dense(WIDTH) for _ in range(_LAYERS.value))],
        gradient_accumulation_steps=1,
    )
    model.compile(keras.optimizers.Adam(1e-5), "mse")
    x = np.random.default_rng(0).normal(size=(_BATCH.value, WIDTH)).astype("float32")
    data = tf.data.Dataset.from_tensors((x, x)).cache().repeat(2 * _UPDATES.value)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    # Traces the step, and touches the memory that copies and files take.
    for options in KINDS.values():
        _block(model, data, options)
    for i in range(_BLOCKS.value):
        # Both orders, since the load of the machine drifts.
        kinds = list(KINDS.items())
        for kind, options in kinds if i % 2 else reversed(kinds):
            taken = _block(model, data, options)
            found[kind].append(taken)
            print(kind, {name: round(value, 2) for name, value in taken.items()}, flush=True)
    return model.count_params(), found


def _run() -> int:
    if _MARKDOWN.value is not None:
        command_line.check_file(_MARKDOWN.value, "markdown")
    with command_line.quiet_start():
        import tfbig  # noqa: F401
    origin = provenance.collect(__file__, ("tensorflow", "keras", "tfbig"), [])
    parameters, found = _measure()
    rows = []
    for kind, blocks in found.items():
        more = {
            name: statistics.median(
                block[name] - plain[name]
                for block, plain in zip(blocks, found["none"], strict=True)
            )
            for name in ("wall", "cpu")
        }
        median = {name: statistics.median(b[name] for b in blocks) for name in blocks[0]}
        rows.append(
            (
                kind,
                *(f"{median[name]:.2f}" for name in ("wall", "cpu", "stopped")),
                *((f"{more['wall']:.2f}", f"{more['cpu']:.2f}") if kind != "none" else ("", "")),
                f"{100 * more['wall'] / _SECONDS.value:.1f}" if kind != "none" else "",
            )
        )
        print(" ".join(rows[-1]), flush=True)
    if _MARKDOWN.value is not None:
        title = (
            f"Blocks of {_UPDATES.value} updates, {parameters / 1e6:.0f} million parameters "
            f"with Adam; medians of {_BLOCKS.value}, in seconds"
        )
        names = (
            "backup",
            "wall",
            "CPU",
            "between updates",
            "wall, more than none",
            "CPU, more than none",
            f"% of {_SECONDS.value} s",
        )
        markdown.write(_MARKDOWN.value, origin, [markdown.Table(title, names, rows)], [])
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "nothing is written")
