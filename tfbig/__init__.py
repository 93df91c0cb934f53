"""tfbig: one update is one update of the whole effective batch, on any hardware."""

import importlib as _importlib
from types import ModuleType as _ModuleType

from tfbig import _lifetime as _lifetime

if _lifetime.is_program("tfbig.launch"):
    # To import what follows takes seconds.
    _lifetime.exit_on_interrupt()

from tfbig import _backend as _backend  # First: it looks before Keras is imported.
from tfbig import callbacks, distribute, errors, mup
from tfbig._update.accumulate import accumulate_gradients
from tfbig._update.exchange_and_apply import apply_gradients
from tfbig._version import __version__ as __version__
from tfbig.accumulation import GradientAccumulationMixin
from tfbig.equivalence import check_equivalence
from tfbig.loss_scaling import DynamicLossScale, DynamicLossScalingMixin
from tfbig.models import Model, Sequential, extend


def __getattr__(name: str) -> _ModuleType:
    # KerasTuner and Optuna are imported by who searches.
    if name == "tuners":
        return _importlib.import_module("tfbig.tuners")
    raise AttributeError(f"module 'tfbig' has no attribute {name!r}")


__all__ = (
    "DynamicLossScale",
    "DynamicLossScalingMixin",
    "GradientAccumulationMixin",
    "Model",
    "Sequential",
    "accumulate_gradients",
    "apply_gradients",
    "callbacks",
    "check_equivalence",
    "distribute",
    "errors",
    "extend",
    "mup",
    "tuners",
)
