"""Looks at a model's update as a TPU would get it: `python -m tfbig.tpu_check my_model.py:build`.

Traces one update of the model that `build()` returns under `tf.distribute.TPUStrategy`, for a
slice that need not be there, and checks what must hold for its program: fixed shapes, operations
that the compiler knows, one exchange per update and outside of loops and conditionals, decisions
and assignments the same on all cores. Nothing is compiled, and nothing is run on a TPU.

    python -m tfbig.tpu_check --topology=v5e:2x2 my_model.py:build \\
        --batch_size=1024 --micro_batch_size=32

`build` takes no arguments, is called in the scope of the strategy, and returns a compiled Keras
model, or a pair of it and a sample of the data, (x, y) or (x, y, sample_weight), of which shapes
and dtypes count. A plain Keras model is extended by `tfbig.extend`.

Exit code: 0 if nothing is wrong, 1 if the update cannot be traced or a check fails, 2 for wrong
arguments.
"""

import importlib
import importlib.util
import pathlib
import sys

import keras
import tensorflow as tf
from absl import flags

from tfbig import _keras, _options, _step, _tpu, errors, models
from tfbig._tpu import report

__all__ = ("main",)

_PROGRAM = "tfbig.tpu_check"

# Not absl's own: the program of the user may define flags of the same names.
_FLAGS = flags.FlagValues()
_FLAGS.set_gnu_getopt(True)

_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:2x2",
    f"Chip and grid of the slice. Chips: {', '.join(_tpu.CHIPS)}.",
    flag_values=_FLAGS,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Effective batch: samples of one update, over all cores.",
    lower_bound=1,
    flag_values=_FLAGS,
)
_MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size",
    None,
    "Samples per core and forward pass. By default what the model says.",
    lower_bound=1,
    flag_values=_FLAGS,
)
_STEPS = flags.DEFINE_integer(
    "gradient_accumulation_steps",
    None,
    "Micro-batches per core and update, instead of --micro_batch_size.",
    lower_bound=1,
    flag_values=_FLAGS,
)


class UsageError(Exception):
    """The arguments are wrong; the text says which, and what is right."""


def main(arguments=None):
    """Runs the command; returns its exit code.

    Args:
        arguments: list of str, without the program's name. Defaults to those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-help", "-h"} & set(arguments):
        print(f"{__doc__}\n{_FLAGS.get_help()}")
        return 0
    try:
        tpu_slice, name = _parsed(arguments)
        # First: the model's file may start TensorFlow.
        _make_devices(tpu_slice.cores)
        return _run(tpu_slice, _function(name))
    except (UsageError, flags.Error, errors.InvalidOptionError) as e:
        return _failed(e, 2)
    except errors.TfbigError as e:
        return _failed(e, 1)


def _failed(error, code):
    print(f"{_PROGRAM}: {_one_line(error)}", file=sys.stderr)
    return code


def _one_line(error):
    return " ".join(str(error).split())


def _parsed(arguments):
    """The slice, and the name of the function, that the arguments give."""
    # Called once more, it begins with the defaults.
    _FLAGS.unparse_flags()
    _, *names = _FLAGS([_PROGRAM, *arguments])
    if len(names) != 1:
        raise UsageError(
            "one argument must name what makes the model, such as my_model.py:build. Received: "
            f"{' '.join(names) or 'none'}. See --help."
        )
    if _BATCH_SIZE.value is None:
        raise UsageError("--batch_size must be given: samples of one update, over all cores.")
    if _MICRO_BATCH_SIZE.value and _STEPS.value:
        raise UsageError("--micro_batch_size and --gradient_accumulation_steps exclude each other.")
    tpu_slice = _tpu.Slice.parse(_TOPOLOGY.value)
    if _BATCH_SIZE.value % tpu_slice.cores:
        raise UsageError(
            f"--batch_size must divide by the {tpu_slice.cores} cores of {tpu_slice}. Received: "
            f"{_BATCH_SIZE.value}."
        )
    return tpu_slice, names[0]


def _function(name):
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


def _make_devices(count):
    if _keras.make_logical_cpus(count) < count:
        raise UsageError(
            f"{count} logical CPU devices are needed, one for each core, and cannot be made any "
            "more, since TensorFlow has started."
        )


def _run(tpu_slice, build):
    strategy = _tpu.made_up_strategy(tpu_slice)
    with strategy.scope():
        model, batch = _built(build)
    share = batch.share(tpu_slice.cores)
    print(f"model     {type(model).__name__} {model.name!r}")
    assumed = (
        ", as the model's inputs and loss say; build() may return model, (x, y)"
        if batch.is_assumed
        else ""
    )
    print(f"data      {batch}{assumed}")
    print(
        f"slice     {tpu_slice}, {tpu_slice.cores} cores, "
        f"{_BATCH_SIZE.value // tpu_slice.cores} samples each, {_cut_of(model)}"
    )
    try:
        program = _tpu.trace(model, share)
    except errors.TfbigError:
        raise
    except Exception as e:
        print(f"traced    no: {type(e).__name__}: {_one_line(e)[:1000]}")
        return 1
    print(
        f"traced    under TPUStrategy of TensorFlow {tf.__version__}: {len(program.places):,} "
        "operations. Nothing was compiled, nothing was run"
    )
    found = _tpu.findings(program)
    print(f"checks    {f'{len(found)} failed' if found else 'passed'}")
    for error in found:
        print(f"          {type(error).__name__}: {error}")
    print(f"exchange  {report.exchange(program)}")
    for i, line in enumerate(report.memory(model, tpu_slice.chip)):
        print(f"{'memory' if i == 0 else '':10}{line}")
    return 1 if found else 0


def _built(build):
    """The extended model of `build()`, and the `Batch` that it is trained on."""
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
    options = {
        "micro_batch_size": _MICRO_BATCH_SIZE.value,
        "gradient_accumulation_steps": _STEPS.value,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(model, _step.TrainStep):
        _options.set_options(model, options)
    else:
        model = models.extend(model, **options)
    if sample is None:
        return model, _tpu.Batch.of_model(model, _BATCH_SIZE.value)
    return model, _tpu.Batch.of_sample(sample, _BATCH_SIZE.value)


def _cut_of(model):
    if model.micro_batch_size is not None:
        return f"cut into micro-batches of {model.micro_batch_size}"
    return f"cut into {model.gradient_accumulation_steps} micro-batches"


if __name__ == "__main__":
    sys.exit(main())
