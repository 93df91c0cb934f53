"""The tuners' common part: runs trials that an oracle over a study hands out."""

import gc
import importlib.util
import json
import math
import os
import pathlib
import shutil
import traceback

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from keras_tuner.src.engine import trial as kt_trial
from keras_tuner.src.engine import tuner_utils

import tfbig
from tfbig import errors
from tfbig._update.train_step import TrainStep
from tfbig.distribute import _workers
from tfbig.tuners import _folds, _follower, _isolation, _oracle, _progress, _trials

__all__ = ("Tuner",)

# Files of a trial.
CHECKPOINT, BUILD, STATE = "checkpoint.weights.h5", "build_config.json", "state"

# What says of a trial's values, and not of the program, that they do not go.
_INFEASIBLE = (
    keras_tuner.errors.FailedTrialError,
    errors.LossScaleError,
    MemoryError,
    tf.errors.ResourceExhaustedError,
)

# What the tuner does with hyperparameters of these names, where a builder has them.
FIT_ARGUMENTS = ("batch_size", "epochs")
CLIPPING = ("clipnorm", "global_clipnorm", "clipvalue")
PRECISION = "precision"


class TrialPruned(Exception):  # noqa: N818
    """Ends a trial that the pruner stopped."""


class TrialLost(Exception):  # noqa: N818
    """Ends a trial that another process has taken."""


