"""A model that trains on one batch in several ways: whole, cut, and rounded otherwise."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy import typing as npt

from tfbig import _keras, _types
from tfbig._update import accumulators, inexact, sharded_state, train_step
from tfbig.equivalence import _deviations
from tfbig.equivalence._deviations import Arrays, root_mean_square
from tfbig.equivalence._report import Deviation

__all__ = ("Trainings",)

_Step: TypeAlias = Callable[[_types.Structure], _types.Structure]

# Updates after which weights and the optimizer's state are compared. The state first counts in the
# second.
UPDATES = 3


@dataclasses.dataclass(frozen=True)
class _FirstUpdate:
    """What one update computes: the loss, the gradients, and the new non-trainable variables."""

    loss: npt.NDArray[np.float64]
    gradients: Arrays
    state: Arrays


class _Gradients(keras.optimizers.Optimizer):  # type: ignore[misc]  # Keras has no types.
    """Keeps the gradients that it is given instead of applying them."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0, name="gradients")
        _keras.scaled_updates.ignore_rules(self)

    def build(self, variables: list[_types.KerasVariable]) -> None:
        super().build(variables)
        self.gradients = self.add_optimizer_variables(variables, "gradient")

    def update_step(
        self,
        gradient: _types.Gradient,
        variable: _types.KerasVariable,
        learning_rate: _types.Tensor,
    ) -> None:
        del learning_rate
        # The rows of a table become dense: those of one index are added up.
        gradient = tf.convert_to_tensor(gradient)
        self.assign(self.gradients[self._get_variable_index(variable)], gradient)


