"""Keras's loop of several steps fails under `MirroredStrategy`; this one has no nested function."""

import functools
import time
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfbig import _types
from tfbig._keras import replica_step, start
from tfbig._keras.batches import without_optionals
from tfbig._keras.input_clock import timed
from tfbig._keras.resized_batches import ResizedBatches


def run_batches(
    model: keras.Model,
    iterator: Iterator[_types.Structure],
    run: Callable[[_types.Structure], _types.Logs],
) -> _types.Logs:
    """Makes the updates of an execution one by one; returns the logs of the last.

    Args:
        model: the tfbig model that is trained.
        iterator: yields batches.
        run: makes an update with a batch, and returns its logs.
    """
    logs: _types.Logs | None = None
    waited, taken = 0.0, 0
    for _ in range(model.steps_per_execution):
        begin = time.perf_counter()
        try:
            data = next(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            if logs is None:
                raise
            break
        waited += time.perf_counter() - begin
        logs = run(data)
        taken += 1
    model.batches_of_execution = taken
    if model.input_clock is not None:
        model.input_clock.add(waited)
    return logs or {}


def counting_traces(model: keras.Model, function: _types.AnyFunction) -> _types.AnyFunction:
    """A function to be traced, which counts in `model.times_traced` how often it is."""

    @functools.wraps(function)
    def counted(*args: _types.Structure) -> _types.Structure:
        model.times_traced += 1
        return function(*args)

    return counted


def trace_without_running(
    model: keras.Model, step: _types.AnyFunction, dataset: _types.Dataset
) -> None:
    """Traces a step for the batches of a dataset; builds what it would build when it first runs.

    Args:
        model: the tfbig model that is trained.
        step: function of a replica's share of a batch.
        dataset: the dataset, which may be distributed.
    """

    def run(data: _types.Structure) -> _types.Structure:
        return replica_step.run(model, step, without_optionals(data))

    tf.function(run, autograph=False).get_concrete_function(dataset.element_spec)


class StepFunction:
    """What `model.train_function` or `model.test_function` is: runs steps on an iterator's data.

    Args:
        model: the tfbig model that is trained or evaluated.
        step: function of a replica's share of a batch, which returns logs.
        is_training: whether to count batches, and to measure how long it waits for data.
    """

    def __init__(
        self,
        model: keras.Model,
        step: Callable[[_types.Structure], _types.Structure],
        is_training: bool = False,
    ) -> None:
        self.model = model
        self.step = step
        self.is_training = is_training
        # Replicas gather the rows of an embedding's gradient. A loop of the graph needs their
        # number to stay the same, and a smaller last batch has fewer: then Python loops.
        replicas = model.distribute_strategy.num_replicas_in_sync
        gathers = is_training and replicas > 1 and model._has_embeddings()
        self._calls = model.steps_per_execution if gathers else 1
        is_loop = model.steps_per_execution > self._calls
        self._on_data = self._program(self._one_step)
        # The specification of batches that change in size, and the program that takes them.
        self._of_any_size: tuple[_types.Structure, _types.AnyFunction] = (None, self._on_data)
        self._on_iterator = self._program(self._many_steps if is_loop else self._one_step_of)

    def __call__(self, iterator: Iterator[_types.Structure]) -> _types.Structure:
        """Runs `steps_per_execution` steps, or until the data end; returns the logs of the last."""
        with start.starting_well(self.model):
            return self._run(iterator)

    def _run(self, iterator: Iterator[_types.Structure]) -> _types.Structure:
        if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            return self._run_on_iterator(iterator)
        if isinstance(iterator, ResizedBatches):
            return run_batches(self.model, iterator, self._program_for(iterator))
        steps = range(self.model.steps_per_execution)
        logs = [self._on_data(data) for _, data in zip(steps, iterator, strict=False)]
        if self.is_training:
            self.model.batches_of_execution = len(logs)
        return logs[-1]

    def _program(self, function: _types.AnyFunction) -> _types.AnyFunction:
        if self.model.run_eagerly:
            return function
        if self.is_training:
            function = counting_traces(self.model, function)
        program: _types.AnyFunction = tf.function(function, reduce_retracing=True, autograph=False)
        return program

    def _run_on_iterator(self, iterator: Iterator[_types.Structure]) -> _types.Structure:
        logs, waited, taken = self._on_iterator(iterator)
        for _ in range(self._calls - 1):
            try:
                logs, more_waited, more_taken = self._on_iterator(iterator)
            except tf.errors.OutOfRangeError:
                break
            waited += more_waited
            taken += more_taken
        if self.is_training:
            self.model.batches_of_execution = taken
            if self.model.input_clock is not None:
                self.model.input_clock.add(waited)
        return logs

    def _program_for(self, batches: Iterator[_types.Structure]) -> _types.AnyFunction:
        """The program for the batches of an iterator; of those that change in size, one for all."""
        if not isinstance(batches, ResizedBatches):
            return self._on_data
        if self._of_any_size[0] is not batches.specs:
            program = self._on_data
            if isinstance(program, tf.types.experimental.PolymorphicFunction):
                program = program.get_concrete_function(batches.specs)
            self._of_any_size = batches.specs, program
        return self._of_any_size[1]

    def _one_step(self, data: _types.Structure) -> _types.Structure:
        return replica_step.run(self.model, self.step, without_optionals(data))

    def _one_step_of(
        self, iterator: tf.data.Iterator
    ) -> tuple[_types.Structure, _types.Tensor, _types.Tensor]:
        data, waited = timed(iterator.get_next, self.is_training)
        return self._one_step(data), waited, tf.constant(1)

    def _many_steps(
        self, iterator: tf.data.Iterator
    ) -> tuple[_types.Structure, _types.Tensor, _types.Tensor]:
        """The logs of the last step, the seconds that all of them waited, and their number."""
        # An optional tells the end of the data: an exception would lose the logs of the steps
        # before it.
        data, waited = timed(iterator.get_next, self.is_training)
        logs = self._one_step(data)
        steps = self.model.steps_per_execution

        def more(
            step: _types.Tensor, _: _types.Tensor, upcoming: tf.experimental.Optional, *__: object
        ) -> _types.Tensor:
            return (step < steps) & upcoming.has_value()

        def next_step(
            step: _types.Tensor,
            waited: _types.Tensor,
            upcoming: tf.experimental.Optional,
            *_: object,
        ) -> _types.Structure:
            new = tf.nest.flatten(self._one_step(upcoming.get_value()))
            following, more_waited = tf.cond(
                step + 1 < steps,
                lambda: timed(iterator.get_next_as_optional, self.is_training),
                lambda: (upcoming, tf.zeros_like(waited)),
            )
            return (step + 1, waited + more_waited, following, *new)

        upcoming, more_waited = timed(iterator.get_next_as_optional, self.is_training)
        carried = (tf.constant(1), waited + more_waited, upcoming, *tf.nest.flatten(logs))
        taken, waited, _, *last = tf.while_loop(more, next_step, carried, parallel_iterations=1)
        return tf.nest.pack_sequence_as(logs, last), waited, taken
