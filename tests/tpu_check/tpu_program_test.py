"""An update traced for a made-up slice, and faults that the checks find in it."""

import contextlib
import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbig
from tests.tpu_check import faults
from tfbig import _keras, tpu_check
from tfbig._update import apply, replicas
from tfbig.tpu_check import checks

SHARE = 8  # Samples of a core.


@functools.cache
def strategy():
    """Four cores, as many as `conftest` makes logical CPU devices."""
    return tpu_check.made_up_strategy(tpu_check.Slice.parse("v5e:2x2"))


def net(*inner, shape=(3,), dtype="float32", optimizer=None, cls=tfbig.Sequential, **options):
    """Returns a compiled model that ends in one unit; `inner` are functions that make layers."""
    options = {"gradient_accumulation_steps": 4} | options
    with strategy().scope():
        made = [layer() for layer in inner]
        model = cls([keras.Input(shape, dtype=dtype), *made, layers.Dense(1)], **options)
        model.compile(optimizer() if optimizer else "sgd", "mse", metrics=["mae"])
    return model


def traced(model):
    inputs = model.inputs[0]
    share = (
        tf.TensorSpec([SHARE, *inputs.shape[1:]], inputs.dtype),
        tf.TensorSpec([SHARE, *model.outputs[0].shape[1:]], "float32"),
    )
    return tpu_check.trace(model, share)


def found(model):
    return tpu_check.findings(traced(model))


def summed(program):
    """Returns the shapes of what the cores sum, sorted."""
    return sorted(tuple(place.op.inputs[0].shape) for place in checks.collectives(program))


def test_variables_have_a_copy_for_each_core():
    model = net()
    assert strategy().num_replicas_in_sync == 4
    for variable in model.weights:
        assert len(strategy().experimental_local_results(variable.value)) == 4
    model.set_weights([np.ones(w.shape) for w in model.weights])
    assert float(model.weights[1].numpy()[0]) == 1.0


def test_too_few_devices():
    with pytest.raises(tfbig.errors.UnsupportedStrategyError, match="needs 16 logical CPU devices"):
        tpu_check.made_up_strategy(tpu_check.Slice.parse("v5e:4x4"))


@pytest.mark.parametrize("name", ["v5e", "v5e:2", "v5e:2x2x2", "v5p:2x2", "v9:2x2", "v5e:0x2", ""])
def test_an_unknown_topology(name):
    with pytest.raises(tfbig.errors.InvalidOptionError, match="such as v5e:2x2, v5p:2x2x2"):
        tpu_check.Slice.parse(name)


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        ([], {}),
        ([], {"gradient_accumulation_steps": 1}),
        ([], {"gradient_accumulation_steps": None, "micro_batch_size": 3}),
        ([layers.BatchNormalization, lambda: layers.Dropout(0.5)], {"loss_scale": "dynamic"}),
        ([lambda: layers.Dense(4, "relu", kernel_regularizer="l2")], {"loss_scale": 8.0}),
        ([], {"optimizer": lambda: keras.optimizers.AdamW(global_clipnorm=1.0, use_ema=True)}),
        ([], {"optimizer": keras.optimizers.Adam, "loss_scale": "dynamic"}),
        ([lambda: layers.Dense(4)], {"log_grad_norm": True, "exchange_dtype": "bfloat16"}),
        ([lambda: layers.Dense(4)], {"exchange_bucket_bytes": 1}),
        ([lambda: layers.Dense(4)], {"log_gradient_noise_scale": True, "recompute": True}),
    ],
    ids=[
        "steps",
        "whole",
        "size",
        "state",
        "regularized",
        "clipped",
        "dynamic",
        "half_exchange",
        "buckets",
        "noise_scale",
    ],
)
def test_tfbig_s_own_update_passes(inner, options):
    assert found(net(*inner, **options)) == []


@pytest.mark.parametrize(
    "inner",
    [
        (lambda: layers.Embedding(10, 3), layers.GlobalAveragePooling1D),
        (lambda: layers.Embedding(10, 3, mask_zero=True), lambda: layers.LSTM(2)),
    ],
    ids=["embedding", "masked"],
)
def test_a_model_of_tokens_passes(inner):
    model = net(*inner, shape=(5,), dtype="int32", loss_scale="dynamic")
    assert found(model) == []


