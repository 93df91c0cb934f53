"""Trains a task with tfbig, on whatever there is.

`--batch_size` is the effective batch: all samples of one update, over all
replicas. How it is cut, and over how many replicas, changes time and memory,
not the mathematics.

    python scripts/train.py --batch_size=512 --micro_batch_size=32 \\
        --strategy=mirrored --replicas=2 --precision=mixed_float16
    python scripts/train.py --task=language
    python scripts/train.py --task=speech --micro_batch_size=auto

The output directory then holds history.csv, model.keras and, with matplotlib, curves.png, and in
`monitor` what `tfbig.callbacks.TrainingMonitor` writes about every second. A run that was
interrupted goes on with `--resume`. At its end a run says whether it reached the bar of its task.
"""

import dataclasses
import math
import signal
import sys

import command_line
import run_directory
from absl import flags
from tasks import TASKS

PROGRAM = "train.py"

# TensorFlow, Keras and tfbig are imported after the flags are checked: they take
# seconds, which `--help` and a mistyped flag need not.

# Said of a run that ended between its last update and its last file.
_TRAINED = "training is complete, and --resume saves and judges it"


# --- Flags -------------------------------------------------------------------

_TASK = flags.DEFINE_enum("task", "digits", sorted(TASKS), "What to train.")
_STRATEGY = flags.DEFINE_enum(
    "strategy",
    "auto",
    ["auto", "tpu", "multi_worker", "mirrored", "one_device", "default"],
    "The tf.distribute strategy. auto: a TPU, else all workers that TF_CONFIG or SLURM list, else "
    "all GPUs, else the CPU. mirrored uses GPUs where there are any, else logical CPU devices. "
    "tpu: the one of this machine, or that of the environment's TPU_NAME.",
)
_REPLICAS = flags.DEFINE_integer(
    "replicas",
    None,
    "Replicas of --strategy=mirrored. By default all GPUs, or 2 logical CPU devices.",
    lower_bound=1,
)


def _per_task(name):
    return ", ".join(f"{task}: {getattr(TASKS[task].DEFAULTS, name)}" for task in sorted(TASKS))


