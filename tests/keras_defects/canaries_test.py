"""Defects of Keras and TensorFlow that tfbig works around, shown in plain Keras.

No model here is a tfbig model. A failing test means that upstream has fixed a
defect: then its workaround in `tfbig/_keras/` and the test can go.
"""

import gc
import pathlib
import re
import subprocess
import sys
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import job
from tests.conftest import make_strategy

ONE_AND_TWO = ("default", "mirrored_2")


def linear(
    strategy="mirrored_2", optimizer=None, loss="mse", layers=(), shape=(1,), dtype=None, **kwargs
):
    """A compiled `y = x w` with w = 1, and SGD with a learning rate of 1."""
    with make_strategy(strategy).scope():
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential(
            [keras.Input(shape, dtype=dtype), *(layer() for layer in layers), dense]
        )
        model.compile(optimizer() if optimizer else keras.optimizers.SGD(1.0), loss, **kwargs)
    return model


def column(*values):
    return np.array(values, "float32")[:, None]


def weight_after(model, x, y=None, batch_size=4, **kwargs):
    y = np.zeros_like(x) if y is None else y
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, **kwargs)
    return model.get_weights()[-1].item()


def run(code, timeout=60):
    """Runs code in a process of its own, so that no crash or aborted collective harms a test."""
    program = f"import numpy as np\nfrom {__name__} import linear, weight_after\n{code}"
    process = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=pathlib.Path(__file__).parents[2],
    )
    return process.returncode, process.stdout


def test_keras_20582_built_in_accumulation_raises_under_mirrored():
    model = linear(optimizer=lambda: keras.optimizers.SGD(gradient_accumulation_steps=2))
    with pytest.raises(RuntimeError, match="merge_call"):
        weight_after(model, column(1, 1, 1, 1))


def test_loss_scale_optimizer_trusts_replica_0():
    def scaled():
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=8.0)

    model = linear(optimizer=scaled)
    # d loss / dw is 2 w x^2.
    assert weight_after(model, column(1, 1, 1, np.inf)) == -np.inf
    assert model.optimizer.dynamic_scale.numpy() == 8.0
    model = linear(optimizer=scaled)
    assert weight_after(model, column(np.inf, 1, 1, 1)) == 1.0
    assert model.optimizer.dynamic_scale.numpy() == 4.0


def test_loss_scale_optimizer_has_no_floor():
    model = linear(
        "default", lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0))
    )
    weight_after(model, np.full((200, 1), np.nan), batch_size=1)
    assert model.optimizer.dynamic_scale.numpy() == 0.0


def test_mixed_float16_has_compile_wrap_the_optimizer():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = linear("default")
    finally:
        keras.config.set_dtype_policy(policy)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_clipping_acts_before_the_all_reduce(clip):
    def clipped():
        return keras.optimizers.SGD(1.0, **{clip: 1.0})

    # The gradient is 2, clipped to 1. Each replica has a gradient of 1, which is not clipped.
    weights = [weight_after(linear(s, clipped), column(1, 1, 1, 1)) for s in ONE_AND_TWO]
    assert weights == [0.0, -1.0]


def test_built_in_accumulation_shows_micro_steps_to_the_schedule():
    def accumulating():
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([10], [1.0, 0.0])
        return keras.optimizers.SGD(schedule, gradient_accumulation_steps=4)

    model = linear("default", accumulating)
    weight_after(model, np.zeros((16, 1)), batch_size=1)
    assert int(model.optimizer.iterations) == 4
    assert float(model.optimizer.learning_rate) == 0.0


def test_a_frozen_weight_hands_its_moving_average_to_the_next_weight():
    # In a process of its own, since tfbig replaces the function in any model.
    status, output = run("""
import keras
def first():
    return keras.layers.Dense(1, use_bias=False, kernel_initializer=lambda *_, **__: [[3.0]])
for name in ("default", "mirrored_2"):
    model = linear(name, lambda: keras.optimizers.SGD(0.0, use_ema=True), layers=[first])
    x = np.ones((4, 1), "float32")
    assert weight_after(model, x) == 1.0
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse")
    print(weight_after(model, x))
""")
    assert (status, output.split()[-2:]) == (0, ["3.0", "3.0"]), output


def test_schedule_free_adamw_forgets_the_weights():
    def schedule_free():
        return keras.optimizers.ScheduleFreeAdamW(1e-3)

    # `fit` builds the optimizer where assignments have no effect, such as that to its copies.
    model = linear("default", schedule_free)
    assert weight_after(model, column(1.0)) == pytest.approx(0.0, abs=0.01)
    model = linear("default", schedule_free)
    model.optimizer.build(model.trainable_variables)
    model.set_weights([column(8.0)])
    assert weight_after(model, column(1.0)) == pytest.approx(1.0, abs=0.01)