def test_rows_of_tables_that_are_added_up_are_warned_of():
    model = net(
        lambda: layers.Embedding(10, 3, name="tokens"),
        layers.GlobalAveragePooling1D,
        shape=(5,),
        dtype="int32",
    )
    with pytest.warns(UserWarning, match="on a TPU.*are added up.*Received: .*tokens/emb"):
        traced(model)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("loss_scale", [None, "dynamic"])
def test_each_gradient_is_summed_once_outside_loops(steps, loss_scale):
    model = net(layers.BatchNormalization, gradient_accumulation_steps=steps, loss_scale=loss_scale)
    program = traced(model)
    # Gradients of scale, offset, kernel and bias; scalars; two moving statistics; the metric's
    # two sums.
    assert summed(program) == sorted([(3,), (3,), (3, 1), (1,), (5,), (3,), (3,), (), ()])
    assert all(not (p.loops or p.conditionals) for p in checks.collectives(program))
    # Without a loop, the check above would prove nothing.
    assert any(place.loops for place in program.places)
    assigned = [p for p in program.places if p.op.type.startswith("Assign")]
    assert any(place.conditionals for place in assigned) == (loss_scale is not None)


# --- Planted faults ----------------------------------------------------------


class Layer(layers.Layer):
    """A layer that applies a function which preserves shapes."""

    def __init__(self, function, name):
        super().__init__(name=name)
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_shape(self, shape):
        # Without this Keras would call the layer outside the strategy to find out.
        return shape


def planted(function, **options):
    return net(lambda: Layer(function, "planted"), **options)


def only(errors, kind, *texts):
    """Asserts that all errors are of one kind and that the first contains the texts."""
    assert errors
    assert {type(e) for e in errors} == {kind}
    for text in texts:
        assert text in str(errors[0])


def test_exchange_inside_the_loop():
    def mean(x):
        context = tf.distribute.get_replica_context()
        # There is no replica context while Keras builds the model.
        return x - (context.all_reduce("MEAN", x) if context else x)

    only(
        found(planted(mean)),
        tpu_check.CollectiveError,
        "(CrossReplicaSum)",
        "layer 'planted' (Layer)",
        "inside the loop",
    )


def test_exchange_inside_a_conditional(monkeypatch):
    # Without it, TensorFlow sends the first core's `iterations` to all cores.
    monkeypatch.setattr(_keras.variables, "assigned_locally", lambda _: contextlib.nullcontext())
    errors = found(net(loss_scale="dynamic"))
    assert any("inside a conditional" in str(e) for e in errors)
    assert any("only exchange sums and means" in str(e) and "(AllToAll)" in str(e) for e in errors)


def test_double_sum(monkeypatch):
    faults.double_sum(monkeypatch)
    errors = found(net())
    only(errors, tpu_check.CollectiveError, "the same on all cores already", "(CrossReplicaSum)")
    assert len(errors) == 2  # Kernel and bias.


def test_no_exchange(monkeypatch):
    monkeypatch.setattr(replicas, "all_reduce_sum", lambda tensors, *_: list(tensors))
    errors = found(net(optimizer=lambda: keras.optimizers.SGD(0.1, momentum=0.9)))
    only(errors, tpu_check.DriftError, "was not exchanged")
    text = " ".join(map(str, errors))
    assert "kernel" in text
    assert "bias" in text


def test_one_gradient_is_not_exchanged(monkeypatch):
    def mixed(share, batch):
        return dataclasses.replace(batch, gradients=[batch.gradients[0], share.gradients[1]])

    faults.changed_exchange(monkeypatch, mixed)
    errors = found(net())
    only(errors, tpu_check.DriftError, "bias")
    assert len(errors) == 1


def test_predicate_before_the_exchange(monkeypatch):
    flags = apply._finite_flags
    shares = []

    def kept(share, batch):
        shares.append(share.gradients)
        return batch

    faults.changed_exchange(monkeypatch, kept)
    monkeypatch.setattr(apply, "_finite_flags", lambda gradients: flags(shares[-1]))
    errors = found(net(loss_scale="dynamic"))
    assert type(errors[0]) is tpu_check.PredicateError
    assert "decided after the exchange" in str(errors[0])
    assert "(If)" in str(errors[0])


