"""The function that makes the user's model: loads it by its name, and calls it."""

import contextlib
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import keras
from absl import flags

from tfbig import _types, models
from tfbig._update import step_options, train_step
from tfbig.tpu_check.batch import Batch

__all__ = ("Build", "UsageError", "build_function", "build_model")

# `Any`: the user decides what it returns; `build_model` checks that.
Build: TypeAlias = Callable[[], Any]


class UsageError(Exception):
    """The arguments are wrong; the text says which, and what is right."""


def build_function(name: str) -> Build:
    """Loads the function that `file.py:function` or `package.module:function` names.

    Raises:
        UsageError: If there is no such function.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise UsageError(
            "a model must be named like my_model.py:build or my_package.my_model:build. Received: "
            f"{name}"
        )
    # The user's program may read its own flags, which have their defaults here.
    flags.FLAGS.mark_as_parsed()
    path = pathlib.Path(source)
    # As if Python ran the file, or a module of this directory.
    sys.path.insert(0, str(path.resolve().parent if path.suffix == ".py" else pathlib.Path.cwd()))
    try:
        module = _load(path) if path.suffix == ".py" else importlib.import_module(source)
    except Exception as e:
        raise UsageError(f"{source} cannot be imported: {type(e).__name__}: {e}") from e
    function: Build | None = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{source} has no function {attribute!r}.")
    return function


def _load(path: pathlib.Path) -> types.ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Keras and pickle look up classes by the name of their module.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def build_model(
    build: Build,
    strategy: _types.Strategy | None,
    batch_size: int,
    options: Mapping[str, object],
) -> tuple[keras.Model, Batch]:
    """Calls a build function, and extends the model that it returns.

    Args:
        build: Returns a compiled model, or a pair of it and a sample of the data.
        strategy: The strategy in whose scope to build. Without one, a plain Keras model is not
            extended.
        batch_size: Samples in an update, over all cores.
        options: Options of `tfbig.extend`; None leaves the model's own.

    Returns:
        The model, and the batch that it trains on.

    Raises:
        UsageError: If `build` fails, or returns anything else.
    """
    with strategy.scope() if strategy else contextlib.nullcontext():
        model, sample = _call(build)
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(model, train_step.TrainStep):
            step_options.set_options(model, given)
        elif strategy:
            model = models.extend(model, **given)
        if sample is None:
            return model, Batch.of_model(model, batch_size)
        return model, Batch.of_sample(sample, batch_size)


def _call(build: Build) -> tuple[keras.Model, tuple[_types.Structure, ...] | None]:
    """Returns the model, and the sample of the data or None."""
    try:
        made = build()
    except Exception as e:
        raise UsageError(f"build() failed: {type(e).__name__}: {e}") from e
    model, sample = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, keras.Model) or not model.compiled or model.optimizer is None:
        raise UsageError(
            "build() must return a compiled Keras model, or it and a sample of the data. "
            f"Received: {type(model).__name__}"
            f"{', not compiled' if isinstance(model, keras.Model) else ''}."
        )
    return model, sample
