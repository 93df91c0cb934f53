"""The oracle over a study: what is tried, kept, gone on with and refused; no model is trained."""

import collections
import importlib.util
import logging
import math
import re
import time
import warnings

import keras_tuner
import numpy as np
import optuna
import pytest

from tests.tuners.tuner_space_test import typed
from tfbig import errors
from tfbig.tuners import (
    HyperParameters,
    _budget,
    _grid_search,
    _hyperband,
    _learning_study,
    _ledger,
    _oracle,
    _study,
    _trials,
)

RUNNING, IDLE, COMPLETED, STOPPED, INVALID, FAILED = (
    "RUNNING",
    "IDLE",
    "COMPLETED",
    "STOPPED",
    "INVALID",
    "FAILED",
)


def space():
    """A space with a value of each kind."""
    hp = HyperParameters()
    hp.Float("x", -5, 10)
    hp.Float("y", 1e-3, 15, sampling="log")
    hp.Choice("kind", [None, True, 1, (1, 2)])
    hp.Float("stepped", 0, 1, step=0.1)
    hp.Int("size", 1, 64, sampling="log")
    with hp.conditional_scope("kind", [None]):
        hp.Float("child", 0, 1)
    return hp


def cells():
    """A finite space of seven cells, three of them under a condition."""
    hp = HyperParameters()
    hp.Choice("a", [None, True, 1])
    with hp.conditional_scope("a", [True]):
        hp.Float("b", 0, 0.2, step=0.1)
    with hp.conditional_scope("a", [1]):
        hp.Boolean("c")
    hp.Fixed("d", (1,))
    return hp


def line():
    """A space of one number."""
    hp = HyperParameters()
    hp.Float("x", 0, 1)
    return hp


def loss_of(values):
    """A loss that depends on all values of `space`."""
    kinds = [None, True, 1, (1, 2)]
    index = [typed(k) for k in kinds].index(typed(values.get("kind")))
    x, y = values.get("x", 0), values.get("y", 1)
    return (x - 1) ** 2 + y + index + values.get("stepped", 0) + values.get("child", 0)


def end(oracle, trial, loss=0.0, status=COMPLETED, message=None, why=None, step=0, **metrics):
    """Ends a trial."""
    if status == COMPLETED:
        oracle.update_trial(trial.trial_id, {"loss": loss} | metrics, step=step)
    trial.status, trial.message = status, message
    if why:
        trial.why = why
    oracle.end_trial(trial)


def run(oracle, stop=None, loss=loss_of):
    """Runs trials, all or some; returns the values of all."""
    count = 0
    while count != stop:
        trial = oracle.create_trial("tuner")
        if trial.status == STOPPED:
            break
        assert trial.status == RUNNING
        end(oracle, trial, loss(trial.hyperparameters.values))
        count += 1
    return values_of(oracle)


def values_of(oracle):
    return [t.hyperparameters.values for t in oracle.trials.values()]


# --- Which values ------------------------------------------------------------

SAMPLERS = {"random": (), "tpe": (), "nsga2": (), "hyperopt": ("hyperopt",)}
SAMPLERS |= {"qmc": ("scipy",), "cmaes": ("cmaes",), "gp": ("torch", "scipy")}


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    """Each sampler that is installed."""
    for module in SAMPLERS[request.param]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the sampler {request.param} needs {module}")
    return request.param


def test_the_first_trial_has_the_defaults(make, sampler):
    hp = space()
    values = run(make(1, hp, sampler=sampler))
    assert typed(values) == typed([hp.values])


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.slow)])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(make, sampler, seed):
    straight = run(make(25, space(), sampler=sampler, seed=seed, storage="memory"))
    assert len(straight) == 25
    assert len({str(typed(v)) for v in straight}) == 25
    stopped = run(make(25, space(), sampler=sampler, seed=seed), stop=12)
    assert len(stopped) == 12
    assert typed(stopped) == typed(straight[:12])
    assert typed(run(make(25, space(), sampler=sampler, seed=seed))) == typed(straight)


def test_more_trials_than_at_first_may_be_asked_for(make):
    few = run(make(4, space()))
    oracle = make(7, space())
    assert oracle.remaining_trials() == 3
    assert typed(run(oracle)[:4]) == typed(few)
    assert oracle.remaining_trials() == 0


def test_seeds_differ(make):
    first, second = (run(make(3, line(), seed=s, project=f"{s}")) for s in (0, 1))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_search_without_a_seed_keeps_the_one_that_it_drew(make):
    first = make(5, line(), seed=None)
    run(first, stop=2)
    second = make(5, line(), seed=None)
    run(second)
    assert second.seed == first.seed
    straight = run(make(5, line(), seed=first.seed, project="straight"))
    assert values_of(second) == straight


@pytest.mark.parametrize("direction", ["min", "max"])
def test_a_sampler_of_a_model_beats_chance(make, direction):
    sign = 1 if direction == "min" else -1
    objective = keras_tuner.Objective("loss", direction)

    def distance(values):
        return sign * (values["x"] - 0.7) ** 2

    for sampler in ("tpe", "hyperopt"):
        if sampler == "hyperopt":
            pytest.importorskip("hyperopt")
        oracle = make(40, line(), sampler=sampler, objective=objective, storage="memory")
        values = [v["x"] for v in run(oracle, loss=distance)[20:]]
        assert np.median(np.abs(np.array(values) - 0.7)) < 0.15


def test_a_low_discrepancy_sequence_fills_all_strata(make):
    pytest.importorskip("scipy")
    # The first is of the defaults; of Sobol's points, each 16 in a row are in 16 strata.
    values = run(make(36, line(), sampler="qmc", storage="memory"))[1:]
    counts = collections.Counter(int(v["x"] * 16) for v in values)
    assert len(counts) == 16
    assert max(counts.values()) <= 3


def test_a_sampler_may_be_given_by_a_function_of_a_seed(make):
    seeds = []

    def sampler(seed):
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    values = run(make(4, line(), sampler=sampler))
    assert len(values) == 4
    assert len({s for s in seeds if s}) == 3


def test_samplers_and_pruners_take_the_options_of_their_class(make):
    oracle = make(
        *(3, line()),
        sampler="tpe",
        sampler_options={"n_startup_trials": 3, "multivariate": False},
        pruner="asha",
        pruner_options={"reduction_factor": 3},
    )
    run(oracle)
    oracle._search.trials.seed(1)
    sampler, pruner = oracle.study.sampler, oracle.study.pruner
    assert isinstance(sampler, optuna.samplers.TPESampler)
    assert (sampler._n_startup_trials, sampler._multivariate) == (3, False)
    # What tfbig chooses stays.
    assert sampler._constant_liar
    assert pruner._reduction_factor == 3
    settings = oracle._ledger.metadata("settings")
    assert "tpe (multivariate=False, n_startup_trials=3)" in settings
    assert "asha (reduction_factor=3)" in settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler_options": {"startup": 3}}, r"options of the sampler 'tpe', which has .*gamma"),
        ({"sampler_options": {"seed": 3}}, "Received: 'seed'"),
        ({"sampler": "random", "sampler_options": {"a": 1}}, "no options"),
        ({"sampler": optuna.samplers.TPESampler, "sampler_options": {"gamma": 1}}, "no options"),
        ({"pruner_options": {"patience": 3}}, "pruner None, which has no options"),
        (
            {"pruner": "patience", "pruner_options": {"patience": -1}},
            r"valid. .*patience=-1",
        ),
        ({"pruner": "asha", "pruner_options": {"reduction_factor": 0}}, "reduction_factor"),
    ],
)
def test_options_that_a_sampler_or_pruner_has_not_are_refused(options, words):
    with pytest.raises(errors.InvalidOptionError, match=words):
        _oracle.StudyOracle(keras_tuner.Objective("loss", "min"), 3, **options)


