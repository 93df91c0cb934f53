"""Population-based training, as in Jaderberg et al., "Population Based Training of Neural
Networks", 2017.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, Unpack, cast

import keras
import keras_tuner
import numpy as np
from optuna.trial import FrozenTrial

from tfbig import _integers, _keras, _numbers, _types, errors
from tfbig.tuners import (
    _budget,
    _explore,
    _json,
    _ledger,
    _options,
    _proposals,
    _rungs,
    _running,
    _samplers,
    _study,
    _trial_callbacks,
    _trials,
    _tuner_types,
    _views,
)

__all__ = ("Generation", "PopulationBasedTraining", "PopulationOracle", "generations")


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


class PopulationQueue(_rungs.RungQueue):
    """Continues trials once all have completed a generation, the worst as copies of the best.

    Args:
        trials: See `TrialQueue`.
        oracle: The oracle of the search.
        proposals: See `TrialQueue`.
    """

    def __init__(
        self, trials: _trials.Trials, oracle: PopulationOracle, proposals: _proposals.Proposals
    ) -> None:
        super().__init__(trials, oracle, proposals)
        self._oracle = oracle

    def epochs_by_rung(self, index: int) -> Sequence[int]:
        del index
        return self._oracle.generations

    def score(self, running: _running.RunningTrial) -> float:
        # What it is now, and not the best that it was; what has diverged is the worst.
        if running.reported:
            value = running.reported[max(running.reported)]
        else:
            value = running.trial.metrics.get_last_value(self._oracle.objective.name)
        return float(value) if math.isfinite(value) else self._sign * math.inf

    def take_paused(self) -> int | None:
        rows = [row for row in self._ledger.trials() if row.state != _ledger.VOID]
        size = self._oracle.population_size
        if len(rows) < size and self._proposals.first_untried() is not _proposals.EXHAUSTED:
            return None
        paused = [row for row in rows if row.state == _ledger.PAUSED]
        for row in sorted(paused, key=lambda row: (_rungs.rung_of(row), row.index)):
            rung = _rungs.rung_of(row)
            # Those that have failed are not waited for.
            is_missing = any(
                other.state in (_ledger.RUNNING, _ledger.PAUSED)
                and _rungs.score_in(other, rung) is None
                for other in rows
            )
            if is_missing:
                return None
            # If another process was faster, the others are not as they were seen.
            return row.index if self._continue(row, self.ranked(rows, rung)) else None
        return None

    def _continue(self, row: _ledger.TrialRow, ranked: Sequence[_ledger.TrialRow]) -> bool:
        rung = _rungs.rung_of(row)
        rng = np.random.default_rng([self._oracle.search_seed, row.index, rung])
        count = int(len(ranked) * self._oracle.quantile)
        note = _rungs.note_of(row)
        if row.index in [other.index for other in ranked[len(ranked) - count :]]:
            best = ranked[int(rng.integers(count))]
            values = self._oracle.explored(self.values_in(best, rung), rng)
            note["copied"] |= {str(rung + 1): best.index}
            note["values"] |= {str(rung + 1): _json.dumps(values)}
        return self.promote(row, note)

    def values_in(self, row: _ledger.TrialRow, rung: int) -> _tuner_types.Values:
        """The values of a trial in a generation."""
        changed = _rungs.note_of(row)["values"]
        last = max((int(r) for r in changed if int(r) <= rung), default=None)
        attrs = self._trials.by_index()[row.index].user_attrs
        first: str = attrs.get(_FIRST_VALUES, attrs[_trials.VALUES])
        values: _tuner_types.Values = _json.loads(first if last is None else changed[str(last)])
        return values

    def begin(self, index: int) -> FrozenTrial | None:
        frozen = super().begin(index)
        if frozen is None:
            return None
        (row,) = self._ledger.trials(index=index)
        if not _rungs.note_of(row)["values"]:
            return frozen
        storage, attrs = self._trials.study._storage, frozen.user_attrs
        if _FIRST_VALUES not in attrs:
            storage.set_trial_user_attr(frozen._trial_id, _FIRST_VALUES, attrs[_trials.VALUES])
        values = self.values_in(row, _rungs.rung_of(row))
        return self._trials.store(frozen, self._hyperparameters(), values)

    def source_of(self, index: int) -> tuple[int, int] | None:
        """The generation and the trial from which a trial continues; None in its first one."""
        (row,) = self._ledger.trials(index=index)
        rung = _rungs.rung_of(row)
        if rung == 0:
            return None
        return rung - 1, _rungs.note_of(row)["copied"].get(str(rung), index)

    def copied_after(self, index: int) -> int:
        """The epochs after which a trial was last copied; 0 if it never was."""
        (row,) = self._ledger.trials(index=index)
        rungs = map(int, _rungs.note_of(row)["copied"])
        return (0, *self._oracle.generations)[max(rungs, default=0)]

    def lineage(self, index: int) -> list[Generation]:
        """How the model of a trial was trained, in all generations so far."""
        rows = {row.index: row for row in self._ledger.trials()}
        found = []
        begins = (0, *self._oracle.generations)
        for rung in reversed(range(_rungs.rung_of(rows[index]) + 1)):
            values = self.values_in(rows[index], rung)
            found.append(Generation(begins[rung], _views.trial_id_of(index), values))
            index = _rungs.note_of(rows[index])["copied"].get(str(rung), index)
        return found[::-1]


# The attribute of the study's trial that has the values of its first generation, if they changed.
_FIRST_VALUES = "tfbig:first values"


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
        if not self._objectives.is_single:
            raise errors.InvalidOptionError(
                "PopulationBasedTraining needs a single objective: with several, it cannot say "
                f"which trial is better. Received: the objectives {self.objective_names}."
            )

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {
            "population_size": str(self.population_size),
            "ends of generations": ", ".join(map(str, self.generations)),
        }

    def _new_queue(
        self, trials: _trials.Trials, proposals: _proposals.Proposals
    ) -> PopulationQueue:
        return PopulationQueue(trials, self, proposals)

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


class SetLearningRate(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Replaces the learning rates that a backup restores by those of the model's builder.

    Args:
        epoch: The epoch at whose beginning it does so, from 0.
    """

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self._epoch = epoch

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._rates = []
        for _, optimizer in _keras.optimizer.optimizers_of(model):
            inner = getattr(optimizer, "inner_optimizer", optimizer)
            rate = getattr(inner, "_learning_rate", None)
            # A schedule or a function stays, and an optimizer need not have a rate.
            if isinstance(rate, keras.Variable):
                self._rates.append((inner, float(rate.numpy())))

    def on_epoch_begin(self, epoch: int, logs: _types.Logs | None = None) -> None:
        for optimizer, rate in self._rates if epoch == self._epoch else ():
            optimizer.learning_rate = rate


