"""The generations of a population, and what its models were trained with in each."""

import dataclasses

from tfbig.tuners import _tuner_types

__all__ = ("Generation", "generations")


def generations(max_epochs: int, epochs_per_generation: int) -> tuple[int, ...]:
    """The epochs at which generations end.

    Example:

    >>> generations(10, 4)
    (4, 8, 10)
    """
    return (*range(epochs_per_generation, max_epochs, epochs_per_generation), max_epochs)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model was trained with for some epochs.

    Attributes:
        first_epoch: The first of them, from 0.
        trial_id: The trial that was trained.
        values: Its values of hyperparameters, by name.
    """

    first_epoch: int
    trial_id: str
    values: _tuner_types.Values
