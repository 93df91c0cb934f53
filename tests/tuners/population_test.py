"""A population: who is copied from whom, with which values, and that training goes on exactly."""

import collections

import keras
import keras_tuner
import numpy as np
import pytest

import tfbig
from tests.tuners.tuner_oracle_test import end, in_turns, line
from tests.tuners.tuner_test import DATA, files
from tfbig import errors, tuners
from tfbig.tuners import (
    HyperParameters,
    _budget,
    _explore,
    _own_values,
    _population_oracle,
    _set_learning_rate,
    _sql_ledger,
    _trial_callbacks,
    _trials,
)

COMPLETED, RUNNING, STOPPED, IDLE = "COMPLETED", "RUNNING", "STOPPED", "IDLE"


def population(make, size=8, generations=3, **arguments):
    arguments = {
        "storage": "memory",
        "population_size": size,
        "max_epochs": generations,
    } | arguments
    return make(None, line(), kind=_population_oracle.PopulationOracle, **arguments)


def train(oracle, loss, fails=()):
    """Trains a population; returns the (index, epochs, x) of what was trained, in order."""
    found = []
    while (trial := oracle.create_trial("a")).status != STOPPED:
        assert trial.status == RUNNING
        index, epochs = int(trial.trial_id), oracle.epochs_of(trial.trial_id)
        x = trial.hyperparameters.values["x"]
        found.append((index, epochs, x))
        if (index, epochs) in fails:
            end(oracle, trial, status="INVALID", why="infeasible", message="no memory")
            continue
        value = loss(index, epochs)
        oracle.report(trial.trial_id, {"loss": value}, epochs)
        end(oracle, trial, value, step=epochs - 1)
    return found


def by_index(index, epochs):
    """Those with smaller numbers are better, and all of them with time."""
    return index - epochs / 100


def test_the_worst_become_copies_of_the_best_with_values_near_theirs(make):
    oracle = population(make, resample_probability=0)
    found = train(oracle, by_index)
    assert [(i, e) for i, e, _ in found] == [(i, e) for e in (1, 2, 3) for i in range(8)]
    x = {(i, e): value for i, e, value in found}
    for epochs in (2, 3):
        for index in range(6):
            assert x[index, epochs] == x[index, epochs - 1]
        for index in (6, 7):
            near = [x[original, epochs - 1] * f for original in (0, 1) for f in (0.8, 1.2)]
            assert x[index, epochs] in [min(value, 1.0) for value in near]
    for index in (6, 7):
        first, second, third = oracle.schedule(f"{index:04d}")
        # What it was in the second generation does not matter for what it became.
        original = int(second.trial_id)
        assert first.trial_id == second.trial_id
        assert original in (0, 1)
        assert (third.first_epoch, third.trial_id) == (2, f"{index:04d}")
        assert second.values["x"] == x[original, 2]
        near = [min(x[original, 2] * factor, 1.0) for factor in (0.8, 1.2)]
        assert third.values["x"] == x[index, 3]
        assert x[index, 3] in near
    assert {t.status for t in oracle.trials.values()} == {COMPLETED}
    assert oracle.get_best_trials()[0].trial_id == "0000"
    # The values of a trial are its last ones; the study has its first ones as parameters.
    last = oracle.trials["0007"].hyperparameters.values["x"]
    assert last == x[7, 3]
    assert oracle.study.trials[7].params["x"] == x[7, 1]


def test_larger_is_better_if_the_objective_says_so(make):
    objective = keras_tuner.Objective("loss", "max")
    oracle = population(make, objective=objective)
    found = train(oracle, lambda index, epochs: index)
    x = {(i, e): value for i, e, value in found}
    changed = {i for i in range(8) if x[i, 1] != x[i, 2]}
    assert changed == {0, 1}
    assert {oracle.schedule("0000")[0].trial_id, oracle.schedule("0001")[0].trial_id} <= {
        "0006",
        "0007",
    }


