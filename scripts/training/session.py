"""One session of training: from the data to the files, or to what an interruption leaves."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import command_line
import tensorflow as tf

import tfbig
from training import (
    PROGRAM,
    curves,
    directory,
    history,
    interruption,
    long_runs,
    results,
    settings,
)

if TYPE_CHECKING:
    import keras
    from tasks.task import Task

# Said of a session that ends between its last update and its last file.
TRAINED = "training is complete, and --resume saves and judges it"


@dataclasses.dataclass
class _Prepared:
    """What a session trains, complete before the first update.

    Attributes:
        updates: Those of the whole run.
    """

    task: Task
    model: keras.Model
    recorder: history.Recorder
    backup: tfbig.callbacks.BackupAndRestore
    monitor: tfbig.callbacks.TrainingMonitor
    updates: int


class Session:
    """Trains a run, or resumes it; a run has as many sessions as it takes.

    Args:
        strategy: Of this session, which may differ from that of the last.
        pipeline: The stages of this session, which may differ as well; None for none.
        run: The output directory, prepared.
        wanted: What the flags ask for.

    Attributes:
        is_trained: Whether nothing is left to do but to save.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        pipeline: tfbig.distribute.Pipeline | None,
        run: directory.RunDirectory,
        wanted: settings.Settings,
    ) -> None:
        self.is_trained = False
        self._strategy, self._pipeline = strategy, pipeline
        self._run, self._wanted = run, wanted
        self._is_chief = tfbig.distribute.is_chief(strategy)
        sizes = dict.fromkeys(long_runs.sizes(wanted.batch_size).values())
        self._about = (
            f"{settings.TASK.value}: effective batch {', '.join(map(str, sizes))}, "
            f"{settings.PRECISION.value}"
        )
        self._prepared: _Prepared | None = None

    def train(self) -> int:
        """Trains and saves.

        Returns:
            The exit code.

        Raises:
            KeyboardInterrupt: After Ctrl-C; call `interrupted`.
            UsageError: If the history of a complete run is missing.
        """
        prepared = self._prepared = self._prepare()
        if self._is_chief:
            # Only now, so that a run that cannot begin leaves the old one.
            self._run.begin()
            self._warn()
        self._fit(prepared)
        if not self._is_chief:
            return 0
        self.is_trained = True
        if not prepared.recorder.is_complete():
            raise command_line.UsageError(
                f"{self._run.backup} holds the end of a run whose history.csv is not in "
                f"{self._run.path}. Give the --output_dir of that run, or remove the backup to "
                "start over."
            )
        is_reached = results.conclude(
            prepared.model,
            prepared.recorder,
            prepared.task,
            self._about,
            [*long_runs.sizes(self._wanted.batch_size).values()][-1],
            self._run,
        )
        return 3 if settings.REQUIRE_BAR.value and not is_reached else 0

    def _prepare(self) -> _Prepared:
        """Data, model and callbacks; changes nothing in the directory."""
        run, wanted = self._run, self._wanted
        task = settings.TASKS[settings.TASK.value].load(wanted)
        updates = long_runs.updates(len(task.train[0]), wanted.epochs, wanted.batch_size)
        recorder = history.Recorder(
            run.path / "history.csv" if self._is_chief else None,
            wanted.epochs,
            task.measure,
            run.resumes,
        )
        # The backup stays until all is saved, so that a session which ends in between can be
        # resumed. One in --backup_dir stays even then: a job that restarts after its end, because
        # a worker failed at the very last, finds the run complete.
        backup = tfbig.callbacks.BackupAndRestore(
            run.backup,
            settings.BACKUP_FREQ.value or "epoch",
            delete_checkpoint=False,
            save_on_background=long_runs.BACKUP_ON_BACKGROUND.value,
            keep=long_runs.KEEP_BACKUPS.value,
        )
        monitor = tfbig.callbacks.TrainingMonitor(
            run.path / directory.MONITOR, enabled=settings.MONITOR.value
        )
        model = self._make_model(task, updates)
        return _Prepared(task, model, recorder, backup, monitor, updates)

    def _make_model(self, task: Task, updates: int) -> keras.Model:
        with self._strategy.scope():
            model = task.make_model(
                micro_batch_size=settings.micro_batch_size(),
                gradient_accumulation_steps=settings.STEPS.value,
                loss_scale=settings.loss_scale(),
                shard=settings.SHARD.value,
                pipeline=self._pipeline,
                name=settings.TASK.value,
            )
            model.compile(
                task.make_optimizer(self._wanted.learning_rate, updates),
                task.loss,
                metrics=task.make_metrics(),
                jit_compile=self._wanted.jit_compile,
                steps_per_execution=settings.STEPS_PER_EXECUTION.value,
            )
        return model

    def _warn(self) -> None:
        if settings.RESUME.value and not self._run.resumes:
            print(f"{PROGRAM}: there is no backup: training starts over", file=sys.stderr)
        if not curves.can_draw():
            # No reason to stop: the numbers are in history.csv.
            print(f"{PROGRAM}: no pictures are drawn: pip install 'tfbig[plots]'", file=sys.stderr)

    def _fit(self, prepared: _Prepared) -> None:
        task = prepared.task
        with interruption.with_backup(PROGRAM):
            prepared.model.fit(
                *task.train,
                batch_size=self._wanted.batch_size,
                epochs=self._wanted.epochs,
                validation_data=task.validation,
                validation_batch_size=self._wanted.batch_size,
                verbose=settings.VERBOSE.value if self._is_chief else 0,
                callbacks=[
                    *task.callbacks,
                    *long_runs.callbacks(self._wanted.batch_size),
                    prepared.recorder,
                    prepared.backup,
                    prepared.monitor,
                ],
            )

    def interrupted(self) -> int:
        """Saves what Ctrl-C left, if there is anything; says so and returns the exit code."""
        if self.is_trained:
            return command_line.interrupted(PROGRAM, TRAINED)
        if not self._is_chief:
            return command_line.interrupted(PROGRAM, "the chief saves")
        prepared = self._prepared
        # Until its first epoch begins, a resumed model does not hold what its run has trained.
        if (
            prepared is None
            or not prepared.recorder.has_begun
            or history.updates(prepared.model) == 0
        ):
            done = "nothing is trained yet"
            if self._run.resumes:
                done = f"no update since the last session; {self._how_to_resume()}"
            return command_line.interrupted(PROGRAM, done)
        results.save(prepared.model, prepared.recorder, prepared.task, self._about, self._run.path)
        prepared.monitor.draw()
        saved = f"{history.updates(prepared.model)} of {prepared.updates} updates are saved"
        return command_line.interrupted(
            PROGRAM, f"{saved} in {self._run.path}; {self._how_to_resume()}"
        )

    def _how_to_resume(self) -> str:
        if self._run.holds_backup():
            return "--resume continues from the last backup"
        return "there is no backup yet, so --resume starts over"
