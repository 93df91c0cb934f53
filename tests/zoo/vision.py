"""Images: convolutions, segmentation, detection."""

import keras
import numpy as np
from keras import layers, ops

from tests.zoo import samples
from tests.zoo.program import over_base, program, registered


def one_of_three():
    return {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def images_and_classes(rng, n):
    return samples.images(rng, n), samples.classes(rng, n)


@program(
    "keras.io: convolutional autoencoder for images",
    "transposed convolutions, pooling, inputs as targets",
    data=lambda rng, n: (x := samples.images(rng, n, channels=1), x),
    compile=lambda: {"loss": "binary_crossentropy", "metrics": ["mse"]},
    adaptive="adam",
    by="extend model",
)
def autoencoder():
    x = keras.Input((8, 8, 1))
    h = layers.MaxPooling2D(2)(layers.Conv2D(4, 3, activation="relu", padding="same")(x))
    h = layers.MaxPooling2D(2)(layers.Conv2D(4, 3, activation="relu", padding="same")(h))
    for _ in range(2):
        h = layers.Conv2DTranspose(4, 3, strides=2, activation="relu", padding="same")(h)
    return keras.Model(x, layers.Conv2D(1, 3, activation="sigmoid", padding="same")(h))


@registered
class LayerScale(layers.Layer):
    """Multiplies each channel by a weight that starts small."""

    def __init__(self, initial, width, **kwargs):
        super().__init__(**kwargs)
        self.initial, self.width = initial, width

    def build(self, _):
        self.gamma = self.add_weight(
            shape=(self.width,), initializer=keras.initializers.Constant(self.initial)
        )

    def call(self, x):
        return x * self.gamma

    def get_config(self):
        return super().get_config() | {"initial": self.initial, "width": self.width}


@registered
class StochasticDepth(layers.Layer):
    """Randomly drops the branch for some samples."""

    def __init__(self, rate, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x, training=False):
        if not training:
            return x
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        keep = 1.0 - self.rate
        kept = ops.floor(keep + keras.random.uniform(shape, 0, 1, dtype=x.dtype, seed=self.seeds))
        return x / keep * kept

    def get_config(self):
        return super().get_config() | {"rate": self.rate}


@program(
    "keras.applications: ConvNeXt",
    "depthwise convolution, layer scale, stochastic depth turned off",
    data=images_and_classes,
    compile=one_of_three,
    adaptive="adamw",
    is_on_replicas=False,
)
def convnext(base, **options):
    x = keras.Input((8, 8, 3))
    h = layers.LayerNormalization(epsilon=1e-6)(layers.Conv2D(4, 2, strides=2)(x))
    for _ in range(2):
        branch = layers.DepthwiseConv2D(3, padding="same")(h)
        branch = layers.LayerNormalization(epsilon=1e-6)(branch)
        branch = layers.Dense(4)(layers.Dense(8, activation="gelu")(branch))
        h = layers.Add()([h, StochasticDepth(0.0)(LayerScale(1e-6, 4)(branch))])
    h = layers.LayerNormalization(epsilon=1e-6)(layers.GlobalAveragePooling2D()(h))
    return base(x, layers.Dense(3, activation="softmax")(h), **options)


def normalized_by_batch():
    x = keras.Input((8, 8, 3))
    h = layers.Conv2D(4, 3, use_bias=False, strides=2)(layers.Rescaling(2.0, offset=-1.0)(x))
    h = layers.ReLU()(layers.BatchNormalization()(h))
    h = layers.ReLU()(layers.BatchNormalization()(layers.SeparableConv2D(4, 3)(h)))
    return x, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(h))


@program(
    "keras.io: image classification from scratch",
    "batch normalization in training: each micro-batch has its own statistics",
    data=images_and_classes,
    compile=one_of_three,
    adaptive="rmsprop",
    warns="BatchNormalization",
    note="batch statistics are those of a micro-batch; exact with one micro-batch",
)
def batch_normalized(base, **options):
    return base(*normalized_by_batch(), **options)


@program(
    "Keras guide: transfer learning on an application",
    "`keras.applications` with frozen batch normalization between trainable layers",
    data=lambda rng, n: (samples.images(rng, n, size=32), samples.classes(rng, n)),
    compile=one_of_three,
    adaptive="adam",
    is_on_replicas=False,
)
def transfer_learning(base, **options):
    application = keras.applications.MobileNet(
        (32, 32, 3), alpha=0.25, include_top=False, weights=None
    )
    for layer in application.layers:
        layer.trainable = layer.name in ("conv_pw_13", "conv_dw_13")
        if isinstance(layer, layers.BatchNormalization):
            # Random weights shrink their inputs, and matching statistics would undo that.
            layer.gamma.assign(4.0 * layer.gamma)
    x = keras.Input((32, 32, 3))
    # Batch normalization uses its stored statistics, as the guide recommends.
    h = application(x, training=False)
    h = layers.Dropout(0.0)(layers.GlobalAveragePooling2D()(h))
    return base(x, layers.Dense(3, activation="softmax")(h), **options)


def unet(size, channels):
    x = keras.Input((size, size, 3))
    first = layers.Conv2D(channels, 3, activation="relu", padding="same")(x)
    h = layers.Conv2D(channels, 3, activation="relu", padding="same")(layers.MaxPooling2D()(first))
    h = layers.UpSampling2D()(h)
    h = layers.Concatenate()([h, first])
    return x, layers.Conv2D(2, 1, activation="softmax", padding="same")(h)


