"""Looks at a model's update as a TPU would get it: `python -m tfbig.tpu_check my_model.py:build`.

Traces one update of the model that `build()` returns under `tf.distribute.TPUStrategy`, for a
slice that need not be there, and checks what must hold for its program: fixed shapes, operations
that the compiler knows, one exchange per update and outside of loops and conditionals, decisions
and assignments the same on all cores. Nothing is run on a TPU.

    python -m tfbig.tpu_check --topology=v5e:2x2 my_model.py:build \\
        --batch_size=1024 --micro_batch_size=32

With --compile the program is lowered by TensorFlow's own kernels for TPUs and compiled by the
compiler for TPUs, and what it plans is reported: exchanges, and the memory of a core, an estimate.
With --find_micro_batch_size also for other sizes, up to the largest that fits. With --run=lowered
the lowered program runs on CPU devices, one for each core, once on random data and once with NaN
on one core, beside the whole batch in plain Keras: with SGD, without dropout and noise, and with
BatchNormalization frozen, as these depend on the cut. Where a layer draws random numbers that
cannot be turned off, and the updates differ, the verdict is "not compared". --compile and
--run=lowered need Python environments of two gigabytes each, made in --environments the first time
(libtpu comes under a licence of its own). --run=traced runs what was traced, by TensorFlow on this
machine, and needs none.

`build` takes no arguments, is called in the scope of the strategy, and returns a compiled Keras
model, or a pair of it and a sample of the data, (x, y) or (x, y, sample_weight), of which shapes
and dtypes count. A plain Keras model is extended by `tfbig.extend`.

Exit code: 0 if nothing is wrong, 1 if the update cannot be traced or compared or a check fails,
2 for wrong arguments.
"""

import os
import pathlib
import sys
import tempfile

import tensorflow as tf
from absl import flags

from tfbig import _keras, errors, tpu_check
from tfbig.tpu_check import _models, environments, lowering, numbers, report
from tfbig.tpu_check.build_function import UsageError, build_function

__all__ = ("main",)

_PROGRAM = "tfbig.tpu_check"

# Not absl's own: the program of the user may define flags of the same names.
_FLAGS = flags.FlagValues()
_FLAGS.set_gnu_getopt(True)

_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:2x2",
    f"Chip and grid of the slice. Chips: {', '.join(tpu_check.CHIPS)}.",
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
_COMPILE = flags.DEFINE_bool(
    "compile", False, "Also lower and compile the program for the slice.", flag_values=_FLAGS
)
_FIND = flags.DEFINE_bool(
    "find_micro_batch_size",
    False,
    "Also look for the largest micro-batch of which the compiler says that it fits: powers of two, "
    "a compilation each, three or four in all. Includes --compile.",
    flag_values=_FLAGS,
)
_RUN = flags.DEFINE_enum(
    "run",
    None,
    ["traced", "lowered"],
    "Also run an update on the CPU and compare its numbers: of the traced or the lowered program.",
    flag_values=_FLAGS,
)
_ENVIRONMENTS = flags.DEFINE_string(
    "environments",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "tfbig"),
    "Directory of the environments that --compile and --run=lowered make.",
    flag_values=_FLAGS,
)


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
        return _run(tpu_slice, build_function(name))
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
    tpu_slice = tpu_check.Slice.parse(_TOPOLOGY.value)
    if _BATCH_SIZE.value % tpu_slice.cores:
        raise UsageError(
            f"--batch_size must divide by the {tpu_slice.cores} cores of {tpu_slice}. Received: "
            f"{_BATCH_SIZE.value}."
        )
    return tpu_slice, names[0]


def _make_devices(count):
    if _keras.devices.make_logical_cpus(count) < count:
        raise UsageError(
            f"{count} logical CPU devices are needed, one for each core, and cannot be made any "
            "more, since TensorFlow has started."
        )


