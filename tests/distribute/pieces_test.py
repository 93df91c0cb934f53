"""How variables are divided, and how their pieces travel."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_strategy
from tfbig.distribute import _pieces, _rows

SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@settings(deadline=None, max_examples=200)
@given(SHAPES, st.integers(1, 9))
def test_chunks_cover_a_variable_without_overlap(shape, replicas):
    size = math.prod(shape)
    pieces = _pieces.in_chunks(shape, replicas)
    covered = [k for p in pieces if p is not None for k in range(p.begin, p.end)]
    assert len(pieces) == replicas
    assert covered == list(range(size))
    assert all(math.prod(p.shape) == p.size for p in pieces if p is not None)
    # At most an eighth more than a fair share, and a part of an element.
    largest = max((p.size for p in pieces if p is not None), default=0)
    assert largest <= size / replicas * (1 + 1 / 8) + 1
    value = np.arange(size, dtype="float32").reshape(shape)
    parts = [p.of(tf.constant(value)).numpy() for p in pieces if p is not None]
    joined = np.concatenate([np.zeros(0), *[p.reshape(-1) for p in parts]])
    np.testing.assert_array_equal(joined, value.reshape(-1))


@pytest.mark.parametrize("shape", [(40, 3), (5, 3), (5, 1), (40, 2, 2), (17,)], ids=str)
def test_rows_go_to_the_piece_that_they_belong_to(shape):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, shape[0], 12)
    values = rng.normal(size=(12, *shape[1:])).astype("float32")
    slices = tf.IndexedSlices(tf.constant(values), tf.constant(indices))
    whole = np.zeros(shape, "float32")
    np.add.at(whole, indices, values)
    squares = np.zeros(shape, "float32")
    # Optimizers square the rows of a table one by one.
    np.add.at(squares, indices, values**2)
    pieces = [p for p in _pieces.in_chunks(shape, 2) if p is not None]
    for expected, power in ((whole, 1), (squares, 2)):
        for piece in pieces:
            own = piece.of_rows(slices)
            sums = tf.scatter_nd(own.indices[:, tf.newaxis], own.values**power, piece.shape)
            np.testing.assert_allclose(
                sums.numpy().reshape(-1),
                expected.reshape(-1)[piece.begin : piece.end],
                rtol=1e-6,
                atol=1e-6,
            )


def test_owners_have_about_the_same():
    sizes = [100, 1, 60, 50, 3, 41]
    owners = _pieces.balanced_owners(sizes, 2)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == r) for r in range(2)]
    assert loads == [141, 114]


@pytest.mark.parametrize("bucket_bytes", [100, 2**20])
@pytest.mark.parametrize("strategy", ["mirrored_2", "mirrored_4"])
@pytest.mark.parametrize("is_owned", [False, True])
def test_tensors_are_scattered_and_gathered(strategy, bucket_bytes, is_owned):
    strategy = make_strategy(strategy)
    replicas = strategy.num_replicas_in_sync
    shapes = [(70, 2), (3,), (), (5, 4), (1,)]
    rng = np.random.default_rng(0)
    tensors = [rng.integers(-9, 9, (replicas, *shape)).astype("float32") for shape in shapes]
    if is_owned:
        owners = _pieces.balanced_owners([math.prod(s) for s in shapes], replicas)
        pieces = [
            _pieces.on_one_replica(s, replicas, o) for s, o in zip(shapes, owners, strict=True)
        ]
    else:
        pieces = [_pieces.in_chunks(s, replicas) for s in shapes]
    rows = _rows.Rows(pieces, shapes)

    def step():
        index = tf.distribute.get_replica_context().replica_id_in_sync_group
        own = [tf.constant(t)[index] for t in tensors]
        found = rows.scatter(own, bucket_bytes, tf.identity, tf.float32, tf.float32)
        gathered = dict(rows.gather(found, bucket_bytes, tf.float32))
        return [gathered[i] for i in range(len(shapes))]

    results = tf.function(lambda: strategy.run(step), autograph=False)()
    for value, tensor in zip(results, tensors, strict=True):
        for copy in strategy.experimental_local_results(value):
            np.testing.assert_array_equal(copy, tensor.sum(0))
