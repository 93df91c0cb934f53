"""Samplers and pruners, by name or from a user's function of a seed.

Each trial has a sampler of its own, seeded by the seed of the search and the index of the trial, so
that a resumed search makes the same suggestions.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import optuna

from tfbig import errors
from tfbig.tuners import _study, _tuner_types

__all__ = ("Maker", "PrunerOption", "SamplerOption", "pruner", "sampler")

# A sampler or a pruner, as the name of its maker says.
_Made: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes samplers or pruners.

    Attributes:
        name: The same in all processes of a search.
        make: Makes one, given the seed of a trial and that of the search.
    """

    name: str
    make: Callable[[int, int], _Made]


# A name, or a function of a seed; a class counts as a function without one.
SamplerOption: TypeAlias = (
    str | Maker | Callable[[int], optuna.samplers.BaseSampler] | type[optuna.samplers.BaseSampler]
)
PrunerOption: TypeAlias = (
    str | Callable[[int], optuna.pruners.BasePruner] | type[optuna.pruners.BasePruner] | None
)


def _tpe(seed: int, random_trials: int = 10) -> optuna.samplers.BaseSampler:
    # Considers running trials bad, so that parallel processes look elsewhere.
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=random_trials, constant_liar=True)


def _gp(seed: int, random_trials: int = 10) -> optuna.samplers.BaseSampler:
    return optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=random_trials, deterministic_objective=False
    )


def _hyperopt(seed: int) -> optuna.samplers.BaseSampler:
    from tfbig.tuners._hyperopt import HyperoptSampler

    return HyperoptSampler(seed=seed)


def _qmc(seed: int, of_search: int) -> optuna.samplers.BaseSampler:
    # All trials share one sequence; the study knows how much of it is used.
    rest = optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.QMCSampler(seed=of_search, scramble=True, independent_sampler=rest)


def _by_trial(function: Callable[[int], _Made]) -> Callable[[int, int], _Made]:
    """Ignores the seed of the search."""
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

# The modules that a sampler needs besides Optuna, and what to install.
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
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


def beginning_at_random(given: SamplerOption, trials: int) -> Maker:
    """Makes samplers that begin with random trials."""
    if type(trials) is not int or trials < 1:
        raise errors.InvalidOptionError(
            "`num_initial_points` must be an integer >= 1. Received: "
            f"num_initial_points={trials!r}."
        )
    made = {"tpe": _tpe, "gp": _gp}.get(given) if isinstance(given, str) else None
    if made is None or not isinstance(given, str):
        raise errors.InvalidOptionError(
            f"`num_initial_points` needs sampler='tpe' or 'gp'. Received: sampler={given!r}."
        )
    _check_installed(given)
    return Maker(
        f"{given} after {trials} at random",
        _by_trial(functools.partial(made, random_trials=trials)),
    )


def _check_installed(name: str) -> None:
    modules, install = _NEEDS.get(name, ((), ""))
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise errors.InvalidOptionError(
            f"sampler={name!r} needs {' and '.join(missing)}, which is not installed. "
            f"pip install {install}"
        )


def sampler(given: SamplerOption, storage: str | None) -> Maker:
    """Makes the samplers that a user asks for.

    Args:
        given: One of the names above, or a function of a seed.
        storage: Of the search.

    Raises:
        InvalidOptionError: If it is neither; if the name needs a package that is not installed; or
            if the sampler would unpickle what others may have written.
    """
    if isinstance(given, Maker):
        return given
    found = _maker("sampler", given, _SAMPLERS)
    if isinstance(given, str):
        _check_installed(given)
    if given == "cmaes" and storage is not None and storage != _study.MEMORY:
        raise errors.InvalidOptionError(
            "sampler='cmaes' must not be used with a storage to which others may write, because it "
            f"unpickles what it finds there. Received: storage={_study.shown(storage)!r}. Use the "
            "default storage or another sampler; or pass a function of a seed if you trust the "
            "storage."
        )
    return found


def pruner(given: PrunerOption, objective: _tuner_types.Objective) -> Maker | None:
    """Makes the pruners that a user asks for; None for none."""
    if given is None:
        return None
    found = _maker("pruner", given, _PRUNERS)
    if hasattr(objective, "objectives"):
        raise errors.InvalidOptionError(
            "`pruner` needs a single objective: with several, it cannot say which trial is worse. "
            f"Received: pruner={found.name!r} and {len(objective.objectives)} objectives."
        )
    return found


def _maker(
    kind: Literal["sampler", "pruner"],
    given: SamplerOption | PrunerOption,
    known: dict[str, Callable[[int, int], _Made]],
) -> Maker:
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