@pytest.mark.parametrize(
    ("name", "at_random"),
    [("cmaes", ["kind", "child"]), ("qmc", ["child"]), ("gp", ["child"]), ("tpe", [])],
)
def test_what_a_sampler_draws_at_random_is_said_once(make, name, at_random, recwarn):
    for module in SAMPLERS[name]:
        pytest.importorskip(module, reason=f"the sampler {name} needs {module}")
    oracle = make(
        16, space(), sampler=name, sampler_options={"n_startup_trials": 2} if name != "qmc" else {}
    )
    logged, handler = [], logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("optuna").addHandler(handler)
    try:
        oracle.warn_of_random_values()
        run(oracle)
    finally:
        logging.getLogger("optuna").removeHandler(handler)
    found = [str(w.message) for w in recwarn if "random" in str(w.message)]
    assert len(found) == bool(at_random)
    for hp in oracle.hyperparameters.space:
        assert (repr(hp.name) in "".join(found)) == (hp.name in at_random)
    # Nor does Optuna say it for each trial.
    assert not logged


def test_what_torch_says_of_gpus_is_not_repeated(make):
    class Sampler(optuna.samplers.RandomSampler):
        def sample_relative(self, *args):
            warnings.warn("CUDA initialization: there is no GPU.", UserWarning, stacklevel=1)
            return super().sample_relative(*args)

    # A warning is an error in tests.
    assert len(run(make(2, line(), sampler=Sampler))) == 2


def test_values_are_stored_with_type_and_bits(make, tmp_path):
    values = run(make(20, space()))
    assert typed(values_of(make(20, space()))) == typed(values)
    assert {str(typed(v["kind"])) for v in values} == {
        str(typed(k)) for k in (None, True, 1, (1, 2))
    }
    assert all(type(v["x"]) is float and type(v["size"]) is int for v in values)
    assert all(("child" in v) == (v["kind"] is None) for v in values)
    assert all(v["stepped"] in [i / 10 for i in range(11)] for v in values)
    # While it is open, SQLite has files of its own beside it.
    assert {p.name.split("-")[0] for p in (tmp_path / "p").iterdir()} == {_study.FILE}


def test_the_study_has_the_parameters_of_each_trial(make):
    oracle = make(3, space())
    run(oracle)
    for trial, values in zip(oracle.study.trials, values_of(oracle), strict=True):
        assert trial.params["x"] == values["x"]
        assert trial.params["stepped (step)"] == round(10 * values["stepped"])
        assert trial.value == loss_of(values)


@pytest.mark.parametrize("objectives", ["loss", ["loss", "size"]])
def test_the_study_says_what_its_values_are_called(make, objectives):
    named = [keras_tuner.Objective(n, "min") for n in np.atleast_1d(objectives).tolist()]
    objective = named if len(named) > 1 else named[0]
    for _ in range(2):
        oracle = make(3, line(), objective=objective)
        trial = oracle.create_trial("a")
        end(oracle, trial, size=1.0)
        assert oracle.study.metric_names == [o.name for o in named]


def test_a_user_may_override_where_values_come_from(make):
    class Mine(_oracle.StudyOracle):
        def populate_space(self, trial_id):
            if trial_id == "0002":
                return {"status": STOPPED, "values": None}
            return {"status": RUNNING, "values": {"x": np.float64(0.25)}}

    oracle = make(2, line(), kind=Mine)
    assert typed(run(oracle)) == typed([{"x": 0.25}] * 2)


def test_a_sampler_that_repeats_itself_in_an_infinite_space_ends_the_search(make):
    def same(seed):
        rest = optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.PartialFixedSampler({"x": 0.5}, rest)

    oracle = make(6, line(), sampler=same)
    assert run(oracle, loss=lambda v: 0.0) == [{"x": 0.0}, {"x": 0.5}]
    assert oracle.create_trial("a").status == STOPPED


# --- Finite spaces -----------------------------------------------------------


def test_a_sampler_that_repeats_itself_in_a_finite_space_leaves_no_part_of_it_out(make):
    class Counting(_oracle.StudyOracle):
        looks = 0

        def _as_learned_from(self, trials):
            self.looks += 1
            return super()._as_learned_from(trials)

    hp = HyperParameters()
    for name in "abc":
        hp.Int(name, 0, 9)
    fixed = dict.fromkeys("abc", 5)
    rest = optuna.samplers.TPESampler(seed=0)
    oracle = make(
        12, hp, kind=Counting, sampler=lambda seed: optuna.samplers.PartialFixedSampler(fixed, rest)
    )
    values = run(oracle, loss=lambda v: 0.0)
    assert len(as_set(values)) == 12
    # In the order of all combinations, only "c" would change.
    assert all(len({v[name] for v in values}) > 4 for name in "abc")
    # The first trial, which has the defaults, asks no sampler. For others, it asks several times.
    assert oracle.looks == 11


CELLS = [
    {"a": None, "d": (1,)},
    {"a": True, "b": 0.0, "d": (1,)},
    {"a": True, "b": 0.1, "d": (1,)},
    {"a": True, "b": 0.2, "d": (1,)},
    {"a": 1, "c": False, "d": (1,)},
    {"a": 1, "c": True, "d": (1,)},
]


def as_set(values):
    return {str(sorted(typed(v)[1].items())) for v in values}


@pytest.mark.parametrize("kind", [_grid_search.GridSearchOracle, _oracle.StudyOracle])
@pytest.mark.parametrize("stop", [None, 3])
def test_a_finite_space_is_covered_once_and_then_ends_the_search(make, kind, stop):
    run(make(None, cells(), kind=kind, sampler="random"), stop=stop, loss=lambda v: 0.0)
    oracle = make(None, cells(), kind=kind, sampler="random")
    values = run(oracle, loss=lambda v: 0.0)
    assert len(values) == len(CELLS)
    assert as_set(values) == as_set(CELLS)
    assert typed(values[0]) == typed(CELLS[0])
    assert all(t.status == COMPLETED for t in oracle.trials.values())


def test_a_grid_of_a_range_without_steps_has_ten_cells(make):
    values = run(make(None, line(), kind=_grid_search.GridSearchOracle), loss=lambda v: 0.0)
    # And the default, which is none of them.
    assert len(values) == 11


def test_two_processes_share_a_grid(make):
    oracles = [make(None, cells(), kind=_grid_search.GridSearchOracle) for _ in range(2)]
    trials = [oracles[i % 2].create_trial(f"{i}") for i in range(len(CELLS))]
    assert as_set(t.hyperparameters.values for t in trials) == as_set(CELLS)
    for i, trial in enumerate(trials):
        end(oracles[i % 2], trial)
    assert [o.create_trial("a").status for o in oracles] == [STOPPED] * 2


def test_a_process_waits_while_others_may_still_fail(make, monkeypatch):
    monkeypatch.setattr(_oracle, "_POLL_INTERVAL", 0.01)
    first, second = make(1, line()), make(1, line())
    trial = first.create_trial("first")
    assert second.create_trial("second").status == IDLE
    end(first, trial)
    assert second.create_trial("second").status == STOPPED


def test_a_space_that_others_exhaust_meanwhile_is_no_failure(make):
    hp = HyperParameters()
    hp.Choice("a", [1, 2])
    run(make(None, hp), loss=lambda v: 0.0)
    late = make(None, hp)
    looks = []

    queue = late._search.queue

    def before_others_took_the_last(max_trials, take=queue.take_new):
        looks.append(1)
        return late._ledger.take_new(None) if len(looks) <= 4 else take(max_trials)

    queue.take_new = before_others_took_the_last
    for _ in range(6):
        if (trial := late.create_trial("late")).status == STOPPED:
            break
        assert trial.status == IDLE
    assert trial.status == STOPPED
    late.check_result()
    assert not [t for t in late.trials.values() if t.status == FAILED]


