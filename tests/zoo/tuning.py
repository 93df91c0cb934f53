"""Fine-tuning: frozen layers, low-rank updates, quantized weights."""

import keras
from keras import layers

from tests.zoo import samples
from tests.zoo.program import program
from tests.zoo.transformers import TokenAndPositionEmbedding


def classification():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"loss": loss, "metrics": ["accuracy"]}


# Besides, a file stores the kernel with the factors' product merged in, and new factors.
FACTORS = "Keras keeps the factors in float32"


def sentences(rng, n):
    return samples.tokens(rng, n), samples.classes(rng, n)


def body(name="body"):
    x = keras.Input((6,), dtype="int32")
    h = TokenAndPositionEmbedding(6, 9, 4)(x)
    return keras.Model(x, layers.Dense(4, activation="tanh")(layers.Flatten()(h)), name=name)


def thaw(model):
    model.get_layer("body").trainable = True


@program(
    "Keras guide: fine-tuning, first the head, then all layers",
    "a frozen model inside the model, unfrozen and recompiled",
    data=sentences,
    compile=classification,
    thaw=thaw,
    adaptive="adam",
    is_on_replicas=False,
)
def frozen_then_thawed(base, **options):
    x = keras.Input((6,), dtype="int32")
    frozen = body()
    frozen.trainable = False
    return base(x, layers.Dense(3)(frozen(x)), **options)


@program(
    "keras.io: low-rank adaptation",
    "`enable_lora` of a dense layer and an embedding",
    data=lambda rng, n: (samples.tokens(rng, n), samples.classes(rng, n)),
    compile=classification,
    adaptive="rmsprop",
    is_reloaded_by_keras=True,
    # For values of about 200.
    tolerance=1e-5,
    note=FACTORS,
    is_on_replicas=False,
)
def low_rank(base, **options):
    x = keras.Input((6,), dtype="int32")
    embedding, dense = layers.Embedding(9, 4), layers.Dense(4, activation="tanh")
    h = layers.GlobalAveragePooling1D()(dense(embedding(x)))
    model = base(x, layers.Dense(3)(h), **options)
    for layer in (embedding, dense):
        layer.enable_lora(2)
    return model


@program(
    "Keras guide: int8 weights with low-rank adaptation",
    "integer weights, trainable low-rank factors",
    data=lambda rng, n: (rng.normal(size=(n, 5)), samples.classes(rng, n)),
    compile=classification,
    adaptive="adam",
    is_on_replicas=False,
    is_reloaded_by_keras=True,
    # For values of about 200.
    tolerance=1e-5,
    note=FACTORS,
)
def quantized_low_rank(base, **options):
    x = keras.Input((5,))
    hidden = [layers.Dense(6, activation="tanh"), layers.Dense(4, activation="tanh")]
    h = hidden[1](hidden[0](x))
    model = base(x, layers.Dense(3)(h), **options)
    for layer in hidden:
        layer.quantize("int8")
        layer.enable_lora(2)
    return model
