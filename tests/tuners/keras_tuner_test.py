"""Programs as KerasTuner's guides have them, with one import changed, and its public names."""

import copy
import importlib
import pkgutil
import threading

import keras
import keras_tuner
import numpy as np
import optuna
import pytest
import tensorflow as tf

from tfbig import errors
from tfbig import tuners as kt
from tfbig.tuners import _own_values

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 4)).astype("float32"), RNG.normal(size=(24, 1)).astype("float32")
IMAGES = RNG.uniform(size=(8, 8, 8, 1)).astype("float32")
LABELS = RNG.integers(0, 3, size=(8,))


@pytest.fixture
def project(tmp_path):
    """Where a search is, quietly."""
    return {"directory": str(tmp_path), "project_name": "guide", "overwrite": True}


def regressor(hp, metrics=()):
    units = hp.Int("units", 4, 16, step=4)
    model = keras.Sequential([keras.layers.Dense(units, "relu"), keras.layers.Dense(1)])
    # Tracing would take longer than these trainings.
    model.compile("adam", "mse", metrics=list(metrics), run_eagerly=True)
    return model


# --- Names -------------------------------------------------------------------


def public(module):
    """The public names of a module of KerasTuner."""
    return {n for n in vars(module) if not n.startswith("_") and n != "src"}


def test_every_public_name_of_keras_tuner_is_there():
    assert public(keras_tuner) <= set(kt.__all__)
    found = [m for m in pkgutil.walk_packages(keras_tuner.__path__) if m.name != "src"]
    names = [m.name for m in found]
    names += [f"engine.{m.name}" for m in pkgutil.walk_packages(keras_tuner.engine.__path__)]
    assert len(names) > 10
    for name in names:
        theirs = importlib.import_module(f"keras_tuner.{name}")
        ours = importlib.import_module(f"tfbig.tuners.{name}")
        assert public(theirs) <= set(ours.__all__), name


@pytest.mark.parametrize("name", ["", *(f".{n}" for n in ("applications", "engine", "errors"))])
def test_names_are_listed_once_and_nothing_private_leaks(name):
    module = importlib.import_module(f"tfbig.tuners{name}")
    assert isinstance(module.__all__, tuple)
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [n for n in module.__all__ if n.startswith("_")]
    assert {n for n in vars(module) if not n.startswith("_")} == set(module.__all__)


def test_tuners_and_oracles_are_of_the_classes_that_a_program_may_ask_for(project):
    assert kt.Oracle is kt.StudyOracle
    assert issubclass(kt.Oracle, keras_tuner.Oracle)
    assert issubclass(kt.HyperParameters, keras_tuner.HyperParameters)
    for tuner, oracle in (
        (kt.RandomSearch, kt.oracles.RandomSearchOracle),
        (kt.BayesianOptimization, kt.oracles.BayesianOptimizationOracle),
        (kt.GridSearch, kt.oracles.GridSearchOracle),
        (kt.Hyperband, kt.oracles.HyperbandOracle),
        (kt.ASHA, kt.oracles.ASHAOracle),
        (kt.PASHA, kt.oracles.PASHAOracle),
        (kt.PopulationBasedTraining, kt.oracles.PopulationOracle),
    ):
        made = tuner(regressor, "val_loss", **project)
        assert type(made.oracle) is oracle
        assert isinstance(made, kt.engine.base_tuner.BaseTuner)
        assert isinstance(made, keras_tuner.Tuner)


def test_hyperparameters_are_serialized_and_back():
    hp = kt.HyperParameters()
    hp.Choice("a", [None, 1, "b"])
    module = kt.engine.hyperparameters
    again = module.deserialize(module.serialize(hp))
    assert type(again) is kt.HyperParameters
    assert again.get_config() == hp.get_config()
    choice = module.deserialize(module.serialize(hp.space[0]))
    assert choice.values == [None, 1, "b"]


# --- The guides --------------------------------------------------------------


def test_a_hypermodel_tunes_its_training_and_its_data(project):
    class HyperModel(kt.HyperModel):
        def build(self, hp):
            size = hp.Int("size", 2, 4)
            inputs = keras.Input((size,))
            outputs = keras.layers.Dense(hp.Int("units", 4, 16, step=4), "relu")(inputs)
            model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
            model.compile("adam", "mse", metrics=["mae"])
            return model

        def fit(self, hp, model, x, y, validation_data=None, **kwargs):
            if hp.Boolean("normalize"):
                x = keras.layers.Normalization()(x)
            size = hp.get("size")
            if validation_data:
                validation_data = validation_data[0][:, :size], validation_data[1]
            shuffle = hp.Boolean("shuffle")
            x = x[:, :size]
            return model.fit(x, y, shuffle=shuffle, validation_data=validation_data, **kwargs)

    HyperModel().build(kt.HyperParameters())
    objective = kt.Objective("val_mae", direction="min")
    tuner = kt.RandomSearch(
        HyperModel(), objective, max_trials=2, executions_per_trial=2, seed=1, **project
    )
    tuner.search_space_summary()
    tuner.search(X, Y, epochs=1, validation_data=(X, Y), verbose=0)
    tuner.results_summary()
    best = tuner.get_best_hyperparameters(2)
    assert {"size", "units", "normalize", "shuffle"} == best[0].values.keys()
    assert len(tuner.get_best_models(num_models=2)) == 2
    hypermodel = HyperModel()
    hypermodel.fit(best[0], hypermodel.build(best[0]), X, Y, epochs=1, verbose=0)


def test_a_metric_of_ones_own_is_the_objective(project):
    class Squared(keras.metrics.Metric):
        def __init__(self, **kwargs):
            super().__init__(name="squared", **kwargs)
            self.total = self.add_weight(name="total", initializer="zeros")
            self.count = self.add_weight(name="count", initializer="zeros")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.total.assign_add(tf.reduce_sum(tf.math.squared_difference(y_pred, y_true)))
            self.count.assign_add(tf.cast(tf.shape(y_true)[0], tf.float32))

        def result(self):
            return self.total / self.count

    tuner = kt.RandomSearch(
        hypermodel=lambda hp: regressor(hp, [Squared()]),
        objective=kt.Objective("val_squared", direction="min"),
        max_trials=2,
        **project,
    )
    tuner.search(X, Y, validation_data=(X, Y), verbose=0)
    (trial,) = tuner.oracle.get_best_trials()
    assert trial.score == pytest.approx(trial.metrics.get_best_value("val_squared"))


@pytest.mark.parametrize("is_number", [True, False])
def test_fit_returns_a_number_or_a_dictionary(project, is_number):
    class HyperRegressor(kt.HyperModel):
        def build(self, hp):
            return regressor(hp)

        def fit(self, hp, model, x, y, validation_data, **kwargs):
            model.fit(x, y, **kwargs)
            error = np.mean(np.abs(model.predict(validation_data[0], verbose=0)))
            return error if is_number else {"minus": -error, "other": 2 * error}

    objective = None if is_number else kt.Objective("minus", "max")
    tuner = kt.RandomSearch(HyperRegressor(), objective, max_trials=2, **project)
    tuner.search(x=X, y=Y, validation_data=(X, Y), verbose=0)
    scores = [t.score for t in tuner.oracle.trials.values()]
    best = (min if is_number else max)(scores)
    assert tuner.oracle.get_best_trials()[0].score == best


