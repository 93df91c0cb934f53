"""The oracle of a population: its size and generations, and how values of copies are changed."""

from collections.abc import Sequence
from typing import Unpack, cast

import keras_tuner
import numpy as np

from tfbig import _integers, _numbers, errors
from tfbig.tuners import (
    _budget,
    _explore,
    _options,
    _proposals,
    _rungs,
    _samplers,
    _trials,
    _tuner_types,
    _views,
)
from tfbig.tuners._generations import Generation, generations
from tfbig.tuners._population_queue import PopulationQueue

__all__ = ("PopulationOracle",)


def _checked_share(name: str, value: object, most: float) -> float:
    """The value of an option as a float; raises unless it is from 0 to `most`."""
    number = _numbers.as_number(value)
    if number is None or not 0 <= number <= most:
        raise errors.InvalidOptionError(
            f"`{name}` must be a number from 0 to {most:g}. Received: {name}={value!r}."
        )
    return number


class PopulationOracle(_rungs.RungOracle):
    """Continues trials once all have completed a generation, the worst as copies of the best.

    See `PopulationBasedTraining` for the arguments, and `StudyOracle` for the others.
    """

    def __init__(
        self,
        objective: _options.ObjectiveOption = None,
        population_size: int = 8,
        max_epochs: int = 100,
        epochs_per_generation: int = 1,
        quantile: float = 0.25,
        resample_probability: float = 0.25,
        explore: Sequence[str] | None = None,
        seed: int | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        *,
        sampler: _samplers.SamplerOption = "random",
        **kwargs: Unpack[_options.StudyOptions],
    ) -> None:
        population_size = _integers.checked("population_size", population_size, least=2)
        max_epochs = _integers.checked("max_epochs", max_epochs)
        epochs_per_generation = _integers.checked("epochs_per_generation", epochs_per_generation)
        quantile = _checked_share("quantile", quantile, 0.5)
        resample_probability = _checked_share("resample_probability", resample_probability, 1.0)
        if population_size * quantile < 1:
            raise errors.InvalidOptionError(
                "`quantile` of `population_size` must be at least one trial. Received: "
                f"quantile={quantile}, population_size={population_size}."
            )
        if isinstance(explore, str) or not all(isinstance(n, str) for n in explore or ()):
            raise errors.InvalidOptionError(
                "`explore` must be None or a list of names of hyperparameters. Received: "
                f"explore={explore!r}."
            )
        self.population_size = population_size
        self.max_epochs = max_epochs
        self.generations = generations(max_epochs, epochs_per_generation)
        self.quantile = quantile
        self._resample_probability = resample_probability
        self._explore = None if explore is None else tuple(explore)
        super().__init__(
            objective=objective,
            max_trials=population_size,
            hyperparameters=hyperparameters,
            sampler=sampler,
            seed=seed,
            **kwargs,
        )

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {
            "population_size": str(self.population_size),
            "ends of generations": ", ".join(map(str, self.generations)),
        }

    def _new_queue(
        self, trials: _trials.Trials, proposals: _proposals.Proposals
    ) -> PopulationQueue:
        return PopulationQueue(trials, proposals, self)

    @property
    def _population(self) -> PopulationQueue:
        return cast(PopulationQueue, self._search.queue)

    @property
    def search_seed(self) -> int:
        """The seed of the search, the same in all processes."""
        return self._search.seed

    def explored(
        self, values: _tuner_types.Values, rng: np.random.Generator
    ) -> _tuner_types.Values:
        """Values near those of a good trial.

        Raises:
            InvalidOptionError: If `explore` has names that are no hyperparameters.
        """
        self._check_names()
        return _explore.explored(
            self.hyperparameters, values, self._explore, self._resample_probability, rng
        )

    def check_limits(self, limits: _budget.Limits) -> None:
        super().check_limits(limits)
        # If only trials define the space, the names are checked when it is known.
        if self.hyperparameters.space:
            self._check_names()

    def _check_names(self) -> None:
        known = {hp.name for hp in self.hyperparameters.space}
        unknown = [name for name in self._explore or () if name not in known]
        if unknown:
            raise errors.InvalidOptionError(
                f"`explore` must name hyperparameters. Received: {unknown[0]!r}; the model has "
                f"{sorted(known)}."
            )

    def _is_itself_after(self, index: int) -> int:
        return self._population.copied_after(index)

    def source_of(self, trial_id: str) -> tuple[int, str] | None:
        """The generation and the trial from which a trial continues; None in its first one."""
        found = self._population.source_of(int(trial_id))
        return None if found is None else (found[0], _views.trial_id_of(found[1]))

    def schedule(self, trial_id: str) -> list[Generation]:
        """See `PopulationBasedTraining.schedule`."""
        return self._population.lineage(int(trial_id))

    def is_population_over(self) -> bool:
        """Whether no trial will continue."""
        return self._population.is_over()
