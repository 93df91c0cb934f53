"""What a run leaves at its end: the model, its curves, a table and whether it reached the bar."""

import math
import resource
import sys

import keras
import numpy as np
import run_curves
import run_directory
import run_history

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def save(model, recorder, task, about, path):
    """Writes the model, reads it back, and draws the curves where that can be done.

    Args:
        model: The model that was trained.
        recorder: Its `run_history.Recorder`.
        task: Its `tasks.task.Task`.
        about: str, what the title of the curves says of the run.
        path: The output directory.
    """
    # First what cannot be made again.
    model.save(path / "model.keras")
    loaded = keras.saving.load_model(path / "model.keras")
    for saved, read in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(saved, read)
    if recorder.epochs and run_curves.can_draw():
        replicas = model.distribute_strategy.num_replicas_in_sync
        run_curves.plot(recorder, task, f"{about}, {replicas} replica(s)", path / "curves.png")


def conclude(model, recorder, task, about, batch_size, directory):
    """Saves what was trained and judges it.

    Args:
        model: The model that was trained.
        recorder: Its `run_history.Recorder`, with an epoch at least.
        task: Its `tasks.task.Task`.
        about: str, what the title of the curves says of the run.
        batch_size: int, the effective batch that was asked for.
        directory: The `run_directory.RunDirectory`, whose run is complete thereafter.

    Returns:
        bool, whether the bar was reached.
    """
    save(model, recorder, task, about, directory.path)
    for line in task.conclude(model, directory.path):
        print(line)
    _print_table(model, recorder, batch_size, len(task.train[0]), task.measure)
    left = [name for name in run_directory.RESULTS if (directory.path / name).exists()]
    print(f"\n{', '.join(left)} are in {directory.path}")
    if directory.has_own_backup:
        print(f"{directory.backup} holds the end of this run: remove it to train anew")
    value = recorder.epochs[-1][task.measure]
    is_reached = task.reaches_bar(value)
    bar = f"bar {'below ' if task.lower_is_better else ''}{task.bar:.4g}"
    print(f"{task.measure} {value:.4f} ({bar}{'' if is_reached else ', missed'})")
    directory.end()
    return is_reached


def _print_table(model, recorder, batch_size, samples, measure):
    replicas = model.distribute_strategy.num_replicas_in_sync
    effective = min(batch_size, samples)
    share = math.ceil(effective / replicas)
    steps = model.gradient_accumulation_steps
    micro_batch = model.micro_batch_size or (steps and math.ceil(share / steps))
    # Of "auto" it is not known until something is trained.
    micro_batch = micro_batch and min(micro_batch, share)
    # The first epoch traces the step, and does not count where there are others.
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
        "updates": run_history.updates(model),
        "skipped updates": model.skipped_updates,
        "loss scale": scale,
        "samples/s": f"{samples * len(timed) / sum(timed):,.0f}" if timed else "nothing trained",
        "peak memory": f"{memory / 2**20:,.0f} MiB",
        measure.replace("val_", "validation ").replace(
            "_", " "
        ): f"{recorder.epochs[-1][measure]:.4f}",
    }
    width = max(map(len, rows))
    print()
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
