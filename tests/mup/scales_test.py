"""The scales of each kind of weight, computed by hand."""

import keras
import numpy as np
import pytest

import tfbig
from tests.mup.models import decoder, mlp

L = keras.layers
OPTIMIZERS = keras.optimizers


def scales_of(build, optimizer=None, width=64, base=16):
    keras.utils.set_random_seed(1)
    plain = build(width)
    keras.utils.set_random_seed(1)
    model = tfbig.mup.parametrize(build(width), base=build(base), delta=build(2 * base))
    found = list(tfbig.mup.scales(model, optimizer).values())
    # What is reported is what the weights were multiplied by.
    for weight, before, scale in zip(model.weights, plain.weights, found, strict=True):
        np.testing.assert_allclose(weight.numpy(), before.numpy() * scale.initial, rtol=1e-6)
    return found


def single(layer, shape=(8,), last=None):
    """Function of a width: a model of one layer, or of another after it."""

    def build(width):
        inputs = keras.Input(shape)
        hidden = layer(width)(inputs)
        return keras.Model(inputs, hidden if last is None else last(hidden))

    return build


def test_perceptron_with_sgd():
    first, bias, second, _, last, last_bias = scales_of(mlp, OPTIMIZERS.SGD())
    assert [s.kind for s in (first, bias, second, last, last_bias)] == [
        "vector", "vector", "hidden", "output", "fixed",
    ]  # fmt: skip
    assert [s.learning_rate for s in (first, bias, second, last, last_bias)] == [4, 4, 1, 0.25, 1]
    assert {s.gradient for s in (first, bias, second, last)} == {1}
    # Glorot's variance is 2 / (inputs + outputs); the base has 16.
    assert first.initial == pytest.approx(np.sqrt((6 + 64) / (6 + 16)))
    assert second.initial == pytest.approx(1)
    assert last.initial == pytest.approx(np.sqrt((64 + 3) / (16 + 3)) / 4)
    assert last_bias.initial == 1


def test_perceptron_with_adam():
    first, bias, second, _, last, last_bias = scales_of(mlp, OPTIMIZERS.AdamW())
    rates = [s.learning_rate for s in (first, bias, second, last, last_bias)]
    assert rates == [1, 1, 0.25, 0.25, 1]
    # Gradients of the first two fall with their outputs, against which epsilon would grow.
    assert [s.gradient for s in (first, bias, second, last, last_bias)] == [4, 4, 4, 1, 1]


def test_perceptron_with_muon():
    first, bias, second, _, last, last_bias = scales_of(mlp, OPTIMIZERS.Muon())
    # Spectral norms grow as sqrt(outputs / inputs); Keras's update as sqrt of the longest side.
    assert [first.learning_rate, second.learning_rate] == [1, 0.5]
    assert last.learning_rate == 0.25
    assert [bias.learning_rate, last_bias.learning_rate] == [1, 1]
    first, _, second, _, last, _ = scales_of(mlp, OPTIMIZERS.Muon(rms_rate=None))
    assert [s.learning_rate for s in (first, second, last)] == [2, 1, 0.5]


def test_base_width_changes_nothing():
    for optimizer in (OPTIMIZERS.SGD(), OPTIMIZERS.Adam(), OPTIMIZERS.Muon()):
        for scale in scales_of(mlp, optimizer, width=16):
            assert (scale.initial, scale.learning_rate, scale.gradient) == (1, 1, 1)


