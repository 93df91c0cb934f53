"""What is exchanged, traced and applied for one update, whatever it is split into."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig._update import accumulators
from tfbig._update.table_rows import Rows
from tfbig.callbacks._spike_state import SpikeSettings, SpikeState


def net(
    strategy,
    layers=(),
    optimizer=lambda: keras.optimizers.SGD(0.1),
    cls=tfbig.Sequential,
    shape=(3,),
    **options,
):
    """A compiled model of `layers` and a dense one."""
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        layers = [layer() for layer in layers]
        model = cls([keras.Input(shape), *layers, keras.layers.Dense(1)], **options)
        model.compile(optimizer(), "mse")
    return model


def samples(count, seed=0, outputs=1):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, 3)), random.normal(size=(count, outputs))


def fit(model, x, y, **kwargs):
    return model.fit(x, y, **{"batch_size": len(x), "shuffle": False, "verbose": 0} | kwargs)


def copies(model, variable):
    results = model.distribute_strategy.experimental_local_results(variable.value)
    return [v.numpy() for v in results]


def traced_update(model, x, y):
    """The graph of one update on all replicas, as `fit` traces it."""
    strategy = model.distribute_strategy
    dataset = tf.data.Dataset.from_tensors((x.astype("float32"), y.astype("float32")))
    dataset = strategy.experimental_distribute_dataset(dataset.unbatch().batch(len(x)))
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def update(data):
        return strategy.run(model.train_step, args=(data,))

    return update.get_concrete_function(next(iter(dataset))).graph


def operations(graph):
    """All operations of a graph, those in functions included, once each: `(function, op)`."""
    found = [("", op) for op in graph.as_graph_def().node]
    for function in graph.as_graph_def().library.function:
        found += [(function.signature.name, op) for op in function.node_def]
    return found


def loop_bodies(graph):
    return {
        op.attr[name].func.name
        for _, op in operations(graph)
        if op.op in ("While", "StatelessWhile")
        for name in ("body", "cond")
    }


@pytest.fixture
def exchanges(monkeypatch):
    """The shapes of all tensors of each `all_reduce` that replica 0 asks for, in order."""
    seen = []
    original = tf.distribute.ReplicaContext.all_reduce

    def all_reduce(self, reduce_op, value, options=None):
        if self._replica_id == 0:
            seen.append([tuple(v.shape) for v in tf.nest.flatten(value)])
        return original(self, reduce_op, value, options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", all_reduce)
    return seen


def collectives(graph):
    """Names of the functions that hold the reductions over replicas, one for each reduction."""
    return [function for function, op in operations(graph) if op.op.startswith("Collective")]


@pytest.mark.parametrize("strategy", ["mirrored_2", "mirrored_4"])
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_one_exchange_per_update(strategy, steps, exchanges):
    replicas = make_strategy(strategy).num_replicas_in_sync
    model = net(
        strategy,
        layers=[keras.layers.BatchNormalization],
        gradient_accumulation_steps=steps,
        loss_scale="dynamic",
    )
    if steps == 4:
        # It looks at the norm of what was exchanged anyway.
        with model.distribute_strategy.scope():
            model.update_guard = SpikeState(SpikeSettings(5.0, 3, True, True, 3, 3, None))
    graph = traced_update(model, *samples(32 * replicas))
    # Gradients of scale, offset, kernel and bias; five scalars; two moving statistics.
    assert [sorted(shapes) for shapes in exchanges] == [
        [(1,), (3,), (3,), (3,), (3,), (3, 1), (5,)]
    ]
    # TensorFlow packs them into one; it stands in the main graph, not in the loop.
    assert collectives(graph) == [""] * replicas
    assert loop_bodies(graph)


@pytest.mark.parametrize("strategy", ["mirrored_2", "mirrored_4"])
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_masks_cost_one_more_exchange_of_scalars(strategy, steps, exchanges):
    replicas = make_strategy(strategy).num_replicas_in_sync
    model = net(
        strategy, layers=[keras.layers.Masking], gradient_accumulation_steps=steps, shape=(5, 3)
    )
    x, y = (np.zeros((32 * replicas, 5, n)) for n in (3, 1))
    graph = traced_update(model, x, y)
    # The samples and the valid values first; then bias, kernel and five scalars.
    assert exchanges == [[(2,)], [(1,), (3, 1), (5,)]]
    assert collectives(graph) == [""] * (2 * replicas)


class Counting(tfbig.Sequential):
    """Counts how often its step is traced."""

    calls = 0

    def train_step(self, data):
        self.calls += 1  # Replicas are traced one at a time.
        return super().train_step(data)

    @property
    def traces(self):
        return self.calls / self.distribute_strategy.num_replicas_in_sync


@pytest.mark.parametrize("strategy", ["default", "mirrored_2", "mirrored_4"])
def test_no_retrace_after_the_first_epoch(strategy):
    model = net(strategy, cls=Counting, gradient_accumulation_steps=3, loss_scale="dynamic")
    traces = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: traces.append(model.traces)
    )
    # Batches of 16, 16 and 5 samples.
    fit(model, *samples(37), batch_size=16, epochs=3, callbacks=[record])
    assert traces[0] <= 2
    assert traces == traces[:1] * 3
    fit(model, *samples(37), batch_size=16)
    assert model.traces == traces[0]
    for name, value in {"gradient_accumulation_steps": 2, "micro_batch_size": 4}.items():
        before = model.traces
        setattr(model, name, value)
        fit(model, *samples(37), batch_size=16)
        assert before < model.traces <= before + 2


@in_turn(
    {
        "strategy": ["default", "mirrored_2", "mirrored_4"],
        "layers": {"plain": (), "state": (keras.layers.BatchNormalization,)},
    }
)
def test_the_graph_does_not_grow_with_the_micro_batches(strategy, layers):
    def size(steps):
        model = net(strategy, layers, gradient_accumulation_steps=steps, loss_scale="dynamic")
        return len(operations(traced_update(model, *samples(256))))

    assert size(2) == size(64) > 100


class Subtract1(keras.optimizers.SGD):
    """Subtracts 1 from each variable, whatever the gradient: the weights count the updates."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, tf.ones_like(variable))


