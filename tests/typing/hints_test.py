"""What programs see that read annotations at run time: all of the public ones resolve."""

import inspect
import typing

import pytest

import tfbig
import tfbig.tuners
from tfbig.tuners._from_study import FromStudy

MODULES = (
    tfbig,
    tfbig.callbacks,
    tfbig.distribute,
    tfbig.errors,
    tfbig.mup,
    tfbig.tuners,
    tfbig.tuners.oracles,
    tfbig.tuners.engine.base_tuner,
    tfbig.tuners.engine.hyperparameters,
)


def public():
    """The functions and classes that users import, by name."""
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                yield f"{module.__name__}.{name}", value


PUBLIC = dict(public())


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def functions_of(value):
    """The functions behind an attribute of a class, by use."""
    if isinstance(value, property):
        return {"get": value.fget, "set": value.fset}
    if isinstance(value, FromStudy):
        return {"get": value._read}
    return {"call": getattr(value, "__func__", value)}


def annotated(value):
    """Whatever of a public function or class has annotations, by name."""
    yield "", value
    for attribute in inspect.classify_class_attrs(value) if inspect.isclass(value) else ():
        is_of_tfbig = attribute.defining_class.__module__.split(".")[0] == "tfbig"
        if is_of_tfbig and not is_private(attribute.name):
            for use, function in functions_of(attribute.object).items():
                if inspect.isfunction(function) or inspect.ismethod(function):
                    yield f"{attribute.name}, {use}", function


def resolved(value):
    """The annotations; those of `**options` too, and of what a function of tfbig returns."""
    hints = typing.get_type_hints(value)
    for hint in hints.values():
        if typing.get_origin(hint) is typing.Unpack:
            resolved(*typing.get_args(hint))
    returned = hints.get("return")
    if inspect.isclass(returned) and returned.__module__.split(".")[0] == "tfbig":
        typing.get_type_hints(returned)
    return hints


@pytest.mark.parametrize("value", PUBLIC.values(), ids=PUBLIC)
def test_annotations_resolve(value):
    unresolved = {}
    for name, part in annotated(value):
        try:
            resolved(part)
        except NameError as e:
            unresolved[name] = str(e)
    assert unresolved == {}


def test_methods_properties_and_options_are_looked_at():
    parts = dict(annotated(tfbig.Model))
    hints = typing.get_type_hints(parts["skipped_updates, get"])
    assert hints == {"return": int}
    assert {"", "fit, call", "loss_scale, set", "loss_denominator, call"} <= parts.keys()
    parts = dict(annotated(tfbig.tuners.Tuner))
    assert {"search, call", "to_dataframe, call", "__init__, call"} <= parts.keys()
    assert "trials, get" in dict(annotated(tfbig.tuners.StudyOracle))
    hints = typing.get_type_hints(tfbig.tuners.RandomSearch.__init__)
    (options,) = typing.get_args(hints["kwargs"])
    assert "allow_new_entries" in typing.get_type_hints(options)


def test_a_loss_scale_is_of_the_class_that_is_annotated():
    model = tfbig.Sequential([], loss_scale=2.0)
    model.compile("sgd", "mse")
    hint = typing.get_type_hints(tfbig.apply_gradients)["loss_scale"]
    assert isinstance(model.loss_scale_state, hint)
