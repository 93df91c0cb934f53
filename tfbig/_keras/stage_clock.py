"""TensorFlow does not say how long a stage of a pipeline waits; here its passes are timed.

A clock must not have micro-batches wait for each other. So each reading waits only for the tensors
that it is about, and no reading for another, which TensorFlow would arrange for otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import tensorflow as tf
from keras.src.ops.operation import Operation
from tensorflow.python.framework import config

from tfbig import _types
from tfbig._keras.devices import full_name
from tfbig._keras.independence import run_independently
from tfbig._keras.stages import Stage
from tfbig._keras.thread import current, holding

__all__ = ("Passes", "StageClock", "can_time", "timing", "wanted")


class StageClock:
    """The share of the time in which the stages of a pipeline had nothing to do: the bubble.

    A stage has something to do from when what it needs for a forward or backward pass has arrived,
    and it may begin it, until the pass is done. The time is that from the first forward pass of an
    update to its last backward pass.
    """

    def __init__(self) -> None:
        # The shares of updates, added up, and their number; those of each replica count alike.
        with tf.device("CPU:0"):
            self._sums = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)

    def add(self, share: _types.Tensor) -> None:
        """Adds the share of an update; NaN, of no micro-batches, does not count."""
        known = tf.math.is_finite(share)
        value = tf.where(known, share, tf.zeros_like(share))
        self._sums.assign_add(tf.stack([value, tf.cast(known, value.dtype)]))

    def reader(self) -> Callable[[], float | None]:
        """A function that returns the mean since it was last called; None if nothing was added."""
        before = self._sums.numpy()

        def read() -> float | None:
            nonlocal before
            now = self._sums.numpy()
            total, updates = now - before
            before = now
            return float(total / updates) if updates else None

        return read


def can_time(stages: Iterable[Stage]) -> bool:
    """Whether there is one clock for all stages: not if one is a device of another process."""
    if config.is_op_determinism_enabled():
        return False
    own = full_name("CPU:0").rpartition("/")[0]
    return all(device.rpartition("/")[0] == own for s in stages for device in s.devices)


def wanted() -> StageClock | None:
    """The clock of the step that is being traced; None if nobody asks."""
    clock: StageClock | None = current("stage_clock")
    return clock


@dataclasses.dataclass
class _Segment:
    """Layers of a stage that run one after another.

    Attributes:
        stage: their stage.
        inputs: what the first of them takes.
        outputs: what the last of them returns.
        variables: identities of their variables.
    """

    stage: Stage
    inputs: list[_types.Tensor]
    outputs: list[_types.Tensor] = dataclasses.field(default_factory=list)
    variables: set[int] = dataclasses.field(default_factory=set)


class Passes:
    """Times the passes of one micro-batch through the stages, while they are traced.

    First the layers are called within `timing`, then `boundaries` and `times` are, once each.

    Args:
        turns: for each stage, the tensor that it waits for.
    """

    def __init__(self, turns: Mapping[Stage, _types.Tensor]) -> None:
        self._turns = turns
        self._graph = tf.compat.v1.get_default_graph()
        self._is_open = True
        self._segments: list[_Segment] = []
        # Tensors that layers on stages have returned, by identity.
        self._made: dict[int, _types.Tensor] = {}

    def call(
        self,
        operation: Operation,
        stage: Stage,
        run: Callable[[], _types.Structure],
        arguments: _types.Structure,
    ) -> _types.Structure:
        """Runs a layer that lies on a stage; those within it belong to it."""
        if not self._is_open or tf.compat.v1.get_default_graph() is not self._graph:
            return run()
        if not self._segments or self._segments[-1].stage is not stage:
            self._segments.append(_Segment(stage, self._tensors(arguments)))
        segment = self._segments[-1]
        self._is_open = False
        try:
            outputs = run()
        finally:
            self._is_open = True
        segment.outputs = self._tensors(outputs)
        self._made |= {id(t): t for t in segment.outputs}
        known = {i for other in self._segments for i in other.variables}
        own = {id(v) for v in getattr(operation, "variables", [])}
        segment.variables |= own - (known - segment.variables)
        return outputs

    def boundaries(self) -> list[_types.Tensor]:
        """The forward passes are complete; the tensors whose gradients tell of backward passes."""
        self._is_open = False
        found = {
            id(t): t
            for segment in self._segments
            for t in (*segment.outputs, *segment.inputs)
            if id(t) in self._made and t.dtype.is_floating
        }
        self._boundaries = list(found.values())
        return self._boundaries

    def times(
        self,
        gradients: Sequence[_types.Tensor | None],
        of_variables: Mapping[int, _types.Tensor],
    ) -> _types.Tensor:
        """When each pass began and ended: float64 `(segments, 4)`, seconds.

        Forward, then backward; the same four times if there is no backward pass.

        Args:
            gradients: those of `boundaries()`.
            of_variables: the gradients of variables, by the identity of these.
        """
        of_tensors = {
            id(t): g for t, g in zip(self._boundaries, gradients, strict=True) if g is not None
        }
        rows = []
        for segment in self._segments:
            stage = segment.stage
            turn = [self._turns[stage]] if stage in self._turns else []
            row = [_now(stage, [*segment.inputs, *turn]), _now(stage, segment.outputs)]
            given = [of_tensors[id(t)] for t in segment.outputs if id(t) in of_tensors]
            made = [of_tensors[id(t)] for t in segment.inputs if id(t) in of_tensors]
            made += [g for i, g in of_variables.items() if i in segment.variables]
            row += [_now(stage, given), _now(stage, made)] if given and made else [row[1], row[1]]
            rows.append(_stacked(row))
        return _stacked(rows) if rows else tf.zeros([0, 4], tf.float64)

    def share(self, times: _types.Tensor) -> _types.Tensor:
        """The share of the time for which stages waited: a float64 scalar, NaN if nothing ran.

        Args:
            times: what `times` returned for each micro-batch, `(micro_batches, segments, 4)`.
        """
        with tf.device("CPU:0"):
            stages = list(dict.fromkeys(segment.stage for segment in self._segments))
            busy = tf.zeros((), tf.float64)
            for stage in stages:
                own = [i for i, s in enumerate(self._segments) if s.stage is stage]
                busy += _union(tf.reshape(tf.gather(times, own, axis=1), [-1, 2]))
            # The least and the largest of no micro-batches are infinite, and the share is NaN.
            span = tf.reduce_max(times) - tf.reduce_min(times)
            share = 1 - busy / (len(stages) * span)
            return tf.where(tf.math.is_finite(span), share, tf.constant(math.nan, share.dtype))

    def _tensors(self, structure: _types.Structure) -> list[_types.Tensor]:
        leaves = tf.nest.flatten(structure, expand_composites=True)
        return [
            t for t in leaves if isinstance(t, tf.Tensor) and getattr(t, "graph", 0) is self._graph
        ]


@contextlib.contextmanager
def timing(passes: Passes | None) -> Iterator[None]:
    """Within it, the layers that lie on stages are timed."""
    with holding("passes", passes):
        yield


def _now(stage: Stage, after: Iterable[_types.Tensor]) -> _types.Tensor:
    """The time at which tensors are there, on a stage's device."""
    after, device = list(after), stage.device()
    host = _host_of(device)
    # Nor does it wait for what the layers around it wait for.
    with tf.control_dependencies(None):
        if host != device:
            # An accelerator has only begun what the host believes to be done; a copy is there.
            with tf.device(device):
                after = [tf.reshape(t, [-1])[:1] for t in after]
            with tf.device(host):
                after = [tf.identity(t) for t in after]
        with tf.device(host), tf.control_dependencies(after):
            now = tf.timestamp()
    run_independently(now.op)
    return now


def _host_of(device: str) -> str:
    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type == "CPU":
        return device
    host: str = spec.replace(device_type="CPU", device_index=0).to_string()
    return host


def _stacked(values: list[_types.Tensor]) -> _types.Tensor:
    with tf.device("CPU:0"):
        return tf.stack(values)


def _union(intervals: _types.Tensor) -> _types.Tensor:
    """How long at least one of the intervals `(n, 2)` holds."""
    bounds = tf.reshape(tf.transpose(intervals), [-1])
    number = tf.shape(intervals)[0]
    # Those that begin come before those that end at the same time.
    order = tf.argsort(bounds, stable=True)
    changes = tf.concat([tf.ones([number], tf.int32), -tf.ones([number], tf.int32)], 0)
    open_ones = tf.cumsum(tf.gather(changes, order))
    bounds = tf.gather(bounds, order)
    lengths = bounds[1:] - bounds[:-1]
    return tf.reduce_sum(tf.where(open_ones[:-1] > 0, lengths, tf.zeros_like(lengths)))
