"""Training changes no array of the user's, whoever hands it to TensorFlow."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tfbig._keras import array_memory, datasets


def in_memory_that_is_shared(array):
    """A copy that TensorFlow takes as it is: where its memory begins at a multiple of 64."""
    memory = np.zeros(array.nbytes + 64, "uint8")
    begin = -memory.ctypes.data % 64
    shared = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    shared[...] = array
    return shared


SAMPLES, BATCH = 64, 16
random = np.random.default_rng(0)
X = in_memory_that_is_shared(random.normal(size=(SAMPLES, 16)).astype("float32"))
Y = in_memory_that_is_shared(random.normal(size=(SAMPLES, 16)).astype("float32"))
BEGINS = range(0, SAMPLES, BATCH)
SPEC = (tf.TensorSpec((None, 16)), tf.TensorSpec((None, 16)))


def batch_of(begin):
    return X[begin : begin + BATCH], Y[begin : begin + BATCH]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(BEGINS)

    def __getitem__(self, i):
        return batch_of(BEGINS[i])


def by_numpy_function(begin):
    parts = tf.numpy_function(batch_of, [begin], [tf.float32, tf.float32])
    return tuple(tf.ensure_shape(part, (BATCH, 16)) for part in parts)


FEEDS = {
    "generator": lambda: (batch_of(begin) for begin in BEGINS),
    "py_dataset": Batches,
    "from_generator": lambda: tf.data.Dataset.from_generator(
        lambda: map(batch_of, BEGINS), output_signature=SPEC
    ),
    "numpy_function": lambda: tf.data.Dataset.range(0, SAMPLES, BATCH).map(by_numpy_function),
}


class SecondHalf(tfbig.Model):
    """Trains on a part of each batch."""

    def train_step(self, data):
        return super().train_step(tuple(part[BATCH // 2 :] for part in data))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("feed", FEEDS)
def test_training_on_a_part_of_a_batch_leaves_arrays_alone(feed):
    def train(data, **kwargs):
        keras.utils.set_random_seed(1)
        x = keras.Input((16,))
        model = SecondHalf(x, keras.layers.Dense(16)(keras.layers.Rescaling(2.0)(x)))
        model.compile("sgd", "mse")
        model.fit(data, verbose=0, shuffle=False, **kwargs)
        return model.get_weights()

    before = X.copy(), Y.copy()
    trained = train(FEEDS[feed]())
    np.testing.assert_array_equal((X, Y), before)
    for a, b in zip(trained, train(X.copy(), y=Y.copy(), batch_size=BATCH), strict=True):
        np.testing.assert_array_equal(a, b)


def generated(spec=SPEC):
    return tf.data.Dataset.from_generator(lambda: iter([batch_of(0)]), output_signature=spec)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (lambda: tf.data.Dataset.from_tensor_slices((X, Y)), False),
        (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).map(lambda x, y: x), False),
        (generated, True),
        (lambda: generated().map(lambda x, y: (x, 2 * y)).prefetch(1), True),
        (lambda: generated().rebatch(4), True),
        (lambda: tf.data.Dataset.range(2).interleave(lambda _: generated()), True),
        (lambda: tf.data.Dataset.range(2).map(by_numpy_function), True),
        # Batches of samples are copies.
        (lambda: generated().unbatch().batch(4), False),
        (lambda: generated().batch(2).map(lambda x, y: (x, y)), False),
        (lambda: tf.data.Dataset.range(4).batch(2).map(lambda b: by_numpy_function(b[0])), True),
    ],
)
def test_which_datasets_hand_on_arrays(dataset, expected):
    assert datasets.hands_on_arrays(dataset()) is expected


@pytest.mark.parametrize(
    "element",
    [
        X[:4],
        (X[:4],),
        (X[:4], Y[:4], None),
        {"x": X[:4], "text": np.array([b"a", b"b"])},
        ([X[:4], Y[:4]], {"y": np.array([True, False])}),
        tf.ragged.constant([[1.0, 2.0], [3.0]]),
        (tf.sparse.from_dense([[1.0, 0.0]]), tf.constant([1.0], tf.bfloat16)),
    ],
    ids=["array", "tuple", "none", "dictionary", "nested", "ragged", "sparse"],
)
def test_elements_stay_what_they_are(element, monkeypatch):
    monkeypatch.setattr(datasets, "hands_on_arrays", lambda dataset: True)
    dataset = tf.data.Dataset.from_tensors(element)
    copied = array_memory.without_arrays(dataset)
    assert copied.element_spec == dataset.element_spec
    assert copied.cardinality() == 1
    (got,), (want,) = copied, dataset
    tf.nest.assert_same_structure(got, want, expand_composites=True)
    pairs = zip(*(tf.nest.flatten(e, expand_composites=True) for e in (got, want)), strict=True)
    for a, b in pairs:
        assert (a is None and b is None) or bool(tf.reduce_all(tf.equal(a, b)))
