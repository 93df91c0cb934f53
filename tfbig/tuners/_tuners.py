"""The tuners that users name."""

import warnings

from tfbig.tuners import _hyperband, _oracle, _proposals, _samplers, _space, _tuner

__all__ = (
    "BayesianOptimization",
    "GridSearch",
    "Hyperband",
    "HyperoptSearch",
    "OptunaSearch",
    "RandomSearch",
)

# Arguments of a tuner that are the oracle's.
_OF_ORACLE = (
    "objective",
    "hyperparameters",
    "allow_new_entries",
    "tune_new_entries",
    "seed",
    "max_retries_per_trial",
    "max_consecutive_failed_trials",
    "storage",
    "grace_period",
    "constraints",
    "pruner",
)


def _of_oracle(kwargs):
    """Takes the oracle's arguments out of those of a tuner."""
    return {name: kwargs.pop(name) for name in _OF_ORACLE if name in kwargs}


class OptunaSearch(_tuner.Tuner):
    """Searches with any of Optuna's samplers and pruners.

    The first trial has the defaults of all hyperparameters.

    Args:
        hypermodel: function of `hp` that returns a compiled Keras model, or a
            `keras_tuner.HyperModel`. May be left out if `run_trial` is overridden.
        objective: str, the name of a metric, or `keras_tuner.Objective`; or a list of them,
            whose Pareto front is searched. May be left out if `fit` or `run_trial`
            returns a number to minimize.
        max_trials: int, how many trials there are, all processes and runs together.
            Defaults to 10.
        sampler: "tpe", "random", "gp" (needs torch), "cmaes" (needs cmaes), "nsga2", "qmc",
            "hyperopt"; or a function of a seed that returns an `optuna` sampler. Defaults to
            "tpe".
        pruner: None, "median", "asha", "hyperband" or "patience"; or a function of a seed
            that returns an `optuna` pruner. Defaults to None.
        hyperparameters: `keras_tuner.HyperParameters`, to override what the model
            asks for.
        seed: int or None. With a seed, a search in one process is the same again, also when
            it was interrupted.
        storage: None for a file in the project's directory, a database URL for
            several machines, or "memory". On a network file system use a URL.
        grace_period: float, seconds after which the trial of a process that is not heard of
            is run by another. Defaults to 60.
        constraints: function of the metrics of a trial that returns a dictionary of numbers; a
            trial is feasible where all of them are <= 0.
        **kwargs: `directory`, `project_name`, `overwrite`, `executions_per_trial`,
            `max_retries_per_trial`, `max_consecutive_failed_trials`, `max_seconds`,
            `max_total_epochs`, `keep_best_k`, `micro_batch_size`, `memory_budget`,
            `gradient_accumulation_steps`, `recompute`, `loss_scale`,
            `distribution_strategy`, `optimizer`, `loss`, `metrics`, `max_model_size`.

    Raises:
        InvalidOptionError: If an argument is not valid, or needs what is not installed.
        StudyError: If the project is of another search; nothing is changed then.

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

    def __init__(self, hypermodel=None, objective=None, max_trials=10, *, sampler="tpe", **kwargs):
        oracle = _oracle.StudyOracle(
            objective=objective, max_trials=max_trials, sampler=sampler, **_of_oracle(kwargs)
        )
        super().__init__(oracle, hypermodel, **kwargs)


class RandomSearch(OptunaSearch):
    """Searches at random; see `OptunaSearch` for the arguments."""

    def __init__(self, hypermodel=None, objective=None, max_trials=10, seed=None, **kwargs):
        super().__init__(hypermodel, objective, max_trials, sampler="random", seed=seed, **kwargs)


class BayesianOptimization(OptunaSearch):
    """Searches where a model of the objective says that it is worth it.

    See `OptunaSearch` for the other arguments.

    Args:
        num_initial_points: int or None, trials at random at the beginning. Defaults to 10.
        alpha: of KerasTuner's Gaussian process; not used.
        beta: of KerasTuner's Gaussian process; not used.
        sampler: "tpe", or "gp" where torch is installed. Defaults to "tpe".
    """

    def __init__(
        self,
        hypermodel=None,
        objective=None,
        max_trials=10,
        num_initial_points=None,
        alpha=None,
        beta=None,
        seed=None,
        *,
        sampler="tpe",
        **kwargs,
    ):
        if alpha is not None or beta is not None:
            warnings.warn(
                "`alpha` and `beta` are of KerasTuner's Gaussian process, and not used here.",
                stacklevel=2,
            )
        if num_initial_points is not None:
            sampler = _samplers.beginning_at_random(sampler, num_initial_points)
        super().__init__(hypermodel, objective, max_trials, sampler=sampler, seed=seed, **kwargs)


class HyperoptSearch(OptunaSearch):
    """Searches with Hyperopt's TPE, needs `tfbig[hyperopt]`; see `OptunaSearch`."""

    def __init__(self, hypermodel=None, objective=None, max_trials=10, seed=None, **kwargs):
        super().__init__(hypermodel, objective, max_trials, sampler="hyperopt", seed=seed, **kwargs)


class _GridOracle(_oracle.StudyOracle):
    _values_of = staticmethod(_space.grid_values)

    def _take_new(self):
        while (values := self._proposals.first_untried()) is not _proposals.EXHAUSTED:
            slot = self._ledger.take_new(self.max_trials, claim=_proposals.name_of(values))
            is_over = self.max_trials is not None and self.remaining_trials() <= 0
            if slot is not None or is_over:
                return slot
        return None


class GridSearch(_tuner.Tuner):
    """Tries all combinations of values, each once; see `OptunaSearch` for the arguments.

    A range without steps has ten values, as in KerasTuner. What a trial did not ask for, though
    others do, is taken not to matter to it.

    Args:
        max_trials: int, or None, to end when all have been tried.
    """

    def __init__(self, hypermodel=None, objective=None, max_trials=None, seed=None, **kwargs):
        oracle = _GridOracle(
            objective=objective,
            max_trials=max_trials,
            sampler="random",
            seed=seed,
            **_of_oracle(kwargs),
        )
        super().__init__(oracle, hypermodel, **kwargs)


class Hyperband(_tuner.Tuner):
    """Trains many models for few epochs, and the best of them for more.

    Brackets and rungs are those of the paper (Li et al., JMLR 18, 2018). A model that
    goes on does so where it was: optimizer, loss scale, epoch and random states
    are kept, and its trial keeps its id. `search` is not given `epochs`.

    See `OptunaSearch` for the other arguments.

    Args:
        max_epochs: int, epochs of a model that is trained to its end. Defaults to 100.
        factor: int, one of so many models goes on. Defaults to 3.
        hyperband_iterations: int, how often all brackets are run. Defaults to 1.
        sampler: as in `OptunaSearch`; what the models of a bracket are drawn with. Defaults to
            "random", as in the paper.
    """

    def __init__(
        self,
        hypermodel=None,
        objective=None,
        max_epochs=100,
        factor=3,
        hyperband_iterations=1,
        seed=None,
        *,
        sampler="random",
        **kwargs,
    ):
        oracle = _hyperband.HyperbandOracle(
            max_epochs,
            factor,
            hyperband_iterations,
            objective=objective,
            sampler=sampler,
            seed=seed,
            **_of_oracle(kwargs),
        )
        super().__init__(oracle, hypermodel, **kwargs)

    def run_trial(self, trial, *args, **kwargs):
        """Trains the model of a trial up to the end of its rung."""
        kwargs["epochs"] = self.oracle.epochs_of(trial.trial_id)
        return super().run_trial(trial, *args, **kwargs)
