"""The devices and workers that a program runs on."""

from tfbig.distribute._pipeline import Pipeline
from tfbig.distribute._sharded_weights import sharded_weights
from tfbig.distribute._strategy import get_strategy, is_chief

__all__ = ("Pipeline", "get_strategy", "is_chief", "sharded_weights")
