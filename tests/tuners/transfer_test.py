"""Searches that begin with what an earlier one has found."""

import optuna
import pytest

from tfbig import errors, tuners

LOSS = tuners.Objective("loss", "min")


class Search(tuners.OptunaSearch):
    """The loss is the distance of the first hyperparameter from 0.7."""

    def run_trial(self, trial, **kwargs):
        del kwargs
        values = trial.hyperparameters.values
        return {"loss": abs(values.get("x", 0.0) - 0.7), "time": 1.0}


def space(**ranges):
    hp = tuners.HyperParameters()
    for name, given in ranges.items():
        hp.Float(name, *given) if isinstance(given, tuple) else hp.Choice(name, given)
    return hp


def searched(directory, hp, project="new", max_trials=6, objective=LOSS, **kwargs):
    tuner = Search(
        objective=objective,
        max_trials=max_trials,
        hyperparameters=hp,
        seed=0,
        directory=directory,
        project_name=project,
        **kwargs,
    )
    tuner.search(verbose=0)
    return tuner


def values_of(tuner, count=None):
    return [t.hyperparameters.values for t in tuner.oracle.trials.values()][:count]


@pytest.fixture
def earlier(tmp_path):
    return searched(tmp_path, space(x=(0, 1), kind=["p", (1, 2)]), "earlier", sampler="random")


def best_of(tuner, count=3):
    return [hp.values for hp in tuner.get_best_hyperparameters(count)]


@pytest.mark.parametrize("project", ["earlier", "earlier/study.db"])
def test_the_best_trials_are_tried_first(tmp_path, earlier, project):
    hp = space(x=(-1, 2), kind=["p", (1, 2), "q"], new=(0, 1))
    for _ in range(2):
        tuner = searched(tmp_path, hp, transfer_from=tmp_path / project)
        found = values_of(tuner)
        assert len(found) == 6
        assert [{n: v[n] for n in ("x", "kind")} for v in found[:3]] == best_of(earlier)
        assert all(0 <= v["new"] <= 1 for v in found)
    # And the earlier search is as it was.
    assert len(values_of(earlier)) == 6


def test_what_does_not_fit_is_left_to_the_sampler(tmp_path, earlier):
    x = best_of(earlier)[0]["x"]
    tuner = searched(tmp_path, space(x=(x, 5), kind=["q"]), transfer_from=tmp_path / "earlier")
    first = values_of(tuner)[0]
    assert first == {"x": x, "kind": "q"}
    assert all(v["x"] >= x for v in values_of(tuner))


def test_a_value_fits_if_it_may_have_what_it_depends_on(tmp_path, earlier):
    hp = space(kind=["p", "q"])
    hp.Float("x", 0, 0.1, parent_name="kind", parent_values=["p"])
    hp.Float("x", 0, 1, parent_name="kind", parent_values=["q"])
    hp.Float("y", 0, 1)
    for values in values_of(searched(tmp_path, hp, transfer_from=tmp_path / "earlier")):
        assert values["kind"] == "q" or values["x"] <= 0.1


def test_a_space_that_has_nothing_in_common_is_warned_of(tmp_path, earlier):
    with pytest.warns(UserWarning, match="none of the 3 best trials has a value in the space"):
        searched(tmp_path, space(other=(0, 1)), transfer_from=tmp_path / "earlier")


class Observing(optuna.samplers.RandomSampler):
    """Notes the complete trials that it sees at each suggestion."""

    seen = ()

    def infer_relative_search_space(self, study, trial):
        complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        self.seen.append([(t.params, t.values) for t in complete])
        return super().infer_relative_search_space(study, trial)


def test_samplers_learn_from_observations_that_fit(tmp_path, earlier, monkeypatch):
    monkeypatch.setattr(Observing, "seen", [])
    x = sorted(v["x"] for v in values_of(earlier))
    hp = space(x=(x[1], 3), kind=["p", (1, 2)])
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 6 trials do not fit into the space"):
            tuner = searched(
                *(tmp_path, hp),
                sampler=Observing,
                transfer_from=tmp_path / "earlier",
                transfer="observations",
            )
        # They are no trials of this search.
        assert len(values_of(tuner)) == 6
    # The first trial has the defaults.
    assert [len(seen) for seen in Observing.seen] == [6, 7, 8, 9, 10]
    assert sorted(params["x"] for params, _ in Observing.seen[0][:5]) == x[1:]
    assert all(values == [abs(p["x"] - 0.7)] for p, values in Observing.seen[0])


def test_an_observation_that_another_process_takes_is_not_taken_twice(tmp_path, earlier):
    options = {"transfer_from": tmp_path / "earlier", "transfer": "observations"}
    hp = space(x=(0, 1), kind=["p", (1, 2)])
    other = searched(tmp_path, hp, max_trials=1)
    # It has said that it takes the first one, and is about to.
    place = tmp_path / "earlier" / "study.db"
    name = tuners._json.name_of(f"{place} earlier 0000")
    other.oracle._ledger.metadata(f"transferred {name}", other.oracle._ledger.owner)
    tuner = searched(tmp_path, hp, max_trials=1, **options)
    taken = [t for t in tuner.oracle.study.trials if "tfbig:transferred" in t.user_attrs]
    assert len(taken) == 5


def test_a_model_of_the_objective_knows_where_to_look(tmp_path):
    hp = space(x=(0, 1))
    searched(tmp_path, hp, "earlier", max_trials=20, sampler="random")
    options = {"transfer_from": tmp_path / "earlier", "transfer": "observations"}
    tuner = searched(tmp_path, hp, max_trials=7, sampler="tpe", **options)
    # Without, the first ten trials are random.
    assert sum(abs(v["x"] - 0.7) < 0.2 for v in values_of(tuner)[1:]) >= 4


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"transfer_from": 3}, errors.InvalidOptionError, "an object of type int"),
        ({"transfer": "all"}, errors.InvalidOptionError, "must be 'best' or 'observations'"),
        ({"transfer_from": "nowhere"}, errors.StudyError, "nowhere does not exist"),
        ({"objective": tuners.Objective("loss", "max")}, errors.StudyError, "Use transfer='best'"),
        ({"objective": tuners.Objective("time", "min")}, errors.StudyError, "Use transfer='best'"),
        ({"hp": None}, errors.InvalidOptionError, "known before the first trial"),
    ],
)
def test_what_cannot_be_transferred_is_refused(tmp_path, earlier, given, kind, words):
    arguments = {"hp": space(x=(0, 1)), "transfer": "observations"}
    arguments |= {"transfer_from": tmp_path / "earlier"} | given
    with pytest.raises(kind, match=words):
        searched(tmp_path, **arguments)


def test_observations_are_no_part_of_a_pareto_front(tmp_path):
    both = [LOSS, tuners.Objective("size", "min")]

    class Larger(Search):
        def run_trial(self, trial, **kwargs):
            x = trial.hyperparameters.get("x")
            return {"loss": x + self.least, "size": self.least - x}

    for Larger.least, project in ((0, "earlier"), (2, "new")):
        transferred = {} if project == "earlier" else {"transfer_from": tmp_path / "earlier"}
        tuner = Larger(
            objective=both,
            max_trials=4,
            hyperparameters=space(x=(0, 1)),
            directory=tmp_path,
            project_name=project,
            transfer="observations",
            **transferred,
        )
        tuner.search(verbose=0)
        # Each is as good as the others, and what was transferred better.
        assert len(tuner.get_pareto_trials()) == 4
