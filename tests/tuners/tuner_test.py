"""Tuners of tiny models: what is trained, kept, loaded and reported."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import keras
import keras_tuner
import numpy as np
import optuna
import pytest
import tensorflow as tf

import tfbig
from tests import job
from tfbig import errors, tuners
from tfbig.distribute import _workers
from tfbig.tuners import _agreement, _isolation

X = np.random.default_rng(0).normal(size=(16, 3))
Y = X @ [[1.0], [-1.0], [0.5]] + 0.1
DATA = {"x": X, "y": Y, "validation_data": (X, Y), "verbose": 0}


def build(hp):
    """A linear model whose learning rate is searched."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(hp.Float("rate", 1e-3, 1e-1, sampling="log")), "mse")
    return model


class Scored(tuners.RandomSearch):
    """A tuner of no model: a function gives the result of a trial."""

    def __init__(self, function, **kwargs):
        self.function = function
        super().__init__(**kwargs)

    def run_trial(self, trial, *args, **kwargs):
        return self.function(trial.hyperparameters)


def test_a_search_says_what_its_sampler_draws_at_random(options):
    pytest.importorskip("cmaes")

    class Search(tuners.OptunaSearch):
        def run_trial(self, trial, *args, **kwargs):
            return trial.hyperparameters.Float("x", 0, 1)

    hp = tuners.HyperParameters()
    hp.Choice("kind", ["a", "b"])
    options |= {"objective": None, "hyperparameters": hp}
    tuner = Search(max_trials=1, sampler="cmaes", **options)
    with pytest.warns(UserWarning, match=r"models no choices .* draws 'kind' at random") as seen:
        tuner.search(verbose=0)
    assert [w.filename for w in seen] == [__file__]


# --- All tuners --------------------------------------------------------------

TUNERS = {
    "GridSearch": {"max_trials": 2},
    "RandomSearch": {"max_trials": 2},
    "BayesianOptimization": {"max_trials": 2, "num_initial_points": 1},
    "OptunaSearch": {"max_trials": 2, "sampler": "nsga2", "pruner": "median"},
    "Hyperband": {"max_epochs": 2, "factor": 2},
    "HyperoptSearch": {"max_trials": 2},
}


@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_searches_and_its_best_model_has_the_recorded_score(name, options, capsys):
    if name == "HyperoptSearch":
        pytest.importorskip("hyperopt")
    tuner = getattr(tuners, name)(build, **options | TUNERS[name])
    epochs = {} if name == "Hyperband" else {"epochs": 2}
    tuner.search(**DATA, **epochs)
    trials = tuner.oracle.get_best_trials(9)
    assert trials[0].score == min(t.score for t in trials)
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(trials[0].score, rel=1e-5)
    (hp,) = tuner.get_best_hyperparameters()
    assert float(model.optimizer.learning_rate) == pytest.approx(hp.get("rate"), rel=1e-6)
    tuner.results_summary()
    out = capsys.readouterr().out
    assert f"{len(tuner.oracle.trials)} trials: " in out
    assert f"Trial {trials[0].trial_id} summary" in out


