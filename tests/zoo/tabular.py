"""Tables, recommendations and graphs."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.zoo import samples
from tests.zoo.program import BATCH, over_base, program, registered

CITIES, JOBS = ["oslo", "rome", "lima"], ["cook", "smith", "clerk", "pilot"]


def people(rng, n, *names):
    """Columns of strings, integers and measurements, and whether a person has a high income."""
    columns = {
        "city": tf.constant(rng.choice([*CITIES, "elsewhere"], size=(n, 1)).tolist()),
        "job": tf.constant(rng.choice(JOBS, size=(n, 1)).tolist()),
        "code": rng.integers(0, 5, size=(n, 1)),
        "age": rng.uniform(18, 80, size=(n, 1)),
        "hours": rng.normal(40, 5, size=(n, 1)),
    }
    y = rng.integers(0, 2, size=(n, 1)).astype("float64")
    return {name: columns[name] for name in names}, y


def people_inputs(*names):
    dtypes = {"city": "string", "job": "string", "code": "int64"}
    return {name: keras.Input((1,), name=name, dtype=dtypes.get(name)) for name in names}


@program(
    "keras.io: structured data with wide and deep networks",
    "string lookup inside the model, one-hot features and embeddings",
    data=lambda rng, n: people(rng, n, "city", "job", "age", "hours"),
    compile=lambda: {"loss": "binary_crossentropy", "metrics": ["accuracy", keras.metrics.AUC()]},
    adaptive="adam",
    is_on_replicas=False,
)
def wide_and_deep(base, **options):
    x = people_inputs("city", "job", "age", "hours")
    index = {
        "city": layers.StringLookup(vocabulary=CITIES)(x["city"]),
        "job": layers.StringLookup(vocabulary=JOBS, num_oov_indices=0)(x["job"]),
    }
    wide = layers.Concatenate()(
        [
            layers.CategoryEncoding(num_tokens=4, output_mode="one_hot")(index["city"]),
            layers.CategoryEncoding(num_tokens=4, output_mode="one_hot")(index["job"]),
        ]
    )
    embedded = [layers.Flatten()(layers.Embedding(4, 2)(index[name])) for name in ("city", "job")]
    measured = [layers.Rescaling(0.02)(x[name]) for name in ("age", "hours")]
    deep = layers.Concatenate()([*embedded, *measured])
    for units in (6, 4):
        deep = layers.Dense(units, activation="relu")(deep)
    h = layers.Concatenate()([wide, deep])
    return base(x, layers.Dense(1, activation="sigmoid")(h), **options)


@program(
    "Keras guide: structured data with preprocessing layers in the model",
    "adapted normalization and discretization, hashing, multi-hot, class weights",
    data=lambda rng, n: people(rng, n, "city", "code", "age", "hours"),
    compile=lambda: {"loss": keras.losses.BinaryFocalCrossentropy(from_logits=True)},
    fit=lambda: {"class_weight": {0: 0.4, 1: 1.7}},
    adaptive="rmsprop",
    is_on_replicas=False,
)
def structured_data(base, **options):
    columns, _ = people(np.random.default_rng(5), 20, "age", "hours")
    x = people_inputs("city", "code", "age", "hours")
    normalization = layers.Normalization(axis=None)
    normalization.adapt(columns["hours"])
    bins = layers.Discretization(num_bins=3, output_mode="one_hot")
    bins.adapt(columns["age"])
    features = [
        layers.Hashing(num_bins=4, output_mode="one_hot")(x["city"]),
        layers.IntegerLookup(vocabulary=[1, 2, 3], output_mode="multi_hot")(x["code"]),
        bins(x["age"]),
        normalization(x["hours"]),
    ]
    h = layers.Concatenate()([ops.cast(f, keras.config.floatx()) for f in features])
    h = layers.Dense(5, activation="selu")(h)
    return base(x, layers.Dense(1)(h), **options)


@over_base
def recommender(base):
    class Recommender(base):
        """The dot product of a user's row and a film's row, with a bias for each."""

        def __init__(self, users, films, width, **kwargs):
            super().__init__(**kwargs)
            self.sizes = {"users": users, "films": films, "width": width}
            regularizer = keras.regularizers.L2(1e-3)
            self.user = layers.Embedding(users, width, embeddings_regularizer=regularizer)
            self.film = layers.Embedding(films, width, embeddings_regularizer=regularizer)
            self.user_bias, self.film_bias = layers.Embedding(users, 1), layers.Embedding(films, 1)

        def call(self, pairs):
            user, film = pairs[:, 0], pairs[:, 1]
            product = ops.sum(self.user(user) * self.film(film), axis=-1, keepdims=True)
            return ops.sigmoid(product + self.user_bias(user) + self.film_bias(film))

        def get_config(self):
            return super().get_config() | self.sizes

    return Recommender


@program(
    "keras.io: collaborative filtering",
    "subclass with positional arguments, four tables, regularized rows",
    data=lambda rng, n: (
        np.stack([rng.integers(0, 5, n), rng.integers(0, 7, n)], axis=1),
        rng.uniform(size=(n, 1)),
    ),
    compile=lambda: {"loss": "binary_crossentropy", "metrics": ["mae"]},
    adaptive="adam",
)
def collaborative_filtering(base, **options):
    return recommender(base)(5, 7, 3, **options)


@registered
def hinge(y, margin):
    return ops.maximum(0.2 + y - margin, 0.0)


@program(
    "Two-tower retrieval with one negative per sample",
    "two lookups in one table per sample, unit vectors, a margin",
    data=lambda rng, n: (
        {
            "user": rng.integers(0, 6, size=n),
            "bought": rng.integers(0, 8, size=n),
            "ignored": rng.integers(0, 8, size=n),
        },
        np.zeros((n, 1)),
        rng.uniform(0.5, 2.0, size=n),
    ),
    compile=lambda: {"loss": hinge},
    adaptive="adamw",
    is_on_replicas=False,
)
def two_towers(base, **options):
    x = {name: keras.Input((), dtype="int32", name=name) for name in ("user", "bought", "ignored")}
    items = keras.Sequential([layers.Embedding(8, 4), layers.Dense(3)])
    user = layers.UnitNormalization()(layers.Dense(3)(layers.Embedding(6, 4)(x["user"])))
    bought, ignored = (layers.UnitNormalization()(items(x[n])) for n in ("bought", "ignored"))
    margin = layers.Dot(1)([user, bought]) - layers.Dot(1)([user, ignored])
    return base(x, margin, **options)


@program(
    "Keras guide: ticket routing with two outputs",
    "named inputs and outputs, loss weights, sample weights for one output",
    data=lambda rng, n: (
        {"title": samples.tokens(rng, n, 5), "tags": rng.integers(0, 2, (n, 3)).astype("float64")},
        {"priority": rng.uniform(size=(n, 1)), "department": samples.classes(rng, n)},
        {"priority": rng.uniform(size=n), "department": rng.uniform(0.5, 2.0, size=n)},
    ),
    compile=lambda: {
        "loss": {
            "priority": keras.losses.BinaryCrossentropy(),
            "department": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        },
        "loss_weights": {"priority": 1.0, "department": 0.2},
        "metrics": {"priority": ["mae"], "department": ["accuracy"]},
    },
    adaptive="adagrad",
    is_plain_eager=False,
)
def ticket_routing(base, **options):
    title = keras.Input((5,), dtype="int32", name="title")
    tags = keras.Input((3,), name="tags")
    read = layers.GlobalAveragePooling1D()(layers.Embedding(9, 4, mask_zero=True)(title))
    h = layers.Concatenate()([read, tags])
    priority = layers.Dense(1, activation="sigmoid", name="priority")(h)
    department = layers.Dense(3, name="department")(h)
    x = {"title": title, "tags": tags}
    return base(x, {"priority": priority, "department": department}, **options)


def sparse_rows(rng, n):
    dense = rng.normal(size=(n, 10)) * (rng.uniform(size=(n, 10)) > 0.6)
    x = tf.sparse.from_dense(dense)
    return tf.data.Dataset.from_tensor_slices((x, rng.normal(size=(n, 1)))).batch(BATCH)


@program(
    "Mostly zero rows, as a sparse tensor",
    "sparse input to a dense layer, whose kernel gets sparse gradients",
    # Three more samples, since tf.data cannot give a replica an empty sparse batch.
    data=lambda rng, n: sparse_rows(rng, n + 3),
    compile=lambda: {"loss": "mse", "metrics": ["mae"]},
    adaptive="adam",
    by="Sequential",
)
def sparse_input(base, **options):
    x = keras.Input((10,), sparse=True)
    return base([x, layers.Dense(4, activation="tanh"), layers.Dense(1)], **options)


def ragged_tokens(rng, n):
    lengths = rng.integers(1, 6, size=n)
    x = tf.RaggedTensor.from_row_lengths(rng.integers(1, 9, size=lengths.sum()), lengths)
    y = samples.classes(rng, n, 2)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    return dataset.map(lambda x, y: (x.to_tensor(shape=(None, 6)), y))


@program(
    "Sentences of different lengths, padded per batch",
    "ragged tensors in the dataset, mask, mean over tokens",
    data=ragged_tokens,
    compile=lambda: {"loss": "sparse_categorical_crossentropy", "weighted_metrics": ["accuracy"]},
    adaptive="adam",
    by="Sequential",
)
def ragged_sentences(base, **options):
    return base(
        [
            keras.Input((None,), dtype="int64"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2, activation="softmax"),
        ],
        **options,
    )


# For each edge, the sending node and the receiving node.
EDGES = np.array([[0, 1], [1, 0], [1, 2], [2, 3], [3, 2], [4, 0], [5, 3], [2, 5], [3, 3], [5, 5]])
NODES = 6


@registered
class GraphAttention(layers.Layer):
    """Each node attends to those with an edge to it; all samples share the graph."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.width), name="kernel")
        self.attention = self.add_weight(shape=(2 * self.width, 1), name="attention")

    def call(self, nodes):
        states = nodes @ self.kernel
        senders, receivers = (ops.take(states, EDGES[:, i], axis=1) for i in (0, 1))
        pairs = ops.concatenate([receivers, senders], axis=-1)
        scores = ops.exp(ops.tanh(pairs @ self.attention))
        to = ops.one_hot(EDGES[:, 1], NODES, dtype=scores.dtype)
        total = ops.einsum("en,bew->bnw", to, scores)
        return ops.einsum("en,bew->bnw", to, scores * senders) / ops.maximum(total, 1e-9)

    def get_config(self):
        return super().get_config() | {"width": self.width}


