"""A search for models of scikit-learn, with cross-validation."""

import os
import pathlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from tfbig import errors
from tfbig.tuners import _agreement, _base_tuner, _options, _oracle, _tuner_types
from tfbig.tuners._trial_callbacks import TrialLost, TrialPruned

__all__ = ("SklearnTuner",)

# scikit-learn has no types, and is optional.
_Estimator: TypeAlias = Any
_Splitter: TypeAlias = Any
_Data: TypeAlias = Any

# A scorer is called with model, x and y; a metric with true and predicted y.
_Scorer: TypeAlias = Callable[..., float]

_SCORE = "score"


class SklearnTuner(_base_tuner.BaseTuner):
    """Searches for a model of scikit-learn by cross-validation.

    The score of a trial is the mean over the folds; a pruner looks at the mean after each fold. The
    model of the last fold is kept, in a pickle in the project's directory: load only projects that
    you trust.

    Args:
        oracle: One of `tfbig.tuners.oracles` that knows nothing of epochs, with the objective
            `Objective("score", "max")`.
        hypermodel: Function of `hp`, or `HyperModel`, that returns an estimator.
        scoring: The name of a score, or a scorer from `sklearn.metrics.make_scorer`; None for the
            estimator's own score.
        metrics: Functions of `sklearn.metrics`, or one, that are reported as well.
        cv: A splitter of `sklearn.model_selection`. Defaults to five shuffled folds, the same for
            all trials.
        **kwargs: As for `tfbig.tuners.engine.base_tuner.BaseTuner`.

    Example:

    >>> import tempfile
    >>> from sklearn import linear_model
    >>> from tfbig import tuners
    >>> tuner = tuners.SklearnTuner(
    ...     tuners.oracles.RandomSearchOracle(tuners.Objective("score", "max"), max_trials=3),
    ...     lambda hp: linear_model.Ridge(hp.Float("alpha", 1e-3, 1, sampling="log")),
    ...     directory=tempfile.mkdtemp(),
    ... )
    >>> x = np.arange(20.0)[:, None]
    >>> tuner.oracle.verbose = 0
    >>> tuner.search(x, 2 * x[:, 0])
    >>> round(float(tuner.get_best_models()[0].coef_[0]), 1)
    2.0
    """

    _model_file = "model.pickle"

    def __init__(
        self,
        oracle: _oracle.StudyOracle,
        hypermodel: _options.BuildAny,
        scoring: str | _Scorer | None = None,
        metrics: _Scorer | Sequence[_Scorer] | None = None,
        cv: _Splitter | None = None,
        **kwargs: Any,  # Those of `BaseTuner`.
    ) -> None:
        try:
            import sklearn.metrics
            import sklearn.model_selection
        except ImportError:
            raise errors.InvalidOptionError(
                "`SklearnTuner` needs scikit-learn, which is not installed. "
                "pip install tfbig[sklearn]"
            ) from None
        if getattr(oracle, "goes_on", False):
            raise errors.InvalidOptionError(
                "`oracle` must not count epochs, which models of scikit-learn do not have. "
                f"Received: oracle={oracle!r}. Use another one of tfbig.tuners.oracles."
            )
        self.scoring = sklearn.metrics.get_scorer(scoring)
        self.metrics = [metrics] if callable(metrics) else list(metrics or ())
        self.cv = cv or sklearn.model_selection.KFold(5, shuffle=True, random_state=1)
        self._scoring_name = _name_of(scoring)
        super().__init__(oracle, hypermodel, **kwargs)

    def _settings(self) -> dict[str, str]:
        # Not `repr`, which differs between versions and has addresses.
        count = getattr(self.cv, "n_splits", None)
        splitter = type(self.cv).__name__ + (f" ({count})" if count else "")
        return {_agreement.SCORING: self._scoring_name, _agreement.CROSS_VALIDATION: splitter}

    # The names are those of KerasTuner and of scikit-learn.
    def search(
        self,
        X: _Data,  # noqa: N803
        y: _Data,
        sample_weight: _Data = None,
        groups: _Data = None,
    ) -> None:
        """Runs trials until none is left. Any number of processes may do so at once.

        Args:
            X: Samples: arrays, sparse matrices or data frames.
            y: Targets.
            sample_weight: Weights of samples, for estimators that take them, and for scores.
            groups: For splitters such as `GroupKFold`.

        Raises:
            SearchError: If the data cannot be split; else as in `Tuner.search`.
        """
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        for name, data in {"X": X, "y": y, **weights}.items():
            if not hasattr(data, "shape"):
                raise errors.SearchError(
                    f"`{name}` must be an array, a sparse matrix or a data frame. Received: "
                    f"{type(data).__name__}. Use np.asarray({name})."
                )
        # Not all kinds of sparse matrices have rows that can be taken out.
        X, y = (d.tocsr() if hasattr(d, "tocsr") else d for d in (X, y))  # noqa: N806
        super().search(X, y, sample_weight=sample_weight, groups=groups)

    def run_trial(
        self,
        trial: _tuner_types.Trial,
        X: _Data,  # noqa: N803
        y: _Data,
        sample_weight: _Data = None,
        groups: _Data = None,
    ) -> _tuner_types.Metrics:
        """Trains a model on each fold.

        Args:
            trial: `keras_tuner.engine.trial.Trial`.
            X: See `search`.
            y: See `search`.
            sample_weight: See `search`.
            groups: See `search`.

        Returns:
            The means over the folds: "score", and each metric by its name.
        """
        seed = self.oracle.seed_of_training(trial.trial_id, 0)
        if seed is not None:
            keras.utils.set_random_seed(seed)
        found: dict[str, list[float]] = {}
        folds = list(self.cv.split(X, y, groups))
        for number, (train, held_out) in enumerate(folds, 1):
            model = self.hypermodel.build(trial.hyperparameters)
            _fit(model, _taken(X, train), _taken(y, train), _weights(sample_weight, train))
            scores = self._scores(
                model, _taken(X, held_out), _taken(y, held_out), _weights(sample_weight, held_out)
            )
            for name, value in scores.items():
                found.setdefault(name, []).append(value)
            means = {name: float(np.mean(values)) for name, values in found.items()}
            last = {name: values[-1] for name, values in found.items()}
            told = last if self.oracle.compares_folds else means
            self._report(trial.trial_id, told, number, is_last=number == len(folds))
        self.save_model(trial.trial_id, model)
        return means

    def _scores(
        self, model: _Estimator, x: _Data, y: _Data, weights: dict[str, _Data]
    ) -> _tuner_types.Metrics:
        if self.scoring is None:
            scores = {_SCORE: float(model.score(x, y, **weights))}
        else:
            scores = {_SCORE: float(self.scoring(model, x, y, **weights))}
        if self.metrics:
            predicted = model.predict(x)
            scores |= {m.__name__: float(m(y, predicted, **weights)) for m in self.metrics}
        return scores

    def _report(
        self, trial_id: str, metrics: _tuner_types.Metrics, fold: int, is_last: bool
    ) -> None:
        """Reports a fold to the study; ends the trial if it is pruned or lost."""
        is_pruned = self.oracle.report(trial_id, metrics, fold)
        if self.oracle.is_lost(trial_id):
            raise TrialLost
        # After the last fold, pruning saves nothing.
        if is_pruned and not is_last:
            raise TrialPruned
        if self.oracle.is_late(trial_id) and not is_last:
            raise TrialPruned(self.oracle.too_late)

    def save_model(self, trial_id: str, model: _Estimator, step: int = 0) -> None:
        """Keeps the model of a trial.

        Args:
            trial_id: The trial.
            model: An estimator.
            step: As in KerasTuner, which ignores it.
        """
        del step
        path = pathlib.Path(self.get_trial_dir(trial_id), self._model_file)
        # If the process is killed, the old model or the new one remains.
        temporary = path.with_name(f"new-{os.getpid()}.{path.name}")
        temporary.write_bytes(pickle.dumps(model))
        os.replace(temporary, path)

    def load_model(self, trial: _tuner_types.Trial) -> _Estimator:
        """The model of a trial, from the last fold."""
        path = pathlib.Path(self.get_trial_dir(trial.trial_id), self._model_file)
        if not path.exists():
            raise errors.SearchError(
                f"The model of trial {trial.trial_id} is not kept: only those of the best "
                f"{self._keep_best_k} trials are. Use a larger `keep_best_k`, or train again with "
                "get_best_hyperparameters()."
            )
        return pickle.loads(path.read_bytes())