def test_every_trial_finds_the_micro_batch_that_fits(options):
    """`hp.Int("batch_size")` is the effective batch; a trial that does not fit is infeasible."""
    sizes = []

    def sized(hp):
        hp.Choice("batch_size", [8, 16])
        width = hp.Choice("width", [1, 2**22])
        layers = [keras.layers.Dense(width), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((3,)), *layers])
        model.compile("sgd", "mse")
        return model

    class Sees(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            sizes.append(self.model.micro_batch_size)

    tuner = tuners.GridSearch(
        sized, **options, max_trials=9, micro_batch_size="auto", memory_budget=32 * 2**20
    )
    tuner.search(**DATA, epochs=1, callbacks=[Sees()])
    statuses = {
        (t.hyperparameters.get("batch_size"), t.hyperparameters.get("width")): t.status
        for t in tuner.oracle.trials.values()
    }
    assert statuses == {
        (8, 1): "COMPLETED",
        (8, 2**22): "INVALID",
        (16, 1): "COMPLETED",
        (16, 2**22): "INVALID",
    }
    assert set(sizes) == {8, 16}


@pytest.mark.parametrize(
    "given",
    [
        {"loss_scale": 64.0},
        {"loss_scale": None, "log_grad_norm": True, "exchange_dtype": "bfloat16"},
        {"gradient_accumulation_steps": 2, "log_gradient_noise_scale": True, "recompute": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_options_of_models_are_passed_on_to_every_model(given, options):
    tuner = tuners.RandomSearch(build, **options, **given, max_trials=1)
    tuner.search(**DATA)
    (model,) = tuner.get_best_models()
    config = model.get_config()
    assert {name: config[name] for name in given} == given


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A search of three trials that has ended, its tuner and a callback that it was given."""
    keras.utils.set_random_seed(1)
    callback = Counter()
    tuner = tuners.RandomSearch(
        build,
        "val_loss",
        max_trials=3,
        seed=0,
        keep_best_k=2,
        directory=tmp_path_factory.mktemp("done"),
        project_name="p",
    )
    tuner.search(**DATA, epochs=2, callbacks=[callback])
    return tuner, callback


class Counter(keras.callbacks.Callback):
    """Notes where it was called, in itself and for all of its copies."""

    seen = []

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        Counter.seen.append((id(self), self.epochs))


def test_callbacks_are_copied_for_each_trial(done):
    _, callback = done
    assert callback.epochs == 0
    assert [epochs for _, epochs in Counter.seen] == [1, 2] * 3


def files(tuner, pattern="**/*"):
    root = pathlib.Path(tuner.project_dir)
    return sorted(str(p.relative_to(root)) for p in root.glob(pattern) if p.is_file())


def test_weights_of_the_best_are_kept_and_no_state_of_keras_tuner(done):
    tuner, _ = done
    best = sorted(t.trial_id for t in tuner.oracle.get_best_trials(2))
    assert files(tuner, "**/*.h5") == [f"trial_{i}/checkpoint.weights.h5" for i in best]
    assert {pathlib.Path(f).name for f in files(tuner, "**/*.json")} == {"build_config.json"}
    assert {pathlib.Path(f).parts[0] for f in files(tuner)} <= {
        # While it is open, SQLite has files of its own beside it.
        *("study.db", "study.db-shm", "study.db-wal"),
        *(f"trial_000{i}" for i in range(3)),
    }


def test_weights_that_are_not_kept_are_told_to_be(done):
    tuner, _ = done
    with pytest.raises(errors.SearchError, match="keep_best_k"):
        tuner.get_best_models(3)
    assert len(tuner.get_best_models(2)) == 2


def test_every_epoch_is_in_the_study(done):
    tuner, _ = done
    for trial in tuner.oracle.study.trials:
        assert sorted(trial.intermediate_values) == [1, 2]
        assert trial.value == min(trial.intermediate_values.values())


def test_a_search_that_has_ended_does_nothing_more_and_keeps_its_results(done):
    tuner, _ = done
    again = tuners.RandomSearch(
        build, "val_loss", 3, 0, directory=tuner.directory, project_name="p", keep_best_k=2
    )
    before = [t.score for t in tuner.oracle.trials.values()]
    again.search(**DATA, epochs=2)
    assert [t.score for t in again.oracle.trials.values()] == before
    (model,) = again.get_best_models()
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(min(before), rel=1e-5)


def test_the_weights_of_the_best_epoch_are_kept_and_not_those_of_the_last(options):
    overshoots = keras.callbacks.LearningRateScheduler(lambda epoch, rate: (0.01, 0.05, 2.0)[epoch])
    tuner = tuners.RandomSearch(build, **options | {"max_trials": 1})
    tuner.search(**DATA, epochs=3, callbacks=[overshoots])
    (trial,) = tuner.oracle.get_best_trials()
    (frozen,) = tuner.oracle.study.trials
    assert trial.best_step == 1
    assert trial.score == frozen.intermediate_values[2] < frozen.intermediate_values[3]
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(trial.score, rel=1e-5)


@pytest.mark.parametrize("epochs", [3, 4])
def test_the_best_epoch_is_one_of_those_that_were_validated(epochs, options):
    rates = keras.callbacks.LearningRateScheduler(lambda epoch, _: (0.01, 0.05, 0.02, 2.0)[epoch])
    tuner = tuners.RandomSearch(build, **options | {"max_trials": 2})
    tuner.search(**DATA, epochs=epochs, validation_freq=2, callbacks=[rates])
    assert {t.status for t in tuner.oracle.trials.values()} == {"COMPLETED"}
    (trial,) = tuner.oracle.get_best_trials()
    frozen = tuner.oracle.study.best_trial
    assert trial.best_step == 1
    assert list(frozen.intermediate_values) == [2, 4][: epochs // 2]
    assert trial.score == frozen.intermediate_values[2]
    # Those of epochs that were not validated might be worse, and did not replace them.
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(trial.score, rel=1e-5)


def test_a_search_whose_trials_are_never_validated_ends(options):
    tuner = tuners.RandomSearch(build, **options | {"max_trials": 2})
    with pytest.raises(errors.SearchError, match=r"report the objective 'val_loss'.*with loss"):
        tuner.search(**DATA, epochs=3, validation_freq=4)


def test_without_callbacks_it_is_not_known_which_epochs_were_validated(options):
    class Model(tuners.HyperModel):
        def build(self, hp):
            return build(hp)

        def fit(self, hp, model, *args, callbacks, **kwargs):
            return model.fit(*args, **kwargs)

    tuner = tuners.RandomSearch(Model(), **options | {"max_trials": 2})
    with pytest.raises(errors.SearchError, match=r"objective val_loss.*Pass `callbacks` on"):
        tuner.search(**DATA, epochs=4, validation_freq=2)


# --- Metrics of several numbers ---------------------------------------------------


def with_f1(average):
    def build(hp):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
        model.compile(
            keras.optimizers.SGD(hp.Float("rate", 0.1, 1.0)),
            "binary_crossentropy",
            metrics=[keras.metrics.F1Score(average=average, threshold=0.5, name="f1")],
        )
        return model

    return build


def test_a_metric_that_is_an_array_of_one_number(options):
    x = np.array([[0.0, 1.0], [1.0, 0.0]] * 8)
    y = x[:, :1]
    objective = keras_tuner.Objective("val_f1", "max")
    tuner = tuners.OptunaSearch(
        with_f1(None), **options | {"objective": objective, "max_trials": 2, "pruner": "median"}
    )
    tuner.search(x, y, validation_data=(x, y), epochs=2, verbose=0)
    scores = [t.score for t in tuner.oracle.trials.values()]
    assert len(scores) == 2
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in scores)


def test_an_array_of_one_number_in_what_a_trial_returns(options):
    objective = keras_tuner.Objective("f1", "max")
    tuner = Scored(
        lambda hp: {"f1": np.array([hp.Float("x", 0, 1)])},
        **options | {"objective": objective, "max_trials": 2},
    )
    tuner.search(verbose=0)
    scores = {t.score == t.hyperparameters.get("x") for t in tuner.oracle.trials.values()}
    assert scores == {True}


def test_an_objective_of_several_numbers_is_refused(options):
    def build(hp):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
        model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score(name="f1")])
        return model

    x = np.array([[0.0, 1.0], [1.0, 0.0]] * 8)
    objective = keras_tuner.Objective("f1", "max")
    tuner = tuners.RandomSearch(build, **options | {"objective": objective, "max_trials": 1})
    with pytest.raises(errors.SearchError, match=r"'f1' with 2 of them.*average"):
        tuner.search(x, x, epochs=1, verbose=0)


# --- Hyperband ---------------------------------------------------------------


def noisy(hp):
    """A model with state of every kind: moments of Adam, and the seeds of Dropout."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dropout(0.4), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(hp.Float("rate", 1e-3, 1e-1, sampling="log")), "mse")
    return model


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shuffle", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_trial_that_went_on_equals_one_that_was_not_interrupted(options, shuffle, tmp_path):
    tuner = tuners.Hyperband(noisy, max_epochs=4, factor=4, **options)
    tuner.search(**DATA, batch_size=5, shuffle=shuffle)
    (went_on,) = [t for t in tuner.oracle.study.trials[:4] if len(t.intermediate_values) == 4]
    trial = tuner.oracle.get_trial(f"{went_on.number:04d}")
    model = tfbig.extend(noisy(trial.hyperparameters))
    # Which also draws the order of samples.
    backup = [tfbig.callbacks.BackupAndRestore(tmp_path / "backup")] if shuffle else []
    history = model.fit(**DATA, batch_size=5, shuffle=shuffle, epochs=4, callbacks=backup)
    expected = history.history["val_loss"]
    found = [went_on.intermediate_values[i] for i in (1, 2, 3, 4)]
    # Exactness is tested in float64 at 1e-10.
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert trial.score == pytest.approx(min(expected), rel=1e-10)
    assert not files(tuner, "**/state/**/*")


def averaging(build):
    """A builder of models whose optimizer keeps averages of the weights."""

    def build_averaging(hp):
        model = build(hp)
        optimizer = keras.optimizers.Adam(hp.get("rate"), use_ema=True, ema_momentum=0.8)
        model.compile(optimizer, "mse")
        return model

    return build_averaging


def swapping(on_epoch):
    return {"shuffle": False, "callbacks": [keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)]}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("on_epoch", [True, False])
def test_the_averages_are_kept_that_were_validated(options, on_epoch):
    tuner = tuners.RandomSearch(averaging(build), max_trials=1, **options)
    tuner.search(**DATA, batch_size=5, epochs=3, **swapping(on_epoch))
    (trial,) = tuner.oracle.trials.values()
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(trial.score, rel=1e-12)
    # Training itself goes on with the weights.
    keras.utils.set_random_seed(tuner.oracle.seed_of_training("0000", 0))
    plain = averaging(build)(trial.hyperparameters)
    history = plain.fit(**DATA, batch_size=5, epochs=3, **swapping(on_epoch))
    assert trial.score == pytest.approx(min(history.history["val_loss"]), rel=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("on_epoch", [True, False])
def test_a_trial_goes_on_with_the_weights_that_averages_were_swapped_for(options, on_epoch):
    tuner = tuners.Hyperband(averaging(noisy), max_epochs=4, factor=4, **options)
    tuner.search(**DATA, batch_size=5, **swapping(on_epoch))
    (went_on,) = [t for t in tuner.oracle.study.trials[:4] if len(t.intermediate_values) == 4]
    trial = tuner.oracle.get_trial(f"{went_on.number:04d}")
    model = tfbig.extend(averaging(noisy)(trial.hyperparameters))
    history = model.fit(**DATA, batch_size=5, epochs=4, **swapping(on_epoch))
    found = [went_on.intermediate_values[i] for i in (1, 2, 3, 4)]
    # Exactness is tested in float64 at 1e-10.
    np.testing.assert_allclose(found, history.history["val_loss"], rtol=1e-10)


@pytest.mark.parametrize("more", [{"executions_per_trial": 2}, {"folds": 3}], ids=str)
def test_hyperband_goes_on_with_one_training_of_a_trial(more, options):
    with pytest.raises(errors.InvalidOptionError, match="resumes trials"):
        tuners.Hyperband(build, max_epochs=2, factor=2, **more, **options)


def test_a_program_that_was_corrected_goes_on_after_failures(options):
    def broken(hp):
        build(hp)
        raise RuntimeError("a mistake")

    class Model(keras_tuner.HyperModel):
        built = 0

        def build(self, hp):
            Model.built += 1
            return build(hp) if Model.built == 1 else broken(hp)

    with pytest.raises(errors.SearchError, match=r"3 trials in a row failed(?s:.*)a mistake"):
        tuners.RandomSearch(Model(), max_trials=5, **options).search(**DATA)
    tuner = tuners.RandomSearch(build, max_trials=5, **options)
    tuner.search(**DATA)
    statuses = [t.status for t in tuner.oracle.trials.values()]
    assert statuses == ["FAILED"] * 3 + ["COMPLETED"] * 2


FOLDED = {"x": DATA["x"], "y": DATA["y"], "epochs": 1, "verbose": 0}


def test_folds_validate_on_each_sample_once(options):
    seen = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs["val_loss"])

        def __deepcopy__(self, memo):
            return self

    class Search(tuners.RandomSearch):
        held_out = []

        def _build_and_fit_model(self, trial, *args, **kwargs):
            Search.held_out.append(np.array(kwargs["validation_data"][0]))
            return super()._build_and_fit_model(trial, *args, **kwargs)

    tuner = Search(build, max_trials=2, folds=3, **options)
    tuner.search(**FOLDED, callbacks=[Note()])
    for trial in range(2):
        rows = np.concatenate(Search.held_out[3 * trial : 3 * trial + 3])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, DATA["x"]))
        score = tuner.oracle.trials[f"000{trial}"].score
        assert score == pytest.approx(np.mean(seen[3 * trial : 3 * trial + 3]))
    for a, b in zip(Search.held_out[:3], Search.held_out[3:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("before", "after"), [(None, 3), (3, None), (3, 4)])
def test_folds_must_not_change_on_resume(before, after, options):
    data = {n: FOLDED if n else DATA | {"epochs": 1} for n in (before, after)}
    tuners.RandomSearch(build, max_trials=1, folds=before, **options).search(**data[before])
    tuner = tuners.RandomSearch(build, max_trials=2, folds=after, **options)
    told = f"folds: '{before or 'none'}', expected '{after or 'none'}'"
    with pytest.raises(errors.StudyError, match=told):
        tuner.search(**data[after])
    again = tuners.RandomSearch(build, max_trials=2, folds=before, **options)
    again.search(**data[before])
    assert len(again.oracle.trials) == 2


def test_the_number_of_executions_may_change_on_resume_and_is_noted(options, capsys):
    for count in (1, 2, 2):
        tuner = tuners.RandomSearch(build, max_trials=count, executions_per_trial=count, **options)
        tuner.search(**DATA, epochs=1)
    (noted,) = tuner.oracle.study.user_attrs["tfbig:changes"]
    assert noted["change"] == "executions per trial: 1, now 2"
    assert noted["change"] in capsys.readouterr().out


def test_a_study_that_does_not_say_how_often_trials_are_trained_can_be_resumed(options):
    tuner = tuners.RandomSearch(build, max_trials=1, folds=3, **options)
    tuner.search(**FOLDED)

    def without(text):
        settings = json.loads(text)
        return json.dumps({k: v for k, v in settings.items() if k not in _agreement._ADDED})

    tuner.oracle._ledger.change_metadata(_agreement.SETTINGS, without)
    tuner = tuners.RandomSearch(build, max_trials=2, folds=3, **options)
    tuner.search(**FOLDED)
    assert "tfbig:changes" not in tuner.oracle.study.user_attrs
    with pytest.raises(errors.StudyError, match="folds: '3', expected 'none'"):
        tuners.RandomSearch(build, **options).search(**DATA)


def test_a_pruner_looks_at_the_mean_after_each_fold(options):
    class SecondAfterTwoFolds(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1 and trial.last_step == 2

    tuner = tuners.RandomSearch(build, max_trials=2, folds=4, pruner=SecondAfterTwoFolds, **options)
    tuner.search(**FOLDED)
    first, second = tuner.oracle.study.trials
    assert sorted(first.intermediate_values) == [1, 2, 3]
    assert sorted(second.intermediate_values) == [1, 2]
    assert second.state == optuna.trial.TrialState.PRUNED


@pytest.mark.parametrize("pruner", ["wilcoxon", lambda seed: optuna.pruners.WilcoxonPruner()])
def test_wilcoxon_compares_trials_fold_by_fold(pruner, options):
    """The second trial is worse by less than folds differ, but in every fold."""
    pytest.importorskip("scipy")

    losses = []

    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            hp.Choice("worse", [0.0, 0.01])
            return build(keras_tuner.HyperParameters())

        def fit(self, hp, model, x, y, validation_data, callbacks, **kwargs):
            losses.append(float(np.abs(validation_data[0]).mean()) + hp.get("worse"))
            return losses[-1]

    tuner = tuners.GridSearch(Model(), folds=8, pruner=pruner, **options)
    tuner.search(FOLDED["x"], FOLDED["y"])
    first, second = tuner.oracle.study.trials
    assert [first.intermediate_values[fold] for fold in range(1, 8)] == losses[:7]
    assert np.std(losses[:7]) > 0.01
    assert second.state == optuna.trial.TrialState.PRUNED
    assert 3 <= len(second.intermediate_values) <= 7
    for fold, value in second.intermediate_values.items():
        assert value == pytest.approx(first.intermediate_values[fold] + 0.01)
    with pytest.raises(errors.InvalidOptionError, match="Use `folds`"):
        tuners.GridSearch(Model(), pruner=pruner, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": None}, "must be arrays"),
        ({"validation_split": 0.5}, "each fold is used for validation in turn"),
        (
            {"x": DATA["x"][:2], "y": DATA["y"][:2]},
            "number of samples. Received: folds=.* and 2 samples",
        ),
    ],
    ids=["no arrays", "validation", "few samples"],
)
def test_data_that_cannot_be_cut_into_folds_are_refused(arguments, message, options):
    with pytest.raises(errors.SearchError, match=message):
        tuners.RandomSearch(build, max_trials=1, folds=3, **options).search(**FOLDED | arguments)


def test_a_result_that_is_a_number_is_of_the_end_of_its_rung(options):
    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return build(hp)

        def fit(self, hp, model, *args, **kwargs):
            return model.fit(*args, **kwargs).history["val_loss"][-1]

    tuner = tuners.Hyperband(Model(), max_epochs=2, factor=2, **options)
    tuner.search(**DATA)
    for trial in tuner.oracle.study.trials:
        if trial.state == optuna.trial.TrialState.COMPLETE:
            assert trial.value == pytest.approx(min(trial.intermediate_values.values()))


# --- What users put in the place of fit --------------------------------------


def test_a_loop_of_the_user_trains_a_model_that_is_not_compiled(options):
    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            hp.Float("rate", 1e-3, 1e-1, sampling="log")
            return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])

        def fit(self, hp, model, x, y, callbacks=(), **kwargs):
            optimizer = keras.optimizers.SGD(hp.get("rate"))
            for callback in callbacks:
                callback.set_model(model)
            best = np.inf
            for epoch in range(2):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((model(x) - y) ** 2)
                gradients = tape.gradient(loss, model.trainable_variables)
                optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
                best = min(best, float(loss))
                for callback in callbacks:
                    callback.on_epoch_end(epoch, {"val_loss": float(loss)})
            return best

    tuner = tuners.RandomSearch(Model(), max_trials=2, **options)
    tuner.search(**DATA)
    assert [t.status for t in tuner.oracle.trials.values()] == ["COMPLETED"] * 2
    assert isinstance(tuner.get_best_models()[0], keras.Sequential)


