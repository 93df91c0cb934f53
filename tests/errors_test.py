"""Bad input gets a clear error before any training: the rule, the value, the remedy."""

import contextlib
import logging
import os
import re
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.combinations import in_turn
from tests.conftest import make_strategy
from tfbig import errors

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 4)), RNG.normal(size=(12, 2))

on_strategies = pytest.mark.parametrize("name", ["default", "mirrored_2"])
on_splits = pytest.mark.parametrize("steps", [1, 3])


@contextlib.contextmanager
def refused(error, builtin, *parts):
    """Asserts an error of tfbig that is also a built-in, with all parts in its message."""
    with pytest.raises(error) as info:
        yield
    assert isinstance(info.value, errors.TfbigError)
    assert isinstance(info.value, builtin)
    for part in parts:
        assert part in str(info.value)


@contextlib.contextmanager
def untrained(model):
    """Asserts that nothing within it changes weights or counts an update."""
    before = model.get_weights()
    yield
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    if model.optimizer is not None:
        assert model.optimizer.iterations.numpy() == 0


def sequential(cls=tfbig.Sequential, **options):
    return cls([keras.Input((4,)), keras.layers.Dense(2)], **options)


def functional(cls=tfbig.Model, **options):
    x = keras.Input((4,))
    return cls(x, keras.layers.Dense(2)(x), **options)


def fit(model, x=X, y=Y, **kwargs):
    return model.fit(x, y, **{"batch_size": 6, "verbose": 0, "shuffle": False} | kwargs)


class Accumulating(tfbig.GradientAccumulationMixin, keras.Sequential):
    pass


def set_after(**options):
    model = sequential()
    for name, value in options.items():
        setattr(model, name, value)


ENTRANCES = {
    "model": lambda **options: functional(**options),
    "sequential": lambda **options: sequential(**options),
    "mixin": lambda **options: sequential(Accumulating, **options),
    "property": set_after,
    "extend": lambda **options: tfbig.extend(sequential(keras.Sequential), **options),
}
everywhere = pytest.mark.parametrize("enter", ENTRANCES)


# --- Options -----------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "micro_batch_size"])
@pytest.mark.parametrize("value", [0, -1, True, np.True_, 2.0, "3", [2]], ids=repr)
def test_a_split_must_be_a_positive_integer(enter, name, value):
    with refused(
        errors.InvalidOptionError,
        ValueError,
        f"`{name}` must be an integer >= 1",
        f"Received: {name}={value!r}",
        "Use 1" if name == "gradient_accumulation_steps" else "Pass the samples that fit",
    ):
        ENTRANCES[enter](**{name: value})


@pytest.mark.parametrize("option", ["log_grad_norm", "log_gradient_noise_scale"])
def test_what_is_true_or_false_is_no_text(option):
    with refused(errors.InvalidOptionError, ValueError, f"`{option}` must be True", "'no'"):
        sequential(**{option: "no"})
    model = sequential(**{option: np.True_})
    assert getattr(model, option) is True


@pytest.mark.parametrize("value", [0, True, 2.0, "auto"], ids=repr)
@pytest.mark.parametrize("option", ["head_chunk_size", "attention_chunk_size"])
def test_a_chunk_must_be_a_positive_integer(option, value):
    with refused(
        errors.InvalidOptionError,
        ValueError,
        f"`{option}` must be an integer >= 1",
        f"Received: {option}={value!r}",
    ):
        functional(**{option: value})


@pytest.mark.parametrize("value", [np.int64(3), np.int32(3), np.uint8(3)], ids=repr)
def test_numpy_integers_are_integers(value):
    model = functional(gradient_accumulation_steps=value)
    assert type(model.gradient_accumulation_steps) is int
    assert model.get_config()["gradient_accumulation_steps"] == 3
    assert keras.models.clone_model(model).gradient_accumulation_steps == 3