class Tuner(keras_tuner.Tuner):
    """Runs trials; see the tuners, which say what is searched how.

    Args:
        oracle: `StudyOracle`.
        hypermodel: function of `hp`, or `keras_tuner.HyperModel`, that returns a compiled
            Keras model.
        directory: str, where projects are. Defaults to the working directory.
        project_name: str, the directory of this search in it, and the name of its
            study.
        overwrite: bool, whether to begin anew instead of going on. Refused while other
            processes work on the study.
        executions_per_trial: int, how often a trial is trained; its score is the mean.
        folds: int or None. With a number, the data are cut into so many parts, alike for all
            trials; a trial is trained once for each, on all the other parts, and its score is the
            mean. A pruner then looks at the mean after each fold, instead of at epochs.
            `search` is given arrays, and no validation data.
        keep_best_k: int, of how many of the best trials the weights are kept. Defaults
            to 10.
        gradient_accumulation_steps: as for `tfbig.extend`, of every model.
        micro_batch_size: as for `tfbig.extend`, of every model.
        memory_budget: as for `tfbig.extend`, of every model.
        recompute: as for `tfbig.extend`, of every model.
        loss_scale: as for `tfbig.extend`, of every model.
        max_seconds: float, seconds after which no trial begins any more.
        max_total_epochs: int, epochs of all trials after which none begins any more.
        isolate: bool, whether each trial is run in a process of its own, so that no memory
            is carried over and a trial that is killed for its memory is infeasible. The program
            is run again for each trial, up to `search`. Defaults to False.
        **kwargs: as for `keras_tuner.Tuner`.
    """

    def __init__(
        self,
        oracle,
        hypermodel=None,
        *,
        directory=None,
        project_name=None,
        overwrite=False,
        executions_per_trial=1,
        folds=None,
        keep_best_k=10,
        gradient_accumulation_steps=None,
        micro_batch_size=None,
        memory_budget=None,
        recompute=None,
        loss_scale="auto",
        max_seconds=None,
        max_total_epochs=None,
        isolate=False,
        **kwargs,
    ):
        _check_environment()
        _check(type(self), oracle, hypermodel, executions_per_trial, folds, keep_best_k)
        self._folds = folds
        self._keep = keep_best_k
        self._options = {
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "micro_batch_size": micro_batch_size,
            "memory_budget": memory_budget,
            "recompute": recompute,
        }
        self._options = {k: v for k, v in self._options.items() if v is not None}
        self._loss_scale = loss_scale
        self._max_seconds = max_seconds
        self._max_total_epochs = max_total_epochs
        oracle._set_project_dir(directory or ".", project_name or "untitled_project")
        strategy = kwargs.get("distribution_strategy") or tf.distribute.get_strategy()
        self._workers = _workers.Workers.of(strategy)
        self._isolate = bool(isolate)
        if self._isolate:
            _isolation.check(self._workers)
        self._is_trial_process = _isolation.is_trial_process(oracle.name)
        if overwrite and self._workers.is_chief and not self._is_trial_process:
            oracle.begin_anew()
        oracle._display = _progress.Progress(oracle)
        super().__init__(
            oracle,
            hypermodel,
            directory=directory,
            project_name=project_name,
            overwrite=False,
            executions_per_trial=executions_per_trial,
            **kwargs,
        )
        if not self._workers.is_chief:
            self.oracle = _follower.Follower(oracle)

    # The study is saved as it goes.

    def save(self):
        """Does nothing."""

    def reload(self):
        """Does nothing."""

    # --- The search ---

    def search(self, *fit_args, **fit_kwargs):
        """Runs trials until there is no more to do; any number of processes may.

        Args:
            *fit_args: arguments of `fit`, or of what overrides it.
            **fit_kwargs: arguments of `fit`, or of what overrides it.

        Raises:
            SearchError: If trials fail one after the other, if none was completed, or
                if the model does not report the objective.
            StudyError: If the study is of another search.
            StorageUnavailableError: If the database cannot be reached.
        """
        if "verbose" in fit_kwargs:
            self.oracle.verbose = fit_kwargs["verbose"]
        self.oracle.begin_search(self._max_seconds, self._max_total_epochs)
        self.on_search_begin()
        # Garbage is collected before each trial; what is there now need not be looked at.
        gc.freeze()
        try:
            if self._isolate and not self._is_trial_process:
                _isolation.run_trials(self.oracle.name, self.oracle.on_death)
            else:
                is_over = self._run_trials(*fit_args, **fit_kwargs)
        finally:
            gc.unfreeze()
            self.oracle.release()
        if self._is_trial_process:
            _isolation.end_trial_process(is_over)
        self.on_search_end()
        self.oracle.check_result()

    def _run_trials(self, *fit_args, **fit_kwargs):
        """Runs trials, one alone in a process of a trial; returns whether there are no more."""
        status = kt_trial.TrialStatus
        while True:
            self.pre_create_trial()
            trial = _follower.shared_trial(self.oracle, self._workers, self.tuner_id)
            if trial.status == status.STOPPED:
                return True
            if trial.status == status.RUNNING:
                self.on_trial_begin(trial)
                self._try_run_and_update_trial(trial, *fit_args, **fit_kwargs)
                self.on_trial_end(trial)
                if self._is_trial_process:
                    return False

    def _try_run_and_update_trial(self, trial, *fit_args, **fit_kwargs):
        status = kt_trial.TrialStatus
        try:
            self._run_and_update_trial(trial, *fit_args, **fit_kwargs)
            trial.status = status.COMPLETED
        except (keras_tuner.errors.FatalError, errors.SearchError):
            raise
        except TrialPruned:
            trial.status = status.STOPPED
        except TrialLost:
            trial.status = status.INVALID
        except Exception as e:
            trial.status = status.INVALID
            trial.message = traceback.format_exc()[-20_000:]
            if isinstance(e, _INFEASIBLE):
                trial.why = _trials.INFEASIBLE

    def _run_and_update_trial(self, trial, *fit_args, **fit_kwargs):
        results = self.run_trial(trial, *fit_args, **fit_kwargs)
        objective = self.oracle.objective
        if self.oracle.is_updated(trial.trial_id):
            return  # By a `run_trial` of the user.
        _check_results(results, objective, "Tuner.run_trial()")
        metrics, step = _best_of(results, objective)
        parts = results if isinstance(results, list) else [results]
        if self.oracle.goes_on and not isinstance(parts[0], keras.callbacks.History):
            step = self.oracle.epochs_of(trial.trial_id) - 1
        if metrics:  # None where a trial that goes on had been trained to its end.
            self.oracle.update_trial(trial.trial_id, metrics, step=step)

    def on_trial_end(self, trial):
        """Tells the study, and removes weights that are not among the best any more."""
        self.oracle.end_trial(trial)
        if self._workers.is_chief:
            self._remove_worse()

    def _remove_worse(self):
        best = {t.trial_id for t in self.oracle.get_best_trials(self._keep)}
        for trial in self.oracle.trials.values():
            if trial.status == kt_trial.TrialStatus.RUNNING:
                continue
            directory = pathlib.Path(self.project_dir, f"trial_{trial.trial_id}")
            shutil.rmtree(directory / STATE, ignore_errors=True)
            if trial.trial_id not in best:
                (directory / CHECKPOINT).unlink(missing_ok=True)

    def run_trial(self, trial, *args, **kwargs):
        """Trains the model of a trial; to be overridden for anything else.

        Args:
            trial: `keras_tuner.engine.trial.Trial`.
            *args: those of `search`.
            **kwargs: those of `search`.

        Returns:
            What `HyperModel.fit` returned, of each execution: a history, a dictionary of metrics
            or a number.
        """
        given = kwargs.pop("callbacks", None) or []
        checkpoint = _Checkpoint(
            self.oracle.objective,
            self._get_checkpoint_fname(trial.trial_id),
            self.oracle.best_reported(trial.trial_id),
        )
        results = []
        if self._folds:
            runs = _folds.arguments(self._folds, self.oracle.seed_of_folds, args, kwargs)
        else:
            runs = ((args, kwargs) for _ in range(self.executions_per_trial))
        for number, (run_args, run_kwargs) in enumerate(runs):
            callbacks = self._deepcopy_callbacks(keras.tree.flatten(given))
            self._configure_tensorboard_dir(callbacks, trial, number)
            report = _Report(self, trial, reports=number == 0 and not self._folds)
            callbacks += [tuner_utils.TunerCallback(self, trial), report]
            if self._workers.is_chief:
                callbacks.append(checkpoint)
            if self.oracle.goes_on:
                callbacks.append(_State(self.get_trial_dir(trial.trial_id)))
            run_kwargs = run_kwargs | {"callbacks": callbacks}
            results.append(self._build_and_fit_model(trial, *run_args, **run_kwargs))
            report.finish()
            if self._folds and number + 1 < self._folds:
                means, _ = _best_of(results, self.oracle.objective)
                report.decide(means, number + 1)
                report.finish()
        return results

    def _build_and_fit_model(self, trial, *args, **kwargs):
        hp = trial.hyperparameters
        model = self._try_build(hp)
        if self._fit_is_of_keras():
            searched = {n: hp.values[n] for n in FIT_ARGUMENTS if n in hp.values}
            # The lines of trials would drown in those of epochs.
            kwargs = {"verbose": 0} | searched | kwargs
        results = self.hypermodel.fit(hp, model, *args, **kwargs)
        _check_results(results, self.oracle.objective, "HyperModel.fit()")
        return results

    def _fit_is_of_keras(self, model=None):
        """Whether `fit` of Keras is called, and nothing of the user's in its place."""
        fit = getattr(type(self.hypermodel), "fit", None)
        is_of_model = model is None or type(model).fit.__module__.startswith(("keras.", "tfbig."))
        return fit is keras_tuner.HyperModel.fit and is_of_model

    # --- Models ---

    def _build_hypermodel(self, hp):
        previous = keras.config.dtype_policy()
        if PRECISION in hp.values:
            keras.config.set_dtype_policy(hp.values[PRECISION])
        try:
            with keras_tuner.engine.tuner.maybe_distribute(self.distribution_strategy):
                model = self.hypermodel.build(hp)
                if not isinstance(model, keras.Model):
                    raise errors.SearchError(
                        "The model-building function must return a Keras model. Received: "
                        f"{model!r} of type {type(model).__name__}."
                    )
                if model.compiled:
                    self._override_compile_args(model)
                elif self.optimizer and self.loss:
                    model.compile(loss=self.loss)
                    self._override_compile_args(model)
                if not model.compiled and self._fit_is_of_keras(model):
                    raise errors.SearchError(
                        "The model-building function must return a compiled model, or the tuner "
                        "be given an optimizer and a loss. Received: a model that is not compiled."
                    )
                for name in CLIPPING:
                    if name in hp.values and model.compiled:
                        optimizer = model.optimizer
                        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
                        setattr(optimizer, name, hp.values[name])
                return self._extended(model)
        finally:
            keras.config.set_dtype_policy(previous)

    def _extended(self, model):
        """The model with tfbig's step, where that makes a difference."""
        wanted = self._options or self.distribution_strategy is not None or self.oracle.goes_on
        computes_in_float16 = "float16" in {layer.compute_dtype for layer in model.layers}
        if isinstance(model, TrainStep) or not (wanted or computes_in_float16):
            return model
        return tfbig.extend(model, **self._options, loss_scale=self._loss_scale)

    def _try_build(self, hp):
        # What the models of earlier trials have left; collects garbage as well.
        keras.backend.clear_session()
        model = self._build_hypermodel(hp)
        size = sum(math.prod(v.shape) for v in model.trainable_weights) if model.built else 0
        if self.max_model_size and size > self.max_model_size:
            raise keras_tuner.errors.FailedTrialError(
                f"The model has {size} parameters, more than max_model_size={self.max_model_size}."
            )
        return model

    def load_model(self, trial):
        """The model of a trial with the weights of its best epoch."""
        path = self._get_checkpoint_fname(trial.trial_id)
        if not os.path.exists(path):
            raise errors.SearchError(
                f"The weights of trial {trial.trial_id} are not kept: they are of the best "
                f"{self._keep}. Give the tuner a larger keep_best_k, or train again with "
                "get_best_hyperparameters()."
            )
        model = self._try_build(trial.hyperparameters)
        with keras_tuner.engine.tuner.maybe_distribute(self.distribution_strategy):
            if not model.built:
                model.build_from_config(json.loads(pathlib.Path(path).with_name(BUILD).read_text()))
            optimizer = getattr(model, "optimizer", None)  # None where `fit` is the user's.
            if optimizer is not None and not optimizer.built:
                optimizer.build(model.trainable_variables)
            model.load_weights(path)
        return model

    def get_pareto_trials(self):
        """The trials that no other is better than in all objectives."""
        return self.oracle.get_best_trials(len(self.oracle.trials))

    # --- Results ---

    def results_summary(self, num_trials=10):
        """Prints how trials ended, and the best of them."""
        _progress.print_summary(self, num_trials)

    def to_dataframe(self):
        """The trials as a `pandas.DataFrame`, one a row; needs pandas.

        Returns:
            Columns: "trial", its id; "status", "complete", "pruned", "infeasible", "failed"
            or "running"; "score", or a column for each of several objectives; "best_step", the
            epoch of the score, from 0; "epochs", how many were reported; "duration", seconds
            from begin to end; and one for each hyperparameter with its value, `pandas.NA`
            where it is not active ("hp score", where its name is one of the others).

        Raises:
            InvalidOptionError: If pandas is not installed.
        """
        from tfbig.tuners import _results

        return _results.dataframe(self)

    def importance(self, objective=None):
        """What part of the objective's variance is due to each hyperparameter, by fANOVA.

        Of hyperparameters that all complete trials have; needs `tfbig[sklearn]`.

        Args:
            objective: str, one of several objectives. Defaults to the first.

        Returns:
            A dictionary from names to shares, which sum to 1, the largest first; empty with
            fewer than 2 complete trials.

        Raises:
            InvalidOptionError: If scikit-learn is not installed, or there is no such
                objective.

        Reference:
            Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", ICML
            2014.
        """
        from tfbig.tuners import _results

        return _results.importance(self, objective)

    def report(self, path):
        """Writes all about the search as one HTML file that needs no network.

        Also of a search that still runs. The plots need `tfbig[plots]`, and importance
        `tfbig[sklearn]`; what cannot be drawn is left out with the reason.

        Args:
            path: str or path of the file; a file there is replaced, in one step.
        """
        from tfbig.tuners import _report

        _report.write(self, path)

    def _configure_tensorboard_dir(self, callbacks, trial, execution=0):
        boards = [c for c in callbacks if isinstance(c, keras.callbacks.TensorBoard)]
        if not boards:
            return
        for board in boards:
            board.log_dir = self._get_tensorboard_dir(board.log_dir, trial.trial_id, execution)
        if importlib.util.find_spec("tensorboard") is None:
            return
        from tensorboard.plugins.hparams import api

        simple = (bool, int, float, str)
        hparams = {
            name: value if isinstance(value, simple) else str(value)
            for name, value in trial.hyperparameters.values.items()
        }
        callbacks += [
            api.KerasCallback(writer=b.log_dir, hparams=hparams, trial_id=trial.trial_id)
            for b in boards
        ]


