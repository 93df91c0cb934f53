"""What a program of the zoo is, and how one is declared.

A program is a function that builds a model, with its data and its compile arguments beside it:

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

The function runs twice: as a user of plain Keras would run it, and as a user of tfbig.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable

import keras

import tests.zoo
import tfbig

# Samples, and samples of a batch: the last batch has one, so that a replica has none.
SAMPLES, BATCH = 13, 6

# Square what they get, each in its way, so that a gradient whose square is wrong shows;
# their state shows also a constant factor, which their updates would hide.
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

# A program's `by` -> what its function gets first, in plain Keras and with tfbig.
FIRST_ARGUMENT = {
    "Model": (keras.Model, tfbig.Model),
    "Sequential": (keras.Sequential, tfbig.Sequential),
    "extend class": (lambda cls: cls, tfbig.extend),
    "extend model": (None, None),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A small program, and what it is trained on.

    Attributes:
        make: Function that returns the model. What it gets depends on `by`.
        shape: What people write that it stands for.
        exercises: What in it could make the update of a cut batch another one.
        data: Function of a generator and a number of samples that returns x and y and sample
            weights, as many of them as there are; or a batched `tf.data.Dataset`.
        adaptive: Name in `ADAPTIVE`: its optimizer beside SGD. Adafactor and Lamb divide by the
            size of a gradient or update however small it is, so that a gradient that is nothing
            but rounding, such as that of the bias of attention's keys, moves weights. They are
            for programs without one.
        compile: Function that returns the arguments of `compile` beside optimizers.
        by: "Model" or "Sequential": `make(base, **options)` gets Keras's class or tfbig's.
            "extend class": `make(extended, **options)` gets what a class is passed through,
            `tfbig.extend`, or in plain Keras a function that does nothing. "extend model":
            `make()` returns a model of plain Keras, which `tfbig.extend` is applied to.
        optimizers: Names of the arguments of `compile` that are optimizers, and of the model's
            attributes that hold them.
        fit: Function that returns further arguments of `fit`.
        thaw: Function of the trained model, after which it is compiled and trained again.
        tolerance: Largest absolute deviation. Other than 1e-10 only with `note` for a reason.
        is_reloaded_by_keras: Whether the plain model that training after loading is compared
            with has been saved and loaded too, since a file does not hold all of it.
        is_plain_eager: Whether plain Keras, and a model that was loaded, run without tracing,
            which takes long. Keras's logs of the losses of several outputs are other ones then:
            weighted by samples; and tfbig cannot tell apart the look-ups of one table.
        is_on_replicas: Whether it runs on replicas without `--slow` too, half of a program's time.
            For those whose kind has no other that does.
        warns: What the first `fit` of the cut model warns of, if the cut batch is
            another one by nature.
        couples: Whether the loss couples samples in a way that tfbig cannot know, so that
            `check_equivalence` has to say so.
        note: For a reader of the table.
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
    couples: bool = False
    note: str = ""

    @property
    def name(self):
        return self.make.__name__

    @property
    def is_exact(self):
        """Whether the update of the cut batch is that of the whole one."""
        return not (self.warns or self.couples)

    def model(self, is_plain, **options):
        """The model of plain Keras, or tfbig's with options."""
        first = FIRST_ARGUMENT[self.by][0 if is_plain else 1]
        if self.by != "extend model":
            return self.make(first, **options)
        return self.make() if is_plain else tfbig.extend(self.make(), **options)


PROGRAMS = {}


def program(shape, exercises, **fields):
    """Declares a program: decorates the function that builds its model."""

    def declared(make):
        made = Program(make, shape, exercises, **fields)
        assert made.name not in PROGRAMS, f"There are two programs {made.name}."
        assert made.adaptive in ADAPTIVE, made.adaptive
        assert made.tolerance == 1e-10 or made.note, f"Why is {made.name} inexact?"
        PROGRAMS[made.name] = made
        return made

    return declared


def load():
    """Declares the programs of all families."""
    for module in pkgutil.iter_modules(tests.zoo.__path__):
        if not module.name.endswith("_test"):
            importlib.import_module(f"tests.zoo.{module.name}")


def registered(cls):
    """Registers a class of the zoo, so that files that hold it can be loaded."""
    return keras.saving.register_keras_serializable("zoo")(cls)


def over_base(function):
    """Decorates a function that returns a class for a base: one class for each, registered."""

    @functools.cache
    def made(base):
        package = f"zoo_{base.__module__.split('.')[0]}"
        return keras.saving.register_keras_serializable(package)(function(base))

    return functools.wraps(function)(made)