@pytest.mark.parametrize("is_nested", [True, False])
def test_a_trial_returns_the_results_of_several_executions(project, is_nested):
    class Tuner(kt.RandomSearch):
        def run_trial(self, trial, **kwargs):
            a = trial.hyperparameters.Float("a", 0, 1)
            results = [{"a": a, "b": 1.0}, {"a": a + 1, "b": 2.0}]
            return [results, results] if is_nested else results

    objectives = [kt.Objective("a", "min"), kt.Objective("b", "max")]
    tuner = Tuner(objective=objectives, max_trials=2, **project)
    tuner.search(verbose=0)
    for trial in tuner.oracle.trials.values():
        assert trial.score == pytest.approx((trial.hyperparameters["a"] + 0.5, 1.5))


def test_a_trial_that_returns_no_results_is_an_error(project):
    class Tuner(kt.RandomSearch):
        def run_trial(self, trial, **kwargs):
            return []

    tuner = Tuner(max_trials=2, **project)
    with pytest.raises(errors.SearchError, match=r"return a result of a trial. Received: \[\]"):
        tuner.search(verbose=0)


def test_any_function_is_tuned(project):
    class Parabola(kt.BayesianOptimization):
        def run_trial(self, trial, *args, **kwargs):
            return trial.hyperparameters.Float("x", -1, 1) ** 2 + 1

    tuner = Parabola(max_trials=12, seed=0, **project)
    tuner.search(verbose=0)
    assert abs(tuner.get_best_hyperparameters()[0].get("x")) < 0.3


