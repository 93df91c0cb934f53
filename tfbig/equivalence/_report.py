"""What `check_equivalence` returns."""

import dataclasses

__all__ = ("Deviation", "EquivalenceReport")

# Rows of a printed report.
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far something of the cut batch is from that of the whole batch.

    Attributes:
        name: Path of the variable; "loss" for the loss.
        kind: "loss", "gradient" or "state" after one update; "weight" or "optimizer" after
            several.
        absolute: Largest absolute deviation.
        relative: For a loss, gradient or state, `absolute` divided by the largest absolute value
            for the whole batch. For a weight or the optimizer's state, the root mean square
            deviation divided by that of its change. The divisor is at least a thousandth of the
            largest of its kind, so that a gradient which is all rounding error is not compared
            with itself.
        allowed: The relative deviation that rounding explains.
    """

    name: str
    kind: str
    absolute: float
    relative: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains the deviation."""
        return self.relative <= self.allowed


@dataclasses.dataclass(frozen=True)
class EquivalenceReport:
    """What `check_equivalence` found. Prints as a table.

    Attributes:
        deviations: Those beyond rounding come first; then those of the first update; then
            larger before smaller.
        causes: What makes the model inexact, likeliest first; empty if it is exact.
        notes: What could make it inexact but did not here.
        tolerance: The relative deviation that counts as rounding in gradients.
        cut: How the batch was cut.
    """

    deviations: list[Deviation]
    causes: list[str]
    notes: list[str]
    tolerance: float
    cut: str

    @property
    def is_equivalent(self) -> bool:
        """Whether rounding explains all deviations."""
        return all(d.is_rounding for d in self.deviations)

    @property
    def largest(self) -> Deviation:
        """The largest deviation of the first update, if possible one beyond rounding."""
        return self.deviations[0]

    def __str__(self) -> str:
        shown = self.deviations[: max(_SHOWN, sum(not d.is_rounding for d in self.deviations))]
        width = max(len(d.name) for d in shown)
        verdict = "equivalent" if self.is_equivalent else "NOT equivalent"
        lines = [
            f"Whole batch and cut batch are {verdict}: {self.cut}.",
            f"{'variable':<{width}}  {'what':<9}  {'absolute':>9}  {'relative':>9}  {'allowed':>9}",
        ]
        for d in shown:
            mark = "" if d.is_rounding else "  <--"
            lines.append(
                f"{d.name:<{width}}  {d.kind:<9}  {d.absolute:9.1e}  {d.relative:9.1e}  "
                f"{d.allowed:9.1e}{mark}"
            )
        if len(shown) < len(self.deviations):
            lines.append(f"... and {len(self.deviations) - len(shown)} more, all of them rounding")
        lines += [f"Cause: {c}" for c in self.causes] + [f"Note: {n}" for n in self.notes]
        return "\n".join(lines)
