"""How trials end: what the study is told, and whether the search goes on."""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from keras_tuner.src.engine import trial as kt_trial
from optuna.trial import TrialState

from tfbig import errors
from tfbig.tuners import (
    _json,
    _ledger,
    _objectives,
    _process_memory,
    _processes,
    _running,
    _trials,
    _tuner_types,
)

__all__ = ("Constraints", "Outcomes", "attributes_of")

_STATUS = kt_trial.TrialStatus

# A trial is feasible if all numbers that this returns for its metrics are <= 0.
Constraints: TypeAlias = Callable[[dict[str, float]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The arguments of `Trials.end`."""

    state: TrialState
    attrs: dict[str, str | int]
    values: list[float] | None
    constraints: dict[str, float] | None


class Outcomes:
    """Ends trials of this process, and judges the search by how trials have ended.

    Args:
        trials: The trials of the search.
        objectives: What it optimizes.
        constraints: Says which trials are feasible; None if all are.
        score_trial: Sets the score and best step of KerasTuner's trial.
        grace: Seconds without a heartbeat after which another process takes a trial.
        memory: Leaves trials to processes with more memory.
    """

    def __init__(
        self,
        trials: _trials.Trials,
        objectives: _objectives.Objectives,
        constraints: Constraints | None,
        score_trial: Callable[[_tuner_types.Trial], None],
        grace: float,
        memory: _process_memory.ProcessMemory,
    ) -> None:
        self._trials = trials
        self._ledger = trials.ledger
        self._objectives = objectives
        self._constraints = constraints
        self._score_trial = score_trial
        self._grace = grace
        self._memory = memory
        self._ended_before = 0

    def begin_search(self) -> None:
        """Forgets earlier failures: the user may have corrected the program."""
        self._ended_before = len(self._trials.ended())

    def end(self, running: _running.RunningTrial, why: str | None, max_retries: int) -> bool:
        """Ends a trial, or releases it to be run again.

        Args:
            running: The trial, with the status that the tuner gave it. It gets its final status
                and score.
            why: One of the reasons of `_trials`; None if the status says enough.
            max_retries: How often a trial that raised is run again.

        Returns:
            Whether it has ended. If not, it runs again, here or elsewhere.
        """
        trial_id = running.trial.trial_id
        if running.is_lost:
            return self._dropped(trial_id)
        if why == _trials.OUT_OF_MEMORY:
            if self._memory.leave_to_larger(running.index):
                print(f"Trial {trial_id} ran out of memory; a process that has more will run it.")
                return False
            why = _trials.INFEASIBLE
        outcome = self._judge(running, why, max_retries)
        if outcome is None:
            print(f"Trial {trial_id} raised an error and will run again.")
            self._ledger.release(running.index, raised=self._times_raised(running.index) + 1)
            return False
        return self._trials.end(running.index, **vars(outcome)) or self._dropped(trial_id)

    def _dropped(self, trial_id: str) -> Literal[False]:
        """Says that this process no longer owned a trial."""
        warnings.warn(
            f"Another process has taken over trial {trial_id}, because this one had no heartbeat "
            f"for {self._grace:g} s. The result of this process is dropped.",
            stacklevel=4,
        )
        return False

    def complete(self, index: int, trial: _tuner_types.Trial) -> bool:
        """Completes a paused trial of this process with the metrics that it has.

        Returns:
            Whether this process still owned it.
        """
        trial.status = _STATUS.COMPLETED
        values, constraints = self._scored(trial)
        outcome = _Outcome(TrialState.COMPLETE, attributes_of(trial, None), values, constraints)
        return self._trials.end(index, **vars(outcome))

    def _judge(
        self, running: _running.RunningTrial, why: str | None, max_retries: int
    ) -> _Outcome | None:
        """The outcome of a trial; None to run it again."""
        trial = running.trial
        values = constraints = None
        if trial.status == _STATUS.COMPLETED:
            values, constraints = self._scored(trial)
            if not all(map(math.isfinite, values)):
                trial.status, why = _STATUS.INVALID, _trials.INFEASIBLE
                trial.message = f"The objective is not finite: {values}."
        if trial.status == _STATUS.INVALID and why != _trials.INFEASIBLE:
            if self._times_raised(running.index) < max_retries:
                return None
            trial.status = _STATUS.FAILED
        if trial.status == _STATUS.COMPLETED:
            return _Outcome(TrialState.COMPLETE, attributes_of(trial, why), values, constraints)
        if trial.status == _STATUS.STOPPED:
            return _Outcome(
                TrialState.PRUNED, attributes_of(trial, _trials.STOPPED_EARLY), None, None
            )
        return _Outcome(TrialState.FAIL, attributes_of(trial, why or _trials.BROKEN), None, None)

    def _times_raised(self, index: int) -> int:
        """How often a trial was run again because it raised."""
        return int(json.loads(self._ledger.trial(index).note).get("raised", 0))

    def _scored(self, trial: _tuner_types.Trial) -> tuple[list[float], dict[str, float] | None]:
        """The values of the objectives and constraints; sets the score of the trial."""
        if self._objectives.is_single:
            with _objectives.nan_allowed():
                self._score_trial(trial)
            values = [float(trial.score)]
        else:
            values = [float(trial.metrics.get_last_value(name)) for name in self._objectives.names]
            trial.score = tuple(values)
        return values, self._constraints_of(trial)

    def _constraints_of(self, trial: _tuner_types.Trial) -> dict[str, float] | None:
        if self._constraints is None:
            return None
        metrics = {name: h.get_last_value() for name, h in trial.metrics.metrics.items()}
        found = self._constraints(metrics)
        try:
            return {k: float(v) for k, v in found.items()}
        except (AttributeError, TypeError, ValueError) as e:
            raise errors.SearchError(
                f"`constraints` must return a dictionary of numbers. Received: {found!r}."
            ) from e

    def is_feasible(self, trial: _tuner_types.Trial) -> bool:
        """Whether the metrics of a trial violate no constraint."""
        return all(value <= 0 for value in (self._constraints_of(trial) or {}).values())

    def record_death(self, pid: int, message: str, may_lack_memory: bool) -> bool:
        """Ends the trial of a process of this machine that died; returns whether it had one.

        Args:
            pid: The id of the process.
            message: How it died.
            may_lack_memory: Whether a process with more memory may run the trial.
        """
        row = self._of_process(pid)
        if row is None or not self._ledger.take(row):
            return False
        if not (may_lack_memory and self._memory.leave_to_larger(row.index)):
            attrs = {_trials.MESSAGE: message, _trials.WHY: _trials.INFEASIBLE}
            self._trials.end(row.index, TrialState.FAIL, attrs)
        return True

    def seconds_of_process(self, pid: int, goes_on: bool) -> float | None:
        """For how long the trial was run that a process of this machine runs; None if none.

        Args:
            pid: The id of the process.
            goes_on: Whether a trial that is run again continues where it stopped, so that the time
                before counts.
        """
        row = self._of_process(pid)
        frozen = None if row is None else self._trials.read_again(row.index)
        if row is None or frozen is None:
            return None
        before = _trials.seconds_before(frozen) if goes_on else 0.0
        return before + _trials.seconds_now(frozen, row.owner)

    def _of_process(self, pid: int) -> _ledger.TrialRow | None:
        rows = self._ledger.trials(state=_ledger.RUNNING)
        return next((row for row in rows if _processes.process_id(row.owner) == pid), None)

    # --- The search as a whole ---

    def check_failures(self, max_consecutive: int) -> None:
        """Raises if so many trials in a row have failed since the search began."""
        if self._trials.failed() < max_consecutive:
            return
        count, message = 0, ""
        for frozen in self._trials.ended()[self._ended_before :]:
            why = frozen.user_attrs.get(_trials.WHY)
            if why == _trials.BROKEN:
                count += 1
                message = frozen.user_attrs.get(_trials.MESSAGE, "")
            elif why != _trials.INFEASIBLE:
                count = 0
            if count >= max_consecutive:
                raise errors.SearchError(
                    f"{count} trials in a row failed. The last one ended with:\n{message}"
                )

    def check_result(self) -> None:
        """Raises if trials have ended and none is complete."""
        ended = self._trials.ended()
        if not ended or any(t.state == TrialState.COMPLETE for t in ended):
            return
        found = [t.user_attrs[_trials.MESSAGE] for t in ended if _trials.MESSAGE in t.user_attrs]
        why = f". The first one ended with:\n{found[0]}" if found else ": all were pruned."
        raise errors.SearchError(f"None of {len(ended)} trials completed{why}")


def attributes_of(trial: _tuner_types.Trial, why: str | None) -> dict[str, str | int]:
    """What the study stores of an ended trial."""
    attrs = {
        _trials.VALUES: _json.dumps(trial.hyperparameters.values),
        _trials.METRICS: json.dumps(trial.metrics.get_config()),
        _trials.BEST_STEP: int(trial.best_step or 0) or None,
        _trials.WHY: why,
        _trials.MESSAGE: trial.message,
    }
    return {name: value for name, value in attrs.items() if value is not None}