def test_code_that_saves_its_model_itself(project, tmp_path):
    def train(units, optimizer, path):
        model = keras.Sequential([keras.layers.Dense(units, "relu"), keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        model.fit(X, Y, verbose=0)
        model.save(path)
        return float(np.mean(np.abs(model.predict(X, verbose=0) - Y)))

    class Tuner(kt.RandomSearch):
        def run_trial(self, trial, **kwargs):
            hp = trial.hyperparameters
            return train(
                hp.Int("units", 4, 16, 4),
                hp.Choice("optimizer", ["adam", "adadelta"]),
                tmp_path / f"{trial.trial_id}.keras",
            )

    tuner = Tuner(max_trials=2, **project)
    tuner.search(verbose=0)
    train(**tuner.get_best_hyperparameters()[0].values, path=tmp_path / "best.keras")
    assert len(list(tmp_path.glob("*.keras"))) == 3


def test_a_training_loop_of_ones_own_calls_the_callbacks(project):
    class HyperModel(kt.HyperModel):
        def build(self, hp):
            inputs = keras.Input((4,))
            outputs = keras.layers.Dense(hp.Choice("units", [4, 8]), "relu")(inputs)
            return keras.Model(inputs, keras.layers.Dense(1)(outputs))

        def fit(self, hp, model, x, y, validation_data, callbacks=None, **kwargs):
            size = hp.Int("batch_size", 8, 24, step=8, default=16)
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
            optimizer = keras.optimizers.Adam(hp.Float("rate", 1e-4, 1e-2, sampling="log"))
            loss_of = keras.losses.MeanSquaredError()

            @tf.function
            def train(x, y):
                with tf.GradientTape() as tape:
                    loss = loss_of(y, model(x))
                gradients = tape.gradient(loss, model.trainable_variables)
                optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

            for number, callback in enumerate(callbacks):
                # Programs assign the model, or set it as Keras 3 does.
                if number % 2:
                    callback.set_model(model)
                else:
                    callback.model = model
            best = float("inf")
            for epoch in range(2):
                for batch in data:
                    train(*batch)
                loss = float(loss_of(validation_data[1], model(validation_data[0])))
                for callback in callbacks:
                    callback.on_epoch_end(epoch, logs={"my_metric": loss})
                best = min(best, loss)
            return best

    tuner = kt.RandomSearch(
        objective=kt.Objective("my_metric", "min"),
        max_trials=2,
        hypermodel=HyperModel(),
        **project,
    )
    tuner.search(x=X, y=Y, validation_data=(X, Y))
    assert {"units", "batch_size", "rate"} == tuner.get_best_hyperparameters()[0].values.keys()
    best = tuner.get_best_models()[0]
    score = tuner.oracle.get_best_trials()[0].score
    assert float(np.mean((best(X) - Y) ** 2)) == pytest.approx(score, rel=1e-5)  # float32


def test_failed_trials_are_retried_or_not(project):
    built = []

    def build(hp):
        units = hp.Int("a", 1, 3), hp.Int("b", 1, 2)
        built.append(units)
        if units[0] * units[1] > 4:
            raise ValueError("too large")
        if units[0] * units[1] == 4:
            raise kt.errors.FailedTrialError("too large, in any case")
        return regressor(hp)

    fixed = kt.HyperParameters()
    fixed.Fixed("units", 4)
    tuner = kt.GridSearch(
        build,
        "val_loss",
        hyperparameters=fixed,
        max_retries_per_trial=2,
        max_consecutive_failed_trials=8,
        **project,
    )
    built.clear()
    tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    tuner.results_summary()
    trials = tuner.oracle.trials.values()
    assert [t.status for t in trials].count("COMPLETED") == 4
    assert built.count((3, 2)) == 3
    assert built.count((2, 2)) == 1


def test_a_fatal_error_ends_the_search(project):
    def build(hp):
        if hp.Int("units", 1, 3) == 3:
            raise kt.errors.FatalValueError("too large")
        return regressor(hp)

    tuner = kt.GridSearch(build, "val_loss", max_consecutive_failed_trials=8, **project)
    with pytest.raises(kt.errors.FatalError, match="too large"):
        tuner.search(X, Y, validation_data=(X, Y), verbose=0)


def test_a_builder_that_returns_no_model_is_a_fatal_error(project):
    tuner = kt.RandomSearch(lambda hp: hp.Int("units", 1, 3), "val_loss", **project)
    with pytest.raises(kt.errors.FatalTypeError, match="must return a Keras model"):
        tuner.search(X, Y, validation_data=(X, Y))


@pytest.mark.parametrize("tunes_others", [True, False])
def test_the_space_is_tailored(project, tunes_others):
    def build(hp):
        model = regressor(hp)
        rate = hp.Choice("learning_rate", [1e-2, 1e-3])
        model.compile(keras.optimizers.Adam(rate), "mae", metrics=["mse"])
        return model

    hp = kt.HyperParameters()
    if tunes_others:
        hp.Fixed("learning_rate", 1e-4)
    else:
        hp.Float("learning_rate", 1e-4, 1e-2, sampling="log")
    tuner = kt.RandomSearch(
        build,
        hyperparameters=hp,
        tune_new_entries=tunes_others,
        optimizer=keras.optimizers.SGD(1e-3),
        loss="mse",
        metrics=["mae"],
        objective="val_mae",
        max_trials=2,
        **project,
    )
    tuner.search(X, Y, validation_data=(X, Y), verbose=0)
    tuner.search_space_summary()
    values = [t.hyperparameters.values for t in tuner.oracle.trials.values()]
    searched = {hp.name for hp in tuner.oracle.get_space().space}
    assert searched == ({"learning_rate", "units"} if tunes_others else {"learning_rate"})
    assert len({v["learning_rate"] for v in values}) == (1 if tunes_others else 2)
    best = tuner.get_best_models()[0]
    assert best.loss == "mse"
    assert type(best.optimizer) is keras.optimizers.SGD


@pytest.mark.parametrize("saves", [True, False])
def test_a_tuner_of_ones_own_over_an_oracle(project, saves):
    predictions = {}

    class Tuner(kt.Tuner):
        def run_trial(self, trial, data):
            hp = trial.hyperparameters
            model = self.hypermodel.build(hp)
            data = data.batch(hp.Int("batch_size", 8, 24, step=8, default=24))
            self.on_epoch_begin(trial, model, 0, logs={})
            self.on_batch_begin(trial, model, 0, logs={})
            loss = model.fit(data, shuffle=False, verbose=0).history["loss"][-1]
            self.on_batch_end(trial, model, 0, logs={"loss": loss})
            self.on_epoch_end(trial, model, 0, logs={"loss": loss})
            self.oracle.update_trial(trial.trial_id, {"loss": loss})
            if saves:
                predictions[trial.trial_id] = model.predict(X, verbose=0)
                self.save_model(trial.trial_id, model)

    tuner = Tuner(
        oracle=kt.oracles.BayesianOptimization(kt.Objective("loss", "min"), max_trials=2),
        hypermodel=regressor,
        **project,
    )
    tuner.search(data=tf.data.Dataset.from_tensor_slices((X, Y)))
    assert {"units", "batch_size"} == tuner.get_best_hyperparameters()[0].values.keys()
    if not saves:
        with pytest.raises(errors.SearchError, match="call `save_model` in a `run_trial`"):
            tuner.get_best_models()
        return
    (best,), (trial,) = tuner.get_best_models(), tuner.oracle.get_best_trials()
    np.testing.assert_array_equal(best.predict(X, verbose=0), predictions[trial.trial_id])


def test_a_model_is_loaded_whose_own_optimizer_was_not_used(project):
    """Without a warning, which would be an error."""
    predictions = {}

    class Tuner(kt.RandomSearch):
        def run_trial(self, trial, x, y):
            model = self.hypermodel.build(trial.hyperparameters)
            optimizer = keras.optimizers.SGD(0.1)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            predictions[trial.trial_id] = model.predict(x, verbose=0)
            self.save_model(trial.trial_id, model)
            return float(loss)

    tuner = Tuner(hypermodel=regressor, max_trials=2, **project)
    tuner.search(X, Y)
    (best,), (trial,) = tuner.get_best_models(), tuner.oracle.get_best_trials()
    np.testing.assert_array_equal(best.predict(X, verbose=0), predictions[trial.trial_id])


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_each_trial_is_trained_on_replicas(project, mirrored):
    replicas = []

    def build(hp):
        replicas.append(tf.distribute.get_strategy().num_replicas_in_sync)
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(hp.Int("units", 4, 16, step=4), "relu")(inputs)
        hidden = keras.layers.BatchNormalization()(hidden)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        model.compile(hp.Choice("optimizer", ["adam", "sgd"]), "mse", metrics=["mae"])
        return model

    tuner = kt.Hyperband(
        build, kt.Objective("val_mae", "min"), 2, 3, 1, distribution_strategy=mirrored, **project
    )
    replicas.clear()
    tuner.search(
        *(X, Y),
        # More than there are.
        steps_per_epoch=6,
        batch_size=8,
        validation_data=(X, Y),
        validation_steps=6,
        callbacks=[keras.callbacks.EarlyStopping("val_mae")],
        verbose=0,
    )
    assert set(replicas) == {2}
    (best,), (trial,) = tuner.get_best_models(), tuner.oracle.get_best_trials()
    assert best.evaluate(X, Y, verbose=0, return_dict=True)["mae"] == pytest.approx(
        trial.score,
        rel=1e-5,  # float32
    )


def test_a_space_with_branches_is_built_with_values_of_the_users_own(project):
    def build(hp):
        inputs = hidden = keras.Input((4,))
        if hp.Choice("kind", ["deep", "wide"]) == "deep":
            for i in range(hp.Int("layers", 1, 3)):
                hidden = keras.layers.Dense(hp.Int(f"units_{i}", 2, 8, step=2), "relu")(hidden)
        else:
            hidden = keras.layers.Dense(hp.Int("width", 16, 64, step=16))(hidden)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        model.compile("sgd", "mse", run_eagerly=True)
        return model

    hp = kt.HyperParameters()
    sizes = {}
    for kind in ("wide", "deep"):
        hp.values["kind"] = kind
        sizes[kind] = build(hp).count_params()
    assert sizes == {"wide": 4 * 16 + 16 + 17, "deep": 4 * 2 + 2 + 3}
    tuner = kt.RandomSearch(build, "val_loss", max_trials=5, seed=0, **project)
    tuner.search(X, Y, validation_split=0.25, verbose=0)
    values = [t.hyperparameters.values for t in tuner.oracle.trials.values()]
    assert {v["kind"] for v in values} == {"wide", "deep"}
    for v in values:
        names = {"width"} if v["kind"] == "wide" else {"layers"}
        if v["kind"] == "deep":
            names |= {f"units_{i}" for i in range(v["layers"])}
        assert names <= v.keys()


def test_a_base_tuner_tunes_models_of_any_kind(project):
    class Tuner(kt.engine.base_tuner.BaseTuner):
        def run_trial(self, trial, x):
            model = self.hypermodel.build(trial.hyperparameters)
            self.save_model(trial.trial_id, model)
            return {"score": model["factor"] * x}

        def save_model(self, trial_id, model, step=0):
            path = f"{self.get_trial_dir(trial_id)}/model.txt"
            with open(path, "w") as file:
                file.write(repr(model["factor"]))

        def load_model(self, trial):
            with open(f"{self.get_trial_dir(trial.trial_id)}/model.txt") as file:
                return {"factor": float(file.read())}

    def tuner(**arguments):
        oracle = kt.oracles.RandomSearchOracle(kt.Objective("score", "max"), max_trials=3, seed=0)
        return Tuner(oracle, lambda hp: {"factor": hp.Float("factor", 0, 1)}, **arguments)

    first = tuner(**project)
    first.search(2.0)
    again = tuner(**project | {"overwrite": False})
    again.search(2.0)
    assert len(again.oracle.trials) == 3
    scores = [t.score for t in again.oracle.trials.values()]
    assert again.get_best_models(2)[0]["factor"] * 2 == max(scores)
    assert again.remaining_trials == 0


@pytest.mark.parametrize(
    "name", [pytest.param("HyperXception", marks=pytest.mark.slow), "HyperImageAugment"]
)
def test_applications_are_searched(project, name):
    if name == "HyperImageAugment":
        augment = kt.applications.HyperImageAugment(input_shape=(8, 8, 1), rotate=[0.2, 0.5])

        def hypermodel(hp):
            layers = [augment.build(hp), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")]
            model = keras.Sequential(layers)
            model.compile("sgd", "mse")
            return model

        hp = kt.HyperParameters()
        hp.Int("augment_layers", 1, 2, default=2)
    else:
        hypermodel = kt.applications.HyperXception(input_shape=(8, 8, 1), classes=3)
        hp = kt.HyperParameters()
        hp.Choice("learning_rate", [1e-3, 1e-4])
        hp.Fixed("num_residual_blocks", 1)
        hp.Fixed("sep_num_filters", 8)
    tuner = kt.RandomSearch(
        hypermodel,
        hyperparameters=hp,
        tune_new_entries=False,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        objective="val_accuracy",
        max_trials=1,
        **project,
    )
    tuner.search(IMAGES, LABELS, epochs=1, validation_data=(IMAGES, LABELS), verbose=0)
    best = tuner.get_best_models()[0]
    assert best.predict(IMAGES, verbose=0).shape == (8, 3)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2", "next"])
def test_resnets_are_searched(project, version):
    hp = kt.HyperParameters()
    for name, value in {"version": version, "conv3_depth": 2, "conv4_depth": 2}.items():
        hp.Fixed(name, value)
    images = RNG.uniform(size=(4, 32, 32, 1))
    tuner = kt.RandomSearch(
        kt.applications.HyperResNet(input_shape=(32, 32, 1), classes=3),
        "val_accuracy",
        max_trials=1,
        hyperparameters=hp,
        **project,
    )
    data = images, np.eye(3)[LABELS[:4]]
    tuner.search(*data, epochs=1, validation_data=data, verbose=0)
    assert tuner.get_best_models()[0].predict(images, verbose=0).shape == (4, 3)


def test_augmented_images_differ_from_each_other_and_survive_saving(tmp_path):
    hp = kt.HyperParameters()
    augment = kt.applications.HyperImageAugment(input_shape=(8, 8, 1), rotate=[0.3, 0.5])
    model = augment.build(hp)
    images = np.repeat(IMAGES[:1], 8, axis=0)
    np.testing.assert_array_equal(model.predict(images, verbose=0), images)
    augmented = np.asarray(model(images, training=True))
    assert len(np.unique(augmented.reshape(8, -1), axis=0)) > 2
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    (layer,) = [layer for layer in again.layers if hasattr(layer, "factors")]
    assert layer.factors == model.layers[-1].factors


# --- Oracles -----------------------------------------------------------------


class Listed(kt.Oracle):
    """Tries what a list says."""

    listed = ()

    def populate_space(self, trial_id):
        done = len(self.end_order)
        if len(self.trials) > done:
            return {"status": "IDLE"}
        if done == len(self.listed):
            return {"status": "STOPPED", "values": None}
        return {"status": "RUNNING", "values": {"a": self.listed[done]}}


def oracle_in(directory, kind=Listed, project="p", **arguments):
    oracle = kind(**{"objective": kt.Objective("loss", "min"), "max_trials": 9} | arguments)
    oracle._set_project_dir(str(directory), project)
    oracle.verbose = 0
    return oracle


def end(oracle, trial, loss):
    oracle.update_trial(trial.trial_id, {"loss": loss})
    trial.status = "COMPLETED"
    oracle.end_trial(trial)


def test_an_oracle_of_ones_own_waits_repeats_itself_and_stops(tmp_path):
    oracle = oracle_in(tmp_path)
    oracle.listed = [True, True, False]
    oracle.hyperparameters.Boolean("a")
    first = oracle.create_trial("1")
    assert oracle.create_trial("2").status == "IDLE"
    assert list(oracle.trials) == [first.trial_id]
    end(oracle, first, 1.0)
    for loss in (2.0, 0.0):
        trial = oracle.create_trial("2")
        assert trial.status == "RUNNING"
        end(oracle, trial, loss)
    assert oracle.create_trial("1").status == "STOPPED"
    tried = [t.hyperparameters.values["a"] for t in oracle.trials.values()]
    assert tried == [True, True, False]
    assert [t.score for t in oracle.get_best_trials(2)] == [0.0, 1.0]
    oracle.release()


def test_an_oracle_of_ones_own_is_asked_until_it_says_stop(project, capsys):
    class Tuner(kt.engine.base_tuner.BaseTuner):
        def run_trial(self, trial):
            return {"loss": trial.hyperparameters.Choice("a", [1, 2, 3])}

    oracle = Listed(kt.Objective("loss", "min"))
    oracle.listed = [3, 3, 2]
    oracle.verbose = 0
    tuner = Tuner(oracle, **project)
    tuner.search()
    assert not capsys.readouterr().out
    assert [t.score for t in tuner.oracle.trials.values()] == [3, 3, 2]


def test_a_grid_oracle_may_choose_its_own_values(tmp_path):
    class Backwards(kt.oracles.GridSearchOracle):
        def populate_space(self, trial_id):
            left = 3 - int(trial_id)
            status = "RUNNING" if left else "STOPPED"
            return {"status": status, "values": {"a": left}}

    oracle = oracle_in(tmp_path, Backwards, max_trials=None)
    oracle.hyperparameters.Int("a", 1, 3)
    while (trial := oracle.create_trial("1")).status == "RUNNING":
        end(oracle, trial, 0.0)
    assert [t.hyperparameters.values for t in oracle.trials.values()] == [
        {"a": a} for a in (3, 2, 1)
    ]
    oracle.release()


def test_an_overridden_score_decides_which_trial_is_best(project):
    class Negated(kt.oracles.RandomSearchOracle):
        def score_trial(self, trial):
            trial.score = -trial.metrics.get_best_value("loss")
            trial.best_step = 0

    class Tuner(kt.engine.base_tuner.BaseTuner):
        def run_trial(self, trial):
            return {"loss": trial.hyperparameters.Float("x", 0, 1)}

    tuner = Tuner(Negated(kt.Objective("loss", "min"), max_trials=4), **project)
    tuner.search()
    tried = [t.hyperparameters.values["x"] for t in tuner.oracle.trials.values()]
    assert tuner.get_best_hyperparameters()[0]["x"] == max(tried)


def test_spaces_and_trials_of_an_oracle(tmp_path):
    oracle = oracle_in(tmp_path, kt.oracles.RandomSearchOracle)
    hp = oracle.get_space()
    hp.Int("a", 1, 9)
    assert not oracle.get_space().space
    oracle.update_space(hp)
    assert [h.name for h in oracle.get_space().space] == ["a"]
    trial = oracle.create_trial("1")
    assert oracle.create_trial("1") is trial
    assert oracle.ongoing_trials == {"1": trial}
    assert oracle.get_trial(trial.trial_id) is trial
    end(oracle, trial, 1.0)
    assert oracle.start_order == oracle.end_order == [trial.trial_id]
    assert oracle.trials[trial.trial_id].status == "COMPLETED"
    oracle.release()


def test_synchronized_methods_wait_for_each_other_also_after_an_error():
    inside, most = [], []

    class Counted:
        @kt.synchronized
        def outer(self, fails):
            inside.append(1)
            most.append(len(inside))
            try:
                return self.inner(fails)
            finally:
                inside.pop()

        @kt.synchronized
        def inner(self, fails):
            if fails:
                raise ValueError("as asked")
            return 1

    counted = Counted()
    with pytest.raises(ValueError, match="as asked"):
        counted.outer(True)
    threads = [threading.Thread(target=counted.outer, args=(False,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1] * 9
    assert Counted.outer.__name__ == "outer"


@pytest.mark.parametrize("kind", ["GridSearchOracle", "RandomSearchOracle", "HyperbandOracle"])
def test_a_trial_that_is_enqueued_in_the_study_runs(tmp_path, kind):
    kind = getattr(kt.oracles, kind)
    arguments = {"max_epochs": 1} if kind is kt.oracles.HyperbandOracle else {"max_trials": 3}
    oracle = kind(kt.Objective("loss", "min"), seed=0, **arguments)
    oracle._set_project_dir(str(tmp_path), "p")
    oracle.verbose = 0
    hp = oracle.hyperparameters
    hp.Choice("a", ["x", "y", "z"])
    with hp.conditional_scope("a", ["z"]):
        hp.Int("b", 1, 5)
    oracle.study.enqueue_trial({"a": "z", "b": 4})
    first = oracle.create_trial("1")
    assert first.hyperparameters.values == {"a": "z", "b": 4}
    end(oracle, first, 1.0)
    while (trial := oracle.create_trial("1")).status == "RUNNING":
        end(oracle, trial, 2.0)
    tried = [t.hyperparameters.values for t in oracle.trials.values()]
    assert tried.count({"a": "z", "b": 4}) == 1
    if kind is not kt.oracles.HyperbandOracle:
        assert len(tried) == 3
    finished = oracle.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert finished[0].values == [1.0]
    assert not oracle.study.get_trials(states=(optuna.trial.TrialState.WAITING,))
    oracle.release()


def test_the_sampler_chooses_what_an_enqueued_trial_leaves_open(tmp_path):
    oracle = oracle_in(tmp_path, kt.oracles.BayesianOptimizationOracle, seed=0)
    oracle.hyperparameters.Float("a", 0, 1)
    oracle.hyperparameters.Float("stepped", 0, 1, step=0.25)
    # The second is named as Optuna knows it.
    oracle.study.enqueue_trial({"a": 0.5})
    oracle.study.enqueue_trial({"stepped (step)": 3})
    first, second = (oracle.create_trial(name).hyperparameters.values for name in "12")
    assert first["a"] == 0.5
    assert first["stepped"] in (0, 0.25, 0.5, 0.75, 1)
    assert second["stepped"] == 0.75
    assert 0 < second["a"] < 1
    oracle.release()


# --- Trials that a program adds ---


class Known(kt.RandomSearch):
    def run_trial(self, trial, **kwargs):
        return trial.hyperparameters.Choice("a", [1, 2, 3, 4])


def complete(score, status="COMPLETED", **values):
    hp = kt.HyperParameters()
    hp.Choice("a", [1, 2, 3, 4])
    hp.values = values
    trial = kt.engine.trial.Trial(hp, status=status)
    trial.score = score
    return trial


@pytest.mark.parametrize("storage", [None, "memory"])
def test_a_trial_that_is_put_into_trials_is_one_of_the_search(tmp_path, storage):
    added = {4: -1.0, 3: 7.0}
    for is_again in (False, True):
        options = {"max_trials": 4, "seed": 0, "directory": tmp_path, "storage": storage}
        tuner = Known(objective=kt.Objective("loss", "min"), **options)
        oracle = tuner.oracle
        for number, (a, score) in enumerate(added.items(), 1):
            trial = complete(score, a=a)
            oracle.trials[trial.trial_id] = trial
            assert oracle.trials[trial.trial_id].score == score
            assert len(oracle.trials) == (4 if is_again and storage is None else number)
        tuner.search(verbose=0)
        scores = {t.hyperparameters["a"]: t.score for t in oracle.trials.values()}
        # Its score, not what `run_trial` would have said; and nothing is tried twice.
        assert scores == {1: 1, 2: 2} | added
        assert list(oracle.trials) == oracle.start_order == ["0000", "0001", "0002", "0003"]
        assert [t.trial_id for t in oracle.get_best_trials(2)] == ["0000", "0002"]
        assert tuner.get_best_hyperparameters()[0].values == {"a": 4}
        assert oracle.remaining_trials() == 0


@pytest.mark.parametrize("last", ["store", "end"])
def test_a_trial_whose_process_was_killed_as_it_added_it_is_added(tmp_path, monkeypatch, last):
    def made():
        objective = kt.Objective("loss", "min")
        return Known(objective=objective, max_trials=4, seed=0, directory=tmp_path)

    killed = made().oracle
    with monkeypatch.context() as m:
        m.setattr(killed._search.trials, last, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.trials["x"] = complete(-1.0, a=4)
    # As if the process had not even said that it stops.
    killed._ledger.release(0)
    tuner = made()
    for _ in range(2):
        tuner.oracle.trials["x"] = complete(-1.0, a=4)
        assert [t.score for t in tuner.oracle.trials.values()] == [-1.0]
    tuner.search(verbose=0)
    scores = {t.hyperparameters["a"]: t.score for t in tuner.oracle.trials.values()}
    assert scores == {1: 1, 2: 2, 3: 3, 4: -1}


def test_samplers_learn_from_a_trial_that_was_added(tmp_path):
    oracle = oracle_in(tmp_path, kt.oracles.BayesianOptimizationOracle, max_trials=None, seed=0)
    oracle.hyperparameters.Float("x", 0, 1)
    for i in range(30):
        trial = kt.engine.trial.Trial(oracle.get_space(), status="COMPLETED")
        trial.hyperparameters.values["x"] = x = i / 30
        trial.score = (x - 0.8) ** 2
        oracle.trials[trial.trial_id] = trial
    assert [t.params["x"] for t in oracle.study.trials] == [i / 30 for i in range(30)]
    tried = [oracle.create_trial(str(i)).hyperparameters["x"] for i in range(5)]
    assert np.mean(np.abs(np.array(tried) - 0.8)) < 0.15
    oracle.release()


def test_trials_may_be_assigned_as_a_whole_but_not_removed(tmp_path):
    oracle = Known(objective=kt.Objective("loss", "min"), max_trials=3, directory=tmp_path).oracle
    first, second = complete(2.0, a=1), complete(1.0, a=2)
    oracle.trials = {t.trial_id: t for t in (first, second)}
    assert [t.score for t in oracle.trials.values()] == [2.0, 1.0]
    third = complete(3.0, a=3)
    oracle.trials = {**oracle.trials, third.trial_id: third}
    assert list(oracle.trials) == ["0000", "0001", "0002"]
    for attempt in (
        lambda: setattr(oracle, "trials", {}),
        lambda: oracle.trials.pop("0000"),
        oracle.trials.clear,
    ):
        with pytest.raises(errors.InvalidOptionError, match="keeps all its trials"):
            attempt()
    with pytest.raises(errors.InvalidOptionError, match="as many trials"):
        oracle.trials["x"] = complete(0.0, a=4)
    assert len(oracle.trials) == 3
    trials, more = oracle.trials, {"x": complete(0.0, a=4)}
    copies = [trials.copy(), copy.copy(trials), copy.deepcopy(trials), trials | more, more | trials]
    for found in copies:
        # In a copy, all may be changed.
        assert type(found) is dict
        found.update(more)
        assert [found[name].score for name in ("0000", "0001", "0002", "x")] == [2, 1, 3, 0]
    assert len(oracle.trials) == 3
    with pytest.raises(errors.InvalidOptionError, match="must not be assigned"):
        oracle.end_order = ["0000"]


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (complete(1.0, "RUNNING", a=1), "status='RUNNING'"),
        (complete(None, a=1), "score=None"),
        (complete(float("nan"), a=1), "score=nan"),
        (complete((1.0, 2.0), a=1), r"score=\(1.0, 2.0\)"),
    ],
)
def test_trials_without_a_result_are_not_added(tmp_path, trial, words):
    oracle = Known(objective=kt.Objective("loss", "min"), max_trials=3, directory=tmp_path).oracle
    with pytest.raises(errors.InvalidOptionError, match=words):
        oracle.trials["x"] = trial
    assert not oracle.trials


def test_trials_are_not_added_to_rungs_or_before_there_is_a_search(tmp_path):
    tuner = kt.Hyperband(regressor, "val_loss", max_epochs=3, directory=tmp_path)
    with pytest.raises(errors.InvalidOptionError, match="pauses trials"):
        tuner.oracle.trials["x"] = complete(1.0, a=1)
    with pytest.raises(errors.InvalidOptionError, match="once the oracle has a tuner"):
        kt.oracles.RandomSearchOracle("loss").trials["x"] = complete(1.0, a=1)


class Loop(kt.RandomSearch):
    """A loop of the user's own, whose values are known."""

    steps = ()

    def run_trial(self, trial, **kwargs):
        x = trial.hyperparameters.Int("x", 1, 1000)
        first = trial.trial_id == "0000"
        for step in range(1, 7):
            self.steps.append((trial.trial_id, step))
            self.report(trial, step, {"loss": 0.0 if first else x})
            if self.should_prune(trial):
                raise kt.errors.TrialPruned
        return {"loss": x}


def loop(directory, **kwargs):
    tuner = Loop(
        objective=kt.Objective("loss", "min"),
        directory=directory,
        project_name="p",
        seed=0,
        **{"max_trials": 4} | kwargs,
    )
    tuner.steps = []
    return tuner


def test_a_loop_of_ones_own_is_pruned(tmp_path):
    options = {"n_startup_trials": 1, "n_warmup_steps": 2}
    tuner = loop(tmp_path, pruner="median", pruner_options=options)
    tuner.search(verbose=0)
    trials = list(tuner.oracle.trials.values())
    assert [t.status for t in trials] == ["COMPLETED"] + ["STOPPED"] * 3
    # Step 1 is below `n_warmup_steps`.
    assert [t for t, _ in tuner.steps] == ["0000"] * 6 + ["0001"] * 2 + ["0002"] * 2 + ["0003"] * 2
    first = tuner.oracle.study.trials[0]
    assert first.intermediate_values == dict.fromkeys(range(1, 7), 0.0)


def test_steps_of_a_loop_of_ones_own_count_as_epochs(tmp_path):
    """However they are numbered."""

    class Sparse(kt.RandomSearch):
        def run_trial(self, trial, **kwargs):
            x = trial.hyperparameters.Float("x", 0, 1)
            for step in range(10, 70, 10):
                self.report(trial, step, x)
            return x

    tuner = Sparse(max_trials=9, max_total_epochs=12, directory=tmp_path)
    tuner.search(verbose=0)
    assert len(tuner.oracle.trials) == 2


def test_what_a_loop_reports_must_have_the_objective(tmp_path):
    class Wrong(Loop):
        def run_trial(self, trial, **kwargs):
            self.report(trial, 1, {"accuracy": 1.0})

    tuner = Wrong(objective="loss", max_trials=2, directory=tmp_path)
    with pytest.raises(errors.SearchError, match=r"`logs` must have the objective 'loss'"):
        tuner.search(verbose=0)


@pytest.mark.parametrize("step", [0, 1.5, "1", True])
def test_a_loop_reports_steps_that_are_numbers_from_one(tmp_path, step):
    class Wrong(Loop):
        def run_trial(self, trial, **kwargs):
            self.report(trial, step, 1.0)

    tuner = Wrong(objective=kt.Objective("loss", "min"), max_trials=2, directory=tmp_path)
    with pytest.raises(errors.SearchError, match=f"integer >= 1. Received: step={step!r}"):
        tuner.search(verbose=0)


def test_a_loop_may_report_steps_of_numpy(tmp_path):
    class Loop(kt.OptunaSearch):
        def run_trial(self, trial, **kwargs):
            x = trial.hyperparameters.Float("x", 0, 1)
            for step in np.arange(1, 4):
                self.report(trial, step, x + step)
                assert not self.should_prune(trial)
            return x

    tuner = Loop(objective="loss", max_trials=2, pruner="median", directory=tmp_path)
    tuner.search(verbose=0)
    assert all(t.intermediate_values.keys() == {1, 2, 3} for t in tuner.oracle.study.trials)


class Enqueued(kt.Tuner):
    def run_trial(self, trial, **kwargs):
        return trial.hyperparameters.get("a")


def enqueuing(directory, hp, kind="RandomSearchOracle", max_trials=4):
    oracle = getattr(kt.oracles, kind)(
        kt.Objective("default_objective", "min"), max_trials, hyperparameters=hp, seed=0
    )
    return Enqueued(oracle, directory=directory, project_name="p")


@pytest.mark.parametrize("kind", ["GridSearchOracle", "RandomSearchOracle"])
def test_values_that_are_enqueued_are_tried_once_and_first(tmp_path, kind):
    hp = kt.HyperParameters()
    hp.Choice("a", [1, 2, 3])
    hp.Choice("b", [None, (1, 2), "x"])
    for _ in range(2):
        tuner = enqueuing(tmp_path, hp, kind)
        assert tuner.enqueue({"a": 3, "b": (1, 2)}) == (not tuner.oracle.trials)
        assert tuner.enqueue({"b": "x"}) == (not tuner.oracle.trials)
        tuner.search(verbose=0)
        values = [t.hyperparameters.values for t in tuner.oracle.trials.values()]
        assert values[0] == {"a": 3, "b": (1, 2)}
        assert values[1]["b"] == "x"
        assert len(values) == len({str(v) for v in values}) == 4


@pytest.mark.parametrize("kind", ["GridSearchOracle", "RandomSearchOracle"])
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_what_an_enqueued_trial_leaves_out_makes_a_new_combination(tmp_path, kind, is_known, seed):
    hp = kt.HyperParameters() if is_known else None

    class Defining(kt.Tuner):
        def run_trial(self, trial, **kwargs):
            hp = trial.hyperparameters
            return hp.Choice("a", [1, 2, 3]) + hp.Choice("b", [1, 2])

    if is_known:
        hp.Choice("a", [1, 2, 3])
        hp.Choice("b", [1, 2])
    oracle = getattr(kt.oracles, kind)(
        kt.Objective("default_objective", "min"), 6, hyperparameters=hp, seed=seed
    )
    tuner = Defining(oracle, directory=tmp_path)
    enqueued = [{"a": 2}, {"b": 2}, {"a": 1, "b": 1}, {"a": 3, "b": 2}, {"a": 3}]
    for values in enqueued:
        tuner.enqueue(values)
    tuner.search(verbose=0)
    tried = [t.hyperparameters.values for t in tuner.oracle.trials.values()]
    assert len({tuple(sorted(v.items())) for v in tried}) == 6
    assert all(v.items() >= e.items() for v, e in zip(tried, enqueued, strict=False))


def test_a_grid_search_completes_enqueued_values_from_its_grid(tmp_path):
    hp = kt.HyperParameters()
    hp.Choice("a", [1, 2])
    hp.Float("x", 0, 1)
    tuner = enqueuing(tmp_path, hp, "GridSearchOracle", max_trials=None)
    tuner.enqueue({"a": 2})
    tuner.search(verbose=0)
    grid = {0.0, *(hp.space[1].values)}
    tried = [tuple(t.hyperparameters.values.values()) for t in tuner.oracle.trials.values()]
    assert tried[0][0] == 2
    assert len(tried) == len(set(tried)) == 22
    assert {x for _, x in tried} == grid


def test_values_of_numpy_are_enqueued_as_those_of_python(tmp_path):
    hp = kt.HyperParameters()
    hp.Int("a", 1, 9)
    hp.Float("f", 0, 1)
    hp.Boolean("b")
    hp.Choice("c", ["x", "y"])
    given = {"a": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True), "c": np.str_("y")}
    tuner = enqueuing(tmp_path, hp, max_trials=1)
    assert tuner.enqueue(given)
    assert not tuner.enqueue({name: value.item() for name, value in given.items()})
    tuner.search(verbose=0)
    values = tuner.oracle.trials["0000"].hyperparameters.values
    assert values == {"a": 3, "f": 0.5, "b": True, "c": "y"}
    assert [type(values[name]) for name in "afbc"] == [int, float, bool, str]


def test_values_that_two_processes_enqueue_at_once_are_tried_once(tmp_path, monkeypatch):
    hp = kt.HyperParameters()
    hp.Float("a", 0, 1)
    first, second = enqueuing(tmp_path, hp), enqueuing(tmp_path, hp)
    for tuner in (first, second):
        with monkeypatch.context() as m:
            # Neither sees yet what the other has done.
            m.setattr(type(tuner.oracle.study), "get_trials", lambda *args, **kwargs: [])
            assert tuner.enqueue({"a": 0.25})
    second.search(verbose=0)
    values = [t.hyperparameters.get("a") for t in second.oracle.trials.values()]
    assert len(values) == 4
    assert values.count(0.25) == 1


def test_an_enqueued_trial_belongs_to_the_process_that_takes_it(tmp_path):
    hp = kt.HyperParameters()
    hp.Float("a", 0, 1)
    first, second = (enqueuing(tmp_path, hp).oracle for _ in range(2))
    enqueuing(tmp_path, hp).enqueue({"a": 0.25})
    with second.one_look():
        # What it sees is from before the other takes it.
        assert second._search.trials.has_enqueued()
        assert first.create_trial("1").hyperparameters.get("a") == 0.25
        assert second.create_trial("2").hyperparameters.get("a") != 0.25
    for oracle in (first, second):
        oracle.release()


def test_an_enqueued_trial_of_a_process_that_was_killed_is_run(tmp_path, monkeypatch):
    hp = kt.HyperParameters()
    hp.Float("a", 0, 1)
    killed = enqueuing(tmp_path, hp)
    killed.enqueue({"a": 0.25})
    storage = killed.oracle.study._storage
    with monkeypatch.context() as m:
        m.setattr(storage, "set_trial_user_attr", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.search(verbose=0)
    # As if the process had not even said that it stops.
    killed.oracle._ledger.release(0)
    tuner = enqueuing(tmp_path, hp)
    assert not tuner.enqueue({"a": 0.25})
    tuner.search(verbose=0)
    values = [t.hyperparameters.get("a") for t in tuner.oracle.trials.values()]
    assert len(values) == 4
    assert values[0] == 0.25


def test_values_may_be_enqueued_after_all_were_tried(tmp_path):
    hp = kt.HyperParameters()
    hp.Choice("a", [1, 2])
    enqueuing(tmp_path, hp).search(verbose=0)
    tuner = enqueuing(tmp_path, hp)
    tuner.enqueue({"a": 2})
    tuner.search(verbose=0)
    assert sorted(t.hyperparameters.get("a") for t in tuner.oracle.trials.values()) == [1, 2, 2]


def test_enqueued_values_without_a_place_in_the_search_are_warned_of(tmp_path):
    hp = kt.HyperParameters()
    hp.Int("a", 1, 9)
    tuner = enqueuing(tmp_path, hp, max_trials=2)
    for a in (7, 8, 9):
        tuner.enqueue({"a": a})
    with pytest.warns(UserWarning, match="1 of 3 enqueued trials will not run.* 2 trials in all"):
        tuner.search(verbose=0)
    tried = [t.hyperparameters.get("a") for t in tuner.oracle.trials.values()]
    assert tried == [7, 8]
    with pytest.warns(UserWarning, match="1 of 1 enqueued trials will not run.* 0 are left"):
        enqueuing(tmp_path, hp, max_trials=2).search(verbose=0)
    # No warning, which would be an error.
    tuner = enqueuing(tmp_path, hp, max_trials=3)
    tuner.search(verbose=0)
    assert tuner.oracle.trials["0002"].hyperparameters.get("a") == 9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"c": 1}, r"names of hyperparameters \(a, x\). Received: 'c'"),
        ({"a": 4}, r"'a' must be in its range \(1, 2\). Received: 4"),
        ({"a": 1.0}, "Received: 1.0"),
        ({"x": 2}, r"range \(0.0 to 1.0\)"),
        ({"x": True}, "Received: True"),
        ({"x": float("nan")}, "Received: nan"),
    ],
)
def test_values_that_cannot_be_are_not_enqueued(tmp_path, values, words):
    hp = kt.HyperParameters()
    hp.Choice("a", [1, 2])
    hp.Float("x", 0, 1)
    tuner = enqueuing(tmp_path, hp)
    with pytest.raises(errors.InvalidOptionError, match=words):
        tuner.enqueue(values)
    assert not tuner.oracle.study.get_trials()