# --- Spaces that change ------------------------------------------------------


def test_a_trial_that_another_ended_before_its_values_were_stored_is_left_to_it(make, monkeypatch):
    """A process that is stopped for long between the two wakes up."""
    asleep, other = make(2, line()), make(2, line())
    trials, other._ledger._grace = asleep._search.trials, 0.0
    store = trials.store

    def late(*args):
        monkeypatch.undo()
        end(other, other.create_trial("b"), 0.5)
        return store(*args)

    monkeypatch.setattr(trials, "store", late)
    trial = asleep.create_trial("a")
    assert (trial.status, trial.trial_id) == (RUNNING, "0001")
    end(asleep, trial, 1.0)
    assert [t.score for t in asleep.trials.values()] == [0.5, 1.0]


def test_hyperparameters_that_a_trial_meets_first_are_searched_from_then_on(make):
    oracle = make(5)
    values = []
    for _ in range(5):
        trial = oracle.create_trial("tuner")
        values.append(trial.hyperparameters.Float("x", 0, 1))
        end(oracle, trial, values[-1])
    assert values[0] == 0
    assert len(set(values)) == 5
    assert values_of(make(5)) == [{"x": v} for v in values]
    # A program that does not know the hyperparameter yet learns of it from the study.
    assert run(make(6))[-1].keys() == {"x"}


def sixty(hp):
    return hp.Int("a", 0, 9), hp.Choice("b", list("pqrstu"))


@pytest.mark.parametrize("kind", [_oracle.StudyOracle, _grid_search.GridSearchOracle])
def test_processes_share_a_space_that_trials_define(make, kind, monkeypatch):
    monkeypatch.setattr(_oracle, "_POLL_INTERVAL", 0.0)
    oracles = [make(60, kind=kind) for _ in range(4)]
    running = {}
    count = collections.Counter()
    rng = np.random.default_rng(0)
    # All have joined before the first trial has ended.
    for i, oracle in enumerate(oracles):
        trial = oracle.create_trial("a")
        assert trial.status == (IDLE if i else RUNNING)
        if not i:
            running[i] = trial
    over = set()
    while len(over) < 4:
        i = int(rng.integers(4))
        if i in running:
            trial = running.pop(i)
            sixty(trial.hyperparameters)
            end(oracles[i], trial)
            count[i] += 1
            continue
        trial = oracles[i].create_trial("a")
        if trial.status == RUNNING:
            running[i] = trial
        elif trial.status == STOPPED:
            over.add(i)
    assert all(count[i] >= 5 for i in range(4))
    values = values_of(oracles[0])
    assert len(values) == 60
    assert len({(v["a"], v["b"]) for v in values}) == 60


def test_a_place_without_values_is_given_to_a_later_trial(make):
    hp = HyperParameters()
    hp.Choice("a", [1, 2])
    run(make(3, hp), loss=lambda v: 0.0)
    late = make(3, hp)
    # As if another had tried the last values after this process had looked.
    late._search.queue.take_new = lambda max_trials: late._ledger.take_new(max_trials)
    assert late.create_trial("late").status == STOPPED
    assert late.remaining_trials() == 1
    wider = HyperParameters()
    wider.Choice("a", [1, 2, 3])
    assert [v["a"] for v in run(make(3, wider), loss=lambda v: 0.0)] == [1, 2, 3]


def test_the_study_has_the_parameters_that_a_trial_asked_for(make):
    """Samplers search together what all trials have."""
    oracle = make(3)
    for _ in range(3):
        trial = oracle.create_trial("a")
        x = trial.hyperparameters.Float("x", 0, 1)
        end(oracle, trial, x)
    assert [t.params["x"] for t in oracle.study.trials] == [v["x"] for v in values_of(oracle)]


def test_new_hyperparameters_may_be_forbidden_or_left_alone(make):
    oracle = make(3, line(), allow_new_entries=False)
    trial = oracle.create_trial("tuner")
    trial.hyperparameters.Float("new", 0, 1)
    with pytest.raises(RuntimeError, match="new"):
        oracle.update_space(trial.hyperparameters)
    oracle = make(3, line(), tune_new_entries=False, project="alone")
    for _ in range(3):
        trial = oracle.create_trial("tuner")
        assert trial.hyperparameters.Float("new", 0, 1) == 0
        end(oracle, trial)
    assert [hp.name for hp in oracle.get_space().space] == ["x"]


def one(kind, *args, **kwargs):
    hp = HyperParameters()
    getattr(hp, kind)("x", *args, **kwargs)
    return hp


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("Float", {"min_value": 0, "max_value": 1}, {"min_value": -5, "max_value": 6}),
        ("Int", {"min_value": 1, "max_value": 9}, {"min_value": 1, "max_value": 99}),
        (
            "Int",
            {"min_value": 2, "max_value": 8, "step": 2},
            {"min_value": 0, "max_value": 40, "step": 2},
        ),
        ("Choice", {"values": ["p", "q"]}, {"values": ["r", "q", (1,), "p"]}),
        ("Choice", {"values": [8, 16]}, {"values": [4, 8, 12, 16, 32]}),
    ],
)
def test_a_range_may_become_wider(make, kind, before, after, capsys):
    def loss(values):
        return values["x"] if isinstance(values["x"], int | float) else 0.0

    run(make(2, one(kind, **before)), loss=loss)
    oracle = make(4, one(kind, **after))
    values = [v["x"] for v in run(oracle, loss=loss)]
    assert len({str(v) for v in values}) == 4
    (change,) = oracle.study.user_attrs["tfbig:changes"]
    assert change["change"].startswith("x: ")
    assert change["change"] in capsys.readouterr().out
    # Once.
    make(4, one(kind, **after)).create_trial("a")
    assert len(oracle.study.user_attrs["tfbig:changes"]) == 1
    with pytest.raises(errors.StudyError, match="may become wider"):
        make(4, one(kind, **before)).create_trial("a")


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("Float", {"min_value": 0, "max_value": 1}, {"min_value": 0.5, "max_value": 6}),
        ("Float", {"min_value": 1, "max_value": 2}, {"min_value": 5, "max_value": 6}),
        (
            "Float",
            {"min_value": 1, "max_value": 2},
            {"min_value": 1, "max_value": 2, "sampling": "log"},
        ),
        (
            "Int",
            {"min_value": 2, "max_value": 8, "step": 2},
            {"min_value": 1, "max_value": 9, "step": 2},
        ),
        (
            "Int",
            {"min_value": 2, "max_value": 8, "step": 2},
            {"min_value": 2, "max_value": 8, "step": 3},
        ),
        ("Choice", {"values": ["p", "q"]}, {"values": ["p", "r"]}),
        ("Choice", {"values": [1, 2]}, {"values": [1.0, 2.0]}),
        ("Fixed", {"value": 1}, {"value": 2}),
    ],
)
def test_another_range_is_refused(make, kind, before, after):
    run(first := make(2, one(kind, **before)), loss=lambda v: 0.0)
    stored = content(first)
    with pytest.raises(errors.StudyError, match=r"another range .x: .*, now ") as caught:
        make(9, one(kind, **after), sampler="random").create_trial("a")
    assert "overwrite=True" in str(caught.value)
    assert content(make(2, one(kind, **before))) == stored


