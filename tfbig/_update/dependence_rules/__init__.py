"""What each operation does to the dependence of its inputs; see `batch_dependence`."""

from tfbig._update.dependence_rules import _selections, _shapes, _sparse, _values
from tfbig._update.dependence_rules._rules import Rules

__all__ = ("RULES",)

RULES = Rules(_values.RULES | _shapes.RULES | _selections.RULES | _sparse.RULES)