def branches():
    """Hyperparameters of which some depend on another one."""
    hp = kt.HyperParameters()
    hp.Choice("kind", ["a", "b"])
    for kind, low in (("a", 1), ("b", 20)):
        with hp.conditional_scope("kind", [kind]):
            hp.Int("units", low, low + 9)
    hp.Float("rate", 0, 1, parent_name="kind", parent_values=["b"])
    return hp


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 0.5}, "value 0.5 of 'rate' needs kind='b' in `values`"),
        ({"kind": "a", "rate": 0.5}, "of 'rate' needs"),
        ({"kind": "a", "units": 20}, "value 20 of 'units' needs"),
        ({"units": 5}, "value 5 of 'units' needs kind='a'"),
        ({"kind": "a", "units": 15}, r"range \(1 to 10 or 20 to 29\)"),
    ],
)
def test_a_value_is_enqueued_with_what_it_depends_on(tmp_path, values, words):
    tuner = enqueuing(tmp_path, branches())
    with pytest.raises(errors.InvalidOptionError, match=words):
        tuner.enqueue(values)
    assert not tuner.oracle.study.get_trials()


class Layers(kt.RandomSearch):
    """What the model asks for depends on what it got, without a conditional scope."""

    def __init__(self, **kwargs):
        super().__init__(self.build, **kwargs)

    @staticmethod
    def build(hp):
        units = [hp.Int(f"units_{i}", 2, 64) for i in range(hp.Int("layers", 1, 3))]
        if hp.Boolean("dropout"):
            units.append(hp.Float("rate", 0.1, 0.5))
        return units

    def run_trial(self, trial, **kwargs):
        return float(sum(self.build(trial.hyperparameters)))


