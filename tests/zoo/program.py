"""Defines programs of the zoo, and how to declare one.

A program is a function that builds a model, together with its data and compile arguments:

    @program(
        "Keras guide: a first regression",
        "dense layers, a metric",
        data=lambda rng, n: (rng.normal(size=(n, 3)), rng.normal(size=(n, 1))),
        compile=lambda: {"loss": "mse", "metrics": ["mae"]},
        adaptive="adam",
    )
    def regression(base, **options):
        x = keras.Input((3,))
        return base(x, layers.Dense(1)(x), **options)

The function runs twice: as a user of plain Keras would run it, and as a user of tfbig would.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable

import keras

import tests.zoo
import tfbig

# The number of samples and the batch size. The last batch has one sample, so a replica has none.
SAMPLES, BATCH = 13, 6

# Each squares gradients in its own way, so it reveals a gradient whose square is wrong. Their state
# also reveals a constant factor, which their updates would hide.
ADAPTIVE = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.005, momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "adafactor": lambda: keras.optimizers.Adafactor(0.02),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.PolynomialDecay(0.02, 8, 0.002),
        weight_decay=0.01,
        global_clipnorm=0.5,
    ),
}
OPTIMIZERS = {"sgd": lambda: keras.optimizers.SGD(0.02, momentum=0.9)} | ADAPTIVE

# Maps a program's `by` to its function's first argument, in plain Keras and with tfbig.
FIRST_ARGUMENT = {
    "Model": (keras.Model, tfbig.Model),
    "Sequential": (keras.Sequential, tfbig.Sequential),
    "extend class": (lambda cls: cls, tfbig.extend),
    "extend model": (None, None),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A small program and its training data.

    Attributes:
        make: Function that returns the model. Its arguments depend on `by`.
        shape: The kind of program it stands for.
        exercises: What in it could change the update when the batch is split.
        data: Function of a generator and a number of samples that returns x, and optionally y and
            sample weights; or a batched `tf.data.Dataset`.
        adaptive: Name in `ADAPTIVE`: its optimizer besides SGD. Adafactor and Lamb divide by the
            size of a gradient or update, however small, so a gradient that is pure rounding, such
            as that of the key bias in attention, moves weights. Use them only without one.
        compile: Function that returns the arguments of `compile` other than optimizers.
        by: "Model" or "Sequential": `make(base, **options)` receives Keras's class or tfbig's.
            "extend class": `make(extended, **options)` receives a function to apply to a class,
            `tfbig.extend`, or in plain Keras the identity. "extend model": `make()` returns a
            plain Keras model, to which `tfbig.extend` is applied.
        optimizers: Names of the optimizer arguments of `compile`, and of the model's attributes
            that hold them.
        fit: Function that returns further arguments of `fit`.
        thaw: Function applied to the trained model, which is then compiled and trained again.
        tolerance: Largest absolute deviation. If it is not 1e-10, `note` gives the reason.
        is_reloaded_by_keras: Whether to save and load the plain model too before comparing further
            training, because a file does not hold all of it.
        is_plain_eager: Whether plain Keras, and a loaded model, run eagerly, since tracing takes
            long. Keras then logs losses of several outputs differently, weighted by samples, and
            tfbig cannot distinguish the lookups of one table.
        is_on_replicas: Whether it also runs on replicas without `--slow`, which takes half of its
            time. True if no other program of its kind does.
        warns: The warning in the first `fit` of the split model, if splitting the batch changes its
            result by nature.
        note: Remark for readers of the table.
    """

    make: Callable
    shape: str
    exercises: str
    data: Callable
    adaptive: str
    compile: Callable = dict
    by: str = "Model"
    optimizers: tuple = ("optimizer",)
    fit: Callable = dict
    thaw: Callable | None = None
    tolerance: float = 1e-10
    is_reloaded_by_keras: bool = False
    is_plain_eager: bool = True
    is_on_replicas: bool = True
    warns: str | None = None
    note: str = ""

    @property
    def name(self):
        return self.make.__name__

    @property
    def is_exact(self):
        """Whether the split batch has the same update as the whole batch."""
        return self.warns is None

    def model(self, is_plain, **options):
        """The plain Keras model, or tfbig's with options."""
        first = FIRST_ARGUMENT[self.by][0 if is_plain else 1]
        if self.by != "extend model":
            return self.make(first, **options)
        return self.make() if is_plain else tfbig.extend(self.make(), **options)


PROGRAMS = {}


def program(shape, exercises, **fields):
    """Declares a program; decorates the function that builds its model."""

    def declared(make):
        made = Program(make, shape, exercises, **fields)
        assert made.name not in PROGRAMS, f"Two programs are named {made.name}."
        assert made.adaptive in ADAPTIVE, made.adaptive
        assert made.tolerance == 1e-10 or made.note, f"Why is {made.name} inexact?"
        PROGRAMS[made.name] = made
        return made

    return declared


def load():
    """Imports all modules of the zoo, which declare their programs."""
    for module in pkgutil.iter_modules(tests.zoo.__path__):
        if not module.name.endswith("_test"):
            importlib.import_module(f"tests.zoo.{module.name}")


def registered(cls):
    """Registers a class of the zoo so that files containing it can be loaded."""
    return keras.saving.register_keras_serializable("zoo")(cls)


def over_base(function):
    """Decorates a function of a base that returns a class: caches and registers one per base."""

    @functools.cache
    def made(base):
        package = f"zoo_{base.__module__.split('.')[0]}"
        return keras.saving.register_keras_serializable(package)(function(base))

    return functools.wraps(function)(made)
