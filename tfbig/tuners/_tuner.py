"""What all tuners of Keras models have in common: how a trial builds and trains its model."""

import importlib.util
import inspect
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, Unpack, cast, overload

import keras
import keras_tuner

import tfbig
from tfbig import _keras, _types, errors, mup
from tfbig._update import step_options
from tfbig._update.option import declared
from tfbig._update.train_step import TrainStep
from tfbig.tuners import (
    _agreement,
    _base_tuner,
    _folds,
    _options,
    _oracle,
    _transfer,
    _trial_callbacks,
    _trial_results,
    _tuner_types,
    _widths,
)
from tfbig.tuners._hyperparameters import HyperParameters
from tfbig.tuners._trial_callbacks import BUILD, CHECKPOINT

__all__ = ("Tuner",)

# Hyperparameters of these names need no code: they go to `fit`, to the optimizer, and to the
# dtype policy.
FIT_ARGUMENTS = ("batch_size", "epochs")
CLIPPING = ("clipnorm", "global_clipnorm", "clipvalue")
PRECISION = "precision"


class NotAModelError(errors.SearchError, keras_tuner.errors.FatalTypeError):  # type: ignore[misc]  # KerasTuner has no types.
    """The builder returned something else. KerasTuner's programs catch `FatalTypeError`."""


