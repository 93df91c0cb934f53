"""The ledger: of many threads and processes, one at a time has a trial or a name."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import keras_tuner
import pytest
import sqlalchemy as sa

from tests import job
from tfbig.tuners import (
    HyperParameters,
    _ledger,
    _memory_ledger,
    _oracle,
    _processes,
    _sql_ledger,
    _study,
)

GRACE = 0.5

# Answers each line it is sent, a Python expression, with its value.
PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[3])
import sqlalchemy
from tfbig.tuners import _ledger, _sql_ledger, _study
from tests.tuners import tuner_ledger_test as test

def with_warnings(call):
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]

ledger = _sql_ledger.SqlLedger(_study._engine(sys.argv[1]), 1, float(sys.argv[4]))
oracle = test.oracle_in(sys.argv[2])
held = []
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


def oracle_in(directory, grace=GRACE, **arguments):
    """An oracle over the study in a directory."""
    hp = HyperParameters()
    hp.Float("x", 0, 1)
    oracle = _oracle.StudyOracle(
        keras_tuner.Objective("loss", "min"),
        5,
        hyperparameters=hp,
        seed=0,
        grace_period=grace,
        **arguments,
    )
    oracle._set_project_dir(str(directory), "p")
    oracle.verbose = 0
    return oracle


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def make(url):
    """Makes ledgers of one study, each as of another process."""
    engines = []

    def made(study=1, grace=GRACE):
        engines.append(_study._engine(url))
        _sql_ledger.create_tables(engines[-1])
        return _sql_ledger.SqlLedger(engines[-1], study, grace)

    yield made
    for engine in engines:
        engine.dispose()


class Process:
    """A process that evaluates what it is asked; it has a ledger and an oracle."""

    def __init__(self, url, directory):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROCESS, url, str(directory), str(job.ROOT), str(GRACE)],
            env=job.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.timer = threading.Timer(60, self.popen.kill)
        self.timer.start()

    def begin(self, expression):
        self.popen.stdin.write(f"{expression}\n")
        self.popen.stdin.flush()

    def answer(self):
        line = self.popen.stdout.readline()
        if not line:
            raise AssertionError(self.popen.communicate(timeout=10)[1])
        return json.loads(line)

    def ask(self, expression):
        self.begin(expression)
        return self.answer()

    def end(self):
        self.timer.cancel()
        self.popen.kill()
        with contextlib.suppress(ValueError):
            self.popen.communicate(timeout=10)


@pytest.fixture
def processes(url, tmp_path, make):
    """Starts processes, which are killed at the end."""
    make()
    started = []

    def start(count):
        started.extend(Process(url, tmp_path) for _ in range(count))
        for process in started:
            assert process.ask("1 + 1") == 2
        return started

    yield start
    for process in started:
        process.end()


def in_threads(calls):
    """Calls functions at the same time; returns what they return."""
    barrier = threading.Barrier(len(calls), timeout=30)

    def run(call):
        barrier.wait()
        return call()

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(run, call) for call in calls]]


# --- Trials ------------------------------------------------------------------


def test_new_trials_are_numbered_up_to_the_bound(make):
    a, b = make(), make()
    assert [a.take_new(3), b.take_new(3), a.take_new(3), b.take_new(3)] == [0, 1, 2, None]
    assert a.take_new(None) == 3
    rows = b.trials()
    assert [row.owner for row in rows] == [a.owner, b.owner, a.owner, a.owner]
    assert {(row.state, row.heartbeat, row.deaths, row.note) for row in rows} == {
        (_ledger.RUNNING, 0, 0, "{}")
    }


def test_studies_do_not_see_each_other(make):
    one, other = make(study=1), make(study=2)
    assert [one.take_new(1), other.take_new(1)] == [0, 0]
    assert one.claim(0, "name")
    assert other.claim(0, "name")
    assert one.metadata("seed", "1") == "1"
    assert other.metadata("seed") is None
    one.clear()
    assert (one.trials(), one.claims(), one.metadata("seed")) == ([], set(), None)
    assert (len(other.trials()), other.claims()) == (1, {"name"})


def test_threads_take_each_new_trial_once(make):
    ledgers = [make() for _ in range(4)]

    def all_of(ledger):
        return list(iter(lambda: ledger.take_new(30), None))

    taken = in_threads([lambda led=led: all_of(led) for led in ledgers])
    assert sorted(itertools.chain(*taken)) == list(range(30))
    owners = collections.Counter(row.owner for row in ledgers[0].trials())
    assert owners == {led.owner: len(t) for led, t in zip(ledgers, taken, strict=True) if t}


def test_one_of_many_takes_a_trial_that_they_all_saw(make):
    first = make()
    first.take_new(None)
    first.release(0)
    ledgers = [make() for _ in range(6)]
    seen = [led.abandoned()[0] for led in ledgers]
    pairs = zip(ledgers, seen, strict=True)
    won = in_threads([lambda led=led, row=row: led.take(row) for led, row in pairs])
    assert sum(won) == 1
    assert first.trials()[0].owner == ledgers[won.index(True)].owner


def test_a_trial_that_moved_since_it_was_seen_is_not_taken(make):
    a, b = make(), make()
    a.take_new(None)
    (seen,) = b.trials()
    assert a.heartbeat(0)
    assert not b.take(seen)
    (seen,) = b.trials()
    assert b.take(seen, note=json.dumps({"rung": 1}), died=True)
    (row,) = b.trials()
    assert (row.owner, row.heartbeat, row.deaths, row.note) == (b.owner, 0, 1, '{"rung": 1}')


def test_what_is_done_in_the_name_of_another_is_refused(make):
    a, b = make(), make()
    a.take_new(None)
    assert not b.heartbeat(0)
    assert not b.set_state(0, _ledger.ENDED, end=1)
    assert not b.release(0)
    assert a.trials()[0].state == _ledger.RUNNING
    assert b.take(a.trials()[0])
    before = b.trials()
    assert not a.heartbeat(0)
    assert not a.set_state(0, _ledger.ENDED, end=1)
    assert not a.release(0)
    assert b.trials() == before


def test_a_note_is_added_to(make):
    ledger = make()
    ledger.take_new(None)
    assert ledger.set_state(0, _ledger.RUNNING, raised=1)
    assert ledger.set_state(0, _ledger.PAUSED, scores={"0": 0.1})
    (row,) = ledger.trials()
    assert json.loads(row.note) == {"raised": 1, "scores": {"0": 0.1}}
    assert row.state == _ledger.PAUSED
    # It is not its own any more.
    assert not ledger.set_state(0, _ledger.ENDED)
    assert not ledger.heartbeat(0)


def test_beats_are_counted(make):
    ledger = make()
    ledger.take_new(None)
    assert all(ledger.heartbeat(0) for _ in range(5))
    assert ledger.trials()[0].heartbeat == 5


def test_a_trial_is_moved_on_once(make):
    a, b = make(), make()
    a.take_new(None)
    a.set_state(0, _ledger.ENDED, end={})
    (row,) = a.trials()
    moved = [led.advance(row.index, row.owner, _ledger.RECORDED) for led in (a, b)]
    assert moved == [True, False]
    assert [(row.state, row.owner) for row in a.trials()] == [(_ledger.RECORDED, "")]


def test_a_ledger_in_memory_does_what_one_in_a_database_does(make):
    ledgers = [make(), _memory_ledger.MemoryLedger(GRACE)]
    owners = [ledger.owner for ledger in ledgers]
    rng = random.Random(0)
    states = (_ledger.RUNNING, _ledger.PAUSED, _ledger.ENDED, _ledger.VOID)

    def act(ledger, action, index, state, name):
        rows = ledger.trials(index=index)
        return {
            "new": lambda: ledger.take_new(6, name),
            "take": lambda: rows and ledger.take(rows[0], died=True),
            "beat": lambda: ledger.heartbeat(index),
            "state": lambda: ledger.set_state(index, state, seen=name),
            "release": lambda: ledger.release(index, name=name),
            "advance": lambda: ledger.advance(index, ledger.owner, _ledger.RECORDED),
            "claim": lambda: ledger.claim(index, name),
            "change": lambda: ledger.change_metadata(name, lambda text: f"{text} {index}"),
            "default": lambda: ledger.metadata(state, name),
        }[action]()

    def seen(ledger, owner):
        rows = [dataclasses.replace(r, owner=str(r.owner == owner)) for r in ledger.trials()]
        held = [ledger.claims(index=i) for i in range(6)]
        named = [ledger.claims(name=n) for n in "abcd"], [ledger.metadata(n) for n in "abcd"]
        by_state = [[r.index for r in ledger.trials(state=state)] for state in states]
        return rows, ledger.claims(), held, named, by_state, ledger.taken(), ledger.count(*states)

    actions = ("new", "take", "beat", "state", "release", "advance", "claim", "change", "default")
    met = set()
    for step in range(900):
        if step % 60 == 0:
            for ledger in ledgers:
                ledger.clear()
        what = rng.choice(actions), rng.randrange(6), rng.choice(states), rng.choice("abcd")
        a, b = (act(ledger, *what) for ledger in ledgers)
        assert a == b, what
        assert seen(ledgers[0], owners[0]) == seen(ledgers[1], owners[1]), what
        met |= {row.state for row in ledgers[1].trials()}
    assert met == {*states, _ledger.RECORDED}


# --- What is abandoned -------------------------------------------------------


def test_a_trial_that_was_released_is_free_at_once(make):
    a, b = make(grace=1000), make(grace=1000)
    a.take_new(None)
    assert b.abandoned() == []
    a.release(0, raised=1)
    assert [row.index for row in b.abandoned()] == [0]
    assert [row.index for row in a.abandoned()] == [0]
    assert json.loads(a.trials()[0].note) == {"raised": 1}


def test_a_trial_without_beats_is_abandoned_after_the_grace_period(make, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_ledger.time, "monotonic", lambda: now[0])
    a, b = make(grace=10), make(grace=10)
    a.take_new(None)
    assert b.abandoned() == []
    now[0] += 9.9
    assert b.abandoned() == []
    a.heartbeat(0)
    now[0] += 9.9
    # Seen for the first time with this beat.
    assert b.abandoned() == []
    now[0] += 9.9
    assert b.abandoned() == []
    now[0] += 0.2
    assert [row.index for row in b.abandoned()] == [0]
    assert a.abandoned() == []


@pytest.mark.parametrize("state", [_ledger.PAUSED, _ledger.ENDED, _ledger.RECORDED])
def test_only_what_runs_can_be_abandoned(make, state):
    a, b = make(grace=1e-9), make(grace=1e-9)
    a.take_new(None)
    b.abandoned()
    time.sleep(0.01)
    assert len(b.abandoned()) == 1
    a.set_state(0, state)
    b.abandoned()
    time.sleep(0.01)
    assert b.abandoned() == []


def test_a_process_is_known_by_its_id_and_its_begin():
    owner = _processes.this_process()
    machine, pid, started, name = owner.split("|")
    assert int(pid) == os.getpid()
    assert not _processes.is_dead(owner)
    assert owner != _processes.this_process()
    assert _processes.is_dead(f"{machine}|{pid}|{int(started) + 1}|{name}")
    assert _processes.is_dead(f"{machine}|999999999|{started}|{name}")
    assert not _processes.is_dead(f"elsewhere|999999999|{started}|{name}")
    assert not _processes.is_dead(f"{machine}|{pid}||{name}")


# --- Claims ------------------------------------------------------------------


def test_a_name_is_claimed_by_one_trial(make):
    a, b = make(), make()
    assert a.claim(0, "x")
    assert a.claim(0, "x")
    assert b.claim(0, "x")
    assert not b.claim(1, "x")
    assert b.claim(1, "y")
    assert a.claims() == {"x", "y"}


def test_threads_claim_each_name_once(make):
    ledgers = [make() for _ in range(4)]
    names = [f"{i}" for i in range(12)]

    def claim_all(index):
        return [n for n in names if ledgers[index].claim(index, n)]

    won = in_threads([lambda i=i: claim_all(i) for i in range(4)])
    assert sorted(itertools.chain(*won)) == sorted(names)


# --- Facts -------------------------------------------------------------------


def test_the_first_to_state_a_fact_is_believed(make):
    a, b = make(), make()
    assert a.metadata("seed") is None
    assert a.metadata("seed", "1") == "1"
    assert b.metadata("seed", "2") == "1"
    assert b.metadata("seed") == "1"


def test_threads_agree_on_a_fact(make):
    ledgers = [make() for _ in range(6)]
    found = in_threads([lambda i=i: ledgers[i].metadata("seed", f"{i}") for i in range(6)])
    assert len(set(found)) == 1
    assert found[0] == ledgers[0].metadata("seed")


def test_no_change_of_a_fact_is_lost(make):
    ledgers = [make() for _ in range(4)]

    def add():
        name = threading.get_ident()

        def added(known):
            return json.dumps([*json.loads(known or "[]"), name])

        ledger = ledgers.pop()
        for _ in range(5):
            ledger.change_metadata("names", added)

    in_threads([add] * 4)
    names = json.loads(make().metadata("names"))
    assert sorted(collections.Counter(names).values()) == [5] * 4


def test_a_fact_that_another_states_meanwhile_is_changed_as_it_then_is():
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    _sql_ledger.create_tables(engine)
    ledger, other = (_sql_ledger.SqlLedger(engine, 1, GRACE) for _ in range(2))
    seen = []

    def change(known):
        seen.append(known)
        if known is None:
            # As where the database has no lock for a row that is not there.
            other.metadata("space", "theirs")
        return f"{known} and mine"

    assert ledger.change_metadata("space", change) == "theirs and mine"
    assert seen == [None, "theirs"]
    assert other.metadata("space") == "theirs and mine"


def test_a_ledger_in_memory_bears_beats_of_a_thread(tmp_path):
    _, ledger = _study.open_study(_study.MEMORY, tmp_path, "p", ["minimize"], GRACE)
    ledger.take_new(None)
    ended = threading.Event()

    def beat():
        count = 0
        while not ended.is_set():
            assert ledger.heartbeat(0)
            count += 1
            time.sleep(0.001)
        return count

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        beats = pool.submit(beat)
        try:
            for i in range(100):
                assert ledger.claim(0, f"{i}")
                assert ledger.set_state(0, _ledger.RUNNING, number=i)
        finally:
            ended.set()
        count = beats.result(timeout=30)
    (row,) = ledger.trials()
    assert row.heartbeat == count
    assert json.loads(row.note) == {"number": 99}
    assert len(ledger.claims()) == 100


# --- Processes ---------------------------------------------------------------


def test_two_processes_share_trials_and_names(processes):
    both = processes(2)
    for process in both:
        process.begin("list(iter(lambda: ledger.take_new(40), None))")
    taken = [p.answer() for p in both]
    assert sorted(itertools.chain(*taken)) == list(range(40))
    for number, process in enumerate(both):
        process.begin(f"[i for i in range(40) if ledger.claim({number}, str(i))]")
    assert sorted(itertools.chain(*[p.answer() for p in both])) == list(range(40))


def test_the_trial_of_a_killed_process_is_free_at_once(processes, make):
    (process,) = processes(1)
    ledger = make(grace=1000)
    process.ask("ledger.join()")
    assert ledger.has_others()
    process.ask("ledger.leave()")
    assert not ledger.has_others()
    process.ask("ledger.join()")
    assert process.ask("ledger.take_new(None)") == 0
    assert ledger.abandoned() == []
    process.popen.kill()
    process.popen.wait(10)
    (row,) = ledger.abandoned()
    assert not ledger.has_others()
    assert ledger.take(row, died=True)
    assert ledger.trials()[0].deaths == 1


def until_abandoned(oracle):
    deadline = time.monotonic() + 20
    while not oracle._ledger.abandoned():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_late_result_of_a_stopped_process_is_refused(processes, tmp_path):
    (process,) = processes(1)
    mine = oracle_in(tmp_path, max_retries_per_trial=0)
    assert process.ask("[held.append(oracle.create_trial('a')), held[0].trial_id][1]") == "0000"
    values = process.ask("held[0].hyperparameters.values")
    # It beats, although it does nothing else.
    assert [row.index for row in mine._ledger.abandoned()] == []
    time.sleep(2 * GRACE)
    assert mine._ledger.abandoned() == []
    process.popen.send_signal(signal.SIGSTOP)
    until_abandoned(mine)
    trial = mine.create_trial("b")
    assert (trial.trial_id, trial.hyperparameters.values) == ("0000", values)
    process.popen.send_signal(signal.SIGCONT)
    process.ask("oracle.update_trial('0000', {'loss': 1.0}) and None")
    process.ask("setattr(held[0], 'status', 'COMPLETED')")
    (message,) = process.ask("with_warnings(lambda: oracle.end_trial(held[0]))")
    assert "Another process has taken over trial 0000" in message
    assert mine.get_trial("0000").status == "RUNNING"
    mine.update_trial("0000", {"loss": 2.0})
    trial.status = "COMPLETED"
    mine.end_trial(trial)
    for oracle in (mine, oracle_in(tmp_path)):
        (found,) = oracle.trials.values()
        assert (found.status, found.score) == ("COMPLETED", 2.0)


@pytest.mark.slow
def test_a_process_learns_that_its_trial_was_taken(processes, tmp_path):
    (process,) = processes(1)
    process.ask("[held.append(oracle.create_trial('a')), 0][1]")
    assert process.ask("oracle.is_lost('0000')") is False
    mine = oracle_in(tmp_path)
    process.popen.send_signal(signal.SIGSTOP)
    until_abandoned(mine)
    assert mine.create_trial("b").trial_id == "0000"
    process.popen.send_signal(signal.SIGCONT)
    assert process.ask("bool(oracle.report('0000', {'loss': 1.0}, 1))") is False
    assert process.ask("oracle.is_lost('0000')") is True
    assert mine.study.trials[0].intermediate_values == {}
    mine.release()