def _check_environment():
    """Refuses KerasTuner's own way to search with several processes."""
    if "KERASTUNER_TUNER_ID" in os.environ or "KERASTUNER_ORACLE_IP" in os.environ:
        raise errors.SearchError(
            "KerasTuner's chief and workers are not used: unset KERASTUNER_TUNER_ID, "
            "KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT, and start the same program as "
            "often as wanted, with the same storage; or once, with `python -m tfbig.launch "
            "--workers N --independent`."
        )


def _check(kind, oracle, hypermodel, executions_per_trial, folds, keep_best_k):
    """Raises for options of a tuner that are not valid."""
    if not isinstance(oracle, _oracle.StudyOracle):
        raise errors.InvalidOptionError(
            "Expected `oracle` argument to be an instance of `Oracle` of tfbig, a "
            f"`StudyOracle`. Received: oracle={oracle!r}."
        )
    for name, value in (
        ("executions_per_trial", executions_per_trial),
        ("keep_best_k", keep_best_k),
    ):
        if type(value) is not int or value < 1:
            raise errors.InvalidOptionError(
                f"`{name}` must be an integer >= 1. Received: {name}={value!r}."
            )
    if folds is not None and (type(folds) is not int or folds < 2 or executions_per_trial > 1):
        raise errors.InvalidOptionError(
            "`folds` must be an integer >= 2 or None, and goes without executions_per_trial. "
            f"Received: folds={folds!r}, executions_per_trial={executions_per_trial}."
        )
    if oracle.goes_on and (folds or executions_per_trial > 1):
        raise errors.InvalidOptionError(
            "Hyperband goes on with one training of each trial. Received: "
            f"folds={folds}, executions_per_trial={executions_per_trial}."
        )
    # `Hyperband` has a `run_trial` of its own, which needs a model as well.
    if hypermodel is None and kind.run_trial.__module__.startswith("tfbig.tuners."):
        raise errors.InvalidOptionError(
            "`hypermodel` may be left out only where `run_trial` is overridden. Received "
            "`hypermodel=None`."
        )


