"""Classes, `extend`, and what is saved: a tfbig model is its plain twin and loses nothing."""

import copy
import importlib.resources
import inspect
import os
import pickle
import re
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import errors

# Float64 sums in another order differ by some 1e-16 of values near 1.
TOLERANCE = 1e-10

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(14, 4)), RNG.normal(size=(14, 2))

OPTIONS = {"gradient_accumulation_steps": 3, "log_grad_norm": True, "loss_scale": 64.0}
on_strategies = pytest.mark.parametrize("name", ["default", "mirrored_2"])


def dense(units, seed, **kwargs):
    return keras.layers.Dense(
        units, kernel_initializer=keras.initializers.GlorotUniform(seed), **kwargs
    )


def functional(cls, **options):
    x = keras.Input((4,))
    return cls(x, dense(2, 2)(dense(5, 1, activation="tanh")(x)), **options)


def sequential(cls, **options):
    return cls([keras.Input((4,)), dense(5, 1, activation="tanh"), dense(2, 2)], **options)


def unbuilt_sequential(cls, **options):
    return cls([dense(5, 1, activation="tanh"), dense(2, 2)], **options)


def net(base):
    class Net(base):
        def __init__(self, units=5, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.hidden, self.out = dense(units, 1, activation="tanh"), dense(2, 2)

        def call(self, x):
            return self.out(self.hidden(x))

        def get_config(self):
            return super().get_config() | {"units": self.units}

    return Net


@keras.saving.register_keras_serializable("tests")
class PlainNet(net(keras.Model)):
    """A user's model with a `get_config` of its own."""


@keras.saving.register_keras_serializable("tests")
class BigNet(net(tfbig.Model)):
    pass


@keras.saving.register_keras_serializable("tests")
class NetOfDefaultConfig(keras.Model):
    """Keras makes up its config from the defaults of the constructor."""

    def __init__(self, units=5, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.out = dense(units, 1, activation="tanh"), dense(2, 2)

    def call(self, x):
        return self.out(self.hidden(x))


@keras.saving.register_keras_serializable("tests")
class BigNetOfDefaultConfig(tfbig.Model):
    def __init__(self, units=5, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.out = dense(units, 1, activation="tanh"), dense(2, 2)

    def call(self, x):
        return self.out(self.hidden(x))


@keras.saving.register_keras_serializable("tests")
class AccumulatingSequential(tfbig.GradientAccumulationMixin, keras.Sequential):
    pass


@keras.saving.register_keras_serializable("tests")
class ScalingSequential(tfbig.DynamicLossScalingMixin, keras.Sequential):
    pass


@keras.saving.register_keras_serializable("tests")
class AccumulatingNet(tfbig.GradientAccumulationMixin, net(keras.Model)):
    pass


@keras.saving.register_keras_serializable("tests")
class ScalingNet(tfbig.DynamicLossScalingMixin, net(keras.Model)):
    pass


@keras.saving.register_keras_serializable("tests")
class AccumulatingModel(tfbig.GradientAccumulationMixin, keras.Model):
    pass


ACCUMULATION = {"micro_batch_size": 2, "log_grad_norm": True}
SCALING = {"loss_scale": 64.0, "log_grad_norm": True}

# Each row: the model, its plain twin.
MODELS = {
    "functional": (lambda: functional(tfbig.Model, **OPTIONS), lambda: functional(keras.Model)),
    "sequential": (
        lambda: sequential(tfbig.Sequential, **OPTIONS),
        lambda: sequential(keras.Sequential),
    ),
    "unbuilt": (
        lambda: unbuilt_sequential(tfbig.Sequential, **OPTIONS),
        lambda: unbuilt_sequential(keras.Sequential),
    ),
    "subclassed": (lambda: BigNet(units=6, **OPTIONS), lambda: PlainNet(units=6)),
    "default_config": (
        lambda: BigNetOfDefaultConfig(**OPTIONS),
        lambda: NetOfDefaultConfig(),
    ),
    "accumulation_sequential": (
        lambda: sequential(AccumulatingSequential, **ACCUMULATION),
        lambda: sequential(keras.Sequential),
    ),
    "scaling_sequential": (
        lambda: sequential(ScalingSequential, **SCALING),
        lambda: sequential(keras.Sequential),
    ),
    "accumulation_subclassed": (
        lambda: AccumulatingNet(units=6, **ACCUMULATION),
        lambda: PlainNet(units=6),
    ),
    "scaling_subclassed": (lambda: ScalingNet(units=6, **SCALING), lambda: PlainNet(units=6)),
    "mixin_functional": (
        lambda: functional(AccumulatingModel, **ACCUMULATION),
        lambda: functional(keras.Model),
    ),
    "extended_functional": (
        lambda: tfbig.extend(functional(keras.Model), **OPTIONS),
        lambda: functional(keras.Model),
    ),
    "extended_sequential": (
        lambda: tfbig.extend(sequential(keras.Sequential), **OPTIONS),
        lambda: sequential(keras.Sequential),
    ),
    "extended_unbuilt": (
        lambda: tfbig.extend(unbuilt_sequential(keras.Sequential), **OPTIONS),
        lambda: unbuilt_sequential(keras.Sequential),
    ),
    "extended_subclassed": (
        lambda: tfbig.extend(PlainNet(units=6), **OPTIONS),
        lambda: PlainNet(units=6),
    ),
    "extended_default_config": (
        lambda: tfbig.extend(NetOfDefaultConfig(), **OPTIONS),
        lambda: NetOfDefaultConfig(),
    ),
    "extended_class": (
        lambda: tfbig.extend(PlainNet)(units=6, **OPTIONS),
        lambda: PlainNet(units=6),
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def compiled(model):
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    return model


def fit(model, **kwargs):
    # 14 samples in batches of 5: neither divides by 2 or 3, and 4 remain.
    return model.fit(X, Y, **{"batch_size": 5, "verbose": 0, "shuffle": False} | kwargs)


def assert_same(got, want, atol=TOLERANCE):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def options_of(model):
    return {n: getattr(model, n) for n in OPTIONS | ACCUMULATION if hasattr(model, n)}


def state_of(model):
    """All that training goes on from."""
    scale = getattr(model, "loss_scale_state", None)
    scale = [] if scale is None else [getattr(scale, n).numpy() for n in type(scale)._names]
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables), *scale]


# --- The plain twin ----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        # On replicas every third kind; the others are slow.
        pytest.param(kind, name, marks=[pytest.mark.slow] if i % 3 and name != "default" else [])
        for i, kind in enumerate(MODELS)
        for name in ("default", "mirrored_2")
    ],
)
def test_is_the_plain_twin(kind, name, float64):
    make, make_plain = MODELS[kind]
    with make_strategy(name).scope():
        model = compiled(make())
    keras.backend.clear_session()
    plain = compiled(make_plain())
    history, plain_history = fit(model, epochs=2), fit(plain, epochs=2)
    assert_same(model.get_weights(), plain.get_weights())
    for key in ("loss", "mae"):
        assert_same(history.history[key], plain_history.history[key])
    assert len(history.history["grad_norm"]) == 2
    for attribute in ("weights", "trainable_variables", "non_trainable_variables", "layers"):
        own, others = getattr(model, attribute), getattr(plain, attribute)
        assert [v.name for v in own] == [v.name for v in others]
    # `variables` adds the metrics, but not the loss scale.
    assert [v.shape for v in model.variables] == [v.shape for v in plain.variables]
    plain.set_weights(model.get_weights())
    assert_same([model.predict(X, verbose=0)], [plain.predict(X, verbose=0)])
    assert model.count_params() == plain.count_params()


def test_isinstance_and_names():
    for kind, (make, make_plain) in MODELS.items():
        model = make()
        assert isinstance(model, keras.Model), kind
        assert isinstance(model, keras.Sequential) == isinstance(make_plain(), keras.Sequential)
    assert isinstance(functional(tfbig.Model), tfbig.Model)
    assert functional(tfbig.Model, name="net").name == "net"
    # Keras would put Functional among the bases of the class itself.
    assert "Functional" not in [c.__name__ for c in tfbig.Model.__mro__]


# --- Options -----------------------------------------------------------------


@every_model
def test_options_are_attributes_and_in_the_config(kind):
    model = MODELS[kind][0]()
    config = model.get_config()
    for option, value in options_of(model).items():
        assert config[option] == value
    wanted = ACCUMULATION if kind.startswith(("accum", "mixin")) else OPTIONS
    wanted = SCALING if kind.startswith("scaling") else wanted
    assert {n: getattr(model, n) for n in wanted} == wanted


def test_every_option_is_an_argument_of_the_constructor():
    signatures = set()
    for cls in tfbig.Model.__mro__:
        if "tfbig" in cls.__module__ and "__init__" in cls.__dict__:
            signatures |= set(inspect.signature(cls.__init__).parameters)
    names = {
        "attention_chunk_size",
        "exchange_bucket_bytes",
        "exchange_dtype",
        "gradient_accumulation_steps",
        "head_chunk_size",
        "log_grad_norm",
        "log_gradient_noise_scale",
        "loss_scale",
        "memory_budget",
        "micro_batch_size",
        "pipeline",
        "recompute",
        "shard",
    }
    assert signatures - {"self", "args", "kwargs"} == names
    assert names <= set(functional(tfbig.Model).get_config())


@every_model
def test_config_and_clone_keep_options(kind):
    model = MODELS[kind][0]()
    again = type(model).from_config(model.get_config())
    clones = [again]
    if kind in ("unbuilt", "extended_unbuilt") or "functional" in kind or "sequential" in kind:
        clones.append(keras.models.clone_model(model))
    for clone in clones:
        assert options_of(clone) == options_of(model)
        assert type(clone) is type(model)
        clone(X)
        assert not {id(v) for v in clone.weights} & {id(v) for v in model.weights}


def test_settings_survive_the_config():
    settings = tfbig.DynamicLossScale(initial_scale=8.0, growth_interval=7, hysteresis=2)
    model = sequential(tfbig.Sequential, loss_scale=settings)
    again = tfbig.Sequential.from_config(model.get_config())
    assert again.get_config()["loss_scale"] == model.get_config()["loss_scale"]
    again.compile("sgd", "mse")
    assert again.loss_scale_state.settings == settings


class CallCounter(keras.layers.Layer):
    calls = 0

    def call(self, x):
        self.calls += 1
        return x


def test_setting_an_option_rebuilds_the_step():
    counter = CallCounter()
    model = tfbig.Sequential([keras.Input((4,)), counter, dense(2, 1)])
    model.compile("sgd", "mse", run_eagerly=True)

    def calls():
        counter.calls = 0
        model.train_on_batch(X[:12], Y[:12])
        return counter.calls

    model.gradient_accumulation_steps = 2
    calls()
    base = calls() - 2  # Calls that look at the shapes.
    for steps in (3, 6, 2, 12):
        model.gradient_accumulation_steps = steps
        assert (model.gradient_accumulation_steps, model.micro_batch_size) == (steps, None)
        assert calls() == base + steps
    model.micro_batch_size = 3
    assert (model.gradient_accumulation_steps, model.micro_batch_size) == (None, 3)
    assert calls() == base + 4


def test_setting_an_option_rebuilds_a_compiled_step(float64):
    model = sequential(tfbig.Sequential)
    plain = sequential(keras.Sequential)
    for m in (model, plain):
        m.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model)
    traced = model.train_function
    model.micro_batch_size = 2
    model.loss_scale = 8.0
    model.log_grad_norm = True
    assert model.train_function is not traced
    history = fit(model).history
    assert history["loss_scale"] == [8.0]
    assert "grad_norm" in history
    model.loss_scale = None
    assert "loss_scale" not in fit(model).history
    assert model.loss_scale is None
    fit(plain, epochs=3)
    assert_same(model.get_weights(), plain.get_weights())


