"""Trains a program of the zoo in plain Keras or with tfbig, and compares the results."""

import dataclasses
import functools

import keras
import numpy as np
import tensorflow as tf

from tests.zoo.program import BATCH, OPTIMIZERS, PROGRAMS, SAMPLES

EPOCHS = 1


@dataclasses.dataclass
class Result:
    """The results of training: each a list or dictionary of arrays."""

    weights: list
    optimizers: list
    history: list

    def deviation(self, other):
        """The largest absolute deviation from another result."""
        structures = [dataclasses.asdict(r) for r in (self, other)]
        keras.tree.assert_same_structure(*structures)
        largest = 0.0
        for a, b in zip(*map(keras.tree.flatten, structures), strict=True):
            assert np.shape(a) == np.shape(b)
            assert np.all(np.isfinite(b))
            # A value that is not finite counts as a deviation.
            deviation = np.max(np.abs(np.subtract(a, b)), initial=0)
            largest = max(largest, float(np.nan_to_num(deviation, nan=np.inf)))
        return largest


class Training:
    """The training of a program.

    Args:
        program: `Program`.
        optimizer: Name in `OPTIMIZERS`.
        initial: list of arrays, the initial weights; None for those of the plain model.
        **options: tfbig's options; none for plain Keras.
    """

    def __init__(self, program, optimizer, initial=None, **options):
        keras.utils.set_random_seed(1)
        self.program, self.new_optimizer = program, OPTIMIZERS[optimizer]
        self.data = program.data(np.random.default_rng(0), SAMPLES)
        self.history = []
        self.is_eager = initial is None and program.is_plain_eager
        self.model = program.model(initial is None, **options)
        if not self.model.built:
            self.model(self.batch()[0])
        if initial is None:
            self.initial = _initialized(self.model)
        else:
            self.model.set_weights(initial)
        self.compile()

    def compile(self):
        optimizers = {name: self.new_optimizer() for name in self.program.optimizers}
        self.model.compile(**optimizers, **self.program.compile())
        # Tracing takes long, and for few samples Keras computes the same without it.
        self.model.run_eagerly = self.is_eager

    def run(self):
        """Trains, and trains again once the program has unfrozen layers."""
        self.fit()
        if self.program.thaw is not None:
            self.program.thaw(self.model)
            self.compile()
            self.fit()
        return self.result()

    def fit(self, **arguments):
        arguments = {"epochs": EPOCHS, "shuffle": False, "verbose": 0} | arguments
        if isinstance(self.data, tf.data.Dataset):
            arguments["x"] = self.data
        else:
            arguments |= zip(("x", "y", "sample_weight"), self.data, strict=False)
            arguments["batch_size"] = BATCH
        history = self.model.fit(**arguments, **self.program.fit()).history
        self.history.append(history)

    def run_on(self):
        """Trains for one more update."""
        self.fit(epochs=1, steps_per_epoch=1)
        return self.result()

    def reload(self, directory):
        """Continues with the model saved to a file and loaded."""
        path = directory / "model.keras"
        self.model.save(path)
        # For what a file does not hold and Keras initializes again.
        keras.utils.set_random_seed(1)
        self.model = keras.saving.load_model(path)
        self.model.run_eagerly = self.program.is_plain_eager

    def batch(self):
        """The arguments of `train_on_batch`, from the first batch."""
        if isinstance(self.data, tf.data.Dataset):
            batch = next(iter(self.data))
            return batch if isinstance(batch, tuple) else (batch,)
        return keras.tree.map_structure(lambda v: v[:BATCH], self.data)

    def result(self):
        optimizers = [getattr(self.model, name) for name in self.program.optimizers]
        variables = [v for o in optimizers for v in o.variables]
        for variable in [*self.model.weights, *variables]:
            _check_is_the_same_on_replicas(self.model, variable)
        return Result(
            self.model.get_weights(),
            [keras.ops.convert_to_numpy(v) for v in variables],
            [dict(h) for h in self.history],
        )


def _initialized(model):
    """Moves each trainable weight randomly so that none is zero; returns all weights."""
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable.numpy() + 0.3 * rng.normal(size=variable.shape))
    return model.get_weights()


def _check_is_the_same_on_replicas(model, variable):
    # Reading a mirrored variable returns replica 0's value only.
    first, *others = model.distribute_strategy.experimental_local_results(variable.value)
    for other in others:
        np.testing.assert_array_equal(first.numpy(), other.numpy(), variable.path)


@dataclasses.dataclass
class Plain:
    """The results of plain Keras for a program on one device."""

    initial: list
    result: Result
    later: Result | None = None


@functools.cache
def plain(name, optimizer, directory=None):
    """The results of plain Keras for a program.

    Args:
        name: Name in `PROGRAMS`.
        optimizer: Name in `OPTIMIZERS`.
        directory: Where to save a file; None to skip the further update.
    """
    program = PROGRAMS[name]
    training = Training(program, optimizer)
    begun = [(v, v.numpy()) for v in training.model.trainable_variables]
    made = Plain(training.initial, training.run())
    moved = [np.max(np.abs(v.numpy() - old)) > 1e-6 for v, old in begun]
    # Otherwise, equal results would say little. The key bias in attention has no gradient.
    assert np.mean(moved) > 0.7, f"{name} hardly trains."
    if directory is not None:
        if program.is_reloaded_by_keras:
            training.reload(directory)
        made.later = training.run_on()
    return made