def _run(tpu_slice, build):
    strategy = tpu_check.made_up_strategy(tpu_slice)
    model, batch = _built(build, strategy)
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
        program = tpu_check.trace(model, share)
    except errors.TfbigError:
        raise
    except Exception as e:
        print(f"traced    no: {type(e).__name__}: {_one_line(e)[:1000]}")
        return 1
    print(
        f"traced    under TPUStrategy of TensorFlow {tf.__version__}: {len(program.places):,} "
        f"operations{'' if _goes_on() else '. Nothing was compiled, nothing was run'}"
    )
    found = tpu_check.findings(program)
    print(f"checks    {f'{len(found)} failed' if found else 'passed'}")
    for error in found:
        print(f"          {type(error).__name__}: {error}")
    print(f"exchange  {report.exchange(program)}")
    _print("memory", report.memory(model, tpu_slice.chip))
    if found:
        return 1
    return _go_on(tpu_slice, build, strategy, model, program)


def _goes_on():
    return _COMPILE.value or _FIND.value or _RUN.value


def _print(title, lines):
    for i, line in enumerate(lines):
        print(f"{title if i == 0 else '':10}{line}", flush=True)


def _go_on(tpu_slice, build, strategy, model, program):
    """Compiles and runs, where it is asked for; returns the exit code."""
    made = environments.Environments(_ENVIRONMENTS.value)
    if _COMPILE.value or _FIND.value:
        compiled = _compiled(program, strategy, tpu_slice, made)
        _print("compiled", report.compiled(compiled, tpu_slice))
        if compiled.errors():
            return 1
    if _FIND.value:

        def compiled_with(size):
            model, batch = _built(build, strategy, micro_batch_size=size)
            program = tpu_check.trace(model, batch.share(tpu_slice.cores))
            return _compiled(program, strategy, tpu_slice, made)

        share = _BATCH_SIZE.value // tpu_slice.cores
        known = {model.micro_batch_size: compiled} if model.micro_batch_size else {}
        found = lowering.largest_that_fits(compiled_with, share, tpu_slice, known)
        _print("fits", report.largest(found, share, tpu_slice))
    if _RUN.value:
        return _compare(build, strategy, tpu_slice, made)
    return 0


def _compiled(program, strategy, tpu_slice, made):
    with tempfile.TemporaryDirectory() as directory:
        return _lowered(program, strategy, directory, made).compile(tpu_slice)


def _lowered(program, strategy, directory, made):
    with strategy.scope():
        function = tpu_check.PureFunction(program)
    return lowering.lower(function, pathlib.Path(directory), made)


def _compare(build, strategy, tpu_slice, made):
    """Runs an update on the CPU beside one of the whole batch; returns the exit code."""
    cores = tpu_slice.cores

    def run(model, batch, *several):
        program = tpu_check.trace(model, batch.share(cores))
        if _RUN.value == "traced":
            with strategy.scope():
                function = tpu_check.PureFunction(program)
            runner = numbers.imitated(function)
            return [numbers.run(function, data, cores, runner) for data in several]
        with tempfile.TemporaryDirectory() as directory:
            lowered = _lowered(program, strategy, directory, made)
            return [numbers.run(lowered.function, data, cores, lowered.run) for data in several]

    def built(strategy, **options):
        model, batch = _built(build, strategy, **options)
        return _models.made_exact(model, strategy), batch

    try:
        found = _models.compared(built, strategy, cores, run)
    except (errors.TfbigError, UsageError):
        raise
    except Exception as e:
        print(f"run       no: {type(e).__name__}: {_one_line(e)[:1000]}")
        return 1
    _print("run", report.compared(found, _RUN.value, cores))
    return 0 if found.is_right else 1


def _built(build, strategy, **options):
    """The model of `build()` as the arguments cut it, and the `Batch` that it is trained on."""
    if not options:
        options = {
            "micro_batch_size": _MICRO_BATCH_SIZE.value,
            "gradient_accumulation_steps": _STEPS.value,
        }
    return _models.built(build, strategy, _BATCH_SIZE.value, options)


def _cut_of(model):
    if model.micro_batch_size is not None:
        return f"cut into micro-batches of {model.micro_batch_size}"
    return f"cut into {model.gradient_accumulation_steps} micro-batches"


if __name__ == "__main__":
    sys.exit(main())
