"""The function that a command line names, which makes the model."""

import importlib
import importlib.util
import pathlib
import sys

from absl import flags

__all__ = ("UsageError", "build_function")


class UsageError(Exception):
    """The arguments are wrong; the text says which, and what is right."""


def build_function(name):
    """The function that `file.py:function` or `package.module:function` names."""
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise UsageError(
            f"a model is named as my_model.py:build or my_package.my_model:build. Received: {name}"
        )
    # A program of the user may read its own flags, which have their defaults here.
    flags.FLAGS.mark_as_parsed()
    path = pathlib.Path(source)
    # As when Python runs the file, or a module of this directory.
    sys.path.insert(0, str(path.resolve().parent if path.suffix == ".py" else pathlib.Path.cwd()))
    try:
        module = _module_of(path) if path.suffix == ".py" else importlib.import_module(source)
    except Exception as e:
        raise UsageError(f"{source} cannot be imported: {type(e).__name__}: {e}") from e
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{source} has no function {attribute!r}.")
    return function


def _module_of(path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Keras and pickle look classes up by the name of their module.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