def test_run_trial_of_a_user_is_given_what_search_was_given_alone(options):
    class Search(tuners.RandomSearch):
        def run_trial(self, trial, x):
            return trial.hyperparameters.Float("y", 0, x)

    del options["objective"]
    tuner = Search(max_trials=2, **options)
    tuner.search(5.0)
    assert len(tuner.oracle.trials) == 2


def test_a_trial_of_several_workers_is_not_isolated(options, monkeypatch):
    several = _workers.Workers(("worker 0", "worker 1"), 0)
    monkeypatch.setattr(_workers.Workers, "of", lambda strategy: several)
    with pytest.raises(errors.InvalidOptionError, match="over 2 workers"):
        tuners.RandomSearch(build, isolate=True, **options)


def test_a_worker_knows_that_run_trial_has_updated_the_trial(options, monkeypatch):
    class Search(tuners.RandomSearch):
        def run_trial(self, trial, *args, **kwargs):
            self.oracle.update_trial(trial.trial_id, {"val_loss": 1.0})

    several = _workers.Workers(("worker 0", "worker 1"), 1)
    monkeypatch.setattr(_workers.Workers, "of", lambda strategy: several)
    tuner = Search(max_trials=1, **options)
    message = {"trial_id": "0000", "status": "RUNNING", "epochs": None}
    trial = tuner.oracle.adopt(message | {"hyperparameters": {"space": [], "values": {}}})
    tuner._try_run_and_update_trial(trial)
    assert trial.status == "COMPLETED"


