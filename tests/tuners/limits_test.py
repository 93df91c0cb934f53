"""Limits of time, of patience and of memory."""

import os
import time

import keras
import keras_tuner
import numpy as np
import pytest

from tests.tuners.tuner_oracle_test import end, line
from tests.tuners.tuner_test import DATA, build
from tfbig import _keras, errors, tuners
from tfbig.tuners import _budget, _trials

COMPLETED, RUNNING, STOPPED, IDLE, INVALID = "COMPLETED", "RUNNING", "STOPPED", "IDLE", "INVALID"
LIMITS = _budget.Limits


# --- Patience ------------------------------------------------------------------------------


def ended(oracle, losses):
    """How many trials end with these losses before the search does."""
    for number, loss in enumerate(losses):
        trial = oracle.create_trial("a")
        if trial.status == STOPPED:
            return number
        if loss is None:
            end(oracle, trial, status=INVALID, why=_trials.INFEASIBLE, message="no memory")
        else:
            end(oracle, trial, loss, size=abs(loss))
    return None


@pytest.mark.parametrize("sign", [1, -1], ids=["min", "max"])
def test_a_search_ends_when_it_no_longer_improves(make, sign):
    objective = keras_tuner.Objective("loss", "min" if sign == 1 else "max")
    oracle = make(None, line(), objective=objective)
    oracle.begin_search(LIMITS(patience=3))
    losses = [5.0, 6.0, 6.0, 4.0, 4.0, None, 5.0, 0.0]
    assert ended(oracle, [x and sign * x for x in losses]) == 7
    # With more patience it goes on.
    again = make(None, line(), objective=objective)
    again.begin_search(LIMITS(patience=4))
    assert again.create_trial("a").status == RUNNING


def test_patience_begins_with_the_first_complete_trial(make):
    oracle = make(None, line())
    oracle.begin_search(LIMITS(patience=2))
    assert ended(oracle, [None, None, None, 1.0, 2.0, 2.0, 0.0]) == 6


def test_what_violates_a_constraint_is_no_improvement(make):
    oracle = make(None, line(), constraints=lambda metrics: {"size": metrics["size"] - 10.0})
    oracle.begin_search(LIMITS(patience=2))
    assert ended(oracle, [5.0, -20.0, -30.0, 0.0]) == 3


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        (tuners.Hyperband, {}, "pauses trials"),
        (tuners.PopulationBasedTraining, {}, "pauses trials"),
        (tuners.RandomSearch, {"objective": ["val_loss", "loss"]}, "single objective"),
    ],
    ids=str,
)
def test_patience_that_would_mean_nothing_is_refused(kind, more, why, options):
    tuner = kind(build, patience=3, **options | more)
    with pytest.raises(errors.InvalidOptionError, match=rf"`patience` .*{why}"):
        tuner.search(**DATA)
    assert not tuner.oracle.trials


@pytest.mark.parametrize(
    "option",
    [
        {"patience": 0},
        {"patience": 1.5},
        {"patience": True},
        {"timeout_per_trial": 0},
        {"timeout_per_trial": "60"},
        {"max_seconds": True},
        {"max_seconds": np.float32("nan")},
        {"grace_period": True},
        {"grace_period": float("nan")},
        {"process_memory": 0},
        {"process_memory": 1e9},
    ],
    ids=str,
)
def test_limits_are_checked(option, options):
    with pytest.raises(errors.InvalidOptionError, match=next(iter(option))):
        tuners.RandomSearch(build, **option, **options)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_numbers(kind, options):
    names = ("max_seconds", "timeout_per_trial", "grace_period")
    tuner = tuners.PopulationBasedTraining(
        build,
        quantile=np.float32(0.5),
        resample_probability=kind(1),
        **options,
        **dict.fromkeys(names, kind(7)),
    )
    limits = tuner._limits
    found = [limits.max_seconds, limits.timeout_per_trial, tuner.oracle._grace]
    found += [tuner.oracle.quantile, tuner.oracle._resample_probability]
    assert found == [7, 7, 7, 0.5, 1]
    assert {type(number) for number in found} == {float}