def _name_of(scoring: str | _Scorer | None) -> str:
    """What tells one way to score from another, the same in all processes."""
    if scoring is None or isinstance(scoring, str):
        return scoring or "the estimator's own"
    # That of what `make_scorer` returns.
    function = getattr(scoring, "_score_func", scoring)
    return str(getattr(function, "__name__", type(function).__name__))


def _taken(data: _Data, indices: np.ndarray) -> _Data:
    return data.iloc[indices] if hasattr(data, "iloc") else data[indices]


def _weights(sample_weight: _Data, indices: np.ndarray) -> dict[str, _Data]:
    """The keyword argument for the weights of some samples, if there are weights."""
    return {} if sample_weight is None else {"sample_weight": _taken(sample_weight, indices)}


def _fit(model: _Estimator, x: _Data, y: _Data, weights: dict[str, _Data]) -> None:
    """Fits a model, with weights if it takes them."""
    from sklearn.pipeline import Pipeline
    from sklearn.utils.validation import has_fit_parameter

    last, prefix = model, ""
    if isinstance(model, Pipeline):
        # A pipeline passes on what begins with the name of a step.
        prefix, last = f"{model.steps[-1][0]}__", model.steps[-1][1]
    takes = has_fit_parameter(last, "sample_weight")
    model.fit(x, y, **{prefix + name: value for name, value in weights.items() if takes})