on_each_option = pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 4},
        {"micro_batch_size": 2},
        {"micro_batch_size": "auto"},
        {"recompute": True},
        pytest.param({"loss_scale": 8.0}, marks=pytest.mark.slow),
        pytest.param({"log_grad_norm": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "_".join(f"{k}={v}" for k, v in options.items()),
)


@on_each_option
def test_an_option_that_a_callback_sets_holds_from_then_on(float64, options):
    def build():
        model = sequential(tfbig.Sequential, gradient_accumulation_steps=2)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    def set_options(model):
        for name, value in options.items():
            setattr(model, name, value)

    def fit(model, *callbacks, **kwargs):
        # Single samples, fewer than there are micro-batches: those of training count.
        data = {"validation_data": (X[:5], Y[:5]), "validation_batch_size": 1}
        data |= {"shuffle": False, "verbose": 0}
        return model.fit(X, Y, batch_size=8, callbacks=[*callbacks], **data, **kwargs).history

    one, other = build(), build()
    set_once = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: set_options(one) if epoch == 1 else None
    )
    during = fit(one, set_once, epochs=2)
    fit(other)
    set_options(other)
    after = fit(other)
    assert {k: v[-1] for k, v in during.items()} == pytest.approx(
        {k: v[-1] for k, v in after.items()}
    )
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE)


