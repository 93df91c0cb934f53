"""Data: sizes and shapes of batches, shuffling, and going on where a `fit` was."""

import collections
import random

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from tensorflow.python.eager import context as tf_context

from tfbig._keras.thread import current, holding

# Message of an assertion in a graph, by which its error is told apart.
NO_SAMPLES = "A batch must hold at least one sample. Received: a batch of 0 samples."


def batch_size(data):
    """Number of samples of a (nested) batch: an int if static, else a tensor."""
    first = next(v for v in keras.tree.flatten(data) if v is not None)
    if isinstance(first, tf.SparseTensor):
        return (
            first.shape[0]
            if first.shape[0] is not None
            else tf.cast(first.dense_shape[0], tf.int32)
        )
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return first.shape[0] if first.shape[0] is not None else tf.shape(first)[0]


def samples_of(data, begin, size):
    """So many samples of a (nested) batch, from an index on."""

    def part(value):
        if value is None:
            return None
        if isinstance(value, tf.RaggedTensor):
            return value[begin : begin + size]
        if isinstance(value, tf.SparseTensor):
            shape = tf.cast(value.dense_shape, tf.int64)
            begin_, size_ = (tf.reshape(tf.cast(x, tf.int64), [1]) for x in (begin, size))
            return tf.sparse.slice(
                value,
                tf.concat([begin_, tf.zeros_like(shape[1:])], 0),
                tf.concat([size_, shape[1:]], 0),
            )
        # tf.slice with explicit sizes: XLA needs them as constants.
        inner = tf.shape(value)[1:]
        sliced = tf.slice(
            value,
            tf.concat([[begin], tf.zeros_like(inner)], 0),
            tf.concat([[size], inner], 0),
        )
        return tf.ensure_shape(sliced, [None, *value.shape[1:]])

    return keras.tree.map_structure(part, data)


def as_tensor(value):
    """A part of a batch as a tensor; what is ragged, sparse or None stays."""
    is_kept = value is None or isinstance(value, tf.RaggedTensor | tf.SparseTensor)
    return value if is_kept else tf.convert_to_tensor(value)


def spec_of_any_size(value):
    """The specification of a part of a batch of any number of samples."""
    if value is None:
        return None
    shape = [None, *value.shape[1:]]
    if isinstance(value, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, value.dtype, value.ragged_rank, value.row_splits.dtype)
    if isinstance(value, tf.SparseTensor):
        return tf.SparseTensorSpec(shape, value.dtype)
    return tf.TensorSpec(shape, value.dtype)


def without_optionals(data):
    """Keras stands a `tf.experimental.Optional` for a None in a dataset."""
    return keras.tree.map_structure(
        lambda v: None if isinstance(v, tf.experimental.Optional) else v, data
    )


def specs_of_one_replica(dataset):
    def spec(s):
        # A PerReplicaSpec holds one spec per replica.
        parts = getattr(s, "_value_specs", None)
        s = parts[0] if parts else s
        # What stands for None has no shape.
        return s if hasattr(s, "shape") and not isinstance(s, tf.OptionalSpec) else None

    return tf.nest.map_structure(spec, dataset.element_spec)


def effective_batch_size(iterator):
    """The batch size of an epoch iterator, or None where it is not known."""
    size = iterator.data_adapter.batch_size
    if size is None:
        dataset = iterator.data_adapter.get_tf_dataset()
        variant = getattr(dataset, "_variant_tensor", None)
        if variant is not None:
            size = int(tf.raw_ops.ComputeBatchSize(input_dataset=variant))
    return size if size is not None and size > 0 else None


def is_generated(iterator):
    """Whether a generator makes the batches of an epoch iterator, so each may be of any size."""
    adapter = iterator.data_adapter
    # Keras makes a generator of it; its items are batches by definition.
    if isinstance(adapter, PyDatasetAdapter):
        return False
    return _is_generated(adapter.get_tf_dataset())


# Datasets that make batches, of samples or of other batches.
_BATCHERS = ("BatchDataset", "RebatchDataset", "GroupByWindowDataset")


def _is_generated(dataset):
    name = type(dataset).__name__
    if not isinstance(dataset, tf.data.Dataset) or name.endswith(_BATCHERS):
        return False
    # `from_generator` has its operation in a function of a `flat_map`.
    graphs = [function.function.graph for function in dataset._functions()]
    return any(
        op.type == "GeneratorDataset" for graph in graphs for op in graph.get_operations()
    ) or any(map(_is_generated, dataset._inputs()))


def global_seed():
    """The seed of `tf.random.set_seed` or `keras.utils.set_random_seed`, or None."""
    return tf_context.global_seed()


def new_seed():
    """A seed to shuffle by: made from the global one, else from the system's entropy."""
    seed = global_seed()
    return random.SystemRandom().getrandbits(62) if seed is None else seed


def is_sharded(dataset):
    """Whether `shard` was called on a dataset, or on one it is made from."""
    return type(dataset).__name__ == "_ShardDataset" or any(
        is_sharded(source) for source in dataset._inputs()
    )


