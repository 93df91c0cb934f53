"""The flags of train.py, with the defaults of the task in place of those that were not given."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import command_line
from absl import flags
from tasks import digits, gan, language, speech, task

from training import long_runs

TASKS = {"digits": digits, "gan": gan, "language": language, "speech": speech}


def _per_task(name: str) -> str:
    return ", ".join(f"{task}: {getattr(TASKS[task].DEFAULTS, name)}" for task in sorted(TASKS))


TASK = flags.DEFINE_enum("task", "digits", sorted(TASKS), "What to train.")
STRATEGY = flags.DEFINE_enum(
    "strategy",
    "auto",
    ["auto", "tpu", "multi_worker", "mirrored", "one_device", "default"],
    "The tf.distribute strategy. auto: a TPU, else all workers that TF_CONFIG or SLURM list, else "
    "all GPUs, else the CPU. mirrored uses GPUs if there are any, else logical CPU devices. "
    "tpu: the one of this machine, or the one that TPU_NAME in the environment names.",
)
REPLICAS = flags.DEFINE_integer(
    "replicas",
    None,
    "Replicas of --strategy=mirrored. By default all GPUs, or 2 logical CPU devices.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Effective batch: samples of one update, over all replicas. By default the task's "
    f"({_per_task('batch_size')}).",
    lower_bound=1,
)
_MICRO_BATCH_SIZE = flags.DEFINE_string(
    "micro_batch_size",
    None,
    "Samples per replica and forward pass, or auto: as many as fit into memory.",
)
STEPS = flags.DEFINE_integer(
    "gradient_accumulation_steps",
    None,
    "Micro-batches per replica and update, instead of --micro_batch_size.",
    lower_bound=1,
)
SHARD = flags.DEFINE_enum(
    "shard",
    None,
    ["optimizer", "weights"],
    "What is divided over the replicas instead of copied to each. By default nothing.",
)
PIPELINE = flags.DEFINE_integer(
    "pipeline",
    0,
    "Stages that the layers are divided into, each on a device of its own; 0 or 1: none. The "
    "devices are GPUs if there are any, else logical CPU devices. With several GPUs, give "
    "--strategy=mirrored, too: by default, --replicas is then the GPUs divided by the stages.",
    lower_bound=0,
)
PRECISION = flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_float16", "mixed_bfloat16", "float64"],
    "Keras's dtype policy.",
)
_LOSS_SCALE = flags.DEFINE_string(
    "loss_scale",
    "auto",
    "auto (dynamic if the model computes in float16, else none), dynamic, none, or a number "
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
    "The highest learning rate. It falls to 0 along a cosine, except in gan. By default the "
    f"task's ({_per_task('learning_rate')}).",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where the results go. By default runs/<task>."
)
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace a run that --output_dir holds.")
RESUME = flags.DEFINE_boolean(
    "resume",
    False,
    "Resume the interrupted run in --output_dir from its last backup, or start over if it ended "
    "before the first one.",
)
REQUIRE_BAR = flags.DEFINE_boolean(
    "require_bar", False, "End with exit code 3 if the run misses the bar of its task."
)
BACKUP_DIR = flags.DEFINE_string(
    "backup_dir",
    None,
    "Where backups go; by default into --output_dir. If it is given, an interrupted run resumes "
    "without --resume when it is started again with the same flags. All workers must see the "
    "directory.",
)
BACKUP_FREQ = flags.DEFINE_integer(
    "backup_freq", None, "Updates between two backups. By default an epoch.", lower_bound=1
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of weights, shuffling and dropout.", lower_bound=0, upper_bound=2**32 - 1
)
_JIT_COMPILE = flags.DEFINE_boolean(
    "jit_compile",
    None,
    "Compile with XLA, which is slow at convolutions on CPU. By default the task's "
    f"({_per_task('jit_compile')}), and never with --pipeline.",
)
STEPS_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution", 1, "Updates per call of the compiled function.", lower_bound=1
)
MONITOR = flags.DEFINE_boolean(
    "monitor",
    True,
    "Write speed, memory, loss scale and more into --output_dir/monitor: training.csv, "
    "training.png, and TensorBoard's events if it is installed.",
)
VERBOSE = flags.DEFINE_integer(
    "verbose",
    1,
    "0: silent but for the table, 1: progress bar, 2: one line per epoch.",
    lower_bound=0,
    upper_bound=2,
)


def loss_scale() -> str | float | None:
    """The value of --loss_scale as tfbig takes it."""
    text = _LOSS_SCALE.value
    if text in ("auto", "dynamic"):
        return text
    return None if text == "none" else float(text)


def micro_batch_size() -> str | int | None:
    """The value of --micro_batch_size as tfbig takes it."""
    text = _MICRO_BATCH_SIZE.value
    return text if text in (None, "auto") else int(text)


def stages() -> int:
    """The stages of --pipeline; 1 for none."""
    return max(1, PIPELINE.value)


def output_dir() -> str:
    """The value of --output_dir, or the default."""
    return _OUTPUT_DIR.value or f"runs/{TASK.value}"


@flags.validator("loss_scale", "it must be auto, dynamic, none or a finite number > 0")
def _is_loss_scale(text: str) -> bool:
    if text in ("auto", "dynamic", "none"):
        return True
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


@flags.validator("learning_rate", "it must be a finite number > 0")
def _is_learning_rate(value: float | None) -> bool:
    return value is None or 0 < value < math.inf


@flags.validator("micro_batch_size", "it must be auto or an integer >= 1")
def _is_micro_batch_size(text: str | None) -> bool:
    return text is None or text == "auto" or (text.isdecimal() and int(text) >= 1)


@flags.multi_flags_validator(
    ["micro_batch_size", "gradient_accumulation_steps"],
    "both split the same batch: give at most one of them",
)
def _split_once(values: dict[str, Any]) -> bool:
    return None in values.values()


@flags.multi_flags_validator(
    ["strategy", "replicas"], "--replicas=2 and more need --strategy=mirrored"
)
def _replicas_have_a_strategy(values: dict[str, Any]) -> bool:
    return values["strategy"] == "mirrored" or values["replicas"] in (None, 1)


for _name, _refused, _reason in (
    ("shard", ("optimizer", "weights"), "stages divide the model already: leave one of them out"),
    ("strategy", ("tpu",), "all cores of a TPU run one program: leave --pipeline out"),
    ("micro_batch_size", ("auto",), "it watches the memory of one device: give a number"),
    ("jit_compile", (True,), "XLA compiles for one device: leave --jit_compile out"),
):
    flags.register_multi_flags_validator(
        ["pipeline", _name],
        lambda values, name=_name, refused=_refused: (
            values["pipeline"] < 2 or values[name] not in refused
        ),
        _reason,
    )


@flags.multi_flags_validator(
    ["inject_spike", "shard"], "it flips whole weights: leave --shard=weights out"
)
def _spike_has_whole_weights(values: dict[str, Any]) -> bool:
    return values["inject_spike"] is None or values["shard"] != "weights"


@flags.multi_flags_validator(["resume", "overwrite"], "give at most one of them")
def _resumes_or_begins(values: dict[str, Any]) -> bool:
    return not all(values.values())


@flags.multi_flags_validator(
    ["overwrite", "backup_dir"],
    "a job that restarts with the same flags would lose its progress: remove the old run and its "
    "backup, and leave --overwrite out",
)
def _keeps_its_progress(values: dict[str, Any]) -> bool:
    return not all(values.values())


class Settings(task.Defaults):
    """The flags for which each task has defaults of its own, as they were given."""

    @classmethod
    def of_flags(cls) -> Settings:
        """The flags that were given, and the defaults of the task.

        Raises:
            UsageError: If a flag belongs to another task.
        """
        _check_flags_of_tasks()
        defaults = dataclasses.asdict(TASKS[TASK.value].DEFAULTS)
        if stages() > 1:
            defaults["jit_compile"] = False  # It does not go with stages.
        given = {name: flags.FLAGS[name].value for name in defaults}
        return cls(**defaults | {k: v for k, v in given.items() if v is not None})

    def identity(self) -> dict[str, Any]:
        """What decides the weights of a run, for run.json."""
        return {
            "task": TASK.value,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "precision": PRECISION.value,
            "seed": SEED.value,
            "batch_growth": ",".join(long_runs.BATCH_GROWTH.value) or None,
            "spike_guard": long_runs.SPIKE_GUARD.value or None,
            "inject_spike": long_runs.INJECT_SPIKE.value,
            **{name: flags.FLAGS[name].value for name in TASKS[TASK.value].FLAGS},
        }


def _check_flags_of_tasks() -> None:
    """Refuses a flag of another task, which would have no effect."""
    for name, module in TASKS.items():
        for flag in module.FLAGS:
            if name != TASK.value and flags.FLAGS[flag].present:
                raise command_line.UsageError(
                    f"--{flag} goes with --task={name}. Received: --task={TASK.value}."
                )
