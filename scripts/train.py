"""Trains a task with tfbig, on whatever there is.

`--batch_size` is the effective batch: all samples of one update, over all
replicas. How it is cut, and over how many replicas, changes time and memory,
not the mathematics.

    python scripts/train.py --batch_size=512 --micro_batch_size=32 \\
        --strategy=mirrored --replicas=2 --precision=mixed_float16

The output directory then holds history.csv, curves.png and model.keras.
"""

import csv
import dataclasses
import math
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable

import command_line
import digits_data
from absl import flags

PROGRAM = "train.py"

# TensorFlow, Keras and tfbig are imported after the flags are checked: they take
# seconds, which `--help` and a mistyped flag need not.

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


# --- Tasks -------------------------------------------------------------------


@dataclasses.dataclass
class Task:
    """What is trained on what.

    Attributes:
        train: `(x, y)` arrays.
        validation: `(x, y)` arrays.
        make_layers: Function that makes the layers of a Sequential model.
        loss: a Keras loss.
    """

    train: tuple
    validation: tuple
    make_layers: Callable
    loss: object


def digits():
    """Scanned digits, which scikit-learn ships."""
    import keras
    from keras import layers

    train, validation = digits_data.load()

    def make_layers():
        convolution = {"kernel_size": 3, "padding": "same", "activation": "relu"}
        return [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, **convolution),
            layers.Conv2D(32, **convolution),
            layers.MaxPooling2D(),
            layers.Conv2D(64, **convolution),
            layers.MaxPooling2D(),
            layers.Flatten(),
            # Logits in at least float32: a softmax in float16 loses its tail.
            layers.Dense(10, dtype=keras.config.floatx()),
        ]

    return Task(
        train=train,
        validation=validation,
        make_layers=make_layers,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


TASKS = {"digits": digits}


# --- Flags -------------------------------------------------------------------

_TASK = flags.DEFINE_enum("task", "digits", sorted(TASKS), "What to train.")
_STRATEGY = flags.DEFINE_enum(
    "strategy",
    "auto",
    ["auto", "multi_worker", "mirrored", "one_device", "default"],
    "The tf.distribute strategy. auto: all workers that TF_CONFIG or SLURM list, else all GPUs, "
    "else the CPU. mirrored uses GPUs where there are any, else logical CPU devices.",
)
_REPLICAS = flags.DEFINE_integer(
    "replicas",
    None,
    "Replicas of --strategy=mirrored. By default all GPUs, or 2 logical CPU devices.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 512, "Effective batch: samples of one update, over all replicas.", lower_bound=1
)
_MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size", None, "Samples per replica and forward pass.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
    "gradient_accumulation_steps",
    None,
    "Micro-batches per replica and update, instead of --micro_batch_size.",
    lower_bound=1,
)
_PRECISION = flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_float16", "mixed_bfloat16", "float64"],
    "Keras's dtype policy.",
)
_LOSS_SCALE = flags.DEFINE_string(
    "loss_scale",
    "auto",
    "auto (dynamic where the model computes in float16, else none), dynamic, none, or a number "
    "> 0 for a fixed scale.",
)
_EPOCHS = flags.DEFINE_integer("epochs", 40, "Passes over the training data.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 0.01, "Adam's learning rate at the start; it falls to 0 along a cosine."
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where the results go. By default runs/<task>."
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace a run that --output_dir holds.")
_BACKUP_DIR = flags.DEFINE_string(
    "backup_dir",
    None,
    "Where backups go. A run that was interrupted, and is started again with the same flags, goes "
    "on from the last one. All workers must see the directory.",
)
_BACKUP_FREQ = flags.DEFINE_integer(
    "backup_freq", None, "Updates from one backup to the next. By default an epoch.", lower_bound=1
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of weights, shuffling and dropout.", lower_bound=0, upper_bound=2**32 - 1
)
_JIT_COMPILE = flags.DEFINE_boolean(
    "jit_compile", False, "Compile with XLA. On CPU, convolutions are slow so."
)
_STEPS_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution", 1, "Updates per call of the compiled function.", lower_bound=1
)
_VERBOSE = flags.DEFINE_integer(
    "verbose",
    1,
    "0: silent but for the table, 1: progress bar, 2: one line per epoch.",
    lower_bound=0,
    upper_bound=2,
)