@pytest.mark.parametrize("enter", [e for e in ENTRANCES if e != "property"])
def test_only_one_of_the_splits(enter):
    with refused(
        errors.InvalidOptionError,
        ValueError,
        "Exactly one of `gradient_accumulation_steps` and `micro_batch_size`",
        "gradient_accumulation_steps=2, micro_batch_size=3",
    ):
        ENTRANCES[enter](gradient_accumulation_steps=2, micro_batch_size=3)


@pytest.mark.parametrize("enter", [e for e in ENTRANCES if e != "property"])
def test_auto_is_a_micro_batch_size(enter):
    model = ENTRANCES[enter](micro_batch_size="auto")
    # Not known before there is a batch.
    assert (model.micro_batch_size, model.gradient_accumulation_steps) == (None, None)
    with refused(errors.InvalidOptionError, ValueError, "must be an integer >= 1", "'all'"):
        ENTRANCES[enter](micro_batch_size="all")


def test_auto_is_one_of_the_splits():
    with refused(errors.InvalidOptionError, ValueError, "Exactly one", "'auto'"):
        functional(gradient_accumulation_steps=2, micro_batch_size="auto")


def test_a_refused_option_leaves_the_old_one():
    model = sequential(micro_batch_size=2, loss_scale=8.0)
    for name, value in (("micro_batch_size", 0), ("loss_scale", -1)):
        with pytest.raises(errors.InvalidOptionError):
            setattr(model, name, value)
    assert (model.micro_batch_size, model.loss_scale) == (2, 8.0)


LOSS_SCALES = [0, 0.0, -1, -2.5, np.inf, -np.inf, np.nan, True, False, "foo", "", [8.0], object]


@pytest.mark.parametrize("enter", [e for e in ENTRANCES if e != "mixin"])
@pytest.mark.parametrize("value", LOSS_SCALES, ids=repr)
def test_loss_scale_must_be_valid(enter, value):
    with refused(
        errors.InvalidOptionError,
        ValueError,
        "`loss_scale` must be 'auto', 'dynamic', a finite number > 0, None or",
        f"Received: loss_scale={value!r}",
    ):
        ENTRANCES[enter](loss_scale=value)


@pytest.mark.parametrize("value", [1e39, 2.0**127, 1e-46, 2**-150], ids=repr)
def test_loss_scale_must_fit_into_float32(value):
    # 1e-46 is 0 in float32: every gradient would be, and nothing would be learned.
    with refused(errors.InvalidOptionError, ValueError, "loss_scale", repr(value), "float32"):
        sequential(loss_scale=value)


RANGES = {
    ("growth_interval", "hysteresis", "max_consecutive_skips"): [0, -1, 1.0, True, "1", None],
    ("initial_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"): [
        *(0, -1.0, np.inf, np.nan, True, "1", None)
    ],
    ("growth_factor",): [1.0, 0.5],
    ("backoff_factor",): [1.0, 2.0],
    ("initial_scale",): [0.5, 2.0**25],
    ("max_scale",): [2.0**127],
    ("min_scale",): [1e-46],
}
FIELDS = [(f, v) for fields, values in RANGES.items() for f in fields for v in values]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_dynamic_loss_scale_fields_have_ranges(field, value):
    with refused(
        errors.InvalidOptionError, ValueError, f"`{field}` must be ", f"Received: {field}={value!r}"
    ):
        tfbig.DynamicLossScale(**{field: value})


def test_floor_and_ceiling_must_include_the_initial_scale():
    for bounds in ({"min_scale": 2.0**16}, {"max_scale": 2.0**14}):
        with refused(errors.InvalidOptionError, ValueError, "between min_scale", "32768.0"):
            tfbig.DynamicLossScale(**bounds)
    tfbig.DynamicLossScale(initial_scale=4, min_scale=4, max_scale=4)


def test_dynamic_loss_scale_has_no_other_field():
    with pytest.raises(TypeError, match="initial"):
        tfbig.DynamicLossScale(initial=1.0)


# --- More micro-batches than samples -----------------------------------------


