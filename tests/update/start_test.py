"""The first update starts without TensorFlow's simulation, and gives back what it leaves free."""

import ctypes
import pathlib
import re

import keras
import numpy as np
import pytest
from tensorflow.core.protobuf import config_pb2
from tensorflow.core.protobuf import rewriter_config_pb2 as rewriter
from tensorflow.python.eager import context

import tfbig
from tests.conftest import make_strategy
from tfbig._keras import start

WITHOUT = rewriter.RewriterConfig.NO_MEM_OPT


def simulation():
    """Whether TensorFlow would simulate the graph of a function that is called now."""
    config = config_pb2.ConfigProto.FromString(
        context.context().function_call_options.config_proto_serialized
    )
    return config.graph_options.rewrite_options.memory_optimization != WITHOUT


def fit(strategy, monkeypatch, program=b"_one_step_of", **options):
    """Fits a model; returns for each update whether it was run by a simulated graph, and how often
    memory was given back.
    """
    given_back, simulated = [], []
    call_function = context.Context.call_function

    def noting(self, name, *args):
        if program in name:
            simulated.append(simulation())
        return call_function(self, name, *args)

    monkeypatch.setattr(start, "give_back_memory", lambda: given_back.append(True))
    monkeypatch.setattr(context.Context, "call_function", noting)
    x = np.ones((8, 2), "float32")
    with make_strategy(strategy).scope():
        options = options or {"gradient_accumulation_steps": 2}
        model = tfbig.Sequential([keras.Input((2,)), keras.layers.Dense(1)], **options)
        model.compile("sgd", "mse", jit_compile=False)
    model.fit(x, x[:, :1], batch_size=4, epochs=3, verbose=0)
    model.fit(x, x[:, :1], batch_size=4, verbose=0)
    return simulated, len(given_back)


@pytest.mark.parametrize("strategy", ["default", "mirrored_2"])
def test_an_update_starts_without_simulation_and_gives_back_memory_once(strategy, monkeypatch):
    simulated, given_back = fit(strategy, monkeypatch)
    assert simulated == [False] * 8
    assert given_back == 1
    assert simulation(), "what others call afterwards is as before"


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (b"_one_step", {"loss_scale": tfbig.DynamicLossScale(retry=True)}),
        (b"_accumulate_program", {"micro_batch_size": "auto"}),
    ],
)
def test_other_ways_to_train_start_so_too(program, options, monkeypatch):
    simulated, given_back = fit("default", monkeypatch, program, **options)
    assert len(simulated) >= 8
    assert not any(simulated)
    # The second training with "auto" finds the size again.
    assert 1 <= given_back <= 2


def test_an_update_on_other_devices_starts_as_ever(monkeypatch):
    monkeypatch.setattr(start, "is_on_cpu", lambda strategy: False)
    simulated, _ = fit("default", monkeypatch)
    assert simulated == [True] * 8


def resident():
    """Bytes of this process that are in memory."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only of GNU's C library")
def test_freed_memory_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size, number = 4096, 50_000
    blocks = [libc.malloc(size) for _ in range(number)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    # The last block is above all others in the heap, which cannot shrink before it is freed.
    for block in blocks[:-1]:
        libc.free(ctypes.c_void_p(block))
    before = resident()
    start.give_back_memory()
    assert before - resident() > 0.9 * size * number
    libc.free(ctypes.c_void_p(blocks[-1]))