class _Report(keras.callbacks.Callback):
    """Tells the study the objective after each epoch; stops what is pruned or lost."""

    def __init__(self, tuner, trial, reports):
        super().__init__()
        self._oracle = tuner.oracle
        # What takes the place of `fit` may return what no epoch reports.
        self._wanted = tuner.oracle.wanted if tuner._fit_is_of_keras() else ()
        self._workers = tuner._workers
        self._trial_id = trial.trial_id
        # Of several executions the first alone, so that all have the same part in the score.
        self._reports = reports
        self._is_pruned = self._is_lost = False
        self._epochs = 0

    def on_epoch_end(self, epoch, logs=None):
        self._epochs += 1
        self._check_objective(logs or {})
        if self._reports:
            self.decide(logs or {}, epoch + 1)
            # There is nothing to save in the last epoch.
            self._is_pruned &= epoch + 1 != self._last_epoch
            if self._is_pruned or self._is_lost:
                self.model.stop_training = True

    @property
    def _last_epoch(self):
        """int; None where a loop of the user's does not say."""
        return (self.params or {}).get("epochs")

    def decide(self, metrics, step):
        """Finds out whether the trial is pruned or lost, the same on all workers."""
        self._is_pruned = self._oracle.report(self._trial_id, metrics, step)
        self._is_lost = self._oracle.is_lost(self._trial_id)
        if self._workers.count > 1:
            decided = json.dumps([self._is_pruned, self._is_lost])
            answers = self._workers.exchange("whether a trial is pruned", decided)
            self._is_pruned, self._is_lost = json.loads(answers[0])

    def _check_objective(self, logs):
        for objective in self._wanted:
            is_late = objective.startswith("val_") and not any(n.startswith("val_") for n in logs)
            is_last = self._epochs == self._last_epoch
            if objective not in logs and not (is_late and not is_last):
                raise errors.SearchError(
                    f"The objective {objective!r} is not reported by the model. Received: logs "
                    f"with {', '.join(sorted(logs))}."
                )

    def finish(self):
        if self._is_lost:
            raise TrialLost
        if self._is_pruned:
            raise TrialPruned


