"""`micro_batch_size="auto"`: the largest micro-batch that fits, and a smaller one when it does not.

An update is two programs here. The first accumulates gradients; it assigns nothing, so it can
run on any number of samples to see whether they fit, and again in smaller micro-batches when
memory runs out. The second exchanges and applies what the first returned.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

import tensorflow as tf

from tfbig import _keras, _log, _types, errors
from tfbig._keras import memory
from tfbig._update import capacity, exchange, fit_context, replicas, retried_batches
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.batch_split import BatchSplit
from tfbig._update.micro_batches import MicroBatches
from tfbig._update.train_step import TrainStep
from tfbig.distribute import _workers

_T = TypeVar("_T")

# Tensors, or the values of all replicas.
_Distributed: TypeAlias = _types.Structure

__all__ = ("AutomaticSize", "TrainFunction")

# With a budget, the search starts again when a sample is larger by this factor.
_LARGER = 1.1

# How many samples fit, by what that depends on: the computation, how many there were to try, and
# the bytes of a sample.
_chosen: dict[tuple[str, int, float], int] = {}


@dataclasses.dataclass
class AutomaticSize:
    """The micro-batch size of a model, found while it trains.

    Attributes:
        size: samples per replica and forward pass; None before it is found.
        tried: how many samples of a replica there were to try. If all of them fitted,
            `size` is as large, and nothing is known about more.
        share: samples of a replica's share of the effective batch; None if only the batches
            tell.
        needs_two: whether a share of several samples must be at least two micro-batches.
        fitted: numbers of samples that fit, each with the bytes of a sample.
        computation: what else the size depends on, see `TrainFunction`.
    """

    size: int | None = None
    tried: int = 0
    share: int | None = None
    needs_two: bool = False
    fitted: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    computation: str = ""

    @property
    def split(self) -> BatchSplit:
        """How a batch is split now; before the size is found, not at all."""
        if self.size is None:
            return BatchSplit(gradient_accumulation_steps=1)
        return BatchSplit(micro_batch_size=self.size)

    @property
    def is_bound(self) -> bool:
        """Whether `size` is known to be the most that fits."""
        return self.size is not None and self.size < self.tried

    @property
    def may_grow(self) -> bool:
        """Whether all samples that were tried fitted, and a batch may hold more."""
        return not self.is_bound and (self.share is None or self.wanted(self.share) > self.tried)

    def begin(self, share: int | None, needs_two: bool = False) -> None:
        """Tells of training on shares of so many samples; None if that is not known."""
        self.share, self.needs_two = share, needs_two
        if needs_two and share and self.size and self.size > self.wanted(share):
            self.forget()

    def wanted(self, samples: int) -> int:
        """The largest micro-batch that makes sense for so many samples."""
        return -(-samples // 2) if self.needs_two else samples

    def forget(self) -> None:
        """Forgets what was found, which no longer holds."""
        self.size, self.tried, self.fitted = None, 0, []

    def fits(self, samples: int, sample_bytes: float) -> bool:
        """Whether so many samples of this size are known to fit."""
        return any(samples <= n and sample_bytes <= _LARGER * b for n, b in self.fitted)

    def most(self, samples: int) -> int:
        """How many of a batch's samples to try at most."""
        used = min(samples, self.size or 0)
        return max(1, used if self.is_bound else max(used, self.wanted(samples)))

    def after(self, found: int, most: int) -> tuple[int, int]:
        """`size` and `tried`, once `found` of `most` samples fit."""
        # Fewer samples than before may all fit and say nothing about more.
        return found if found < most else max(most, self.size or 0), max(most, self.tried)


class _RanOutError(Exception):
    """Memory ran out on this worker or another; the text says where."""