LAYERS = {"layers": 3, "units_0": 4, "units_2": 8, "dropout": True, "rate": 0.25}


def test_values_are_enqueued_that_the_model_asks_for_only_because_of_others(tmp_path):
    tuner = Layers(objective=None, max_trials=2, directory=tmp_path)
    assert tuner.enqueue(LAYERS)
    tuner.search(verbose=0)
    found = tuner.oracle.trials["0000"].hyperparameters.values
    assert found.items() >= LAYERS.items()
    for wrong in ({"layers": 3, "units_3": 4}, {"rate": 0.6}, {"layers": 2, "rate": 1}):
        with pytest.raises(errors.InvalidOptionError):
            Layers(objective=None, directory=tmp_path, project_name="o").enqueue(wrong)


@pytest.mark.parametrize("how", ["best", "observations"])
def test_values_are_transferred_that_the_model_asks_for_only_because_of_others(tmp_path, how):
    earlier = Layers(objective=None, max_trials=3, directory=tmp_path, project_name="earlier")
    earlier.enqueue(LAYERS)
    earlier.search(verbose=0)
    tuner = Layers(
        objective=None,
        max_trials=3,
        directory=tmp_path,
        transfer_from=tmp_path / "earlier",
        transfer=how,
    )
    tuner.search(verbose=0)
    if how == "best":
        tried = [t.hyperparameters.values for t in tuner.oracle.trials.values()]
        assert tried == [hp.values for hp in earlier.get_best_hyperparameters(3)]
    else:
        names = [t.params.keys() for t in tuner.oracle.study.trials[:3]]
        assert names == [t.params.keys() for t in earlier.oracle.study.trials]