@on_strategies
def test_more_micro_batches_than_samples_warn_once_and_are_exact(name, float64):
    plain = sequential(keras.Sequential)
    start = plain.get_weights()
    plain.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    with make_strategy(name).scope():
        model = sequential(gradient_accumulation_steps=50)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.set_weights(start)
    share = {"default": 6, "mirrored_2": 3}[name]
    with pytest.warns(UserWarning, match="larger than a replica's share") as caught:
        fit(model, epochs=2)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"gradient_accumulation_steps=50 for {share} samples per replica" in text
    assert f"{share} micro-batches of one sample are used" in text
    # Warnings are errors here, so this one must not come a second time.
    fit(model)
    model.evaluate(X, Y, batch_size=6, verbose=0)
    fit(plain, epochs=3)
    for got, want in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert model.gradient_accumulation_steps == 50


def test_a_large_micro_batch_is_no_matter():
    model = sequential(micro_batch_size=50)
    model.compile("sgd", "mse")
    assert np.isfinite(fit(model).history["loss"][0])  # And no warning, which would be an error.


# --- Optimizers and losses ---------------------------------------------------

SGD = keras.optimizers.SGD
OPTIMIZERS = {
    "accumulates": (
        lambda: SGD(gradient_accumulation_steps=4),
        ("`optimizer.gradient_accumulation_steps` must be None", "=4", "to the model instead"),
    ),
    "scales": (
        lambda: SGD(loss_scale_factor=8.0),
        ("`optimizer.loss_scale_factor` must be None", "=8.0", "`loss_scale` to the model"),
    ),
    "wrapped": (
        lambda: keras.optimizers.LossScaleOptimizer(SGD(), initial_scale=64.0),
        ("must not be wrapped in `LossScaleOptimizer`", "initial_scale=64.0", "Pass the inner"),
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_optimizers_that_do_it_themselves(kind, policy):
    keras.config.set_dtype_policy(policy)
    make, parts = OPTIMIZERS[kind]
    model = sequential()
    for given in (make(), keras.optimizers.serialize(make())):
        with refused(errors.InvalidOptionError, ValueError, *parts):
            model.compile(given, "mse")
    assert not model.compiled


@pytest.mark.parametrize("in_map", [True, False], ids=["map", "function"])
def test_one_of_several_optimizers_that_accumulates(in_map):
    one = SGD(gradient_accumulation_steps=4)
    which = keras.optimizers.OptimizerMap(one) if in_map else lambda _: one
    model = sequential()
    with refused(errors.InvalidOptionError, ValueError, "gradient_accumulation_steps=4"):
        model.compile(keras.optimizers.MultiOptimizer(which), "mse")
        # A function is not asked before there are weights.
        fit(model)


def test_extend_refuses_an_accumulating_optimizer():
    plain = sequential(keras.Sequential)
    plain.compile(SGD(gradient_accumulation_steps=4), "mse")
    with refused(errors.InvalidOptionError, ValueError, "gradient_accumulation_steps=4"):
        tfbig.extend(plain)


@pytest.mark.parametrize("reduction", ["none", None])
@pytest.mark.parametrize("nested", [lambda v: v, lambda v: [v], lambda v: {"out": v}])
def test_losses_must_reduce(reduction, nested):
    x = keras.Input((4,))
    model = tfbig.Model(x, {"out": keras.layers.Dense(2)(x)})
    loss = nested(keras.losses.MeanSquaredError(reduction=reduction))
    with refused(
        errors.InvalidOptionError,
        ValueError,
        "must reduce to a scalar",
        f"MeanSquaredError(reduction={loss_reduction(loss)!r})",
        "Use reduction='sum_over_batch_size'",
    ):
        model.compile("sgd", loss)


def loss_reduction(loss):
    return keras.tree.flatten(loss)[0].reduction


def of_compute_loss(function):
    class Net(tfbig.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return function(self, x, y, y_pred, sample_weight)

    return Net


@in_turn(
    {"name": ["default", "mirrored_2"], "steps": [1, 3], "method": ["fit", "evaluate"]},
)
def test_compute_loss_must_return_a_scalar(name, steps, method):
    def vector(self, x, y, y_pred, sample_weight):
        return keras.ops.mean((y - y_pred) ** 2, axis=-1)

    with make_strategy(name).scope():
        model = sequential(of_compute_loss(vector), gradient_accumulation_steps=steps)
        model.compile(SGD())
    with (
        untrained(model),
        refused(
            errors.UnsupportedModelError,
            ValueError,
            "must be a scalar",
            "Received: a loss of shape",
            "reduce it in `compute_loss`",
        ),
    ):
        getattr(model, method)(X, Y, batch_size=6, verbose=0)


def scalar_loss(y, y_pred):
    return keras.ops.mean((y - y_pred) ** 2)


WEIGHTS = {"sample_weight": np.ones(12), "class_weight": {0: 1.0, 1: 2.0}}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("name", "steps"), [("default", 3), ("mirrored_2", 1), ("mirrored_2", 3)])
def test_weights_cannot_act_on_a_scalar_loss(name, steps, weight):
    with make_strategy(name).scope():
        model = sequential(gradient_accumulation_steps=steps)
        model.compile(SGD(), scalar_loss)
    with (
        untrained(model),
        refused(
            errors.UnsupportedModelError,
            ValueError,
            "cannot be weighted by `sample_weight` or `class_weight`",
            "Received: values of shape ()",
            "Return one value per sample",
        ),
    ):
        fit(model, **{weight: WEIGHTS[weight]})


def test_weighted_scalar_loss_is_keras_when_whole(float64):
    models = [sequential(tfbig.Sequential), sequential(keras.Sequential)]
    models[0].set_weights(models[1].get_weights())
    for model in models:
        model.compile(SGD(0.1), scalar_loss)
        fit(model, sample_weight=np.arange(12.0))
    for got, want in zip(*(m.get_weights() for m in models), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("name", "steps"), [("default", 3), ("mirrored_2", 1), ("mirrored_2", 3)])
def test_loss_denominator_is_not_for_keras_losses(name, steps):
    class Net(tfbig.Sequential):
        def loss_denominator(self, x, y, y_pred, sample_weight):
            return keras.ops.sum(keras.ops.ones_like(y))

    with make_strategy(name).scope():
        model = sequential(Net, gradient_accumulation_steps=steps)
        model.compile(SGD(), "mse")
    with (
        untrained(model),
        refused(
            errors.UnsupportedModelError,
            ValueError,
            "`loss_denominator` is for losses that come back as scalars",
            "Received: both",
            "Remove the hook",
        ),
    ):
        fit(model)


# --- A batch without samples -------------------------------------------------


def with_an_empty_batch(sizes):
    def batches():
        for size in sizes:
            yield X[:size], Y[:size]

    spec = (tf.TensorSpec((None, 4), "float64"), tf.TensorSpec((None, 2), "float64"))
    return tf.data.Dataset.from_generator(batches, output_signature=spec)


EMPTY = {
    "fit": lambda m: m.fit(X[:0], Y[:0], batch_size=6, verbose=0, shuffle=False),
    "fit_on_dataset": lambda m: m.fit(with_an_empty_batch([0, 6]), verbose=0, shuffle=False),
    "train_on_batch": lambda m: m.train_on_batch(X[:0], Y[:0]),
}


@in_turn(
    {
        "name": ["default", "mirrored_2"],
        "steps, loss_scale": {"1": (1, None), "3": (3, None), "dynamic": (1, "dynamic")},
        "run": list(EMPTY),
    }
)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # What Keras itself says.
def test_a_batch_must_hold_samples(name, steps, loss_scale, run):
    with make_strategy(name).scope():
        model = sequential(gradient_accumulation_steps=steps, loss_scale=loss_scale)
        model.compile(SGD(), "mse")
    with (
        untrained(model),
        refused(
            errors.InvalidOptionError, ValueError, "at least one sample", "Received: a batch of 0"
        ),
    ):
        EMPTY[run](model)


@on_strategies
@on_splits
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_an_empty_batch_after_good_ones_does_no_harm(name, steps):
    with make_strategy(name).scope():
        model = sequential(gradient_accumulation_steps=steps)
        model.compile(SGD(), "mse")
    with pytest.raises(errors.InvalidOptionError, match="at least one sample"):
        model.fit(with_an_empty_batch([6, 6, 0]), verbose=0, shuffle=False)
    assert model.optimizer.iterations.numpy() == 2
    assert all(np.isfinite(w).all() for w in model.get_weights())


@on_strategies
@on_splits
def test_evaluation_of_an_empty_batch_is_refused(name, steps):
    with make_strategy(name).scope():
        model = sequential(gradient_accumulation_steps=steps)
        model.compile(SGD(), "mse")
    with pytest.raises(errors.InvalidOptionError, match="at least one sample"):
        model.test_on_batch(X[:0], Y[:0])


# --- Parts of a batch of different sizes -------------------------------------


def with_sizes(*sizes, is_static=False):
    """A batch of inputs, targets and weights, each of its own number of samples."""
    batch = tuple(a[:n] for a, n in zip((X, Y, np.ones(len(X))), sizes, strict=True))
    if is_static:
        return batch
    specs = tuple(tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in batch)
    return tf.data.Dataset.from_generator(lambda: iter([batch]), output_signature=specs)


def resized(model, sizes):
    schedule = tfbig.callbacks.BatchSizeSchedule({0: 4})
    model.fit(with_sizes(*sizes), verbose=0, shuffle=False, callbacks=[schedule])


OF_SIZES = {
    "fit": lambda m, sizes: m.fit(with_sizes(*sizes), verbose=0, shuffle=False),
    "train_on_batch": lambda m, sizes: m.train_on_batch(*with_sizes(*sizes, is_static=True)),
    "evaluate": lambda m, sizes: m.evaluate(with_sizes(*sizes), verbose=0),
    "resized": resized,
}


@in_turn(
    {
        "name": ["default", "mirrored_2"],
        "run": list(OF_SIZES),
        "sizes": {
            "long_targets": (6, 9, 6),
            "short_targets": (6, 5, 6),
            "long_weights": (6, 6, 12),
            "one_target": (6, 1, 6),
        },
        "options": {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}},
    }
)
def test_parts_of_a_batch_must_hold_as_many_samples(name, run, sizes, options):
    with make_strategy(name).scope():
        model = sequential(micro_batch_size=2)
        model.compile(SGD(), "mse", **options)
    with (
        untrained(model),
        refused(
            errors.InvalidOptionError, ValueError, "All parts of a batch must hold as many samples"
        ),
    ):
        OF_SIZES[run](model, sizes)


# --- Classes and `extend` ----------------------------------------------------


@pytest.mark.parametrize("base", [keras.Model, keras.Sequential])
@pytest.mark.parametrize(
    "mixins",
    [
        (tfbig.GradientAccumulationMixin,),
        (tfbig.DynamicLossScalingMixin,),
        (tfbig.GradientAccumulationMixin, tfbig.DynamicLossScalingMixin),
    ],
)
def test_mixins_stand_before_the_keras_class(base, mixins):
    names = ", ".join(m.__name__ for m in mixins)
    with refused(
        errors.MixinOrderError,
        TypeError,
        "must stand before the Keras class",
        f"Received: class Net({base.__name__}, {names})",
        f"Write class Net({names}, {base.__name__})",
    ):
        type("Net", (base, *mixins), {})


@pytest.mark.parametrize("value", [None, 1, "model", {}, len, np.zeros(2)], ids=repr)
def test_extend_takes_models_only(value):
    with refused(
        errors.InvalidOptionError, ValueError, "takes a keras.Model", type(value).__name__
    ):
        tfbig.extend(value)


@pytest.mark.parametrize("value", [keras.layers.Dense, int])
def test_extend_takes_classes_of_models_only(value):
    with refused(errors.InvalidOptionError, ValueError, "subclass of keras.Model", value.__name__):
        tfbig.extend(value)


def test_extend_names_unknown_options():
    with refused(
        errors.InvalidOptionError,
        ValueError,
        "accumulation_steps",
        "Known are",
        "gradient_accumulation_steps",
        "log_grad_norm",
        "loss_scale",
        "micro_batch_size",
    ):
        tfbig.extend(sequential(keras.Sequential), accumulation_steps=2)
    with refused(errors.InvalidOptionError, ValueError, "without options", "micro_batch_size"):
        tfbig.extend(keras.Sequential, micro_batch_size=2)


def test_accumulate_gradients_takes_one_split():
    w = keras.Variable([1.0, 2.0])
    with refused(
        errors.InvalidOptionError,
        ValueError,
        "Exactly one",
        "gradient_accumulation_steps=2, micro_batch_size=3",
    ):
        tfbig.accumulate_gradients(
            lambda x: tf.reduce_sum(x * w),
            [w],
            tf.ones((4, 2)),
            gradient_accumulation_steps=2,
            micro_batch_size=3,
        )


def test_accumulate_gradients_needs_a_variable():
    with refused(errors.InvalidOptionError, ValueError, "Received: none", "before it is built"):
        tfbig.accumulate_gradients(lambda x: tf.reduce_mean(x), [], tf.ones((4, 1)))


def test_accumulate_gradients_is_told_the_size():
    w = keras.Variable([1.0, 2.0])
    with refused(
        errors.InvalidOptionError,
        ValueError,
        "only models take 'auto'",
        "Pass `model.micro_batch_size`",
    ):
        tfbig.accumulate_gradients(
            lambda x: tf.reduce_sum(x * w), [w], tf.ones((4, 2)), micro_batch_size="auto"
        )


def test_accumulate_gradients_wants_a_scalar():
    w = keras.Variable([1.0, 2.0])
    with refused(errors.UnsupportedModelError, ValueError, "must be a scalar", "shape (2, 2)"):
        tfbig.accumulate_gradients(lambda x: x * w, [w], tf.ones((4, 2)), micro_batch_size=2)


def test_errors_are_exported_with_their_built_in_parent():
    parents = {
        "BackendError": ImportError,
        "BackupError": ValueError,
        "ClusterError": ValueError,
        "GradientOverflowError": OverflowError,
        "InvalidOptionError": ValueError,
        "LossScaleError": RuntimeError,
        "MixinOrderError": TypeError,
        "OutOfMemoryError": MemoryError,
        "SearchError": RuntimeError,
        "SpikeError": RuntimeError,
        "StorageUnavailableError": ConnectionError,
        "StudyError": ValueError,
        "UnsupportedModelError": ValueError,
        "UnsupportedStrategyError": ValueError,
        "WorkerUnavailableError": TimeoutError,
        "WorkersDisagreeError": ValueError,
    }
    assert set(errors.__all__) == {"TfbigError", *parents}
    for name, parent in parents.items():
        assert issubclass(getattr(errors, name), (errors.TfbigError))
        assert issubclass(getattr(errors, name), parent)


# --- Strategies and scopes ---------------------------------------------------


def test_model_built_outside_of_the_scope(mirrored):
    model = sequential(micro_batch_size=2)
    model.compile(SGD(), "mse")
    with (
        untrained(model),
        mirrored.scope(),
        refused(
            errors.UnsupportedStrategyError,
            ValueError,
            "must be built in the scope",
            "run under MirroredStrategy",
            "with strategy.scope()",
        ),
    ):
        fit(model)


def test_layers_built_outside_of_the_scope(mirrored):
    layer = keras.layers.Dense(2)
    layer.build((None, 4))
    with mirrored.scope():
        model = tfbig.Sequential([keras.Input((4,)), layer])
        model.compile(SGD(), "mse")
    with refused(
        errors.UnsupportedStrategyError,
        ValueError,
        "All variables must be made in the scope",
        "/kernel",
        "with strategy.scope()",
    ):
        fit(model)


def test_optimizer_made_outside_of_the_scope(mirrored):
    optimizer = SGD()
    with mirrored.scope():
        model = sequential()
        model.compile(optimizer, "mse")
    with (
        untrained(model),
        refused(
            errors.UnsupportedStrategyError,
            ValueError,
            "optimizer must be made in the scope",
            "SGD",
            "model under MirroredStrategy",
            "with strategy.scope()",
        ),
    ):
        fit(model)


def test_optimizer_made_in_the_scope_of_another_strategy(mirrored):
    with mirrored.scope():
        optimizer = SGD()
    model = sequential()
    model.compile(optimizer, "mse")
    with refused(
        errors.UnsupportedStrategyError, ValueError, "optimizer must be made in the scope", "SGD"
    ):
        fit(model)


def central_storage():
    return tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"], "CPU:0")


@pytest.mark.parametrize(
    "make", [sequential, functional, lambda: tfbig.extend(sequential(keras.Sequential))]
)
def test_central_storage_is_refused(make):
    with (
        central_storage().scope(),
        refused(
            errors.UnsupportedStrategyError,
            ValueError,
            "supports the default strategy, OneDeviceStrategy, MirroredStrategy",
            "Received: CentralStorageStrategy",
            "Use tfbig.distribute.get_strategy()",
        ),
    ):
        make()


def test_fit_under_central_storage_is_refused():
    model = sequential()
    model.compile(SGD(), "mse")
    with (
        untrained(model),
        central_storage().scope(),
        refused(errors.UnsupportedStrategyError, ValueError, "CentralStorageStrategy"),
    ):
        fit(model)


def run_python(code, **env):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"} | env
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def test_parameter_servers_are_refused():
    done = run_python("""
        import socket, tensorflow as tf, keras, tfbig
        def port():
            with socket.socket() as s:
                s.bind(("localhost", 0))
                return f"localhost:{s.getsockname()[1]}"
        spec = tf.train.ClusterSpec({"worker": [port()], "ps": [port()]})
        servers = [tf.distribute.Server(spec, job, 0, protocol="grpc") for job in ("worker", "ps")]
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec, rpc_layer="grpc")
        strategy = tf.distribute.ParameterServerStrategy(resolver)
        with strategy.scope():
            try:
                tfbig.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            except tfbig.errors.UnsupportedStrategyError as e:
                print("refused:", e, flush=True)
        import os
        os._exit(0)  # The servers never end.
        """)
    assert re.search(r"refused: .*TPUStrategy\. Received: ParameterServer\w+\.", done.stdout), (
        done.stderr
    )


# --- Import ------------------------------------------------------------------


REFUSED_BACKENDS = {
    # Keras itself fails to import where the backend is not installed.
    "variable": ("import tfbig", "jax", ""),
    "keras.json": ("import tfbig", "", "jax"),
    "keras_imported_before": (
        "import keras; keras.backend.backend = lambda: 'jax'; import tfbig",
        "tensorflow",
        "tensorflow",
    ),
}


@pytest.mark.parametrize("source", REFUSED_BACKENDS)
def test_another_backend_is_refused_at_import(source, tmp_path):
    code, variable, in_file = REFUSED_BACKENDS[source]
    (tmp_path / "keras.json").write_text(f'{{"backend": "{in_file}"}}')
    done = run_python(code, KERAS_BACKEND=variable, KERAS_HOME=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tfbig.errors.BackendError")
    assert "needs Keras on the TensorFlow backend" in last
    assert "Received: 'jax'" in last
    assert "KERAS_BACKEND=tensorflow before Keras is imported" in last


# --- No warnings -------------------------------------------------------------


@in_turn({"name": ["default", "mirrored_2"], "jit_compile": [False, True]})
def test_an_ordinary_fit_warns_of_nothing(name, jit_compile):
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [tf.get_logger(), logging.getLogger("absl"), logging.getLogger()]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with make_strategy(name).scope():
                model = sequential(micro_batch_size=2, loss_scale="dynamic")
                model.compile("adam", "mse", metrics=["mae"], jit_compile=jit_compile)
            fit(model, X[:11], Y[:11], epochs=3, validation_data=(X, Y))
            model.predict(X, verbose=0)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [str(w.message) for w in caught if w.category is not DeprecationWarning] == []
    # TensorFlow counts traces over all models of the process, those of other tests
    # among them; exchange_test.py counts the traces of one model.
    messages = [r.getMessage() for r in records if "function retracing" not in r.getMessage()]
    assert messages == []
