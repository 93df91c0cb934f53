"""Population-based training, as in Jaderberg et al., "Population Based Training of Neural
Networks", 2017.

`_population_queue.py` says which trial continues, and as a copy of which; `_population_oracle.py`,
with which values. The tuner trains it, and copies states.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, Unpack

from tfbig import _types, errors
from tfbig.tuners import (
    _directory,
    _options,
    _rungs,
    _samplers,
    _trial_callbacks,
    _tuner_types,
)
from tfbig.tuners._generations import Generation
from tfbig.tuners._population_oracle import PopulationOracle
from tfbig.tuners._set_learning_rate import SetLearningRate

__all__ = ("PopulationBasedTraining",)


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
        return pathlib.Path(self.project_dir, _directory.GENERATIONS)

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
