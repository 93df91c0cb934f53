"""Options that are real numbers, of Python or of NumPy."""

import numbers

__all__ = ("as_number",)


def as_number(value: object) -> float | None:
    """A value as a float; None if it is not a real number, as True and "1" are not."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]