def test_a_search_of_several_workers_is_not_in_memory(options, monkeypatch):
    several = _workers.Workers(("worker 0", "worker 1"), 1)
    monkeypatch.setattr(_workers.Workers, "of", lambda strategy: several)
    with pytest.raises(errors.InvalidOptionError, match=r"`storage` .*over 2 workers"):
        tuners.RandomSearch(build, storage="memory", **options)


@pytest.fixture
def program(monkeypatch):
    """A program that can be run again, which the processes of pytest-xdist are not."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    monkeypatch.setattr(_isolation, "_in_memory", [])


@pytest.mark.timeout(60)
def test_a_search_within_a_trial_of_another_is_not_isolated(options, program):

    def search_again(hp):
        hp.Float("x", 0, 1)
        within = options | {"project_name": "within", "objective": None, "max_trials": 1}
        Scored(lambda hp: hp.Float("y", 0, 1), isolate=True, **within).search(verbose=0)

    tuner = Scored(search_again, **options | {"max_consecutive_failed_trials": 1})
    with pytest.raises(errors.SearchError, match=r"InvalidOptionError: `isolate` .*of another one"):
        tuner.search(verbose=0)
    # After a search, another one may begin.
    with _isolation.searching("p", is_isolated=True):
        pass


def test_a_search_in_memory_is_not_isolated(options):
    with pytest.raises(errors.InvalidOptionError, match=r"`isolate` .*storage='memory'"):
        tuners.RandomSearch(build, isolate=True, storage="memory", **options)


def test_a_search_after_one_in_memory_is_not_isolated(options, program):
    def search_in_memory(hp):
        within = options | {"project_name": "within", "max_trials": 1, "storage": "memory"}
        Scored(lambda hp: hp.Float("y", 0, 1), **within).search(verbose=0)
        return hp.Float("x", 0, 1)

    options |= {"objective": None, "max_trials": 1}
    Scored(search_in_memory, **options).search(verbose=0)
    # The process of a trial does not run it again.
    with _isolation.searching("p", is_isolated=True):
        pass
    search_in_memory(tuners.HyperParameters())
    with pytest.raises(errors.InvalidOptionError, match="within with storage='memory'"):
        Scored(search_in_memory, isolate=True, **options).search(verbose=0)


@pytest.mark.parametrize(("index", "removed"), [(0, 1), (1, 0)], ids=["chief", "other"])
def test_of_several_workers_the_chief_alone_begins_anew(index, removed, options, monkeypatch):
    several = _workers.Workers(("worker 0", "worker 1"), index)
    monkeypatch.setattr(_workers.Workers, "of", lambda strategy: several)
    calls = []
    monkeypatch.setattr(tuners.StudyOracle, "begin_anew", lambda oracle: calls.append(oracle))
    tuners.RandomSearch(build, overwrite=True, **options)
    assert len(calls) == removed


def test_what_is_missing_or_no_oracle_is_refused_at_once(options):
    for kind in (tuners.RandomSearch, tuners.Hyperband):
        with pytest.raises(errors.InvalidOptionError, match="`hypermodel` may be left out only"):
            kind(**options)
    with pytest.raises(errors.InvalidOptionError, match="Received: oracle='random'"):
        tuners.Tuner("random", build)


# --- What is searched without a HyperModel.fit -------------------------------


class Seen(keras.callbacks.Callback):
    """Notes what a model was trained with."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def __deepcopy__(self, memo):
        return self

    def on_train_begin(self, logs=None):
        self.notes.append(
            {
                "epochs": self.params["epochs"],
                "steps": self.params["steps"],
                "policy": self.model.layers[-1].dtype_policy.name,
            }
        )
        self.before = [np.array(w) for w in self.model.trainable_variables]

    def on_train_end(self, logs=None):
        after = [np.array(w) for w in self.model.trainable_variables]
        moved = sum(np.sum((a - b) ** 2) for a, b in zip(after, self.before, strict=True))
        self.notes[-1]["moved"] = float(np.sqrt(moved))


