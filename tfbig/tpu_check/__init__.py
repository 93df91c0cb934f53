"""A TPU program without a TPU: a model's step, traced under a made-up slice, and looked at.

`slice.py` says what a slice is, `strategy.py` makes a `TPUStrategy` for one that is not there,
`batch.py` says what a core is given, `program.py` traces the step, `differences.py` tells which
of its values differ between the cores, and `checks.py` what is wrong with it.

`pure.py` makes a function without variables of the program, whose operations `conversion.py`
copies, `lowering.py` has it lowered and
compiled by programs in `external`, which run in `environments.py`, `hlo.py` looks for exchanges
in what the compiler made of it, and `numbers.py` compares an update with what it should be.
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