class _State(tfbig.callbacks.BackupAndRestore):
    """What a trial goes on from, in this process or another."""

    def __init__(self, trial_dir):
        super().__init__(os.path.join(trial_dir, STATE), on_preemption=None)

    def on_train_end(self, logs=None):
        # The last epoch is backed up: after it, Keras may put averages in place of weights.
        pass


class _Checkpoint(keras.callbacks.Callback):
    """Keeps the weights of the best epoch; of the last one where that cannot be known."""

    def __init__(self, objective, path, best):
        super().__init__()
        self._objective = objective
        self._path = pathlib.Path(path)
        self._best = best

    def on_epoch_end(self, epoch, logs=None):
        is_single = not hasattr(self._objective, "objectives")
        if is_single and self._objective.has_value(logs):
            value = self._objective.get_value(logs)
            if math.isnan(value) or not _is_better(self._objective, value, self._best):
                return
            self._best = value
        # A process that is killed leaves the old weights or the new ones.
        temporary = self._path.with_name(f"new-{os.getpid()}.{CHECKPOINT}")
        self.model.save_weights(temporary)
        if not temporary.exists():
            return  # The model has a way of its own.
        os.replace(temporary, self._path)
        if not self._path.with_name(BUILD).exists():
            self._path.with_name(BUILD).write_text(json.dumps(self.model.get_build_config()))