_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Effective batch: samples of one update, over all replicas. By default the task's "
    f"({_per_task('batch_size')}).",
    lower_bound=1,
)
_MICRO_BATCH_SIZE = flags.DEFINE_string(
    "micro_batch_size", None, "Samples per replica and forward pass, or auto: the most that fit."
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
_EPOCHS = flags.DEFINE_integer(
    "epochs",
    None,
    f"Passes over the training data. By default the task's ({_per_task('epochs')}).",
    lower_bound=1,
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    None,
    "The highest learning rate; it falls to 0 along a cosine, but not that of gan. By default the "
    f"task's ({_per_task('learning_rate')}).",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where the results go. By default runs/<task>."
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace a run that --output_dir holds.")
_RESUME = flags.DEFINE_boolean(
    "resume",
    False,
    "Go on with the interrupted run in --output_dir, from its last backup; anew if it ended before "
    "the first.",
)
_REQUIRE_BAR = flags.DEFINE_boolean(
    "require_bar", False, "End with exit code 3 if the run misses the bar of its task."
)
_BACKUP_DIR = flags.DEFINE_string(
    "backup_dir",
    None,
    "Where backups go; by default into --output_dir. Where it is given, a run that was "
    "interrupted and is started again with the same flags goes on without --resume. All workers "
    "must see the directory.",
)
_BACKUP_FREQ = flags.DEFINE_integer(
    "backup_freq", None, "Updates from one backup to the next. By default an epoch.", lower_bound=1
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of weights, shuffling and dropout.", lower_bound=0, upper_bound=2**32 - 1
)
_JIT_COMPILE = flags.DEFINE_boolean(
    "jit_compile",
    None,
    "Compile with XLA. On CPU, convolutions are slow so. By default the task's "
    f"({_per_task('jit_compile')}).",
)
_STEPS_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution", 1, "Updates per call of the compiled function.", lower_bound=1
)
_MONITOR = flags.DEFINE_boolean(
    "monitor",
    True,
    "Write speed, memory, loss scale and more into --output_dir/monitor: training.csv, "
    "training.png, and TensorBoard's events where it is installed.",
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
    return value is None or 0 < value < math.inf


@flags.validator("micro_batch_size", "it must be auto or an integer >= 1")
def _is_micro_batch_size(text):
    return text in (None, "auto") or (text.isdecimal() and int(text) >= 1)


@flags.multi_flags_validator(
    ["micro_batch_size", "gradient_accumulation_steps"],
    "they cut the same batch: give at most one of them",
)
def _one_cut(values):
    return None in values.values()


@flags.multi_flags_validator(
    ["strategy", "replicas"], "--replicas=2 and more need --strategy=mirrored"
)
def _replicas_have_a_strategy(values):
    return values["strategy"] == "mirrored" or values["replicas"] in (None, 1)


@flags.multi_flags_validator(["resume", "overwrite"], "give at most one of them")
def _goes_on_or_begins(values):
    return not all(values.values())


@flags.multi_flags_validator(
    ["overwrite", "backup_dir"],
    "a job that is started again with the same flags would lose what it has trained: remove the "
    "old run and its backup, and leave --overwrite out",
)
def _keeps_its_progress(values):
    return not all(values.values())


# --- Settings ----------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """The flags, with the task's defaults in place of those that were not given."""

    batch_size: int
    epochs: int
    learning_rate: float
    jit_compile: bool

    @classmethod
    def of_flags(cls):
        defaults = dataclasses.asdict(TASKS[_TASK.value].DEFAULTS)
        given = {name: flags.FLAGS[name].value for name in defaults}
        return cls(**defaults | {k: v for k, v in given.items() if v is not None})


def _check_flags_of_tasks():
    """Refuses a flag of one task in a run of another, which would have no effect."""
    for name, module in TASKS.items():
        for flag in module.FLAGS:
            if name != _TASK.value and flags.FLAGS[flag].present:
                raise command_line.UsageError(
                    f"--{flag} goes with --task={name}. Received: --task={_TASK.value}."
                )


def _micro_batch_size():
    text = _MICRO_BATCH_SIZE.value
    return text if text in (None, "auto") else int(text)


def _run_directory(settings):
    """The directory of this run, which may begin or go on there."""
    what = {
        "task": _TASK.value,
        "batch_size": settings.batch_size,
        "epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "precision": _PRECISION.value,
        "seed": _SEED.value,
        **{name: flags.FLAGS[name].value for name in TASKS[_TASK.value].FLAGS},
    }
    path = _OUTPUT_DIR.value or f"runs/{_TASK.value}"
    directory = run_directory.RunDirectory(path, what, _BACKUP_DIR.value)
    directory.prepare(_RESUME.value, _OVERWRITE.value)
    return directory


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
    try:
        strategy = tfbig.distribute.get_strategy(
            _STRATEGY.value, devices=devices if _STRATEGY.value == "mirrored" else None
        )
    except tfbig.errors.ClusterError as e:
        if _STRATEGY.value != "tpu":
            raise
        raise command_line.UsageError(e) from None
    if _PRECISION.value == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(_PRECISION.value)
    keras.utils.set_random_seed(_SEED.value)
    if _PRECISION.value == "mixed_float16":
        # At the first float16 operation TensorFlow remarks on the processor.
        tf.matmul(tf.ones((1, 1), tf.float16), tf.ones((1, 1), tf.float16))
    return strategy


def _make_model(task, strategy, updates, settings):
    with strategy.scope():
        model = task.make_model(
            micro_batch_size=_micro_batch_size(),
            gradient_accumulation_steps=_STEPS.value,
            loss_scale=_loss_scale(),
            name=_TASK.value,
        )
        model.compile(
            task.make_optimizer(settings.learning_rate, updates),
            task.loss,
            metrics=task.make_metrics(),
            jit_compile=settings.jit_compile,
            steps_per_execution=_STEPS_PER_EXECUTION.value,
        )
    return model


def _how_to_go_on(directory):
    if directory.holds_backup():
        return "--resume goes on from the last backup"
    return "there is no backup yet, so --resume begins anew"


def _train(directory, settings):
    module = TASKS[_TASK.value]
    with command_line.quiet_start():
        strategy = _start()
    import run_curves
    import run_history
    import run_interruption
    import run_results
    import tensorflow as tf

    import tfbig

    is_chief = tfbig.distribute.is_chief(strategy)
    about = f"{_TASK.value}: effective batch {settings.batch_size}, {_PRECISION.value}"
    recorder = model = monitor = None
    is_trained = False
    try:
        task = module.load(settings)
        samples = len(task.train[0])
        updates = settings.epochs * math.ceil(samples / settings.batch_size)
        recorder = run_history.Recorder(
            directory.path / "history.csv" if is_chief else None,
            settings.epochs,
            task.measure,
            directory.goes_on,
        )
        # The backup is kept until all is saved: a program that ends in between goes on from
        # there. One of its own is kept thereafter: a job that is started again after its end,
        # since one worker failed at the very last, finds it complete.
        backup = tfbig.callbacks.BackupAndRestore(
            directory.backup, _BACKUP_FREQ.value or "epoch", delete_checkpoint=False
        )
        monitor = tfbig.callbacks.TrainingMonitor(
            directory.path / run_directory.MONITOR, enabled=_MONITOR.value
        )
        model = _make_model(task, strategy, updates, settings)
        # Only now, so that a run that cannot begin leaves the old one.
        if is_chief:
            directory.begin()
        if is_chief and _RESUME.value and not directory.goes_on:
            print("train.py: there is no backup: training begins anew", file=sys.stderr)
        if is_chief and not run_curves.can_draw():
            # Not worth a refusal: the numbers are in history.csv.
            print("train.py: no pictures are drawn: pip install 'tfbig[plots]'", file=sys.stderr)
        with run_interruption.with_backup(PROGRAM):
            model.fit(
                *task.train,
                batch_size=settings.batch_size,
                epochs=settings.epochs,
                validation_data=task.validation,
                validation_batch_size=settings.batch_size,
                verbose=_VERBOSE.value if is_chief else 0,
                callbacks=[*task.callbacks, recorder, backup, monitor],
            )
        if not is_chief:
            return 0
        is_trained = True
        if not recorder.is_complete():
            raise command_line.UsageError(
                f"{directory.backup} holds the end of a run whose history.csv is not in "
                f"{directory.path}. Give --output_dir of that run, or remove the backup to train "
                "anew."
            )
        is_reached = run_results.conclude(
            model, recorder, task, about, settings.batch_size, directory
        )
        return 3 if _REQUIRE_BAR.value and not is_reached else 0
    except KeyboardInterrupt:
        # A second Ctrl-C would leave half a file.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if is_trained:
            return command_line.interrupted(PROGRAM, _TRAINED)
        if not is_chief:
            return command_line.interrupted(PROGRAM, "the chief saves")
        # Before an epoch has begun, a model that is to go on is not what its run has trained.
        has_begun = recorder is not None and recorder.epochs is not None
        if not has_begun or run_history.updates(model) == 0:
            done = "nothing is trained yet"
            if directory.goes_on:
                done = f"nothing is trained since; {_how_to_go_on(directory)}"
            return command_line.interrupted(PROGRAM, done)
        run_results.save(model, recorder, task, about, directory.path)
        monitor.draw()
        saved = f"{run_history.updates(model)} of {updates} updates are saved"
        return command_line.interrupted(
            PROGRAM, f"{saved} in {directory.path}; {_how_to_go_on(directory)}"
        )
    except OSError as e:
        if not is_trained:
            raise
        print(f"\ntrain.py: results cannot be written: {e}; {_TRAINED}", file=sys.stderr)
        return 1
    except (tfbig.errors.InvalidOptionError, tfbig.errors.BackupError) as e:
        raise command_line.UsageError(e) from None
    except tfbig.errors.TfbigError as e:
        print(f"\ntrain.py: {e}", file=sys.stderr)
        return 1
    except tf.errors.UnavailableError as e:
        print(f"\ntrain.py: another worker ended: {e.message.splitlines()[0]}", file=sys.stderr)
        # With a backup it is worth to start again, which Kubeflow does after this code.
        return tfbig.callbacks.PREEMPTED if directory.has_own_backup else 1


def _run():
    _check_flags_of_tasks()
    settings = Settings.of_flags()
    return _train(_run_directory(settings), settings)


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "training has not begun")