def test_uneven_last_batch_gives_other_weights_than_one_device():
    x = column(0, 0, 0, 0, 0.5, 0.5, 1)
    # The gradient is (0.5 + 0.5 + 2) / 3; the replicas' means are 0.5 and 2, their halves
    # are added up.
    assert [weight_after(linear(s), x) for s in ONE_AND_TWO] == [0.0, -0.25]


def test_scalar_loss_is_trained_with_the_learning_rate_times_the_replicas():
    def scalar(y, y_pred):
        return tf.reduce_mean((y - y_pred) ** 2)

    x = column(0.5, 0.5, 0.5, 0.5)
    assert [weight_after(linear(s, loss=scalar), x) for s in ONE_AND_TWO] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("samples", "dtype", "message"),
    [
        (3, "float32", "must have the same size and shape"),
        (4, "bool", "bool is not in the list of allowed values"),
    ],
    ids=["uneven", "bool"],
)
def test_fit_reduces_the_first_batch_with_mean(samples, dtype, message):
    def weight(strategy):
        def cast():
            return keras.layers.Lambda(lambda x: tf.cast(x, tf.float32))

        model = linear(strategy, layers=[cast], dtype=dtype)
        return weight_after(model, np.ones((samples, 1), dtype), np.zeros((samples, 1)))

    assert weight("default") == -1.0
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        weight("mirrored_2")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("steps_per_execution=2", "must feed a value for placeholder"),
        ("jit_compile=True", "Trying to access resource .* from device"),
    ],
)
def test_compile_option_fails_under_mirrored(option, message):
    code, output = run(f"weight_after(linear({option}), np.ones((8, 1)))")
    assert code == 1
    assert re.search(message, output), output[-2000:]


def moving_means(x):
    model = linear(layers=[lambda: keras.layers.BatchNormalization(momentum=0.0)])
    weight_after(model, x)
    means = model.distribute_strategy.experimental_local_results(model.layers[0].moving_mean.value)
    return [mean.numpy().item() for mean in means]


def test_moving_statistics_differ_between_replicas():
    assert moving_means(column(1, 1, 3, 3)) == [1.0, 3.0]


def test_moving_statistics_of_an_empty_replica_are_nan():
    np.testing.assert_array_equal(moving_means(column(1, 1, 3, 3, 5)), [5.0, np.nan])


def test_synchronized_batch_normalization_fails_in_a_while_loop():
    strategy = make_strategy("mirrored_2")
    with strategy.scope():
        layer = keras.layers.BatchNormalization(synchronized=True)
        layer.build((None, 1))

    def train(x):
        return layer(x, training=True)

    def in_loop(x):
        return tf.while_loop(lambda k, _: k < 2, lambda k, x: (k + 1, train(x)), (0, x))[1]

    def run(function):
        return tf.function(lambda x: strategy.run(function, args=(x,)))(tf.ones((2, 1)))

    run(train)
    with pytest.raises(RuntimeError, match="merge_call"):
        run(in_loop)


def test_the_end_of_a_dataset_of_unknown_size_counts_as_an_update():
    model = linear("default")
    data = tf.data.Dataset.from_tensor_slices((np.zeros((3, 1)), np.zeros((3, 1))))
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(data.filter(lambda *_: True).batch(1), verbose=0, shuffle=False)
    assert int(model.optimizer.iterations) == 4


def test_clone_of_a_sequential_subclass_is_a_plain_sequential():
    class Chain(keras.Sequential):
        pass

    clone = keras.models.clone_model(Chain([keras.Input((1,)), keras.layers.Dense(1)]))
    assert type(clone) is keras.Sequential


