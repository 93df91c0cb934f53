"""Rows of benchmark.py in one process, an update of each in turn.

Other load on a shared machine slows all of them alike, so the ratio of two neighbours is steadier
than that of two processes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import command_line

from benchmarks import floor, models, rows, with_keras
from benchmarks.markdown import Table
from benchmarks.process import Task

ROWS = ("built_in", "micro", "tfbig", "jit", "no_jit", "recompute", "pipeline")


def _updates(task: Task) -> Callable[[], None]:
    """A function that trains one effective batch; its row is compiled and warm."""
    import tensorflow as tf

    k = task.gradient_accumulation_steps
    model = with_keras.make_model(task.row, k, *models.MODELS[task.model]())
    x, y = models.data(task.model, task.batch_size)
    calls = k if task.row in ("built_in", "micro") else 1
    x, y = (a.reshape(calls, -1, *a.shape[1:]) for a in (x, y))
    iterator = iter(tf.data.Dataset.from_tensor_slices((x, y)).repeat().prefetch(2))
    # Builds the optimizer, the metrics and the function.
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)), shuffle=False, verbose=0)

    def update() -> None:
        for _ in range(calls):
            logs = model.train_function(iterator)
        float(logs["loss"])

    update()
    return update


def measure(tasks: list[Task]) -> list[dict[str, Any]]:
    """Measures tasks in turn and prints what it finds.

    Args:
        tasks: Tasks of one model and number of micro-batches; ratios are to the first.

    Returns:
        What --json holds of each task.
    """
    with command_line.quiet_start():
        with_keras.configure([task.row for task in tasks], tasks[0].threads)
        import keras
        import tensorflow as tf

        # It starts now, and not later.
        tf.config.list_logical_devices()

    keras.utils.set_random_seed(0)
    updates = [_updates(task) for task in tasks]
    seconds: list[list[float]] = [[] for _ in tasks]
    cpu_seconds: list[list[float]] = [[] for _ in tasks]
    multiply = floor.warm_multiplication(tasks[0].model, tasks[0].micro_batch_size)
    of_products: list[float] = []
    for i in range(tasks[0].batches):
        begin = time.perf_counter()
        multiply()
        of_products.append((time.perf_counter() - begin) / tasks[0].micro_batch_size)
        turns = list(zip(updates, seconds, cpu_seconds, strict=True))
        # Both orders, since the first of a round finds other caches than the last.
        for update, taken, cpu_taken in turns if i % 2 else reversed(turns):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            update()
            taken.append(time.perf_counter() - begin)
            cpu_taken.append(time.process_time() - cpu_begin)
    found = []
    for task, taken, cpu_taken in zip(tasks, seconds, cpu_seconds, strict=True):
        ratios = [a / b for a, b in zip(taken, seconds[0], strict=True)]
        row = {
            "model": task.model,
            "gradient_accumulation_steps": task.gradient_accumulation_steps,
            "row": rows.ROWS[task.row],
            "effective_batch": task.batch_size,
            "seconds": statistics.median(taken),
            "ratio": statistics.median(ratios),
            "cpu_seconds": statistics.median(cpu_taken),
            "floor_milliseconds": 1e3 * statistics.median(of_products),
            "floor_ratio": statistics.median(
                a / task.batch_size / b for a, b in zip(taken, of_products, strict=True)
            ),
        }
        found.append(row)
    for cells in (_HEADS, *map(_cells, found)):
        print("{:<6}{:>4}  {:<42}{:>10}{:>7}{:>8}{:>10}{:>9}".format(*cells))
    return found


_HEADS = ("model", "K", "row", "samples/s", "ratio", "CPU ms", "floor ms", "x floor")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["model"],
        str(row["gradient_accumulation_steps"]),
        row["row"],
        f"{row['effective_batch'] / row['seconds']:.1f}",
        f"{row['ratio']:.3f}",
        f"{1e3 * row['cpu_seconds'] / row['effective_batch']:.3g}",
        f"{row['floor_milliseconds']:.3g}",
        f"{row['floor_ratio']:.2f}",
    )


def table(measured: list[dict[str, Any]]) -> Table:
    """What `measure` has returned."""
    title = (
        "Medians, the rows in turn in one process; ratio of time to the first row; per sample, CPU "
        "time and the floor, which is the time of the matrix products and convolutions of a "
        "micro-batch alone"
    )
    return Table(title, _HEADS, [_cells(row) for row in measured])
