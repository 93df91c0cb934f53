"""Trials that are promoted without waiting for others: who goes on, when, and what is complete."""

import collections
import pathlib

import keras_tuner
import numpy as np
import optuna
import pytest

import tfbig
from tests.tuners.tuner_oracle_test import by_number, climb, end, in_turns, line
from tests.tuners.tuner_test import DATA, X, Y, files, noisy
from tfbig import errors, tuners
from tfbig.tuners import _asha, _budget, _hyperband, _learning_study

COMPLETED, RUNNING, STOPPED = "COMPLETED", "RUNNING", "STOPPED"


def asha(make, trials=27, kind=_asha.ASHAOracle, **arguments):
    arguments = {"max_epochs": 27, "storage": "memory", "sampler": "random"} | arguments
    return make(trials, line(), kind=kind, **arguments)


def by_hand(trials, rungs, factor, loss):
    """Algorithm 2 of the paper with one worker: (trial id, epochs) in the order of training."""
    done = [{} for _ in rungs]
    promoted = [set() for _ in rungs]
    trained, began = [], 0
    while True:
        for rung in reversed(range(len(rungs) - 1)):
            best = sorted(done[rung], key=lambda i: (done[rung][i], i))
            best = best[: len(best) // factor]
            candidates = [i for i in best if i not in promoted[rung]]
            if candidates:
                index, rung = candidates[0], rung + 1
                promoted[rung - 1].add(index)
                break
        else:
            if began == trials:
                return trained
            index, rung, began = began, 0, began + 1
        trained.append((f"{index:04d}", rungs[rung]))
        done[rung][index] = loss(index, rungs[rung])


def shuffled(number, epochs):
    """Losses that become smaller, in an order that changes from rung to rung."""
    return np.random.default_rng([number, epochs]).random() - epochs


@pytest.mark.parametrize("loss", [by_number, shuffled])
@pytest.mark.parametrize("factor", [2, 3])
def test_trials_are_promoted_in_the_order_of_the_paper(make, loss, factor):
    found = climb(asha(make, factor=factor), loss)
    rungs = {2: (1, 2, 4, 8, 16, 27), 3: (1, 3, 9, 27)}[factor]
    assert found == by_hand(27, rungs, factor, loss)
    assert max(epochs for _, epochs in found) == 27


def test_larger_is_better_if_the_objective_says_so(make):
    objective = keras_tuner.Objective("loss", "max")
    found = climb(asha(make, objective=objective), lambda *trial: -shuffled(*trial))
    assert found == by_hand(27, (1, 3, 9, 27), 3, shuffled)


def test_those_that_came_furthest_are_complete(make):
    # Nine trials suffice for two rungs of the four.
    oracle = asha(make, 9)
    found = climb(oracle, lambda number, epochs: number - epochs / 100)
    furthest = {trial_id for trial_id, epochs in found if epochs == 9}
    assert max(epochs for _, epochs in found) == 9
    complete = {t.trial_id for t in oracle.trials.values() if t.status == COMPLETED}
    assert complete == furthest
    (best,) = oracle.get_best_trials()
    assert best.trial_id in furthest
    assert best.score == -0.09
    assert {t.status for t in oracle.trials.values()} == {COMPLETED, STOPPED}
    oracle.check_result()


def test_if_some_came_to_the_end_only_these_are_complete(make):
    oracle = asha(make, 27)
    found = climb(oracle, by_number)
    complete = {t.trial_id for t in oracle.trials.values() if t.status == COMPLETED}
    assert complete == {trial_id for trial_id, epochs in found if epochs == 27}


def test_what_violates_a_constraint_is_not_promoted(make):
    oracle = asha(make, 9, constraints=lambda metrics: {"large": metrics["size"] - 5.0})
    while (trial := oracle.create_trial("a")).status != STOPPED:
        index = int(trial.trial_id)
        end(oracle, trial, -float(index), size=9.0 if index >= 6 else 1.0)
    (best,) = oracle.get_best_trials()
    assert int(best.trial_id) < 6


def test_a_pruner_sees_what_a_trial_reported_in_earlier_rungs(make):
    # It becomes worse with every rung, in which it reports once.
    oracle = asha(make, 8, factor=2, pruner="patience", pruner_options={"patience": 1})
    decisions = {}
    while (trial := oracle.create_trial("a")).status != STOPPED:
        epochs = oracle.epochs_of(trial.trial_id)
        decisions[trial.trial_id, epochs] = oracle.report(trial.trial_id, {"loss": epochs}, epochs)
        end(oracle, trial, float(epochs), step=epochs - 1)
    assert {epochs: pruned for (_, epochs), pruned in decisions.items()}[4]


def test_metrics_besides_the_objective_are_kept_at_the_end(make):
    oracle = asha(make, 4)
    while (trial := oracle.create_trial("a")).status != STOPPED:
        epochs = oracle.epochs_of(trial.trial_id)
        oracle.report(trial.trial_id, {"loss": 1.0}, epochs)
        end(oracle, trial, 1.0, step=epochs - 1, size=7.0)
    (best,) = oracle.get_best_trials()
    assert best.metrics.get_last_value("size") == 7.0


def test_constraints_hold_for_what_is_complete_at_the_end(make):
    oracle = asha(make, 4, constraints=lambda metrics: {"large": metrics["size"] - 5.0})
    while (trial := oracle.create_trial("a")).status != STOPPED:
        end(oracle, trial, 1.0, size=7.0)
    assert [t.status for t in oracle.trials.values()].count(COMPLETED) == 1
    assert oracle.get_best_trials() == []


def test_more_trials_later_go_on_with_what_was_learned(make):
    climb(asha(make, 9, storage=None), by_number)
    found = climb(asha(make, 27, storage=None), by_number)
    # Later trials are better; those of before count in the rungs, but have ended.
    assert {trial_id for trial_id, _ in found} == {f"{i:04d}" for i in range(9, 27)}
    assert max(epochs for _, epochs in found) == 27


def test_without_a_complete_trial_the_best_paused_ones_are_shown(make):
    oracle = asha(make, None)
    oracle.begin_search(_budget.Limits(max_total_epochs=20))
    found = climb(oracle, by_number)
    assert sum(epochs for _, epochs in found) > 20
    assert {t.status for t in oracle.trials.values()} == {RUNNING}
    # Those that were trained longest first, best first.
    reached = dict(found)
    expected = sorted(reached, key=lambda i: (-reached[i], by_number(int(i), reached[i])))
    assert reached[expected[0]] >= 9
    assert [t.trial_id for t in oracle.get_best_trials(4)] == expected[:4]
    assert oracle.get_best_trials()[0].score == by_number(int(expected[0]), reached[expected[0]])
    # With more to spend, the search goes on.
    oracle.begin_search(_budget.Limits(max_total_epochs=60))
    assert climb(oracle, by_number)


def test_several_processes_train_each_rung_of_each_trial_once(make):
    oracles = [asha(make, storage=None) for _ in range(3)]
    found, _ = in_turns(oracles, by_number)
    trained = collections.Counter((index, epochs) for index, epochs, _ in found)
    assert set(trained.values()) == {1}
    reached = collections.Counter(epochs for _, epochs in trained)
    assert reached[1] == 27
    assert reached[3] >= 9
    assert reached[27] >= 1
    assert all(oracle.get_best_trials()[0].trial_id == "0026" for oracle in oracles)


def test_a_trial_that_is_paused_at_the_last_moment_ends_with_its_score(make, monkeypatch):
    first, second = (asha(make, 2, storage=None) for _ in range(2))
    end(first, first.create_trial("first"), 3.0)
    trial = first.create_trial("first")
    queue = second._search.queue
    left = queue.left

    def after_the_pause():
        # The second one has read the study before.
        end(first, trial, 2.0)
        return left()

    monkeypatch.setattr(queue, "left", after_the_pause)
    assert second.create_trial("second").status == STOPPED
    assert [t.score for t in second.trials.values()] == [3.0, 2.0]


# --- Rungs that grow ---------------------------------------------------------------------


def test_while_ranks_do_not_change_no_rung_is_added(make):
    found = climb(asha(make, kind=_asha.PASHAOracle), by_number)
    assert {epochs for _, epochs in found} == {1, 3}


def test_ranks_that_change_add_rungs_one_by_one(make):
    def loss(number, epochs):
        # From the first rung to the second the order is reversed; later it stays.
        return 100.0 + number if epochs == 1 else 50.0 - number - epochs / 100

    oracle = asha(make, 40, kind=_asha.PASHAOracle, max_epochs=81)
    found = climb(oracle, loss)
    assert {epochs for _, epochs in found} == {1, 3, 9}
    # Another process knows what was found.
    assert oracle._ledger.metadata("highest rung") == "2"


def test_as_long_as_ranks_change_rungs_are_added(make):
    def loss(number, epochs):
        # In each rung, neighbours of one kind change places, and never change back.
        rung = {1: 0, 3: 1, 9: 2, 27: 3}[epochs]
        return number ^ 1 if rung >= 1 + number // 2 % 3 else number

    found = climb(asha(make, 60, kind=_asha.PASHAOracle), lambda *trial: loss(*trial) - trial[1])
    assert {epochs for _, epochs in found} == {1, 3, 9, 27}


def test_noise_is_how_far_trials_are_apart_that_overtake_each_other_twice():
    flat = dict.fromkeys(range(1, 5), 1.0)
    once = {1: 2.0, 2: 2.0, 3: 0.5, 4: 0.5}
    twice = {1: 1.5, 2: 0.5, 3: 1.5, 4: 1.25}
    assert _asha.noise([flat, once]) == 0.0
    assert _asha.noise([flat, twice]) == 0.25
    # Only what all have counts: `twice` overtakes once until epoch 2.
    assert _asha.noise([{1: 1.0, 2: 1.0}, twice]) == 0.0
    apart = [{1: 0.0, 2: d, 3: 0.0} for d in (0, 1)]
    assert _asha.noise(apart) == 0.0  # They are equal, then apart, then equal.


@pytest.mark.parametrize(
    ("before", "after", "noise", "alike"),
    [
        ([1, 2, 3], [10, 20, 30], 0, True),
        ([1, 2, 3], [20, 10, 30], 0, False),
        ([1, 2, 3], [20, 10, 30], 1, True),
        ([1, 2, 3], [30, 20, 10], 1, False),
        ([1, 1, 3], [20, 10, 30], 0, True),
        ([], [], 0, True),
        ([5], [1], 0, True),
    ],
)
def test_ranks_are_alike_up_to_noise(before, after, noise, alike):
    assert _asha.rank_alike(before, after, noise) == alike


# --- What samplers learn -----------------------------------------------------------------


def frozen(number, state):
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        values=[0.0] if state == "COMPLETE" else None,
        user_attrs={"tfbig:slot": number},
    )
    trial.number = number
    return trial


