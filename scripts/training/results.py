"""What a run leaves at its end: the model, its curves, a table and whether it reached the bar."""

from __future__ import annotations

import math
import pathlib
import resource
import sys
from typing import TYPE_CHECKING

import keras
import numpy as np

from training import curves, directory, history

if TYPE_CHECKING:
    from tasks.task import Task

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def save(
    model: keras.Model, recorder: history.Recorder, task: Task, about: str, path: pathlib.Path
) -> None:
    """Writes the model, reads it back, and draws the curves if matplotlib is installed.

    Args:
        model: The trained model.
        recorder: Its history.
        task: What it was trained on.
        about: What the title of the curves says of the run.
        path: The output directory.
    """
    # First what cannot be made again.
    model.save(path / "model.keras")
    loaded = keras.saving.load_model(path / "model.keras")
    for saved, read in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(saved, read)
    if recorder.epochs and curves.can_draw():
        replicas = model.distribute_strategy.num_replicas_in_sync
        curves.plot(recorder, task, f"{about}, {replicas} replica(s)", path / "curves.png")


def conclude(
    model: keras.Model,
    recorder: history.Recorder,
    task: Task,
    about: str,
    batch_size: int,
    run: directory.RunDirectory,
) -> bool:
    """Saves the trained model and judges it; the run is complete then.

    Args:
        model: The trained model.
        recorder: Its history, of at least one epoch.
        task: What it was trained on.
        about: What the title of the curves says of the run.
        batch_size: The effective batch, the last one if it grew.
        run: The output directory.

    Returns:
        Whether the bar was reached.
    """
    save(model, recorder, task, about, run.path)
    for line in task.conclude(model, run.path):
        print(line)
    _print_table(model, recorder, batch_size, len(task.train[0]), task.measure)
    left = [name for name in directory.RESULTS if (run.path / name).exists()]
    print(f"\n{', '.join(left)} are in {run.path}")
    if run.has_own_backup:
        print(f"{run.backup} holds the end of this run: remove it to start over")
    value = recorder.epochs[-1][task.measure]
    is_reached = task.reaches_bar(value)
    bar = f"bar {'below ' if task.lower_is_better else ''}{task.bar:.4g}"
    print(f"{task.measure} {value:.4f} ({bar}{'' if is_reached else ', missed'})")
    run.end()
    return is_reached


def _print_table(
    model: keras.Model, recorder: history.Recorder, batch_size: int, samples: int, measure: str
) -> None:
    replicas = model.distribute_strategy.num_replicas_in_sync
    effective = min(batch_size, samples)
    share = math.ceil(effective / replicas)
    steps = model.gradient_accumulation_steps
    micro_batch = model.micro_batch_size or (steps and math.ceil(share / steps))
    # With "auto" it is unknown until something is trained.
    micro_batch = micro_batch and min(micro_batch, share)
    # The first epoch also traces the step, so it counts only if it is the only one.
    timed = recorder.seconds[1:] or recorder.seconds
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
    scale = "none" if model.loss_scale is None else f"{model.loss_scale:g}"
    rows = {
        "parameters": f"{sum(math.prod(v.shape) for v in model.trainable_variables):,}",
        "effective batch": effective,
        "micro-batch": micro_batch or "auto",
        "micro-batches per update": (
            f"{math.ceil(share / micro_batch)} per replica" if micro_batch else "auto"
        ),
        "replicas": replicas,
        "stages": 1 if model.pipeline is None else len(model.pipeline.devices),
        "updates": history.updates(model),
        "skipped updates": model.skipped_updates,
        "loss scale": scale,
        "samples/s": f"{samples * len(timed) / sum(timed):,.0f}" if timed else "no whole epoch",
        "peak memory": f"{memory / 2**20:,.0f} MiB",
        measure.replace("val_", "validation ").replace(
            "_", " "
        ): f"{recorder.epochs[-1][measure]:.4f}",
    }
    width = max(map(len, rows))
    print()
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