@pytest.mark.parametrize("change", [{"sampler": "tpe"}, {"pruner": "median"}])
def test_the_sampler_and_the_pruner_may_change_on_resume(make, change, capsys):
    run(make(3, line(), sampler="random"))
    oracle = make(5, line(), **{"sampler": "random"} | change)
    assert len(run(oracle)) == 5
    ((name, value),) = change.items()
    (noted,) = oracle.study.user_attrs["tfbig:changes"]
    assert noted["change"].startswith(f"{name}: ")
    assert noted["change"].endswith(f", now {value}")
    assert noted["change"] in capsys.readouterr().out
    # The new one is what the search has from now on.
    assert len(run(make(6, line(), **{"sampler": "random"} | change))) == 6
    assert len(oracle.study.user_attrs["tfbig:changes"]) == 1


def test_the_sampler_does_not_change_while_others_search(make, monkeypatch):
    make(3, line(), sampler="random").create_trial("a")
    monkeypatch.setattr(_ledger.Ledger, "has_others", lambda self: True)
    with pytest.raises(errors.StudyError, match=r"Other processes .*sampler: 'random'"):
        make(3, line(), sampler="tpe").create_trial("b")


def test_a_hyperparameter_more_on_resume_is_searched(make, sampler):
    run(make(3, line(), sampler=sampler))
    hp = line()
    hp.Float("new", 0, 1)
    values = run(make(6, hp, sampler=sampler))
    assert [sorted(v) for v in values] == [["x"]] * 3 + [["new", "x"]] * 3
    assert len({v["new"] for v in values[3:]}) == 3


def test_a_trial_from_before_has_the_default_of_a_new_hyperparameter(make):
    before = make(2, line())
    end(before, before.create_trial("a"))
    before.create_trial("a")
    before.release()
    hp = line()
    hp.Float("new", 3, 4)
    oracle = make(2, hp)
    waiting = oracle.create_trial("a")
    assert waiting.trial_id == "0001"
    assert waiting.hyperparameters.Float("new", 3, 4) == 3
    (best,) = oracle.get_best_trials()
    assert best.hyperparameters.Float("new", 3, 4) == 3


# --- Failures ----------------------------------------------------------------


def outcomes(oracle, letters):
    """Ends trials as letters say: Complete, Failed, Infeasible, Nan."""
    for letter in letters:
        trial = oracle.create_trial("tuner")
        assert trial.status == RUNNING, letter
        if letter == "C":
            end(oracle, trial, 1.0)
        elif letter == "N":
            end(oracle, trial, math.nan)
        elif letter == "I":
            end(oracle, trial, status=INVALID, why=_trials.INFEASIBLE, message="no memory")
        else:
            end(oracle, trial, status=INVALID, message=f"raised in {trial.trial_id}")


@pytest.mark.parametrize("letters", ["FFF", "FFCFFF", "IIFFF"])
def test_failures_in_a_row_end_the_search_with_the_message_of_the_last(make, letters):
    oracle = make(20, line(), storage="memory")
    outcomes(oracle, letters)
    with pytest.raises(
        errors.SearchError, match=rf"3 trials .*\n.*raised in {len(letters) - 1:04d}"
    ):
        oracle.create_trial("tuner")


@pytest.mark.parametrize("letters", ["FFCFFCFF", "IIIIIIC", "NNNNNNC", "FF", "FINC"])
def test_infeasible_trials_are_no_failures(make, letters):
    oracle = make(20, line(), storage="memory")
    outcomes(oracle, letters)
    assert oracle.create_trial("tuner").status == RUNNING
    statuses = [t.status for t in oracle.trials.values()][:-1]
    words = {"C": COMPLETED, "F": FAILED, "I": INVALID, "N": INVALID}
    assert statuses == [words[letter] for letter in letters]


def infeasible_trials(make, sampler, seed):
    """How many of the last 30 of 60 trials are infeasible, if most of the best part is."""
    hp = HyperParameters()
    hp.Float("x", 0, 1)
    hp.Float("y", 0, 1)
    oracle = make(60, hp, sampler=sampler, seed=seed, project=f"{sampler} {seed}", storage="memory")
    while (trial := oracle.create_trial("a")).status == RUNNING:
        x, y = (trial.hyperparameters.values[n] for n in "xy")
        if y > 0.2 + 0.5 * x:
            end(oracle, trial, status=INVALID, why=_trials.INFEASIBLE)
        else:
            end(oracle, trial, (x - 0.2) ** 2 + (y - 0.4) ** 2)
    return sum(t.status == INVALID for t in list(oracle.trials.values())[30:])


# NSGA-II learns from generations of 50 trials.
@pytest.mark.parametrize("name", ["tpe", "hyperopt", "cmaes", "gp"])
def test_samplers_learn_from_infeasible_trials(make, name):
    for module in SAMPLERS[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the sampler {name} needs {module}")
    learned = sum(infeasible_trials(make, name, seed) for seed in range(3))
    by_chance = sum(infeasible_trials(make, "random", seed) for seed in range(3))
    assert learned < by_chance


def test_infeasible_trials_look_worse_than_all_complete_ones():
    trials = [
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.FAIL,
            values=values,
            params={"x": 0.5},
            distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
            user_attrs={} if values else {"tfbig:why": why},
            constraints={"size": -1.0} if values else None,
        )
        for values, why in (([3.0, 1.0], ""), (None, "infeasible"), ([1.0, 2.0], ""), (None, ""))
    ]
    for number, trial in enumerate(trials):
        trial.number = number
    directions = [optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE]
    seen = _learning_study.penalized(trials, directions)
    assert [t.state.name for t in seen] == ["COMPLETE"] * 3 + ["FAIL"]
    assert seen[1].values == [3.0, 1.0]
    assert [t.constraints for t in seen[:3]] == [
        {"size": -1.0, "tfbig:infeasible": 0.0},
        {"size": 0.0, "tfbig:infeasible": 1.0},
        {"size": -1.0, "tfbig:infeasible": 0.0},
    ]
    assert trials[1].state.name == "FAIL"
    assert trials[0].constraints == {"size": -1.0}


def test_how_many_failures_in_a_row_are_borne_is_an_option(make):
    oracle = make(20, line(), max_consecutive_failed_trials=1)
    outcomes(oracle, "F")
    with pytest.raises(errors.SearchError, match="1 trials"):
        oracle.create_trial("tuner")


def test_a_search_without_a_complete_trial_ends_with_the_first_message(make):
    oracle = make(2, line())
    outcomes(oracle, "FI")
    with pytest.raises(errors.SearchError, match=r"None of 2 .*\nraised in 0000"):
        oracle.check_result()
    outcomes(complete := make(3, line()), "C")
    complete.check_result()


def test_a_trial_that_raises_is_run_again_with_the_same_values(make, capsys):
    oracle = make(3, line(), max_retries_per_trial=2)
    outcomes(oracle, "C")
    seen = []
    for _ in range(3):
        trial = oracle.create_trial("tuner")
        seen.append((trial.trial_id, trial.hyperparameters.values["x"]))
        end(oracle, trial, status=INVALID, message="raised")
    assert len(set(seen)) == 1
    assert capsys.readouterr().out.count("will run again") == 2
    assert oracle.get_trial("0001").status == FAILED
    assert oracle.create_trial("tuner").trial_id == "0002"


def test_a_trial_that_succeeds_at_the_second_time_is_complete(make):
    oracle = make(1, line(), max_retries_per_trial=1)
    outcomes(oracle, "F")
    assert oracle.get_trial("0000").status == RUNNING
    outcomes(oracle, "C")
    assert oracle.get_trial("0000").status == COMPLETED
    assert len(oracle.trials) == 1


