"""Which trial of a population is trained next, and as a copy of which other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import FrozenTrial

from tfbig.tuners import (
    _json,
    _ledger,
    _proposals,
    _rungs,
    _running,
    _trials,
    _tuner_types,
    _views,
)
from tfbig.tuners._generations import Generation

if TYPE_CHECKING:
    from tfbig.tuners._population_oracle import PopulationOracle

__all__ = ("PopulationQueue",)

# The attribute of the study's trial that has the values of its first generation, if they changed.
_FIRST_VALUES = "tfbig:first values"


class PopulationQueue(_rungs.RungQueue):
    """Continues trials once all have completed a generation, the worst as copies of the best.

    See `RungQueue` for the arguments.
    """

    _oracle: PopulationOracle

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
            note["copied"][rung + 1] = best.index
            note["values"][rung + 1] = _json.dumps(values)
        return self.promote(row, note)

    def values_in(self, row: _ledger.TrialRow, rung: int) -> _tuner_types.Values:
        """The values of a trial in a generation."""
        changed = _rungs.note_of(row)["values"]
        last = max((r for r in changed if r <= rung), default=None)
        attrs = self._trials.by_index()[row.index].user_attrs
        first: str = attrs.get(_FIRST_VALUES, attrs[_trials.VALUES])
        values: _tuner_types.Values = _json.loads(first if last is None else changed[last])
        return values

    def begin(self, index: int) -> FrozenTrial | None:
        frozen = super().begin(index)
        if frozen is None:
            return None
        row = self._ledger.trial(index)
        if not _rungs.note_of(row)["values"]:
            return frozen
        storage, attrs = self._trials.study._storage, frozen.user_attrs
        if _FIRST_VALUES not in attrs:
            storage.set_trial_user_attr(frozen._trial_id, _FIRST_VALUES, attrs[_trials.VALUES])
        values = self.values_in(row, _rungs.rung_of(row))
        return self._trials.store(frozen, self._hyperparameters(), values)

    def source_of(self, index: int) -> tuple[int, int] | None:
        """The generation and the trial from which a trial continues; None in its first one."""
        row = self._ledger.trial(index)
        rung = _rungs.rung_of(row)
        if rung == 0:
            return None
        return rung - 1, _rungs.note_of(row)["copied"].get(rung, index)

    def copied_after(self, index: int) -> int:
        """The epochs after which a trial was last copied; 0 if it never was."""
        copied = _rungs.note_of(self._ledger.trial(index))["copied"]
        return (0, *self._oracle.generations)[max(copied, default=0)]

    def lineage(self, index: int) -> list[Generation]:
        """How the model of a trial was trained, in all generations so far."""
        rows = {row.index: row for row in self._ledger.trials()}
        found = []
        begins = (0, *self._oracle.generations)
        for rung in reversed(range(_rungs.rung_of(rows[index]) + 1)):
            values = self.values_in(rows[index], rung)
            found.append(Generation(begins[rung], _views.trial_id_of(index), values))
            index = _rungs.note_of(rows[index])["copied"].get(rung, index)
        return found[::-1]