# --- Time -----------------------------------------------------------------------------------


class Slow(keras.callbacks.Callback):
    """Batches of the second trial take their time."""

    trials = 0

    def on_train_batch_begin(self, batch, logs=None):
        if Slow.trials == 2:
            time.sleep(0.3)


def test_a_trial_that_takes_too_long_is_stopped(options):
    Slow.trials = 0
    tuner = tuners.RandomSearch(build, max_trials=3, timeout_per_trial=60, **options)
    # Only the time of the second trial is short, however slow the machine is.
    limits = tuner._limits

    class Second(Slow):
        def on_train_begin(self, logs=None):
            Slow.trials += 1
            late = LIMITS(timeout_per_trial=0.5) if Slow.trials == 2 else limits
            tuner.oracle._budget = _budget.Budget(late)

    tuner.search(**DATA, batch_size=2, epochs=20, callbacks=[Second()])
    trials = list(tuner.oracle.trials.values())
    assert [t.status for t in trials] == [COMPLETED, STOPPED, COMPLETED]
    assert trials[1].message == "The trial took longer than timeout_per_trial=0.5 s."
    assert len(tuner.oracle.study.trials[1].intermediate_values) < 20


def test_a_process_must_be_ended_that_goes_on_long_after_the_timeout_of_its_trial(
    make, monkeypatch
):
    oracle, now = make(2, line(), grace_period=30.0, storage="memory"), time.time()
    assert oracle.watch_interval is None
    oracle.begin_search(LIMITS(timeout_per_trial=10))
    assert oracle.watch_interval == 4
    monkeypatch.setattr(time, "time", lambda: now)
    assert oracle.why_overdue(os.getpid()) is None
    oracle.create_trial("a")
    for seconds, is_overdue in ((0, False), (11, False), (40, False), (41, True)):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
        why = oracle.why_overdue(os.getpid())
        assert bool(why) == is_overdue
    assert why.startswith("The trial took longer than timeout_per_trial=10 s. Because it did not")
    assert "grace_period=30 s more, its process was ended." in why
    # Another process has no trial.
    assert oracle.why_overdue(os.getppid()) is None
    assert oracle.on_death(os.getpid(), why)
    assert not oracle.on_death(os.getpid(), why)
    (frozen,) = oracle.study.trials
    assert frozen.state.name == "FAIL"
    assert frozen.user_attrs[_trials.MESSAGE] == why
    assert frozen.user_attrs[_trials.WHY] == _trials.INFEASIBLE


def let_pass(seconds, oracle, trial):
    """Has a trial of this process begun earlier."""
    running = oracle._search.running[trial.trial_id]
    running.began -= seconds
    running._started -= seconds


def test_a_loop_of_ones_own_is_told_that_its_time_is_over(options):
    class Search(tuners.RandomSearch):
        def run_trial(self, trial, **kwargs):
            trial.hyperparameters.Float("x", 0, 1)
            for step in range(1, 4):
                if step == 2 and trial.trial_id == "0001":
                    let_pass(100, self.oracle, trial)
                self.report(trial, step, 1.0 / step)
                if self.should_prune(trial):
                    raise tuners.errors.TrialPruned
            return 0.5

    tuner = Search(max_trials=2, timeout_per_trial=90, **options | {"objective": "loss"})
    tuner.search(verbose=0)
    first, second = tuner.oracle.trials.values()
    assert (first.status, second.status) == (COMPLETED, STOPPED)
    assert sorted(tuner.oracle.study.trials[1].intermediate_values) == [1, 2]


