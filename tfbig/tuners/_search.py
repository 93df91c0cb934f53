"""The parts of an oracle that exist once its study is open."""

import dataclasses

from tfbig.tuners import (
    _agreement,
    _outcomes,
    _process_memory,
    _proposals,
    _queue,
    _running,
    _trials,
    _views,
)

__all__ = ("Search",)


@dataclasses.dataclass(frozen=True)
class Search:
    """A search, as this process sees it.

    Attributes:
        seed: The seed of the search, the same in all processes.
        space: The hyperparameters that all processes know.
        trials: The trials in the study.
        queue: Decides which trial runs next.
        proposals: Values that no trial has.
        running: The trials that this process runs.
        outcomes: Ends trials.
        views: The trials as KerasTuner sees them.
        memory: Leaves trials to processes with more memory.
    """

    seed: int
    space: _agreement.SharedSpace
    trials: _trials.Trials
    queue: _queue.TrialQueue
    proposals: _proposals.Proposals
    running: _running.RunningTrials
    outcomes: _outcomes.Outcomes
    views: _views.TrialViews
    memory: _process_memory.ProcessMemory