@pytest.mark.parametrize("direction", ["MINIMIZE", "MAXIMIZE"])
def test_samplers_see_places_after_the_same_epochs(direction):
    sign = 1 if direction == "MINIMIZE" else -1

    def seen():
        signed = {i: {e: sign * s for e, s in found.items()} for i, found in scores.items()}
        found = _learning_study.by_place(trials, signed, optuna.study.StudyDirection[direction])
        return [(t.state.name, t.values and sign * t.values[0]) for t in found]

    trials = [frozen(0, "RUNNING"), frozen(1, "PRUNED"), frozen(2, "COMPLETE"), frozen(3, "FAIL")]
    trials.append(frozen(4, "RUNNING"))
    scores = {0: {1: 3.0}, 1: {1: 5.0, 3: 1.0}, 2: {1: 4.0, 3: 2.0}, 3: {}, 4: {}}
    # Few have come as far as 3 epochs: after the first one, trial 0 is the best.
    others = [("FAIL", None), ("RUNNING", None)]
    assert seen() == [("COMPLETE", 0), ("COMPLETE", 2), ("COMPLETE", 1), *others]
    # Once ten have, those are compared, and trial 0 comes after them.
    trials += [frozen(i, "PRUNED") for i in range(5, 12)]
    scores |= {i: {1: 0.0, 3: 10.0 + i} for i in range(5, 12)}
    # One has begun with 9 epochs.
    trials.append(frozen(12, "COMPLETE"))
    scores[12] = {9: 1.5}
    trials.append(frozen(13, "PRUNED"))
    scores[13] = {1: 0.0, 3: 100.0}
    places = seen()
    assert places[:5] == [("COMPLETE", 11), ("COMPLETE", 0), ("COMPLETE", 2), *others]
    assert places[-2:] == [("COMPLETE", 1), ("COMPLETE", 10)]
    assert trials[0].state.name == "RUNNING"