def _loss_scale():
    """The value of --loss_scale as tfbig takes it; ValueError if there is none."""
    text = _LOSS_SCALE.value
    if text in ("auto", "dynamic"):
        return text
    return None if text == "none" else float(text)


@flags.validator("loss_scale", "it must be auto, dynamic, none or a finite number > 0")
def _is_loss_scale(text):
    if text in ("auto", "dynamic", "none"):
        return True
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


@flags.validator("learning_rate", "it must be a finite number > 0")
def _is_learning_rate(value):
    return 0 < value < math.inf


@flags.multi_flags_validator(
    ["micro_batch_size", "gradient_accumulation_steps"],
    "they cut the same batch: give at most one of them",
)
def _one_cut(values):
    return None in values.values()


@flags.multi_flags_validator(["backup_dir", "backup_freq"], "--backup_freq needs --backup_dir")
def _backups_have_a_place(values):
    return values["backup_freq"] is None or values["backup_dir"]


@flags.multi_flags_validator(
    ["strategy", "replicas"], "--replicas=2 and more need --strategy=mirrored"
)
def _replicas_have_a_strategy(values):
    return values["strategy"] == "mirrored" or values["replicas"] in (None, 1)


RESULTS = ("history.csv", "curves.png", "model.keras")


def _prepare_output_dir():
    """The output directory, empty of results and writable."""
    path = pathlib.Path(_OUTPUT_DIR.value or f"runs/{_TASK.value}")
    command_line.make_writable(path)
    found = [name for name in RESULTS if (path / name).exists()]
    backup = pathlib.Path(_BACKUP_DIR.value or path / "no backup")
    if found and not _OVERWRITE.value and not backup.exists():
        raise command_line.UsageError(
            f"--output_dir={path} already holds a run ({', '.join(found)}). Choose another "
            "or add --overwrite."
        )
    return path


# --- Training ----------------------------------------------------------------


