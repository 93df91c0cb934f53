"""What all processes of a search must agree on: its settings, its seed and its space."""

import json
import random

from tfbig import errors
from tfbig.tuners import _json, _ledger
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("KIND", "MAX_TRIALS", "SETTINGS", "SPACE", "agree_on_settings", "share_space")

# Metadata of the search: what all processes agree on; the space; and, for those who only look,
# what the last process to begin was told.
SETTINGS, SPACE, MAX_TRIALS = "settings", "space", "max_trials"

# The setting that names the oracle, as studies have stored it.
KIND = "way to search"

_LEAVE = (
    "It is unchanged. Use a different `project_name`, or `overwrite=True` to start the search over."
)


def agree_on_settings(
    ledger: _ledger.Ledger, study: str, settings: dict[str, str], seed: int | None
) -> int:
    """Stores the settings of a new search, or checks those of one that is resumed or joined.

    Args:
        ledger: The ledger of the study.
        study: Name and place of the study, for errors.
        settings: What must not change during the life of a study.
        seed: The seed that the user gave; None for any.

    Returns:
        The seed of the search; drawn at random if nobody gave one.

    Raises:
        StudyError: If a setting differs from the stored one.
    """
    wanted = settings if seed is None else settings | {"seed": str(seed)}
    drawn = {"seed": str(random.SystemRandom().randrange(2**31))}
    stored = ledger.change_metadata(SETTINGS, lambda text: text or json.dumps(drawn | wanted))
    known = json.loads(stored)
    for name, value in wanted.items():
        if known.get(name) != value:
            raise errors.StudyError(
                f"The study {study} was created by a different search "
                f"({'oracle' if name == KIND else name}: {known.get(name)!r}, expected {value!r}). "
                + _LEAVE
            )
    return int(known["seed"])


def share_space(ledger: _ledger.Ledger, study: str, hyperparameters: HyperParameters) -> None:
    """Merges the hyperparameters known here with those that the study knows, both ways.

    Raises:
        StudyError: If the two spaces have nothing to do with each other.
    """

    def merge(text: str | None) -> str:
        if text is not None:
            known = HyperParameters.from_config(_json.loads(text))
            _check_kinds(hyperparameters, known, study)
            missing = [
                hp for hp in known.space if not hyperparameters._exists(hp.name, hp.conditions)
            ]
            hyperparameters.merge(missing)
        space = hyperparameters.copy()
        space.values = {}
        return _json.dumps(space.get_config())

    ledger.change_metadata(SPACE, merge)


def _check_kinds(here: HyperParameters, known: HyperParameters, study: str) -> None:
    mine = {hp.name: type(hp).__name__ for hp in here.space}
    theirs = {hp.name: type(hp).__name__ for hp in known.space}
    differing = [n for n in mine.keys() & theirs.keys() if mine[n] != theirs[n]]
    if differing or (mine and theirs and not mine.keys() & theirs.keys()):
        raise errors.StudyError(
            f"The study {study} was created by a different search (space: {theirs}, expected "
            f"{mine}). {_LEAVE}"
        )
