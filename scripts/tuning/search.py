"""The search of tune.py."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import command_line

from tuning import PROGRAM, settings, tasks

if TYPE_CHECKING:
    import keras
    import keras_tuner


def _keep_to_cores(count: int) -> None:
    """Pins this process to so many cores, not those of other workers if there are enough."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    first = int(settings.worker() or 0) * count
    os.sched_setaffinity(0, {cores[i % len(cores)] for i in range(first, first + count)})


def _start() -> None:
    """Configures TensorFlow."""
    if settings.THREADS.value:
        # TensorFlow also starts threads that its settings do not limit.
        _keep_to_cores(settings.THREADS.value)
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    # SQLAlchemy prints a traceback if Ctrl-C comes while it returns a connection to its pool.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    if settings.THREADS.value:
        tf.config.threading.set_intra_op_parallelism_threads(settings.THREADS.value)
        tf.config.threading.set_inter_op_parallelism_threads(settings.THREADS.value)
    for device in tf.config.list_physical_devices("GPU"):
        # Several processes may share it.
        tf.config.experimental.set_memory_growth(device, True)
    # The first operation makes the device, and TensorFlow remarks on it.
    tf.zeros(1)

    import tfbig.tuners  # noqa: F401


def _hypermodel(
    build: Callable[[keras_tuner.HyperParameters], keras.Model],
) -> keras_tuner.HyperModel:
    """The model to search, with a batch size and without progress bars."""
    import keras
    import keras_tuner

    class HyperModel(keras_tuner.HyperModel):
        def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
            # A trial is the same in every process and after every other trial.
            keras.utils.set_random_seed(settings.SEED.value)
            hp.Int("batch_size", 16, 512, sampling="log", default=128)
            return build(hp)

        def fit(
            self, hp: keras_tuner.HyperParameters, model: keras.Model, *args: Any, **kwargs: Any
        ) -> keras.callbacks.History:
            return model.fit(*args, batch_size=hp.get("batch_size"), verbose=0, **kwargs)

    return HyperModel()


def _make_tuner(task: tasks.Task, path: pathlib.Path) -> Any:  # A tuner of `tfbig.tuners`.
    from tfbig import tuners

    made = {
        "grid": tuners.GridSearch,
        "random": tuners.RandomSearch,
        "bayesian": tuners.BayesianOptimization,
        "hyperband": tuners.Hyperband,
        "asha": tuners.ASHA,
        "pasha": tuners.PASHA,
        "optuna": tuners.OptunaSearch,
        "hyperopt": tuners.HyperoptSearch,
    }[settings.TUNER.value]
    options: dict[str, Any] = {"sampler": settings.SAMPLER.value, "pruner": settings.PRUNER.value}
    options["micro_batch_size"] = settings.MICRO_BATCH_SIZE.value
    if settings.TUNER.value in settings.IN_RUNGS:
        options["max_epochs"] = settings.MAX_EPOCHS.value or 27
    if settings.TUNER.value != "hyperband":
        options["max_trials"] = settings.MAX_TRIALS.value or 20
    return made(
        _hypermodel(task.build),
        tasks.OBJECTIVE,
        seed=settings.SEED.value,
        storage=settings.STORAGE.value,
        directory=path.parent,
        project_name=path.name,
        overwrite=settings.OVERWRITE.value,
        **{name: value for name, value in options.items() if value is not None},
    )


def tune(path: pathlib.Path) -> int:
    """Searches, or resumes the search in a directory.

    Returns:
        The exit code.
    """
    with command_line.quiet_start():
        _start()
    import tfbig

    task = tasks.TASKS[settings.TASK.value]()
    tuner = None
    try:
        tuner = _make_tuner(task, path)
        is_in_rungs = settings.TUNER.value in settings.IN_RUNGS
        epochs = {} if is_in_rungs else {"epochs": settings.EPOCHS.value or 20}
        tuner.search(*task.train, validation_data=task.validation, **epochs)
        # In every worker the search ends after the last trial of all.
        if settings.worker() in (None, "0"):
            _conclude(tuner, path)
    except KeyboardInterrupt:
        # A second Ctrl-C would cut the message off.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        done = 0 if tuner is None else len(tuner.oracle.end_order)
        return command_line.interrupted(
            PROGRAM, f"{done} trials are kept in {path}; the search resumes with the same flags"
        )
    except (
        tfbig.errors.InvalidOptionError,
        tfbig.errors.StorageUnavailableError,
        tfbig.errors.StudyError,
    ) as e:
        raise command_line.UsageError(e) from None
    except tfbig.errors.TfbigError as e:
        # With the traceback of the trial, if one raised.
        print(f"\n{PROGRAM}: {e}", file=sys.stderr)
        return 1
    return 0


def _conclude(tuner: Any, path: pathlib.Path) -> None:
    print()
    tuner.results_summary(num_trials=3)
    default, (best,) = tuner.oracle.trials["0000"], tuner.oracle.get_best_trials(1)
    print(f"\nvalidation loss of the default configuration  {_score(default)}")
    print(f"validation loss of the best, trial {best.trial_id:<12} {_score(best)}")
    report = settings.report_path(path)
    try:
        tuner.report(report)
    except OSError as e:
        raise command_line.UsageError(
            f"--report={report} cannot be written: {e.strerror}."
        ) from None
    print(f"\nThe report is {report}; the weights of the best trials are in {path}")


def _score(trial: keras_tuner.engine.trial.Trial) -> str:
    return f"none ({trial.status.lower()})" if trial.score is None else f"{trial.score:.4f}"
