"""How many samples fit into memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tfbig import _integers, errors
from tfbig._keras import memory, sharded_variable
from tfbig._update import accumulators

__all__ = (
    "RUN_ERRORS",
    "Capacity",
    "checked_budget",
    "does_not_fit",
    "first_line",
    "is_out_of_memory",
)

# What a program may raise when memory runs out; it may have other reasons.
RUN_ERRORS = (tf.errors.OpError, MemoryError)

# The part of the budget, or of the samples that fit, to use: memory fragments, and other batches
# may need more than the one that was tried.
MARGIN = 0.9

# Part of the host's memory that CPU devices may take without a budget.
_PART_OF_HOST = 0.5

# Runs a number of samples, on the first replica alone or on all; what it returns is not used.
_Run: TypeAlias = Callable[[int, bool], object]

_REMEDY = (
    "Try recompute=True, a half precision policy, an optimizer with fewer variables, or a smaller "
    "model."
)


def checked_budget(value: object) -> int | None:
    """Returns the option `memory_budget`, checked."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _integers.checked(
        "memory_budget", value, "Pass the bytes that a replica may take, such as 8 * 2**30."
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of `RUN_ERRORS` says that memory ran out."""
    # Libraries below TensorFlow have their own ways to say it, and so has Python.
    return isinstance(error, tf.errors.ResourceExhaustedError | MemoryError) or (
        isinstance(error, tf.errors.InternalError | tf.errors.UnknownError)
        and any(s in str(error).lower() for s in ("out of memory", "out_of_memory"))
    )


def first_line(error: Exception) -> str:
    """The line of an error that says what happened."""
    text = getattr(error, "message", None) or str(error)
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    told = [x for x in lines if "oom" in x.lower() or "memory" in x.lower()]
    return (told or lines or ["out of memory"])[0][:200]


def does_not_fit(reason: str) -> str:
    """The error message when not even one sample fits."""
    return f"A micro-batch of one sample does not fit into memory: {reason}. {_REMEDY}"


class Capacity:
    """Finds how many samples of a computation fit into the memory of devices.

    Args:
        devices: names, those of the replicas of this process.
        memory_budget: bytes of a replica; or None: until TensorFlow says that memory is
            exhausted, or on the CPU, which does not, a part of what the host has.
    """

    def __init__(self, devices: Sequence[str], memory_budget: int | None) -> None:
        self.meter = memory.Meter(devices)
        # Replicas that share memory may or may not peak at the same time, so what one of them takes
        # is measured while the others are idle.
        self.is_shared = self.meter.is_cpu and len(devices) > 1
        self.memory_budget = memory_budget
        self.budget: float | None = memory_budget
        if memory_budget is None and self.meter.is_cpu:
            host = memory.available()
            self.budget = None if host is None else _PART_OF_HOST * host / len(devices)
        self.reason = ""

    def largest(self, model: keras.Model, run: _Run, most: int, warm_up: bool = False) -> int:
        """The number of samples to run, less a margin; at most `most`, if all of it fits.

        Args:
            model: a built model, with its optimizer.
            run: function of a number of samples and of whether the first replica runs them
                alone, which raises an error of TensorFlow where memory runs out.
            most: the most that is wanted.
            warm_up: whether the first run with each number takes memory of its own.

        Raises:
            OutOfMemoryError: If not one sample fits.
        """
        fixed = self._fixed(model)

        def fits(size: int) -> bool:
            return self._fits(functools.partial(run, size), fixed, warm_up or size == 1)

        good, size = 0, 1
        while good < most and fits(size):
            good, size = size, min(2 * size, most)
        if good == most:
            return most
        if good == 0:
            raise errors.OutOfMemoryError(does_not_fit(self.reason))
        bad = size
        while bad - good > max(1, good // 16):
            size = (good + bad) // 2
            good, bad = (size, bad) if fits(size) else (good, size)
        return good if self.budget is not None else max(1, math.floor(MARGIN * good))

    def _fits(self, run: Callable[[bool], object], fixed: int, warm_up: bool) -> bool:
        try:
            if self.budget is None or self.is_shared:
                run(False)
            if self.budget is None:
                return True
            if warm_up:
                run(self.is_shared)
            needed = fixed + self.meter(lambda: run(self.is_shared))
        except RUN_ERRORS as e:
            if not is_out_of_memory(e):
                raise
            self.reason = first_line(e)
            return False
        missing = needed - MARGIN * self.budget
        self.reason = (
            f"it takes {memory.readable(needed)}, of which variables {memory.readable(fixed)}; "
            f"the budget is {memory.readable(self.budget)}, of which a tenth is kept free, so "
            f"{memory.readable(missing)} are missing"
        )
        return bool(missing <= 0)

    def _fixed(self, model: keras.Model) -> int:
        """Bytes of variables, with a budget; refuses one that does not hold the model itself."""
        if self.memory_budget is None:
            return 0
        fixed: int = sharded_variable.bytes_on_a_replica(
            [*model.variables, *model.optimizer.variables], model.distribute_strategy
        )
        # The sums of gradients, and those of a micro-batch.
        gradients = 2 * accumulators.size_of(model.trainable_variables)
        if fixed + gradients > self.memory_budget:
            raise errors.OutOfMemoryError(
                "`memory_budget` must hold the model itself. Received: memory_budget="
                f"{self.memory_budget} ({memory.readable(self.memory_budget)}); variables of "
                f"model and optimizer take {memory.readable(fixed)}, gradients "
                f"{memory.readable(gradients)}. {_REMEDY}"
            )
        return fixed
