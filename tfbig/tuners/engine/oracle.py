"""What chooses the values of trials, and by which objective."""

from keras_tuner import Objective

from tfbig.tuners._oracle import StudyOracle
from tfbig.tuners._synchronized import synchronized

Oracle = StudyOracle

__all__ = ("Objective", "Oracle", "synchronized")
