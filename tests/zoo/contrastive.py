"""Networks compared with each other, or by their outputs for several samples."""

import keras
import numpy as np
from keras import layers, ops

from tests.zoo import samples
from tests.zoo.program import over_base, program, registered


def embedder(name="embedding"):
    stack = [keras.Input((5,)), layers.Dense(4, activation="relu"), layers.Dense(3)]
    return keras.Sequential(stack, name=name)


@registered
class Distances(layers.Layer):
    """Distances from an anchor to a positive and a negative."""

    def call(self, anchor, positive, negative):
        return ops.stack(
            [
                ops.sum(ops.square(anchor - positive), -1),
                ops.sum(ops.square(anchor - negative), -1),
            ],
            axis=1,
        )


@over_base
def siamese(base):
    class Siamese(base):
        """A network that computes distances, trained on the margin between them."""

        def __init__(self, network, margin=0.5, **kwargs):
            super().__init__(**kwargs)
            self.network, self.margin = network, margin

        def build(self, shape):
            self.built = True

        def call(self, x):
            return self.network(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(ops.maximum(y_pred[:, 0] - y_pred[:, 1] + self.margin, 0.0))

        def get_config(self):
            network = keras.saving.serialize_keras_object(self.network)
            return super().get_config() | {"network": network, "margin": self.margin}

        @classmethod
        def from_config(cls, config):
            config["network"] = keras.saving.deserialize_keras_object(config["network"])
            return cls(**config)

    return Siamese


@program(
    "keras.io: a siamese network with a triplet loss",
    "constructor takes a network, `compute_loss` returns a mean, one network called three times",
    data=lambda rng, n: (
        {name: rng.normal(size=(n, 5)) for name in ("anchor", "positive", "negative")},
    ),
    adaptive="adam",
)
def triplets(base, **options):
    x = {name: keras.Input((5,), name=name) for name in ("anchor", "positive", "negative")}
    network = embedder()
    distances = Distances()(*[network(v) for v in x.values()])
    return siamese(base)(keras.Model(x, distances), **options)


@over_base
def distiller(base):
    class Distiller(base):
        """A student that learns from labels and from a frozen teacher."""

        def __init__(self, student, teacher, **kwargs):
            super().__init__(**kwargs)
            self.student, self.teacher = student, teacher
            self.teacher.trainable = False
            self.distillation_loss, self.alpha, self.temperature = None, 0.1, 3.0

        def build(self, shape):
            self.built = True

        def compile(self, optimizer, student_loss, distillation_loss, alpha=0.1, metrics=None):
            super().compile(optimizer=optimizer, loss=student_loss, metrics=metrics)
            self.distillation_loss, self.alpha = distillation_loss, alpha

        def get_compile_config(self):
            config = {
                "optimizer": self.optimizer,
                "student_loss": self.loss,
                "distillation_loss": self.distillation_loss,
            }
            config = {k: keras.saving.serialize_keras_object(v) for k, v in config.items()}
            return config | {"alpha": self.alpha, "metrics": ["accuracy"]}

        def compile_from_config(self, config):
            self.compile(**keras.saving.deserialize_keras_object(config))
            self.optimizer.build(self.trainable_variables)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            taught = ops.softmax(self.teacher(x, training=False) / self.temperature, axis=1)
            student = self.distillation_loss(taught, ops.softmax(y_pred / self.temperature, axis=1))
            own = super().compute_loss(x, y, y_pred, sample_weight, training=training)
            return self.alpha * own + (1 - self.alpha) * self.temperature**2 * student

        def call(self, x):
            return self.student(x)

        def get_config(self):
            networks = {"student": self.student, "teacher": self.teacher}
            return super().get_config() | keras.saving.serialize_keras_object(networks)

        @classmethod
        def from_config(cls, config):
            for name in ("student", "teacher"):
                config[name] = keras.saving.deserialize_keras_object(config[name])
            return cls(**config)

    return Distiller


@program(
    "keras.io: knowledge distillation",
    "own `compile` with two losses, `compute_loss` that calls a frozen network",
    data=lambda rng, n: (rng.normal(size=(n, 5)), samples.classes(rng, n)),
    compile=lambda: {
        "student_loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "distillation_loss": keras.losses.KLDivergence(),
        "metrics": ["accuracy"],
    },
    adaptive="adam",
    is_on_replicas=False,
)
def distillation(base, **options):
    return distiller(base)(embedder("student"), embedder("teacher"), **options)


@program(
    "A classifier whose extended class has its own default optimizer",
    "`tfbig.extend` of a class with its own `compile` and constructor",
    data=lambda rng, n: (rng.normal(size=(n, 5)), samples.classes(rng, n)),
    compile=lambda: {"temperature": 2.0},
    adaptive="rmsprop",
    by="extend class",
)
def extended_classifier(extended, **options):
    return extended(TemperedClassifier)(3, hidden=4, **options)


@registered
class TemperedClassifier(keras.Model):
    """Compiles with its own default loss and metrics."""

    def __init__(self, classes, hidden=4, **kwargs):
        super().__init__(**kwargs)
        self.classes, self.hidden, self.temperature = classes, hidden, 1.0
        self.first = layers.Dense(hidden, activation="tanh")
        self.last = layers.Dense(classes)

    def build(self, shape):
        self.first.build(shape)
        self.last.build((None, self.hidden))
        self.built = True

    def compile(self, optimizer="adam", temperature=1.0, **kwargs):
        self.temperature = temperature
        kwargs.setdefault("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        kwargs.setdefault("metrics", ["accuracy"])
        super().compile(optimizer=optimizer, **kwargs)

    def get_compile_config(self):
        optimizer = keras.saving.serialize_keras_object(self.optimizer)
        return {"optimizer": optimizer, "temperature": self.temperature}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def call(self, x):
        return self.last(self.first(x)) / self.temperature

    def get_config(self):
        return super().get_config() | {"classes": self.classes, "hidden": self.hidden}


@over_base
def contrastive(base):
    class ContrastiveModel(base):
        """Two views of each sample; all other samples of the batch are its negatives."""

        def __init__(self, encoder, temperature=0.5, **kwargs):
            super().__init__(**kwargs)
            self.encoder, self.temperature = encoder, temperature

        def build(self, shape):
            self.built = True

        def call(self, x):
            return ops.stack([self.encoder(x["first"]), self.encoder(x["second"])], axis=1)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            first, second = ops.unstack(ops.normalize(y_pred, axis=-1), 2, axis=1)
            similarities = first @ ops.transpose(second) / self.temperature
            labels = ops.arange(ops.shape(first)[0])
            losses = [
                keras.losses.sparse_categorical_crossentropy(labels, s, from_logits=True)
                for s in (similarities, ops.transpose(similarities))
            ]
            return ops.mean(losses[0] + losses[1]) / 2

    return ContrastiveModel


@program(
    "keras.io: contrastive pretraining, with negatives from the batch",
    "custom loss that compares each sample with every other",
    data=lambda rng, n: ({name: rng.normal(size=(n, 5)) for name in ("first", "second")},),
    adaptive="adam",
    warns="is not a mean over the samples",
    note="a micro-batch has a different loss; exact with one micro-batch",
)
def contrastive_pretraining(base, **options):
    return contrastive(base)(embedder(), **options)


@program(
    "Metric learning with the Circle loss",
    "`keras.losses.Circle`, which couples samples",
    data=lambda rng, n: (rng.normal(size=(n, 5)), np.arange(n) % 2),
    compile=lambda: {"loss": keras.losses.Circle(gamma=2.0)},
    adaptive="adam",
    warns="couples the samples",
    note="a micro-batch has a different loss; exact with one micro-batch",
)
def circle(base, **options):
    x = keras.Input((5,))
    return base(x, layers.UnitNormalization()(embedder()(x)), **options)


@registered
class CenterLoss(layers.Layer):
    """Pulls each sample towards the center of its class, with a loss added from table rows."""

    def __init__(self, classes, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.classes, self.rate = classes, rate

    def build(self, shape):
        self.centers = self.add_weight(shape=(self.classes, shape[-1]), name="centers")

    def call(self, features, labels):
        distance = ops.square(features - ops.take(self.centers, labels, axis=0))
        self.add_loss(self.rate * ops.mean(ops.sum(distance, axis=-1)))
        return features

    def get_config(self):
        return super().get_config() | {"classes": self.classes, "rate": self.rate}


@program(
    "Metric learning with class centers",
    "`add_loss` in `call`, rows of a custom weight looked up by label",
    data=lambda rng, n: (
        {"features": rng.normal(size=(n, 5)), "label": (y := samples.classes(rng, n))},
        y,
    ),
    compile=lambda: {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
    adaptive="adam",
)
def centers(base, **options):
    x = {
        "features": keras.Input((5,), name="features"),
        "label": keras.Input((), dtype="int32", name="label"),
    }
    h = CenterLoss(3)(embedder()(x["features"]), x["label"])
    return base(x, layers.Dense(3)(h), **options)