class Tuner(_base_tuner.BaseTuner, keras_tuner.Tuner):  # type: ignore[misc]  # KerasTuner has no types.
    """Runs the trials of a search; its subclasses say how values are chosen.

    Args:
        oracle: Chooses values, and stores results.
        hypermodel: Function of `hp`, or `keras_tuner.HyperModel`, that returns a compiled Keras
            model.
        directory: Where projects are. Defaults to the working directory.
        project_name: The directory of this search in it, and the name of its study.
        overwrite: Whether to start over instead of resuming. Refused while other processes work on
            the study.
        executions_per_trial: How often each trial is trained; its score is the mean.
        folds: Cuts the data into so many parts, the same for all trials. A trial is trained once
            for each part, on all other parts, and its score is the mean. A pruner then looks at the
            mean after each fold, instead of at epochs. Pass arrays to `search`, without validation
            data. None for a single training.
        keep_best_k: The weights of so many of the best trials are kept. Defaults to 10.
        max_seconds: Seconds after which no trial begins.
        max_total_epochs: Epochs of all trials together after which no trial begins.
        patience: After so many ended trials in a row without a better one, no trial begins.
        timeout_per_trial: Seconds after which a trial is stopped as if pruned: after a batch; with
            several workers, after an epoch; in a loop of your own, when `should_prune` says so. One
            that hangs in between is stopped only with `isolate`: after `grace_period` seconds more,
            its process is ended, and the trial is infeasible.
        process_memory: Bytes of memory that this process has for a trial. A trial that runs out of
            memory is left to a process with more, and is infeasible if there is none. None: what
            the host gives the process, without a GPU; unknown with one.
        isolate: Whether each trial runs in a process of its own. Then no memory is carried over,
            and a trial that is killed for its memory is infeasible. The program is run again for
            each trial, up to `search`, without other searches before it. Defaults to False.
        transfer_from: An earlier search to begin with: the directory of its project, its file, or a
            database URL. Its space may be another: what fits by name and range is taken.
        transfer: "best" to try the values of its best three trials first; or "observations" to
            have the sampler learn from all its complete trials whose values are all of this space,
            as if they were of this search. They do not count as trials. Defaults to "best".
        scale_width: Two widths: that of the models of the search, and that of `build_wide`. Then
            `hypermodel` is a function of `hp` and a width. Defaults to None.
        **kwargs: As for `keras_tuner.Tuner`; and options of models, such as `micro_batch_size`, as
            for `tfbig.extend`, for every model.
    """

    _model_file = CHECKPOINT

    def __init__(
        self,
        oracle: _oracle.StudyOracle,
        hypermodel: _options.Build = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        project_name: str | None = None,
        overwrite: bool = False,
        executions_per_trial: int = 1,
        folds: int | None = None,
        keep_best_k: int = 10,
        max_seconds: float | None = None,
        max_total_epochs: int | None = None,
        patience: int | None = None,
        timeout_per_trial: float | None = None,
        process_memory: int | None = None,
        isolate: bool = False,
        transfer_from: str | os.PathLike[str] | None = None,
        transfer: _transfer.Transfer = "best",
        scale_width: tuple[int, int] | None = None,
        **kwargs: Unpack[_options.PassedOn],
    ) -> None:
        self._widths = None if scale_width is None else _widths.Widths.of(scale_width)
        if self._widths is not None:
            hypermodel = self._widths.builder(hypermodel)
        executions_per_trial, folds, keep_best_k = _options.checked_tuner_options(
            executions_per_trial, folds, keep_best_k, getattr(oracle, "goes_on", False)
        )
        if getattr(oracle, "compares_folds", False) and not folds:
            raise errors.InvalidOptionError(
                "A Wilcoxon pruner compares trials fold by fold. Received: folds=None. Use "
                "`folds`, or another pruner."
            )
        # `Hyperband` has a `run_trial` of its own, which needs a model as well.
        if hypermodel is None and not self._has_own_run_trial:
            raise errors.InvalidOptionError(
                "`hypermodel` may be left out only if `run_trial` is overridden. Received: "
                "hypermodel=None."
            )
        self._folds = folds
        # KerasTuner's constructor does the same, but later.
        self.executions_per_trial = executions_per_trial
        options = declared(tfbig.Model)
        given = {name: kwargs.pop(name) for name in options.keys() & kwargs.keys()}  # type: ignore[misc]
        self._model_options = {k: v for k, v in given.items() if v != options[k].default}
        super().__init__(
            oracle,
            hypermodel,
            directory=directory,
            project_name=project_name,
            overwrite=overwrite,
            keep_best_k=keep_best_k,
            max_seconds=max_seconds,
            max_total_epochs=max_total_epochs,
            patience=patience,
            timeout_per_trial=timeout_per_trial,
            process_memory=process_memory,
            isolate=isolate,
            transfer_from=transfer_from,
            transfer=transfer,
            executions_per_trial=executions_per_trial,
            **kwargs,
        )

    def _settings(self) -> dict[str, str]:
        return {
            "width": "" if self._widths is None else str(self._widths.search),
            _agreement.FOLDS: "none" if self._folds is None else str(self._folds),
            _agreement.EXECUTIONS: str(self.executions_per_trial),
        }

    # Keras's `fit`, as editors should show it; whatever a user's `fit` or `run_trial` takes.
    @overload
    def search(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: list[_types.Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int = 1,
    ) -> None: ...

    @overload
    def search(self, *fit_args: Any, **fit_kwargs: Any) -> None: ...

    def search(self, *fit_args: Any, **fit_kwargs: Any) -> None:
        """Runs trials until none is left. Any number of processes may do so at once.

        Args:
            *fit_args: Arguments of `fit`, or of what overrides it.
            **fit_kwargs: Arguments of `fit`, or of what overrides it.

        Raises:
            SearchError: If several trials in a row fail, if no trial completes, or if the model
                does not report the objective.
            StudyError: If a different search created the study.
            StorageUnavailableError: If the database cannot be reached.
        """
        if self._widths is not None:
            # What cannot be widened is refused now, rather than once the search has ended.
            hp = HyperParameters.of(self.oracle.get_space())
            self._at_width(hp, 2 * self._widths.search)
        fit_args, fit_kwargs = self._arguments_of_fit(fit_args, fit_kwargs)
        super().search(*fit_args, **fit_kwargs)

    def _arguments_of_fit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: the arguments of `search` that `run_trial` gets."""
        if self._has_own_run_trial or not self._uses_keras_fit():
            return args, kwargs
        _, *names = inspect.signature(keras.Model.fit).parameters
        if len(args) > len(names):
            return args, kwargs  # `fit` says what is wrong.
        # All but the data by name, as the tuner passes some of them itself.
        by_name = dict(zip(names[2:], args[2:], strict=False))
        return args[:2], dict(**by_name, **kwargs)

    @property
    def _has_own_run_trial(self) -> bool:
        """Whether `run_trial` is the user's."""
        return not type(self).run_trial.__module__.startswith("tfbig.tuners.")

    def run_trial(
        self, trial: _tuner_types.Trial, *args: Any, **kwargs: Any
    ) -> _tuner_types.Results:
        """Trains the model of a trial; override it for anything else.

        Args:
            trial: `keras_tuner.engine.trial.Trial`.
            *args: Those of `search`.
            **kwargs: Those of `search`.

        Returns:
            What `HyperModel.fit` returned in each execution: a history, a dictionary of metrics or
            a number.
        """
        given = kwargs.pop("callbacks", None) or []
        keep_best = _trial_callbacks.KeepBestWeights(
            self.oracle.objective,
            self._get_checkpoint_fname(trial.trial_id),
            self.oracle.best_reported(trial.trial_id),
            self._workers,
        )
        # What replaces `fit` may return metrics that no epoch reports.
        wanted = self.oracle.wanted if self._uses_keras_fit() else ()
        results: list[_tuner_types.Results] = []
        for number, (run_args, run_kwargs) in enumerate(self._executions(args, kwargs)):
            callbacks = self._deepcopy_callbacks(keras.tree.flatten(given))
            self._configure_tensorboard_dir(callbacks, trial, number)
            report = _trial_callbacks.ReportObjective(
                self.oracle,
                self._workers,
                trial.trial_id,
                wanted,
                reports=number == 0 and not self._folds,
            )
            callbacks += [_trial_callbacks.CallTuner(self, trial), report, keep_best]
            if self.oracle.goes_on:
                callbacks = self._with_state(trial, callbacks)
            keep_best.others = callbacks
            run_kwargs = run_kwargs | {"callbacks": callbacks}
            seed = self.oracle.seed_of_training(trial.trial_id, number)
            if seed is not None:
                keras.utils.set_random_seed(seed)
            results.append(self._build_and_fit_model(trial, *run_args, **run_kwargs))
            report.finish()
            if self._folds and number + 1 < self._folds:
                told = results[-1:] if self.oracle.compares_folds else results
                means, _ = _trial_results.best_of(told, self.oracle.objective)
                report.decide(means, number + 1)
                report.finish()
        return results

    def _with_state(
        self, trial: _tuner_types.Trial, callbacks: list[_types.Callback]
    ) -> list[_types.Callback]:
        """Callbacks, and one that keeps the state of a trial that another process may resume."""
        state = pathlib.Path(self.get_trial_dir(trial.trial_id), _trial_callbacks.STATE)
        return [*callbacks, self._keep_state(trial, state)]

    def _keep_state(self, trial: _tuner_types.Trial, state: pathlib.Path) -> _types.Callback:
        # A trial that has reported nothing was not trained: what is there is of another search.
        if self._workers.is_chief and self.oracle.last_step(trial.trial_id) == 0:
            shutil.rmtree(state, ignore_errors=True)
        if self._workers.count > 1:
            self._workers.exchange("the state of a trial", "")
        return _trial_callbacks.KeepState(state)

    def _executions(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterable[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of `fit` in each execution of a trial."""
        if self._folds:
            return _folds.arguments(self._folds, self.oracle.seed_of_folds, args, kwargs)
        return ((args, kwargs) for _ in range(self.executions_per_trial))

    def _build_and_fit_model(
        self, trial: _tuner_types.Trial, *args: Any, **kwargs: Any
    ) -> _tuner_types.Results:
        hp = trial.hyperparameters
        model = self._try_build(hp)
        if self._uses_keras_fit():
            searched = {n: hp.values[n] for n in FIT_ARGUMENTS if n in hp.values}
            # The lines of epochs would hide those of trials.
            kwargs = {"verbose": 0} | searched | kwargs
        results = self.hypermodel.fit(hp, model, *args, **kwargs)
        _trial_results.check(results, self.oracle.objective, "HyperModel.fit()")
        return results

    def _uses_keras_fit(self, model: keras.Model | None = None) -> bool:
        """Whether `fit` is Keras's, and not the user's."""
        fit = getattr(type(self.hypermodel), "fit", None)
        is_of_model = model is None or type(model).fit.__module__.startswith(("keras.", "tfbig."))
        return fit is keras_tuner.HyperModel.fit and is_of_model

    # --- Models ---

    def _build_hypermodel(self, hp: HyperParameters) -> keras.Model:
        previous = keras.config.dtype_policy()
        if PRECISION in hp.values:
            keras.config.set_dtype_policy(hp.values[PRECISION])
        try:
            with keras_tuner.engine.tuner.maybe_distribute(self.distribution_strategy):
                model = self.hypermodel.build(hp)
                self._compile(model)
                if model.compiled:
                    _set_clipping(model.optimizer, hp)
                return self._extended(model)
        finally:
            keras.config.set_dtype_policy(previous)

    def _compile(self, model: keras.Model) -> None:
        """Compiles a model with the tuner's settings; checks that it can be trained."""
        if not isinstance(model, keras.Model):
            raise NotAModelError(
                "The model-building function must return a Keras model. Received: "
                f"{model!r} of type {type(model).__name__}."
            )
        if model.compiled:
            self._override_compile_args(model)
        elif self.optimizer and self.loss:
            model.compile(loss=self.loss)
            self._override_compile_args(model)
        if not model.compiled and self._uses_keras_fit(model):
            raise errors.SearchError(
                "The model-building function must return a compiled model, unless the tuner has "
                "an optimizer and a loss. Received: a model that is not compiled."
            )

    def _extended(self, model: keras.Model) -> keras.Model:
        """The model with tfbig's step, if that makes a difference."""
        wanted = (
            self._model_options or self.distribution_strategy is not None or self.oracle.goes_on
        )
        computes_in_float16 = "float16" in {layer.compute_dtype for layer in model.layers}
        if isinstance(model, TrainStep) or not (wanted or computes_in_float16):
            return model
        return tfbig.extend(model, **cast(step_options.Options, self._model_options))

    def _try_build(self, hp: HyperParameters) -> keras.Model:
        # Removes what the models of earlier trials have left; collects garbage as well.
        keras.backend.clear_session()
        model = self._build_hypermodel(hp)
        size = sum(math.prod(v.shape) for v in model.trainable_weights) if model.built else 0
        if self.max_model_size and size > self.max_model_size:
            raise keras_tuner.errors.FailedTrialError(
                f"The model has {size} parameters, more than max_model_size={self.max_model_size}."
            )
        return model

    def build_wide(self, hyperparameters: HyperParameters | None = None) -> keras.Model:
        """The model of the larger width of `scale_width`, parametrized by `tfbig.mup`.

        Args:
            hyperparameters: Defaults to the best of the search.

        Returns:
            A compiled model, not trained. If `batch_size` or `epochs` was searched, pass the best
            one to `fit`.

        Raises:
            InvalidOptionError: Without `scale_width`, or if `tfbig.mup` does not know the
                optimizer.
            UnsupportedModelError: If `tfbig.mup` cannot parametrize the model.
            SearchError: If there is no best one yet.
        """
        if self._widths is None:
            raise errors.InvalidOptionError(
                "`build_wide` needs a width to scale to. Received: scale_width=None."
            )
        if hyperparameters is None:
            found = self.get_best_hyperparameters()
            if not found:
                raise errors.SearchError("No trial is complete, whose values could be the best.")
            hyperparameters = found[0]
        return self._at_width(hyperparameters, self._widths.wide)

    def _at_width(self, hp: HyperParameters, width: int) -> keras.Model:
        """A model of another width than that of the search, parametrized."""
        assert self._widths is not None
        base = self._widths.search
        found = []
        # First the one that is wanted, so that it draws the same random numbers as without others.
        for each in (width, base, 2 * base if width != 2 * base else 3 * base):
            with self._widths.at(each):
                found.append(self._build_hypermodel(hp.copy()))
        return mup.parametrize(found[0], base=found[1], delta=found[2])

    def save_model(self, trial_id: str, model: keras.Model, step: int = 0) -> None:
        """Saves the weights that `get_best_models` loads; for a `run_trial` of your own.

        What `fit` trains with the callbacks of the tuner is saved without it. With several workers,
        the chief saves; with `shard`, all must call it.

        Args:
            trial_id: The id of the trial.
            model: The model, whose weights replace those saved before.
            step: As in KerasTuner, which ignores it.
        """
        del step
        path = self._get_checkpoint_fname(trial_id)
        saving = _trial_callbacks.KeepBestWeights(self.oracle.objective, path, None, self._workers)
        saving.set_model(model)
        saving.on_epoch_end(0)

    def load_model(self, trial: _tuner_types.Trial) -> keras.Model:
        """The model of a trial with the weights of its best epoch."""
        path = self._get_checkpoint_fname(trial.trial_id)
        if not os.path.exists(path):
            raise errors.SearchError(
                f"The weights of trial {trial.trial_id} are not there: only those of the best "
                f"{self._keep_best_k} trials are kept, and only if they were saved. Use a larger "
                "`keep_best_k`; call `save_model` in a `run_trial` of your own; or train again "
                "with get_best_hyperparameters()."
            )
        model = self._try_build(trial.hyperparameters)
        with keras_tuner.engine.tuner.maybe_distribute(self.distribution_strategy):
            if not model.built:
                model.build_from_config(json.loads(pathlib.Path(path).with_name(BUILD).read_text()))
            optimizer = getattr(model, "optimizer", None)  # None if `fit` is the user's.
            if (
                optimizer is not None
                and not optimizer.built
                and _keras.saving.has_state_of_built(optimizer, path)
            ):
                optimizer.build(model.trainable_variables)
            model.load_weights(path)
        return model

    # --- Results, besides those of `TunerResults` ---

    def search_space_summary(self, extended: bool = False) -> None:
        """Prints the hyperparameters and their ranges.

        Args:
            extended: As in KerasTuner, which ignores it.
        """
        super().search_space_summary(extended)

    def _configure_tensorboard_dir(
        self, callbacks: list[_types.Callback], trial: _tuner_types.Trial, execution: int = 0
    ) -> None:
        boards = [c for c in callbacks if isinstance(c, keras.callbacks.TensorBoard)]
        if not boards:
            return
        for board in boards:
            board.log_dir = self._get_tensorboard_dir(board.log_dir, trial.trial_id, execution)
        callbacks += _hparams_callbacks(boards, trial)


def _hparams_callbacks(
    boards: list[_types.Callback], trial: _tuner_types.Trial
) -> list[_types.Callback]:
    """Callbacks that show the hyperparameters of a trial in TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        return []
    from tensorboard.plugins.hparams import api

    simple = (bool, int, float, str)
    hparams = {
        name: value if isinstance(value, simple) else str(value)
        for name, value in trial.hyperparameters.values.items()
    }
    return [
        api.KerasCallback(writer=board.log_dir, hparams=hparams, trial_id=trial.trial_id)
        for board in boards
    ]


def _set_clipping(optimizer: _types.Optimizer, hp: HyperParameters) -> None:
    """Gives an optimizer the clipping that the hyperparameters say."""
    for name in CLIPPING:
        if name in hp.values:
            setattr(getattr(optimizer, "inner_optimizer", optimizer), name, hp.values[name])
