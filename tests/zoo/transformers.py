"""Transformers, and models that replace their attention."""

import keras
import numpy as np
from keras import layers, ops

from tests.zoo import samples
from tests.zoo.program import over_base, program, registered

LENGTH, VOCABULARY, WIDTH = 6, 9, 4


def classification():
    return {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}


def language_model():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"loss": loss, "weighted_metrics": ["accuracy"]}


@registered
class TokenAndPositionEmbedding(layers.Layer):
    """The sum of a token table's rows and a position table's."""

    def __init__(self, length, vocabulary, width, mask_zero=False, **kwargs):
        super().__init__(**kwargs)
        self.length, self.vocabulary, self.width = length, vocabulary, width
        self.mask_zero = mask_zero
        self.tokens = layers.Embedding(vocabulary, width, mask_zero=mask_zero)
        self.positions = layers.Embedding(length, width)

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(ops.shape(x)[-1]))

    def compute_mask(self, x, mask=None):
        return self.tokens.compute_mask(x)

    def get_config(self):
        sizes = {"length": self.length, "vocabulary": self.vocabulary, "width": self.width}
        return super().get_config() | sizes | {"mask_zero": self.mask_zero}


@registered
class TransformerBlock(layers.Layer):
    """Attention and two dense layers, each with normalization and a residual connection."""

    def __init__(self, width, heads, hidden, rate=0.0, is_causal=False, **kwargs):
        super().__init__(**kwargs)
        self.width, self.heads, self.hidden, self.rate = width, heads, hidden, rate
        self.is_causal = is_causal
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.feed_forward = keras.Sequential(
            [layers.Dense(hidden, activation="relu"), layers.Dense(width)]
        )
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropouts = [layers.Dropout(rate) for _ in range(2)]
        self.supports_masking = True

    def build(self, shape):
        self.attention.build(shape, shape)
        for layer in (self.feed_forward, *self.norms):
            layer.build(shape)
        super().build(shape)

    def call(self, x, training=False):
        attended = self.attention(x, x, use_causal_mask=self.is_causal)
        x = self.norms[0](x + self.dropouts[0](attended, training=training))
        fed = self.dropouts[1](self.feed_forward(x), training=training)
        return self.norms[1](x + fed)

    def get_config(self):
        names = ("width", "heads", "hidden", "rate", "is_causal")
        return super().get_config() | {name: getattr(self, name) for name in names}