def test_what_is_infeasible_is_not_run_again(make):
    oracle = make(3, line(), max_retries_per_trial=5)
    outcomes(oracle, "INC")
    assert [t.status for t in oracle.trials.values()] == [INVALID, INVALID, COMPLETED]


# --- Results -----------------------------------------------------------------


@pytest.mark.parametrize("direction", ["min", "max"])
def test_best_trials_are_complete_ones_best_first(make, direction):
    oracle = make(8, line(), objective=keras_tuner.Objective("loss", direction))
    for loss in (3.0, 1.0, 2.0):
        end(oracle, oracle.create_trial("a"), loss)
    outcomes(oracle, "FIN")
    trial = oracle.create_trial("a")
    oracle.report(trial.trial_id, {"loss": 0.0}, 1)
    end(oracle, trial, status=STOPPED)
    oracle.create_trial("a")
    for seen in (oracle, make(8, line(), objective=keras_tuner.Objective("loss", direction))):
        best = seen.get_best_trials(10)
        assert [t.score for t in best] == sorted([1.0, 2.0, 3.0], reverse=direction == "max")
        assert {t.status for t in best} == {COMPLETED}
        assert [t.score for t in seen.get_best_trials()] == [best[0].score]


def test_what_a_trial_was_is_seen_by_another_process(make):
    oracle = make(3, line())
    trial = oracle.create_trial("a")
    oracle.update_trial(trial.trial_id, {"loss": 2.5, "accuracy": 0.5}, step=3)
    trial.status = COMPLETED
    oracle.end_trial(trial)
    outcomes(oracle, "F")
    complete, failed = make(3, line()).trials.values()
    assert (complete.score, complete.best_step) == (2.5, 3)
    assert complete.metrics.get_last_value("accuracy") == 0.5
    assert failed.message == "raised in 0001"
    assert failed.score is None


def test_the_order_of_ends_is_not_that_of_begins(make):
    oracle = make(3, line())
    first, second = (oracle.create_trial(f"{i}") for i in range(2))
    assert oracle.ongoing_trials == {"0": first, "1": second}
    end(oracle, second)
    end(oracle, first)
    assert oracle.start_order == ["0000", "0001"]
    assert oracle.end_order == ["0001", "0000"]
    assert oracle.ongoing_trials == {}


def test_an_objective_that_was_not_reported_is_refused(make):
    oracle = make(1, line())
    trial = oracle.create_trial("a")
    with pytest.raises(ValueError, match="loss"):
        oracle.update_trial(trial.trial_id, {"accuracy": 1.0})


def test_a_score_may_be_the_users(make):
    class Mine(_oracle.StudyOracle):
        def score_trial(self, trial):
            trial.score = -trial.metrics.get_last_value("loss")

    oracle = make(2, line(), kind=Mine)
    for loss in (1.0, 2.0):
        end(oracle, oracle.create_trial("a"), loss)
    assert [t.score for t in oracle.get_best_trials(2)] == [-2.0, -1.0]


@pytest.mark.parametrize("kind", [list, tuple])
def test_one_objective_in_a_list_is_that_objective(kind, make):
    oracle = make(3, line(), objective=kind(["accuracy"]), pruner="median")
    for accuracy in (0.5, 0.75, 0.25):
        trial = oracle.create_trial("a")
        oracle.report(trial.trial_id, {"accuracy": accuracy}, 1)
        end(oracle, trial, accuracy=accuracy)
    (best,) = oracle.get_best_trials()
    assert (best.score, oracle.directions) == (0.75, ["maximize"])


def test_several_objectives_have_a_pareto_front(make):
    objectives = [keras_tuner.Objective("loss", "min"), keras_tuner.Objective("accuracy", "max")]
    oracle = make(6, line(), objective=objectives, sampler="nsga2")
    points = [(1.0, 0.1), (2.0, 0.5), (3.0, 0.4), (4.0, 0.9), (2.0, 0.4)]
    for loss, accuracy in points:
        trial = oracle.create_trial("a")
        assert not oracle.report(trial.trial_id, {"loss": loss, "accuracy": accuracy}, 1)
        end(oracle, trial, loss, accuracy=accuracy)
    outcomes(oracle, "F")
    # Better in one than all that are better in the other.
    assert [t.score for t in oracle.get_best_trials(9)] == [(1.0, 0.1), (2.0, 0.5), (4.0, 0.9)]
    assert oracle.directions == ["minimize", "maximize"]


def test_a_trial_with_one_objective_that_is_not_finite_is_infeasible(make):
    oracle = make(2, line(), objective=["loss", "val_loss"])
    end(oracle, oracle.create_trial("a"), 1.0, val_loss=math.inf)
    end(oracle, oracle.create_trial("a"), 1.0, val_loss=1.0)
    assert [t.status for t in oracle.trials.values()] == [INVALID, COMPLETED]


def test_a_trial_that_breaks_a_constraint_is_never_the_best(make):
    def constraints(metrics):
        return {"size": metrics["size"] - 10}

    oracle = make(3, line(), constraints=constraints)
    for loss, size in ((1.0, 11), (2.0, 10), (3.0, 5)):
        end(oracle, oracle.create_trial("a"), loss, size=size)
    assert [t.score for t in oracle.get_best_trials(5)] == [2.0, 3.0]
    assert [t.score for t in make(3, line()).get_best_trials(5)] == [2.0, 3.0]


@pytest.mark.parametrize("found", [[1.0], None, {"size": "large"}])
def test_constraints_that_are_no_numbers_end_the_search(make, found):
    oracle = make(1, line(), constraints=lambda metrics: found)
    with pytest.raises(errors.SearchError, match=re.escape(f"numbers. Received: {found!r}")):
        end(oracle, oracle.create_trial("a"), 1.0)


def test_constraints_bound_the_pareto_front(make):
    oracle = make(
        2, line(), objective=["loss", "val_loss"], constraints=lambda m: {"loss": m["loss"] - 1}
    )
    end(oracle, oracle.create_trial("a"), 2.0, val_loss=0.0)
    end(oracle, oracle.create_trial("a"), 1.0, val_loss=1.0)
    assert [t.score for t in oracle.get_best_trials(5)] == [(1.0, 1.0)]


# --- Pruning -----------------------------------------------------------------


def curves_through(oracle, curves):
    """Reports curves, one trial each; returns at which step each was pruned, or None."""
    found = []
    for curve in curves:
        trial, stopped = oracle.create_trial("a"), None
        for step, value in enumerate(curve, 1):
            if oracle.report(trial.trial_id, {"loss": value}, step):
                stopped = step
                break
        found.append(stopped)
        if stopped:
            end(oracle, trial, status=STOPPED)
        else:
            end(oracle, trial, min(curve))
    return found


@pytest.mark.parametrize("sign", [1, -1])
def test_the_median_prunes_what_is_worse_than_the_median_at_its_step(make, sign):
    # After five complete trials, whose medians are 3, 2.5 and 2.
    curves = [
        [5, 4.5, 4],
        [4, 3.5, 3],
        [3, 2.5, 2],
        [2, 1.5, 1],
        [1, 0.5, 0],
        [9, 0, 0],  # 9 > 3.
        [3, 9, 9],  # Its best, 3, is not above 3; but above 2.5.
        [2.5, 9, 9],  # 2.5 is not above 2.5, but above 2.
        [2, 9, 9],  # 2 is not above 2: complete, and 2, 9, 9 count from now on.
        [2.6, 2.6, 2.6],  # Medians of six: 2.5, 3, 2.5. 2.6 > 2.5.
        [2.4, 2.6, 2.6],  # 2.4 is below all.
    ]
    objective = keras_tuner.Objective("loss", "min" if sign == 1 else "max")
    oracle = make(20, line(), pruner="median", objective=objective, storage="memory")
    found = curves_through(oracle, [[sign * v for v in c] for c in curves])
    assert found == [None] * 5 + [1, 2, 3, None, 1, None]
    pruned = oracle.get_trial("0006")
    assert pruned.status == STOPPED
    assert oracle.study.trials[6].state == optuna.trial.TrialState.PRUNED
    assert oracle.study.trials[6].intermediate_values == {1: sign * 3, 2: sign * 9}