def test_what_counts_is_what_a_trial_is_now_and_not_its_best(make):
    # Trial 0 was best in the first generation, and is worst in the second.
    losses = {1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [9, 1, 2, 3, 4, 5, 6, 7], 3: [0] * 8}
    oracle = population(make)
    train(oracle, lambda index, epochs: float(losses[epochs][index]))
    assert int(oracle.schedule("0000")[1].trial_id) in (1, 2)


def test_what_has_diverged_is_replaced(make):
    oracle = population(make)
    train(oracle, lambda index, epochs: np.nan if (index, epochs) == (0, 1) else float(index))
    assert oracle.trials["0000"].status == COMPLETED
    assert oracle.schedule("0000")[0].trial_id in ("0001", "0002")


def test_one_that_has_failed_is_not_waited_for(make):
    oracle = population(make)
    found = train(oracle, by_index, fails={(3, 1), (0, 2)})
    assert collections.Counter(e for _, e, _ in found) == {1: 8, 2: 7, 3: 6}
    assert oracle.trials["0003"].status == "INVALID"
    assert oracle.get_best_trials()[0].trial_id == "0001"


def test_processes_train_the_same_population_as_one(make):
    alone = sorted(train(population(make, 6, project="one", storage=None), by_index))
    oracles = [population(make, 6, project="many", storage=None) for _ in range(3)]
    found, waited = in_turns(oracles, by_index)
    assert sorted((index, epochs, v["x"]) for index, epochs, v in found) == alone
    assert waited


def test_a_population_that_was_stopped_goes_on_as_if_it_had_not_been(make):
    expected = train(population(make, project="one", storage=None), by_index)
    oracle = population(make, project="two", storage=None)
    begun = []
    for _ in range(10):
        trial = oracle.create_trial("a")
        index, epochs = int(trial.trial_id), oracle.epochs_of(trial.trial_id)
        begun.append((index, epochs, trial.hyperparameters.values["x"]))
        oracle.report(trial.trial_id, {"loss": by_index(index, epochs)}, epochs)
        end(oracle, trial, by_index(index, epochs), step=epochs - 1)
    stopped = oracle.create_trial("a")
    assert oracle.source_of(stopped.trial_id)[0] == 0
    oracle.release()
    again = population(make, project="two", storage=None)
    assert begun + train(again, by_index) == expected


def test_a_process_that_was_overtaken_waits_for_the_others(make, monkeypatch):
    """As seen by the slower one, the last of a generation is paused; the other has taken it."""
    first, second = (population(make, 4, 4, project="race", storage=None) for _ in range(2))

    def finish(oracle, trial):
        epochs = oracle.epochs_of(trial.trial_id)
        oracle.report(trial.trial_id, {"loss": by_index(int(trial.trial_id), epochs)}, epochs)
        end(oracle, trial, by_index(int(trial.trial_id), epochs), step=epochs - 1)

    # All but the last have completed the second generation.
    for _ in range(4 + 3):
        finish(first, first.create_trial("first"))
    take, taken = second._ledger.take, []

    def overtaken(row, *args, **kwargs):
        if not taken:
            taken.append(first.create_trial("first"))
        return take(row, *args, **kwargs)

    monkeypatch.setattr(second._ledger, "take", overtaken)
    assert second.create_trial("second").status == IDLE
    assert (taken[0].trial_id, first.epochs_of("0003")) == ("0003", 2)
    finish(first, taken[0])
    assert second.epochs_of(second.create_trial("second").trial_id) == 3


