"""The devices and workers that a program runs on."""

from tfbig.distribute._sharded_weights import sharded_weights
from tfbig.distribute._strategy import get_strategy, is_chief

__all__ = ("get_strategy", "is_chief", "sharded_weights")