class Trainings:
    """Trains a model on one batch in several ways, each time from its present state."""

    def __init__(self, model: train_step.TrainStep, data: _types.Structure):
        self.model = model
        self.data = data
        self.strategy = model.distribute_strategy
        self.weights = model.trainable_variables
        metrics = {id(v) for v in model.metrics_variables}
        self.others = [v for v in model.non_trainable_variables if id(v) not in metrics]
        # Non-trainable variables that an update changes.
        self.state: list[_types.KerasVariable] = []
        # The loss of the whole batch is multiplied by it, so that half precision rounds alike.
        self.scale: float | None = None
        self._programs: dict[tuple[str, int], _Step] = {}
        # Paths of the weights whose gradient has rows.
        self.tables: set[str] = set()

    def deviations(self, tolerance: float, epsilon: float) -> list[Deviation]:
        """How far the cut batch is from the whole one.

        Args:
            tolerance: The relative deviation that counts as rounding.
            epsilon: The relative size of a rounding.
        """
        slots = [v for v in self.model.optimizer.variables if v.dtype.startswith(("float", "bf"))]
        before = _arrays(self.others)
        cut, whole = self._first(self._cut), self._first(self._whole)
        # What neither changes is not state of an update.
        changes = [
            i
            for i, old in enumerate(before)
            if any(np.any(x.state[i] != old) for x in (cut, whole))
        ]
        self.state = [self.others[i] for i in changes]
        weights = [v.path for v in self.weights]
        found = _deviations.of_values("loss", ["loss"], [whole.loss], [cut.loss], tolerance)
        found += _deviations.of_values(
            "gradient", weights, whole.gradients, cut.gradients, tolerance
        )
        found += _deviations.of_values(
            "state",
            [v.path for v in self.state],
            [whole.state[i] for i in changes],
            [cut.state[i] for i in changes],
            tolerance,
        )

        with sharded_state.undivided(self.model):
            of_whole = self._changes(slots, self._whole)
            of_rounded = self._changes(slots, self._whole, epsilon)
        of_cut = self._changes(slots, self._cut)
        of_weights, of_slots = zip(of_whole, of_cut, of_rounded, strict=True)
        found += _deviations.of_changes("weight", self.weights, *of_weights, tolerance)
        found += _deviations.of_changes("optimizer", slots, *of_slots, tolerance)
        return found

    def _first(self, step: _Step) -> _FirstUpdate:
        """What one update computes."""
        with self.strategy.scope():
            recorder = _Gradients()
            recorder.build(self.weights)
        with self._restored(), _keras.optimizer.temporary_optimizer(self.model, recorder):
            loss = self._train(step, 1)
            if step == self._cut and self.model.loss_scale_state is not None:
                # Nothing skips an update of the whole batch that overflows, so stay off the edge.
                self.scale = float(self.model.loss_scale_state.loss_scale.numpy()) / 16
            return _FirstUpdate(loss, _arrays(recorder.gradients), _arrays(self.others))

    def _changes(
        self, slots: list[_types.KerasVariable], step: _Step, epsilon: float | None = None
    ) -> list[Arrays]:
        """How far several updates move weights and slots, from weights moved by a rounding."""
        with self._restored():
            self._round_otherwise(epsilon)
            before = _arrays(self.weights), _arrays(slots)
            self._train(step, UPDATES)
            after = _arrays(self.weights), _arrays(slots)
        return [
            [np.subtract(b, a) for a, b in zip(*pair, strict=True)]
            for pair in zip(before, after, strict=True)
        ]

    def _round_otherwise(self, epsilon: float | None) -> None:
        """Moves each weight by a rounding of this relative size, if one is given."""
        if epsilon is None:
            return
        rng = np.random.default_rng(0)
        values = [
            v * (1 + epsilon * rng.uniform(-1, 1, np.shape(v))) for v in _arrays(self.weights)
        ]
        _keras.variables.assign_all(self.weights, values)

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """Restores everything that training changes."""
        model = self.model
        kept = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
        kept += model.seed_states.variables()
        for saved in (model.loss_scale_state, model.noise_scale_state):
            kept += [] if saved is None else saved.variables()
        kept = list({id(v): v for v in kept}.values())
        values = _keras.variables.values_of(kept)
        try:
            yield
        finally:
            _keras.variables.assign_all(kept, values)

    def _train(self, step: _Step, updates: int) -> npt.NDArray[np.float64]:
        """Makes `updates` updates; returns the loss of the last."""
        iterations = self.model.optimizer.iterations
        # Traced once for each optimizer.
        key = step.__name__, id(self.model.optimizer)
        if key not in self._programs:
            self._programs[key] = self.model._explained(self._program(step))
        function = self._programs[key]
        end = int(iterations.numpy()) + updates
        # A skipped update lowers the loss scale; too many in a row raise.
        while int(iterations.numpy()) < end:
            self.model.reset_metrics()
            loss = function(self.data)
        return np.asarray(loss, np.float64)

    def _program(self, step: _Step) -> _Step:
        if self.model.run_eagerly:
            return step
        program: _Step = tf.function(lambda d: step(d), autograph=False)
        return program

    def _on_replicas(self, step: _Step, data: _types.Structure) -> _types.Structure:
        """Runs a step on every replica with the whole batch; returns what the first one does."""
        return tf.nest.map_structure(
            lambda v: self.strategy.experimental_local_results(v)[0],
            self.strategy.run(step, args=(data,)),
        )

    def _cut(self, data: _types.Structure) -> _types.Tensor:
        """An update as `fit` makes it."""

        def step(data: _types.Structure) -> _types.Logs:
            with inexact.not_warned_of():
                return self.model.train_step(data)

        return _keras.replica_step.run(self.model, step, data)["loss"]

    def _whole(self, data: _types.Structure) -> _types.Tensor:
        """An update as plain Keras makes it; each replica makes the same."""
        model = self.model

        def step(data: _types.Structure) -> _types.Tensor:
            with (
                tf.GradientTape() as tape,
                _keras.losses.intercepted_losses(None),
                _keras.variables.VariableValues() as scope,
            ):
                loss = _keras.layers.forward(model, data, training=True)[0]
                scale = tf.cast(1.0 if self.scale is None else self.scale, loss.dtype)
                scaled_loss = loss * scale
            gradients = tape.gradient(
                scaled_loss, [_keras.variables.native(v) for v in self.weights]
            )
            self.tables |= {
                v.path
                for v, g in zip(self.weights, gradients, strict=True)
                if isinstance(g, tf.IndexedSlices)
            }
            gradients = [
                accumulators.map_values(lambda v: v / tf.cast(scale, v.dtype), g) for g in gradients
            ]
            with _keras.optimizer.without_exchange():
                model.optimizer.apply_gradients(zip(gradients, self.weights, strict=True))
            others = {id(v) for v in self.others}
            for variable in scope.assigned:
                if id(variable) in others:
                    _keras.variables.native(variable).assign(scope.get_current_value(variable))
            return loss

        return self._on_replicas(step, data)

    def couples_samples(self, tolerance: float) -> bool:
        """Whether the loss of a sample depends on which other samples are in the batch.

        If it does not, leaving the others out changes the gradient with respect to its outputs by
        a factor only, the denominator.
        """
        samples = int(_keras.batches.batch_size(self.data))
        parts = [(0, samples // 2), (samples // 2, samples - samples // 2)]
        if samples < 2:
            return False

        def gradients_of(batch: _types.Structure) -> list[_types.Tensor]:
            x, y, y_pred, sample_weight = batch
            outputs = [v for v in tf.nest.flatten(y_pred) if v.dtype.is_floating]
            with tf.GradientTape() as tape:
                tape.watch(outputs)
                loss = self.model._compute_loss(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
            gradients: list[_types.Tensor] = tape.gradient(
                loss, outputs, unconnected_gradients="zero"
            )
            return gradients

        def step(data: _types.Structure) -> _types.Structure:
            with _keras.losses.intercepted_losses(None), _keras.variables.VariableValues():
                batch = _keras.layers.forward(self.model, data, training=False)[1:]
                whole = gradients_of(batch)
                apart = [gradients_of(_keras.batches.slice_samples(batch, *part)) for part in parts]
            return [[g[begin : begin + size] for g in whole] for begin, size in parts], apart

        together, apart = self._program(lambda data: self._on_replicas(step, data))(self.data)
        pairs = zip(*(map(_array_of, tf.nest.flatten(x)) for x in (together, apart)), strict=True)
        return any(not _are_proportional(a, b, 10 * tolerance) for a, b in pairs)


def _are_proportional(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], tolerance: float
) -> bool:
    """Whether `a` is a multiple of `b`."""
    factor = np.sum(a * b) / max(np.sum(b * b), np.finfo(np.float64).tiny)
    return root_mean_square(a - factor * b) <= tolerance * root_mean_square(a)


def _array_of(tensor: _types.Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(tensor, np.float64)


def _arrays(variables: list[_types.KerasVariable]) -> Arrays:
    return [np.asarray(v, np.float64) for v in _keras.variables.values_of(variables)]