# Datasets that read files; what interleaves files has them in a function.
_READERS = (
    *("TFRecordDataset", "TextLineDataset", "FixedLengthRecordDataset"),
    *("_InterleaveDataset", "_ParallelInterleaveDataset", "_FlatMapDataset"),
)


def shuffles_without_seed(dataset):
    """Whether `shuffle` without a seed was called on a dataset, or on one it is made from."""
    own = [getattr(dataset, name, None) for name in ("_seed", "_seed2")]
    is_unseeded = type(dataset).__name__ == "_ShuffleDataset" and not any(
        int(seed) for seed in own if seed is not None
    )
    return is_unseeded or any(shuffles_without_seed(source) for source in dataset._inputs())


def reads_files(dataset):
    """Whether a dataset is made of files, as far as can be told."""
    return type(dataset).__name__.startswith(_READERS) or any(map(reads_files, dataset._inputs()))


def reseeded_shuffling(seed):
    """A context in which `fit` on arrays shuffles by this seed, in each epoch anew.

    Keras shuffles in each epoch alike once a seed is set, and in ways that cannot
    be repeated if none is.
    """
    return holding("shuffle_seed", seed)


_get_tf_dataset = ArrayDataAdapter.get_tf_dataset


def _reseeded_tf_dataset(self):
    seed = current("shuffle_seed")
    if seed is None or not self._shuffle:
        return _get_tf_dataset(self)
    inputs = array_slicing.convert_to_sliceable(self._inputs, target_backend="tensorflow")
    inputs = keras.tree.lists_to_tuples(inputs)

    def permutation(digits):
        # Another one each time the dataset is iterated, in the order of these times.
        key = tf.stack([seed, tf.reduce_sum(digits * [1, 2**10, 2**20, 2**30])])
        indices = tf.range(self._num_samples, dtype=tf.int64)
        if self._shuffle != "batch":
            return tf.random.experimental.stateless_shuffle(indices, key)
        # As in Keras: the samples of each batch among themselves.
        places = tf.random.stateless_uniform([self._num_samples], key, dtype=tf.float64)
        batch = tf.cast(indices // self._batch_size, tf.float64)
        return tf.cast(tf.argsort(batch + places), tf.int64)

    def batches(indices):
        return tf.data.Dataset.from_tensor_slices(indices).batch(self._batch_size)

    def samples(indices, arrays):
        def part(value):
            if isinstance(value, array_slicing.TensorflowSparseWrapper):
                return array_slicing.slice_tensorflow_sparse_wrapper(value, indices)
            if isinstance(value, list | tuple | dict):
                return None  # Goes on inside.
            return tf.gather(value, indices) if tf.is_tensor(value) else value

        return keras.tree.traverse(part, arrays)

    # `shuffle` draws when an iterator is made, `Dataset.random` when it is first read: with
    # replicas, that happens in the background, and iterators that Keras drops unread race.
    keys = tf.data.Dataset.range(2**10).shuffle(2**10, seed).batch(4).take(1)
    whole = tf.data.Dataset.from_tensors(inputs).repeat()
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return (
        tf.data.Dataset.zip(keys.map(permutation).flat_map(batches), whole)
        .map(samples, num_parallel_calls=tf.data.AUTOTUNE)
        .with_options(options)
        .prefetch(tf.data.AUTOTUNE)
    )


ArrayDataAdapter.get_tf_dataset = _reseeded_tf_dataset


def known_batches(iterator):
    """Batches of an epoch of an epoch iterator, where that is known, else None."""
    return iterator._num_batches


def resume_data(iterator, epochs, batches, num_batches):
    """Moves the data of the `fit` that begins to where an earlier one was.

    Args:
        iterator: its epoch iterator.
        epochs: int, epochs that are complete.
        batches: int, batches of the next one that are consumed.
        num_batches: int, what `known_batches` was there; or None.
    """
    enumerate_epoch = iterator._enumerate_iterator
    # Makes the iterators that the epochs made, which moves seeds on, and reads nothing.
    if iterator._num_batches is None and not iterator.steps_per_epoch:
        for _ in range(epochs):
            iterator.data_adapter.on_epoch_begin()
            iter(iterator._get_iterator())
            iterator.data_adapter.on_epoch_end()
        # What Keras takes it for once the data have ended.
        iterator._num_batches = num_batches
    else:
        for _ in range(epochs):
            collections.deque(enumerate_epoch(), maxlen=0)

    def rest_of_epoch():
        iterator._enumerate_iterator = enumerate_epoch
        is_first = True
        for begin, end, data in enumerate_epoch():
            if is_first:
                # With steps_per_epoch, one iterator goes on through all epochs.
                _read(data, iterator._steps_seen - iterator.steps_per_execution)
                is_first = False
            if begin < batches:
                _read(data, end + 1 - begin)
            else:
                yield begin, end, data

    iterator._enumerate_iterator = rest_of_epoch


def _read(data, batches):
    for _ in range(batches):
        next(data, None)
