"""The same exactness over several workers: processes on this machine, over loopback."""

import csv
import itertools
import json
import re
import sys

import keras
import numpy as np
import pytest

from tests import job
from tests.jobs.chief import WithMetric
from tests.jobs.modes import MODES
from tests.jobs.shuffled import BATCHES
from tests.update import exactness_test as suite
from tfbig.launch import _environment

# Each feature once, with the splits, optimizers and batches in turn: workers see the same
# batches as the replicas of one process, for which other tests cross all of them.
COMBINATIONS = [
    "/".join(row)
    for row in zip(
        suite.FEATURES,
        itertools.cycle(["K3", "K8", "K1", "b3"]),
        itertools.cycle(["adam", "adamw", "sgd"]),
        itertools.cycle(["37by8", "37by12", "14by3", "64by32", "37by10"]),
        strict=False,
    )
]
CORE = [
    c
    for c in COMBINATIONS
    if c.split("/")[0]
    in (
        "sample_weight",
        "masking_layer",
        "two_outputs_weighted",
        "mean_with_sample_weight_masked",
        "add_loss",
    )
]

# Each worker finds out on its own which rows of a table are the same.
LOOK_UPS = [
    "constant_look_up/K3/rmsprop/14by3",
    "shared_table/b3/adam/37by10",
    "sparse_input/K3/adagrad/37by8",
]
SLOW_LOOK_UPS = [
    "position_table_of_any_length/K3/muon/37by12",
    "vector_add_loss/K3/plain_sgd/37by10",
]


def trained(directory, combinations, workers):
    done = job.run("exactness", directory, *combinations, workers=workers, timeout=550)
    assert done.returncode == 0, done.stderr
    return job.results(directory)


@pytest.mark.parametrize(
    ("workers", "combinations"),
    [
        pytest.param(2, CORE + LOOK_UPS, id="2 workers"),
        pytest.param(3, ["sample_weight/K3/adamw/37by10"], id="3 workers"),
        pytest.param(2, COMBINATIONS + SLOW_LOOK_UPS, id="2 workers, all", marks=pytest.mark.slow),
        pytest.param(
            3, COMBINATIONS + LOOK_UPS + SLOW_LOOK_UPS, id="3 workers, all", marks=pytest.mark.slow
        ),
        pytest.param(5, CORE, id="5 workers", marks=pytest.mark.slow),
    ],
)
def test_workers_train_as_plain_keras_on_one_device(workers, combinations, tmp_path):
    chief, *others = trained(tmp_path, combinations, workers)
    assert chief["replicas"] == workers
    assert set(chief["deviations"]) == set(combinations)
    for combination, deviation in chief["deviations"].items():
        suite.report(deviation, combination=combination, workers=workers)
        assert deviation < suite.TOLERANCE, combination
    # Not just close, but equal bit for bit.
    for other in others:
        assert other["digests"] == chief["digests"]


def test_compiled_and_eager_steps_train_as_plain_keras(tmp_path):
    done = job.run("modes", tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    for deviations in job.results(tmp_path):
        assert set(deviations) == set(MODES)
        # Gradients of the order of 1, rounded to 8 or 11 bits, times a rate of 0.01; 10 updates.
        for dtype, bits in (("bfloat16", 8), ("float16", 11)):
            for name in (dtype, f"{dtype} in parts"):
                assert suite.TOLERANCE < deviations.pop(name) < 0.1 * 2**-bits * 3
        assert deviations
        assert max(deviations.values()) < suite.TOLERANCE


@pytest.mark.parametrize(
    ("precision", "steps", "replica"),
    [
        pytest.param("mixed_float16", 2, 1, id="float16-worker 1"),
        pytest.param("float32", 1, 1, id="float32-worker 1"),
        pytest.param("float32", 4, 0, id="float32-worker 0", marks=pytest.mark.slow),
    ],
)
def test_a_non_finite_value_on_one_worker_is_skipped_by_all(precision, steps, replica, tmp_path):
    # Plain Keras hangs here: one worker skips, the other waits in the exchange.
    done = job.run("non_finite", tmp_path, precision, steps, replica, timeout=60)
    assert done.returncode == 0, done.stderr
    updates, others = job.results(tmp_path)
    assert updates == others
    skip = 2
    assert [u["skipped"] for u in updates] == [0, 0, 1, 1, 1, 1]
    assert [u["iterations"] for u in updates] == [1, 2, 2, 3, 4, 5]
    assert [u["scale"] for u in updates] == [2.0**8] * 2 + [2.0**7] * 4
    digests = [u["digest"] for u in updates]
    assert digests[skip] == digests[skip - 1]
    assert len(set(digests)) == 5
    assert all(u["finite"] for u in updates)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("batch_size", "argument batch_size"),
        pytest.param("micro_batch_size", "option micro_batch_size", marks=pytest.mark.slow),
        pytest.param("momentum", "compile's optimizer", marks=pytest.mark.slow),
        pytest.param(
            "steps_per_execution", "compile's steps_per_execution", marks=pytest.mark.slow
        ),
        pytest.param("samples", "argument x", marks=pytest.mark.slow),
        pytest.param("seed", "seed", marks=pytest.mark.slow),
        ("layers in fit", "layers"),
    ],
)
def test_workers_that_disagree_get_an_error_that_names_the_difference(what, named, tmp_path):
    done = job.run("disagreement", tmp_path, what, timeout=60)
    assert done.returncode == 0, done.stderr
    messages = job.results(tmp_path)
    assert len(messages) == 2
    for message in messages:
        assert f"fit must have the same {named}" in message
        assert re.search(r"Received: worker 0: .*; worker 1: ", message)


