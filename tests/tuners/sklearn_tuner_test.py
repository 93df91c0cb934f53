"""`SklearnTuner`: cross-validated searches for models of scikit-learn."""

import builtins
import sys

import numpy as np
import pytest
import scipy.sparse

pytest.importorskip("sklearn")

from sklearn import (
    datasets,
    decomposition,
    ensemble,
    linear_model,
    metrics,
    model_selection,
    neighbors,
    pipeline,
)

from tfbig import errors
from tfbig import tuners as kt

X, Y = datasets.load_iris(return_X_y=True)
SCORE = kt.Objective("score", "max")


def build(hp):
    """A model of one of three kinds, one of which takes no weights."""
    kind = hp.Choice("kind", ["forest", "ridge", "neighbors"])
    with hp.conditional_scope("kind", [kind]):
        if kind == "forest":
            trees = hp.Int("trees", 2, 10, step=4)
            return ensemble.RandomForestClassifier(trees, max_depth=hp.Int("depth", 2, 4))
        if kind == "ridge":
            return linear_model.RidgeClassifier(hp.Float("alpha", 1e-3, 1, sampling="log"))
        return neighbors.KNeighborsClassifier(hp.Int("count", 1, 9, default=5))


# scikit-learn's models are pickled, so their classes must be importable.
class Ridge(linear_model.RidgeClassifier):
    """Records the weights that it is fitted with."""

    fitted = ()

    def fit(self, X, y, sample_weight=None):  # noqa: N803
        self.fitted.append(sample_weight)
        return super().fit(X, y, sample_weight)


class Bad(neighbors.KNeighborsClassifier):
    """Has the worst score there is; records how often it is fitted."""

    trained = ()

    def fit(self, X, y):  # noqa: N803
        self.trained.append(1)
        return super().fit(X, y)

    def score(self, X, y, sample_weight=None):  # noqa: N803
        return 0.0


@pytest.fixture
def make(tmp_path):
    """Makes tuners over one project."""

    def made(hypermodel=build, oracle=None, max_trials=4, **arguments):
        oracle = oracle or kt.oracles.RandomSearchOracle(SCORE, max_trials=max_trials, seed=0)
        oracle.verbose = 0
        tuner = kt.SklearnTuner(oracle, hypermodel, directory=str(tmp_path), **arguments)
        tuner.oracle.verbose = 0
        return tuner

    return made


def test_the_best_model_is_found_scored_and_kept(make):
    tuner = make(
        scoring=metrics.make_scorer(metrics.accuracy_score),
        metrics=metrics.balanced_accuracy_score,
        cv=model_selection.StratifiedKFold(3),
        oracle=kt.oracles.BayesianOptimizationOracle(SCORE, max_trials=6, seed=0),
    )
    tuner.search(X, Y)
    (best,) = tuner.oracle.get_best_trials()
    assert best.status == "COMPLETED"
    assert best.best_step == 0
    assert best.score == max(t.score for t in tuner.oracle.trials.values()) > 0.9
    assert best.metrics.exists("balanced_accuracy_score")
    models = tuner.get_best_models(6)
    assert models[0].score(X, Y) > 0.9
    assert len(models) == 6


def test_the_score_is_the_mean_over_the_folds(make):
    folds = model_selection.StratifiedKFold(3)
    tuner = make(lambda hp: linear_model.RidgeClassifier(hp.Fixed("alpha", 1.0)), cv=folds)
    tuner.search(X, Y)
    expected = model_selection.cross_val_score(linear_model.RidgeClassifier(), X, Y, cv=folds)
    (trial,) = tuner.oracle.trials.values()
    assert trial.score == pytest.approx(expected.mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scoring": "balanced_accuracy"}, "scoring: 'accuracy', expected 'balanced_accuracy'"),
        ({"scoring": metrics.make_scorer(metrics.zero_one_loss)}, "expected 'zero_one_loss'"),
        ({"scoring": None}, 'expected "the estimator\'s own"'),
        ({"cv": model_selection.KFold(4)}, r"'StratifiedKFold \(3\)', expected 'KFold \(4\)'"),
    ],
)
def test_how_trials_are_scored_must_not_change_on_resume(make, change, told):
    given = {"scoring": "accuracy", "cv": model_selection.StratifiedKFold(3)}
    make(max_trials=1, **given).search(X, Y)
    with pytest.raises(errors.StudyError, match=told):
        make(max_trials=2, **given | change).search(X, Y)
    again = make(max_trials=2, **given)
    again.search(X, Y)
    assert len(again.oracle.trials) == 2


