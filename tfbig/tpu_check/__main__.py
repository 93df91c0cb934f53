"""Checks a model's update for TPUs without a TPU: `python -m tfbig.tpu_check my_model.py:build`.

Traces one update of the model that `build()` returns under `tf.distribute.TPUStrategy`, for a
slice that need not exist, and checks what a TPU program requires: fixed shapes, operations that
the TPU compiler knows, one exchange per update outside loops and conditionals, and the same
decisions and assignments on all cores. Nothing runs on a TPU.

    python -m tfbig.tpu_check --topology=v5e:2x2 my_model.py:build \\
        --batch_size=1024 --micro_batch_size=32

--compile lowers the program with TensorFlow's own kernels for TPUs, compiles it with the TPU
compiler, and reports the compiled program's exchanges and an estimate of a core's memory.
--find_micro_batch_size also compiles it with other sizes, to find the largest that fits.

--run=lowered runs the lowered program on CPU devices, one per core, and compares the update with
that of the whole batch in plain Keras; then it runs an update with NaN on one core. Both use
random data and SGD. Dropout and noise are off and BatchNormalization is frozen, because they
depend on how the batch is split. If a layer draws random numbers that cannot be turned off, and
the updates differ, the verdict is "not compared". --run=traced runs the traced program instead,
with TensorFlow on this machine.

--compile and --run=lowered need Python environments of two gigabytes each, which they create in
--environments the first time. libtpu comes under a license of its own.

`build` takes no arguments and is called in the scope of the strategy. It returns a compiled Keras
model, or a pair of the model and a sample of the data, (x, y) or (x, y, sample_weight), whose
shapes and dtypes count. A plain Keras model is extended by `tfbig.extend`.

Exit code: 0 if nothing is wrong, 1 if the update cannot be traced or compared or a check fails,
2 for invalid arguments.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf
from absl import flags

from tfbig import _keras, _types, errors, tpu_check
from tfbig.tpu_check import comparison, environments, lowering, numbers, report
from tfbig.tpu_check.build_function import Build, UsageError, build_function, build_model

__all__ = ("main",)

_PROGRAM = "tfbig.tpu_check"

# Not absl's own flags: the user's program may define flags of the same names.
_FLAGS = flags.FlagValues()  # type: ignore[no-untyped-call]  # absl does not annotate it.
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
    "Effective batch size: samples per update, over all cores.",
    lower_bound=1,
    flag_values=_FLAGS,
)
_MICRO_BATCH_SIZE = flags.DEFINE_integer(
    "micro_batch_size",
    None,
    "Samples per core and forward pass. Defaults to the model's own option.",
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
    "Also find the largest micro-batch size, among powers of two, that fits according to the TPU "
    "compiler. Takes three or four compilations. Implies --compile.",
    flag_values=_FLAGS,
)
_RUN = flags.DEFINE_enum(
    "run",
    None,
    ["traced", "lowered"],
    "Also run an update of the traced or the lowered program on the CPU, and compare its numbers.",
    flag_values=_FLAGS,
)
_ENVIRONMENTS = flags.DEFINE_string(
    "environments",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "tfbig"),
    "Directory of the Python environments that --compile and --run=lowered create.",
    flag_values=_FLAGS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Without the program's name. Defaults to those of this process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-help", "-h"} & set(arguments):
        print(f"{__doc__}\n{_FLAGS.get_help()}")
        return 0
    try:
        tpu_slice, batch_size, name = _parse(arguments)
        # Before loading the user's file, which may start TensorFlow.
        _make_devices(tpu_slice.cores)
        return _Command(tpu_slice, batch_size, build_function(name)).run()
    except (UsageError, flags.Error, errors.InvalidOptionError) as e:
        return _fail(e, 2)
    except errors.TfbigError as e:
        return _fail(e, 1)


def _fail(error: Exception, code: int) -> int:
    print(f"{_PROGRAM}: {_one_line(error)}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse(arguments: Sequence[str]) -> tuple[tpu_check.Slice, int, str]:
    """Returns the slice, the effective batch size, and the name of the build function."""
    # A second call in the same process starts from the defaults.
    _FLAGS.unparse_flags()
    _, *names = _FLAGS([_PROGRAM, *arguments])
    if len(names) != 1:
        raise UsageError(
            "exactly one argument must name the function that makes the model, such as "
            f"my_model.py:build. Received: {' '.join(names) or 'none'}. See --help."
        )
    batch_size = _BATCH_SIZE.value
    if batch_size is None:
        raise UsageError("--batch_size is required: samples per update, over all cores.")
    if _MICRO_BATCH_SIZE.value and _STEPS.value:
        raise UsageError(
            "--micro_batch_size and --gradient_accumulation_steps are mutually exclusive."
        )
    tpu_slice = tpu_check.Slice.parse(_TOPOLOGY.value or "")
    if batch_size % tpu_slice.cores:
        raise UsageError(
            f"--batch_size must be a multiple of the {tpu_slice.cores} cores of {tpu_slice}. "
            f"Received: {batch_size}."
        )
    return tpu_slice, batch_size, names[0]


def _make_devices(count: int) -> None:
    if _keras.devices.make_logical_cpus(count) < count:
        raise UsageError(
            f"TensorFlow has started, so it cannot make the {count} logical CPU devices that stand "
            "for the cores. Call it in a new process."
        )


class _Command:
    """Checks one model for one slice, and prints the report.

    Args:
        tpu_slice: The slice.
        batch_size: Samples per update, over all cores.
        build: Makes the model.
    """

    def __init__(self, tpu_slice: tpu_check.Slice, batch_size: int, build: Build) -> None:
        self._slice = tpu_slice
        self._batch_size = batch_size
        self._build = build
        self._strategy = tpu_check.made_up_strategy(tpu_slice)
        self._environments = environments.Environments(_ENVIRONMENTS.value or "")

    def run(self) -> int:
        """Returns the exit code."""
        model, batch = self._build_model(self._strategy)
        self._print_model(model, batch)
        try:
            program = self._trace(model, batch)
        except errors.TfbigError:
            raise
        except Exception as e:
            _print("traced", [_failure(e)])
            return 1
        if not self._check(model, program):
            return 1
        if (_COMPILE.value or _FIND.value) and not self._compile(model, program):
            return 1
        if _RUN.value and not self._compare():
            return 1
        return 0

    def _build_model(
        self, strategy: _types.Strategy | None, micro_batch_size: int | None = None
    ) -> tuple[keras.Model, tpu_check.Batch]:
        """Builds the model with a micro-batch size, or else with the options of the command."""
        options: dict[str, int | None]
        if micro_batch_size is not None:
            options = {"micro_batch_size": micro_batch_size}
        else:
            options = {
                "micro_batch_size": _MICRO_BATCH_SIZE.value,
                "gradient_accumulation_steps": _STEPS.value,
            }
        return build_model(self._build, strategy, self._batch_size, options)

    def _build_exact(self, strategy: _types.Strategy | None) -> tuple[keras.Model, tpu_check.Batch]:
        model, batch = self._build_model(strategy)
        return comparison.make_exact(model, strategy), batch

    def _trace(self, model: keras.Model, batch: tpu_check.Batch) -> tpu_check.Program:
        return tpu_check.trace(model, batch.share(self._slice.cores))

    def _print_model(self, model: keras.Model, batch: tpu_check.Batch) -> None:
        cores = self._slice.cores
        # Before printing: it raises if the cores do not divide the batch.
        batch.share(cores)
        _print("model", [f"{type(model).__name__} {model.name!r}"])
        origin = (
            ", inferred from the model's inputs and loss; build() may return model, (x, y)"
            if batch.is_assumed
            else ""
        )
        _print("data", [f"{batch}{origin}"])
        share = self._batch_size // cores
        _print("slice", [f"{self._slice}, {cores} cores, {share} samples each, {_split(model)}"])

    def _check(self, model: keras.Model, program: tpu_check.Program) -> bool:
        """Prints what is wrong with a program; returns whether nothing is."""
        goes_on = _COMPILE.value or _FIND.value or _RUN.value
        end = "" if goes_on else ". Nothing was compiled or run"
        count = f"{len(program.places):,} operations"
        _print("traced", [f"under TPUStrategy of TensorFlow {tf.__version__}: {count}{end}"])
        found = tpu_check.findings(program)
        _print("checks", [f"{len(found)} failed" if found else "passed"])
        for error in found:
            _print("", [f"{type(error).__name__}: {error}"])
        _print("exchange", [report.exchange(program)])
        _print("memory", report.memory(model, self._slice.chip))
        return not found

    def _compile(self, model: keras.Model, program: tpu_check.Program) -> bool:
        """Compiles, and tries other sizes on request; returns whether nothing is wrong."""
        compiled = self._compiled(program)
        _print("compiled", report.compiled(compiled, self._slice))
        if compiled.errors():
            return False
        if _FIND.value:

            def compiled_with(size: int) -> lowering.Compiled:
                return self._compiled(self._trace(*self._build_model(self._strategy, size)))

            share = self._batch_size // self._slice.cores
            known = {model.micro_batch_size: compiled} if model.micro_batch_size else {}
            found = lowering.largest_that_fits(compiled_with, share, self._slice, known)
            _print("fits", report.largest(found, share, self._slice))
        return True

    def _compiled(self, program: tpu_check.Program) -> lowering.Compiled:
        with tempfile.TemporaryDirectory() as directory:
            return self._lowered(program, directory).compile(self._slice)

    def _lowered(self, program: tpu_check.Program, directory: str) -> lowering.Lowered:
        function = self._pure(program)
        return lowering.lower(function, pathlib.Path(directory), self._environments)

    def _pure(self, program: tpu_check.Program) -> tpu_check.PureFunction:
        with self._strategy.scope():
            return tpu_check.PureFunction(program)

    def _compare(self) -> bool:
        """Compares an update on the CPU with one of the whole batch; returns whether it matches."""
        cores = self._slice.cores
        try:
            found = comparison.compare(self._build_exact, self._strategy, cores, self._run_updates)
        except (errors.TfbigError, UsageError):
            raise
        except Exception as e:
            _print("run", [_failure(e)])
            return False
        _print("run", report.compared(found, _RUN.value or "", cores))
        return found.is_right

    def _run_updates(
        self, model: keras.Model, batch: tpu_check.Batch, *values: tuple[_types.Structure, ...]
    ) -> list[numbers.Update]:
        program, cores = self._trace(model, batch), self._slice.cores
        if _RUN.value == "traced":
            function = self._pure(program)
            runner = numbers.imitated(function)
            return [numbers.run(function, data, cores, runner) for data in values]
        with tempfile.TemporaryDirectory() as directory:
            lowered = self._lowered(program, directory)
            return [numbers.run(lowered.function, data, cores, lowered.run) for data in values]


def _print(title: str, lines: Iterable[str]) -> None:
    for i, line in enumerate(lines):
        print(f"{title if i == 0 else '':10}{line}", flush=True)


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {_one_line(error)[:1000]}"


def _split(model: keras.Model) -> str:
    if model.micro_batch_size is not None:
        return f"split into micro-batches of {model.micro_batch_size}"
    return f"split into {model.gradient_accumulation_steps} micro-batches"


if __name__ == "__main__":
    sys.exit(main())