class Branches(kt.RandomSearch):
    """Its trials define the space."""

    def run_trial(self, trial, **kwargs):
        hp = trial.hyperparameters
        kind = hp.Choice("kind", ["a", "b"])
        with hp.conditional_scope("kind", ["b"]):
            return hp.Float("rate", 0, 1) if kind == "b" else 0.0


@pytest.mark.parametrize("first", [None, {"kind": "b"}], ids=["unknown", "known"])
@pytest.mark.parametrize(
    ("values", "unused"),
    [
        ({"kind": "a", "rate": 0.5}, "{'rate': 0.5}"),
        ({"kind": "b", "raet": 0.5}, "{'raet': 0.5}"),
    ],
)
def test_enqueued_values_that_a_trial_does_not_use_are_warned_of(tmp_path, first, values, unused):
    tuner = Branches(objective=None, max_trials=3, directory=tmp_path)
    # Before the space is known.
    for given in (first, values, {"kind": "b", "rate": 0.25}):
        if given is not None:
            tuner.enqueue(given)
    with pytest.warns(UserWarning, match=f"did not use {unused}: with ") as seen:
        tuner.search(verbose=0)
    assert len(seen) == 1
    tried = [t.hyperparameters.values for t in tuner.oracle.trials.values()][first is not None :]
    assert "raet" not in tried[0]
    assert ("rate" in tried[0]) == (values["kind"] == "b")
    assert tried[1] == {"kind": "b", "rate": 0.25}


