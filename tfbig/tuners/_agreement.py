"""What all processes of a search must agree on: its settings, its seed and its space."""

import datetime
import json
import random

import optuna

from tfbig import errors
from tfbig.tuners import _json, _ledger, _space
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = (
    "CROSS_VALIDATION",
    "EXECUTIONS",
    "FOLDS",
    "KIND",
    "MAX_TRIALS",
    "SCORING",
    "SETTINGS",
    "SPACE",
    "SharedSpace",
    "agree_on_settings",
    "record_changes",
)

# Metadata of the search: what all processes agree on; the space; and, for those who only look,
# what the last process to begin was told.
SETTINGS, SPACE, MAX_TRIALS = "settings", "space", "max_trials"

# The setting that names the oracle, as studies have stored it.
KIND = "way to search"

# The settings that say how a trial is scored.
FOLDS, EXECUTIONS = "folds", "executions per trial"
CROSS_VALIDATION, SCORING = "cross-validation", "scoring"

# The attribute of a study that lists what was changed when it resumed, and when.
CHANGES = "tfbig:changes"

# Scores that are means of other numbers of trainings can still be compared.
_CHANGEABLE = ("sampler", "pruner", EXECUTIONS)

# What studies have not always stored.
_ADDED = {FOLDS, EXECUTIONS, CROSS_VALIDATION, SCORING}

_LEAVE = (
    "It is unchanged. Use a different `project_name`, or `overwrite=True` to start the search over."
)


def agree_on_settings(
    ledger: _ledger.Ledger, study: str, settings: dict[str, str], seed: int | None
) -> tuple[int, list[str]]:
    """Stores the settings of a new search, or checks those of one that is resumed or joined.

    Args:
        ledger: The ledger of the study.
        study: Name and place of the study, for errors.
        settings: What a study was created with. The sampler, the pruner and the number of
            executions may change when a search resumes, the rest must not.
        seed: The seed that the user gave; None for any.

    Returns:
        The seed of the search, drawn at random if nobody gave one; and what has changed.

    Raises:
        StudyError: If a setting differs from the stored one, and must not.
    """
    wanted = settings if seed is None else settings | {"seed": str(seed)}
    drawn = {"seed": str(random.SystemRandom().randrange(2**31))}

    def agreed(text: str | None) -> str:
        known = drawn | wanted if text is None else json.loads(text)
        # Studies that were stored without them do not say.
        unsaid = {name: wanted[name] for name in _ADDED & wanted.keys() - known.keys()}
        return json.dumps(known | unsaid)

    known = json.loads(ledger.change_metadata(SETTINGS, agreed))
    changed = [name for name, value in wanted.items() if known.get(name, "") != value]
    for name in changed:
        told = f"{'oracle' if name == KIND else name}: {known.get(name)!r}, expected"
        if name not in _CHANGEABLE:
            raise errors.StudyError(
                f"The study {study} was created by a different search ({told} {wanted[name]!r}). "
                + _LEAVE
            )
        if ledger.has_others():
            raise errors.StudyError(
                f"Other processes work on the study {study} in another way ({told} "
                f"{wanted[name]!r}). It may change once they have ended. {_LEAVE}"
            )
    if changed:
        new = json.dumps(known | wanted)
        ledger.change_metadata(SETTINGS, lambda text: new)
    return int(known["seed"]), [f"{n}: {known.get(n)}, now {wanted[n]}" for n in changed]


def record_changes(study: optuna.Study, changes: list[str]) -> None:
    """Writes to the study what was changed when the search resumed, and says so."""
    if not changes:
        return
    known = study.user_attrs.get(CHANGES, [])
    now = datetime.datetime.now().isoformat(timespec="seconds")
    study.set_user_attr(CHANGES, [*known, *({"time": now, "change": c} for c in changes)])
    print(f"The search resumes with changes ({'; '.join(changes)}).", flush=True)


class SharedSpace:
    """The hyperparameters that all processes of a search know.

    Args:
        ledger: The ledger of the study.
        study: Name and place of the study, for errors.
    """

    def __init__(self, ledger: _ledger.Ledger, study: str) -> None:
        self._ledger = ledger
        self._study = study
        self._known: str | None = None

    def check(self, hyperparameters: HyperParameters) -> list[str]:
        """Compares the space of a program with that of the study.

        Returns:
            What has become wider since the study was created.

        Raises:
            StudyError: If the spaces differ in another way, or have nothing to do with each other.
        """
        text = self._ledger.metadata(SPACE)
        if text is None:
            return []
        known = HyperParameters.from_config(_json.loads(text))
        self._check_kinds(hyperparameters, known)
        return self._widened(hyperparameters, known)

    def push(self, hyperparameters: HyperParameters) -> None:
        """Merges the hyperparameters known here with those that the study knows, both ways."""
        self._known = self._ledger.change_metadata(
            SPACE, lambda text: _merged(hyperparameters, text)
        )

    def pull(self, hyperparameters: HyperParameters) -> None:
        """Adds the hyperparameters that other processes have found."""
        text = self._ledger.metadata(SPACE)
        if text != self._known:
            self._known = text
            _merged(hyperparameters, text)

    def _check_kinds(self, here: HyperParameters, known: HyperParameters) -> None:
        mine = {hp.name: type(hp).__name__ for hp in here.space}
        theirs = {hp.name: type(hp).__name__ for hp in known.space}
        differing = [n for n in mine.keys() & theirs.keys() if mine[n] != theirs[n]]
        if differing or (mine and theirs and not mine.keys() & theirs.keys()):
            raise errors.StudyError(
                f"The study {self._study} was created by a different search (space: {theirs}, "
                f"expected {mine}). {_LEAVE}"
            )

    def _widened(self, here: HyperParameters, known: HyperParameters) -> list[str]:
        found = []
        for hp in here.space:
            before = next(
                (k for k in known.space if k.name == hp.name and k.conditions == hp.conditions),
                None,
            )
            if before is None or _space.range_of(before) == _space.range_of(hp):
                continue
            change = f"{hp.name}: {_space.range_of(before)}, now {_space.range_of(hp)}"
            if not _space.contains(hp, before):
                raise errors.StudyError(
                    f"The study {self._study} was created with another range ({change}). A range "
                    f"may become wider, but not lose values that were tried. {_LEAVE}"
                )
            found.append(change)
        return found


def _merged(hyperparameters: HyperParameters, text: str | None) -> str:
    """Adds those of a space that are missing; returns the space with all of them, as JSON."""
    if text is not None:
        known = HyperParameters.from_config(_json.loads(text))
        missing = [hp for hp in known.space if not hyperparameters._exists(hp.name, hp.conditions)]
        hyperparameters.merge(missing)
    space = hyperparameters.copy()
    space.values = {}
    return _json.dumps(space.get_config())
