"""A search at a small width, and a wide model with what it found."""

import keras
import keras_tuner
import numpy as np
import pytest

import tfbig
from tests.tuners.tuner_test import DATA
from tfbig import errors, tuners


def build(hp, width):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(width, "relu"), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(hp.Float("rate", 1e-4, 1e-1, sampling="log")), "mse")
    return model


class Model(keras_tuner.HyperModel):
    def build(self, hp, width):
        return build(hp, width)

    def fit(self, hp, model, *args, **kwargs):
        return model.fit(*args, batch_size=hp.Choice("batch", [4, 8]), **kwargs)


@pytest.mark.parametrize("hypermodel", [build, Model()], ids=["function", "object"])
def test_the_wide_model_is_that_of_mup_with_the_best_values(hypermodel, options):
    tuner = tuners.RandomSearch(hypermodel, max_trials=2, scale_width=(4, 16), **options)
    tuner.search(**DATA, epochs=1)
    assert {m.layers[0].units for m in tuner.get_best_models(2)} == {4}
    (best,) = tuner.get_best_hyperparameters()
    wide = tuner.build_wide()
    expected = tfbig.mup.build(lambda width: build(best, width), width=16, base_width=4)
    for found, wanted in zip(wide.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(found, wanted)
    # Of the same names but for the number of the layer.
    scales, wanted = (list(tfbig.mup.scales(m).values()) for m in (wide, expected))
    assert scales == wanted
    assert [s.learning_rate for s in scales] == [1, 1, 0.25, 1]
    histories = [m.fit(**DATA, batch_size=5).history["loss"] for m in (wide, expected)]
    assert histories[0] == pytest.approx(histories[1], rel=1e-6)


def test_a_model_that_cannot_be_widened_is_refused_before_the_search(options):
    def unknown(hp, width):
        model = build(hp, width)
        model.compile(keras.optimizers.Adafactor(hp.Float("rate", 1e-4, 1e-1)), "mse")
        return model

    tuner = tuners.RandomSearch(unknown, max_trials=2, scale_width=(4, 16), **options)
    with pytest.raises(errors.InvalidOptionError, match="Adafactor"):
        tuner.search(**DATA, epochs=1)
    assert not tuner.oracle.trials


@pytest.mark.parametrize("width", [4, (4,), (4, 4), (8, 4), (0, 4), (4, 16.0), "4"], ids=str)
def test_widths_are_checked(width, options):
    with pytest.raises(errors.InvalidOptionError, match="`scale_width` must be"):
        tuners.RandomSearch(build, scale_width=width, **options)


def test_a_builder_without_a_width_is_refused(options):
    with pytest.raises(errors.InvalidOptionError, match=r"hyperparameters and a width"):
        tuners.RandomSearch(lambda hp: None, scale_width=(4, 16), **options)


def test_without_widths_there_is_no_wide_model(options):
    tuner = tuners.RandomSearch(lambda hp: build(hp, 4), **options)
    with pytest.raises(errors.InvalidOptionError, match="scale_width=None"):
        tuner.build_wide()
    tuner = tuners.RandomSearch(build, scale_width=(4, 16), **options | {"project_name": "q"})
    with pytest.raises(errors.SearchError, match="No trial is complete"):
        tuner.build_wide()


def test_a_search_goes_on_at_its_width_alone(options):
    tuners.RandomSearch(build, max_trials=1, scale_width=(4, 16), **options).search(**DATA)
    # Which width is wanted may change.
    tuners.RandomSearch(build, max_trials=2, scale_width=(4, 32), **options).search(**DATA)
    for other in ({"scale_width": (8, 16)}, {}):
        hypermodel = build if other else lambda hp: build(hp, 4)
        tuner = tuners.RandomSearch(hypermodel, max_trials=3, **other, **options)
        with pytest.raises(errors.StudyError, match="width: '4'"):
            tuner.search(**DATA)