def test_asha_lets_the_best_of_four_pass_each_rung(make):
    # Rungs end at steps 1, 4 and 16; the first complete trial only tells how long trials are.
    curves = [
        [9.0] * 16,
        [5.0] * 3 + [5.0] * 13,  # The first at each rung: passes.
        [6.0] * 16,  # 6 is not the best of 5, 6.
        [4.0] * 3 + [7.0] * 13,  # The best at rung 1; 7 is not the best of 5, 7 at step 4.
        [4.5] * 16,  # Of 4, 4.5, 5, 6 one passes, and this is not it.
        [3.0] * 16,  # The best everywhere.
        [3.5] * 16,  # One of six passes.
        [3.2] * 16,  # One of seven.
        [3.1] * 3 + [2.0] * 13,  # Of eight, two pass: 3 and 3.1; then the best of 5, 7, 3, 2.
        [3.05] * 16,  # Of nine two pass; at step 4 one of 5, 7, 3, 2, 3.05.
    ]
    found = curves_through(make(20, line(), pruner="asha", storage="memory"), curves)
    assert found == [None, None, 1, 4, 1, None, 1, 1, None, 4]


def test_a_trial_without_patience_left_is_pruned(make):
    oracle = make(5, line(), pruner="patience", storage="memory")
    assert curves_through(oracle, [[3, 2, 1, 2, 2, 2, 2, 2, 2], [9, 8, 7, 6, 5, 4, 3]]) == [9, None]


def test_what_a_dead_process_reported_of_later_steps_does_not_prune(make):
    oracle = make(9, line(), pruner="median")
    curves_through(oracle, [[5.0, 4.0, 1.0]] * 5)
    trial = oracle.create_trial("a")
    assert not oracle.report(trial.trial_id, {"loss": 4.0}, 1)
    assert not oracle.report(trial.trial_id, {"loss": 9.0}, 2)
    assert oracle.report(trial.trial_id, {"loss": 9.0}, 3)
    oracle.release()
    again = make(9, line(), pruner="median")
    assert again.create_trial("a").trial_id == trial.trial_id
    assert not again.report(trial.trial_id, {"loss": 4.5}, 1)
    assert again.report(trial.trial_id, {"loss": 4.2}, 2)


def test_a_pruner_goes_with_one_objective(make):
    with pytest.raises(errors.InvalidOptionError, match="2 objectives"):
        make(1, pruner="median", objective=["loss", "val_loss"])


# --- Hyperband ---------------------------------------------------------------


def table(max_epochs, factor):
    return [(b.sizes, b.epochs) for b in _hyperband.brackets(max_epochs, factor)]


def test_brackets_are_those_of_the_paper():
    assert table(27, 3) == [
        ((27, 9, 3, 1), (1, 3, 9, 27)),
        ((12, 4, 1), (3, 9, 27)),
        ((6, 2), (9, 27)),
        ((4,), (27,)),
    ]
    assert table(9, 3) == [((9, 3, 1), (1, 3, 9)), ((5, 1), (3, 9)), ((3,), (9,))]
    # Table 1 of the paper, without its first column's name.
    assert table(81, 3) == [
        ((81, 27, 9, 3, 1), (1, 3, 9, 27, 81)),
        ((34, 11, 3, 1), (3, 9, 27, 81)),
        ((15, 5, 1), (9, 27, 81)),
        ((8, 2), (27, 81)),
        ((5,), (81,)),
    ]
    assert table(1, 3) == [((1,), (1,))]
    assert table(2, 3) == [((1,), (2,))]


def bands(make, max_epochs=9, **arguments):
    return make(
        None, line(), kind=_hyperband.HyperbandOracle, max_epochs=max_epochs, factor=3, **arguments
    )


def climb(oracle, loss, fails=()):
    """Runs Hyperband; returns the (trial id, epochs) of what was trained, in order."""
    found = []
    while (trial := oracle.create_trial("a")).status != STOPPED:
        assert trial.status == RUNNING
        epochs = oracle.epochs_of(trial.trial_id)
        found.append((trial.trial_id, epochs))
        if (trial.trial_id, epochs) in fails:
            end(oracle, trial, status=INVALID, why=_trials.INFEASIBLE, message="no memory")
            continue
        value = loss(int(trial.trial_id), epochs)
        oracle.report(trial.trial_id, {"loss": value}, epochs)
        end(oracle, trial, value, step=epochs - 1)
    return found


def in_turns(oracles, loss):
    """Runs trials in several processes, a step of one of them at a time.

    Returns:
        The (index, epochs, values) of what was trained; and how often a process waited.
    """
    rng, running, over, found, waited = np.random.default_rng(0), {}, set(), [], 0
    while len(over) < len(oracles):
        number = int(rng.integers(len(oracles)))
        oracle = oracles[number]
        if number in running:
            trial, epochs = running.pop(number)
            value = loss(int(trial.trial_id), epochs)
            oracle.report(trial.trial_id, {"loss": value}, epochs)
            end(oracle, trial, value, step=epochs - 1)
            continue
        trial = oracle.create_trial(f"tuner {number}")
        if trial.status == RUNNING:
            epochs = oracle.epochs_of(trial.trial_id)
            found.append((int(trial.trial_id), epochs, trial.hyperparameters.values))
            running[number] = trial, epochs
        elif trial.status == STOPPED:
            over.add(number)
        else:
            waited += 1
    return found, waited


def by_number(number, epochs):
    """Trials with larger numbers are better, and all of them with time."""
    return 100.0 - number - epochs / 100


@pytest.mark.parametrize("direction", ["min", "max"])
def test_the_best_of_each_rung_go_on(make, direction):
    sign = 1 if direction == "min" else -1
    objective = keras_tuner.Objective("loss", direction)
    oracle = bands(make, objective=objective, storage="memory")
    found = climb(oracle, lambda number, epochs: sign * by_number(number, epochs))
    first = [(f"{i:04d}", 1) for i in range(9)]
    first += [("0008", 3), ("0007", 3), ("0006", 3), ("0008", 9)]
    second = [(f"{i:04d}", 3) for i in range(9, 14)] + [("0013", 9)]
    third = [(f"{i:04d}", 9) for i in range(14, 17)]
    assert found == first + second + third
    statuses = {i: t.status for i, t in oracle.trials.items()}
    complete = {"0008", "0013", "0014", "0015", "0016"}
    assert {i for i, s in statuses.items() if s == COMPLETED} == complete
    assert {s for i, s in statuses.items() if i not in complete} == {STOPPED}
    assert oracle.get_best_trials()[0].trial_id == "0016"


def few(number):
    hps = keras_tuner.HyperParameters()
    hps.Int("x", 1, number)
    return hps


@pytest.mark.parametrize("number", [9, 10, 2, 1])
def test_a_space_with_fewer_combinations_than_the_first_bracket(make, number):
    oracle = make(
        None,
        few(number),
        kind=_hyperband.HyperbandOracle,
        max_epochs=27,
        factor=3,
        storage="memory",
    )
    # It ends, and of 9 combinations in place of 27, 3 of 9 and 1 of 3 go on.
    found = climb(oracle, by_number)
    counts = collections.Counter(epochs for _, epochs in found)
    rungs = {9: (9, 3, 1, 1), 10: (10, 3, 1, 1), 2: (2, 1, 1, 1), 1: (1, 1, 1, 1)}[number]
    assert counts == dict(zip((1, 3, 9, 27), rungs, strict=True))
    assert len([t for t in oracle.trials.values() if t.status == COMPLETED]) == 1
    assert oracle.get_best_trials()[0].trial_id == f"{number - 1:04d}"