def test_train_on_batch_returns_a_list_as_keras_does():
    options = {"loss_scale": 8.0, "log_grad_norm": True, "log_gradient_noise_scale": True}
    plain, model = sequential(keras.Sequential), sequential(tfbig.Sequential, **OPTIONS | options)
    for m in (plain, model):
        m.compile("sgd", "mse", metrics=["mae"])
    want, got = (m.train_on_batch(X, Y) for m in (plain, model))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    names = {"loss", "mae", "loss_scale", "skipped_updates", "grad_norm", "gradient_noise_scale"}
    assert set(model.train_on_batch(X, Y, return_dict=True)) == names


@pytest.mark.parametrize("size", ["shown", 14], ids=str)
def test_what_auto_found_can_be_kept(size):
    model = sequential(tfbig.Sequential, micro_batch_size="auto")
    model.compile("sgd", "mse")
    model.fit(X, Y, batch_size=14, verbose=0)
    model.micro_batch_size = model.micro_batch_size if size == "shown" else size
    assert model.get_config()["micro_batch_size"] == 14


class Reconstructing(keras.Model):
    """Learns of its input plus 10, whatever the targets are."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense(2, 1)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, x[:, :2] + 10.0, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"own_loss": loss}

    def test_step(self, data):
        return {"own_result": tf.reduce_sum(data[0])}


class Mixed(tfbig.GradientAccumulationMixin, tfbig.DynamicLossScalingMixin, Reconstructing):
    pass


WAYS_TO_EXTEND = {
    "model": lambda **options: tfbig.extend(Reconstructing(), **options),
    "class": lambda **options: tfbig.extend(Reconstructing)(**options),
    "mixins": Mixed,
    "subclass": type("Further", (Mixed,), {}),
}
ways_to_extend = pytest.mark.parametrize("way", WAYS_TO_EXTEND)


@ways_to_extend
def test_steps_of_a_class_that_is_extended_stay_its_own(way):
    plain, model = Reconstructing(), WAYS_TO_EXTEND[way]()
    histories = []
    for m in (plain, model):
        m.compile(keras.optimizers.SGD(0.01), "mse")
        histories.append(m.fit(X, Y, batch_size=7, shuffle=False, verbose=0).history)
    assert list(histories[1]) == ["own_loss"]
    assert histories[1]["own_loss"] == pytest.approx(histories[0]["own_loss"])


@ways_to_extend
@on_each_option
def test_options_that_a_train_step_of_its_own_would_lose(way, options):
    model = WAYS_TO_EXTEND[way](**options)
    model.compile("sgd", "mse")
    ((name, value),) = options.items()
    with pytest.raises(
        errors.UnsupportedModelError, match=f"^Reconstructing has a `train_step`.*{name}={value!r}"
    ):
        model.fit(X, Y, verbose=0)
    # An evaluation takes none of them.
    result = model.evaluate(X[:4], Y[:4], verbose=0, return_dict=True)
    assert result == {"own_result": pytest.approx(X[:4].sum())}


def test_a_train_step_of_its_own_is_of_one_replica():
    with make_strategy("mirrored_2").scope():
        model = tfbig.extend(Reconstructing())
        model.compile("sgd", "mse")
    with pytest.raises(errors.UnsupportedModelError, match=r"no options, 2 replica\(s\)"):
        model.fit(X, Y, verbose=0)


def test_loss_scale_holds_what_holds_now():
    model = sequential(tfbig.Sequential)
    assert (model.loss_scale, model.skipped_updates) == (None, 0)
    for option, scale in {"dynamic": 2.0**15, 4: 4.0, "auto": None, None: None}.items():
        model.loss_scale = option
        assert model.loss_scale == scale
    keras.config.set_dtype_policy("mixed_float16")
    half = sequential(tfbig.Sequential)
    assert half.loss_scale == 2.0**15
    half.compile("sgd", "mse")
    assert not isinstance(half.optimizer, keras.optimizers.LossScaleOptimizer)
    assert half.loss_scale == 2.0**15


# --- Constructors ------------------------------------------------------------


def constructed(base):
    """Classes as users derive them from `base`, by name."""

    class Inherited(base):
        pass

    class OfTwo(base):
        def __init__(self, first=None, second=None, third=None):
            super().__init__()
            self.given = (first, second, third)
            self.out = dense(2, 1)

        def call(self, x):
            return self.out(x)

    class Graph(base):
        def __init__(self, units=2, **kwargs):
            x = keras.Input((4,))
            super().__init__(x, dense(units, 1)(x), **kwargs)
            self.units = units

        def get_config(self):
            return {k: v for k, v in super().get_config().items() if k != "trainable"} | {
                "units": self.units
            }

    class GraphByName(base):
        def __init__(self, units=2, **kwargs):
            x = keras.Input((4,))
            super().__init__(inputs=x, outputs=dense(units, 1)(x), name="graph", **kwargs)

    class HandedOn(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    further = {f"Sub{c.__name__}": type(f"Sub{c.__name__}", (c,), {}) for c in (Inherited, Graph)}
    classes = (Inherited, OfTwo, Graph, GraphByName, HandedOn)
    return {"itself": base} | {c.__name__: c for c in classes} | further


def graph():
    x = keras.Input((4,), name="x")
    return x, dense(2, 1)(x)


CONSTRUCTORS = {
    "nothing": lambda x, y: ((), {}),
    "one": lambda x, y: ((x,), {}),
    "two": lambda x, y: ((x, y), {}),
    "two_numbers": lambda x, y: ((8, 1), {}),
    "two_models": lambda x, y: ((keras.Model(x, y), keras.Model(x, y)), {}),
    "three": lambda x, y: ((x, y, "name"), {}),
    "both_by_name": lambda x, y: ((), {"inputs": x, "outputs": y, "name": "both"}),
    "outputs_by_name": lambda x, y: ((x,), {"outputs": y, "trainable": False}),
    "only_outputs": lambda x, y: ((), {"outputs": y}),
    "only_inputs": lambda x, y: ((), {"inputs": x}),
    "name": lambda x, y: ((), {"name": "own"}),
    "unknown": lambda x, y: ((), {"unknown": 1}),
    "both_and_unknown": lambda x, y: ((x, y), {"unknown": 1}),
}


def outcome(base, name, arguments):
    """What becomes of a constructor: the error, or what kind of model it makes."""
    keras.backend.clear_session()
    args, kwargs = CONSTRUCTORS[arguments](*graph())
    try:
        model = constructed(base)[name](*args, **kwargs)
    except (TypeError, ValueError) as e:
        # Only the class in whose constructor arguments meet has another name.
        return type(e), re.sub(r"\S+__init__", "__init__", str(e)).partition("<")[0]
    made = isinstance(model, type(keras.Model(*graph())))
    return made, model.name.removesuffix("_model"), model.trainable, len(model.layers)


@pytest.mark.parametrize("arguments", CONSTRUCTORS)
@pytest.mark.parametrize("name", constructed(keras.Model))
def test_constructors_take_what_those_of_keras_take(name, arguments):
    bases = [c.__bases__ for c in tfbig.Model.__mro__]
    # Keras changes the bases of its own subclasses, so each is made anew.
    got, want = (outcome(base, name, arguments) for base in (tfbig.Model, keras.Model))
    if "unknown" in arguments and want[0] is True:
        # Keras ignores it, as it would a misspelled option.
        assert got[0] is errors.InvalidOptionError
        assert "Unknown options" in got[1]
    else:
        assert got == want
    assert [c.__bases__ for c in tfbig.Model.__mro__] == bases


class Handed:
    """A class beside a model's that has arguments of its own."""

    def __init__(self, *args, own=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = own


class WithHanded(tfbig.GradientAccumulationMixin, Handed, keras.Model):
    pass


def test_options_of_the_other_mixin_are_refused():
    with pytest.raises(errors.InvalidOptionError, match=r"Unknown options .*\['loss_scale'\]"):
        AccumulatingModel(*graph(), loss_scale="dynamic")


def test_classes_in_between_may_take_arguments_of_their_own():
    assert WithHanded(*graph(), own=3, micro_batch_size=2).own == 3


@keras.saving.register_keras_serializable("tests")
class Graph(constructed(tfbig.Model)["Graph"]):
    """Made of inputs and outputs in its own constructor."""


@keras.saving.register_keras_serializable("tests")
class TwoNumbers(tfbig.Model):
    def __init__(self, hidden, units, **options):
        super().__init__(**options)
        self.sizes = (hidden, units)
        self.hidden, self.out = dense(hidden, 1, activation="tanh"), dense(units, 2)

    def call(self, x):
        return self.out(self.hidden(x))

    def get_config(self):
        return super().get_config() | dict(zip(("hidden", "units"), self.sizes, strict=True))


@keras.saving.register_keras_serializable("tests")
class Inherited(tfbig.Model):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: Graph(2, **options),
        lambda **options: TwoNumbers(8, 2, **options),
        lambda **options: Inherited(*graph(), **options),
    ],
    ids=["graph", "two_numbers", "inherited"],
)
def test_models_of_every_constructor_train_and_are_saved(make, tmp_path, float64):
    keras.utils.set_random_seed(1)
    split, whole = compiled(make(micro_batch_size=2)), compiled(make())
    assert split.micro_batch_size == 2
    for model in (split, whole):
        fit(model)
    assert_same(split.get_weights(), whole.get_weights())
    split.save(tmp_path / "model.keras")
    copies = [keras.saving.load_model(tmp_path / "model.keras")]
    copies.append(type(split).from_config(split.get_config()))
    if split.built and not isinstance(split, TwoNumbers):
        copies.append(keras.models.clone_model(split))
    for copy_ in copies:
        assert type(copy_) is type(split)
        assert copy_.micro_batch_size == 2
    fit(split)
    fit(copies[0])
    assert_same(copies[0].get_weights(), split.get_weights())