@pytest.mark.parametrize("kind", [_asha.ASHAOracle, _hyperband.HyperbandOracle])
def test_tpe_learns_from_paused_trials(make, kind):
    """Without them, or if they counted as bad, it would go on at random."""

    def drawn(sampler):
        trials = {} if kind is _hyperband.HyperbandOracle else {"trials": 60}
        values = []
        for seed in range(3):
            oracle = asha(make, **trials, kind=kind, sampler=sampler, seed=seed, max_epochs=27)
            while (trial := oracle.create_trial("a")).status != STOPPED:
                x = trial.hyperparameters.values["x"]
                if oracle.epochs_of(trial.trial_id) == 1:
                    values.append(x)
                end(oracle, trial, abs(x - 0.8))
        return values

    near = {s: np.mean([abs(x - 0.8) < 0.1 for x in drawn(s)]) for s in ("tpe", "random")}
    assert near["tpe"] > 1.5 * near["random"]


# --- Options, and models -----------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [{"max_epochs": 0}, {"min_epochs": 0}, {"factor": 1}, {"min_epochs": 5, "max_epochs": 4}],
    ids=str,
)
def test_options_are_checked(option):
    with pytest.raises(errors.InvalidOptionError, match=next(iter(option))):
        tuners.ASHA(noisy, "val_loss", **option)