def test_rungs_of_27_have_the_sizes_of_the_paper(make):
    oracle = bands(make, 27, storage="memory")
    found = climb(oracle, by_number)
    counts = collections.Counter(
        (oracle._search.queue.bracket_of(int(trial_id)), epochs) for trial_id, epochs in found
    )
    assert counts == {
        (0, 1): 27,
        (0, 3): 9,
        (0, 9): 3,
        (0, 27): 1,
        (1, 3): 12,
        (1, 9): 4,
        (1, 27): 1,
        (2, 9): 6,
        (2, 27): 2,
        (3, 27): 4,
    }


def test_ranks_are_those_of_the_rung_and_not_of_the_beginning(make):
    def loss(number, epochs):
        # At the first rung 8, 7 and 6 are the best; at the second 6 is.
        return 10.0 - number if epochs == 1 else 1.0 + number / 10

    found = climb(bands(make, storage="memory"), loss)
    assert found[9:13] == [("0008", 3), ("0007", 3), ("0006", 3), ("0006", 9)]


def test_the_score_of_a_trial_that_went_on_is_the_best_of_its_life(make):
    oracle = bands(make, storage="memory")
    climb(oracle, lambda number, epochs: by_number(number, 0) + epochs)
    best = oracle.get_trial("0008")
    assert best.score == 100 - 8 + 1
    assert best.best_step == 0


def test_a_trial_that_failed_leaves_its_place_to_the_next(make):
    found = climb(bands(make, storage="memory"), by_number, fails={("0008", 1), ("0007", 3)})
    assert found[9:13] == [("0007", 3), ("0006", 3), ("0005", 3), ("0006", 9)]


def test_a_bound_below_what_was_tried_ends_a_grid(make):
    hp = HyperParameters()
    hp.Choice("a", list(range(6)))
    for count in (4, 2):
        oracle = make(count, hp, kind=_grid_search.GridSearchOracle)
        while (trial := oracle.create_trial("a")).status == RUNNING:
            end(oracle, trial)
        assert trial.status == STOPPED
        assert len(oracle.trials) == 4


def test_a_front_begins_with_the_best_in_the_first_objective(make):
    objectives = [keras_tuner.Objective("loss", "max"), keras_tuner.Objective("size", "min")]
    oracle = make(3, line(), objective=objectives)
    for loss, size in ((1.0, 1.0), (3.0, 3.0), (2.0, 2.0)):
        end(oracle, oracle.create_trial("a"), loss, size=size)
    assert [t.score for t in oracle.get_best_trials(3)] == [(3.0, 3.0), (2.0, 2.0), (1.0, 1.0)]


def test_who_asks_again_is_given_the_trial_that_it_has(make):
    oracle = make(hyperparameters=line())
    trial = oracle.create_trial("a")
    assert oracle.create_trial("a") is trial
    assert oracle.create_trial("b").trial_id == "0001"


def test_trials_that_run_are_not_released_when_others_begin_or_end(make):
    one, other = make(3, line()), make(3, line())
    trials = [one.create_trial(tuner) for tuner in "ab"]
    one.begin_search()
    other.begin_search()
    other.release()
    assert not any(one.is_lost_now(trial.trial_id) for trial in trials)


def test_a_finite_space_is_not_exhausted_where_looking_through_it_was_interrupted(make):
    space = HyperParameters()
    space.Choice("x", [1, 2, 3])
    proposals = make(None, space)._search.proposals
    assert proposals.first_untried() == {"x": 1}

    def interrupted():
        raise KeyboardInterrupt
        yield

    proposals._rest, proposals._candidate = interrupted(), None
    with pytest.raises(KeyboardInterrupt):
        proposals.first_untried()
    assert proposals.first_untried() == {"x": 1}


