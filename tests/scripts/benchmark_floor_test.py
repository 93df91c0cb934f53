"""The floor of benchmark.py: what a model multiplies, and where the time of that is written."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks import floor, process, report, rows
from tensorflow.python.eager import context

from tests.scripts.scripts_test import BENCHMARK, run


def shapes_of(model, x, y):
    """Kind, shapes of the factors and of the result, of each product."""
    found = floor.products(model, x, y)
    return collections.Counter((p.kind, *p.shapes, p.result) for p in found.elements())


def test_the_products_of_a_dense_model_are_those_written_down():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(7, "relu"), keras.layers.Dense(3)]
    )
    x, y = np.zeros((4, 5), "float32"), np.zeros(4, "int64")
    assert shapes_of(model, x, y) == {
        ("MatMul", (4, 5), (5, 7), (4, 7)): 1,
        ("MatMul", (4, 7), (7, 3), (4, 3)): 1,
        # Gradients of the weights, and of what goes into the second layer. None of the data.
        ("MatMul", (4, 5), (4, 7), (5, 7)): 1,
        ("MatMul", (4, 7), (4, 3), (7, 3)): 1,
        ("MatMul", (4, 3), (7, 3), (4, 7)): 1,
    }


def convolutions():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(3, 3, strides=2, activation="relu"),
            layers.Conv2D(5, 2, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )


IMAGES, CLASSES = np.zeros((4, 8, 8, 2), "float32"), np.zeros(4, "int64")


def test_the_products_of_a_convolutional_model_are_those_written_down():
    assert shapes_of(convolutions(), IMAGES, CLASSES) == {
        ("Conv2D", (4, 8, 8, 2), (3, 3, 2, 3), (4, 3, 3, 3)): 1,
        ("Conv2D", (4, 3, 3, 3), (2, 2, 3, 5), (4, 3, 3, 5)): 1,
        ("MatMul", (4, 5), (5, 3), (4, 3)): 1,
        ("MatMul", (4, 5), (4, 3), (5, 3)): 1,
        ("MatMul", (4, 3), (5, 3), (4, 5)): 1,
        # TensorFlow's graph has the gradient of the images, too, which is not computed.
        ("Conv2DBackpropFilter", (4, 8, 8, 2), (4, 3, 3, 3), (3, 3, 2, 3)): 1,
        ("Conv2DBackpropFilter", (4, 3, 3, 3), (4, 3, 3, 5), (2, 2, 3, 5)): 1,
        ("Conv2DBackpropInput", (2, 2, 3, 5), (4, 3, 3, 5), (4, 3, 3, 3)): 1,
    }


def test_products_of_functions_that_are_called_count_and_loops_are_refused():
    class Called(keras.layers.Layer):
        def call(self, x):
            # Of its own for each trace, since one that has seen other sizes forgets them.
            multiply = tf.function(lambda x: x @ tf.ones((5, 3)), autograph=False)
            return multiply(multiply(x) @ tf.ones((3, 5)))

    inputs = keras.Input((5,))
    model = keras.Model(inputs, Called()(keras.layers.Dense(5)(inputs)))
    found = floor.products(model, np.zeros((4, 5), "float32"), CLASSES)
    # Three forward and three backward, and the layer's two.
    assert sum(found.values()) == 8
    # One is called twice.
    assert found[next(p for p in found if p.shapes == ((4, 5), (5, 3)))] == 2

    inputs = keras.Input((6, 5))
    model = keras.Model(inputs, keras.layers.GRU(3)(inputs))
    with pytest.raises(ValueError, match="the floor of a loop"):
        floor.products(model, np.zeros((4, 6, 5), "float32"), CLASSES)


def attention(dtype):
    inputs = keras.Input((6, 4))
    x = keras.layers.MultiHeadAttention(2, 3, dtype=dtype)(inputs, inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))


SEQUENCES = np.zeros((4, 6, 4), "float32")


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_each_product_can_be_made_again(dtype):
    found = [
        *floor.products(attention(dtype), SEQUENCES, CLASSES),
        *floor.products(convolutions(), IMAGES, CLASSES),
    ]
    assert {"Einsum", "MatMul", "Conv2D", "Conv2DBackpropFilter"} <= {p.kind for p in found}
    assert ("float16" in {p.dtype for p in found}) == (dtype == "mixed_float16")
    for product in found:
        result = product(*(tf.ones(shape, product.dtype) for shape in product.shapes))
        assert tuple(result.shape) == product.result
        assert result.dtype == product.dtype


@pytest.mark.parametrize(
    "products",
    [
        lambda: floor.products(attention("float32"), SEQUENCES, CLASSES),
        lambda: floor.products(convolutions(), IMAGES, CLASSES),
    ],
    ids=["attention", "convolutions"],
)
def test_nothing_is_optimized_away(products):
    found = products()
    # Equal ones, too: in the attention, those of queries, keys and values.
    found += found
    function, factors = floor.multiplication(found)
    context.enable_graph_collection()
    try:
        function(*factors)
        (graphs,) = context.export_run_metadata().function_graphs
    finally:
        context.disable_graph_collection()
    computed = collections.Counter(node.op for node in graphs.post_optimization_graph.node)
    expected = collections.Counter(p.kind for p in found.elements())
    assert {kind: computed[kind] for kind in expected} == expected


def measured(row, floor_milliseconds, *seconds):
    """A row of 10 samples, measured in as many processes as there are times."""
    task = process.Task(row, "gpt", 10, 2, 1, 1)
    runs = [
        {
            "seconds": [own],
            "cpu_seconds": [2 * own],
            "first_update_seconds": 9.0,
            "peak_mib": 9.0,
            "growth_mib": 4.0,
            "parameters": 7,
            "floor_milliseconds": floor_milliseconds and floor_milliseconds * own,
        }
        for own in seconds
    ]
    return rows.Row(task, runs)


def test_the_report_has_the_floor_and_cpu_time(capsys):
    # 200 to 600 ms a sample; other load slows the products of a process as well.
    table = [
        measured("micro", 25.0, 2.0, 6.0, 4.0),
        measured("tfbig", 50.0, 4.0),
        measured("torch", None, 3.0),
    ]
    assert report.floors(table) == [(100.0, 4.0), (200.0, 2.0), (150.0, 2.0)]
    assert report.floors(table[2:]) == [None]
    assert [row.get("floor_ratio") for row in report.document(table)] == [4.0, 2.0, 2.0]
    (found,) = report.tables(table)
    assert "PyTorch and JAX" in found.title
    assert "PyTorch and JAX" not in report.tables(table[:2])[0].title
    column = found.heads.index("CPU ms")
    assert found.heads[column : column + 3] == ("CPU ms", "floor ms", "x floor")
    assert [line[column : column + 3] for line in found.lines] == [
        ("800", "100", "4.00"),
        ("800", "200", "2.00"),
        ("600", "150", "2.00"),
    ]
    report.show([*table, rows.Row(process.Task("jit", "gpt", 10, 2, 1, 1), error="why")])
    output = capsys.readouterr().out
    assert "x floor" in output
    assert "failed: why" in output
    assert all(" ".join(line) in " ".join(output.split()) for line in found.lines)


GPU = {
    "": "--hardware=gpu needs a GPU that TensorFlow sees, and there is none",
    "--in_turn --models=mlp --rows=tfbig": "--hardware=gpu needs a GPU",
    "--peers=torch": "--hardware=gpu does not go with --peers",
    "--rows=tfbig,pipeline": "--hardware=gpu does not go with the row pipeline",
    "--network": "--hardware=gpu does not go with --network",
    "--tuners": "--hardware=gpu does not go with --tuners",
}


@pytest.mark.parametrize("arguments", GPU)
def test_a_gpu_that_is_not_there_is_refused(arguments):
    done = run(BENCHMARK, "--hardware=gpu", *arguments.split(), timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert GPU[arguments] in line
