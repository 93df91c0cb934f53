"""The gradient noise scale, where it is known in closed form."""

import keras
import numpy as np
import pytest

import tfbig
from tests.conftest import make_strategy
from tfbig._update import noise_scale

D, SIGMA, DISTANCE = 20, 3.0, 2.0
# A sample x has the loss |w - x|^2 / 2 and so the gradient w - x. With x of the mean w + m and
# the covariance SIGMA^2 in each of D directions, the true gradient is m.
NOISE_SCALE = D * SIGMA**2 / DISTANCE**2


@keras.saving.register_keras_serializable("noise_scale_test")
class Mean(keras.layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, x):
        return self.w - x


def model_of(name="default", layer=Mean, **options):
    with make_strategy(name).scope():
        x = keras.Input((D,))
        model = tfbig.Model(x, layer()(x), log_gradient_noise_scale=True, **options)
        # With a rate of zero the noise scale stays what it is; the loss is a mean over D too.
        loss = keras.losses.MeanSquaredError()
        model.compile(keras.optimizers.SGD(0.0), lambda y, p: loss.call(y, p) * D / 2)
    return model


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) * SIGMA
    x[:, 0] += DISTANCE
    return x.astype("float32"), np.zeros((n, D), "float32")


def logged(model, updates=300, batch_size=64, seed=0):
    history = model.fit(
        *data(updates * batch_size, seed), batch_size=batch_size, verbose=0, shuffle=False
    )
    return history.history["gradient_noise_scale"][-1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", {"gradient_accumulation_steps": 4}),
        ("default", {"micro_batch_size": 24}),  # 24, 24 and 16 samples.
        ("default", {"gradient_accumulation_steps": 4, "loss_scale": 1024.0}),
        ("mirrored_2", {"gradient_accumulation_steps": 1}),
        ("mirrored_2", {"micro_batch_size": 5}),
    ],
    ids=str,
)
def test_it_is_the_one_in_closed_form(name, options):
    model = model_of(name, **options)
    # The standard error of an average over some 200 updates is a few hundredths.
    assert logged(model) == pytest.approx(NOISE_SCALE, rel=0.15)
    state = model.noise_scale_state
    assert float(state.variance.numpy()) == pytest.approx(
        D * SIGMA**2 * (1 - noise_scale.DECAY**300), rel=0.1
    )


def test_every_estimate_is_the_formula():
    model = model_of(micro_batch_size=5)
    x, y = data(13)
    model.fit(x, y, batch_size=13, verbose=0, shuffle=False)
    parts = [-x[:5].mean(0), -x[5:10].mean(0), -x[10:].mean(0)]
    small = np.mean([np.sum(g.astype("float64") ** 2) for g in parts])
    inverse = np.mean([1 / 5, 1 / 5, 1 / 3])
    whole = np.sum(x.astype("float64").mean(0) ** 2)
    variance = (small - whole) / (inverse - 1 / 13)
    state = model.noise_scale_state
    rate = 1 - noise_scale.DECAY
    # float32 sums.
    assert float(state.variance.numpy()) == pytest.approx(rate * variance, rel=1e-5)
    assert float(state.squared_gradient.numpy()) == pytest.approx(
        rate * (whole - variance / 13), rel=1e-5
    )


class Lookup(keras.layers.Layer):
    """The same model, whose parameters are looked up as rows: the gradient is sparse."""

    def build(self, shape):
        self.table = keras.layers.Embedding(5, shape[-1], embeddings_initializer="zeros")
        self.table.build((None, 2))

    def call(self, x):
        rows = self.table(keras.ops.zeros((keras.ops.shape(x)[0], 2), "int32"))
        return keras.ops.mean(rows, axis=1) - x


@pytest.mark.parametrize("jit", [False, True])
def test_rows_of_one_index_are_added_up(jit):
    want = logged(model_of(gradient_accumulation_steps=4), updates=5)
    model = model_of(layer=Lookup, gradient_accumulation_steps=4)
    model.jit_compile = jit
    assert logged(model, updates=5) == pytest.approx(want, rel=1e-4)


def test_compiled():
    want = logged(model_of(gradient_accumulation_steps=4), updates=5)
    model = model_of(gradient_accumulation_steps=4)
    model.jit_compile = True
    assert logged(model, updates=5) == pytest.approx(want, rel=1e-4)


def test_nothing_known():
    model = model_of(gradient_accumulation_steps=4)
    # One sample is one micro-batch.
    history = model.fit(*data(1), batch_size=64, verbose=0)
    assert np.isnan(history.history["gradient_noise_scale"][0])


def test_noise_alone_is_infinite():
    model = model_of(gradient_accumulation_steps=4)
    x, y = data(64)
    x -= x.mean(0)
    history = model.fit(x, y, batch_size=64, verbose=0)
    assert np.isinf(history.history["gradient_noise_scale"][0])


def test_skipped_update_tells_nothing():
    model = model_of(gradient_accumulation_steps=4, loss_scale=1024.0)
    before = logged(model, updates=5)
    x, y = data(64)
    x[3] = np.nan
    history = model.fit(x, y, batch_size=64, verbose=0)
    assert model.skipped_updates == 1
    assert history.history["gradient_noise_scale"][0] == before


def test_training_is_the_same():
    results = []
    for noise in (False, True):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((D,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(D)]
        model = tfbig.Sequential(
            layers, gradient_accumulation_steps=3, log_gradient_noise_scale=noise
        )
        model.compile("adam", "mse")
        model.fit(*data(48), batch_size=12, verbose=0, shuffle=False)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_averages_are_saved(tmp_path):
    model = model_of(gradient_accumulation_steps=4)
    logged(model, updates=5)
    model.save_weights(tmp_path / "m.weights.h5")
    again = model_of(gradient_accumulation_steps=4)
    again.load_weights(tmp_path / "m.weights.h5")
    for a, b in zip(
        again.noise_scale_state.variables(), model.noise_scale_state.variables(), strict=True
    ):
        assert float(a.numpy()) == float(b.numpy()) != 0
    assert type(model).from_config(model.get_config()).log_gradient_noise_scale


def test_backup_goes_on_with_the_averages(tmp_path):
    x, y = data(256)

    def train(epochs, *, backup):
        model = model_of(gradient_accumulation_steps=4)
        callbacks = [tfbig.callbacks.BackupAndRestore(tmp_path)] if backup else []

        class Stop(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                if epoch + 1 == epochs:
                    raise KeyboardInterrupt

        history = keras.callbacks.History()
        arguments = {"batch_size": 64, "epochs": 3, "verbose": 0, "shuffle": False}
        try:
            model.fit(x, y, callbacks=[*callbacks, Stop(), history], **arguments)
        except KeyboardInterrupt:
            assert epochs < 3
        return history.history.get("gradient_noise_scale", [None])[-1]

    want = train(4, backup=False)
    train(1, backup=True)
    assert train(4, backup=True) == want


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 64}], ids=str)
def test_one_micro_batch_is_refused(options):
    with pytest.raises(ValueError, match="needs two of them"):
        logged(model_of(**options))
