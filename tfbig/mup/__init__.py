"""Tune a large model on a small one: the maximal update parametrization (muP)."""

from tfbig.mup._coordinate_check import CoordinateCheck, Coordinates, coordinate_check
from tfbig.mup._parametrize import build, parametrize
from tfbig.mup._scales import Scales, scales

__all__ = (
    "CoordinateCheck",
    "Coordinates",
    "Scales",
    "build",
    "coordinate_check",
    "parametrize",
    "scales",
)