def tanh(x):
    return tf.ensure_shape(tf.numpy_function(np.tanh, [x], tf.float32), x.shape)


def python_tanh(x):
    return tf.ensure_shape(tf.py_function(tf.tanh, [x], tf.float32), x.shape)


@pytest.mark.parametrize(("function", "op"), [(python_tanh, "(EagerPyFunc)"), (tanh, "(PyFunc)")])
def test_python_in_a_layer(function, op):
    errors = found(planted(function))
    assert {type(e) for e in errors} == {tpu_check.HostOperationError}
    assert op in str(errors[0])
    assert "cannot call Python" in str(errors[0])
    assert "layer 'planted' (Layer)" in str(errors[0])


def test_string_features():
    def hashed(x):
        return tf.cast(tf.strings.to_hash_bucket_fast(x, 10), tf.float32)

    errors = found(planted(hashed, dtype="string"))
    assert {type(e) for e in errors} == {tpu_check.HostOperationError}
    assert any("(StringToHashBucketFast) in layer 'planted' (Layer)" in str(e) for e in errors)


def test_strings_that_keras_casts_for_a_layer():
    with strategy().scope():
        model = tfbig.Sequential([layers.Dense(1, name="first")], gradient_accumulation_steps=4)
        model.compile("sgd", "mse")
    share = tf.TensorSpec([SHARE, 3], tf.string), tf.TensorSpec([SHARE, 1])
    (error,) = tpu_check.findings(tpu_check.trace(model, share))
    assert isinstance(error, tpu_check.HostOperationError)
    assert "(Cast) in no layer, for layer 'first' (Dense)" in str(error)


def test_an_operation_unknown_to_the_compiler():
    model = net(lambda: layers.IntegerLookup(vocabulary=[3, 4]), shape=(1,), dtype="int64")
    only(
        found(model),
        tpu_check.UnknownOperationError,
        "(LookupTableFindV2) in layer 'integer_lookup' (IntegerLookup)",
    )


def test_an_augmentation_unknown_to_the_compiler():
    model = net(lambda: layers.RandomRotation(0.1), layers.Flatten, shape=(4, 4, 3))
    only(
        found(model),
        tpu_check.UnknownOperationError,
        "(ImageProjectiveTransformV3) in layer 'random_rotation' (RandomRotation)",
        "Move it to the input pipeline",
    )


def synchronized(**options):
    return net(lambda: layers.BatchNormalization(synchronized=True), **options)


@pytest.mark.parametrize("loss_scale", [None, "dynamic"])
def test_a_layer_may_exchange_statistics_that_are_averaged_later(loss_scale):
    assert found(synchronized(gradient_accumulation_steps=2, loss_scale=loss_scale)) == []


def test_double_sum_beside_a_layer_that_exchanges(monkeypatch):
    faults.double_sum(monkeypatch)
    errors = found(synchronized(gradient_accumulation_steps=2))
    only(errors, tpu_check.CollectiveError, "the same on all cores already")
    assert len(errors) == 4  # Kernel, bias, scale and offset.


def test_assertions_may_contain_strings():
    def asserted(x):
        with tf.control_dependencies([tf.debugging.assert_less(x, 9.0, "too large")]):
            return tf.identity(x)

    program = traced(planted(asserted))
    assert any(place.op.type == "Assert" for place in program.places)
    assert tpu_check.findings(program) == []


def test_dynamic_shape():
    def positive(x):
        return x + tf.reduce_sum(tf.boolean_mask(x, x > 0))

    only(
        found(planted(positive)),
        tpu_check.DynamicShapeError,
        "shape (None, ",
        "(Where) in layer 'planted' (Layer)",
    )


def test_check_raises_the_first_finding():
    with pytest.raises(tpu_check.ProgramError, match="cannot call Python"):
        tpu_check.check(traced(planted(tanh)))


def test_a_graph_without_a_program():
    graph = tf.function(lambda x: x + 1).get_concrete_function(tf.TensorSpec([])).graph
    with pytest.raises(tfbig.errors.UnsupportedStrategyError, match="no program for a TPU"):
        tpu_check.Program(graph)