# --- extend ------------------------------------------------------------------


def test_extend_shares_everything_and_leaves_the_original():
    for make in (functional, sequential, unbuilt_sequential):
        plain = make(keras.Model if make is functional else keras.Sequential)
        plain.compile("sgd", "mse")
        before, cls = dict(plain.__dict__), type(plain)
        model = tfbig.extend(plain, **OPTIONS)
        assert type(plain) is cls
        assert set(plain.__dict__) == set(before)
        assert not hasattr(plain, "gradient_accumulation_steps")
        assert all(a is b for a, b in zip(model.layers, plain.layers, strict=True))
        assert all(a is b for a, b in zip(model.weights, plain.weights, strict=True))
        assert model.optimizer is plain.optimizer
        # The original still trains by itself, and not by tfbig's step.
        fit(plain)
        assert plain.optimizer.iterations.numpy() == 3
        assert "grad_norm" in fit(model).history


def test_extend_of_a_class():
    extended = tfbig.extend(PlainNet)
    assert issubclass(extended, PlainNet)
    assert tfbig.extend(PlainNet) is extended
    assert tfbig.extend(extended) is extended
    assert tfbig.extend(keras.Model) is tfbig.Model
    assert tfbig.extend(keras.Sequential) is tfbig.Sequential
    assert extended(units=3, micro_batch_size=4).micro_batch_size == 4
    assert extended(units=3).units == 3