def _start():
    """Configures TensorFlow; returns the strategy."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    import keras

    import tfbig

    devices = _REPLICAS.value
    if _STRATEGY.value == "mirrored" and not tf.config.list_physical_devices("GPU"):
        devices = devices or 2
    strategy = tfbig.distribute.get_strategy(
        _STRATEGY.value, devices=devices if _STRATEGY.value == "mirrored" else None
    )
    if _PRECISION.value == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(_PRECISION.value)
    keras.utils.set_random_seed(_SEED.value)
    if _PRECISION.value == "mixed_float16":
        # At the first float16 operation TensorFlow remarks on the processor.
        tf.matmul(tf.ones((1, 1), tf.float16), tf.ones((1, 1), tf.float16))
    return strategy


def _make_model(task, strategy, updates):
    import keras

    import tfbig

    schedule = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE.value, updates)
    with strategy.scope():
        model = tfbig.Sequential(
            task.make_layers(),
            micro_batch_size=_MICRO_BATCH_SIZE.value,
            gradient_accumulation_steps=_STEPS.value,
            loss_scale=_loss_scale(),
            name=_TASK.value,
        )
        model.compile(
            keras.optimizers.Adam(schedule),
            task.loss,
            metrics=["accuracy"],
            jit_compile=_JIT_COMPILE.value,
            steps_per_execution=_STEPS_PER_EXECUTION.value,
        )
    return model


def _updates(model):
    # int() of a Keras variable fails under MirroredStrategy (Keras 3.15).
    return int(model.optimizer.iterations.numpy())


def _make_recorder(path):
    """A callback that keeps what the table and the curves need, and writes history.csv.

    Args:
        path: Where to; of a run that goes on, it holds the epochs so far. None: nowhere.
    """
    import keras

    class Recorder(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.epochs = None  # Logs of each epoch; None before the first.
            self.scales = []  # (updates tried, loss scale, skipped updates).
            self.seconds = []  # Of training, without validation, per epoch.

        def on_epoch_begin(self, epoch, logs=None):
            if self.epochs is None:
                self.epochs = _read_history(path, epoch)
            self._began, self._ended = time.perf_counter(), None

        def on_train_end(self, logs=None):
            if self.epochs is None:  # All were complete.
                self.epochs = _read_history(path, _EPOCHS.value)

        def on_train_batch_end(self, batch, logs=None):
            self._ended = time.perf_counter()
            if "loss_scale" in logs:
                skipped = int(logs["skipped_updates"])
                tried = _updates(self.model) + skipped
                self.scales.append((tried, float(logs["loss_scale"]), skipped))

        def on_epoch_end(self, epoch, logs=None):
            self.epochs.append({k: float(v) for k, v in logs.items()})
            if self._ended is not None:
                self.seconds.append(self._ended - self._began)
            if path is not None:
                _write_history(path, self.epochs)

    return Recorder()


def _read_history(path, epochs):
    """The logs of the first epochs in history.csv; fewer if it holds fewer."""
    if path is None or not epochs or not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))[:epochs]
    return [{k: float(v) for k, v in row.items() if k != "epoch"} for row in rows]


def _write_history(path, epochs):
    # Whole, and in one step: a run may be killed at any time, and go on.
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *sorted(epochs[-1])])
        writer.writeheader()
        writer.writerows({"epoch": i, **logs} for i, logs in enumerate(epochs))
    temporary.replace(path)


# --- Results -----------------------------------------------------------------


def _save(model, recorder, path):
    """Writes the curves and the model, and reads the model back."""
    import keras
    import numpy as np

    if recorder.epochs:
        _plot(recorder, model, path / "curves.png")
    model.save(path / "model.keras")
    loaded = keras.saving.load_model(path / "model.keras")
    for saved, read in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(saved, read)


def _plot(recorder, model, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = 3 if recorder.scales else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(4.4 * panels, 3.8), layout="constrained")
    epochs = range(1, len(recorder.epochs) + 1)
    marker = "o" if len(epochs) == 1 else None
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=False):
        for prefix, label in (("", "training"), ("val_", "validation")):
            values = [logs[prefix + metric] for logs in recorder.epochs]
            axis.plot(epochs, values, label=label, marker=marker)
        axis.set(title=metric.capitalize(), xlabel="epoch")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    last = recorder.epochs[-1]["val_accuracy"]
    axes[1].annotate(
        f"validation {last:.4f}",
        (epochs[-1], last),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
    )
    if recorder.scales:
        _plot_scale(axes[2], recorder.scales)
    figure.suptitle(
        f"{_TASK.value}: effective batch {_BATCH_SIZE.value}, {_PRECISION.value}, "
        f"{model.distribute_strategy.num_replicas_in_sync} replica(s)"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_scale(axis, scales):
    tried, values, skipped = zip(*scales, strict=True)
    axis.step(tried, values, where="post", color="tab:green")
    pairs = zip(skipped, (0, *skipped[:-1]), strict=True)
    skips = [i for i, (now, before) in enumerate(pairs) if now > before]
    axis.plot(
        [tried[i] for i in skips],
        [values[i] for i in skips],
        "x",
        color="tab:red",
    )
    axis.set_yscale("log", base=2)
    # A scale that never moved would otherwise fill the axis with nothing.
    axis.set_ylim(min(values) / 4, max(values) * 4)
    title = f"Loss scale (x: {skipped[-1]} skipped)" if skips else "Loss scale (no skipped update)"
    axis.set(title=title, xlabel="update")
    axis.grid(alpha=0.3)


def _print_table(model, recorder, samples, validation_accuracy):
    replicas = model.distribute_strategy.num_replicas_in_sync
    share = math.ceil(min(_BATCH_SIZE.value, samples) / replicas)
    micro_batch = model.micro_batch_size or math.ceil(share / model.gradient_accumulation_steps)
    micro_batch = min(micro_batch, share)
    # The first epoch traces the step, and does not count where there are others.
    timed = recorder.seconds[1:] or recorder.seconds
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
    scale = "none" if model.loss_scale is None else f"{model.loss_scale:g}"
    rows = {
        "effective batch": min(_BATCH_SIZE.value, samples),
        "micro-batch": micro_batch,
        "micro-batches per update": f"{math.ceil(share / micro_batch)} per replica",
        "replicas": replicas,
        "updates": _updates(model),
        "skipped updates": model.skipped_updates,
        "loss scale": scale,
        "samples/s": f"{samples * len(timed) / sum(timed):,.0f}" if timed else "nothing trained",
        "peak memory": f"{memory / 2**20:,.0f} MiB",
        "validation accuracy": f"{validation_accuracy:.4f}",
    }
    width = max(map(len, rows))
    print()
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _train(path):
    with command_line.quiet_start():
        strategy = _start()
    import tensorflow as tf

    import tfbig

    task = TASKS[_TASK.value]()
    (x, y), validation = task.train, task.validation
    updates = _EPOCHS.value * math.ceil(len(x) / _BATCH_SIZE.value)
    is_chief = tfbig.distribute.is_chief(strategy)
    recorder = _make_recorder(path / "history.csv" if is_chief else None)
    callbacks = [recorder]
    if _BACKUP_DIR.value:
        # Kept: a job that is started again after its end, since one worker failed at the very
        # last, finds it complete.
        backup = tfbig.callbacks.BackupAndRestore(
            _BACKUP_DIR.value, _BACKUP_FREQ.value or "epoch", delete_checkpoint=False
        )
        callbacks.append(backup)
    model = None
    try:
        model = _make_model(task, strategy, updates)
        # Only now, so that a run that cannot begin leaves the old one.
        if is_chief and not (_BACKUP_DIR.value and os.path.exists(_BACKUP_DIR.value)):
            for name in RESULTS:
                (path / name).unlink(missing_ok=True)
            if _BACKUP_DIR.value:
                # Tells a run that ended before its first backup from one that is complete.
                os.makedirs(_BACKUP_DIR.value)
        model.fit(
            x,
            y,
            batch_size=_BATCH_SIZE.value,
            epochs=_EPOCHS.value,
            validation_data=validation,
            validation_batch_size=_BATCH_SIZE.value,
            verbose=_VERBOSE.value if is_chief else 0,
            callbacks=callbacks,
        )
    except KeyboardInterrupt:
        # A second Ctrl-C would leave half a file.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if model is not None and model.optimizer.built and is_chief:
            _save(model, recorder, path)
            done = _updates(model)
            return command_line.interrupted(
                PROGRAM, f"{done} of {updates} updates are saved in {path}"
            )
        return command_line.interrupted(
            PROGRAM, "nothing is trained yet" if is_chief else "the chief saves"
        )
    except tfbig.errors.InvalidOptionError as e:
        raise command_line.UsageError(e) from None
    except tfbig.errors.TfbigError as e:
        print(f"\ntrain.py: {e}", file=sys.stderr)
        return 1
    except tf.errors.UnavailableError as e:
        print(f"\ntrain.py: another worker ended: {e.message.splitlines()[0]}", file=sys.stderr)
        # With a backup it is worth to start again, which Kubeflow does after this code.
        return tfbig.callbacks.PREEMPTED if _BACKUP_DIR.value else 1
    if is_chief and not recorder.epochs:
        raise command_line.UsageError(
            f"{_BACKUP_DIR.value} holds the end of a run whose history.csv is not in {path}. Give "
            "--output_dir of that run, or remove the backup to train anew."
        )
    if is_chief:
        _save(model, recorder, path)
        _print_table(model, recorder, len(x), recorder.epochs[-1]["val_accuracy"])
        print(f"\n{', '.join(RESULTS)} are in {path}")
        if _BACKUP_DIR.value:
            print(f"{_BACKUP_DIR.value} holds the end of this run: remove it to train anew")
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, lambda: _train(_prepare_output_dir()), "nothing is trained yet")