@pytest.mark.parametrize(
    "kind", [tuners.ASHA, tuners.PASHA, tuners.Hyperband, tuners.PopulationBasedTraining]
)
def test_several_objectives_are_refused(kind):
    with pytest.raises(errors.InvalidOptionError, match="needs a single objective"):
        kind(noisy, ["val_loss", "loss"])


@pytest.mark.parametrize(
    "kind", [tuners.ASHA, pytest.param(tuners.Hyperband, marks=pytest.mark.slow)]
)
def test_a_trial_that_is_paused_keeps_its_state_however_few_weights_are_kept(kind, options):
    class Search(kind):
        def on_trial_end(self, trial):
            super().on_trial_end(trial)
            paused = [row.index for row in self.oracle._ledger.trials(state="paused")]
            counts.append(len(paused))
            for index in paused:
                directory = pathlib.Path(self.get_trial_dir(f"{index:04d}"))
                assert (directory / "state/backup.npz").exists()
                assert (directory / "checkpoint.weights.h5").exists()

    counts = []
    more = {"max_trials": 5} if kind is tuners.ASHA else {}
    tuner = Search(noisy, max_epochs=4, factor=2, keep_best_k=1, **more, **options)
    tuner.search(**DATA, batch_size=5)
    assert max(counts) > 1
    assert not files(tuner, "**/state/**/*")
    assert len(files(tuner, "**/checkpoint.weights.h5")) == 1


@pytest.mark.parametrize(
    "kind",
    [tuners.ASHA, tuners.Hyperband, tuners.PopulationBasedTraining],
    ids=lambda k: k.__name__,
)
def test_epochs_that_would_have_no_effect_are_refused(kind, options):
    def build(hp):
        hp.Int("epochs", 1, 5)
        return noisy(hp)

    tuner = kind(build, **options)
    with pytest.raises(errors.InvalidOptionError, match="a hyperparameter named 'epochs'"):
        tuner.search(**DATA)
    assert not tuner.oracle.trials


def test_a_fit_of_ones_own_that_reports_nothing_resumes_as_well(options):
    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return noisy(hp)

        def fit(self, hp, model, *args, **kwargs):
            history = model.fit(*args, **kwargs)
            epochs.append(history.epoch)
            return {"own": float(len(epochs))}

    epochs = []
    objective = keras_tuner.Objective("own", "min")
    more = {"max_epochs": 2, "factor": 2, "max_trials": 2}
    tuners.ASHA(Model(), **more, **options | {"objective": objective}).search(**DATA)
    assert sorted(epochs) == [[0], [0], [1]]