def test_the_states_of_seed_generators_are_not_saved(tmp_path):
    model = linear("default", layers=[lambda: keras.layers.Dropout(0.5, seed=3)])
    weight_after(model, column(1, 1, 1, 1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    states = [m.layers[0].seed_generator.state.numpy().tolist() for m in (model, loaded)]
    assert states == [[3, 1], [3, 0]]


def test_losses_of_outputs_ignore_the_batch_size():
    x = keras.Input((1,))
    model = keras.Model(x, [keras.layers.Identity(name=n)(x) for n in "ab"])
    model.compile(loss=["mse", "mse"])
    x = column(1, 1, 1, 0)
    logs = model.evaluate(x, [0 * x, 0 * x], batch_size=3, verbose=0, return_dict=True)
    # Batches of 3 samples with loss 1 and of 1 sample with loss 0.
    assert logs == {"loss": 2 * 0.75, "a_loss": 0.5, "b_loss": 0.5}


def test_evaluate_of_a_summed_loss_differs_from_one_device():
    x = column(1, 1, 1, 1, 1, 1, 2)
    losses = [
        linear(s, loss=keras.losses.MeanSquaredError("sum")).evaluate(
            x, 0 * x, batch_size=4, verbose=0
        )
        for s in ONE_AND_TWO
    ]
    # Sums of 4 and 6, weighted by 4 and 3 samples; under Mirrored, the second batch counts
    # twice the sum of each replica: 4 for 2 samples, 8 for 1. Keras adds up in float32.
    assert losses == pytest.approx([34 / 7, 32 / 7], rel=1e-6)


def test_evaluate_of_a_masked_loss_differs_from_one_device():
    x = column(1, 1, 1, 0, 3, 0, 0, 0).reshape(4, 2, 1)
    losses = [
        linear(s, layers=[keras.layers.Masking], shape=(2, 1)).evaluate(x, 0 * x, verbose=0)
        for s in ONE_AND_TWO
    ]
    # The valid values are 1, 1, 1 on the first half and 3 on the second.
    assert losses == [3.0, 5.0]


def test_train_on_batch_gives_the_whole_batch_to_each_replica():
    x = column(0.5, 0.5)
    models = [linear(s, loss=keras.losses.MeanSquaredError("sum")) for s in ONE_AND_TWO]
    losses = [model.train_on_batch(x, 0 * x) for model in models]
    assert losses == [0.5, 1.0]
    assert [model.get_weights()[0].item() for model in models] == [0.0, -1.0]


def test_a_seeded_fit_shuffles_every_epoch_in_the_same_order():
    keras.utils.set_random_seed(3)
    model = linear("default", run_eagerly=True)
    train_step, seen = model.train_step, []

    def record(data):
        seen.append(data[0].numpy().ravel().tolist())
        return train_step(data)

    model.train_step = record
    x = column(*range(12))
    model.fit(x, x, batch_size=12, epochs=3, verbose=0)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] != sorted(seen[0])


class Stop(keras.callbacks.Callback):
    """Interrupts training after a number of updates."""

    def __init__(self, updates):
        super().__init__()
        self.updates = updates

    def on_train_batch_end(self, batch, logs=None):
        self.updates -= 1
        if self.updates == 0:
            raise KeyboardInterrupt


def test_backup_and_restore_replays_the_epoch(tmp_path):
    def fit(*callbacks):
        model = linear("default")
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=1)
        x = column(*range(4))
        model.fit(
            x, x, batch_size=1, epochs=2, shuffle=False, verbose=0, callbacks=[backup, *callbacks]
        )
        return model.optimizer.iterations.numpy()

    with pytest.raises(KeyboardInterrupt):
        fit(Stop(7))
    # 7 of 8 updates were made; the 4 of the second epoch are repeated.
    assert fit() == 11


def test_several_workers_cannot_fit_and_ignore_sigterm(tmp_path):
    cases = ("fit_builds", "fit_logs", "sigterm")
    assert job.run("plain_keras", tmp_path, *cases, timeout=60).returncode == 0
    for result in job.results(tmp_path):
        assert "Attempt to convert a value (PerReplica" in result["fit_builds"]
        # Keras #20585.
        assert "Invalid reduction dimension 0 for input with 0 dimensions" in result["fit_logs"]
        assert result["sigterm"] == "done"


def test_loss_scale_optimizer_of_one_worker_skips_while_the_other_waits(tmp_path):
    # It waits until the worker that skipped ends: in real training, forever.
    assert job.run("plain_keras", tmp_path, "scaled", timeout=60).returncode == 0
    waiting, skipping = (result["scaled"] for result in job.results(tmp_path))
    assert skipping == "done"
    assert "UnavailableError" in waiting
    assert "CollectiveReduce" in waiting


def seconds_of_the_ends_of_iterators():
    """How long letting go of each of a few iterators takes."""
    iterators = [iter(tf.data.Dataset.range(2)) for _ in range(5)]
    for iterator in iterators:
        next(iterator)
    del iterator
    # The threads that tune them then sleep until 630 ms after the beginning.
    time.sleep(0.4)
    while iterators:
        begin = time.perf_counter()
        iterators.pop()
        yield time.perf_counter() - begin


def test_the_end_of_an_iterator_waits_for_a_sleeping_thread():
    # A race, which two of three ends lose on an idle machine, and one of twenty on a busy one.
    assert any(s > 0.1 for _ in range(40) for s in seconds_of_the_ends_of_iterators())


def test_a_part_of_a_batch_is_the_memory_of_an_array():
    memory = np.ones(64 + 16, "float32")
    begin = -memory.ctypes.data % 64 // 4
    array = memory[begin : begin + 64].reshape(4, 16)

    @tf.function
    def add_to_the_second_half():
        batch = tf.numpy_function(lambda: array, [], tf.float32)
        return tf.ensure_shape(batch, (4, 16))[2:] + 1

    add_to_the_second_half()
    assert array.tolist() == [[1] * 16] * 2 + [[2] * 16] * 2


def test_a_custom_gradient_keeps_its_graph():
    @tf.custom_gradient
    def squared(x):
        return x**2, lambda upstream: 2 * x * upstream

    graph = tf.Graph()
    with graph.as_default():
        squared(tf.constant(1.0))
    left = weakref.ref(graph)
    del graph
    gc.collect()
    assert left() is not None
