"""Connectionist temporal classification: text from images and audio."""

import keras
from keras import layers, ops

from tests.zoo import samples
from tests.zoo.program import program, registered

FRAMES, LABELS, SYMBOLS = 7, 3, 5


@registered
class CTCLayer(layers.Layer):
    """Adds a column of losses, one per sample, and passes the prediction on."""

    def call(self, labels, predictions):
        rows = ops.shape(labels)[0]
        frames = ops.full((rows,), FRAMES, dtype="int32")
        length = ops.full((rows,), LABELS, dtype="int32")
        loss = ops.ctc_loss(
            labels, ops.log(predictions + 1e-7), length, frames, mask_index=SYMBOLS - 1
        )
        self.add_loss(loss[:, None])
        return predictions


@program(
    "keras.io: reading captchas",
    "a column of losses, one per sample, from `add_loss` in a layer; no compiled loss",
    data=lambda rng, n: (
        {
            "image": samples.images(rng, n, channels=1),
            "label": rng.integers(0, SYMBOLS - 1, size=(n, LABELS)),
        },
    ),
    adaptive="adam",
    # Losses are about 10, and gradients accordingly.
    tolerance=1e-5,
    note="TensorFlow computes CTC in float32",
    is_on_replicas=False,
)
def captcha(base, **options):
    image = keras.Input((8, 8, 1), name="image")
    label = keras.Input((LABELS,), dtype="int32", name="label")
    h = layers.Conv2D(4, (2, 3), activation="relu")(image)
    h = layers.Permute((2, 1, 3))(layers.MaxPooling2D((1, 1))(h))
    h = layers.Reshape((6, 28))(h)
    h = layers.ZeroPadding1D((0, FRAMES - 6))(layers.Dense(5, activation="relu")(h))
    h = layers.LSTM(4, return_sequences=True)(h)
    h = layers.Dense(SYMBOLS, activation="softmax")(h)
    x = {"image": image, "label": label}
    return base(x, CTCLayer()(label, h), **options)


@registered
def ctc(y, y_pred):
    rows = ops.shape(y)[0]
    frames = ops.full((rows,), FRAMES, dtype="int32")
    length = ops.sum(ops.cast(y > 0, "int32"), axis=1)
    return ops.ctc_loss(y, y_pred, length, frames, mask_index=0)


@program(
    "keras.io: speech recognition with CTC",
    "custom loss function with one value per sample; labels of different lengths",
    data=lambda rng, n: (
        rng.normal(size=(n, FRAMES, 4)),
        samples.tokens(rng, n, LABELS, SYMBOLS).astype("int32"),
    ),
    compile=lambda: {"loss": ctc},
    adaptive="rmsprop",
    is_on_replicas=False,
    tolerance=1e-5,
    note="TensorFlow computes CTC in float32",
)
def speech(base, **options):
    x = keras.Input((FRAMES, 4))
    h = layers.Conv1D(4, 3, padding="same", activation="relu")(x)
    h = layers.GRU(4, return_sequences=True)(h)
    return base(x, layers.Dense(SYMBOLS)(h), **options)