@pytest.mark.parametrize("generations", [2, 3], ids=["it goes on", "the population ended"])
def test_a_process_that_wakes_up_drops_the_trial_that_was_handed_on(make, generations):
    """It was stopped for so long that another has continued its trial with other values."""
    asleep, other = (population(make, 4, 3, project="sleep", storage=None) for _ in range(2))
    trials = [asleep.create_trial(f"{i}") for i in range(4)]
    other._ledger._grace = 0.0
    begun = {}
    while len(begun) < 4 * generations:
        trial = other.create_trial("a")
        index, epochs = int(trial.trial_id), other.epochs_of(trial.trial_id)
        begun[index, epochs] = trial.hyperparameters.values
        if (index, epochs) != (3, generations):
            other.report(trial.trial_id, {"loss": by_index(index, epochs)}, epochs)
            end(other, trial, by_index(index, epochs), step=epochs - 1)
    if generations == 3:
        end(other, trial, 9.0)
    stored = [t.user_attrs[_trials.VALUES] for t in other.study.get_trials()]
    assert begun[3, 1] != begun[3, 2]
    for trial in trials:
        with pytest.warns(UserWarning, match=f"has taken over trial {trial.trial_id}"):
            end(asleep, trial, -1.0)
    assert [t.user_attrs[_trials.VALUES] for t in asleep.study.get_trials()] == stored
    assert asleep.create_trial("0").status == (STOPPED if generations == 3 else IDLE)


def test_the_score_of_a_copy_is_that_of_the_model_that_it_became(make):
    # Trial 0 is best in its first epoch and worst at the end of the generation.
    losses = {(0, 1): -9.0, (0, 2): 99.0}
    oracle = population(make, 4, 4, epochs_per_generation=2, resample_probability=0)
    while (trial := oracle.create_trial("a")).status != STOPPED:
        index, last = int(trial.trial_id), oracle.epochs_of(trial.trial_id)
        best = oracle.best_reported(trial.trial_id)
        assert (best is None) == (last == 2 or index == 0)
        values = {e: losses.get((index, e), index - e / 100) for e in (last - 1, last)}
        for epochs, value in values.items():
            oracle.report(trial.trial_id, {"loss": value}, epochs)
        best = min(values, key=values.get)
        end(oracle, trial, values[best], step=best - 1)
    assert oracle.schedule("0000")[0].trial_id == "0001"
    assert oracle.get_trial("0000").score == -0.04


def test_a_space_with_fewer_combinations_than_members(make):
    hp = HyperParameters()
    hp.Int("x", 1, 4)
    oracle = make(
        None,
        hp,
        kind=_population_oracle.PopulationOracle,
        population_size=8,
        max_epochs=2,
        storage="memory",
    )
    found = train(oracle, by_index)
    assert collections.Counter(e for _, e, _ in found) == {1: 4, 2: 4}


# --- Values --------------------------------------------------------------------------------


def hyperparameter(kind, *args, **kwargs):
    hp = HyperParameters()
    getattr(hp, kind)("x", *args, **kwargs)
    return hp.space[0]


@pytest.mark.parametrize(
    ("made", "value", "smaller", "larger"),
    [
        (("Float", 0.0, 1.0), 0.5, 0.4, 0.6),
        (("Float", 0.0, 1.0), 0.9, 0.9 * 0.8, 1.0),
        (("Float", 1e-4, 1e-1, None, "log"), 1e-4, 1e-4, 1.2e-4),
        (("Float", -1.0, 1.0), -0.5, -0.4, -0.6),
        (("Float", 0.0, 0.5, 0.1), 0.1, 0.0, 0.2),
        (("Float", 0.0, 0.5, 0.1), 0.0, 0.0, 0.1),
        (("Int", 1, 100), 50, 40, 60),
        (("Int", 1, 100), 2, 1, 3),
        (("Int", 1, 100), 100, 80, 100),
        (("Int", 16, 64, 16), 32, 16, 48),
        (("Int", 1, 64, 2, "log"), 8, 4, 16),
        (("Int", 1, 1000, 10, "reverse_log"), 901, 1, 1000),
        (("Int", 1, 1000, 10, "reverse_log"), 1000, 901, 1000),
        (("Choice", [64, 16, 32]), 32, 16, 64),
        (("Choice", [64, 16, 32]), 64, 32, 64),
        (("Choice", ["a", "b"]), "a", "a", "a"),
        (("Boolean",), True, True, True),
        (("Fixed", 3), 3, 3, 3),
    ],
    ids=str,
)
def test_values_nearby(made, value, smaller, larger):
    hp = hyperparameter(*made)
    assert _explore.nearby(hp, value, is_larger=False) == pytest.approx(smaller)
    assert _explore.nearby(hp, value, is_larger=True) == pytest.approx(larger)