def test_arguments_of_fit_clipping_and_precision_are_searched_by_name(options):
    def searched(hp):
        hp.Choice("batch_size", [4, 8])
        hp.Int("epochs", 1, 1)
        hp.Choice("clipnorm", [1e-3, None], default=1e-3)
        hp.Choice("precision", ["float32", "mixed_float16"])
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    seen = Seen()
    tuner = tuners.GridSearch(searched, **options)
    tuner.search(X, Y, validation_data=(X, Y), verbose=0, callbacks=[seen])
    values = [t.hyperparameters.values for t in tuner.oracle.trials.values()]
    assert len(values) == len(seen.notes) == 8
    for value, note in zip(values, seen.notes, strict=True):
        assert note["epochs"] == value["epochs"] == 1
        assert note["steps"] == 16 // value["batch_size"]
        assert note["policy"] == value["precision"]
        if value["clipnorm"]:
            # Steps of at most the rate times the norm each.
            assert note["moved"] <= 1.01e-4 * note["steps"]
        else:
            assert note["moved"] > 0.1
    assert keras.config.dtype_policy().name == "float32"


def test_what_search_is_given_has_precedence(options):
    def searched(hp):
        hp.Choice("batch_size", [4])
        hp.Fixed("epochs", 3)
        return build(hp)

    seen = Seen()
    tuner = tuners.RandomSearch(searched, **options | {"max_trials": 1})
    tuner.search(**DATA, batch_size=16, epochs=2, callbacks=[seen])
    assert (seen.notes[0]["epochs"], seen.notes[0]["steps"]) == (2, 1)


def test_arguments_of_fit_may_be_given_by_position(options):
    def searched(hp):
        hp.Choice("batch_size", [4])
        return build(hp)

    seen = Seen()
    tuner = tuners.RandomSearch(searched, **options | {"max_trials": 1})
    validation = DATA["validation_data"]
    tuner.search(DATA["x"], DATA["y"], 16, 2, 0, [seen], validation_data=validation)
    assert (seen.notes[0]["epochs"], seen.notes[0]["steps"]) == (2, 1)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'epochs'"):
        tuner.search(DATA["x"], DATA["y"], 16, 2, epochs=2)


def test_plain_models_get_the_options_of_tfbig(options):
    kinds = []

    class Note(Seen):
        def on_train_begin(self, logs=None):
            kinds.append((type(self.model), self.model.gradient_accumulation_steps))

        def on_train_end(self, logs=None):
            pass

    tuner = tuners.RandomSearch(build, **options | {"max_trials": 1}, gradient_accumulation_steps=2)
    tuner.search(**DATA, epochs=1, batch_size=8, callbacks=[Note()])
    ((kind, steps),) = kinds
    assert steps == 2
    assert kind is not keras.Sequential


# --- What users override -----------------------------------------------------


def test_the_objective_may_be_what_fit_returns_and_no_epoch_reports(options):
    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return build(hp)

        def fit(self, hp, model, x, y, callbacks=None, **kwargs):
            batch_size = hp.Choice("batch_size", [8, 16])
            model.fit(x, y, batch_size=batch_size, callbacks=callbacks, **kwargs)
            return {"mine": float(batch_size), "other": 1.0}

    objective = keras_tuner.Objective("mine", "max")
    tuner = tuners.RandomSearch(Model(), **options | {"max_trials": 2, "objective": objective})
    tuner.search(X, Y, epochs=1, verbose=0)
    trials = tuner.oracle.trials.values()
    assert [t.score for t in trials] == [t.hyperparameters.get("batch_size") for t in trials]


def test_a_fit_that_returns_a_number_needs_no_objective(options):
    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return build(hp)

        def fit(self, hp, model, *args, **kwargs):
            batch_size = hp.Choice("batch_size", [8, 16])
            model.fit(*args, batch_size=batch_size, **kwargs)
            return float(batch_size)

    tuner = tuners.RandomSearch(Model(), **options | {"max_trials": 2, "objective": None})
    tuner.search(X, Y, epochs=1, verbose=0)
    scores = {t.score: t.hyperparameters.get("batch_size") for t in tuner.oracle.trials.values()}
    assert scores.items() <= {8.0: 8, 16.0: 16}.items()
    (model,) = tuner.get_best_models()
    assert model.predict(X, verbose=0).shape == (16, 1)


