"""The first run of a program takes time and memory that it does not need; here it takes less.

TensorFlow optimizes a graph when it first runs. One pass of it simulates the order in which the
operations run, in order to move tensors from a device that is full to the host. On a CPU they are
there already, but the simulation runs all the same: for a decoder of 8 layers with divided weights,
for 1.5 s, and it takes 35 MB. And of the memory that tracing and optimizing have freed, the C
library keeps most, which larger tensors cannot use: 150 MB there.
"""

import contextlib
import copy
import ctypes
import functools
from collections.abc import Iterator

import keras
from tensorflow.core.protobuf import config_pb2 as _config_pb2
from tensorflow.core.protobuf import rewriter_config_pb2 as _rewriter_config_pb2
from tensorflow.python.eager import context as _context

from tfbig import _types
from tfbig._keras.devices import is_on_cpu

__all__ = ("give_back_memory", "starting_well", "without_simulation")


@contextlib.contextmanager
def starting_well(model: keras.Model) -> Iterator[None]:
    """A context in which a tfbig model is trained or evaluated, and may be traced."""
    traced = model.times_traced
    with without_simulation(model.distribute_strategy):
        yield
    if model.times_traced > traced:
        give_back_memory()


@contextlib.contextmanager
def without_simulation(strategy: _types.Strategy) -> Iterator[None]:
    """A context in which functions that run for the first time start without the simulation.

    Functions stay as they were started for these options, so the context must be around all calls
    of a function or around none.

    Args:
        strategy: of the replicas; where they are not on CPUs, nothing changes.
    """
    if not is_on_cpu(strategy):
        yield
        return
    context = _context.context()
    before = context.function_call_options
    # A copy: TensorFlow changes the options of a thread in place.
    context.function_call_options = copy.copy(
        _options(before.executor_type, before.config_proto_serialized)
    )
    try:
        yield
    finally:
        context.function_call_options = before


@functools.cache
def _options(executor: str | None, config: bytes) -> _context.FunctionCallOptions:
    """These options of calls, without the pass that simulates."""
    changed = _config_pb2.ConfigProto.FromString(config)
    rewrites = changed.graph_options.rewrite_options
    rewrites.memory_optimization = _rewriter_config_pb2.RewriterConfig.NO_MEM_OPT
    return _context.FunctionCallOptions(executor, changed)


def give_back_memory() -> None:
    """Returns to the operating system what the C library keeps of freed memory.

    Without effect if the C library is not that of GNU.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
