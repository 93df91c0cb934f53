"""What cannot be parametrized gets a clear error, and is left as it was."""

import keras
import numpy as np
import pytest

import tfbig
from tests.mup.models import batch, mlp, parametrized, weights_of
from tfbig import errors

L = keras.layers


def refused(error, *parts):
    return pytest.raises(error, match=".*".join(parts))


def one_layer(layer, shape=(8,)):
    def build(width):
        inputs = keras.Input(shape)
        hidden = L.Dense(width)(inputs)
        return keras.Model(inputs, layer(width)(hidden))

    return build


def parametrize(build, width=32):
    return tfbig.mup.parametrize(build(width), base=build(8), delta=build(16))


def test_trained_model():
    model = mlp(16, "sgd")
    model.train_on_batch(*batch())
    before = weights_of(model)
    with refused(errors.InvalidOptionError, "before it is trained", "made 1 updates"):
        tfbig.mup.parametrize(model, base=mlp(4), delta=mlp(8))
    for a, b in zip(weights_of(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_twice():
    model = parametrized("sgd")
    with refused(errors.InvalidOptionError, "only once"):
        tfbig.mup.parametrize(model, base=mlp(4), delta=mlp(8))


@pytest.mark.parametrize("name", ["Lamb", "Adafactor", "Adadelta", "Ftrl"])
def test_optimizer_without_a_rule(name):
    optimizer = getattr(keras.optimizers, name)()
    with refused(errors.InvalidOptionError, "AdamW, Adagrad", f"Received: {name}"):
        parametrized(optimizer)
    # One that comes later is found when it first updates.
    model = parametrized(None)
    model.compile(optimizer, "mse", jit_compile=False)
    with refused(errors.InvalidOptionError, f"Received: {name}"):
        model.train_on_batch(*batch())


def test_update_of_the_users_own():
    class Own(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, keras.ops.sign(gradient) * learning_rate)

    class Same(keras.optimizers.SGD):
        pass

    with refused(errors.InvalidOptionError, "Received: Own"):
        parametrized(Own())
    parametrized(Same())


def test_models_that_are_not_built():
    with refused(errors.InvalidOptionError, "`base` must be a model that is built"):
        tfbig.mup.parametrize(mlp(16), base=keras.Sequential([L.Dense(3)]), delta=mlp(8))


def test_delta_of_the_same_width():
    with refused(errors.InvalidOptionError, "`delta` must differ"):
        tfbig.mup.parametrize(mlp(16), base=mlp(4), delta=mlp(4))


def test_other_layers():
    with refused(errors.UnsupportedModelError, "must have the same layers", "6 weights, 2 weights"):
        tfbig.mup.parametrize(mlp(16), base=keras.Sequential([keras.Input((6,)), L.Dense(4)]),
                              delta=mlp(8))  # fmt: skip


def test_width_that_does_not_differ_in_delta():
    def build(width, inner):
        return keras.Sequential([keras.Input((3,)), L.Dense(width), L.Dense(inner), L.Dense(1)])

    with refused(errors.UnsupportedModelError, "only if it differs between `delta`", r"\(32, 64\)"):
        tfbig.mup.parametrize(build(32, 64), base=build(8, 16), delta=build(16, 16))


def test_tied_embedding():
    class Tied(L.Layer):
        def __init__(self, width, **kwargs):
            super().__init__()
            self.embedding = L.ReversibleEmbedding(11, width, **kwargs)

        def build(self, shape):
            self.embedding.build(shape)

        def call(self, x):
            return self.embedding(self.embedding(x), reverse=True)

    def build(tie_weights):
        def of_width(width):
            inputs = keras.Input((4,), dtype="int32")
            return keras.Model(inputs, Tied(width, tie_weights=tie_weights)(inputs))

        return of_width

    with refused(errors.UnsupportedModelError, "ReversibleEmbedding", "tie_weights=False"):
        parametrize(build(True))
    kinds = [s.kind for s in tfbig.mup.scales(parametrize(build(False))).values()]
    assert kinds == ["vector", "output"]


def test_regularizers_and_constraints():
    with refused(errors.UnsupportedModelError, "has a regularizer", "weight_decay"):
        parametrize(one_layer(lambda w: L.Dense(w, kernel_regularizer="l2")))
    with refused(errors.UnsupportedModelError, "has a constraint"):
        parametrize(one_layer(lambda w: L.Dense(w, kernel_constraint="max_norm")))
    parametrize(one_layer(lambda w: L.Dense(w, kernel_constraint="non_neg")))
    with refused(errors.UnsupportedModelError, "SpectralNormalization", "divides it in each call"):
        parametrize(one_layer(lambda w: L.SpectralNormalization(L.Dense(w))))
    # Where nothing grows, they may stay.
    parametrize(one_layer(lambda _: L.Dense(1, bias_regularizer="l2")))


def test_equal_numbers_in_a_sum():
    with refused(errors.UnsupportedModelError, "must begin random, orthogonal or zero"):
        parametrize(one_layer(lambda _: L.Dense(1, kernel_initializer="ones")))
    parametrize(one_layer(lambda _: L.Dense(1, kernel_initializer="zeros")))


def test_heads_that_grow_in_attention_of_the_users_own():
    class Own(L.Layer):
        def __init__(self, heads, size):
            super().__init__()
            self.query_dense = L.EinsumDense("abc,cde->abde", (None, heads, size))

        def call(self, x):
            return keras.ops.mean(self.query_dense(x), axis=(2, 3))

    def build(width, size):
        inputs = keras.Input((4, 5))
        return keras.Model(inputs, Own(width // size, size)(L.Dense(width)(inputs)))

    with refused(errors.UnsupportedModelError, "heads must keep their size", "a factor of 4"):
        parametrize(lambda width: build(width, width // 4))
    parametrize(lambda width: build(width, 4))


def test_clone_without_weights():
    model = keras.Sequential([L.Dense(16), L.Dense(1)])
    base, delta = (keras.Sequential([L.Dense(w), L.Dense(1)]) for w in (4, 8))
    for each in (model, base, delta):
        each.build((None, 3))
    tfbig.mup.parametrize(model, base=base, delta=delta)
    with refused(errors.UnsupportedModelError, "Clone the model first"):
        keras.models.clone_model(model, clone_function=lambda layer: L.Dense.from_config(
            layer.get_config() | {"use_bias": False}))  # fmt: skip


def test_coordinate_check():
    for widths in ((8,), 8, (8, 8)):
        with refused(errors.InvalidOptionError, "`widths` must be at least two different integers"):
            tfbig.mup.coordinate_check(mlp, *batch(), widths=widths)
    for bad in ({"widths": (8, "a")}, {"widths": (0, 8)}, {"updates": 1.5}, {"repeats": 0}):
        with refused(errors.InvalidOptionError, f"`{next(iter(bad))}` must be an integer >= 1"):
            tfbig.mup.coordinate_check(mlp, *batch(), **bad)
    with refused(errors.InvalidOptionError, "must return a compiled model"):
        tfbig.mup.coordinate_check(mlp, *batch(), widths=(8, 16))