@pytest.mark.timeout(60)
def test_a_trial_in_a_large_space_goes_on_that_was_interrupted_before_its_values_were_stored(
    make, monkeypatch
):
    space = HyperParameters()
    for name in "abcde":
        space.Int(name, 0, 99)
    oracle = make(2, space)
    end(oracle, oracle.create_trial("a"))
    claimed = []

    def interrupted(trials, frozen, hyperparameters, values):
        claimed.append(values)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(_trials.Trials, "store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            oracle.create_trial("a")
    oracle.release()
    assert [make(2, space).create_trial("a").hyperparameters.values] == claimed


def test_a_way_to_search_of_a_user_may_draw_as_kerastuner_does(make):
    class Mine(_oracle.StudyOracle):
        def populate_space(self, trial_id):
            values = self._random_values()
            status = STOPPED if values is None else RUNNING
            return {"status": status, "values": values}

    def drawn(*counts):
        found = []
        for count in counts:
            oracle = make(6, line(), kind=Mine, project=str(counts))
            for _ in range(count):
                trial = oracle.create_trial("a")
                found.append(trial.hyperparameters.values["x"])
                end(oracle, trial)
        return found

    straight = drawn(6)
    assert len(set(straight)) == 6
    assert drawn(2, 4) == straight


def walk(oracle, ask, trials=None):
    """Runs trials whose values a function asks for; returns what it returned."""
    found = []
    while len(found) != trials and (trial := oracle.create_trial("a")).status == RUNNING:
        found.append(ask(trial.hyperparameters))
        end(oracle, trial)
    return found


def layers(hp):
    """What builders do: hyperparameters in a loop, and no scope that says of which values."""
    return tuple(hp.Choice(f"units_{i}", [8, 16, 32]) for i in range(hp.Int("layers", 1, 3)))


@pytest.mark.parametrize("stop", [0, 1, 20])
def test_a_cell_is_not_tried_again_for_what_was_asked_for_later(make, stop):
    tried = walk(make(None, kind=_grid_search.GridSearchOracle), layers, stop)
    tried += walk(make(None, kind=_grid_search.GridSearchOracle), layers)
    assert len(tried) == len(set(tried)) == 3 + 3**2 + 3**3


def test_a_sampler_does_not_suggest_again_what_did_not_ask_for_what_is_new(make):
    def ask(hp):
        a = hp.Choice("a", [0, 1, 2])
        return a, hp.Choice("b", list(range(9))) if a else None

    tried = walk(make(None, sampler="random"), ask)
    assert len(tried) == len(set(tried)) == 1 + 2 * 9


def test_what_a_program_asks_for_since_it_was_changed_is_tried_with_all(make):
    def changed(hp):
        return hp.Choice("a", [0, 1, 2]), hp.Choice("b", [0, 1])

    before = walk(
        make(None, kind=_grid_search.GridSearchOracle), lambda hp: hp.Choice("a", [0, 1, 2])
    )
    assert before == [0, 1, 2]
    # A tuner asks the builder before the first trial.
    hp = HyperParameters()
    changed(hp)
    assert walk(make(None, hp, kind=_grid_search.GridSearchOracle), changed) == [
        (0, 1),
        (1, 1),
        (2, 1),
    ]


def test_a_trial_that_failed_says_nothing_of_what_it_did_not_ask_for(make):
    oracle = make(None, kind=_grid_search.GridSearchOracle)
    first = oracle.create_trial("a")
    first.hyperparameters.Choice("a", [0, 1])
    end(oracle, first, status=FAILED, message="broken")

    def ask(hp):
        return hp.Choice("a", [0, 1]), hp.Choice("b", [0, 1])

    assert walk(oracle, ask) == [(1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("status", ["COMPLETE", COMPLETED, FAILED])
def test_a_trial_may_be_ended_by_its_id(make, status):
    oracle = make(1, line())
    trial = oracle.create_trial("a")
    oracle.update_trial(trial.trial_id, {"loss": 0.5})
    oracle.end_trial(trial.trial_id, status)
    ended = oracle.get_trial(trial.trial_id)
    assert ended.status == (FAILED if status == FAILED else COMPLETED)
    assert ended.score == (None if status == FAILED else 0.5)
    assert typed(ended.hyperparameters.values) == typed(trial.hyperparameters.values)


def test_a_rung_that_is_not_decided_leaves_time_for_the_next_bracket(make):
    oracle = bands(make)
    held = [oracle.create_trial(f"{i}") for i in range(9)]
    for trial in held[:8]:
        end(oracle, trial, by_number(int(trial.trial_id), 1))
    other = oracle.create_trial("b")
    assert (other.trial_id, oracle.epochs_of(other.trial_id)) == ("0009", 3)
    end(oracle, held[8], by_number(8, 1))
    assert oracle.create_trial("a").trial_id == "0008"


def test_hyperband_that_was_stopped_goes_on_as_if_it_had_not_been(make):
    oracle = bands(make, 3, storage="memory")
    straight, values = climb(oracle, by_number), values_of(oracle)
    found = []
    for _ in range(30):
        # A process for each trial.
        oracle = bands(make, 3)
        trial = oracle.create_trial("a")
        if trial.status == STOPPED:
            break
        epochs = oracle.epochs_of(trial.trial_id)
        found.append((trial.trial_id, epochs))
        end(oracle, trial, by_number(int(trial.trial_id), epochs), step=epochs - 1)
    assert found == straight
    assert values_of(oracle) == values


def test_brackets_may_be_run_several_times(make):
    oracle = bands(make, 3, hyperband_iterations=2, storage="memory")
    found = climb(oracle, by_number)
    # Per iteration 3 to the first epoch, 1 to the third, and 2 at once.
    assert [epochs for _, epochs in found] == [1, 1, 1, 3, 3, 3] * 2


@pytest.mark.parametrize(
    "option", [{"max_epochs": 0}, {"factor": 1}, {"hyperband_iterations": 0}, {"factor": 2.5}]
)
def test_options_of_hyperband_are_checked(option):
    (name,) = option
    with pytest.raises(errors.InvalidOptionError, match=f"`{name}`"):
        _hyperband.HyperbandOracle(objective="loss", **option)


# --- Studies of other searches -----------------------------------------------


def content(oracle):
    """All that a study and its ledger hold."""
    trials = [
        (t.number, t.state, t.values, t.params, t.user_attrs, t.system_attrs, t.intermediate_values)
        for t in oracle.study.get_trials()
    ]
    ledger = oracle._ledger
    facts = [ledger.metadata(name) for name in ("settings", "space")]
    return trials, ledger.trials(), ledger.claims(), facts, oracle.study.user_attrs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": keras_tuner.Objective("loss", "max")}, "direction"),
        ({"objective": keras_tuner.Objective("accuracy", "min")}, "objective"),
        ({"objective": ["loss", "val_loss"]}, "direction"),
        ({"seed": 5}, "seed"),
        ({"kind": _grid_search.GridSearchOracle}, "oracle"),
        ({"kind": _hyperband.HyperbandOracle, "max_epochs": 9}, "oracle"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_a_study_of_another_search_is_refused_and_left_as_it_is(make, change, words):
    run(first := make(3, line(), sampler="random"))
    before = content(first)
    with pytest.raises(errors.StudyError, match=words) as caught:
        make(3, line(), **{"sampler": "random"} | change).create_trial("a")
    assert "overwrite=True" in str(caught.value)
    assert content(make(3, line(), sampler="random")) == before


@pytest.mark.parametrize(("kind", "args"), [("Int", ("x", 0, 1)), ("Float", ("other", 0, 1))])
def test_a_study_of_another_space_is_refused_and_left_as_it_is(make, kind, args):
    run(first := make(3, line()))
    before = content(first)
    hp = HyperParameters()
    getattr(hp, kind)(*args)
    with pytest.raises(errors.StudyError, match="space"):
        make(3, hp).create_trial("a")
    assert content(make(3, line())) == before


def test_hyperband_of_another_size_is_refused(make):
    bands(make, 9).create_trial("a")
    with pytest.raises(errors.StudyError, match="max_epochs"):
        bands(make, 27).create_trial("a")


SECRET = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@127.0.0.1:1/x",
        f"postgresql://127.0.0.1:1/x?user=me&password={SECRET}",
        f"mysql://me:{SECRET}@127.0.0.1:1/x",
        f"nothing://me:{SECRET}@127.0.0.1:1/x",
        f"me:{SECRET}@127.0.0.1",
        "sqlite:////nowhere/at/all/study.db",
    ],
)
def test_a_storage_that_cannot_be_reached_is_named_without_its_password(make, url, capfd):
    with pytest.raises(errors.StorageUnavailableError) as caught:
        make(3, line(), storage=url).create_trial("a")
    assert isinstance(caught.value, ConnectionError)
    captured = capfd.readouterr()
    assert SECRET not in f"{caught.value} {captured.out} {captured.err}"
    assert SECRET not in _study.shown(url)


@pytest.mark.parametrize(
    "option",
    [
        {"max_trials": 0},
        {"max_trials": 1.5},
        {"max_trials": True},
        {"seed": "a"},
        {"seed": -1},
        {"grace_period": 0},
        {"grace_period": "1"},
        {"objective": keras_tuner.Objective("val_accuracy", "auto")},
        {"objective": ["val_loss", keras_tuner.Objective("val_accuracy", "maximize")]},
        {"storage": object()},
        {"storage": "sqlite://"},
        {"storage": "sqlite:///"},
        {"storage": "sqlite+pysqlite:///:memory:"},
        {"storage": "sqlite:///file::memory:?cache=shared&uri=true"},
        {"storage": "sqlite:///file:one?mode=memory&cache=shared&uri=true"},
        {"sampler": "nothing"},
        {"sampler": 3},
        {"pruner": "nothing"},
        {"sampler": "cmaes", "storage": "postgresql://a:b@c/d"},
    ],
    ids=lambda o: ",".join(o),
)
def test_an_option_that_is_not_valid_is_refused_at_once(option):
    (name, *_) = option
    with pytest.raises(errors.InvalidOptionError, match=name):
        _oracle.StudyOracle(**{"objective": "loss", "max_trials": 1} | option)


# --- Budgets -----------------------------------------------------------------


def test_no_trial_begins_when_the_epochs_are_used_up(make):
    oracle = make(None, line())
    oracle.begin_search(_budget.Limits(max_total_epochs=7))
    # 3 and 6 epochs are less than 7.
    for _ in range(3):
        trial = oracle.create_trial("a")
        for step in (1, 2, 3):
            oracle.report(trial.trial_id, {"loss": 1.0}, step)
        end(oracle, trial)
    assert oracle.create_trial("a").status == STOPPED
    again = make(None, line())
    again.begin_search(_budget.Limits(max_total_epochs=10))
    assert again.create_trial("a").status == RUNNING


def test_no_trial_begins_when_the_time_is_over(make, monkeypatch):
    oracle = make(None, line())
    oracle.begin_search(_budget.Limits(max_seconds=100))
    end(oracle, oracle.create_trial("a"))
    now = time.monotonic()
    monkeypatch.setattr(_oracle.time, "monotonic", lambda: now + 101)
    assert oracle.create_trial("a").status == STOPPED
