"""Programs of the kinds people write train as in plain Keras, split or on replicas.

Each program runs in float64, with a last batch of one sample: whole in plain Keras on one
device, split into three micro-batches, and split into two on each of two replicas. It runs with SGD
and with an adaptive optimizer: SGD would hide a wrong square, and most others a constant factor,
though not in their state. Weights, optimizer variables and history must agree. Then the split model
is saved, loaded and trained further.

Tracing takes nearly all of the time. So plain Keras runs eagerly. A program is only split, or
the split and the replicated run use one optimizer each, in turn; of three pairs of programs, one
has its optimizer's state divided over the replicas, and one its weights, too. `--slow` runs all
combinations.

`TFBIG_STORE_ZOO=1 python -m pytest tests/zoo --slow` stores docs/zoo.md.
"""

import os

import keras
import pytest

import tfbig
from tests import job
from tests.conftest import make_strategy
from tests.zoo import page, program, trained
from tests.zoo.program import PROGRAMS
from tfbig._keras.sharded_variable import ShardedWeight
from tfbig._update import sharded_state
from tfbig.distribute import _sharded_weights

program.load()

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger"),
    # Like most custom layers, these create others in the constructor and have no `build`. Keras
    # builds them when it creates the loaded model.
    pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer"),
]

SHARDS = [None, "optimizer", "weights"]

# Three micro-batches of two on one replica, two of up to two on each of two.
STEPS = {"default": 3, "mirrored_2": 2, "mirrored_4": 2}

# One of each kind: position table, added losses, own step, own compile, masks, several outputs.
ON_WORKERS = (
    "text_transformer",
    "centers",
    "autoencoder_with_step",
    "extended_classifier",
    "gru_tagger",
    "ticket_routing",
)


@pytest.fixture(autouse=True)
def small_weights_are_divided(monkeypatch):
    """Those of these programs are smaller than what is divided else."""
    monkeypatch.setattr(_sharded_weights, "SMALLEST", 1)


EXACT = [p for p in PROGRAMS.values() if p.is_exact]
INEXACT = [p for p in PROGRAMS.values() if not p.is_exact]


def each(programs):
    return pytest.mark.parametrize("program", programs, ids=lambda p: p.name)


def deviation(program, optimizer, strategy, directory=None, shard=None):
    """Deviation of a split program from plain Keras; given a directory, also of the loaded one."""
    kept = page.FOUND[program.name]
    keras.backend.clear_session()
    plain = trained.plain(program.name, optimizer, directory)
    keras.backend.clear_session()
    options = {"gradient_accumulation_steps": STEPS[strategy]} | ({"shard": shard} if shard else {})
    with make_strategy(strategy).scope():
        training = trained.Training(program, optimizer, plain.initial, **options)
        found = training.run().deviation(plain.result)
        if shard is not None:
            optimizers = [getattr(training.model, name) for name in program.optimizers]
            # All numbers would be the same without it.
            assert all(sharded_state.is_divided(o) for o in optimizers)
            divided = [v for v in training.model.weights if isinstance(v, ShardedWeight)]
            assert bool(divided) == (shard == "weights")
        if directory is not None:
            training.reload(directory)
            assert training.model.gradient_accumulation_steps == STEPS[strategy]
            found = max(found, training.run_on().deviation(plain.later))
    kept[optimizer, strategy] = max(found, kept.get((optimizer, strategy), 0))
    return found


