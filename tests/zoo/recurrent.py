"""Sequences without attention."""

import keras
import numpy as np
from keras import layers

from tests.zoo import samples
from tests.zoo.program import program


@program(
    "keras.io: sentiment with a bidirectional LSTM",
    "recurrence in both directions, mask",
    data=lambda rng, n: (
        samples.tokens(rng, n),
        samples.classes(rng, n, 2)[:, None].astype("float64"),
    ),
    compile=lambda: {"loss": "binary_crossentropy", "metrics": ["accuracy"]},
    adaptive="rmsprop",
    by="Sequential",
    is_on_replicas=False,
)
def bidirectional_lstm(base, **options):
    return base(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.Bidirectional(layers.LSTM(3)),
            layers.Dense(1, activation="sigmoid"),
        ],
        **options,
    )


@program(
    "Keras guide: tagging words with a GRU",
    "mask in the loss, temporal sample weights, one output per token",
    data=lambda rng, n: (
        x := samples.tokens(rng, n),
        rng.integers(0, 3, size=(n, 6)),
        np.where(x > 0, rng.uniform(0.5, 2.0, size=(n, 6)), 0.0),
    ),
    compile=lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "weighted_metrics": ["accuracy"],
    },
    adaptive="adamw",
    is_on_replicas=False,
)
def gru_tagger(base, **options):
    x = keras.Input((6,), dtype="int32")
    h = layers.GRU(4, return_sequences=True)(layers.Embedding(9, 4, mask_zero=True)(x))
    return base(x, layers.TimeDistributed(layers.Dense(3))(h), **options)


@program(
    "keras.io: next-frame video prediction with ConvLSTM",
    "recurrence over images, convolution over time",
    data=lambda rng, n: (x := rng.uniform(size=(n, 3, 5, 5, 1)), np.roll(x, -1, axis=1)),
    compile=lambda: {"loss": "binary_crossentropy"},
    adaptive="adam",
    by="Sequential",
    is_on_replicas=False,
)
def next_frame(base, **options):
    return base(
        [
            keras.Input((3, 5, 5, 1)),
            layers.ConvLSTM2D(3, 3, padding="same", return_sequences=True),
            layers.LayerNormalization(),
            layers.Conv3D(1, 3, padding="same", activation="sigmoid"),
        ],
        **options,
    )


@program(
    "keras.io: forecasting with causal convolutions",
    "dilation, residual blocks, a robust loss",
    data=lambda rng, n: (rng.normal(size=(n, 7, 2)), rng.normal(size=(n, 7, 1))),
    compile=lambda: {"loss": keras.losses.Huber(), "metrics": ["mae"]},
    adaptive="adagrad",
    by="extend model",
    is_on_replicas=False,
)
def causal_convolutions():
    x = keras.Input((7, 2))
    h = layers.Conv1D(4, 1)(x)
    for dilation in (1, 2):
        branch = layers.Conv1D(4, 2, padding="causal", dilation_rate=dilation)(h)
        h = layers.Add()([h, layers.Activation("swish")(branch)])
    return keras.Model(x, layers.Dense(1)(h))
