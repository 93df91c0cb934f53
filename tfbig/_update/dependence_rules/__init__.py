"""What each operation does to the dependence of its inputs; see `batch_dependence`."""

from tfbig._update.dependence_rules import _selections, _shapes, _sparse, _values
from tfbig._update.dependence_rules._rules import Rules
from tfbig._update.dependence_rules._shapes import of_draws
from tfbig._update.dependence_rules._totals import of_totals

__all__ = ("RULES", "of_draws", "of_totals")

RULES = Rules(_values.RULES | _shapes.RULES | _selections.RULES | _sparse.RULES)
