"""The models that tests lower and compile for TPUs: tpu_check's `build` functions."""

import pathlib
import sys

import keras

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "scripts"))

from benchmarks import models
from tasks import digits, speech

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def cnn():
    """That of `scripts/train.py --task=digits`."""
    model = keras.Sequential(digits._layers())
    model.compile("adamw", LOSS, metrics=["accuracy"])
    return model


def decoder():
    """The GPT-like one of `scripts/benchmark.py`."""
    model = keras.Model(*models.gpt())
    model.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0), LOSS)
    return model, models.data("gpt", 64)


def words():
    """That of `scripts/train.py --task=speech`: spectra, convolutions and a transformer."""
    model = keras.Model(*speech._layers())
    model.compile("adamw", LOSS)
    return model