@program(
    "keras.io: text classification with a transformer",
    "position table, looked up with `ops.arange`",
    data=lambda rng, n: (samples.tokens(rng, n), samples.classes(rng, n, 2)),
    compile=classification,
    adaptive="adam",
)
def text_transformer(base, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    h = TokenAndPositionEmbedding(LENGTH, VOCABULARY, WIDTH)(x)
    h = layers.GlobalAveragePooling1D()(TransformerBlock(WIDTH, 2, 8)(h))
    h = layers.Dense(5, activation="relu")(layers.Dropout(0.0)(h))
    return base(x, layers.Dense(2, activation="softmax")(h), **options)


@registered
class Patches(layers.Layer):
    """Splits images into patches."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def call(self, x):
        patches = ops.image.extract_patches(x, size=self.size)
        _, rows, columns, values = patches.shape
        return ops.reshape(patches, (-1, rows * columns, values))

    def get_config(self):
        return super().get_config() | {"size": self.size}


@registered
class PatchEncoder(layers.Layer):
    """Projects patches and adds a row of a position table to each."""

    def __init__(self, patches, width, **kwargs):
        super().__init__(**kwargs)
        self.patches, self.width = patches, width
        self.projection = layers.Dense(width)
        self.positions = layers.Embedding(patches, width)

    def call(self, x):
        positions = ops.expand_dims(ops.arange(0, self.patches, 1), axis=0)
        return self.projection(x) + self.positions(positions)

    def get_config(self):
        return super().get_config() | {"patches": self.patches, "width": self.width}


@program(
    "keras.io: image classification with a vision transformer",
    "patches, position table with a leading axis of 1",
    data=lambda rng, n: (samples.images(rng, n), samples.classes(rng, n)),
    compile=lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    },
    adaptive="rmsprop",
    is_on_replicas=False,
)
def vision_transformer(base, **options):
    x = keras.Input((8, 8, 3))
    h = PatchEncoder(4, WIDTH)(Patches(4)(x))
    normed = layers.LayerNormalization(epsilon=1e-6)(h)
    h = layers.Add()([layers.MultiHeadAttention(2, WIDTH, dropout=0.0)(normed, normed), h])
    fed = layers.LayerNormalization(epsilon=1e-6)(h)
    for size in (8, WIDTH):
        fed = layers.Dense(size, activation=keras.activations.gelu)(fed)
    h = layers.Flatten()(layers.LayerNormalization()(layers.Add()([fed, h])))
    return base(x, layers.Dense(3)(h), **options)


@registered
class RelativeAttention(layers.Layer):
    """Attention with a bias for each head and distance bucket, as in T5."""

    def __init__(self, heads, width, buckets=4, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.width, self.buckets = heads, width, buckets
        self.supports_masking = True

    def build(self, shape):
        def kernel(name):
            return self.add_weight(shape=(shape[-1], self.heads, self.width), name=name)

        self.query, self.key, self.value = map(kernel, ("query", "key", "value"))
        self.out = self.add_weight(shape=(self.heads, self.width, shape[-1]), name="out")
        self.table = self.add_weight(shape=(self.buckets, self.heads), name="relative_bias")

    def call(self, x, mask=None):
        positions = ops.arange(ops.shape(x)[1])
        distance = ops.abs(positions[None, :] - positions[:, None])
        bucket = ops.minimum(distance, self.buckets - 1)
        bias = ops.transpose(ops.take(self.table, bucket, axis=0), (2, 0, 1))
        query, key, value = (
            ops.einsum("bld,dhw->bhlw", x, kernel) for kernel in (self.query, self.key, self.value)
        )
        scores = ops.einsum("bhqw,bhkw->bhqk", query, key) + bias[None]
        if mask is not None:
            scores = ops.where(mask[:, None, None, :], scores, -1e9)
        attended = ops.einsum("bhqk,bhkw->bhqw", ops.softmax(scores), value)
        return ops.einsum("bhlw,hwd->bld", attended, self.out)

    def get_config(self):
        sizes = {"heads": self.heads, "width": self.width, "buckets": self.buckets}
        return super().get_config() | sizes


@program(
    "T5: masked attention with a relative position bias",
    "constant lookup in a weight with `ops.take`, mask",
    data=lambda rng, n: (x := samples.tokens(rng, n), samples.next_tokens(x)),
    compile=language_model,
    adaptive="adagrad",
)
def relative_bias(base, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    h = layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(x)
    h = layers.Add()([h, RelativeAttention(2, 3)(layers.LayerNormalization()(h))])
    return base(x, layers.Dense(VOCABULARY)(layers.LayerNormalization()(h)), **options)


@registered
class WindowAttention(layers.Layer):
    """Attention within image windows, with a bias for each offset, as in Swin."""

    def __init__(self, window, heads, shift=0, **kwargs):
        super().__init__(**kwargs)
        self.window, self.heads, self.shift = window, heads, shift

    def build(self, shape):
        self.qkv = layers.Dense(3 * shape[-1])
        self.qkv.build(shape)
        self.projection = layers.Dense(shape[-1])
        self.projection.build(shape)
        self.table = self.add_weight(
            shape=((2 * self.window - 1) ** 2, self.heads), name="relative_position_bias_table"
        )
        places = np.stack(np.meshgrid(*[np.arange(self.window)] * 2, indexing="ij")).reshape(2, -1)
        offsets = places[:, :, None] - places[:, None] + self.window - 1
        self.index = (offsets[0] * (2 * self.window - 1) + offsets[1]).astype("int32")

    def call(self, x):
        _, rows, columns, width = x.shape
        size, heads = self.window, self.heads
        if self.shift:
            x = ops.roll(x, (-self.shift, -self.shift), axis=(1, 2))
        h = ops.reshape(x, (-1, rows // size, size, columns // size, size, width))
        h = ops.reshape(ops.transpose(h, (0, 1, 3, 2, 4, 5)), (-1, size * size, width))
        qkv = ops.reshape(self.qkv(h), (-1, size * size, 3, heads, width // heads))
        query, key, value = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)), 3)
        scores = query @ ops.transpose(key, (0, 1, 3, 2)) / np.sqrt(width // heads)
        bias = ops.take(self.table, ops.reshape(self.index, (-1,)), axis=0)
        bias = ops.reshape(bias, (size * size, size * size, heads))
        h = ops.softmax(scores + ops.transpose(bias, (2, 0, 1))[None]) @ value
        h = self.projection(ops.reshape(ops.transpose(h, (0, 2, 1, 3)), (-1, size * size, width)))
        h = ops.reshape(h, (-1, rows // size, columns // size, size, size, width))
        h = ops.reshape(ops.transpose(h, (0, 1, 3, 2, 4, 5)), (-1, rows, columns, width))
        return ops.roll(h, (self.shift, self.shift), axis=(1, 2)) if self.shift else h

    def get_config(self):
        sizes = {"window": self.window, "heads": self.heads, "shift": self.shift}
        return super().get_config() | sizes


@program(
    "keras.io: image classification with Swin transformers",
    "constant lookup in a weight with a numpy index",
    data=lambda rng, n: (
        samples.images(rng, n),
        keras.utils.to_categorical(samples.classes(rng, n), 3),
    ),
    compile=lambda: {
        "loss": keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        "metrics": ["accuracy"],
    },
    adaptive="adamw",
    is_on_replicas=False,
)
def shifted_windows(base, **options):
    x = keras.Input((8, 8, 3))
    h = layers.Conv2D(WIDTH, 2, strides=2)(x)
    for shift in (0, 1):
        h = layers.Add()([h, WindowAttention(2, 2, shift)(layers.LayerNormalization()(h))])
        h = layers.Add()([h, layers.Dense(WIDTH, activation="gelu")(h)])
    h = layers.GlobalAveragePooling2D()(h)
    return base(x, layers.Dense(3, activation="softmax")(h), **options)


@over_base
def gpt(base):
    class MiniatureGPT(base):
        """A causal transformer whose constructor creates its parts."""

        def __init__(self, length, vocabulary, width, blocks=1, **kwargs):
            super().__init__(**kwargs)
            self.sizes = {"length": length, "vocabulary": vocabulary, "width": width}
            self.embedding = TokenAndPositionEmbedding(length, vocabulary, width)
            self.blocks = [TransformerBlock(width, 2, 8, is_causal=True) for _ in range(blocks)]
            self.head = layers.Dense(vocabulary)

        def call(self, x, training=False):
            h = self.embedding(x)
            for block in self.blocks:
                h = block(h, training=training)
            return self.head(h)

        def get_config(self):
            return super().get_config() | self.sizes | {"blocks": len(self.blocks)}

    return MiniatureGPT


@program(
    "keras.io: text generation with a miniature GPT",
    "subclass with positional arguments, causal mask, one weight per token",
    data=lambda rng, n: (
        x := samples.tokens(rng, n),
        y := samples.next_tokens(x),
        (y > 0).astype("float64"),
    ),
    compile=language_model,
    adaptive="adam",
    is_on_replicas=False,
)
def miniature_gpt(base, **options):
    return gpt(base)(LENGTH, VOCABULARY, WIDTH, **options)


@program(
    "keras.io: translation with an encoder and a decoder",
    "two inputs of different lengths, masks, two position tables",
    data=lambda rng, n: (
        {
            "encoder_inputs": samples.tokens(rng, n, 5),
            "decoder_inputs": (y := samples.tokens(rng, n)),
        },
        samples.next_tokens(y),
    ),
    compile=lambda: {"loss": keras.losses.SparseCategoricalCrossentropy(ignore_class=0)},
    adaptive="adam",
    is_on_replicas=False,
)
def translation(base, **options):
    source = keras.Input((5,), dtype="int32", name="encoder_inputs")
    target = keras.Input((LENGTH,), dtype="int32", name="decoder_inputs")
    encoded = TokenAndPositionEmbedding(5, VOCABULARY, WIDTH, mask_zero=True)(source)
    encoded = TransformerBlock(WIDTH, 2, 8)(encoded)
    h = TokenAndPositionEmbedding(LENGTH, VOCABULARY, WIDTH, mask_zero=True)(target)
    h = layers.Add()([h, layers.MultiHeadAttention(2, 2)(h, h, use_causal_mask=True)])
    h = layers.LayerNormalization()(h)
    h = layers.Add()([h, layers.MultiHeadAttention(2, 2)(h, encoded)])
    h = layers.Dense(VOCABULARY, activation="softmax")(layers.LayerNormalization()(h))
    return base([source, target], h, **options)


@program(
    "keras.io: timeseries classification with a transformer",
    "attention over measurements, convolutions instead of dense layers, a schedule as a callback",
    data=lambda rng, n: (rng.normal(size=(n, 7, 4)), samples.classes(rng, n, 2)),
    compile=classification,
    adaptive="rmsprop",
    fit=lambda: {
        "callbacks": [
            keras.callbacks.EarlyStopping("loss", patience=10, restore_best_weights=False),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        ]
    },
    is_on_replicas=False,
)
def timeseries_transformer(base, **options):
    h = x = keras.Input((7, 4))
    attended = layers.MultiHeadAttention(key_dim=3, num_heads=2, dropout=0.0)(h, h)
    h = layers.LayerNormalization(epsilon=1e-6)(layers.Dropout(0.0)(attended) + h)
    fed = layers.Conv1D(4, 1, activation="relu")(h)
    h = layers.LayerNormalization(epsilon=1e-6)(layers.Conv1D(4, 1)(fed) + h)
    h = layers.GlobalAveragePooling1D(data_format="channels_last")(h)
    return base(x, layers.Dense(2, activation="softmax")(h), **options)


@registered
class SharedTable(layers.Layer):
    """One table in which tokens and positions look up rows."""

    def __init__(self, rows, width, **kwargs):
        super().__init__(**kwargs)
        self.rows, self.width = rows, width
        self.table = layers.Embedding(rows, width)

    def call(self, x):
        return self.table(x) + 0.5 * self.table(ops.arange(x.shape[1]))

    def get_config(self):
        return super().get_config() | {"rows": self.rows, "width": self.width}


@program(
    "A table shared by tokens and positions",
    "one table, some of whose rows depend on the samples and some do not",
    data=lambda rng, n: (samples.tokens(rng, n), samples.classes(rng, n)),
    compile=classification,
    adaptive="adam",
    is_plain_eager=False,
)
def shared_table(base, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    h = layers.Flatten()(SharedTable(VOCABULARY, WIDTH)(x))
    return base(x, layers.Dense(3, activation="softmax")(h), **options)


@program(
    "A language model whose head is the transposed embedding",
    "one table used for lookup and for multiplication",
    data=lambda rng, n: (x := samples.tokens(rng, n), samples.next_tokens(x)),
    compile=language_model,
    adaptive="rmsprop",
)
def tied_head(base, **options):
    x = keras.Input((LENGTH,), dtype="int32")
    table = layers.ReversibleEmbedding(VOCABULARY, WIDTH, tie_weights=True, mask_zero=True)
    h = layers.Dense(WIDTH, activation="tanh")(table(x))
    return base(x, table(h, reverse=True), **options)


@program(
    "keras.io: classification without attention, MLP-Mixer",
    "dense layers over transposed axes, a learned table added as a whole",
    data=lambda rng, n: (samples.images(rng, n), samples.classes(rng, n)),
    compile=classification,
    adaptive="adagrad",
    is_on_replicas=False,
)
def mlp_mixer(base, **options):
    x = keras.Input((8, 8, 3))
    h = PatchEncoder(4, WIDTH)(Patches(4)(x))
    mixed = layers.Permute((2, 1))(layers.LayerNormalization()(h))
    mixed = layers.Dense(4)(layers.Dense(5, activation="gelu")(mixed))
    h = layers.Add()([h, layers.Permute((2, 1))(mixed)])
    h = layers.Add()([h, layers.Dense(WIDTH)(layers.Dense(6, activation="gelu")(h))])
    h = layers.GlobalAveragePooling1D()(h)
    return base(x, layers.Dense(3, activation="softmax")(h), **options)


@registered
class SpatialGate(layers.Layer):
    """Gates half of the channels with the other half, mixed over positions, as in gMLP."""

    def build(self, shape):
        self.norm = layers.LayerNormalization()
        self.norm.build((*shape[:-1], shape[-1] // 2))
        self.kernel = self.add_weight(shape=(shape[1], shape[1]), name="kernel")
        self.bias = self.add_weight(shape=(shape[1], 1), initializer="ones", name="bias")

    def call(self, x):
        u, v = ops.split(x, 2, axis=-1)
        return u * (ops.einsum("nm,bmc->bnc", self.kernel, self.norm(v)) + self.bias)


@program(
    "keras.io: gMLP",
    "custom weights over positions, split channels",
    data=lambda rng, n: (rng.normal(size=(n, 5, 3)), samples.classes(rng, n)),
    compile=classification,
    adaptive="adafactor",
    is_on_replicas=False,
)
def gated_mlp(base, **options):
    x = keras.Input((5, 3))
    h = layers.Dense(WIDTH)(x)
    gated = layers.Dense(2 * WIDTH, activation="gelu")(layers.LayerNormalization()(h))
    h = layers.Add()([h, layers.Dense(WIDTH)(SpatialGate()(gated))])
    h = layers.GlobalAveragePooling1D()(h)
    return base(x, layers.Dense(3, activation="softmax")(h), **options)