def test_extend_of_an_extended_model_changes_options():
    model = tfbig.extend(sequential(keras.Sequential), micro_batch_size=2)
    again = tfbig.extend(model, micro_batch_size=3)
    assert (again.micro_batch_size, model.micro_batch_size) == (3, 2)


@in_turn(
    {
        "make": {
            "functional": functional,
            "sequential": sequential,
            "subclassed": lambda cls: PlainNet(),
        },
        "name": ["mirrored_2", "default"],
    }
)
def test_extend_of_a_trained_model_continues_it(name, make, float64):
    def trained(name):
        keras.backend.clear_session()
        with make_strategy(name).scope():
            return compiled(make(keras.Sequential if make is sequential else keras.Model))

    plain = trained("default")
    fit(plain)
    # Plain Keras cannot train it under Mirrored, so its state is carried over.
    state = [v.numpy() for v in plain.optimizer.variables]
    origin = trained(name)
    with make_strategy(name).scope():
        origin(X)
        origin.set_weights(plain.get_weights())
        origin.optimizer.build(origin.trainable_variables)
        for variable, value in zip(origin.optimizer.variables, state, strict=True):
            variable.assign(value)
        model = tfbig.extend(origin, **OPTIONS)
    assert model.optimizer.iterations.numpy() == 3
    history, plain_history = fit(model, epochs=2), fit(plain, epochs=2)
    assert_same(model.get_weights(), plain.get_weights())
    assert_same([v.numpy() for v in model.optimizer.variables][:2], [9, 0.02])
    assert_same(
        [v.numpy() for v in model.optimizer.variables],
        [v.numpy() for v in plain.optimizer.variables],
    )
    assert_same(history.history["mae"], plain_history.history["mae"])


def test_extend_takes_off_a_loss_scale_optimizer():
    keras.config.set_dtype_policy("mixed_float16")
    plain = compiled(sequential(keras.Sequential))
    fit(plain)
    wrapper = plain.optimizer
    assert isinstance(wrapper, keras.optimizers.LossScaleOptimizer)
    model = tfbig.extend(plain, gradient_accumulation_steps=2)
    assert model.optimizer is wrapper.inner_optimizer
    assert plain.optimizer is wrapper
    settings = model.loss_scale_state.settings
    assert settings.initial_scale == wrapper.initial_scale
    assert settings.growth_interval == wrapper.dynamic_growth_steps
    before = int(plain.optimizer.inner_optimizer.iterations.numpy())
    fit(model)
    assert model.optimizer.iterations.numpy() == before + 3 - model.skipped_updates
    assert tfbig.extend(plain, loss_scale=4.0).loss_scale == 4.0


