"""Searches the hyperparameters of a task with tfbig, with any of its tuners.

Every trial is kept in `--output_dir`: a search that was interrupted, even killed,
goes on when it is started again with the same flags. Several processes with the
same flags share one search:

    python scripts/tune.py --tuner=bayesian --max_trials=20
    python -m tfbig.launch --workers 2 --independent \\
        scripts/tune.py --tuner=bayesian --max_trials=20 --threads=1

The output directory then holds the study, the weights of the best trials and report.html.
"""

import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Callable

import command_line
import digits_data
from absl import flags

PROGRAM = "tune.py"

# TensorFlow, Keras and tfbig are imported after the flags are checked: they take
# seconds, which `--help` and a mistyped flag need not.


# --- Tasks -------------------------------------------------------------------


@dataclasses.dataclass
class Task:
    """What is trained on what.

    Attributes:
        train: `(x, y)` arrays.
        validation: `(x, y)` arrays.
        build: Function of `hp` that returns a compiled model.
    """

    train: tuple
    validation: tuple
    build: Callable


def digits():
    """Scanned digits, which scikit-learn ships."""
    import keras
    from keras import layers

    try:
        train, validation = digits_data.load()
    except ModuleNotFoundError:
        raise command_line.MissingExtraError("--task=digits", "sklearn") from None

    def build(hp):
        activation = hp.Choice("activation", ["relu", "swish", "tanh", None], default="relu")
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(
                    hp.Int("filters", 8, 64, step=8, default=16),
                    kernel_size=3,
                    padding="same",
                    activation=activation,
                ),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(
                    hp.Int("units", 16, 256, sampling="log", default=64), activation=activation
                ),
                layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)),
                layers.Dense(10),
            ]
        )
        rate = hp.Float("learning_rate", 1e-4, 1e-1, sampling="log", default=1e-3)
        model.compile(
            keras.optimizers.Adam(rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    return Task(train, validation, build)


TASKS = {"digits": digits}

OBJECTIVE = "val_loss"


# --- Flags -------------------------------------------------------------------

_TASK = flags.DEFINE_enum("task", "digits", sorted(TASKS), "What is trained.")
_TUNER = flags.DEFINE_enum(
    "tuner",
    "bayesian",
    ["grid", "random", "bayesian", "hyperband", "optuna", "hyperopt"],
    "How to search. bayesian: Optuna's TPE. optuna: any --sampler. hyperopt needs tfbig[hyperopt].",
)
_SAMPLER = flags.DEFINE_enum(
    "sampler",
    None,
    ["tpe", "random", "gp", "cmaes", "nsga2", "qmc", "hyperopt"],
    "What suggests values, of --tuner=optuna and hyperband; of bayesian, tpe or gp. By default "
    "tpe, and random of hyperband.",
)
_PRUNER = flags.DEFINE_enum(
    "pruner",
    None,
    ["median", "asha", "hyperband", "patience"],
    "What stops trials that are worse than others. By default nothing does.",
)
_MAX_TRIALS = flags.DEFINE_integer(
    "max_trials",
    None,
    "Trials of the search, of all its processes and runs together. By default 20. Hyperband "
    "counts its own.",
    lower_bound=1,
)
_EPOCHS = flags.DEFINE_integer(
    "epochs", None, "Epochs of a trial. By default 20. Hyperband counts its own.", lower_bound=1
)
_MAX_EPOCHS = flags.DEFINE_integer(
    "max_epochs",
    None,
    "Epochs of a trial that --tuner=hyperband trains to its end. By default 27.",
    lower_bound=1,
)
_MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size",
    None,
    "Samples per forward pass. The batch size that is searched is that of an update.",
    lower_bound=1,
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where the search is kept. By default runs/<task>-<tuner>."
)
_OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Remove the search that --output_dir holds, and begin anew."
)
_STORAGE = flags.DEFINE_string(
    "storage",
    None,
    "Database URL of the study, for several machines; its name there is that of --output_dir. By "
    "default a file in --output_dir.",
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of what is suggested, and of weights, shuffling and dropout in each trial.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
_THREADS = flags.DEFINE_integer(
    "threads",
    0,
    "CPU cores of this process, on Linux its own; 0: TensorFlow chooses. With several processes on "
    "one machine, 1 is often fastest.",
    lower_bound=0,
)
_REPORT = flags.DEFINE_string(
    "report", None, "HTML file for the report. By default report.html in --output_dir."
)

# What a flag goes with; the other tuners have no such thing.
_GOES_WITH = {
    "sampler": ("bayesian", "hyperband", "optuna"),
    "pruner": ("grid", "random", "bayesian", "optuna", "hyperopt"),
    "max_trials": ("grid", "random", "bayesian", "optuna", "hyperopt"),
    "epochs": ("grid", "random", "bayesian", "optuna", "hyperopt"),
    "max_epochs": ("hyperband",),
}


def _needs_tuner(name, tuners):
    flags.register_multi_flags_validator(
        ["tuner", name],
        lambda values: values[name] is None or values["tuner"] in tuners,
        f"--{name} goes with --tuner={', '.join(tuners)}",
    )


for _name, _tuners in _GOES_WITH.items():
    _needs_tuner(_name, _tuners)


@flags.multi_flags_validator(["tuner", "sampler"], "--tuner=bayesian has --sampler=tpe or gp")
def _is_bayesian(values):
    return values["tuner"] != "bayesian" or values["sampler"] in (None, "tpe", "gp")


def _worker():
    """The number of this process among those of a launcher; None without one."""
    return os.environ.get("TFBIG_WORKER")


def _report_path(path):
    return pathlib.Path(_REPORT.value or path / "report.html")


def _prepare_output_dir():
    """The output directory, writable."""
    path = pathlib.Path(_OUTPUT_DIR.value or f"runs/{_TASK.value}-{_TUNER.value}")
    if _OVERWRITE.value and _worker() is not None:
        raise command_line.UsageError(
            "--overwrite in one of several workers would remove what the others begin with. "
            f"Remove {path} first, or choose another --output_dir."
        )
    if not path.resolve().name:
        raise command_line.UsageError(
            "--output_dir must be a directory with a name, which is that of the study. Received: "
            f"{path}."
        )
    # Known now rather than when the search has ended.
    if _report_path(path).is_dir():
        raise command_line.UsageError(
            f"--report must be a file. Received: {_report_path(path)}, a directory."
        )
    command_line.make_writable(path)
    return path.resolve()


# --- The search --------------------------------------------------------------


def _keep_to_cores(count):
    """Has this process use so many cores, others than other workers where there are enough."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    first = int(_worker() or 0) * count
    os.sched_setaffinity(0, {cores[i % len(cores)] for i in range(first, first + count)})


def _start():
    """Configures TensorFlow."""
    if _THREADS.value:
        # Threads that TensorFlow does not count run as well.
        _keep_to_cores(_THREADS.value)
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    if _THREADS.value:
        tf.config.threading.set_intra_op_parallelism_threads(_THREADS.value)
        tf.config.threading.set_inter_op_parallelism_threads(_THREADS.value)
    for device in tf.config.list_physical_devices("GPU"):
        # Several processes may share it.
        tf.config.experimental.set_memory_growth(device, True)
    # The first operation makes the device, which TensorFlow remarks on.
    tf.zeros(1)

    import tfbig.tuners  # noqa: F401


def _hypermodel(build):
    """The model that is searched: without progress bars, and with a batch size."""
    import keras
    import keras_tuner

    class HyperModel(keras_tuner.HyperModel):
        def build(self, hp):
            # A trial is the same whichever process runs it, and after whichever other.
            keras.utils.set_random_seed(_SEED.value)
            hp.Int("batch_size", 16, 512, sampling="log", default=128)
            return build(hp)

        def fit(self, hp, model, *args, **kwargs):
            return model.fit(*args, batch_size=hp.get("batch_size"), verbose=0, **kwargs)

    return HyperModel()


def _make_tuner(task, path):
    from tfbig import tuners

    made = {
        "grid": tuners.GridSearch,
        "random": tuners.RandomSearch,
        "bayesian": tuners.BayesianOptimization,
        "hyperband": tuners.Hyperband,
        "optuna": tuners.OptunaSearch,
        "hyperopt": tuners.HyperoptSearch,
    }[_TUNER.value]
    options = {"sampler": _SAMPLER.value, "pruner": _PRUNER.value}
    options["micro_batch_size"] = _MICRO_BATCH_SIZE.value
    if _TUNER.value == "hyperband":
        options["max_epochs"] = _MAX_EPOCHS.value or 27
    else:
        options["max_trials"] = _MAX_TRIALS.value or 20
    return made(
        _hypermodel(task.build),
        OBJECTIVE,
        seed=_SEED.value,
        storage=_STORAGE.value,
        directory=path.parent,
        project_name=path.name,
        overwrite=_OVERWRITE.value,
        **{name: value for name, value in options.items() if value is not None},
    )


def _tune(path):
    with command_line.quiet_start():
        _start()
    import tfbig

    task = TASKS[_TASK.value]()
    tuner = None
    try:
        tuner = _make_tuner(task, path)
        epochs = {} if _TUNER.value == "hyperband" else {"epochs": _EPOCHS.value or 20}
        tuner.search(*task.train, validation_data=task.validation, **epochs)
        # The search of any worker ends when all trials have.
        if _worker() in (None, "0"):
            _conclude(tuner, path)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        done = 0 if tuner is None else len(tuner.oracle.end_order)
        return command_line.interrupted(
            PROGRAM, f"{done} trials are kept in {path}; with the same flags it goes on"
        )
    except (
        tfbig.errors.InvalidOptionError,
        tfbig.errors.StorageUnavailableError,
        tfbig.errors.StudyError,
    ) as e:
        raise command_line.UsageError(e) from None
    except tfbig.errors.TfbigError as e:
        # With the traceback of the trial, where one raised.
        print(f"\ntune.py: {e}", file=sys.stderr)
        return 1
    return 0


def _conclude(tuner, path):
    print()
    tuner.results_summary(num_trials=3)
    default, (best,) = tuner.oracle.trials["0000"], tuner.oracle.get_best_trials(1)
    print(f"\nvalidation loss of the default configuration  {_score(default)}")
    print(f"validation loss of the best, trial {best.trial_id:<12} {_score(best)}")
    report = _report_path(path)
    try:
        tuner.report(report)
    except OSError as e:
        raise command_line.UsageError(
            f"--report={report} cannot be written: {e.strerror}."
        ) from None
    print(f"\nThe report is {report}; the weights of the best trials are in {path}")


def _score(trial):
    return f"none ({trial.status.lower()})" if trial.score is None else f"{trial.score:.4f}"


if __name__ == "__main__":
    command_line.run(PROGRAM, lambda: _tune(_prepare_output_dir()), "no trial has begun")