def test_observations_of_other_epochs_are_refused(options):
    with pytest.raises(errors.InvalidOptionError, match="pauses trials"):
        tuners.ASHA(noisy, transfer_from="earlier", transfer="observations", **options)


def test_another_search_is_refused(make):
    climb(asha(make, 3, storage=None), by_number)
    for change in ({"factor": 2}, {"max_epochs": 81}, {"kind": _asha.PASHAOracle}):
        with pytest.raises(errors.StudyError, match="different search"):
            asha(make, 3, storage=None, **change).create_trial("a")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [tuners.ASHA, pytest.param(tuners.PASHA, marks=pytest.mark.slow)])
def test_a_promoted_trial_equals_one_that_was_not_interrupted(kind, options, tmp_path):
    settings = {k: v for k, v in options.items() if k != "max_trials"}
    tuner = kind(noisy, max_trials=4, max_epochs=4, factor=2, **settings)
    tuner.search(**DATA, batch_size=5)
    steps = {t.number: sorted(t.intermediate_values) for t in tuner.oracle.study.trials}
    assert set(map(len, steps.values())) >= {1, 2}
    (best,) = tuner.oracle.get_best_trials()
    went_on = tuner.oracle.study.trials[int(best.trial_id)]
    epochs = len(went_on.intermediate_values)
    model = tfbig.extend(noisy(best.hyperparameters))
    backup = tfbig.callbacks.BackupAndRestore(tmp_path / "backup")
    history = model.fit(**DATA, batch_size=5, epochs=epochs, callbacks=[backup])
    expected = history.history["val_loss"]
    found = [went_on.intermediate_values[i + 1] for i in range(epochs)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert best.score == pytest.approx(min(expected), rel=1e-10)
    assert not files(tuner, "**/state/**/*")
    # The weights are those of its best epoch.
    loaded = tuner.get_best_models()[0]
    losses = loaded.evaluate(*DATA["validation_data"], verbose=0)
    assert losses == pytest.approx(min(expected), rel=1e-10)


# --- Epochs that a program passes --------------------------------------------


class Passes(keras_tuner.HyperModel):
    """A builder whose `fit` has names of its own."""

    def build(self, hp):
        return noisy(hp)

    def fit(self, hp, model, epochs, **kwargs):
        return model.fit(**DATA, epochs=epochs, **kwargs)


PASSED = {
    "by name": (noisy, (), {**DATA, "epochs": 7}),
    "by position": (noisy, (X, Y, 8, 7, 0), {"validation_data": (X, Y)}),
    "to a fit of one's own": (Passes(), (7,), {}),
}


@pytest.mark.parametrize("passed", PASSED)
@pytest.mark.parametrize("kind", [tuners.ASHA, tuners.PASHA, tuners.PopulationBasedTraining])
def test_epochs_are_refused_before_the_first_trial(options, kind, passed):
    model, args, kwargs = PASSED[passed]
    tuner = kind(model, max_epochs=3, **options)
    with pytest.raises(
        errors.InvalidOptionError,
        match=rf"`search` of {kind.__name__} must not .* Received: epochs=7\. .*`max_epochs`.* 3\.",
    ):
        tuner.search(*args, **kwargs)
    assert not tuner.oracle.trials


@pytest.mark.parametrize("passed", PASSED)
def test_hyperband_ignores_the_epochs_of_keras_tuners_programs_with_a_warning(options, passed):
    model, args, kwargs = PASSED[passed]
    tuner = tuners.Hyperband(model, max_epochs=1, factor=2, **options)
    with pytest.warns(UserWarning, match=r"no effect .* epochs=7\. .*`max_epochs`.* 1\.") as seen:
        tuner.search(*args, **kwargs)
    assert [w.filename for w in seen if "epochs" in str(w.message)] == [__file__]
    (trial,) = tuner.oracle.study.trials
    assert trial.intermediate_values.keys() == {1}


def test_epochs_may_mean_something_to_a_run_trial_of_ones_own(options):
    class Mine(tuners.ASHA):
        def run_trial(self, trial, epochs):
            return [float(epochs)] * 3

    tuner = Mine(noisy, max_trials=1, max_epochs=1, **options | {"objective": None})
    tuner.search(epochs=7)
    assert tuner.oracle.get_best_trials()[0].score == 7