def test_the_time_before_a_pause_counts(make):
    oracle = make(9, line(), kind=tuners.ASHA._oracle_class, storage="memory", max_epochs=9)
    oracle.begin_search(LIMITS(timeout_per_trial=100))
    for _ in range(3):
        trial = oracle.create_trial("a")
        let_pass(60, oracle, trial)
        assert not oracle.is_late(trial.trial_id)
        end(oracle, trial, -float(trial.trial_id))
    promoted = oracle.create_trial("a")
    assert promoted.trial_id == "0002"
    assert not oracle.is_late("0002")
    let_pass(60, oracle, promoted)
    assert oracle.is_late("0002")
    assert oracle._search.outcomes.seconds_of_process(os.getpid(), oracle.goes_on) > 60


def test_the_time_of_a_run_that_counts_for_nothing_does_not_count(make, monkeypatch):
    oracle = make(2, line(), max_retries_per_trial=1, storage="memory", grace_period=1e-3)
    oracle.begin_search(LIMITS(timeout_per_trial=100))
    trial = oracle.create_trial("a")
    let_pass(200, oracle, trial)
    end(oracle, trial, status=INVALID, message="bad luck")
    again = oracle.create_trial("a")
    assert again.trial_id == trial.trial_id
    let_pass(60, oracle, again)
    assert not oracle.is_late(again.trial_id)
    assert oracle.why_overdue(os.getpid()) is None
    # Nor does it matter that the clock is set.
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    assert not oracle.is_late(again.trial_id)


# --- Memory -----------------------------------------------------------------------------------

GIB = 2**30


def run_out(oracle, trial):
    end(oracle, trial, status=INVALID, why=_trials.OUT_OF_MEMORY, message="OOM")


def process(make, memory, **arguments):
    oracle = make(3, line(), **arguments)
    oracle.begin_search(process_memory=memory)
    return oracle


def test_a_trial_that_ran_out_of_memory_goes_to_a_process_with_more(make, capsys):
    small, large = process(make, GIB), process(make, 2 * GIB)
    trial = small.create_trial("small")
    run_out(small, trial)
    assert "a process that has more will run it" in capsys.readouterr().out
    # The small one goes on with others.
    other = small.create_trial("small")
    assert other.trial_id == "0001"
    again = large.create_trial("large")
    assert again.trial_id == trial.trial_id
    assert again.hyperparameters.values == trial.hyperparameters.values
    end(large, again, 1.0)
    end(small, other, 2.0)
    end(small, small.create_trial("small"), 3.0)
    assert small.create_trial("small").status == STOPPED
    assert [t.status for t in small.trials.values()] == [COMPLETED] * 3


def test_it_is_waited_for_as_long_as_the_larger_process_is_busy(make):
    small, large = process(make, GIB), process(make, 2 * GIB)
    # Only what waits for a process that does nothing: on a slow machine, a busy one may have no
    # heartbeat for so long.
    small._search.memory._grace = 0.2
    busy = large.create_trial("large")
    run_out(small, small.create_trial("small"))
    end(small, small.create_trial("small"), 1.0)
    for _ in range(2):
        assert small.create_trial("small").status == IDLE
    end(large, busy, 1.0)
    # It does nothing any more, and takes no trial either.
    while (trial := small.create_trial("small")).status == IDLE:
        pass
    assert trial.status == STOPPED
    found = small.get_trial("0001")
    assert (found.status, "none with more is left" in found.message) == (INVALID, True)


@pytest.mark.parametrize("other", [None, GIB, GIB // 2])
def test_without_a_larger_process_it_is_infeasible(make, other):
    small = process(make, GIB)
    process(make, other)
    run_out(small, small.create_trial("small"))
    found = small.get_trial("0000")
    assert (found.status, found.message) == (INVALID, "OOM")


def test_if_the_larger_process_has_left_it_is_infeasible(make):
    small, large = process(make, GIB), process(make, 2 * GIB)
    run_out(small, small.create_trial("small"))
    large.release()
    assert small.create_trial("small").trial_id == "0001"
    found = small.get_trial("0000")
    assert found.status == INVALID
    assert "none with more is left" in found.message


def test_the_memory_of_this_process_is_known():
    found = _keras.memory.limit()
    assert found is None or 2**26 < found < 2**50