@pytest.mark.parametrize(
    ("initializer", "factor"),
    [
        # What brings the deviation to that of the base over the root of 4 = 64 / 16.
        ("he_normal", 1),
        ("lecun_uniform", 1),
        ("glorot_normal", 1),
        ("orthogonal", 1),
        ("zeros", 0.5),
        (keras.initializers.RandomNormal(0, 0.1), 0.5),
        (keras.initializers.TruncatedNormal(0, 0.1), 0.5),
        (keras.initializers.RandomUniform(-0.1, 0.1), 0.5),
        (keras.initializers.VarianceScaling(1, "fan_out"), 1),
        ("identity", 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, keras.initializers.Initializer) else str(v),
)
def test_hidden_weights_begin_as_the_root_of_their_inputs(initializer, factor):
    def build(width):
        inputs = keras.Input((4,))
        hidden = L.Dense(width)(inputs)
        return keras.Model(inputs, L.Dense(width, kernel_initializer=initializer)(hidden))

    assert scales_of(build)[2].initial == pytest.approx(factor)


def test_initializer_of_the_users_own_is_measured():
    rng = np.random.default_rng(0)

    def initializer(shape, dtype=None):
        return keras.ops.convert_to_tensor(rng.normal(0, 0.3, shape), dtype)

    def build(width):
        inputs = keras.Input((4,))
        hidden = L.Dense(width)(inputs)
        return keras.Model(inputs, L.Dense(width, kernel_initializer=initializer)(hidden))

    model = tfbig.mup.build(build, 256, base_width=64)
    assert model.weights[2].numpy().std() == pytest.approx(0.15, rel=0.03)


def test_embedding_is_a_vector():
    def build(width):
        inputs = keras.Input((5,), dtype="int32")
        return keras.Model(inputs, L.Embedding(11, width)(inputs))

    (table,) = scales_of(build, OPTIMIZERS.Adam())
    assert (table.kind, table.learning_rate, table.initial) == ("vector", 1, 1)
    (table,) = scales_of(build, OPTIMIZERS.SGD())
    assert table.learning_rate == 4


def test_convolutions():
    def conv(width):
        return keras.Sequential(
            [
                L.Conv2D(width, 3),
                L.DepthwiseConv2D(3),
                L.Conv2DTranspose(2 * width, 3),
                L.GlobalAveragePooling2D(),
                L.Dense(3),
            ]
        )

    found = scales_of(single(conv, (8, 8, 3)), OPTIMIZERS.SGD())
    first, _, depthwise, _, transposed, _, last, _ = found
    assert [s.kind for s in (first, depthwise, transposed, last)] == [
        "vector", "vector", "hidden", "output",
    ]  # fmt: skip
    assert [s.learning_rate for s in (first, depthwise, transposed, last)] == [4, 4, 1, 0.25]


def test_wide_inputs_of_a_narrow_layer():
    """Two widths that grow by different factors: 16 -> 64 and 4 -> 8."""

    def build(first, second):
        inputs = keras.Input((5,))
        hidden = L.Dense(first)(inputs)
        return keras.Model(inputs, L.Dense(second)(hidden))

    model = tfbig.mup.parametrize(build(64, 8), base=build(16, 4), delta=build(32, 5))
    kernel = list(tfbig.mup.scales(model, OPTIMIZERS.SGD()).values())[2]
    assert (kernel.fan_in, kernel.fan_out, kernel.learning_rate) == (4, 2, 0.5)
    kernel = list(tfbig.mup.scales(model, OPTIMIZERS.Adam()).values())[2]
    assert (kernel.learning_rate, kernel.gradient) == (0.25, 2)
    # Glorot: 2 / (64 + 8) becomes 2 / (16 + 4) / 4.
    assert kernel.initial == pytest.approx(np.sqrt((64 + 8) / (16 + 4) / 4))


def test_recurrent_layers():
    def build(width):
        inputs = keras.Input((5, 3))
        return keras.Model(inputs, L.Dense(2)(L.GRU(width)(inputs)))

    kernel, recurrent, bias, last, _ = scales_of(build, OPTIMIZERS.Adam())
    assert [s.kind for s in (kernel, recurrent, bias, last)] == [
        "vector", "hidden", "vector", "output",
    ]  # fmt: skip
    assert recurrent.learning_rate == 0.25


def test_normalization_and_its_statistics():
    def build(width):
        return single(lambda w: keras.Sequential([L.Dense(w), L.BatchNormalization()]))(width)

    found = scales_of(build, OPTIMIZERS.SGD())
    assert [s.kind for s in found] == ["vector"] * 6
    assert [s.initial for s in found[2:]] == [1] * 4


def heads_grow_in_number(width):
    return decoder(width, width // 8)


def heads_grow_in_size(width):
    return decoder(width, 2)


def test_attention_with_more_heads():
    scales = scales_of(heads_grow_in_number, OPTIMIZERS.Adam())
    # embeddings; then gamma, beta, query, bias, key, bias, value, bias, output, bias
    query, query_bias, key, _, _, _, output = scales[3:10]
    assert {s.kind for s in (query, key, output)} == {"hidden"}
    assert {s.learning_rate for s in (query, key, output)} == {0.25}
    assert (query_bias.kind, query_bias.learning_rate) == ("vector", 1)
    assert query.initial == key.initial


def test_attention_with_larger_heads():
    """Scores are divided by the size of a head, 4 times 8, where Keras takes the root of it."""
    scales = scales_of(heads_grow_in_size, OPTIMIZERS.Adam())
    query, query_bias, key = scales[3:6]
    assert query.initial == pytest.approx(key.initial / 2)
    assert (query.learning_rate, key.learning_rate) == (0.125, 0.25)
    assert query_bias.learning_rate == 0.5
    assert query.gradient == key.gradient / 2
    query, _, key = scales_of(heads_grow_in_size, OPTIMIZERS.SGD())[3:6]
    assert (query.learning_rate, key.learning_rate) == (0.25, 1)


def test_scores_of_larger_heads_are_those_of_divided_queries():
    """The table's own form: queries as keys are parametrized, scores times sqrt(8 / 32)."""
    keras.utils.set_random_seed(1)
    layer = L.MultiHeadAttention(2, 32)
    x = keras.random.normal((2, 5, 64))
    model = keras.Sequential([keras.Input((5, 64)), Attend(2, 32)])
    base, delta = (keras.Sequential([keras.Input((5, w)), Attend(2, w // 2)]) for w in (16, 32))
    before = [v.numpy() for v in model.weights]
    tfbig.mup.parametrize(model, base=base, delta=delta)
    layer.build((2, 5, 64), (2, 5, 64))
    key = list(tfbig.mup.scales(model).values())[2].initial
    for weight, value, now in zip(layer.weights, before, model.weights, strict=True):
        is_query = weight.path.split("/")[-2] == "query"
        weight.assign(value * key if is_query and value.any() else now.numpy())
    layer._inverse_sqrt_key_dim *= 0.5
    np.testing.assert_allclose(model(x), layer(x, x), rtol=1e-5, atol=1e-6)


class Attend(L.Layer):
    def __init__(self, heads, size):
        super().__init__()
        self.attention = L.MultiHeadAttention(heads, size)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)