def images_and_masks(rng, n):
    mask = rng.integers(0, 2, size=(n, 8, 8))
    return samples.images(rng, n), keras.utils.to_categorical(mask, 2)


@program(
    "keras.io: segmentation with a U-Net and per-pixel cross-entropy",
    "skip connection, one class and one weight per pixel",
    data=lambda rng, n: (*images_and_masks(rng, n), rng.uniform(0.5, 2.0, size=(n, 8, 8))),
    compile=lambda: {"loss": "categorical_crossentropy", "weighted_metrics": ["accuracy"]},
    adaptive="muon",
    is_on_replicas=False,
)
def segmentation(base, **options):
    return base(*unet(8, 4), **options)


@program(
    "A U-Net with the Dice loss of the whole batch",
    "`keras.losses.Dice` with `axis=None`, which couples samples",
    data=lambda rng, n: (samples.images(rng, n), rng.integers(0, 2, size=(n, 8, 8, 1))),
    compile=lambda: {"loss": keras.losses.Dice()},
    adaptive="adam",
    warns="couples the samples",
    note="a micro-batch has a different loss; exact with one micro-batch",
)
def dice_segmentation(base, **options):
    # Class probabilities have the same sum in every sample, so they would couple nothing.
    x, classes = unet(8, 4)
    return base(x, layers.Conv2D(1, 1, activation="sigmoid")(classes), **options)


@program(
    "A U-Net with one Dice loss per sample",
    "`keras.losses.Dice` with `axis=(1, 2, 3)`",
    data=images_and_masks,
    compile=lambda: {"loss": keras.losses.Dice(axis=(1, 2, 3))},
    adaptive="rmsprop",
    is_on_replicas=False,
)
def dice_of_samples(base, **options):
    return base(*unet(8, 4), **options)


@over_base
def detector(base):
    class Detector(base):
        """Classes and boxes of a grid's cells; losses are means over the cells with an object.

        These cells are counted over the batch; the count is at least one.
        """

        def __init__(self, classes, width=4, **kwargs):
            super().__init__(**kwargs)
            self.sizes = {"classes": classes, "width": width}
            self.backbone = keras.Sequential(
                [layers.Conv2D(width, 3, strides=2, padding="same", activation="relu")]
            )
            self.class_head = layers.Conv2D(classes, 3, padding="same")
            self.box_head = layers.Conv2D(4, 3, padding="same")

        def call(self, images, training=False):
            h = self.backbone(images, training=training)
            return {"boxes": self.box_head(h), "classes": self.class_head(h)}

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            labels = ops.one_hot(y["classes"], self.sizes["classes"], dtype=y_pred["boxes"].dtype)
            focal = keras.losses.BinaryFocalCrossentropy(from_logits=True, reduction=None)
            is_object = ops.cast(y["classes"] >= 0, y_pred["boxes"].dtype)[..., None]
            boxes = ops.sum(is_object * ops.abs(y["boxes"] - y_pred["boxes"]))
            total = ops.sum(focal(labels, y_pred["classes"])) + boxes
            return total / self.loss_denominator(x, y, y_pred, sample_weight)

        def loss_denominator(self, x, y, y_pred, sample_weight):
            positives = ops.sum(ops.cast(y["classes"] >= 0, y_pred["boxes"].dtype))
            return ops.maximum(positives, 1.0)

        def get_config(self):
            return super().get_config() | self.sizes

    return Detector


def cells_with_objects(rng, n):
    # -1 is a cell without an object; the first cell of an image always has one.
    classes = rng.integers(0, 3, size=(n, 4, 4)) * (rng.uniform(size=(n, 4, 4)) > 0.6) - 1
    classes[:, 0, 0] = 1
    return samples.images(rng, n), {"classes": classes, "boxes": rng.normal(size=(n, 4, 4, 4))}


@program(
    "A detector that divides its losses by the number of objects in the batch",
    "own `compute_loss` with its denominator in `loss_denominator`, dictionaries",
    data=cells_with_objects,
    adaptive="adagrad",
)
def detection(base, **options):
    return detector(base)(2, **options)


@registered
class RandomBrightness(layers.Layer):
    """Augments only if given a range."""

    def __init__(self, factor=0.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x, training=False):
        return x + self.factor if training else x

    def get_config(self):
        return super().get_config() | {"factor": self.factor}


@program(
    "keras.io: a small convolutional network on digits",
    "sequential model, integer images, one-hot targets, validation split",
    data=lambda rng, n: (
        rng.integers(0, 256, size=(n, 8, 8, 1)).astype("uint8"),
        np.eye(3)[samples.classes(rng, n)],
    ),
    compile=lambda: {"loss": "categorical_crossentropy", "metrics": ["accuracy"]},
    # 11 samples train, so the last batch has 5.
    fit=lambda: {"validation_split": 0.2},
    adaptive="lamb",
    by="Sequential",
)
def digits(base, **options):
    return base(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(1 / 255),
            RandomBrightness(),
            layers.Conv2D(4, 3, activation="tanh"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.0),
            layers.Dense(3, activation="softmax"),
        ],
        **options,
    )
