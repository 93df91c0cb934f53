"""The callbacks with which a trial is trained."""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import MutableMapping, Sequence

import keras
from keras_tuner.src.engine import tuner_utils

import tfbig
from tfbig import _keras, _types, errors
from tfbig.callbacks import _help
from tfbig.distribute._workers import Workers
from tfbig.tuners import _trial_results, _tuner_types
from tfbig.tuners._oracle import StudyOracle

__all__ = (
    "CallTuner",
    "KeepBestWeights",
    "KeepState",
    "ReportObjective",
    "TrialLost",
    "TrialPruned",
)

# Files of a trial.
CHECKPOINT, BUILD, STATE = "checkpoint.weights.h5", "build_config.json", "state"


class TrialPruned(Exception):  # noqa: N818
    """Raised to end a trial that the pruner stops."""


class TrialLost(Exception):  # noqa: N818
    """Ends a trial that another process has taken."""


class TrialCallback(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """A callback whose `model` a training loop of the user's own may set.

    Keras 3 has `set_model` for that; loops that were written for KerasTuner assign.
    """

    @property
    def model(self) -> keras.Model:
        return super().model

    @model.setter
    def model(self, model: keras.Model) -> None:
        self.set_model(model)


class CallTuner(TrialCallback, tuner_utils.TunerCallback):  # type: ignore[misc]  # KerasTuner has no types.
    """Calls the tuner's `on_epoch_begin` and the like, which a user may override."""


class ReportObjective(TrialCallback):
    """Tells the study the objective after each epoch; stops trials that are pruned or lost.

    Args:
        oracle: The oracle of the search.
        workers: Those that train the trial together.
        trial_id: The trial.
        wanted: Names that the logs must contain.
        reports: Whether the objective is reported. Only the first of several executions reports,
            so that all have the same weight in the score.
    """

    def __init__(
        self,
        oracle: StudyOracle,
        workers: Workers,
        trial_id: str,
        wanted: Sequence[str],
        reports: bool,
    ) -> None:
        super().__init__()
        self._oracle = oracle
        self._workers = workers
        self._trial_id = trial_id
        self._wanted = wanted
        self._reports = reports
        self._is_pruned = self._is_lost = self._is_late = False
        self._epochs = 0
        self._seen: set[str] = set()

    def on_train_batch_end(self, batch: int, logs: _types.Logs | None = None) -> None:
        # Several workers must stop together, at the end of an epoch.
        if self._workers.count == 1 and self._oracle.is_late(self._trial_id):
            raise TrialPruned(self._oracle.too_late)

    def on_epoch_end(self, epoch: int, logs: _types.Logs | None = None) -> None:
        self._epochs += 1
        self._check_objective(logs or {})
        metrics = _trial_results.single_numbers(dict(logs or {}), self._wanted)
        _trial_results.note_epoch(self.model, epoch, metrics)
        self._oracle.count_epoch(self._trial_id)
        if self._reports:
            self.decide(metrics, epoch + 1)
            if self._is_lost:
                # At once, so that no later callback writes to the files that are another's now.
                raise TrialLost
            # After the last epoch, pruning saves nothing.
            self._is_pruned &= epoch + 1 != self._last_epoch
            self._is_late &= epoch + 1 != self._last_epoch
            if self._is_pruned or self._is_late:
                self.model.stop_training = True

    @property
    def _last_epoch(self) -> int | None:
        """None if a user's own training loop does not say."""
        return (self.params or {}).get("epochs")

    def is_of(self, trial: _tuner_types.Trial) -> bool:
        return bool(trial.trial_id == self._trial_id)

    @property
    def is_pruned(self) -> bool:
        """Whether the pruner stops the trial, or its time is over."""
        return self._is_pruned or self._is_late

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the trial."""
        return self._is_lost

    def decide(self, metrics: _tuner_types.Metrics, step: int) -> None:
        """Finds out whether the trial is pruned or lost, the same on all workers."""
        self._is_pruned = self._oracle.report(self._trial_id, metrics, step)
        self._is_lost = self._oracle.is_lost(self._trial_id)
        self._is_late = self._oracle.is_late(self._trial_id)
        if self._workers.count > 1:
            decided = json.dumps([self._is_pruned, self._is_lost, self._is_late])
            answers = self._workers.exchange("whether a trial is pruned", decided)
            self._is_pruned, self._is_lost, self._is_late = json.loads(answers[0])

    def _check_objective(self, logs: _types.Logs) -> None:
        self._seen.update(logs)
        for objective in set(self._wanted) - self._seen:
            is_late = objective.startswith("val_") and not any(n.startswith("val_") for n in logs)
            is_last = self._epochs == self._last_epoch
            if not is_late or is_last:
                raise errors.SearchError(
                    f"The model must report the objective {objective!r}. Received: logs with "
                    f"{', '.join(sorted(logs))}. Compile the model with this metric, or choose "
                    "another objective."
                )

    def finish(self) -> None:
        """Raises if the trial was pruned or lost."""
        if self._is_lost:
            raise TrialLost
        if self._is_pruned:
            raise TrialPruned
        if self._is_late:
            raise TrialPruned(self._oracle.too_late)


class KeepState(TrialCallback, tfbig.callbacks.BackupAndRestore):
    """Backs up what is needed to resume a trial, in this process or in another.

    Args:
        directory: Where the state is.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory, on_preemption=None)
        # Those of the last epoch, which a `SwapEMAWeights` loses.
        self._weights: list[_types.Array] = []

    def _complete(self, logs: MutableMapping[str, object]) -> None:
        # Before the other callbacks.
        super()._complete(logs)
        if _keras.optimizer.is_last_swap(self._callbacks, self._epoch):
            weights = [weight for weight, _ in _keras.optimizer.averages_of(self.model)]
            self._weights = _keras.variables.values_of(weights)

    def on_epoch_end(self, epoch: int, logs: _types.Logs | None = None) -> None:
        weights, self._weights = self._weights, []
        if not weights:
            super().on_epoch_end(epoch, logs)
            return
        # As after the other swaps.
        averages = [average for _, average in _keras.optimizer.averages_of(self.model)]
        lasting = _keras.variables.values_of(averages)
        _keras.variables.assign_all(averages, weights)
        super().on_epoch_end(epoch, logs)
        _keras.variables.assign_all(averages, lasting)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        # The study says whose trial it is. Who held it before may have been stopped for long.
        return contextlib.nullcontext()

    def on_train_end(self, logs: _types.Logs | None = None) -> None:
        # The last epoch was backed up already; after it, Keras may replace weights by averages.
        pass