def test_an_enqueued_trial_that_is_resumed_uses_its_values(tmp_path):
    tuner = kt.ASHA(regressor, "val_loss", max_trials=2, max_epochs=2, factor=2, directory=tmp_path)
    # As if the space had not been known.
    _own_values.enqueue(tuner.oracle.study, {"units": 12, "layers": 3})
    with pytest.warns(UserWarning, match="did not use {'layers': 3}") as seen:
        tuner.search(X, Y, validation_data=(X, Y), verbose=0)
    assert sum("did not use" in str(w.message) for w in seen) == 1
    assert tuner.oracle.trials["0000"].hyperparameters.values == {"units": 12}


def test_errors_show_values_as_a_program_has_them(tmp_path):
    hp = kt.HyperParameters()
    hp.Choice("kernel", [(3, 3), (5, 5), None, {"b": 1, "a": (True,)}])
    hp.Int("units", 1, 9, parent_name="kernel", parent_values=[(3, 3), None])
    tuner = enqueuing(tmp_path, hp)
    with pytest.raises(errors.InvalidOptionError) as caught:
        tuner.enqueue({"kernel": (7, 7)})
    assert "(None, (3, 3), (5, 5), {'a': (True,), 'b': 1}). Received: (7, 7)" in str(caught.value)
    with pytest.raises(errors.InvalidOptionError, match=r"needs kernel=\(3, 3\) or None in"):
        tuner.enqueue({"kernel": (5, 5), "units": 2})
    assert not tuner.oracle.study.trials
    other = kt.HyperParameters()
    other.Choice("kernel", [(3, 3), (5, 5)])
    with pytest.raises(errors.StudyError, match=r"'b': 1}, now \(3, 3\), \(5, 5\)\)"):
        enqueuing(tmp_path, other).enqueue({"kernel": (3, 3)})