@pytest.mark.parametrize("result", [lambda x: x, lambda x: {"loss": x, "b": 1.0}, lambda x: [x, x]])
def test_run_trial_may_be_anything(options, result):
    tuner = Scored(
        lambda hp: result(hp.Float("x", 0.5, 1.0)),
        **options | {"max_trials": 3, "objective": "loss"},
    )
    tuner.search(verbose=0)
    trials = list(tuner.oracle.trials.values())
    assert [t.score for t in trials] == [t.hyperparameters.get("x") for t in trials]
    assert len({t.score for t in trials}) == 3


def test_run_trial_may_tell_the_oracle_itself(options):
    class Mine(tuners.RandomSearch):
        def run_trial(self, trial, *args, **kwargs):
            x = trial.hyperparameters.Float("x", 0, 1)
            self.oracle.update_trial(trial.trial_id, {"loss": x})

    tuner = Mine(**options | {"max_trials": 2, "objective": "loss"})
    tuner.search(verbose=0)
    assert [t.score for t in tuner.oracle.trials.values()] == [
        t.hyperparameters.get("x") for t in tuner.oracle.trials.values()
    ]


class RaisesOnce:
    """Raises an error when it is called for the second time, and at no other."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self):
        self.calls += 1
        if self.calls == 2:
            raise self.error


def raising_once_in(part, error):
    """Options of a search in which a part of the user's raises once."""
    once = RaisesOnce(error)

    class Sampler(optuna.samplers.RandomSampler):
        def sample_independent(self, *args):
            once()
            return super().sample_independent(*args)

    def constraints(metrics):
        once()
        return {"loss": metrics["loss"] - 1}

    return {"sampler": Sampler} if part == "sampler" else {"constraints": constraints}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("storage", [None, "memory"])
@pytest.mark.parametrize(
    ("part", "error"), [("sampler", KeyboardInterrupt), ("constraints", ZeroDivisionError)]
)
def test_a_search_goes_on_after_an_error_outside_of_its_trials(
    part, error, storage, is_new, options
):
    options |= {"objective": "loss", "storage": storage} | raising_once_in(part, error)
    ran = []

    class Search(tuners.OptunaSearch):
        def run_trial(self, trial, *args, **kwargs):
            ran.append(trial.trial_id)
            return trial.hyperparameters.Float("x", 0, 1)

    tuner = Search(max_trials=4, **options)
    with pytest.raises(error):
        tuner.search(verbose=0)
    before = ran.copy()
    if is_new:
        tuner = Search(max_trials=4, **options)
    tuner.search(verbose=0)
    trials = tuner.oracle.trials
    assert [t.status for t in trials.values()] == ["COMPLETED"] * 4
    assert len({t.score for t in trials.values()}) == 4
    if storage == "memory" and is_new:
        # Nothing is kept.
        assert ran == [*before, *trials]
    elif part == "constraints":
        # The trial whose result is not known runs again.
        assert ran == [*before, *list(trials)[len(before) - 1 :]]
    else:
        assert ran == list(trials)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("storage", [None, "memory"])
def test_a_search_goes_on_after_an_interruption_while_the_storage_failed(
    storage, options, monkeypatch
):
    once = RaisesOnce(KeyboardInterrupt)

    def result(hp):
        once()
        return hp.Float("x", 0, 1)

    options |= {"objective": "loss", "max_trials": 3}
    tuner = Scored(result, storage=storage, **options)
    with monkeypatch.context() as patched:
        patched.setattr(tuner.oracle._ledger, "release", fails)
        with pytest.raises(KeyboardInterrupt):
            tuner.search(verbose=0)
    tuner.search(verbose=0)
    assert [t.status for t in tuner.oracle.trials.values()] == ["COMPLETED"] * 3
    assert once.calls == 4


def fails(*args):
    raise errors.StorageUnavailableError("The database cannot be reached.")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("storage", [None, "memory"])
def test_a_result_that_could_not_be_recorded_at_once_is_recorded_later(
    storage, options, monkeypatch
):
    options |= {"objective": "loss", "max_trials": 3}
    calls = []
    tuner = Scored(lambda hp: calls.append(1) or hp.Float("x", 0, 1), storage=storage, **options)
    trials, once = tuner.oracle._search.trials, RaisesOnce(KeyboardInterrupt)
    record = trials._record
    monkeypatch.setattr(trials, "_record", lambda *args: once() or record(*args))
    with pytest.raises(KeyboardInterrupt):
        tuner.search(verbose=0)
    tuner.search(verbose=0)
    assert [t.status for t in tuner.oracle.trials.values()] == ["COMPLETED"] * 3
    assert len(calls) == 3


def test_a_score_is_the_mean_of_the_executions(options):
    results = iter([1.0, 3.0])

    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return build(hp)

        def fit(self, hp, model, *args, **kwargs):
            return {"val_loss": next(results)}

    tuner = tuners.RandomSearch(Model(), **options | {"max_trials": 1}, executions_per_trial=2)
    tuner.search(**DATA)
    assert tuner.oracle.get_best_trials()[0].score == 2.0


def test_each_execution_trains_a_new_model(options):
    seen = Seen()
    tuner = tuners.RandomSearch(build, **options | {"max_trials": 1}, executions_per_trial=2)
    tuner.search(**DATA, epochs=1, callbacks=[seen])
    assert len(seen.notes) == 2
    (trial,) = tuner.oracle.study.trials
    assert list(trial.intermediate_values) == [1]


# --- Trials that do not end well ---------------------------------------------


@pytest.mark.parametrize(
    "error",
    [MemoryError("no memory"), tf.errors.ResourceExhaustedError(None, None, "no memory")],
    ids=["MemoryError", "ResourceExhaustedError"],
)
def test_trials_that_run_out_of_memory_are_infeasible_and_the_search_goes_on(options, error):
    def sized(hp):
        if 1 <= hp.Int("number", 0, 6) <= 5:
            raise error
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    tuner = tuners.GridSearch(sized, **options, max_retries_per_trial=3)
    tuner.search(**DATA, epochs=1)
    statuses = [t.status for t in tuner.oracle.trials.values()]
    assert statuses == ["COMPLETED"] + ["INVALID"] * 5 + ["COMPLETED"]
    assert "no memory" in tuner.oracle.get_trial("0003").message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trials_that_diverge_are_infeasible_and_the_search_goes_on(options, value):
    def result(hp):
        number = hp.Int("number", 0, 6)
        return value if 1 <= number <= 5 else float(number)

    tuner = Scored(result, **options | {"max_trials": 7, "objective": "loss"})
    tuner.search(verbose=0)
    statuses = {t.hyperparameters.get("number"): t.status for t in tuner.oracle.trials.values()}
    assert statuses == {n: "INVALID" if 1 <= n <= 5 else "COMPLETED" for n in range(7)}
    assert [t.score for t in tuner.oracle.get_best_trials(9)] == [0.0, 6.0]