class KeepBestWeights(TrialCallback):
    """Keeps the weights of the best epoch; of the last one if the best cannot be known.

    The chief writes. If state is divided over the workers, all of them must have this callback.

    Args:
        objective: KerasTuner's.
        path: The file for the weights.
        best: The best value of an earlier training of the trial; None if there was none.
        workers: Those that train the trial together.
    """

    def __init__(
        self, objective: _tuner_types.Objective, path: str, best: float | None, workers: Workers
    ) -> None:
        super().__init__()
        # The callbacks beside this one.
        self.others: Sequence[_types.Callback] = ()
        self._objective = objective
        self._path = pathlib.Path(path)
        self._best = best
        self._workers = workers

    def on_epoch_end(self, epoch: int, logs: _types.Logs | None = None) -> None:
        keep = functools.partial(self._keep_if_better, logs)
        if _help.is_divided(self.model):
            _help.act_with_help(self._workers, self.model, "the tuner", keep)
        elif self._workers.is_chief:
            keep()

    def _keep_if_better(self, logs: _types.Logs | None) -> None:
        is_single = not hasattr(self._objective, "objectives")
        metrics = _trial_results.single_numbers(dict(logs or {}), ())
        if is_single and self._objective.has_value(metrics):
            value = self._objective.get_value(metrics)
            if math.isnan(value) or not self._is_better(value):
                return
            self._best = value
        elif is_single and self._best is not None:
            return
        # If the process is killed, the old weights or the new ones remain.
        temporary = self._path.with_name(f"new-{os.getpid()}.{CHECKPOINT}")
        try:
            self._write(temporary)
        except OSError as e:
            # Not the fault of the trial, which another process may run again.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise errors.StorageUnavailableError(
                f"The weights of a trial cannot be written to {self._path.parent}: {e}. What the "
                "search has recorded is kept; start the program again once there is space."
            ) from None

    def _write(self, temporary: pathlib.Path) -> None:
        # What was validated, and what `fit` leaves at its end.
        others = () if _help.is_divided(self.model) else self.others
        with _keras.optimizer.averages_in_weights(self.model, others):
            self.model.save_weights(temporary)
        if not temporary.exists():
            return  # The model saves its weights in a way of its own.
        os.replace(temporary, self._path)
        if not self._path.with_name(BUILD).exists():
            self._path.with_name(BUILD).write_text(json.dumps(self.model.get_build_config()))

    def _is_better(self, value: float) -> bool:
        return self._best is None or self._objective.better_than(value, self._best)
