"""Hyperopt's TPE as an Optuna sampler."""

import hyperopt
import numpy as np
import optuna
from hyperopt import base, tpe
from optuna import distributions

__all__ = ("HyperoptSampler",)


class HyperoptSampler(optuna.samplers.BaseSampler):
    """Suggests what Hyperopt suggests after the study's trials.

    Parameters that not all complete trials have, as conditional ones, are drawn at random.

    Args:
        seed: int.
    """

    def __init__(self, seed):
        self._seed = seed
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study, trial):
        del trial
        return optuna.search_space.intersection_search_space(_complete(study))

    def sample_relative(self, study, trial, search_space):
        del trial
        if not search_space:
            return {}
        expressions = {n: _expression(n, d) for n, d in search_space.items()}
        domain = base.Domain(lambda values: 0.0, expressions)
        trials = hyperopt.Trials()
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        for number, known in enumerate(_complete(study)):
            params = {n: _known(d, known.params[n]) for n, d in search_space.items()}
            trials.insert_trial_docs([_document(trials, number, params, sign * known.value)])
        trials.refresh()
        seed = int(np.random.default_rng(self._seed).integers(2**31))
        (suggested,) = tpe.suggest([len(trials)], domain, trials, seed, verbose=False)
        found = {n: v[0] for n, v in suggested["misc"]["vals"].items()}
        return {n: _suggested(d, found[n]) for n, d in search_space.items()}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _complete(study):
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _document(trials, number, params, loss):
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


def _expression(name, distribution):
    if isinstance(distribution, distributions.CategoricalDistribution):
        return hyperopt.hp.choice(name, list(range(len(distribution.choices))))
    low, high = distribution.low, distribution.high
    is_whole = isinstance(distribution, distributions.IntDistribution)
    if is_whole:
        # Rounded to the nearest, so that both ends are as probable as the rest.
        half = distribution.step / 2
        low, high = low - half, high + half
    if distribution.log:
        return hyperopt.hp.loguniform(name, np.log(low), np.log(high))
    return hyperopt.hp.uniform(name, low, high)


def _known(distribution, value):
    return distribution.to_internal_repr(value)


def _suggested(distribution, value):
    if isinstance(distribution, distributions.CategoricalDistribution):
        return distribution.choices[int(value)]
    low, high = distribution.low, distribution.high
    if isinstance(distribution, distributions.IntDistribution):
        steps = round((float(value) - low) / distribution.step)
        return int(min(max(low + steps * distribution.step, low), high))
    return min(max(float(value), low), high)