class PopulationBasedTraining(_rungs.RungTuner):
    """Trains a population of models, and changes hyperparameters while it trains them.

    As in Jaderberg et al. (2017). All models are trained for `epochs_per_generation` epochs. Then
    each of the worst continues with the weights and the optimizer of one of the best, and with
    hyperparameters near those: numbers are multiplied by 0.8 or 1.2, or are the next in an ordered
    `Choice`; some are drawn anew. So the result is a trained model, and a schedule of
    hyperparameters. A trial is a member of the population; `trial.hyperparameters` has its last
    values.

    The score of a trial, and the weights that are kept, are those of its best epoch since it was
    last copied.

    Any number of processes train the members; a generation begins when the one before has ended in
    all of them, so that a search with a seed does not depend on their number. `search` takes no
    `epochs`.

    See `OptunaSearch` for the other arguments.

    Args:
        population_size: How many models there are, >= 2. Defaults to 8.
        max_epochs: Epochs of a model. Defaults to 100.
        epochs_per_generation: Epochs after which models are compared. Defaults to 1.
        quantile: The part of the models, <= 0.5, that is replaced by copies of as many of the best.
            Defaults to 0.25.
        resample_probability: How likely each hyperparameter of a copy is drawn anew. Defaults to
            0.25.
        explore: Names of the hyperparameters that may change; a copy has all others of its
            original. Those that change the shapes of weights must not be among them. None for all.
        sampler: As in `OptunaSearch`; proposes the first generation. Defaults to "random".

    Raises:
        InvalidOptionError: If an argument is not valid, or if there are several objectives.
    """

    oracle: PopulationOracle

    def __init__(
        self,
        hypermodel: _options.Build = None,
        objective: _options.ObjectiveOption = None,
        population_size: int = 8,
        max_epochs: int = 100,
        epochs_per_generation: int = 1,
        quantile: float = 0.25,
        resample_probability: float = 0.25,
        explore: Sequence[str] | None = None,
        seed: int | None = None,
        *,
        sampler: _samplers.SamplerOption = "random",
        **kwargs: Unpack[_options.SearchOptions],
    ) -> None:
        of_oracle, of_tuner = _options.split(kwargs)
        oracle = PopulationOracle(
            objective,
            population_size,
            max_epochs,
            epochs_per_generation,
            quantile,
            resample_probability,
            explore,
            seed,
            sampler=sampler,
            **of_oracle,
        )
        super().__init__(oracle, hypermodel, **of_tuner)

    def schedule(self, trial: _tuner_types.Trial) -> list[Generation]:
        """How the model of a trial was trained, from the first generation to the last.

        Generations before it was copied are those of its original.
        """
        return self.oracle.schedule(trial.trial_id)

    def on_search_end(self) -> None:
        super().on_search_end()
        if self._workers.is_chief and self.oracle.is_population_over():
            shutil.rmtree(self._generations, ignore_errors=True)

    @property
    def _generations(self) -> pathlib.Path:
        return pathlib.Path(self.project_dir, _study.GENERATIONS)

    def _state_of(self, generation: int, trial_id: str) -> pathlib.Path:
        return self._generations / str(generation) / trial_id

    def run_trial(
        self, trial: _tuner_types.Trial, *args: Any, **kwargs: Any
    ) -> _tuner_types.Results:
        """Trains the model of a trial for a generation."""
        try:
            return super().run_trial(trial, *args, **kwargs)
        except (errors.BackupError, errors.StorageUnavailableError) as e:
            if self._workers.count == 1:
                # Who has taken the trial may have removed its state.
                self._raise_if_lost(trial)
            if not isinstance(e, errors.BackupError):
                raise
            source = self.oracle.source_of(trial.trial_id) if self._workers.is_chief else None
            if source is None or source[1] == trial.trial_id:
                raise
            raise errors.SearchError(
                f"The model of trial {trial.trial_id} cannot continue with the weights of another. "
                "Leave hyperparameters out of `explore` that change the shapes of weights or the "
                "kind of optimizer. "
                f"Received: {trial.hyperparameters.values}. {e}"
            ) from e

    def _with_state(
        self, trial: _tuner_types.Trial, callbacks: list[_types.Callback]
    ) -> list[_types.Callback]:
        source = self.oracle.source_of(trial.trial_id) if self._workers.is_chief else None
        if self._workers.count > 1:
            answers = self._workers.exchange("a generation", json.dumps(source))
            source = json.loads(answers[0])
        if source is None:
            return [*callbacks, self._keep_state(trial, self._state_of(0, trial.trial_id))]
        generation, original = source
        directory = self._state_of(generation + 1, trial.trial_id)
        if self._workers.is_chief:
            # All trials have begun the generation before this one's.
            shutil.rmtree(self._generations / str(generation - 1), ignore_errors=True)
            begin = self.oracle.generations[generation]
            if self.oracle.last_step(trial.trial_id) <= begin:
                # Not trained since, whatever is there.
                shutil.rmtree(directory, ignore_errors=True)
            _copy(self._state_of(generation, original), directory)
        if self._workers.count > 1:
            self._workers.exchange("a copied state", "")
        kept = [*callbacks, _trial_callbacks.KeepState(directory)]
        if original == trial.trial_id:
            return kept
        # Before the user's callbacks, which may set the rate as well.
        return [SetLearningRate(self.oracle.generations[generation]), *kept]


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a state, unless that was done; a copy may have been trained since."""
    if target.exists():
        return
    copy = target.with_name(f"new-{os.getpid()}-{target.name}")
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(source, copy)
        os.replace(copy, target)
    except OSError as e:
        if target.exists():
            return  # Another process took the trial meanwhile, and has done it.
        raise errors.StorageUnavailableError(
            f"The state {source} cannot be copied to {target}: {e}. What the search has recorded "
            "is kept; start the program again once the cause is removed."
        ) from None