@pytest.mark.parametrize("in_study", [False, True])
def test_what_is_left_out_is_chosen_to_suit_what_was_enqueued(tmp_path, in_study):
    hp, kinds = branches(), ["a", "b"] * 4
    oracle = kt.oracles.RandomSearchOracle(
        kt.Objective("default_objective", "min"), 8, hyperparameters=hp, seed=0
    )
    oracle._set_project_dir(str(tmp_path), "p")
    oracle.verbose = 0
    rates = []
    for number, kind in enumerate(kinds):
        given = {"kind": kind} | ({"units": 20 + number} if kind == "b" else {})
        is_new = True
        if in_study:
            names = {"kind": "kind", "units": f'units [kind: "{kind}"]'}
            oracle.study.enqueue_trial({names[name]: value for name, value in given.items()})
        else:
            is_new = _own_values.enqueue(oracle.study, given)
        values = oracle.create_trial(str(number)).hyperparameters.values
        assert values.items() >= given.items() or not is_new
        if values["kind"] == "a":
            assert values.keys() == {"kind", "units"}
            assert 1 <= values["units"] <= 10
        else:
            assert values.keys() == {"kind", "units", "rate"}
            rates.append(values["rate"])
    # Chosen, too, rather than the default.
    assert len(set(rates)) == len(rates)
    oracle.release()


def test_oracles_take_keras_tuners_arguments_in_its_order():
    hp = kt.HyperParameters()
    hp.Int("a", 1, 2)
    common = {
        "allow_new_entries": False,
        "tune_new_entries": False,
        "max_retries_per_trial": 1,
        "max_consecutive_failed_trials": 2,
    }
    objective = kt.Objective("score", "max")
    oracles = kt.oracles
    made = [
        kt.Oracle(objective, 5, hp, False, False, 3, 1, 2),
        oracles.RandomSearchOracle(objective, 5, 3, hp, **common),
        oracles.GridSearchOracle(objective, 5, 3, hp, **common),
        oracles.BayesianOptimizationOracle(objective, 5, 2, None, None, 3, hp, **common),
        oracles.HyperbandOracle(objective, 5, 2, 1, 3, hp, **common),
    ]
    for oracle in made:
        assert oracle.objective is objective
        assert oracle.seed == 3
        assert [h.name for h in oracle.get_space().space] == ["a"]
        assert {name: getattr(oracle, name) for name in common} == common
    assert [o.max_trials for o in made[:4]] == [5] * 4
    with pytest.warns(UserWarning, match="are ignored"):
        oracles.BayesianOptimizationOracle(objective, alpha=1e-4)


def test_keras_tuners_own_oracle_is_refused_with_the_remedy(project):
    class Own(keras_tuner.Oracle):
        pass

    with pytest.raises(errors.InvalidOptionError, match=r"tfbig\.tuners\.oracles"):
        kt.Tuner(Own("loss"), regressor, **project)
