"""Samplers and pruners by name, or made by a user's function of a seed.

A sampler is made anew for each trial, seeded by the search's seed and the trial's number:
a search that is resumed suggests what it would have suggested.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import optuna

from tfbig import errors
from tfbig.tuners import _study

__all__ = ("Maker", "pruner", "sampler")


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes samplers or pruners.

    Attributes:
        name: str, the same in all processes of a search.
        make: function of two seeds, of the trial and of the search.
    """

    name: str
    make: Callable[[int, int], Any]


def _tpe(seed, at_random=10):
    # Regards running trials as bad ones, so that parallel processes look elsewhere.
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=at_random, constant_liar=True)


def _gp(seed, at_random=10):
    return optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=at_random, deterministic_objective=False
    )


def _hyperopt(seed):
    from tfbig.tuners._hyperopt import HyperoptSampler

    return HyperoptSampler(seed=seed)


def _qmc(seed, of_search):
    # The sequence is one for all trials; the study knows how much of it is used.
    rest = optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.QMCSampler(seed=of_search, scramble=True, independent_sampler=rest)


def _by_trial(function):
    """A function of a trial's seed as one of that and the search's."""
    return lambda seed, of_search: function(seed)


_SAMPLERS = {
    "random": _by_trial(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "tpe": _by_trial(_tpe),
    "gp": _by_trial(_gp),
    "cmaes": _by_trial(lambda seed: optuna.samplers.CmaEsSampler(seed=seed)),
    "nsga2": _by_trial(lambda seed: optuna.samplers.NSGAIISampler(seed=seed)),
    "qmc": _qmc,
    "hyperopt": _by_trial(_hyperopt),
}

# Modules that a sampler needs besides Optuna, and what to install.
_NEEDS = {
    "gp": (("torch", "scipy"), "torch scipy"),
    "cmaes": (("cmaes",), "cmaes"),
    "qmc": (("scipy",), "scipy"),
    "hyperopt": (("hyperopt",), "tfbig[hyperopt]"),
}

_PRUNERS = {
    "median": _by_trial(lambda seed: optuna.pruners.MedianPruner(n_startup_trials=5)),
    "asha": _by_trial(lambda seed: optuna.pruners.SuccessiveHalvingPruner()),
    "hyperband": _by_trial(lambda seed: optuna.pruners.HyperbandPruner()),
    "patience": _by_trial(lambda seed: optuna.pruners.PatientPruner(None, patience=5)),
}


def beginning_at_random(given, trials):
    """The `Maker` of a sampler that begins with trials at random."""
    if type(trials) is not int or trials < 1:
        raise errors.InvalidOptionError(
            "`num_initial_points` must be an integer >= 1. Received: "
            f"num_initial_points={trials!r}."
        )
    made = {"tpe": _tpe, "gp": _gp}.get(given)
    if made is None:
        raise errors.InvalidOptionError(
            f"`num_initial_points` goes with sampler='tpe' or 'gp'. Received: sampler={given!r}."
        )
    _check_installed(given)
    return Maker(
        f"{given} after {trials} at random", _by_trial(functools.partial(made, at_random=trials))
    )


def _check_installed(name):
    modules, install = _NEEDS.get(name, ((), ""))
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise errors.InvalidOptionError(
            f"sampler={name!r} needs {' and '.join(missing)}, not installed here. "
            f"pip install {install}"
        )


def sampler(given, storage):
    """The `Maker` of the samplers that a user asks for.

    Args:
        given: str, one of the names above, or a function of a seed.
        storage: that of the search.

    Raises:
        InvalidOptionError: If it is neither; if the name needs what is not installed; or if it
            would unpickle what others may have written.
    """
    if isinstance(given, Maker):
        return given
    found = _maker("sampler", given, _SAMPLERS)
    if isinstance(given, str):
        _check_installed(given)
    if given == "cmaes" and storage not in (None, _study.MEMORY):
        raise errors.InvalidOptionError(
            "sampler='cmaes' keeps a pickle in the study, and unpickles what it finds there. "
            f"Received: storage={_study.shown(storage)!r}, to which others may write. Use the "
            "default storage, or another sampler; or give a function of a seed if you trust it."
        )
    return found


def pruner(given, objective):
    """The `Maker` of the pruners that a user asks for; None for none."""
    if given is None:
        return None
    found = _maker("pruner", given, _PRUNERS)
    if hasattr(objective, "objectives"):
        raise errors.InvalidOptionError(
            "A pruner goes with one objective; of several, none says which trial is worse. "
            f"Received: pruner={found.name!r} and {len(objective.objectives)} objectives."
        )
    return found


def _maker(kind, given, known):
    if isinstance(given, str) and given in known:
        return Maker(given, known[given])
    base = optuna.samplers.BaseSampler if kind == "sampler" else optuna.pruners.BasePruner
    if callable(given):
        if isinstance(given, type) and issubclass(given, base):
            return Maker(given.__name__, lambda seed, of_search: given())
        name = getattr(given, "__qualname__", type(given).__name__)
        return Maker(f"function {name}", _by_trial(given))
    raise errors.InvalidOptionError(
        f"`{kind}` must be one of {', '.join(sorted(known))}, or a function of a seed that returns "
        f"an optuna.{kind}s.{base.__name__}. Received: {kind}={given!r}."
    )
