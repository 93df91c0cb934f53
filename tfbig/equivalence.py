"""`check_equivalence`: is a user's own model cut without changing the update?"""

import contextlib
import dataclasses

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, errors
from tfbig._update import accumulators, train_step

__all__ = ("EquivalenceReport", "check_equivalence")

# Relative deviations that the order of sums explains, with a margin: about a
# thousand roundings in float32 and float64, a few dozen in the half precisions,
# where each rounding weighs more.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}

# Distance from one to the next number.
EPSILONS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# How much further apart than two trainings that differ by rounding, the cut one may be: it adds
# up in another order throughout.
MARGIN = 30

# Updates after which weights and the optimizer's state are compared. The second is the first in
# which the state counts.
UPDATES = 3

# Rows of a printed report.
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far something of the cut batch is from that of the whole batch.

    Attributes:
        name: str, path of the variable; "loss" for the loss.
        kind: str, "loss", "gradient" or "state" after one update; "weight" or "optimizer" after
            a few.
        absolute: float, largest absolute deviation.
        relative: float. Of a loss, gradient or state `absolute` by the largest absolute value of
            the whole batch's. Of a weight or of the optimizer's state the root mean square
            deviation by that of its change. What is divided by is at least a thousandth of the
            largest of that kind, so that a gradient of nothing but rounding is not compared with
            itself.
        allowed: float, the relative deviation that rounding explains.
    """

    name: str
    kind: str
    absolute: float
    relative: float
    allowed: float

    @property
    def is_rounding(self):
        """Whether rounding explains it."""
        return self.relative <= self.allowed


@dataclasses.dataclass(frozen=True)
class EquivalenceReport:
    """What `check_equivalence` found. Prints as a table.

    Attributes:
        deviations: list of `Deviation`: those beyond rounding before others, those of the first
            update before those of a few, larger ones before smaller.
        causes: list of str, what makes the model inexact, likeliest first; empty
            if it is exact.
        notes: list of str, what could make it inexact but did not here.
        tolerance: float, the relative deviation that counts as rounding in gradients.
        cut: str, how the batch was cut.
    """

    deviations: list
    causes: list
    notes: list
    tolerance: float
    cut: str

    @property
    def is_equivalent(self):
        """Whether rounding explains all deviations."""
        return all(d.is_rounding for d in self.deviations)

    @property
    def largest(self):
        """The first `Deviation`: of those beyond rounding, the largest in the first update."""
        return self.deviations[0]

    def __str__(self):
        shown = self.deviations[: max(_SHOWN, sum(not d.is_rounding for d in self.deviations))]
        width = max(len(d.name) for d in shown)
        verdict = "equivalent" if self.is_equivalent else "NOT equivalent"
        lines = [
            f"Whole batch and cut batch are {verdict}: {self.cut}.",
            f"{'variable':<{width}}  {'what':<9}  {'absolute':>9}  {'relative':>9}  {'allowed':>9}",
        ]
        for d in shown:
            mark = "" if d.is_rounding else "  <--"
            lines.append(
                f"{d.name:<{width}}  {d.kind:<9}  {d.absolute:9.1e}  {d.relative:9.1e}  "
                f"{d.allowed:9.1e}{mark}"
            )
        if len(shown) < len(self.deviations):
            lines.append(f"... and {len(self.deviations) - len(shown)} more, all of them rounding")
        lines += [f"Cause: {c}" for c in self.causes] + [f"Note: {n}" for n in self.notes]
        return "\n".join(lines)


def check_equivalence(model, x, y=None, sample_weight=None, *, tolerance=None):
    """Compares a few updates of a model's whole batch with those of the cut batch.

    Trains for three updates as plain Keras does on one device, and as the model does with its
    micro-batches and replicas, each time from the weights that it has and with its own optimizer.
    Compares loss, gradients and the new values of non-trainable variables after the first update,
    weights and the optimizer's state after the last. The cut batch goes through the code that
    `fit` runs. The model is left as it is.

    Gradients show what an optimizer such as Adam hides: a factor. Weights and the optimizer's
    state show what gradients hide: which rows of a table it squares. An optimizer may make more
    of rounding than it is, which is measured: what weights that differ by a rounding come to.

    Args:
        model: A compiled model with tfbig's mixins and tfbig's `train_step`; not necessarily
            built.
        x: One batch of inputs, as for `train_on_batch`. Choose a size that
            neither the micro-batches nor the replicas divide. It must fit into
            the memory of one device as a whole.
        y: Targets.
        sample_weight: Sample weights.
        tolerance: float, the relative deviation that counts as rounding. Defaults
            to 1e-4 in float32, 1e-10 in float64, and 0.03 to 0.2 in half precision, where only
            large deviations show: check the model in float32 too.

    Returns:
        An `EquivalenceReport`.

    Raises:
        InvalidOptionError: If the model is not compiled or has no mixin, has a `train_step` of
            its own, or has not found its micro-batch size yet.
        LossScaleError: If no loss scale makes an update of finite gradients.

    Example:

    >>> model = tfbig.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()],
    ...     gradient_accumulation_steps=3,
    ... )
    >>> model.compile("sgd", "mse")
    >>> report = tfbig.check_equivalence(model, np.random.rand(10, 4), np.ones((10, 3)))
    >>> report.is_equivalent
    False
    >>> print(report.causes[0])
    BatchNormalization ('batch_normalization') normalizes each micro-batch with its own statistics.
    """
    _check_model(model)
    data = keras.tree.map_structure(_keras.data.as_tensor, (x, y, sample_weight))
    model._maybe_symbolic_build(data_batch=data)
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    dtypes = _compute_dtypes(model)
    if tolerance is None:
        tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    trainings = _Trainings(model, data)
    deviations = trainings.deviations(tolerance, max(EPSILONS[dtype] for dtype in dtypes))
    is_exact = all(d.is_rounding for d in deviations)
    suspects = _suspects(model, trainings.state)
    if not is_exact:
        suspects += _causes_in_loss(trainings, deviations, tolerance)
    if not is_exact and not suspects:
        suspects = [
            "Unknown. A scalar loss, or one from `add_loss`, that is not a mean over samples? "
            "Then override `loss_denominator`, or use a Keras loss. A layer, or a loss of "
            "`add_loss`, that mixes samples? Then nothing but larger micro-batches helps."
        ]
    return EquivalenceReport(
        deviations=sorted(
            deviations,
            # What differs after a few updates mostly follows from what differs in the first.
            key=lambda d: (d.is_rounding, d.kind in ("weight", "optimizer"), -d.relative),
        ),
        causes=[] if is_exact else suspects,
        notes=suspects if is_exact else [],
        tolerance=tolerance,
        cut=_describe(model, _keras.data.batch_size(data)),
    )


def _check_model(model):
    if not isinstance(model, train_step.TrainStep) or not model.compiled:
        raise errors.InvalidOptionError(
            "`model` must be a compiled model with tfbig's mixins. Received: "
            f"{type(model).__name__}, compiled={getattr(model, 'compiled', False)}. "
            "Use tfbig.extend(model) and compile it."
        )
    if type(model).train_step is not train_step.TrainStep.train_step:
        raise errors.InvalidOptionError(
            "`check_equivalence` compares tfbig's own `train_step` with that of Keras. Received: "
            f"{type(model).__name__}, which has a `train_step` of its own. Train it for an update "
            "with gradient_accumulation_steps=1 and with more, and compare the weights."
        )
    if getattr(model, "micro_batch_size", None) is None and (
        getattr(model, "gradient_accumulation_steps", 1) is None
    ):
        raise errors.InvalidOptionError(
            "`micro_batch_size='auto'` is found in the first update of `fit`. Received: a model "
            "that has not been fitted. Call fit first, or pass a number of samples."
        )


class _Gradients(keras.optimizers.Optimizer):
    """Keeps the gradients that it is given instead of applying them."""

    def __init__(self):
        super().__init__(learning_rate=0.0, name="gradients")

    def build(self, variables):
        super().build(variables)
        self.gradients = self.add_optimizer_variables(variables, "gradient")

    def update_step(self, gradient, variable, learning_rate):
        del learning_rate
        # Of a table that is looked up, all its rows: those of one index added up.
        gradient = tf.convert_to_tensor(gradient)
        self.assign(self.gradients[self._get_variable_index(variable)], gradient)


class _Trainings:
    """Trains a model on one batch in several ways, each time from the state that it has."""

    def __init__(self, model, data):
        self.model = model
        self.data = data
        self.strategy = model.distribute_strategy
        self.weights = model.trainable_variables
        metrics = {id(v) for v in model.metrics_variables}
        self.others = [v for v in model.non_trainable_variables if id(v) not in metrics]
        # By which the loss of the whole batch is multiplied: half precision rounds it as well.
        self.scale = None
        self._programs = {}
        # Paths of the weights whose gradient has rows.
        self.tables = set()

    def deviations(self, tolerance, epsilon):
        """List of `Deviation`.

        Args:
            tolerance: float, the relative deviation that counts as rounding.
            epsilon: float, the relative size of a rounding.
        """
        slots = [v for v in self.model.optimizer.variables if v.dtype.startswith(("float", "bf"))]
        before = _arrays(self.others)
        cut, whole = self._first(self._cut), self._first(self._whole)
        # What neither changes is no state of an update.
        changes = [
            i for i, old in enumerate(before) if any(np.any(x[2][i] != old) for x in (cut, whole))
        ]
        self.state = [self.others[i] for i in changes]
        for result in (cut, whole):
            result[2] = [result[2][i] for i in changes]
        names = (["loss"], [v.path for v in self.weights], [v.path for v in self.state])
        found = []
        for kind, paths, a, b in zip(("loss", "gradient", "state"), names, whole, cut, strict=True):
            found += _of_values(kind, paths, a, b, tolerance)

        runs = (
            self._changes(slots, self._whole),
            self._changes(slots, self._cut),
            self._changes(slots, self._whole, epsilon),
        )
        weights, of_slots = zip(*runs, strict=True)
        found += _of_changes("weight", self.weights, *weights, tolerance)
        found += _of_changes("optimizer", slots, *of_slots, tolerance)
        return found

    def _first(self, step):
        """Loss, gradients and the other variables after one update."""
        with self.strategy.scope():
            recorder = _Gradients()
            recorder.build(self.weights)
        with self._restored(), _keras.optimizer.with_optimizer(self.model, recorder):
            loss = self._train(step, 1)
            if step == self._cut and self.model.loss_scale_state is not None:
                # Nothing skips an update of the whole batch that overflows: not to the edge.
                self.scale = float(self.model.loss_scale_state.loss_scale.numpy()) / 16
            return [[loss], _arrays(recorder.gradients), _arrays(self.others)]

    def _changes(self, slots, step, epsilon=None):
        """How far a few updates move weights and slots, from weights that are rounded otherwise."""
        with self._restored():
            self._round_otherwise(epsilon)
            before = _arrays(self.weights), _arrays(slots)
            self._train(step, UPDATES)
            after = _arrays(self.weights), _arrays(slots)
        return [
            [np.subtract(b, a) for a, b in zip(*pair, strict=True)]
            for pair in zip(before, after, strict=True)
        ]

    def _round_otherwise(self, epsilon):
        """Moves each weight by a rounding of this relative size, if there is one."""
        if epsilon is None:
            return
        rng = np.random.default_rng(0)
        values = [
            v * (1 + epsilon * rng.uniform(-1, 1, np.shape(v))) for v in _arrays(self.weights)
        ]
        _keras.variables.assign_all(self.weights, values)

    @contextlib.contextmanager
    def _restored(self):
        """Leaves everything that training changes as it was."""
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

    def _train(self, step, updates):
        """Makes so many updates; returns the loss of the last."""
        iterations = self.model.optimizer.iterations
        # Traced once with each optimizer.
        key = step.__name__, id(self.model.optimizer)
        if key not in self._programs:
            self._programs[key] = self.model._explained(self._program(step))
        function = self._programs[key]
        end = int(iterations.numpy()) + updates
        # A skipped update makes the loss scale smaller; too many in a row are an error.
        while int(iterations.numpy()) < end:
            self.model.reset_metrics()
            loss = function(self.data)
        return np.asarray(loss, np.float64)

    def _program(self, step):
        return step if self.model.run_eagerly else tf.function(lambda d: step(d), autograph=False)

    def _on_replicas(self, step, data):
        """What the first replica returns for the whole batch."""
        return tf.nest.map_structure(
            lambda v: self.strategy.experimental_local_results(v)[0],
            self.strategy.run(step, args=(data,)),
        )

    def _cut(self, data):
        """An update as `fit` makes it."""
        return self.model._global_logs(self.model.train_step, data)["loss"]

    def _whole(self, data):
        """An update as plain Keras makes it; each replica makes the same."""
        model = self.model

        def step(data):
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
            with _keras.optimizer.aggregated_gradients():
                model.optimizer.apply_gradients(zip(gradients, self.weights, strict=True))
            others = {id(v) for v in self.others}
            for variable in scope.assigned:
                if id(variable) in others:
                    _keras.variables.native(variable).assign(scope.get_current_value(variable))
            return loss

        return self._on_replicas(step, data)

    def couples_samples(self, tolerance):
        """Whether the loss of some samples depends on which others are in the batch.

        Else what the gradient of the loss with respect to their outputs is changes by no more
        than a factor, the denominator, if the others are left out.
        """
        samples = int(_keras.data.batch_size(self.data))
        parts = [(0, samples // 2), (samples // 2, samples - samples // 2)]
        if samples < 2:
            return False

        def gradients_of(batch):
            x, y, y_pred, sample_weight = batch
            outputs = [v for v in tf.nest.flatten(y_pred) if v.dtype.is_floating]
            with tf.GradientTape() as tape:
                tape.watch(outputs)
                loss = self.model._compute_loss(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
            return tape.gradient(loss, outputs, unconnected_gradients="zero")

        def step(data):
            with _keras.losses.intercepted_losses(None), _keras.variables.VariableValues():
                batch = _keras.layers.forward(self.model, data, training=False)[1:]
                whole = gradients_of(batch)
                apart = [gradients_of(_keras.data.samples_of(batch, *part)) for part in parts]
            return [[g[begin : begin + size] for g in whole] for begin, size in parts], apart

        together, apart = self._program(lambda data: self._on_replicas(step, data))(self.data)
        pairs = zip(*(map(_arrays_of, tf.nest.flatten(x)) for x in (together, apart)), strict=True)
        return any(not _are_proportional(a, b, 10 * tolerance) for a, b in pairs)


def _are_proportional(a, b, tolerance):
    """Whether an array is a multiple of another."""
    factor = np.sum(a * b) / max(np.sum(b * b), np.finfo(np.float64).tiny)
    return _size(a - factor * b) <= tolerance * _size(a)


def _arrays_of(tensor):
    return np.asarray(tensor, np.float64)


def _arrays(variables):
    return [np.asarray(v, np.float64) for v in _keras.variables.values_of(variables)]


def _size(array):
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(array)))) if np.size(array) else 0.0


def _relative(deviation, reference):
    return deviation / reference if reference > 0 else float(deviation > 0)


def _of_values(kind, names, whole, cut, tolerance):
    """List of `Deviation` of values that one update computes."""
    sizes = [float(np.max(np.abs(a), initial=0)) for a in whole]
    floor = 1e-3 * max(sizes, default=0)
    found = []
    for name, size, a, b in zip(names, sizes, whole, cut, strict=True):
        absolute = float(np.max(np.abs(a - b), initial=0))
        relative = _relative(absolute, max(size, floor))
        found.append(Deviation(name, kind, absolute, relative, tolerance))
    return found


def _of_changes(kind, variables, whole, cut, rounded, tolerance):
    """List of `Deviation` of what a few updates changed; a learning rate, say, none changes."""
    found = []
    for variable, a, b, c in zip(variables, whole, cut, rounded, strict=True):
        if kind == "optimizer" and not (np.any(a) or np.any(b)):
            continue
        absolute = float(np.max(np.abs(a - b), initial=0))
        relative = _relative(_size(a - b), _size(a))
        allowed = max(tolerance, MARGIN * _relative(_size(a - c), _size(a)))
        found.append(Deviation(variable.path, kind, absolute, relative, allowed))
    return found


def _causes_in_loss(trainings, deviations, tolerance):
    """What deviations say of the loss, and of tables that are looked up."""
    causes = []
    if trainings.couples_samples(tolerance):
        names = ", ".join(_keras.losses.losses_that_couple_samples(trainings.model))
        causes.append(
            f"The loss couples the samples of a batch{names and f' ({names})'}: of a part of the "
            "batch it is another function. Larger micro-batches come closer; `loss_denominator` "
            "is no remedy."
        )
    beyond = {d.name: d.kind for d in reversed(deviations) if not d.is_rounding}
    tables = sorted(p for p in trainings.tables if beyond.get(p) == "weight")
    if tables and not {"gradient", "loss"} & set(beyond.values()):
        causes.append(
            f"The gradient of {', '.join(tables)} is right, and the optimizer's update is not: "
            "rows of a table were added up that Keras squares one by one. That happens with "
            "jit_compile=True, and where tfbig warns that it cannot follow a look-up."
        )
    return causes


def _suspects(model, state):
    """What is known not to be exact, in the order of the docs."""
    suspects = []
    layers = _keras.layers.all_layers(model)
    for layer in layers:
        is_normalization = isinstance(layer, keras.layers.BatchNormalization)
        if is_normalization and layer.trainable and not layer.synchronized:
            suspects.append(
                f"BatchNormalization ({layer.name!r}) normalizes each micro-batch with its own "
                "statistics."
            )
    for layer in layers:
        if _keras.layers.draws_random_numbers(layer):
            suspects.append(
                f"{type(layer).__name__} ({layer.name!r}) draws random numbers; micro-batches "
                "and replicas draw others."
            )
    for layer in layers:
        own = [v for v in state if _keras.layers.owns(layer, v)]
        if own and not type(layer).__module__.startswith("keras."):
            suspects.append(
                f"{type(layer).__name__} ({layer.name!r}) changes its state "
                f"({', '.join(v.name for v in own)}) in every forward pass, so once for each "
                "micro-batch."
            )
    return suspects


def _compute_dtypes(model):
    return {
        layer.compute_dtype
        for layer in [model, *_keras.layers.all_layers(model)]
        if layer.compute_dtype in TOLERANCES
    }


def _describe(model, samples):
    split, replicas = model._batch_split(), model.distribute_strategy.num_replicas_in_sync
    parts = (
        f"{split.gradient_accumulation_steps} micro-batch(es)"
        if split.micro_batch_size is None
        else f"micro-batches of {split.micro_batch_size}"
    )
    return f"{int(samples)} samples on {replicas} replica(s) in {parts}"