def test_weights_reach_the_models_that_take_them_and_the_scores(make):
    weights = np.where(Y == 2, 0.0, 1.0)
    fitted = Ridge.fitted = []

    def build(hp):
        if hp.Choice("kind", ["ridge", "pipeline", "neighbors"]) == "neighbors":
            return neighbors.KNeighborsClassifier()
        if hp.get("kind") == "ridge":
            return Ridge()
        return pipeline.Pipeline([("pca", decomposition.PCA(2)), ("ridge", Ridge())])

    def weighted(y, predicted, sample_weight):
        return float(np.sum(sample_weight))

    tuner = make(build, cv=model_selection.StratifiedKFold(3), metrics=[weighted])
    tuner.search(X, Y, sample_weight=weights)
    assert len(tuner.oracle.trials) == 3
    assert len(fitted) == 6
    assert all(set(w) == {0.0, 1.0} for w in fitted)
    for trial in tuner.oracle.trials.values():
        assert trial.metrics.get_best_value("weighted") == pytest.approx(100 / 3)


@pytest.mark.parametrize("kind", ["coo", "bsr", "lil", "csc", "csr"])
@pytest.mark.parametrize("container", ["matrix", "array"])
def test_all_sparse_matrices_are_taken(make, kind, container):
    sparse = getattr(scipy.sparse, f"{kind}_{container}")
    tuner = make(lambda hp: linear_model.RidgeClassifier(hp.Fixed("alpha", 1.0)))
    tuner.search(sparse(X), Y)
    expected = model_selection.cross_val_score(linear_model.RidgeClassifier(), X, Y, cv=tuner.cv)
    (trial,) = tuner.oracle.trials.values()
    assert trial.score == pytest.approx(expected.mean(), rel=1e-6)


def test_groups_stay_together(make):
    groups, held_out = np.arange(len(Y)) % 5, []

    class Groups(model_selection.GroupKFold):
        def split(self, X, y=None, groups=None):  # noqa: N803
            for train, test in super().split(X, y, groups):
                held_out.append(set(groups[test]))
                yield train, test

    make(cv=Groups(5), max_trials=1).search(X, Y, groups=groups)
    assert sorted(map(sorted, held_out)) == [[i] for i in range(5)]


def test_a_search_resumes_and_only_the_best_models_are_kept(make):
    make(keep_best_k=2, max_trials=3).search(X, Y)
    tuner = make(keep_best_k=2, max_trials=3)
    tuner.search(X, Y)
    assert len(tuner.oracle.trials) == 3
    assert len(tuner.get_best_models(2)) == 2
    with pytest.raises(errors.SearchError, match="keep_best_k"):
        tuner.get_best_models(3)
    again = make(project_name="other", max_trials=3)
    again.search(X, Y)
    values = [[t.hyperparameters.values for t in x.oracle.trials.values()] for x in (tuner, again)]
    scores = [[t.score for t in x.oracle.trials.values()] for x in (tuner, again)]
    assert values[0] == values[1]
    # Random forests, too: the seed of the search seeds each trial.
    assert scores[0] == scores[1]


def test_a_pruner_looks_at_each_fold(make):
    trained = Bad.trained = []
    oracle = kt.oracles.GridSearchOracle(SCORE, pruner="median", seed=0)
    tuner = make(
        lambda hp: Bad() if hp.Int("index", 0, 6) > 5 else neighbors.KNeighborsClassifier(), oracle
    )
    tuner.search(X, Y)
    statuses = [t.status for t in tuner.oracle.trials.values()]
    assert statuses == ["COMPLETED"] * 6 + ["STOPPED"]
    assert len(trained) == 1


def test_what_a_sklearn_tuner_cannot_do_is_said(make, monkeypatch):
    with pytest.raises(errors.SearchError, match=r"`X` must be an array"):
        make().search([1, 2, 3], [1, 2, 3])
    with pytest.raises(errors.SearchError, match=r"`sample_weight` must be an array"):
        make().search(X, Y, sample_weight=[1.0] * len(X))
    with pytest.raises(errors.InvalidOptionError, match="must not count epochs"):
        make(oracle=kt.oracles.HyperbandOracle(SCORE, max_epochs=3))
    real = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(errors.InvalidOptionError, match=r"tfbig\[sklearn\]"):
        make()
    assert "sklearn" in sys.modules