def turns(program):
    """The optimizers for the split program and for the one on two replicas, and `shard` of that."""
    if not program.is_on_replicas:
        return program.adaptive, None, None
    pairs = [program.adaptive, "sgd"]
    index = [p.name for p in EXACT if p.is_on_replicas].index(program.name)
    return *(pairs if index % 2 else pairs[::-1]), SHARDS[index // 2 % 3]


# Large models of kinds of which there are smaller ones.
LARGE = ("bart", "translation", "whisper")


def ways(programs):
    """Each program on one device and on two replicas, one of them in turn as a slow test."""
    for index, each_program in enumerate(programs):
        is_on_replicas = each_program.is_on_replicas
        found = ("one device", "replicas") if is_on_replicas else ("one device",)
        for place, way in enumerate(found):
            is_its_turn = not is_on_replicas or index % 2 == place
            marks = [] if is_its_turn and each_program.name not in LARGE else [pytest.mark.slow]
            yield pytest.param(each_program, way, marks=marks, id=f"{each_program.name}-{way}")


@pytest.mark.parametrize(("program", "way"), ways(EXACT))
def test_program_trains_as_in_plain_keras(program, way, tmp_path):
    on_one_device, on_replicas, shard = turns(program)
    if way == "one device":
        found = deviation(program, on_one_device, "default", tmp_path)
    else:
        found = deviation(program, on_replicas, "mirrored_2", shard=shard)
    assert found <= program.tolerance


# Further consequences of the same guarantee, and long tests.


@pytest.mark.slow
@each(EXACT)
@pytest.mark.parametrize("strategy", ["default", "mirrored_2", "mirrored_4"])
def test_program_trains_as_in_plain_keras_with_both_optimizers(program, strategy):
    found = {
        (optimizer, shard): deviation(program, optimizer, strategy, shard=shard)
        for optimizer in (program.adaptive, "sgd")
        for shard in (SHARDS if strategy != "default" else [None])
    }
    assert not {k: d for k, d in found.items() if d > program.tolerance}


@pytest.mark.slow
@each(EXACT)
def test_program_trains_on_stages(program):
    plain = trained.plain(program.name, program.adaptive)
    keras.backend.clear_session()
    pipeline = tfbig.distribute.Pipeline(["CPU:0", "CPU:1"])
    options = {"gradient_accumulation_steps": 3, "pipeline": pipeline}
    try:
        training = trained.Training(program, program.adaptive, plain.initial, **options)
        found = training.run().deviation(plain.result)
    except tfbig.errors.UnsupportedModelError as e:
        if "neither Functional nor Sequential" not in str(e):
            raise
        pytest.skip("only its author can say which layers go together")
    assert len({v.value.device for v in training.model.variables}) == 2
    assert found <= program.tolerance


@each(INEXACT)
def test_program_that_a_split_changes_says_so(program):
    plain = trained.plain(program.name, program.adaptive)
    whole = trained.Training(program, program.adaptive, plain.initial, loss_scale=None)
    assert whole.run().deviation(plain.result) <= program.tolerance

    split = trained.Training(
        program, program.adaptive, plain.initial, gradient_accumulation_steps=STEPS["default"]
    )
    page.FOUND[program.name] = {}
    assert not tfbig.check_equivalence(split.model, *split.batch()).is_equivalent
    with pytest.warns(UserWarning, match=program.warns):
        result = split.run()
    # Otherwise there would be nothing to warn about.
    assert result.deviation(plain.result) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2])
def test_programs_train_as_in_plain_keras_on_workers(workers, tmp_path):
    done = job.run("zoo", tmp_path, *ON_WORKERS, workers=workers, timeout=500)
    assert done.returncode == 0, done.stderr
    chief, *others = job.results(tmp_path)
    assert chief["replicas"] == workers
    assert set(chief["deviations"]) == {f"{n}/{o}" for n in ON_WORKERS for o in ("sgd", "own")}
    for name, found in chief["deviations"].items():
        assert found <= PROGRAMS[name.split("/")[0]].tolerance, name
    for other in others:
        assert other["digests"] == chief["digests"]


# This test comes last, since the page consists of the others' results.
def test_stored_page_lists_the_programs():
    if os.environ.get("TFBIG_STORE_ZOO"):
        page.store()
    rows = page.rows()
    assert list(rows) == list(PROGRAMS)
    for name, (shape, exercises, optimizer, *deviations, note) in rows.items():
        program = PROGRAMS[name]
        assert (shape, exercises, optimizer, note) == (
            program.shape,
            program.exercises,
            program.adaptive,
            program.note,
        )
        found = [float(d) for d in deviations if d]
        assert bool(found) == program.is_exact, name
        assert max(found, default=0) <= program.tolerance, name