def test_a_model_that_diverges_is_infeasible(options):
    def diverging(hp):
        rate = hp.Choice("rate", [1e-2, 1e30])
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(rate), "mse")
        return model

    tuner = tuners.GridSearch(diverging, **options)
    tuner.search(X, Y, validation_data=(X, Y), verbose=0, epochs=1, batch_size=4)
    assert [t.status for t in tuner.oracle.trials.values()] == ["COMPLETED", "INVALID"]


def test_a_model_that_is_too_large_is_infeasible(options):
    def sized(hp):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(hp.Int("units", 1, 2))])
        model.compile("sgd", "mse")
        return model

    tuner = tuners.GridSearch(sized, **options, max_model_size=4)
    tuner.search(X, Y, validation_data=(X, Y), verbose=0, epochs=1)
    assert [t.status for t in tuner.oracle.trials.values()] == ["COMPLETED", "INVALID"]
    assert "max_model_size=4" in tuner.oracle.get_trial("0001").message


def test_a_search_without_a_complete_trial_raises_with_the_first_traceback(options):
    def failing(hp):
        raise MemoryError(f"number {hp.Int('number', 0, 1)}")

    tuner = Scored(failing, **options | {"max_trials": 2, "objective": "loss"})
    with pytest.raises(errors.SearchError, match=r"None of 2 trials(.|\n)*MemoryError: number 0"):
        tuner.search(verbose=0)


def test_programming_errors_in_a_row_end_the_search_with_a_traceback(options):
    def failing(hp):
        raise RuntimeError(f"number {hp.Int('number', 0, 9)}")

    tuner = Scored(failing, **options | {"max_trials": 9, "objective": "loss"})
    with pytest.raises(errors.SearchError, match=r"3 trials in a row(.|\n)*RuntimeError: number"):
        tuner.search(verbose=0)
    assert [t.status for t in tuner.oracle.trials.values()] == ["FAILED"] * 3


def test_an_objective_that_is_not_reported_ends_the_search_after_the_first_epoch(options):
    epochs = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    tuner = tuners.RandomSearch(build, **options | {"objective": "val_accuracy"})
    with pytest.raises(errors.SearchError, match=r"'val_accuracy'.*loss, val_loss"):
        tuner.search(**DATA, epochs=3, callbacks=[note])
    assert len(epochs) <= 1
    # The trial is not spent.
    assert [t.status for t in tuner.oracle.trials.values()] == ["RUNNING"]
    assert len(tuner.oracle._ledger.abandoned()) == 1


def not_compiled(hp):
    hp.Int("units", 1, 3)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        (lambda hp: hp.Int("units", 1, 3) and None, "must return a Keras model. Received: None"),
        (lambda hp: hp.Int("units", 1, 3), "Received: 1 of type int"),
        (not_compiled, "compiled model"),
    ],
    ids=["None", "a number", "not compiled"],
)
def test_a_builder_that_returns_no_compiled_model_ends_the_search(options, builder, words):
    tuner = tuners.RandomSearch(builder, **options)
    with pytest.raises(errors.SearchError, match=words):
        tuner.search(**DATA, epochs=1)


def test_a_model_may_be_compiled_by_the_tuner(options):
    tuner = tuners.RandomSearch(
        not_compiled, **options | {"max_trials": 1}, optimizer="sgd", loss="mse"
    )
    tuner.search(**DATA, epochs=1)
    assert math.isfinite(tuner.oracle.get_best_trials()[0].score)


# --- Begin, end, and the rest ------------------------------------------------


