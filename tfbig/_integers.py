"""Options that are integers: of Python, of NumPy, or of another type that can be an index."""

import operator

from tfbig import errors

__all__ = ("as_integer", "checked", "checked_or_none")


def as_integer(value: object) -> int | None:
    """A value as an int; None if it is not an integer, as True and 2.0 are not."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def checked(
    name: str, value: object, remedy: str = "", *, least: int = 1, rule: str | None = None
) -> int:
    """The value of an option as an int.

    Args:
        name: the name of the option.
        value: what the user has passed.
        remedy: a sentence that says what to pass instead.
        least: the smallest valid value.
        rule: what the value must be, for the message. Defaults to None: "an integer >= `least`".

    Raises:
        InvalidOptionError: If it is not an integer, or is too small.
    """
    number = as_integer(value)
    if number is None or number < least:
        if rule is None:
            message = f"`{name}` must be an integer >= {least}. Received: {name}={value!r}."
        else:
            message = f"`{name}` must be {rule}. Received: {name}={value!r}."
        raise errors.InvalidOptionError(f"{message} {remedy}".rstrip())
    return number


def checked_or_none(
    name: str, value: object, remedy: str = "", *, least: int = 1, rule: str | None = None
) -> int | None:
    """As `checked`, for an option that may be None.

    Args:
        name: as for `checked`.
        value: as for `checked`.
        remedy: as for `checked`.
        least: as for `checked`.
        rule: as for `checked`. Defaults to None: "an integer >= `least` or None".

    Raises:
        InvalidOptionError: If it is neither None nor valid.
    """
    if value is None:
        return None
    rule = f"an integer >= {least} or None" if rule is None else rule
    return checked(name, value, remedy, least=least, rule=rule)