@pytest.mark.timeout(60)
def test_a_large_range_is_not_listed():
    hp = hyperparameter("Int", 0, 2**40, 3)
    assert _explore.nearby(hp, 3 * 2**30, is_larger=True) == pytest.approx(3.6 * 2**30, abs=2)
    assert _own_values.may_be(hp, 3 * 2**30)
    assert not any(_own_values.may_be(hp, value) for value in (3 * 2**30 + 1, 3.0, True, 2**41))


@pytest.mark.parametrize("names", [None, ["kind"]])
def test_a_value_of_another_condition_is_drawn_anew(names):
    hp = HyperParameters()
    hp.Choice("kind", ["a", "b"])
    for kind, values in (("a", ["x", "y"]), ("b", ["z", "w"])):
        with hp.conditional_scope("kind", [kind]):
            hp.Choice("n", values)
    values = {"kind": "a", "n": "x"}
    for seed in range(20):
        found = _explore.explored(hp, values, names, 0.5, np.random.default_rng(seed))
        assert found["n"] in {"a": ["x", "y"], "b": ["z", "w"]}[found["kind"]]


def test_only_named_values_change_and_conditions_hold():
    hp = HyperParameters()
    kind = hp.Choice("kind", ["a", "b"])
    assert kind == "a"
    with hp.conditional_scope("kind", ["a"]):
        hp.Float("of a", 0.0, 1.0, default=0.5)
    with hp.conditional_scope("kind", ["b"]):
        hp.Float("of b", 0.0, 1.0, default=0.5)
    hp.Float("free", 1.0, 2.0, default=1.5)
    values = {"kind": "a", "of a": 0.5, "free": 1.5}
    found = [
        _explore.explored(hp, values, ["free"], 0.5, np.random.default_rng(seed))
        for seed in range(30)
    ]
    assert all(v["kind"] == "a" and v["of a"] == 0.5 for v in found)
    drawn = [v["free"] for v in found if v["free"] not in (1.5 * 0.8, 1.5 * 1.2)]
    assert 8 <= len(set(drawn)) <= 22
    assert all(1 <= x <= 2 for x in drawn)
    # With all of them free, what is not active any more is gone, and what is now has a value.
    found = [
        _explore.explored(hp, values, None, 0.5, np.random.default_rng(seed)) for seed in range(30)
    ]
    of_b = [v for v in found if v["kind"] == "b"]
    assert of_b
    assert all(v["of b"] == 0.5 for v in of_b)


# --- Options, and models ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        {"population_size": 1},
        {"max_epochs": 0},
        {"epochs_per_generation": 0},
        {"quantile": 0.6},
        {"quantile": -0.1},
        {"quantile": 0.1},
        {"resample_probability": 1.5},
        {"explore": "rate"},
    ],
    ids=str,
)
def test_options_are_checked(option):
    with pytest.raises(errors.InvalidOptionError, match=next(iter(option))):
        tuners.PopulationBasedTraining(lambda hp: None, "val_loss", **option)


def test_a_name_that_is_no_hyperparameter_is_refused_before_training(make):
    oracle = population(make, explore=["y"], storage=None)
    with pytest.raises(errors.InvalidOptionError, match=r"'y'; the model has \['x'\]"):
        oracle.begin_search(_budget.Limits())
    # The name may be corrected.
    again = population(make, explore=["x"], storage=None)
    again.begin_search(_budget.Limits())
    assert train(again, by_index)