@pytest.mark.parametrize(
    "what", ["layers", pytest.param("a variable more", marks=pytest.mark.slow)]
)
def test_workers_that_build_different_models_say_which_variable_differs(what, tmp_path):
    job.run("disagreement", tmp_path, what, timeout=60)
    messages = job.results(tmp_path)
    assert len(messages) == 2
    for i, message in enumerate(messages):
        assert re.search(
            rf"variable number \d+ is .+ on worker {i}, and .+ on worker {1 - i}", message
        )


@pytest.mark.parametrize(
    "seeded", ["tensorflow", *(pytest.param(s, marks=pytest.mark.slow) for s in ("keras", "none"))]
)
def test_the_batches_of_a_py_dataset_are_shared_whatever_is_seeded(seeded, tmp_path):
    done = job.run("shuffled", tmp_path, seeded, timeout=60)
    assert done.returncode == 0, done.stderr
    of_first, of_second = job.results(tmp_path)
    assert of_first == of_second
    epochs = of_first[:BATCHES], of_first[BATCHES:]
    # Each worker has its half of the same batch.
    assert [sorted(epoch) for epoch in epochs] == [[i**2 for i in range(BATCHES)]] * 2
    assert epochs[0] != epochs[1]


def test_workers_whose_gradients_differ_do_not_hang(tmp_path):
    """Which no setting tells: a layer leaves a weight out on one of them."""
    job.run("disagreement", tmp_path, "gradients", timeout=60)
    messages = job.results(tmp_path)
    # The first to say so may end before the other does.
    assert messages
    assert all("different gradients" in message for message in messages)


def test_a_worker_that_creates_an_extra_variable_does_not_hang(tmp_path):
    done = job.run("disagreement", tmp_path, "a variable at the end", timeout=60)
    reason = r"worker 1 creates an extra variable, last \(2,\), while worker 0 waits for fit"
    # The worker that waits in fit raises. TensorFlow blocks the other one, which prints the reason.
    (message,) = job.results(tmp_path)
    assert re.search(reason, message)
    assert re.search(rf"\[worker 1\] tfbig: .*{reason}", done.stderr)


@pytest.fixture(scope="module")
def chief_job(tmp_path_factory):
    """Returns the directory and the results of `jobs/chief.py` on two workers."""
    directory = tmp_path_factory.mktemp("chief")
    done = job.run("chief", directory, timeout=120)
    assert done.returncode == 0, done.stderr
    return directory, job.results(directory)


def test_history_evaluation_and_prediction_cover_all_samples_on_every_worker(chief_job):
    _, (chief, other) = chief_job
    assert chief == other
    # EarlyStopping ends both after the second epoch.
    assert chief["epochs"] == [0, 1]
    assert np.shape(chief["prediction"]) == (26, 4)
    assert np.shape(chief["on_batch_prediction"]) == (5, 4)
    assert chief["same samples"] == 1
    assert chief["left alone"] == 1


@pytest.mark.usefixtures("float64")
def test_the_chief_saves_the_model_of_all_workers(chief_job):
    directory, (chief, _) = chief_job
    names = {p.name for p in directory.iterdir()}
    assert names == {"backup", "0.json", "1.json", "best.keras", "last.keras", "log.csv", "own.csv"}
    with keras.saving.custom_object_scope({"WithMetric": WithMetric}):
        model = keras.saving.load_model(directory / "last.keras")
    assert model.optimizer.iterations.numpy() == chief["iterations"]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(26, 3)), rng.normal(size=(26, 4))
    prediction = model.predict(x, batch_size=7, verbose=0)
    np.testing.assert_allclose(prediction, chief["prediction"], rtol=1e-10, atol=1e-10)
    evaluation = model.evaluate(x, y, batch_size=7, return_dict=True, verbose=0)
    for name, value in chief["evaluation"].items():
        np.testing.assert_allclose(evaluation[name], value, rtol=1e-10)
    rows = (directory / "log.csv").read_text().splitlines()
    assert len(rows) == 3


def train_digits(directory, *options):
    # One after the other, because two jobs at once would share the machine's cores.
    done = job.finish(
        job.start(
            [
                sys.executable,
                *options,
                job.ROOT / "scripts" / "train.py",
                "--task=digits",
                "--batch_size=128",
                "--micro_batch_size=32",
                "--epochs=10",
                "--verbose=0",
                "--nomonitor",
                f"--output_dir={directory}",
            ]
        ),
        200,
    )
    assert done.returncode == 0, done.stderr
    with open(directory / "history.csv", newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def test_the_main_job_ends_the_same_on_one_and_on_two_workers(tmp_path):
    _, one = train_digits(tmp_path / "one")
    out, two = train_digits(tmp_path / "two", job.LAUNCH, "--workers", "2")
    assert re.search(r"\[worker 0\] replicas +2", out)
    assert "[worker 1] replicas" not in out
    assert float(two[-1]["val_accuracy"]) >= 0.97
    # 120 updates in float32, whose sums have a different order.
    assert abs(float(two[-1]["loss"]) - float(one[-1]["loss"])) < 1e-5


def test_a_worker_that_never_starts_is_named(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in _environment.free_ports(2)]
    for index in (0, 1):
        task = {"type": "worker", "index": index}
        done = job.finish(
            job.start(
                [
                    sys.executable,
                    "-c",
                    "import tfbig; tfbig.distribute.get_strategy(timeout=2)",
                ],
                TF_CONFIG=json.dumps({"cluster": {"worker": addresses}, "task": task}),
            ),
            60,
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        absent = f"worker {1 - index} at {addresses[1 - index]} did not start within 2 s"
        assert last.startswith(f"tfbig.errors.WorkerUnavailableError: {absent}")
