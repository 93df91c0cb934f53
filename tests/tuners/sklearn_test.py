"""scikit-learn searches over a tfbig model."""

import keras
import pytest

import tfbig

pytest.importorskip("sklearn")

from sklearn import datasets, model_selection


def build(X, y, units=8, micro_batch_size=32):  # noqa: N803
    """A classifier for the wrapper, which turns the labels into one-hot rows."""
    model = tfbig.Sequential(
        [
            keras.Input(X.shape[1:]),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(y.shape[1], activation="softmax"),
        ],
        micro_batch_size=micro_batch_size,
    )
    model.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy")
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_grid_search_cv_finds_the_better_setting_and_refits_it():
    x, y = datasets.load_digits(return_X_y=True)
    classifier = keras.wrappers.SKLearnClassifier(build)
    grid = {"model_kwargs": [{"units": 1}, {"units": 32, "micro_batch_size": 50}]}
    search = model_selection.GridSearchCV(classifier, grid, cv=2)
    # A clone of the wrapper has lost its fit_kwargs.
    search.fit(x, y, epochs=10, batch_size=128, verbose=0)
    assert search.best_params_ == {"model_kwargs": grid["model_kwargs"][1]}
    assert search.best_score_ > 0.85
    model = search.best_estimator_.model_
    assert isinstance(model, tfbig.Sequential)
    assert model.micro_batch_size == 50
    assert search.score(x, y) > 0.9
