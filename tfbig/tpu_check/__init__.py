"""A TPU program without a TPU: traces a model's update for a slice that does not exist.

`slice.py` describes a slice, `strategy.py` makes a `TPUStrategy` for it, `batch.py` says what a
core gets, `program.py` traces the update, `differences.py` finds the values that differ between
the cores, and `checks.py` finds what is wrong.

`pure.py` turns the program into a function without variables, with `conversion.py`, which copies
its operations. `lowering.py` lowers and compiles that function with the programs in `external`,
which run in the environments of `environments.py`. `hlo.py` looks for collectives in the compiled
program. `numbers.py` runs an update, and `comparison.py` compares it with plain Keras.

`__main__.py` is the command, `build_function.py` calls the user's function, and `report.py` writes
the lines.
"""

from tfbig.tpu_check.batch import Batch
from tfbig.tpu_check.checks import (
    CollectiveError,
    DriftError,
    DynamicShapeError,
    HostOperationError,
    PredicateError,
    ProgramError,
    UnknownOperationError,
    check,
    findings,
)
from tfbig.tpu_check.program import Program, trace
from tfbig.tpu_check.pure import PureFunction
from tfbig.tpu_check.slice import CHIPS, Slice
from tfbig.tpu_check.strategy import made_up_strategy

__all__ = (
    "CHIPS",
    "Batch",
    "CollectiveError",
    "DriftError",
    "DynamicShapeError",
    "HostOperationError",
    "PredicateError",
    "Program",
    "ProgramError",
    "PureFunction",
    "Slice",
    "UnknownOperationError",
    "check",
    "findings",
    "made_up_strategy",
    "trace",
)