def test_extend_takes_a_scale_over_that_is_larger_than_ours():
    plain = sequential(keras.Sequential)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=2.0**30)
    plain.compile(optimizer, "mse")
    model = tfbig.extend(plain)
    assert model.loss_scale == model.loss_scale_state.settings.max_scale == 2.0**30


def test_extend_keeps_the_scale_that_was_reached():
    keras.config.set_dtype_policy("mixed_float16")
    plain = compiled(sequential(keras.Sequential))
    fit(plain)
    plain.optimizer.dynamic_scale.assign(256.0)
    model = tfbig.extend(plain, gradient_accumulation_steps=2)
    assert model.loss_scale == 256.0


def test_extend_keeps_compile_settings():
    plain = sequential(keras.Sequential)
    plain.compile(
        "sgd",
        keras.losses.MeanAbsoluteError(),
        metrics=["mse"],
        weighted_metrics=["mae"],
        steps_per_execution=2,
        jit_compile=False,
        run_eagerly=False,
    )
    model = tfbig.extend(plain)
    assert isinstance(model.loss, keras.losses.MeanAbsoluteError)
    assert model.steps_per_execution == 2
    assert model.jit_compile is False
    assert list(fit(model).history) == ["loss", "mae", "mse"]
    assert tfbig.extend(sequential(keras.Sequential)).compiled is False