@in_turn(
    {
        "strategy": ["default", "mirrored_2", "mirrored_4"],
        "steps": [1, 4],
        "loss_scale": [None, "dynamic"],
    }
)
def test_the_optimizer_is_applied_once_per_update(strategy, steps, loss_scale):
    model = net(
        strategy,
        optimizer=lambda: Subtract1(0.1),
        gradient_accumulation_steps=steps,
        loss_scale=loss_scale,
    )
    model.set_weights([np.zeros(w.shape) for w in model.weights])
    fit(model, *samples(37), batch_size=16, epochs=2)
    assert model.optimizer.iterations.numpy() == 6
    for variable in model.weights:
        for copy in copies(model, variable):
            np.testing.assert_array_equal(copy, -6.0)


@pytest.mark.parametrize(
    ("dtype", "accumulator"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
@pytest.mark.parametrize("rows", [(), (Rows.KEPT, Rows.SHARED, Rows.DISTINCT)])
def test_accumulators_are_float32_or_wider(dtype, accumulator, rows):
    variable = keras.Variable(np.zeros((2, 3)), dtype=dtype)
    total = accumulators.start(variable, rows)
    for part in total if rows else [{"values": total}]:
        assert part["values"].dtype == accumulator


@in_turn({"strategy": ["default", "mirrored_2", "mirrored_4"], "dtype": ["float16", "bfloat16"]})
def test_a_sum_of_many_small_gradients_does_not_stall(strategy, dtype):
    with make_strategy(strategy).scope():
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype=dtype)
        model = tfbig.Sequential([keras.Input((1,)), dense], micro_batch_size=1, loss_scale=None)
        model.compile(keras.optimizers.SGD(0.5), "mse")
    # Every sample has the gradient 2 (1 - 0.5). Half precision cannot add 1 to 2048.
    count = 4096 * model.distribute_strategy.num_replicas_in_sync
    fit(model, np.ones((count, 1)), np.full((count, 1), 0.5))
    assert dense.kernel.dtype == dtype
    assert dense.kernel.numpy().item() == 0.5


def shares_of(x, replicas, steps):
    """The micro-batches of each replica; none for an empty share."""
    shares = [share for share in np.array_split(x, replicas) if len(share)]
    return [np.array_split(share, min(steps, len(share))) for share in shares]


@pytest.mark.filterwarnings("ignore:.*larger than a replica")
@pytest.mark.usefixtures("float64")
@in_turn(
    {
        "strategy": ["default", "mirrored_2", "mirrored_4"],
        "steps": [1, 3],
        "loss_scale": [None, "dynamic"],
    }
)
def test_moving_statistics_are_the_mean_over_the_replicas_with_samples(strategy, steps, loss_scale):
    model = net(
        strategy,
        layers=[lambda: keras.layers.BatchNormalization(momentum=0.5)],
        gradient_accumulation_steps=steps,
        loss_scale=loss_scale,
    )
    replicas = model.distribute_strategy.num_replicas_in_sync
    x, y = samples(17)
    mean, variance = np.zeros(3), np.ones(3)
    # The last batch has one sample, on replica 0.
    fit(model, x, y, batch_size=8)
    for batch in (x[:8], x[8:16], x[16:]):
        ends = []
        for share in shares_of(batch, replicas, steps):
            statistics = np.stack([mean, variance])
            for micro in share:
                statistics = (statistics + np.stack([micro.mean(0), micro.var(0)])) / 2
            ends.append(statistics)
        mean, variance = np.mean(ends, 0)
    layer = model.layers[0]
    for variable, wanted in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        for copy in copies(model, variable):
            np.testing.assert_allclose(copy, wanted, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*larger than a replica")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("strategy", ["mirrored_2", "mirrored_4"])
def test_all_replicas_hold_the_same_state_after_every_update(strategy, steps):
    model = net(
        strategy,
        layers=[keras.layers.BatchNormalization, lambda: keras.layers.Dropout(0.5, seed=3)],
        optimizer=lambda: keras.optimizers.AdamW(0.1, use_ema=True),
        gradient_accumulation_steps=steps,
        loss_scale="dynamic",
    )
    metrics = {id(v) for v in model.metrics_variables}
    draws = []

    def check(batch, logs):
        state = [v for v in model.variables if id(v) not in metrics]
        for variable in [*state, *model.optimizer.variables]:
            first, *rest = copies(model, variable)
            assert rest
            for other in rest:
                np.testing.assert_array_equal(first, other, err_msg=variable.path)
        draws.append(model.layers[1].seed_generator.state.numpy()[1])

    # Batches of 8, 8 and 1 samples.
    record = keras.callbacks.LambdaCallback(on_train_batch_end=check)
    fit(model, *samples(17), batch_size=8, callbacks=[record])
    # Every micro-batch of the first replica draws once.
    micro_batches = min(steps, 8 // model.distribute_strategy.num_replicas_in_sync)
    assert draws == [micro_batches, 2 * micro_batches, 2 * micro_batches + 1]


@pytest.mark.filterwarnings("ignore:.*larger than a replica")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("strategy", ["mirrored_2", "mirrored_4"])
def test_an_empty_replica_contributes_nothing(strategy):
    x, y = samples(1)
    one, many = (
        net(s, optimizer=lambda: keras.optimizers.Adam(0.1), gradient_accumulation_steps=2)
        for s in ("default", strategy)
    )
    logs = [fit(model, x, y, epochs=3).history["loss"] for model in (one, many)]
    np.testing.assert_allclose(logs[0], logs[1], rtol=0, atol=1e-10)
    for a, b in zip(one.get_weights(), many.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


class Gan(tfbig.DynamicLossScalingMixin, keras.Model):
    """Two networks, two optimizers and a `train_step` of its own."""

    def __init__(self, steps, **options):
        super().__init__(**options)
        self.steps = steps
        self.generator = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        self.discriminator = keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
        )
        self.generator_optimizer = keras.optimizers.Adam(0.1)
        self.generator_optimizer.build(self.generator.trainable_variables)
        self.bce = keras.losses.BinaryCrossentropy(from_logits=True)

    def call(self, noise):
        return self.discriminator(self.generator(noise))

    def train_step(self, data):
        def judged(samples, label):
            scores = self.discriminator(samples)
            return self.bce(tf.fill(tf.shape(scores), tf.cast(label, scores.dtype)), scores)

        def discriminator_loss(batch):
            noise, real = batch
            loss = judged(real, 1) + judged(self.generator(noise), 0)
            return loss, {"twice": 2 * loss}

        def generator_loss(batch):
            return judged(self.generator(batch[0]), 1)

        scale = self.loss_scale_state
        logs = {}
        for name, loss, network, optimizer in (
            ("d", discriminator_loss, self.discriminator, self.optimizer),
            ("g", generator_loss, self.generator, self.generator_optimizer),
        ):
            share = tfbig.accumulate_gradients(
                loss,
                network.trainable_variables,
                data,
                gradient_accumulation_steps=self.steps,
                loss_scale=scale,
            )
            update = tfbig.apply_gradients(optimizer, share, loss_scale=scale)
            logs |= {name: update.loss} | update.values
        return logs


def gan(strategy, steps, **options):
    keras.utils.set_random_seed(1)
    with make_strategy(strategy).scope():
        model = Gan(steps, **options)
        model.compile(keras.optimizers.Adam(0.1))
        model.optimizer.build(model.discriminator.trainable_variables)
    return model


@pytest.mark.filterwarnings("ignore:.*larger than a replica")
@pytest.mark.usefixtures("float64")
@in_turn(
    {
        "strategy": ["default", "mirrored_2", "mirrored_4"],
        "steps": [1, 4],
        "loss_scale": [None, "dynamic"],
    }
)
def test_two_optimizers_in_a_train_step_of_the_user(strategy, steps, loss_scale):
    noise, real = samples(21, outputs=2)
    reference = gan("default", 1, loss_scale=None)
    start = reference.get_weights()
    wanted = fit(reference, noise, real, batch_size=8, epochs=2).history
    model = gan(strategy, steps, loss_scale=loss_scale)
    history = fit(model, noise, real, batch_size=8, epochs=2).history
    assert all(not np.array_equal(a, b) for a, b in zip(start, model.get_weights(), strict=True))
    for a, b in zip(reference.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10)
    for optimizer in (model.optimizer, model.generator_optimizer):
        assert optimizer.iterations.numpy() == 6
    # Logs of several replicas are float32.
    for name in ("d", "g", "twice"):
        np.testing.assert_allclose(history[name], wanted[name], rtol=1e-6)

    if loss_scale is not None:
        before = model.get_weights()
        noise[-1] = np.nan
        fit(model, noise, real)
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert model.skipped_updates == 2
        assert model.loss_scale == 2.0**13