def dropping(hp):
    """A model whose rate and dropout are searched."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.Dropout(hp.Float("dropout", 0.1, 0.5)),
            keras.layers.Dense(1),
        ]
    )
    rate = hp.Float("rate", 1e-3, 1e-1, sampling="log")
    model.compile(keras.optimizers.Adam(rate), "mse")
    return model


@pytest.mark.usefixtures("float64")
def test_a_copy_goes_on_where_its_original_stopped(options, tmp_path):
    tuner = tuners.PopulationBasedTraining(
        dropping, population_size=4, max_epochs=4, epochs_per_generation=2, **options
    )
    tuner.search(**DATA, batch_size=5)
    assert not files(tuner, "generations/**/*")
    copies = 0
    for trial in tuner.oracle.trials.values():
        schedule = tuner.schedule(trial)
        assert [g.first_epoch for g in schedule] == [0, 2]
        copies += schedule[0].trial_id != trial.trial_id
        # The same training by hand: each generation with its values, from one backup.
        losses = []
        for generation in schedule:
            hp = trial.hyperparameters.copy()
            hp.values = generation.values
            model = tfbig.extend(dropping(hp))
            backup = tfbig.callbacks.BackupAndRestore(
                tmp_path / f"backup {trial.trial_id}", delete_checkpoint=False
            )
            rate = _set_learning_rate.SetLearningRate(generation.first_epoch)
            history = model.fit(
                **DATA,
                batch_size=5,
                epochs=generation.first_epoch + 2,
                callbacks=[rate, backup],
            )
            losses += history.history["val_loss"]
            assert float(model.optimizer.learning_rate) == pytest.approx(
                generation.values["rate"], rel=1e-12
            )
        frozen = tuner.oracle.study.trials[int(trial.trial_id)]
        last = [frozen.intermediate_values[i] for i in (3, 4)]
        np.testing.assert_allclose(last, losses[-2:], rtol=1e-10)
    assert copies


def reported(tuner):
    return [t.intermediate_values for t in tuner.oracle.study.trials]


@pytest.mark.usefixtures("float64")
def test_a_search_that_was_stopped_at_a_copy_goes_on_with_the_rate_of_the_copy(options):
    """The state that was copied has the rate of the original."""
    settings = {"population_size": 4, "max_epochs": 2, **options}
    settings.pop("project_name")

    def tuner(project):
        return tuners.PopulationBasedTraining(dropping, project_name=project, **settings)

    whole = tuner("whole")
    whole.search(**DATA, batch_size=5)
    schedules = map(whole.schedule, whole.oracle.trials.values())
    (rate, *_) = [b.values["rate"] for a, b in schedules if a.trial_id != b.trial_id]

    class Stops(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if abs(float(self.model.optimizer.learning_rate) / rate - 1) < 1e-6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner("stopped").search(**DATA, batch_size=5, callbacks=[Stops()])
    stopped = tuner("stopped")
    assert min(len(values) for values in reported(stopped)) == 1
    stopped.search(**DATA, batch_size=5)
    for found, expected in zip(reported(stopped), reported(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-10)


def test_a_search_that_is_started_over_begins_with_new_weights(options):
    class Stops(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            epochs.append(epoch)
            if epoch == stop_at:
                raise KeyboardInterrupt

    settings = {"population_size": 2, "max_epochs": 2, "quantile": 0.5, **options}
    for stop_at, overwrite in ((1, False), (9, True)):
        epochs = []
        tuner = tuners.PopulationBasedTraining(dropping, overwrite=overwrite, **settings)
        if stop_at == 1:
            with pytest.raises(KeyboardInterrupt):
                tuner.search(**DATA, callbacks=[Stops()])
            assert files(tuner, "generations/**/*")
        else:
            tuner.search(**DATA, callbacks=[Stops()])
    assert sorted(epochs) == [0, 0, 1, 1]


def test_every_optimizer_of_a_copy_gets_its_own_rate(strategy):
    class TwoOptimizers(tfbig.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.other = keras.optimizers.SGD(0.25, momentum=0.9)

    with strategy.scope():
        inputs = keras.Input((3,))
        model = TwoOptimizers(inputs=inputs, outputs=keras.layers.Dense(1)(inputs))
        model.compile(keras.optimizers.Adam(0.5), "mse")
    callback = _set_learning_rate.SetLearningRate(2)
    callback.set_model(model)
    # As after a backup of the original.
    model.optimizer.learning_rate = model.other.learning_rate = 1.0
    for epoch, rates in ((1, (1.0, 1.0)), (2, (0.5, 0.25))):
        callback.on_epoch_begin(epoch)
        optimizers = model.optimizer, model.other
        assert tuple(float(o.learning_rate.numpy()) for o in optimizers) == rates


def test_shapes_that_change_are_refused_with_what_to_do(options):
    def build(hp):
        keras.utils.set_random_seed(7)
        units = hp.Int("units", 2, 40)
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(units), keras.layers.Dense(1)]
        )
        model.compile(keras.optimizers.Adam(hp.Float("rate", 1e-3, 1e-1, sampling="log")), "mse")
        return model

    settings = {"population_size": 4, "max_epochs": 2, **options}
    tuner = tuners.PopulationBasedTraining(build, resample_probability=0, **settings)
    with pytest.raises(errors.SearchError, match=r"Leave hyperparameters out of `explore`"):
        tuner.search(**DATA, batch_size=5)
    # With the others alone, copies have the units of their originals.
    settings["project_name"] = "other"
    tuner = tuners.PopulationBasedTraining(build, explore=["rate"], **settings)
    tuner.search(**DATA, batch_size=5)
    schedules = [tuner.schedule(trial) for trial in tuner.oracle.trials.values()]
    assert any(before.trial_id != after.trial_id for before, after in schedules)
    for before, after in schedules:
        assert before.values["units"] == after.values["units"]


class Sleepy(tuners.PopulationBasedTraining):
    """Is stopped once, at a moment in the second generation of the second trial.

    Another process takes the trial meanwhile, and gives it up.
    """

    moment = ""
    has_slept = False

    def __init__(self, *args, **kwargs):
        self.begun = []
        super().__init__(*args, **kwargs)

    def sleep_at(self, moment, trial):
        epochs = self.oracle.epochs_of(trial.trial_id)
        if self.has_slept or (moment, trial.trial_id, epochs) != (self.moment, "0001", 2):
            return
        self.has_slept = True
        mine = self.oracle._ledger
        other = _sql_ledger.SqlLedger(mine._engine, mine._study, 60.0)
        assert other.take(*other.trials(index=1))
        assert other.release(1)

    def on_trial_begin(self, trial):
        super().on_trial_begin(trial)
        self.sleep_at("before training", trial)

    def _with_state(self, trial, callbacks):
        self.begun.append(trial.trial_id)
        self.sleep_at("as its state is gone", trial)
        if (
            self.moment == "as its state is gone"
            and self.has_slept
            and self.begun.count("0001") < 3
        ):
            raise errors.StorageUnavailableError("The state cannot be copied.")
        return super()._with_state(trial, callbacks)

    def on_epoch_end(self, trial, model, epoch, logs=None):
        super().on_epoch_end(trial, model, epoch, logs)
        self.sleep_at("in an epoch", trial)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before training", marks=pytest.mark.slow),
        pytest.param("as its state is gone", marks=pytest.mark.slow),
        "in an epoch",
    ],
)
def test_a_process_that_wakes_up_in_a_trial_of_another_leaves_its_files_alone(
    moment, options, monkeypatch
):
    kept = []
    keep = _trial_callbacks.KeepState.on_epoch_end
    monkeypatch.setattr(
        _trial_callbacks.KeepState,
        "on_epoch_end",
        lambda *args: [kept.append(args), keep(*args)][1],
    )
    monkeypatch.setattr(Sleepy, "moment", moment)
    tuner = Sleepy(dropping, population_size=2, max_epochs=2, quantile=0.5, **options)
    with pytest.warns(UserWarning, match="has taken over trial 0001"):
        tuner.search(**DATA)
    assert tuner.has_slept
    # It was run again, from the end of the first generation.
    assert [sorted(values) for values in reported(tuner)] == [[1, 2]] * 2
    assert {t.status for t in tuner.oracle.trials.values()} == {COMPLETED}
    assert len(kept) == 4
    assert tuner.begun.count("0001") == (2 if moment == "before training" else 3)
