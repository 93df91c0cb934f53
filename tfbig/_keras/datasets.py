"""`tf.data` does not tell how a dataset was made; here the graph behind it is searched."""

import tensorflow as tf

from tfbig import _types

# Datasets that make batches, of samples or of other batches.
_BATCHERS = ("BatchDataset", "RebatchDataset", "GroupByWindowDataset")

# Datasets that read files; those that interleave files read them in a function.
_READERS = (
    *("TFRecordDataset", "TextLineDataset", "FixedLengthRecordDataset"),
    *("_InterleaveDataset", "_ParallelInterleaveDataset", "_FlatMapDataset"),
)

# Datasets whose batches are copies of their samples.
_COPIERS = ("BatchDataset", "DenseToRaggedDataset")

# Operations that return what Python code returns.
_OF_PYTHON = frozenset(["EagerPyFunc", "GeneratorDataset", "PyFunc", "PyFuncStateless"])


def hands_on_arrays(dataset: _types.Dataset) -> bool:
    """Whether elements of a dataset may be the memory of NumPy arrays that Python code returned."""
    if type(dataset).__name__.endswith(_COPIERS):
        return False
    graphs = [function.function.graph for function in dataset._functions()]
    return any(not _OF_PYTHON.isdisjoint(_types_of_operations(graph)) for graph in graphs) or any(
        map(hands_on_arrays, dataset._inputs())
    )


def _types_of_operations(graph: tf.Graph) -> set[str]:
    """The types of the operations of a graph and of its functions."""
    functions = graph.as_graph_def().library.function
    nodes = [node.op for function in functions for node in function.node_def]
    return {op.type for op in graph.get_operations()}.union(nodes)


def is_generated(dataset: _types.Dataset) -> bool:
    """Whether a generator makes a dataset's batches, so that each may be of any size."""
    name = type(dataset).__name__
    if not isinstance(dataset, tf.data.Dataset) or name.endswith(_BATCHERS):
        return False
    # `from_generator` has its operation in a function of a `flat_map`.
    graphs = [function.function.graph for function in dataset._functions()]
    return any(
        op.type == "GeneratorDataset" for graph in graphs for op in graph.get_operations()
    ) or any(map(is_generated, dataset._inputs()))


def is_sharded(dataset: _types.Dataset) -> bool:
    """Whether `shard` was called on a dataset or on one of its sources."""
    return type(dataset).__name__ == "_ShardDataset" or any(
        is_sharded(source) for source in dataset._inputs()
    )


def shuffles_without_seed(dataset: _types.Dataset) -> bool:
    """Whether `shuffle` was called without a seed on a dataset or on one of its sources."""
    own = [getattr(dataset, name, None) for name in ("_seed", "_seed2")]
    is_unseeded = type(dataset).__name__ == "_ShuffleDataset" and not any(
        int(seed) for seed in own if seed is not None
    )
    return is_unseeded or any(shuffles_without_seed(source) for source in dataset._inputs())


def reads_files(dataset: _types.Dataset) -> bool:
    """Whether a dataset reads files, as far as its graph shows."""
    return type(dataset).__name__.startswith(_READERS) or any(map(reads_files, dataset._inputs()))