class Adversarial(keras.Model):
    """Two networks with an optimizer each, and no `call`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            keras.Sequential([keras.Input((4,)), dense(2, seed)]) for seed in (1, 2)
        )

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer


class OwnDefaults(keras.Sequential):
    def compile(self, optimizer="auto", loss="auto", **kwargs):
        optimizer = keras.optimizers.Adam(0.02) if optimizer == "auto" else optimizer
        self.heard = kwargs
        super().compile(optimizer, "mae" if loss == "auto" else loss, **kwargs)


def test_extended_classes_keep_the_signature_of_compile():
    for cls in (keras.Model, keras.Sequential, Adversarial, OwnDefaults, PlainNet):
        extended = tfbig.extend(cls)
        assert inspect.signature(extended.compile) == inspect.signature(cls.compile)


@in_turn({"arguments": [(), ("auto",), ("sgd", "mse")], "name": ["default", "mirrored_2"]})
def test_extended_classes_keep_the_defaults_of_compile(name, arguments, tmp_path, float64):
    plain = sequential(OwnDefaults)
    plain.compile(*arguments, metrics=["mse"])
    with make_strategy(name).scope():
        model = tfbig.extend(sequential(OwnDefaults), gradient_accumulation_steps=3)
        model.compile(*arguments, metrics=["mse"])
        # The settings of the model, not the defaults of its class.
        again = tfbig.extend(model)
    assert model.heard == {"metrics": ["mse"]}
    for m in (model, again):
        assert type(m.optimizer) is type(plain.optimizer)
        assert m.optimizer.learning_rate == plain.optimizer.learning_rate
        assert m.loss == plain.loss
    fit(plain, epochs=2)
    fit(model, epochs=1)
    fit(again, epochs=1)
    assert_same(again.get_weights(), plain.get_weights())


def test_compile_takes_the_arguments_of_the_class():
    optimizers = keras.optimizers.Adam(0.5), keras.optimizers.SGD(0.25)
    model = tfbig.extend(Adversarial)()
    model.compile(*optimizers)
    assert (model.d_optimizer, model.g_optimizer) == optimizers
    plain = Adversarial()
    plain.compile(*optimizers)
    again = tfbig.extend(plain)
    assert again.compiled
    assert (again.d_optimizer, again.g_optimizer) == optimizers
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'g_optimizer'"):
        model.compile(optimizers[0])


def test_compile_of_other_models_is_as_it_was():
    keras.config.set_dtype_policy("mixed_float16")
    plain = sequential(keras.Sequential)
    plain.compile(keras.optimizers.SGD(gradient_accumulation_steps=2))
    assert isinstance(plain.optimizer, keras.optimizers.LossScaleOptimizer)


def test_options_hold_where_a_constructor_compiles():
    class Ready(keras.Sequential):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.compile("sgd", "mse")

    options = {"loss_scale": 8.0, "log_gradient_noise_scale": True, "micro_batch_size": 2}
    model = sequential(tfbig.extend(Ready), **options)
    history = fit(model).history
    assert history["loss_scale"] == [8.0]
    assert "gradient_noise_scale" in history


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_clones_are_compiled_as_keras_compiles_them(policy):
    keras.config.set_dtype_policy(policy)
    for make in (functional, sequential):
        model = make(tfbig.Model if make is functional else tfbig.Sequential, micro_batch_size=2)
        clone = keras.models.clone_model(compiled(model))
        assert type(clone.optimizer) is keras.optimizers.Adam
        assert clone.optimizer is not model.optimizer
        assert clone.loss_scale == model.loss_scale
        fit(clone)


# --- Saving ------------------------------------------------------------------


@every_model
def test_saved_model_continues_like_the_uninterrupted(kind, tmp_path, float64):
    model = compiled(MODELS[kind][0]())
    fit(model)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded) is type(model)
    assert options_of(loaded) == options_of(model)
    assert_same(state_of(loaded), state_of(model), atol=0)
    histories = [fit(m, epochs=2).history for m in (model, loaded)]
    assert_same(state_of(loaded), state_of(model), atol=0)
    assert list(histories[0]) == list(histories[1])


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
@pytest.mark.parametrize(
    "kind", ["functional", "sequential", "mixin_functional", "extended_sequential", "in_another"]
)
def test_hdf5_files_keep_class_and_options(kind, tmp_path, float64):
    if kind == "in_another":
        x = keras.Input((4,))
        inner = sequential(tfbig.Sequential, gradient_accumulation_steps=2)
        model = compiled(tfbig.Model(x, dense(2, 3)(inner(x)), **OPTIONS))
    else:
        model = compiled(MODELS[kind][0]())
    model.save(tmp_path / "model.h5")
    # Keras itself builds the optimizer of no weights, and does not train on.
    loaded = keras.models.load_model(tmp_path / "model.h5", compile=False)
    assert type(loaded) is type(model)
    assert options_of(loaded) == options_of(model)
    compiled(loaded)
    fit(model)
    fit(loaded)
    assert_same(state_of(loaded), state_of(model), atol=0)


@on_strategies
@pytest.mark.parametrize("is_built", [False, True])
def test_schedule_free_adamw_begins_at_the_weights(is_built, name, float64):
    def made(cls, **options):
        model = sequential(cls, **options)
        model.compile(keras.optimizers.ScheduleFreeAdamW(0.02), "mse", metrics=["mae"])
        return model

    with make_strategy(name).scope():
        model = made(tfbig.Sequential, **OPTIONS)
        if is_built:
            # As `load_model` does before it loads weights.
            model.optimizer.build(model.trainable_variables)
    plain = made(keras.Sequential)
    for m in (model, plain):
        m.set_weights([np.full(w.shape, 0.3) for w in m.get_weights()])
    plain.optimizer.build(plain.trainable_variables)
    for m in (model, plain):
        fit(m)
        fit(m)
    assert_same(model.get_weights(), plain.get_weights())


@on_strategies
def test_saved_loss_scale_moves_on(name, tmp_path):
    settings = tfbig.DynamicLossScale(initial_scale=8.0, growth_interval=2)
    with make_strategy(name).scope():
        model = compiled(sequential(tfbig.Sequential, loss_scale=settings, micro_batch_size=2))
    fit(model)  # Three updates: grown once, and one more finite update.
    model.train_on_batch(np.full((4, 4), np.inf), Y[:4])
    assert (model.loss_scale, model.skipped_updates) == (8.0, 1)
    fit(model, epochs=3)
    assert model.loss_scale == 8.0 * 2**4
    path = tmp_path / "model.keras"
    model.save(path)
    model.save_weights(tmp_path / "m.weights.h5")
    with make_strategy(name).scope():
        loaded = keras.saving.load_model(path)
        other = compiled(sequential(tfbig.Sequential, loss_scale=settings, micro_batch_size=2))
        other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "m.weights.h5")
    assert (loaded.loss_scale, loaded.skipped_updates) == (128.0, 1)
    fit(model)
    for m in (loaded, other):
        fit(m)
        assert_same(state_of(m), state_of(model), atol=0)


@pytest.mark.parametrize("kind", ["functional", "subclassed", "extended_sequential"])
def test_weights_files_are_exchanged_with_the_twin(kind, tmp_path):
    make, make_plain = MODELS[kind]
    model, plain = compiled(make()), compiled(make_plain())
    fit(model)
    model.save_weights(tmp_path / "big.weights.h5")
    plain(X)
    plain.optimizer.build(plain.trainable_variables)  # Plain Keras would warn without.
    plain.load_weights(tmp_path / "big.weights.h5")
    assert_same(plain.get_weights(), model.get_weights(), atol=0)
    fit(plain)
    plain.save_weights(tmp_path / "plain.weights.h5")
    scale = model.loss_scale
    model.load_weights(tmp_path / "plain.weights.h5")
    assert_same(model.get_weights(), plain.get_weights(), atol=0)
    assert model.loss_scale == scale
    assert model.optimizer.iterations.numpy() == 6


@pytest.mark.parametrize("kind", ["functional", "subclassed", "extended_subclassed"])
def test_checkpoint_holds_all(kind, tmp_path):
    def make():
        model = MODELS[kind][0]()
        model.loss_scale = tfbig.DynamicLossScale(initial_scale=8.0, growth_interval=2)
        return compiled(model)

    model, other = make(), make()
    fit(model)
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    other(X)
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other).read(path).assert_existing_objects_matched()
    assert other.loss_scale == 16.0
    assert_same(state_of(other), state_of(model), atol=0)
    for m in (model, other):
        fit(m)
    assert_same(state_of(other), state_of(model), atol=0)


@pytest.mark.parametrize("kind", ["functional", "subclassed", "extended_sequential"])
def test_export(kind, tmp_path):
    model = compiled(MODELS[kind][0]())
    fit(model)
    model.export(str(tmp_path / "saved"), verbose=False)
    artifact = tf.saved_model.load(str(tmp_path / "saved"))
    served = artifact.serve(tf.constant(X, tf.float32))
    # One float32 graph in two sessions: XLA or grouping may round the last bit otherwise.
    np.testing.assert_allclose(served, model.predict(X, verbose=0), rtol=1e-6, atol=1e-6)


@in_turn(
    {
        "kind": ["functional", "sequential", "extended_functional", "extended_subclassed"],
        "duplicate": {"copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))},
    }
)
def test_copies_are_models_of_their_own(kind, duplicate):
    model = compiled(MODELS[kind][0]())
    fit(model)
    other = duplicate(model)
    assert type(other) is type(model)
    assert options_of(other) == options_of(model)
    assert_same(other.get_weights(), model.get_weights(), atol=0)
    fit(other)
    assert abs(other.get_weights()[0] - model.get_weights()[0]).max() > 1e-3


def test_a_class_that_becomes_functional_can_be_pickled():
    model = Graph(units=3, micro_batch_size=2)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)
    assert (other.units, other.micro_batch_size) == (3, 2)
    assert_same(other.get_weights(), model.get_weights(), atol=0)


def run_python(code, *args):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def test_loads_in_a_process_that_only_imports_tfbig(tmp_path):
    settings = tfbig.DynamicLossScale(initial_scale=8.0, growth_interval=2)
    options = {"gradient_accumulation_steps": 3, "loss_scale": settings}
    plain = functional(keras.Model)
    models = [
        functional(tfbig.Model, **options),
        sequential(tfbig.Sequential, **options),
        tfbig.extend(plain, **options),
    ]
    expected = []
    for i, model in enumerate(models):
        fit(compiled(model))
        model.save(tmp_path / f"{i}.keras")
        fit(model)
        expected.append(model.get_weights())
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    done = run_python(
        """
        import sys, pathlib, keras, numpy as np, tfbig
        place = pathlib.Path(sys.argv[1])
        data = np.load(place / "data.npz")
        for i in range(3):
            model = keras.saving.load_model(place / f"{i}.keras")
            print(type(model).__name__, model.gradient_accumulation_steps, model.loss_scale)
            model.fit(data["x"], data["y"], batch_size=5, shuffle=False, verbose=0)
            np.savez(place / f"{i}.npz", *model.get_weights())
        """,
        tmp_path,
    )
    names = [type(m).__name__ for m in models]
    assert done.stdout.splitlines() == [f"{n} 3 16.0" for n in names], done.stderr
    for i, weights in enumerate(expected):
        loaded = np.load(tmp_path / f"{i}.npz")
        # The same float32 operations in the same order.
        assert_same([loaded[f"arr_{k}"] for k in range(len(weights))], weights, atol=1e-7)


@pytest.mark.parametrize("module", ["tfbig", "no_such_module"])
@pytest.mark.parametrize("is_registered", [False, True])
def test_an_unknown_extended_class_is_named(module, is_registered, tmp_path):
    class Local(PlainNet):
        pass

    Local.__module__ = module  # Where there is no such class.
    if is_registered:
        keras.saving.register_keras_serializable("tests")(Local)
    model = tfbig.extend(Local(units=3))
    model(X)
    model.save(tmp_path / "model.keras")
    # As in another process.
    keras.saving.get_custom_objects().pop("tests>Local", None)
    with pytest.raises(errors.InvalidOptionError, match=rf"{module}\.Local\. Import its module"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Local": Local})
    assert_same(loaded.get_weights(), model.get_weights(), atol=0)


# --- The package -------------------------------------------------------------


def test_import_is_light():
    # Keras itself imports matplotlib and scikit-learn where they are installed.
    done = run_python("""
        import sys, tensorflow, keras
        before = set(sys.modules)
        import tfbig
        heavy = {"keras_tuner", "optuna", "sklearn", "matplotlib", "tensorboard", "hyperopt"}
        print(sorted(heavy & {name.partition(".")[0] for name in set(sys.modules) - before}))
        print(sorted((heavy - {"sklearn", "matplotlib"}) & set(sys.modules)))
        """)
    assert done.stdout.split() == ["[]", "[]"], done.stderr


def test_extended_classes_may_have_a_fit_that_hands_on_what_it_does_not_know():
    received = []

    class Pipeline(keras.Sequential):
        def fit(self, x=None, y=None, batch_size=None, **kwargs):
            received.append((batch_size, sorted(kwargs)))
            return super().fit(x, y, batch_size=batch_size, **kwargs)

    model = tfbig.extend(Pipeline)([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    assert model.fit(x, y, 2, epochs=3, verbose=0).epoch == [0, 1, 2]
    assert received[0][0] == 2
    assert {"epochs", "verbose"} <= set(received[0][1])


def test_public_names():
    assert isinstance(tfbig.__all__, tuple)
    assert list(tfbig.__all__) == sorted(tfbig.__all__)
    assert not [n for n in tfbig.__all__ if n.startswith("_")]
    # Public submodules may show; no name of another package may.
    public = {n for n in (*dir(tfbig), "tuners") if not n.startswith("_")}
    modules = {n for n in public if inspect.ismodule(getattr(tfbig, n))}
    assert public - modules == set(tfbig.__all__) - modules
    assert {getattr(tfbig, n).__package__ for n in modules} <= {
        "tfbig",
        *map("tfbig.".__add__, modules),
    }
    assert tfbig.__version__


def test_py_typed_is_shipped():
    assert importlib.resources.files(tfbig).joinpath("py.typed").is_file()
