"""The flags of tune.py."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import command_line
from absl import flags

from tuning.tasks import TASKS

TASK = flags.DEFINE_enum("task", "digits", sorted(TASKS), "What to train.")
TUNER = flags.DEFINE_enum(
    "tuner",
    "bayesian",
    ["grid", "random", "bayesian", "hyperband", "asha", "pasha", "optuna", "hyperopt"],
    "How to search. bayesian: Optuna's TPE. optuna: any --sampler. hyperopt needs tfbig[hyperopt].",
)
SAMPLER = flags.DEFINE_enum(
    "sampler",
    None,
    ["tpe", "random", "gp", "cmaes", "nsga2", "qmc", "hyperopt"],
    "What suggests values in --tuner=optuna, hyperband, asha and pasha; in bayesian, tpe or gp. By "
    "default tpe, in hyperband random.",
)
PRUNER = flags.DEFINE_enum(
    "pruner",
    None,
    ["median", "asha", "hyperband", "patience"],
    "What stops trials that do worse than others. By default nothing.",
)
MAX_TRIALS = flags.DEFINE_integer(
    "max_trials",
    None,
    "Trials of the search, in all its processes and runs together. By default 20. Hyperband "
    "chooses its own number.",
    lower_bound=1,
)
EPOCHS = flags.DEFINE_integer("epochs", None, "Epochs of a trial. By default 20.", lower_bound=1)
MAX_EPOCHS = flags.DEFINE_integer(
    "max_epochs",
    None,
    "Epochs of a trial that --tuner=hyperband, asha or pasha trains to the end. By default 27.",
    lower_bound=1,
)
MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size",
    None,
    "Samples per forward pass. The batch size that is searched is that of an update.",
    lower_bound=1,
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where the search is kept. By default runs/<task>-<tuner>."
)
OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Remove the search that --output_dir holds, and start over."
)
STORAGE = flags.DEFINE_string(
    "storage",
    None,
    "Database URL of the study, for several machines; it is named after --output_dir. By default "
    "a file in --output_dir.",
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the suggestions, and of weights, shuffling and dropout in each trial.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
THREADS = flags.DEFINE_integer(
    "threads",
    0,
    "CPU cores of this process, on Linux not shared with other workers; 0: TensorFlow chooses. "
    "With several processes on one machine, 1 is often fastest.",
    lower_bound=0,
)
_REPORT = flags.DEFINE_string(
    "report", None, "HTML file for the report. By default report.html in --output_dir."
)

# Those that say how long each trial is trained.
IN_RUNGS = ("hyperband", "asha", "pasha")
_AT_ONCE = ("grid", "random", "bayesian", "optuna", "hyperopt")

# The tuners that each flag goes with.
_GOES_WITH = {
    "sampler": ("bayesian", *IN_RUNGS, "optuna"),
    "pruner": _AT_ONCE,
    "max_trials": (*_AT_ONCE, "asha", "pasha"),
    "epochs": _AT_ONCE,
    "max_epochs": IN_RUNGS,
}


def _needs_tuner(name: str, tuners: tuple[str, ...]) -> None:
    flags.register_multi_flags_validator(
        ["tuner", name],
        lambda values: values[name] is None or values["tuner"] in tuners,
        f"--{name} goes with --tuner={', '.join(tuners)}",
    )


for _name, _tuners in _GOES_WITH.items():
    _needs_tuner(_name, _tuners)


@flags.multi_flags_validator(["tuner", "sampler"], "--tuner=bayesian has --sampler=tpe or gp")
def _is_bayesian(values: dict[str, Any]) -> bool:
    return values["tuner"] != "bayesian" or values["sampler"] in (None, "tpe", "gp")


def worker() -> str | None:
    """The number of this process among those of `tfbig.launch`; None without it."""
    return os.environ.get("TFBIG_WORKER")


def report_path(path: pathlib.Path) -> pathlib.Path:
    """Where the report of a search in `path` goes."""
    return pathlib.Path(_REPORT.value or path / "report.html")


def prepare_output_dir() -> pathlib.Path:
    """Makes the output directory if there is none.

    Raises:
        UsageError: If it cannot be used.
    """
    path = pathlib.Path(_OUTPUT_DIR.value or f"runs/{TASK.value}-{TUNER.value}")
    if OVERWRITE.value and worker() is not None:
        raise command_line.UsageError(
            "--overwrite in one of several workers would remove the search of the others. "
            f"Remove {path} first, or choose another --output_dir."
        )
    if not path.resolve().name:
        raise command_line.UsageError(
            "--output_dir must be a directory with a name, since it names the study. Received: "
            f"{path}."
        )
    # Checked now rather than at the end of the search.
    if report_path(path).is_dir():
        raise command_line.UsageError(
            f"--report must be a file. Received: {report_path(path)}, a directory."
        )
    command_line.make_writable(path)
    return path.resolve()
