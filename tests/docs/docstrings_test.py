"""Every docstring example runs and prints what it shows."""

import doctest
import importlib
import pkgutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig


def _examples():
    modules = [tfbig] + [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(tfbig.__path__, "tfbig.")
    ]
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in modules:
        for test in finder.find(
            module, extraglobs={"keras": keras, "np": np, "tf": tf, "tfbig": tfbig}
        ):
            if test.examples:
                yield test


@pytest.mark.parametrize("example", _examples(), ids=lambda e: e.name)
def test_example(example):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_public_callables_have_an_example():
    tested = {e.name for e in _examples()}
    for module in (tfbig, tfbig.callbacks, tfbig.distribute):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and name != "apply_gradients":
                assert f"{value.__module__}.{value.__qualname__}" in tested, name
