"""The exchange of the last layers begins while the last micro-batch's backward pass still runs."""

import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tests.conftest import make_strategy
from tests.update.exchange_test import fit, samples
from tfbig._keras import collectives
from tfbig._keras.pipelined_loop import while_loop_with_early_results

POLLS = 3000  # Of a millisecond each.
MARK = 7.0


class Gate:
    """What a graph waits for, for so long that it is plain that it never comes."""

    def __init__(self):
        self.is_open = threading.Event()
        self.seen = []  # What each wait ended with.

    def opened_by(self, value):
        """`value`; once it is there, the gate is open."""

        def open_gate(x):
            self.is_open.set()
            return x

        opened = tf.numpy_function(open_gate, [value], value.dtype, stateful=False)
        return tf.ensure_shape(opened, value.shape)

    def waited_at(self, value):
        """`value`, once the gate is open."""

        def look(k):
            time.sleep(0.001)
            is_open = self.is_open.is_set()
            if is_open or k == POLLS - 1:
                self.seen.append(is_open)
            return is_open

        def poll(k, _):
            # One thread of TensorFlow's waits no longer than this.
            is_open = tf.numpy_function(look, [k], tf.bool, stateful=False)
            return k + 1, tf.ensure_shape(is_open, [])

        begin = tf.cast(0 * tf.reduce_sum(value), tf.int32)
        k, _ = tf.while_loop(
            lambda k, is_open: ~is_open & (k < POLLS), poll, (begin, tf.constant(False))
        )
        with tf.control_dependencies([k]):
            return tf.identity(value)


# --- The loop ------------------------------------------------------------------


def test_a_result_is_handed_on_while_another_is_made():
    gate = Gate()

    @tf.function(autograph=False)
    def program():
        def body(k, quick, slow):
            made = tf.cond(k < 2, lambda: slow, lambda: gate.waited_at(slow)) + 1
            # Nor does a result wait for an assertion about another.
            tf.debugging.assert_positive(made)
            return k + 1, quick + 1, made

        start = tf.constant(0), tf.constant(0.0), tf.constant(0.0)
        _, quick, slow = while_loop_with_early_results(
            lambda k, *_: k < 3, body, start, early=lambda k, quick, slow: [k, quick]
        )
        return gate.opened_by(quick), slow

    assert [float(v) for v in program()] == [3, 3]
    assert gate.seen == [True]


def test_an_iteration_begins_when_the_one_before_it_has_made_everything():
    events = []

    def noted(name, k, seconds=0.0):
        def note(k):
            time.sleep(seconds)
            events.append((name, int(k)))
            return k

        return tf.ensure_shape(tf.numpy_function(note, [k], tf.int32, stateful=False), [])

    @tf.function(autograph=False)
    def program():
        def body(k, begun, ended, array):
            return k + 1, noted("begin", k), noted("end", k, 0.02), array.write(k, ended)

        zero = tf.constant(0)
        start = zero, zero, zero, tf.TensorArray(tf.int32, 4)
        _, begun, ended, array = while_loop_with_early_results(
            lambda k, *_: k < 4, body, start, early=lambda k, _begun, _ended, array: [k, array]
        )
        return begun, ended, array.stack()

    begun, ended, array = program()
    assert (int(begun), int(ended), array.numpy().tolist()) == (3, 3, [0, 0, 1, 2])
    assert [k for _, k in events] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_is_assigned_waits_for_assertions():
    total = tf.Variable(0.0)

    @tf.function(autograph=False)
    def program():
        def late(k):
            time.sleep(0.1)
            return k

        def body(k, x):
            seen = tf.numpy_function(late, [k], tf.int32, stateful=False)
            tf.debugging.assert_less(seen, 1, "too many")
            return k + 1, x + 1

        start = tf.constant(0), tf.constant(1.0)
        _, x = while_loop_with_early_results(lambda k, _: k < 2, body, start, lambda k, x: k)
        total.assign(x)

    with pytest.raises(tf.errors.InvalidArgumentError, match="too many"):
        program()
    assert total.numpy() == 0


# --- The update ----------------------------------------------------------------


class WaitingGradient(keras.layers.Layer):
    """Hands on its first input; where the second is marked, the gradient waits at a gate."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.factor = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, inputs):
        hidden, x = inputs
        gate, is_marked = self.gate, tf.reduce_any(tf.equal(x, MARK))

        @tf.custom_gradient
        def identity(hidden):
            def gradient(upstream):
                waited = tf.cond(is_marked, lambda: gate.waited_at(upstream), lambda: upstream)
                # What reads a variable has no side effect that a result would have to wait for.
                with tf.control_dependencies([waited]):
                    return waited * tf.cast(self.factor.value.read_value(), waited.dtype)

            return tf.identity(hidden), gradient

        return identity(hidden)


@pytest.mark.parametrize(
    ("steps", "options", "exchange"),
    [
        pytest.param(1, {}, "all_reduce", id="whole"),
        pytest.param(3, {"recompute": True}, "all_reduce", id="recomputed"),
        pytest.param(2, {"exchange_dtype": "bfloat16"}, "all_reduce", id="half"),
        pytest.param(2, {"shard": "optimizer"}, "reduce_scatter", id="divided"),
    ],
)
def test_the_last_layer_is_exchanged_before_the_first_has_its_gradient(
    steps, options, exchange, monkeypatch
):
    gate = Gate()
    original = getattr(collectives, exchange)

    def opening(values, *args, **kwargs):
        received = original(values, *args, **kwargs)
        if exchange == "reduce_scatter":
            return gate.opened_by(received)
        # Scalars that are exchanged by themselves are known after the forward pass.
        return [gate.opened_by(r) if r.shape.rank == 2 else r for r in received]

    monkeypatch.setattr(collectives, exchange, opening)
    keras.utils.set_random_seed(1)
    with make_strategy("mirrored_2").scope():
        x = keras.Input((3,))
        hidden = WaitingGradient(gate)([keras.layers.Dense(4)(x), x])
        model = tfbig.Model(
            x,
            keras.layers.Dense(1)(hidden),
            gradient_accumulation_steps=steps,
            # Each gradient alone.
            exchange_bucket_bytes=1,
            **options,
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = samples(4 * steps)
    # The last micro-batch of one replica: a wait takes a thread of TensorFlow's.
    x[-2:] = MARK
    fit(model, x, y)
    assert gate.seen == [True]
    assert all(np.isfinite(w).all() for w in model.get_weights())
