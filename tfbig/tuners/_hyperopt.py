"""Hyperopt's TPE as an Optuna sampler."""

from typing import Any, TypeAlias

import hyperopt
import numpy as np
import optuna
from hyperopt import base, tpe
from optuna import distributions
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

__all__ = ("HyperoptSampler",)

# Hyperopt has no types: a node of its search space, its trials, and one of their documents.
_Expression: TypeAlias = Any
_Trials: TypeAlias = Any
_Document: TypeAlias = dict[str, Any]

# A parameter's value as Hyperopt has it, an index for a choice; and as Optuna has it.
_Number: TypeAlias = float
_Value: TypeAlias = Any


class HyperoptSampler(optuna.samplers.BaseSampler):
    """Suggests what Hyperopt suggests after the trials of a study.

    Parameters that some complete trials lack, such as conditional ones, are random.

    Args:
        seed: Of the trial.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        del trial
        return optuna.search_space.intersection_search_space(_complete(study))

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, _Value]:
        del trial
        if not search_space:
            return {}
        expressions = {n: _expression(n, d) for n, d in search_space.items()}
        domain = base.Domain(lambda values: 0.0, expressions)
        trials = hyperopt.Trials()
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        for number, known in enumerate(_complete(study)):
            params = {n: d.to_internal_repr(known.params[n]) for n, d in search_space.items()}
            trials.insert_trial_docs([_document(trials, number, params, sign * known.values[0])])
        trials.refresh()
        seed = int(np.random.default_rng(self._seed).integers(2**31))
        (suggested,) = tpe.suggest([len(trials)], domain, trials, seed, verbose=False)
        found = {n: v[0] for n, v in suggested["misc"]["vals"].items()}
        return {n: _suggested(d, found[n]) for n, d in search_space.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> _Value:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _document(trials: _Trials, number: int, params: dict[str, _Number], loss: float) -> _Document:
    document: _Document
    (document,) = trials.new_trial_docs(
        [number],
        [None],
        [{"status": hyperopt.STATUS_OK, "loss": loss}],
        [
            {
                "tid": number,
                "cmd": None,
                "idxs": {n: [number] for n in params},
                "vals": {n: [v] for n, v in params.items()},
            }
        ],
    )
    return document | {"state": hyperopt.JOB_STATE_DONE}


def _expression(name: str, distribution: BaseDistribution) -> _Expression:
    if isinstance(distribution, distributions.CategoricalDistribution):
        return hyperopt.hp.choice(name, list(range(len(distribution.choices))))
    if not isinstance(
        distribution, distributions.IntDistribution | distributions.FloatDistribution
    ):
        raise AssertionError(distribution)
    low, high = float(distribution.low), float(distribution.high)
    if isinstance(distribution, distributions.IntDistribution):
        # The value is rounded later; this makes both ends as likely as the rest.
        half = distribution.step / 2
        low, high = low - half, high + half
    if distribution.log:
        return hyperopt.hp.loguniform(name, np.log(low), np.log(high))
    return hyperopt.hp.uniform(name, low, high)


def _suggested(distribution: BaseDistribution, value: _Number) -> _Value:
    if isinstance(distribution, distributions.CategoricalDistribution):
        return distribution.choices[int(value)]
    if isinstance(distribution, distributions.IntDistribution):
        low, high = distribution.low, distribution.high
        steps = round((float(value) - low) / distribution.step)
        return int(min(max(low + steps * distribution.step, low), high))
    if not isinstance(distribution, distributions.FloatDistribution):
        raise AssertionError(distribution)
    return min(max(float(value), distribution.low), distribution.high)
