"""`micro_batch_size="auto"`: the largest micro-batch that fits, and what to do when it does not.

An update is two programs here. The first accumulates gradients; it assigns nothing, so it can
run on any number of samples to see whether they fit, and again in smaller micro-batches when
memory runs out. The second exchanges and applies what the first returned.
"""

import dataclasses
import json
import time
from typing import Any

import tensorflow as tf

from tfbig import _keras, _log, errors
from tfbig._keras import memory
from tfbig._update import batch_split, capacity, exchange, fit_context
from tfbig.distribute import _workers

__all__ = ("AutomaticSize", "TrainFunction")

# With a budget, sizes are looked for anew when a sample is larger by this factor.
_LARGER = 1.1

# How many samples fit, by all that it depends on: the computation, how many were there to be
# tried, and how large they are.
_chosen: dict[tuple[str, int, float], int] = {}


@dataclasses.dataclass
class AutomaticSize:
    """The micro-batch size of a model, to be found.

    Attributes:
        size: int, samples per replica and forward pass; None before it is found.
        tried: int, samples of a replica that were there to be tried. If all of them fitted,
            `size` is as large, and nothing is known about more.
        share: int, samples of a replica's share of the effective batch; None if only the batches
            tell.
        needs_two: bool, whether a share must be two micro-batches at least, if it can.
        fitted: list of numbers of samples that fit, each with the bytes of a sample.
        computation: str, what else it was found for.
    """

    size: int | None = None
    tried: int = 0
    share: int | None = None
    needs_two: bool = False
    fitted: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    computation: str = ""

    @property
    def split(self):
        """The `BatchSplit` that holds now; before the size is found, none."""
        if self.size is None:
            return batch_split.BatchSplit(gradient_accumulation_steps=1)
        return batch_split.BatchSplit(micro_batch_size=self.size)

    @property
    def is_bound(self):
        """Whether more samples than `size` do not fit, as far as is known."""
        return self.size is not None and self.size < self.tried

    @property
    def may_grow(self):
        """Whether a batch of this share may hold more samples than were tried, and all fitted."""
        return not self.is_bound and (self.share is None or self.wanted(self.share) > self.tried)

    def begin(self, share, needs_two=False):
        """Training on shares of so many samples begins; None if that is not known."""
        self.share, self.needs_two = share, needs_two
        if needs_two and share and self.size and self.size > self.wanted(share):
            self.forget()

    def wanted(self, samples):
        """The largest micro-batch that is wanted for so many samples."""
        return -(-samples // 2) if self.needs_two else samples

    def forget(self):
        """What was found holds no more."""
        self.size, self.tried, self.fitted = None, 0, []

    def fits(self, samples, sample_bytes):
        """Whether so many samples of this size are known to fit."""
        return any(samples <= n and sample_bytes <= _LARGER * b for n, b in self.fitted)

    def most(self, samples):
        """How many of a batch's samples to try."""
        used = min(samples, self.size or 0)
        return max(1, used if self.is_bound else max(used, self.wanted(samples)))

    def after(self, found, most):
        """`size` and `tried`, once `found` of `most` samples fit."""
        # Fewer samples than before may all fit and say nothing about more.
        return found if found < most else max(most, self.size or 0), max(most, self.tried)


class _RanOutError(Exception):
    """Memory ran out on this worker or another; the text says where."""


class TrainFunction:
    """One update at a time, with a micro-batch size that is found and may shrink.

    Args:
        model: `keras.Model` with the halves of `TrainStep`.
        automatic: `AutomaticSize`.
        memory_budget: int, bytes of a replica, or None.
    """

    def __init__(self, model, automatic, memory_budget):
        self.model = model
        self.automatic = automatic
        self.strategy = model.distribute_strategy
        self.workers = _workers.Workers.of(self.strategy)
        self.devices = _keras.devices.devices_of(self.strategy)
        self.capacity = capacity.Capacity(self.devices, memory_budget)
        self.share: Any = None
        # Whether losses have denominators that are counted; known after the first time.
        self.has_counts = True
        # Compiling a model, and most options, make this anew.
        computation = self._computation()
        if automatic.computation != computation:
            automatic.forget()
            automatic.computation = computation
        self._sum = self._program(self._all_reduce)
        self._apply = self._program(self._apply_program)
        self._make_programs()

    def __call__(self, iterator):
        """As many updates as Keras wants at a time; returns the logs of the last."""
        logs, waited = None, 0.0
        for _ in range(self.model.steps_per_execution):
            begin = time.perf_counter()
            try:
                data = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if logs is None:
                    raise
                break
            waited += time.perf_counter() - begin
            logs = self.update(data)
        if self.model.input_clock is not None:
            self.model.input_clock.add(waited)
        return logs

    def update(self, data):
        """One update with one effective batch; returns its logs."""
        if self._is_new(data):
            self._choose(data)
        while True:
            try:
                tensors = self._accumulated(data)
                break
            except _RanOutError as e:
                reason = str(e)
            self._halve(data, reason)
        try:
            return self._apply(tensors)
        except capacity.RUN_ERRORS as e:
            if not capacity.is_out_of_memory(e):
                raise
            raise errors.OutOfMemoryError(
                "Memory ran out while the optimizer was applied, where smaller micro-batches do "
                "not help and variables may be changed in part. Go on from a backup, with an "
                f"optimizer of fewer variables. TensorFlow says: {capacity.first_line(e)}"
            ) from e

    def _accumulated(self, data):
        """Gradients and all else of this process's replicas, as tensors."""
        if self.workers.count == 1:
            return self._together(lambda: self._accumulate(data))
        # Programs that exchange run only once all workers are past where memory may run out.
        counts = None
        if self.has_counts:
            counts = self._together(lambda: self._count(data))
            self.has_counts = counts is not None
        return self._together(lambda: self._accumulate(data, counts))

    def _together(self, run):
        """Runs a program; where memory runs out on one worker, all raise `_RanOutError`."""
        result = reason = None
        try:
            result = run()
        except capacity.RUN_ERRORS as e:
            if not capacity.is_out_of_memory(e):
                raise
            reason = capacity.first_line(e)
        if self._any(reason is not None):
            raise _RanOutError(reason or "on another worker")
        return result

    def _any(self, flag):
        """Whether the flag is set on any worker."""
        return self._sum(tf.constant(float(flag))) > 0 if self.workers.count > 1 else flag

    def _halve(self, data, reason):
        samples, _ = self._samples_of(data)
        answers = self.workers.exchange("the samples of a batch", str(samples))
        size = min(self.automatic.size, max(map(int, answers)))
        if size == 1:
            raise errors.OutOfMemoryError(capacity.does_not_fit(reason))
        self._set(size // 2)
        for key, fitted in _chosen.items():
            if key[0] == self.automatic.computation:
                _chosen[key] = min(fitted, size // 2)
        self._say(
            f"memory ran out with micro-batches of {size} samples; goes on with {size // 2} "
            f"({reason})"
        )

    def _set(self, size):
        self.automatic.size = size
        self._make_programs()
        # Evaluation takes no more samples at a time.
        self.model.test_function = None

    def _say(self, text):
        if self.workers.is_chief:
            _log.logger().info("tfbig: %s", text)

    # --- What runs on the devices ---------------------------------------------

    def _program(self, function):
        if self.model.run_eagerly:
            return function
        return tf.function(function, reduce_retracing=True, autograph=False)

    def _make_programs(self):
        """Those that are traced with the size."""
        self._count = self._program(self._count_program)
        self._accumulate = self._program(self._accumulate_program)

    def _run(self, step, data, *args):
        is_cut = _keras.trainer.is_placed(data)

        def on_replica(data, *args):
            data = _keras.data.without_optionals(data)
            return step(data if is_cut else self.model._share_of_replica(data), *args)

        return self.strategy.run(on_replica, args=(data, *args))

    def _count_program(self, data):
        return self._run(lambda d: self.model._counts(d, self.automatic.split), data)

    def _accumulate_program(self, data, counts=None):
        def step(data, counts):
            split, exchanged = self.automatic.split, {}
            if self.workers.count > 1:
                exchanged = {"counts": exchange.exchange_counts(counts)}
            # Its tensors go to the other program, the rest stays here.
            self.share = self.model._accumulate(data, split, **exchanged)
            return self.share.tensors()

        return self._run(step, data, counts)

    def _probe_program(self, data, size, is_alone):
        def step(data):
            samples = tf.minimum(size, _keras.data.batch_size(data))
            if is_alone:
                replica = tf.distribute.get_replica_context().replica_id_in_sync_group
                samples = tf.where(replica % len(self.devices) == 0, samples, 0)
            data = _keras.data.samples_of(data, 0, samples)
            # As one micro-batch of several; nothing is exchanged.
            split = batch_split.BatchSplit(micro_batch_size=2**30)
            counts = self.model._counts(data, split)
            return self.model._accumulate(data, split, counts=counts).tensors()

        return self._run(step, data)

    def _apply_program(self, tensors):
        @_keras.trainer.returns_global_logs
        def step(tensors):
            return self.model._apply(self.share.with_tensors(tensors))

        return self.model._global_logs(step, tensors, is_share=True)

    def _all_reduce(self, value):
        def step(value):
            return exchange.all_reduce_sum([value])[0]

        return self.strategy.experimental_local_results(self.strategy.run(step, args=(value,)))[0]

    # --- The size ---------------------------------------------------------------

    def _is_new(self, data):
        """Whether a size must be found for this batch."""
        automatic, has_budget = self.automatic, self.capacity.budget is not None
        if automatic.size is None:
            return True
        if not (automatic.may_grow or has_budget):
            return False
        samples, sample_bytes = self._samples_of(data)
        is_larger = automatic.may_grow and automatic.wanted(samples) > automatic.tried
        # Only with a budget: devices say themselves when memory runs out.
        is_unknown = has_budget and not automatic.fits(min(samples, automatic.size), sample_bytes)
        return self._any(is_larger or is_unknown)

    def _samples_of(self, data):
        """The most samples of a replica of this process, and the bytes of one, at most."""
        samples, sizes = 0, []
        for part in self._local_parts(data):
            n = int(_keras.data.batch_size(part))
            samples = max(samples, n)
            size = memory.size_of(tf.nest.flatten(part, expand_composites=True))
            sizes.append(size / max(1, n))
        if not _keras.trainer.is_placed(data):
            samples = -(-samples // self.strategy.num_replicas_in_sync)
        return samples, max(sizes)

    def _local_parts(self, data):
        data = _keras.data.without_optionals(data)
        leaves = [self.strategy.experimental_local_results(v) for v in tf.nest.flatten(data)]
        return [tf.nest.pack_sequence_as(data, part) for part in zip(*leaves, strict=True)]

    def _computation(self):
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
                "jit_compile": bool(model.jit_compile),
                "devices": self.devices,
            },
            default=str,
            sort_keys=True,
        )

    def _choose(self, data):
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

    def _find(self, data, most):
        """The largest size that fits on the devices of this process, at most `most`."""
        probe = self._program(self._probe_program)
        return self.capacity.largest(
            self.model,
            # As a tensor: a replica without samples must trace what the others do.
            lambda size, alone: probe(data, tf.constant(size), alone),
            most,
            # XLA compiles for each size.
            warm_up=bool(self.model.jit_compile),
        )