class TrainFunction:
    """Trains with a micro-batch size that it finds, and reduces when memory runs out.

    Args:
        model: the model.
        automatic: its micro-batch size.
        memory_budget: bytes of a replica, or None.
    """

    def __init__(
        self, model: TrainStep, automatic: AutomaticSize, memory_budget: int | None
    ) -> None:
        self.model = model
        self.automatic = automatic
        self.strategy = model.distribute_strategy
        self.workers = _workers.Workers.of(self.strategy)
        self.devices = _keras.devices.devices_of(self.strategy)
        self.capacity = capacity.Capacity(self.devices, memory_budget)
        # Of the last trace; its tensors are those of the program that accumulates.
        self.local_gradients: AccumulatedGradients | None = None
        # Whether losses have denominators to count; known after the first update.
        self.has_counts = True
        # A new one is made when a model is compiled, and when most options change.
        computation = self._computation()
        if automatic.computation != computation:
            automatic.forget()
            automatic.computation = computation
        self._sum = self._program(self._all_reduce)
        self._apply = self._program(self._apply_program)
        self._make_programs()

    def __call__(self, iterator: Iterator[_Distributed]) -> _types.Logs:
        """Makes `steps_per_execution` updates; returns the logs of the last."""
        with _keras.start.starting_well(self.model):
            return _keras.step_function.run_batches(self.model, iterator, self.update)

    def update(self, data: _Distributed) -> _types.Logs:
        """One update with one effective batch; returns its logs."""
        if self._is_new(data):
            self._choose(data)
        return retried_batches.run_until_done(
            self.model.loss_scale_state, lambda: self._update_once(data)
        )

    def _update_once(self, data: _Distributed) -> _types.Logs:
        while True:
            try:
                tensors = self._accumulated(data)
                break
            except _RanOutError as e:
                reason = str(e)
            self._halve(data, reason)
        try:
            logs: _types.Logs = self._apply(tensors)
        except capacity.RUN_ERRORS as e:
            if not capacity.is_out_of_memory(e):
                raise
            raise errors.OutOfMemoryError(
                "Memory ran out while the optimizer was applied. Smaller micro-batches do not "
                "help there, and some variables may have changed already. Resume from a backup "
                "on devices with more memory or, with several replicas, with shard='optimizer'. "
                "An optimizer with fewer variables needs a new run. TensorFlow says: "
                f"{capacity.first_line(e)}"
            ) from e
        return logs

    def _accumulated(self, data: _Distributed) -> _Distributed:
        """What the replicas of this process accumulated, as tensors."""
        if self.workers.count == 1:
            return self._together(lambda: self._accumulate(data))
        # Programs that exchange run only after all workers have passed where memory may run out.
        counts = None
        if self.has_counts:
            counts = self._together(lambda: self._count(data))
            self.has_counts = counts is not None
        return self._together(lambda: self._accumulate(data, counts))

    def _together(self, run: Callable[[], _T]) -> _T:
        """Runs a program; where memory runs out on one worker, all raise `_RanOutError`."""
        reason = None
        try:
            result = run()
        except capacity.RUN_ERRORS as e:
            if not capacity.is_out_of_memory(e):
                raise
            reason = capacity.first_line(e)
        if self._any(reason is not None):
            raise _RanOutError(reason or "on another worker")
        return result

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker."""
        return bool(self._sum(tf.constant(float(flag))) > 0) if self.workers.count > 1 else flag

    def _halve(self, data: _Distributed, reason: str) -> None:
        samples, _ = self._samples_of(data)
        answers = self.workers.exchange("the samples of a batch", str(samples))
        most = max(map(int, answers))
        size = min(self.automatic.size or most, most)
        if size == 1:
            raise errors.OutOfMemoryError(capacity.does_not_fit(reason))
        self._set(size // 2)
        for key, fitted in _chosen.items():
            if key[0] == self.automatic.computation:
                _chosen[key] = min(fitted, size // 2)
        self._say(
            f"memory ran out with micro-batches of {size} samples; continuing with {size // 2} "
            f"({reason})"
        )

    def _set(self, size: int) -> None:
        self.automatic.size = size
        self._make_programs()
        # Evaluation takes no more samples at a time than training.
        self.model.test_function = None

    def _say(self, text: str) -> None:
        if self.workers.is_chief:
            _log.logger().info("tfbig: %s", text)

    # --- What runs on the devices ---------------------------------------------

    def _program(self, function: _types.AnyFunction) -> _types.AnyFunction:
        if self.model.run_eagerly:
            return function
        function = _keras.step_function.counting_traces(self.model, function)
        program: _types.AnyFunction = tf.function(function, reduce_retracing=True, autograph=False)
        return program

    def _make_programs(self) -> None:
        """Makes the programs that are traced with the size."""
        self._count = self._program(self._count_program)
        self._accumulate = self._program(self._accumulate_program)

    def _run(
        self, step: _types.AnyFunction, data: _Distributed, *args: _Distributed
    ) -> _Distributed:
        is_cut = _keras.batches.is_distributed(data)

        def on_replica(data: _types.Structure, *args: _types.Structure) -> _types.Structure:
            data = _keras.batches.without_optionals(data)
            return step(data if is_cut else _keras.replica_step.share_of_replica(data), *args)

        return self.strategy.run(on_replica, args=(data, *args))

    def _micro_batches(self, data: _types.Structure, split: BatchSplit) -> MicroBatches:
        return self.model._micro_batches(data, split, training=True)

    def _count_program(self, data: _Distributed) -> _Distributed:
        return self._run(lambda d: self._micro_batches(d, self.automatic.split).counts(), data)

    def _accumulate_program(
        self, data: _Distributed, counts: _Distributed | None = None
    ) -> _Distributed:
        def step(data: _types.Structure, counts: _types.Tensor | None) -> list[_types.Tensor]:
            micro_batches = self._micro_batches(data, self.automatic.split)
            if self.workers.count > 1:
                counts = exchange.all_reduce_counts(counts)
            else:
                counts = micro_batches.exchanged_counts()
            # Its tensors go to the program that applies them, the rest stays here.
            self.local_gradients = self.model._accumulate(micro_batches, counts)
            return self.local_gradients.tensors()

        return self._run(step, data, counts)

    def _probe_program(
        self, data: _Distributed, size: _types.Tensor, is_alone: bool
    ) -> _Distributed:
        def step(data: _types.Structure) -> list[_types.Tensor]:
            samples = tf.minimum(size, _keras.batches.batch_size(data))
            if is_alone:
                replica = tf.distribute.get_replica_context().replica_id_in_sync_group
                samples = tf.where(replica % len(self.devices) == 0, samples, 0)
            data = _keras.batches.slice_samples(data, 0, samples)
            # As one micro-batch of several; nothing is exchanged.
            micro_batches = self._micro_batches(data, BatchSplit(micro_batch_size=2**30))
            return self.model._accumulate(micro_batches, micro_batches.counts()).tensors()

        return self._run(step, data)

    def _apply_program(self, tensors: _Distributed) -> _types.Logs:
        local_gradients = self.local_gradients
        assert local_gradients is not None

        @_keras.replica_step.returns_global_logs
        def step(tensors: list[_types.Tensor]) -> _types.Logs:
            return self.model._exchange_and_apply(local_gradients.with_tensors(tensors))

        logs: _types.Logs = _keras.replica_step.run(self.model, step, tensors, is_share=True)
        return logs

    def _all_reduce(self, value: _types.Tensor) -> _types.Tensor:
        def step(value: _types.Tensor) -> _types.Tensor:
            return replicas.all_reduce_sum([value])[0]

        return self.strategy.experimental_local_results(self.strategy.run(step, args=(value,)))[0]

    # --- The size ---------------------------------------------------------------

    def _is_new(self, data: _Distributed) -> bool:
        """Whether a size must be found for this batch."""
        automatic, has_budget = self.automatic, self.capacity.budget is not None
        if automatic.size is None:
            return True
        if not (automatic.may_grow or has_budget):
            return False
        samples, sample_bytes = self._samples_of(data)
        is_larger = automatic.may_grow and automatic.wanted(samples) > automatic.tried
        # Only with a budget: without one, devices tell when memory runs out.
        is_unknown = has_budget and not automatic.fits(min(samples, automatic.size), sample_bytes)
        return self._any(is_larger or is_unknown)

    def _samples_of(self, data: _Distributed) -> tuple[int, float]:
        """The most samples that a replica of this process has, and the most bytes of one."""
        samples, sizes = 0, []
        for part in self._local_parts(data):
            n = int(_keras.batches.batch_size(part))
            samples = max(samples, n)
            size = memory.size_of(tf.nest.flatten(part, expand_composites=True))
            sizes.append(size / max(1, n))
        if not _keras.batches.is_distributed(data):
            samples = -(-samples // self.strategy.num_replicas_in_sync)
        return samples, max(sizes)

    def _local_parts(self, data: _Distributed) -> list[_types.Structure]:
        data = _keras.batches.without_optionals(data)
        leaves = [self.strategy.experimental_local_results(v) for v in tf.nest.flatten(data)]
        return [tf.nest.pack_sequence_as(data, part) for part in zip(*leaves, strict=True)]

    def _computation(self) -> str:
        """What the memory depends on besides the samples."""
        model = self.model
        layers = _keras.layers.all_layers(model)
        return json.dumps(
            {
                "model": type(model).__name__,
                "layers": fit_context.described(layers),
                "dtypes": [(x.compute_dtype, x.variable_dtype) for x in layers],
                "variables": [
                    (v.shape, v.dtype, v.trainable)
                    for v in (*model.variables, *model.optimizer.variables)
                ],
                "loss": _keras.saving.compile_settings(model).get("loss"),
                "options": model._options(),
                "jit_compile": self._is_compiled(),
                "devices": self.devices,
            },
            default=str,
            sort_keys=True,
        )

    def _is_compiled(self) -> bool:
        """Whether XLA compiles the micro-batches, or may do so."""
        return bool(self.model.jit_compile) or self.model._may_compile_each_micro_batch()

    def _choose(self, data: _Distributed) -> None:
        """Finds a size; the same on all workers."""
        automatic = self.automatic
        samples, sample_bytes = self._samples_of(data)
        most = automatic.most(samples)
        key = automatic.computation, most, sample_bytes
        try:
            found, why = _chosen.get(key) or self._find(data, most), None
        except errors.OutOfMemoryError as e:
            found, why = 0, str(e)
        after = automatic.after(found, most)
        answers = self.workers.exchange("a micro-batch size", json.dumps([*after, why]))
        sizes, tried, reasons = zip(*map(json.loads, answers), strict=True)
        if min(sizes) == 0:
            raise errors.OutOfMemoryError(next(r for r in reasons if r))
        _chosen[key] = found
        automatic.fitted.append((found, sample_bytes))
        automatic.tried = min(tried)
        if min(sizes) != automatic.size:
            self._set(min(sizes))
            self._say(
                f"micro_batch_size='auto' is {min(sizes)} samples of the {samples} of a replica"
            )

    def _find(self, data: _Distributed, most: int) -> int:
        """The largest size that fits on the devices of this process, at most `most`."""
        probe = self._program(self._probe_program)
        return self.capacity.largest(
            self.model,
            # As a tensor: a replica without samples must trace what the others do.
            lambda size, alone: probe(data, tf.constant(size), alone),
            most,
            # XLA compiles for each size.
            warm_up=self._is_compiled(),
        )
