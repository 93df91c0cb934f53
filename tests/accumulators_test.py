"""What gradients are added up in."""

import numpy as np
import pytest
import tensorflow as tf

from tfbig import _accumulators

TOTALS = [np.full((2, 3), 10.0, "float32"), np.full(3, 20.0, "float32")]
GRADIENTS = [np.full((2, 3), 1.0, "float16"), np.full(3, 2.0, "float16")]


@pytest.mark.parametrize(
    ("are_alike", "is_first", "expected"),
    [
        (None, None, [13.0, 26.0]),
        (False, False, [13.0, 26.0]),
        (False, True, [13.0, 26.0]),
        (True, False, [11.0, 22.0]),  # No multiplication.
        (True, True, [1.0, 2.0]),  # Nor an addition.
    ],
)
@pytest.mark.parametrize("is_eager", [True, False])
def test_adding(are_alike, is_first, expected, is_eager):
    def add(totals, gradients, weight, *flags):
        return _accumulators.add([*totals, totals[0]], [*gradients, None], weight, *flags)

    flags = [None if f is None else tf.constant(f) for f in (are_alike, is_first)]
    add = add if is_eager else tf.function(add)
    *sums, same = add(
        [tf.constant(t) for t in TOTALS],
        [tf.constant(g) for g in GRADIENTS],
        tf.constant(3.0),
        *flags,
    )
    for got, total, value in zip(sums, TOTALS, expected, strict=True):
        assert got.dtype == "float32"
        np.testing.assert_array_equal(got, np.full_like(total, value))
    np.testing.assert_array_equal(same, TOTALS[0])


def test_rows_are_weighted_always():
    total = _accumulators.start(tf.Variable(np.zeros((4, 2), "float32")), is_sparse=True)
    for _ in range(2):
        rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([3]), tf.constant([4, 2]))
        (total,) = _accumulators.add(
            [total], [rows], tf.constant(5.0), tf.constant(True), tf.constant(False)
        )
    result = _accumulators.result(total, tf.Variable(np.zeros((4, 2), "float32")))
    np.testing.assert_array_equal(result.values, np.full((2, 2), 5.0))
    np.testing.assert_array_equal(result.indices, [3, 3])