@pytest.mark.parametrize("name", ["KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP"])
def test_the_chief_and_workers_of_keras_tuner_are_refused(options, monkeypatch, name, tmp_path):
    monkeypatch.setenv(name, "chief")
    with pytest.raises(errors.SearchError, match=r"tfbig\.launch"):
        tuners.RandomSearch(build, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["executions_per_trial", "keep_best_k"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_counts_are_checked(options, option, value):
    with pytest.raises(errors.InvalidOptionError, match=f"`{option}`"):
        tuners.RandomSearch(build, **options, **{option: value})


def test_overwrite_begins_anew(options):
    def number(hp):
        return hp.Float("x", 0, 1)

    options |= {"objective": "loss", "max_trials": 2}
    first = Scored(number, **options)
    first.search(verbose=0)
    path = pathlib.Path(first.get_trial_dir("0000"), "checkpoint.weights.h5")
    path.write_text("old")
    # Other settings than those of the study that was.
    second = Scored(lambda hp: 2.0, **options | {"seed": 5, "max_trials": 1}, overwrite=True)
    assert not path.exists()
    assert len(second.oracle.trials) == 0
    second.search(verbose=0)
    assert [t.score for t in second.oracle.trials.values()] == [2.0]


HOLDER = """
import sys, time
from tests.tuners.tuner_ledger_test import oracle_in

oracle = oracle_in(sys.argv[1])
oracle.begin_search()
print(oracle.create_trial("a").trial_id, flush=True)
time.sleep(60)
"""


def test_overwrite_is_refused_while_another_process_searches(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        env=job.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline().strip() == "0000"
            trial = tmp_path / "p" / "trial_0000"
            trial.mkdir()
            (trial / "checkpoint.weights.h5").write_text("theirs")
            options = {"objective": "loss", "directory": tmp_path, "project_name": "p"}
            with pytest.raises(errors.StudyError, match="Nothing is removed"):
                Scored(lambda hp: 1.0, **options, overwrite=True)
        finally:
            process.kill()
    assert (trial / "checkpoint.weights.h5").read_text() == "theirs"
    study = optuna.load_study(study_name="p", storage=f"sqlite:///{tmp_path}/p/study.db")
    assert len(study.trials) == 1
    Scored(lambda hp: hp.Float("y", 0, 1), **options, overwrite=True, max_trials=1).search(
        verbose=0
    )
    assert not trial.exists()


def test_a_seed_seeds_the_trainings(options):
    def scores(name, **seed):
        tuner = tuners.RandomSearch(
            build,
            **options | {"max_trials": 2, "project_name": name, "executions_per_trial": 2} | seed,
        )
        tuner.search(**DATA, epochs=1)
        return [t.score for t in tuner.oracle.trials.values()]

    first = scores("a")
    keras.utils.set_random_seed(5)
    assert scores("b") == first
    assert scores("c", seed=1) != first


def test_budgets_end_a_search(options):
    tuner = tuners.RandomSearch(build, **options | {"max_trials": 9}, max_total_epochs=3)
    tuner.search(**DATA, epochs=2)
    # After 2 epochs a trial may begin, after 4 none.
    assert len(tuner.oracle.trials) == 2
    # The epochs of all executions count.
    names = options | {"max_trials": 9, "project_name": "executions"}
    tuner = tuners.RandomSearch(build, **names, executions_per_trial=3, max_total_epochs=6)
    tuner.search(**DATA, epochs=2)
    assert len(tuner.oracle.trials) == 1
    calls = []

    def slow(hp):
        calls.append(hp.Float("x", 0, 1))
        return calls[-1]

    options |= {"objective": "loss", "project_name": "seconds"}
    Scored(slow, **options, max_seconds=1e-9).search(verbose=0)
    assert calls == []


def test_several_objectives_have_a_front(options):
    objectives = [keras_tuner.Objective("a", "min"), keras_tuner.Objective("b", "max")]

    def result(hp):
        x = hp.Int("x", 0, 3)
        # 2 is worse than 1 in both.
        return [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5), (3.0, 3.0)][x]

    class Mine(tuners.OptunaSearch):
        def run_trial(self, trial, *args, **kwargs):
            a, b = result(trial.hyperparameters)
            self.oracle.update_trial(trial.trial_id, {"a": a, "b": b})

    tuner = Mine(**options | {"objective": objectives, "max_trials": 4})
    tuner.search(verbose=0)
    assert [t.score for t in tuner.get_pareto_trials()] == [(0.0, 0.0), (1.0, 1.0), (3.0, 3.0)]


def test_a_pruned_trial_ends_early_and_is_no_failure(options):
    class AtTheSecond(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.last_step == 2

    tuner = tuners.OptunaSearch(
        build, **options | {"max_trials": 2}, pruner=lambda seed: AtTheSecond()
    )
    tuner.search(**DATA, epochs=2)
    # There is nothing to save in the last epoch.
    assert [t.status for t in tuner.oracle.trials.values()] == ["COMPLETED"] * 2
    tuner = tuners.OptunaSearch(
        build,
        **options | {"max_trials": 1, "project_name": "longer"},
        pruner=lambda seed: AtTheSecond(),
    )
    with pytest.raises(errors.SearchError, match="all were pruned"):
        tuner.search(**DATA, epochs=4)
    (trial,) = tuner.oracle.study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert list(trial.intermediate_values) == [1, 2]


def test_a_grid_goes_on_with_what_a_builder_asks_for_since_it_was_changed(options):
    def changed(hp):
        hp.Choice("b", [0, 1])
        return old(hp)

    def old(hp):
        hp.Choice("a", [0, 1])
        hp.Fixed("rate", 0.01)
        return build(hp)

    for builder in (old, changed):
        tuner = tuners.GridSearch(builder, **options)
        tuner.search(**DATA, epochs=1)
    found = [t.hyperparameters.values for t in tuner.oracle.trials.values()]
    assert [(v["a"], v.get("b")) for v in found] == [(0, None), (1, None), (0, 1), (1, 1)]


def test_a_model_may_keep_its_weights_in_a_way_of_its_own(options):
    class Own(keras.Sequential):
        def save_weights(self, *args, **kwargs):
            del args, kwargs

    def build_own(hp):
        hp.Choice("a", [1, 2])
        model = Own([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    tuner = tuners.RandomSearch(build_own, **options | {"max_trials": 1})
    tuner.search(**DATA, epochs=1)
    assert len(tuner.oracle.get_best_trials()) == 1
    with pytest.raises(errors.SearchError, match="are not there"):
        tuner.get_best_models()


def test_a_search_works_without_tensorboard(options, monkeypatch, tmp_path):
    find = importlib.util.find_spec

    def find_spec(name, *args):
        return None if name.startswith("tensorboard") else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    tuner = tuners.RandomSearch(build, **options | {"max_trials": 1})
    tuner.search(**DATA, epochs=1)
    assert tuner.oracle.get_best_trials()[0].status == "COMPLETED"
    board = keras.callbacks.TensorBoard(str(tmp_path / "logs"), write_graph=False)
    tuner = tuners.RandomSearch(build, **options | {"max_trials": 1, "project_name": "board"})
    with pytest.raises(errors.SearchError, match="TensorBoard is not installed"):
        tuner.search(**DATA, epochs=1, callbacks=[board])


def test_tensorboard_shows_the_hyperparameters_of_each_trial(options, tmp_path):
    pytest.importorskip("tensorboard", reason="HParams needs tensorboard")
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    def many(hp):
        hp.Boolean("flag"), hp.Choice("kernel", [(3, 3), (5, 5)]), hp.Choice("none", [None, "a"])
        hp.Int("batch_size", 4, 8, step=4)
        return build(hp)

    def read(directory):
        found = event_accumulator.EventAccumulator(str(directory))
        found.Reload()
        return found

    board = keras.callbacks.TensorBoard(str(tmp_path / "logs"), write_graph=False)
    tuner = tuners.RandomSearch(many, **options | {"max_trials": 3})
    tuner.search(**DATA, epochs=2, callbacks=[board])
    assert len(list((tmp_path / "logs").iterdir())) == 3
    for trial_id, trial in tuner.oracle.trials.items():
        directory = tmp_path / "logs" / trial_id / "execution0"
        data = plugin_data_pb2.HParamsPluginData()
        metadata = read(directory).SummaryMetadata("_hparams_/session_start_info")
        data.ParseFromString(metadata.plugin_data.content)
        told = data.session_start_info
        shown = {n: getattr(v, v.WhichOneof("kind")) for n, v in told.hparams.items()}
        values = trial.hyperparameters.values
        texts = {n: str(values[n]) for n in ("kernel", "none")}
        assert shown == pytest.approx(values | texts)
        assert type(shown["flag"]) is bool
        assert told.group_name == trial_id
        losses = [
            tf.make_ndarray(e.tensor_proto)
            for e in read(directory / "validation").Tensors("epoch_loss")
        ]
        assert len(losses) == 2
        assert min(losses) == pytest.approx(trial.score)


def test_a_line_is_printed_for_each_trial(options, capsys):
    def result(hp):
        x = hp.Choice("x", [3, 1, 2])
        return math.nan if x == 1 else float(x)

    tuner = Scored(result, **options | {"objective": "loss", "max_trials": 3})
    tuner.search()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial")]
    assert len(lines) == 3
    assert lines[0].startswith("trial 0000 of 3: complete, loss 3 (best 3, trial 0000)")
    assert sum("infeasible" in line for line in lines) == 1
    capsys.readouterr()
    quiet = Scored(result, **options | {"objective": "loss", "project_name": "quiet"})
    quiet.search(verbose=0)
    assert capsys.readouterr().out == ""