@program(
    "keras.io: graph attention, where each sample is a state of one graph",
    "gathers along constant edges, custom weights",
    data=lambda rng, n: (rng.normal(size=(n, NODES, 3)), samples.classes(rng, n)),
    compile=lambda: {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
    adaptive="lamb",
    by="Sequential",
)
def graph_attention(base, **options):
    return base(
        [
            keras.Input((NODES, 3)),
            GraphAttention(4),
            layers.Activation("relu"),
            GraphAttention(4),
            layers.Flatten(),
            layers.Dense(3),
        ],
        **options,
    )


@over_base
def node_classifier(base):
    class NodeClassifier(base):
        """Classifies the nodes of one graph, whose features and edges are constants.

        A sample is the index of a node; its class follows from what all nodes are embedded as.
        """

        def __init__(self, nodes, width, classes, **kwargs):
            super().__init__(**kwargs)
            self.sizes = {"nodes": nodes, "width": width, "classes": classes}
            self.features = np.random.default_rng(7).normal(size=(nodes, 3))
            self.table = layers.Embedding(nodes, width)
            self.preprocess = layers.Dense(width, activation="gelu")
            self.update = layers.Dense(width, activation="gelu")
            self.classify = layers.Dense(classes)

        def build(self, shape):
            width = self.sizes["width"]
            self.table.build()
            self.preprocess.build((None, 3))
            self.update.build((None, 2 * width))
            self.classify.build((None, width))
            self.built = True

        def call(self, index):
            own = self.table(ops.arange(self.sizes["nodes"]))
            states = self.preprocess(ops.convert_to_tensor(self.features)) + own
            messages = ops.take(states, EDGES[:, 0], axis=0)
            gathered = ops.segment_sum(messages, EDGES[:, 1], num_segments=self.sizes["nodes"])
            states = self.update(ops.concatenate([states, gathered], axis=-1))
            return self.classify(ops.take(states, index, axis=0))

        def get_config(self):
            return super().get_config() | self.sizes

    return NodeClassifier


@program(
    "keras.io: node classification with a graph network",
    "one graph for all samples, from which the nodes of a batch are gathered",
    data=lambda rng, n: (rng.integers(0, NODES, size=n), samples.classes(rng, n)),
    compile=lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    },
    adaptive="adam",
)
def node_classification(base, **options):
    return node_classifier(base)(NODES, 4, 3, **options)