def _is_better(objective, value, best):
    return best is None or objective.better_than(value, best)


def _check_results(results, objective, function):
    """Raises where results are not a history, a dictionary with the objectives, or a number."""
    for result in results if isinstance(results, list) else [results]:
        if hasattr(objective, "objectives") and isinstance(result, dict):
            missing = [o.name for o in objective.objectives if o.name not in result]
            if missing:
                raise errors.SearchError(
                    f"{function} must return the objective {missing[0]!r}. Received: "
                    f"{sorted(result)}."
                )
        else:
            tuner_utils.validate_trial_results(result, objective, function)


def _best_of(results, objective):
    """Metrics at the best epoch, the mean over executions; and that epoch, from 0."""
    if isinstance(results, list):
        parts = [_best_of(r, objective) for r in results]
        names = set.intersection(*(set(metrics) for metrics, _ in parts))
        means = {n: float(np.mean([metrics[n] for metrics, _ in parts])) for n in sorted(names)}
        return means, int(np.mean([epoch for _, epoch in parts]))
    if not isinstance(results, keras.callbacks.History):
        return tuner_utils.convert_to_metrics_dict(results, objective), 0
    steps = getattr(results, "epoch", None)
    if steps is None:  # One that a user has filled.
        steps = range(len(next(iter(results.history.values()), ())))
    if not steps:
        return {}, 0
    epochs = [
        dict(zip(results.history, values, strict=True))
        for values in zip(*results.history.values(), strict=True)
    ]
    best = len(epochs) - 1
    if not hasattr(objective, "objectives"):
        values = [objective.get_value(logs) for logs in epochs]
        for epoch in reversed(range(len(epochs))):
            is_finite = math.isfinite(values[epoch])
            if is_finite and not objective.better_than(values[best], values[epoch]):
                best = epoch
    return epochs[best], steps[best]
