"""Searches with one of Optuna's samplers."""

from typing import Unpack

from tfbig.tuners import _options, _oracle, _samplers, _sampling_oracles, _tuner

__all__ = ("BayesianOptimization", "HyperoptSearch", "OptunaSearch", "RandomSearch")


class OptunaSearch(_tuner.Tuner):
    """Searches with any of Optuna's samplers and pruners.

    The first trial has the defaults of all hyperparameters.

    Args:
        hypermodel: Function of `hp` that returns a compiled Keras model, or a
            `keras_tuner.HyperModel`. May be left out if `run_trial` is overridden.
        objective: The name of a metric, or `keras_tuner.Objective`; or a list of them, to search
            for their Pareto front. May be left out if `fit` or `run_trial` returns a number to
            minimize.
        max_trials: How many trials there are, in all processes and runs together. Defaults to 10.
        sampler: "tpe", "random", "gp" (needs torch), "cmaes" (needs cmaes), "nsga2", "qmc",
            "hyperopt"; or a function of a seed that returns an `optuna` sampler. Defaults to
            "tpe".
        seed: With a seed, a search in one process is reproducible, also if it is interrupted and
            resumed.
        sampler_options: Arguments of Optuna's class for a sampler that is given by name, such as
            `{"n_startup_trials": 20, "multivariate": False}` for "tpe".
        pruner: None, "median", "asha", "hyperband", "patience", or, with `folds`, "wilcoxon"; or a
            function of a seed that returns an `optuna` pruner. Defaults to None.
        pruner_options: Arguments of Optuna's class for a pruner that is given by name, such as
            `{"reduction_factor": 3}` for "asha".
        hyperparameters: `keras_tuner.HyperParameters` that override those that the model asks for.
        storage: None for a file in the project's directory, a database URL for several machines,
            or "memory". On a network file system use a URL.
        grace_period: If a process has had no heartbeat for so many seconds, another one runs its
            trial. Defaults to 60.
        constraints: Function of a trial's metrics that returns a dictionary of numbers; the trial
            is feasible if all of them are <= 0.
        **kwargs: The other options of `Tuner` and `StudyOracle`: `directory`, `project_name`,
            `overwrite`, `executions_per_trial`, `folds`, `max_retries_per_trial`,
            `max_consecutive_failed_trials`, `max_seconds`, `max_total_epochs`, `patience`,
            `timeout_per_trial`, `process_memory`, `keep_best_k`,
            `isolate`, `transfer_from`, `transfer`, `scale_width`, `distribution_strategy`,
            `optimizer`, `loss`, `metrics`, `max_model_size`; and the options of `tfbig.Model`, such
            as `micro_batch_size`, for every model.

    Raises:
        InvalidOptionError: If an argument is not valid, or needs a package that is not installed.
        StudyError: If a different search created the project. Nothing is changed then.

    Example:

    >>> import tempfile
    >>> def build(hp):
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     rate = hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
    ...     model.compile(keras.optimizers.SGD(rate), "mse")
    ...     return model
    >>> tuner = tfbig.tuners.OptunaSearch(
    ...     build, "val_loss", max_trials=3, seed=0, directory=tempfile.mkdtemp()
    ... )
    >>> x, y = np.ones((8, 4)), np.ones((8, 1))
    >>> tuner.search(x, y, validation_data=(x, y), epochs=2, verbose=0)
    >>> len(tuner.oracle.trials)
    3
    """

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 10,
        *,
        sampler: _samplers.SamplerOption = "tpe",
        seed: int | None = None,
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        of_oracle, of_tuner = _options.split(kwargs)
        oracle = _oracle.StudyOracle(
            objective=objective, max_trials=max_trials, sampler=sampler, seed=seed, **of_oracle
        )
        super().__init__(oracle, hypermodel, **of_tuner)


class RandomSearch(_tuner.Tuner):
    """Tries values at random; see `OptunaSearch` for the arguments."""

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 10,
        seed: int | None = None,
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        of_oracle, of_tuner = _options.split(kwargs)
        oracle = _sampling_oracles.RandomSearchOracle(objective, max_trials, seed, **of_oracle)
        super().__init__(oracle, hypermodel, **of_tuner)


class BayesianOptimization(_tuner.Tuner):
    """Tries values that a model of the objective expects to do well.

    See `OptunaSearch` for the other arguments.

    Args:
        num_initial_points: How many trials at the beginning are random. Defaults to 10.
        alpha: Of KerasTuner's Gaussian process; ignored.
        beta: Of KerasTuner's Gaussian process; ignored.
        sampler: "tpe", or "gp", which needs torch. Defaults to "tpe".
    """

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 10,
        num_initial_points: int | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        seed: int | None = None,
        *,
        sampler: _samplers.SamplerOption = "tpe",
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        _sampling_oracles.warn_if_ignored(alpha, beta)
        of_oracle, of_tuner = _options.split(kwargs)
        oracle = _sampling_oracles.BayesianOptimizationOracle(
            objective, max_trials, num_initial_points, seed=seed, sampler=sampler, **of_oracle
        )
        super().__init__(oracle, hypermodel, **of_tuner)


class HyperoptSearch(OptunaSearch):
    """Searches with Hyperopt's TPE; needs `tfbig[hyperopt]`. See `OptunaSearch`."""

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        max_trials: int | None = 10,
        seed: int | None = None,
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        super().__init__(hypermodel, objective, max_trials, sampler="hyperopt", seed=seed, **kwargs)
