"""Samplers and pruners, by name or from a user's function of a seed.

Each trial has a sampler of its own, seeded by the seed of the search and the index of the trial, so
that a resumed search makes the same suggestions.
"""

import dataclasses
import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import optuna
from optuna.distributions import CategoricalDistribution

from tfbig import _integers, errors
from tfbig.tuners import _space, _study, _tuner_types

__all__ = ("Maker", "PrunerOption", "SamplerOption", "pruner", "sampler", "warn_of_random_values")

# A sampler or a pruner, as the name of its maker says.
_Made: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes samplers or pruners.

    Attributes:
        name: The same in all processes of a search.
        make: Makes one, given the seed of a trial and that of the search.
        kind: The name by which a user asked for it; None for a function.
    """

    name: str
    make: Callable[[int, int], _Made]
    kind: str | None = None


# A name, or a function of a seed; a class counts as a function without one.
SamplerOption: TypeAlias = (
    str | Maker | Callable[[int], optuna.samplers.BaseSampler] | type[optuna.samplers.BaseSampler]
)
PrunerOption: TypeAlias = (
    str | Callable[[int], optuna.pruners.BasePruner] | type[optuna.pruners.BasePruner] | None
)


# What a sampler or a pruner takes besides a seed, by name.
Options: TypeAlias = dict[str, Any]


# Else they log a line for each such hyperparameter of each trial; see `warn_of_random_values`.
_SILENT: Options = {"warn_independent_sampling": False}


def _tpe(seed: int, of_search: int, **options: Any) -> optuna.samplers.BaseSampler:
    # Considers running trials bad, so that parallel processes look elsewhere.
    return optuna.samplers.TPESampler(seed=seed, **{"constant_liar": True} | options)


def _gp(seed: int, of_search: int, **options: Any) -> optuna.samplers.BaseSampler:
    defaults: Options = {"deterministic_objective": False, **_SILENT}
    return optuna.samplers.GPSampler(seed=seed, **defaults | options)


def _cmaes(seed: int, of_search: int, **options: Any) -> optuna.samplers.BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, **_SILENT | options)


def _hyperopt(seed: int, of_search: int, **options: Any) -> optuna.samplers.BaseSampler:
    from tfbig.tuners._hyperopt import HyperoptSampler

    return HyperoptSampler(seed=seed)


def _qmc(seed: int, of_search: int, **options: Any) -> optuna.samplers.BaseSampler:
    # All trials share one sequence; the study knows how much of it is used.
    rest = optuna.samplers.RandomSampler(seed=seed)
    defaults: Options = {"scramble": True, "independent_sampler": rest, **_SILENT}
    return optuna.samplers.QMCSampler(seed=of_search, **defaults | options)


def _seeded(kind: type) -> Callable[..., _Made]:
    """Makes samplers of a class; ignores the seed of the search."""
    return lambda seed, of_search, **options: kind(seed=seed, **options)


def _unseeded(kind: type, **defaults: Any) -> Callable[..., _Made]:
    """Makes pruners of a class."""
    return lambda seed, of_search, **options: kind(**defaults | options)


def _by_trial(function: Callable[[int], _Made]) -> Callable[[int, int], _Made]:
    """Ignores the seed of the search."""
    return lambda seed, of_search: function(seed)


# The class of each sampler, whose arguments are its options; None if it has none.
_SAMPLERS: dict[str, tuple[type | None, Callable[..., _Made]]] = {
    "random": (None, _seeded(optuna.samplers.RandomSampler)),
    "tpe": (optuna.samplers.TPESampler, _tpe),
    "gp": (optuna.samplers.GPSampler, _gp),
    "cmaes": (optuna.samplers.CmaEsSampler, _cmaes),
    "nsga2": (optuna.samplers.NSGAIISampler, _seeded(optuna.samplers.NSGAIISampler)),
    "qmc": (optuna.samplers.QMCSampler, _qmc),
    "hyperopt": (None, _hyperopt),
}

# What samplers cannot model, and therefore draw at random.
UNORDERED, CONDITIONS = "choices without order", "conditions"
_NOT_MODELED = {"cmaes": (UNORDERED, CONDITIONS), "gp": (CONDITIONS,), "qmc": (CONDITIONS,)}

# The modules that a sampler or pruner needs besides Optuna, and what to install.
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "gp": (("torch", "scipy"), "torch scipy"),
    "cmaes": (("cmaes",), "cmaes"),
    "qmc": (("scipy",), "scipy"),
    "wilcoxon": (("scipy",), "scipy"),
    "hyperopt": (("hyperopt",), "tfbig[hyperopt]"),
}

_PRUNERS: dict[str, tuple[type | None, Callable[..., _Made]]] = {
    "median": (
        optuna.pruners.MedianPruner,
        _unseeded(optuna.pruners.MedianPruner, n_startup_trials=5),
    ),
    "asha": (
        optuna.pruners.SuccessiveHalvingPruner,
        _unseeded(optuna.pruners.SuccessiveHalvingPruner),
    ),
    "hyperband": (optuna.pruners.HyperbandPruner, _unseeded(optuna.pruners.HyperbandPruner)),
    "patience": (
        optuna.pruners.PatientPruner,
        _unseeded(optuna.pruners.PatientPruner, wrapped_pruner=None, patience=5),
    ),
    "wilcoxon": (optuna.pruners.WilcoxonPruner, _unseeded(optuna.pruners.WilcoxonPruner)),
}


def beginning_at_random(given: SamplerOption, trials: int) -> Maker:
    """Makes samplers that begin with random trials."""
    trials = _integers.checked("num_initial_points", trials)
    if given not in ("tpe", "gp"):
        raise errors.InvalidOptionError(
            f"`num_initial_points` needs sampler='tpe' or 'gp'. Received: sampler={given!r}."
        )
    _check_installed(given)
    _, make = _SAMPLERS[given]
    made = functools.partial(make, n_startup_trials=trials)
    return Maker(f"{given} after {trials} at random", made, given)


def warn_of_random_values(made: Maker, space: Iterable[_tuner_types.Hyperparameter]) -> None:
    """Warns if samplers draw hyperparameters at random that they cannot model.

    Args:
        made: The maker of the samplers.
        space: The hyperparameters.
    """
    cannot = _NOT_MODELED.get(made.kind or "", ())
    names: dict[str, None] = {}
    for hp in space:
        parameter = _space.parameter_of(hp)
        if parameter is None or parameter.distribution.single():
            continue
        has_order = not isinstance(parameter.distribution, CategoricalDistribution)
        if (hp.conditions and CONDITIONS in cannot) or (not has_order and UNORDERED in cannot):
            names[hp.name] = None
    if names:
        warnings.warn(
            f"sampler={made.kind!r} models no {' and no '.join(cannot)}: it draws "
            f"{', '.join(map(repr, names))} at random. sampler='tpe' models them.",
            stacklevel=5,
        )


def _check_installed(name: str, kind: str = "sampler") -> None:
    modules, install = _NEEDS.get(name, ((), ""))
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise errors.InvalidOptionError(
            f"{kind}={name!r} needs {' and '.join(missing)}, which is not installed. "
            f"pip install {install}"
        )


def sampler(given: SamplerOption, storage: str | None, options: Options | None = None) -> Maker:
    """Makes the samplers that a user asks for.

    Args:
        given: One of the names above, or a function of a seed.
        storage: Of the search.
        options: Of a sampler that is given by name.

    Raises:
        InvalidOptionError: If it is neither; if the name needs a package that is not installed; if
            the sampler has no such option; or if it would unpickle what others may have written.
    """
    if isinstance(given, Maker):
        _check_options("sampler", given.name, None, options)
        return given
    found = _maker("sampler", given, _SAMPLERS, options)
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


def pruner(
    given: PrunerOption, objective: _tuner_types.Objective, options: Options | None = None
) -> Maker | None:
    """Makes the pruners that a user asks for; None for none."""
    if given is None:
        _check_options("pruner", None, None, options)
        return None
    found = _maker("pruner", given, _PRUNERS, options)
    if isinstance(given, str):
        _check_installed(given, "pruner")
    if hasattr(objective, "objectives"):
        raise errors.InvalidOptionError(
            "`pruner` needs a single objective: with several, it cannot say which trial is worse. "
            f"Received: pruner={found.name!r} and {len(objective.objectives)} objectives."
        )
    return found


def _maker(
    kind: Literal["sampler", "pruner"],
    given: SamplerOption | PrunerOption,
    known: dict[str, tuple[type | None, Callable[..., _Made]]],
    options: Options | None,
) -> Maker:
    if isinstance(given, str) and given in known:
        of, make = known[given]
        options = _check_options(kind, given, of, options)
        told = ", ".join(f"{name}={options[name]!r}" for name in sorted(options))
        name = f"{given} ({told})" if told else given
        made = functools.partial(make, **options)
        # Fails now rather than at the first trial, if an option has a wrong value.
        if options:
            _try_out(kind, name, made)
        return Maker(name, made, given)
    base = optuna.samplers.BaseSampler if kind == "sampler" else optuna.pruners.BasePruner
    if callable(given):
        _check_options(kind, given, None, options)
        if isinstance(given, type) and issubclass(given, base):
            return Maker(given.__name__, lambda seed, of_search: given())
        name = getattr(given, "__qualname__", type(given).__name__)
        return Maker(f"function {name}", _by_trial(given))
    raise errors.InvalidOptionError(
        f"`{kind}` must be one of {', '.join(sorted(known))}, or a function of a seed that returns "
        f"an optuna.{kind}s.{base.__name__}. Received: {kind}={given!r}."
    )


def _check_options(kind: str, given: object, of: type | None, options: Options | None) -> Options:
    """Options that a class takes; raises if it has no such option."""
    options = dict(options or {})
    known = set(inspect.signature(of).parameters) - {"seed"} if of else set()
    unknown = sorted(options.keys() - known)
    if unknown:
        has = ", ".join(sorted(known)) or "no options"
        raise errors.InvalidOptionError(
            f"`{kind}_options` must have options of the {kind} {given!r}, which has {has}. "
            f"Received: {unknown[0]!r}."
        )
    return options


def _try_out(kind: str, name: str, made: Callable[[int, int], _Made]) -> None:
    try:
        with _study.quiet():
            made(0, 0)
    except (TypeError, ValueError) as e:
        raise errors.InvalidOptionError(
            f"`{kind}_options` must be valid. Received: {name}. {e}"
        ) from None
