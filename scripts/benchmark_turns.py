"""Rows of benchmark.py in one process, an update of each in turn.

What else runs on a shared machine slows all of them alike, so the ratio of two that follow each
other is steadier than that of two processes.
"""

import statistics
import time

import benchmark_keras
import benchmark_models
import benchmark_rows

ROWS = ("built_in", "micro", "tfbig", "jit", "recompute")


def _updates(task):
    """A function that trains one effective batch; the row is compiled and warm."""
    import tensorflow as tf

    k = task.gradient_accumulation_steps
    model = benchmark_keras._model(task.row, k, *benchmark_models.MODELS[task.model]())
    x, y = benchmark_models.data(task.model, task.batch_size)
    calls = k if task.row in ("built_in", "micro") else 1
    x, y = (a.reshape(calls, -1, *a.shape[1:]) for a in (x, y))
    iterator = iter(tf.data.Dataset.from_tensor_slices((x, y)).repeat().prefetch(2))
    # Makes the optimizer, the metrics and the function.
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)), shuffle=False, verbose=0)

    def update():
        for _ in range(calls):
            logs = model.train_function(iterator)
        float(logs["loss"])

    update()
    return update


def measure(tasks):
    """Measures tasks of one model and cut in turn, and prints what it finds.

    Args:
        tasks: list of `benchmark_process.Task`; ratios are to the first.

    Returns:
        List of dictionaries, one for each task.
    """
    benchmark_keras._limit_threads(tasks[0].threads)
    import keras

    keras.utils.set_random_seed(0)
    updates = [_updates(task) for task in tasks]
    seconds = [[] for _ in tasks]
    for i in range(tasks[0].batches):
        turns = list(zip(updates, seconds, strict=True))
        # The first of a round finds other caches than the last.
        for update, taken in turns if i % 2 else reversed(turns):
            begin = time.perf_counter()
            update()
            taken.append(time.perf_counter() - begin)
    found = []
    for task, taken in zip(tasks, seconds, strict=True):
        ratios = [a / b for a, b in zip(taken, seconds[0], strict=True)]
        row = {
            "model": task.model,
            "gradient_accumulation_steps": task.gradient_accumulation_steps,
            "row": benchmark_rows.ROWS[task.row],
            "effective_batch": task.batch_size,
            "seconds": statistics.median(taken),
            "ratio": statistics.median(ratios),
        }
        found.append(row)
        print(
            f"{task.model:<6}{task.gradient_accumulation_steps:>4}  {row['row']:<42}"
            f"{task.batch_size / row['seconds']:>10.1f}{row['ratio']:>7.3f}"
        )
    return found
