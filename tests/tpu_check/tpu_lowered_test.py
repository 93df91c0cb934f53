"""Updates lowered by TensorFlow's kernels for TPUs, compiled by libtpu, and run on the CPU.

It uses the environments that `tpu_check` creates for users.
"""

import pathlib
import re
import sys

import pytest
from keras import layers

from tests import job
from tests.tpu_check import tpu_numbers_test
from tfbig import tpu_check
from tfbig.tpu_check import __main__ as tpu_check_command
from tfbig.tpu_check import environments, lowering, numbers

# Compiling takes half a minute on an idle machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODELS = ("cnn", "decoder")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@pytest.fixture(scope="module")
def made():
    """Returns the environments; skips the test, with a reason, if they cannot be created."""
    found = environments.Environments(tpu_check_command._ENVIRONMENTS.default)
    try:
        for program in environments.PROGRAMS:
            found.python(program)
    except environments.UnavailableError as e:
        pytest.skip(str(e))
    return found


@pytest.fixture
def check(made):
    def check(model, *options):
        model = f"{job.JOBS / 'tpu_models.py'}:{model}"
        command = [sys.executable, "-m", "tfbig.tpu_check", model, *options]
        done = job.finish(job.start(command), timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return check


def size(text, name):
    """Returns the bytes that a report gives after a word."""
    number, unit = re.search(rf"{name} ([\d.]+) (\w+)", text).groups()
    return float(number) * UNITS[unit]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:4x4"])
@pytest.mark.parametrize("model", [*MODELS, "words"])
def test_one_exchange_is_compiled(check, model, topology):
    out = check(
        model, f"--topology={topology}", "--batch_size=256", "--micro_batch_size=4", "--compile"
    )
    assert "compiled  by the TPU compiler for v5e" in out
    assert re.findall(r"exchange +(\d+) (all-\S+) of", out) == [("1", "all-reduce")]
    assert "is inside a" not in out


# Micro-batches whose activations are many times the 128 MB of fast memory, which temporaries
# exclude; and the bytes of data per sample, because the program copies the data once.
@pytest.mark.parametrize(("model", "micro_batch", "data"), [("decoder", 32, 0), ("cnn", 8192, 256)])
def test_temporaries_are_those_of_a_micro_batch(check, model, micro_batch, data):
    def temporaries(steps, micro_batch):
        batch = 4 * steps * micro_batch
        out = check(
            model, f"--batch_size={batch}", f"--micro_batch_size={micro_batch}", "--compile"
        )
        return size(out, "temporaries")

    found = {k: temporaries(k, micro_batch) - k * micro_batch * data for k in (2, 8, 32)}
    # The remaining data, tokens, are small.
    assert found[8] == pytest.approx(found[2], rel=0.05)
    assert found[32] == pytest.approx(found[2], rel=0.05)
    # The control: eight micro-batches at once.
    assert temporaries(1, 8 * micro_batch) > 4 * found[8]


@pytest.mark.parametrize("model", MODELS)
def test_the_lowered_program_computes_the_update_of_the_whole_batch(check, model):
    out = check(model, "--batch_size=64", "--micro_batch_size=4", "--run=lowered")
    assert "run       correct: an update of the lowered program, on 4 CPU devices, matches" in out
    assert float(re.search(r"largest deviation (\S+)", out)[1]) < 1e-5
    assert "all cores agree bit for bit" in out
    assert "NaN on one core: all cores skip the update, weights unchanged bit for bit" in out


def lowered(model, batch, made, directory):
    program = tpu_check.trace(model, batch.share(tpu_numbers_test.CORES))
    with tpu_numbers_test.strategy().scope():
        function = tpu_check.PureFunction(program)
    return lowering.lower(function, pathlib.Path(directory), made)


@pytest.mark.parametrize("fault", tpu_numbers_test.FAULTS)
def test_a_wrong_number_is_found(made, tmp_path, monkeypatch, fault):
    def run(model, batch, *several):
        program = lowered(model, batch, made, tmp_path)
        cores = tpu_numbers_test.CORES
        return [numbers.run(program.function, data, cores, program.run) for data in several]

    tpu_numbers_test.FAULTS[fault](monkeypatch)
    found = tpu_numbers_test.compared(tpu_numbers_test.build(tpu_numbers_test.DENSE), run)
    assert not found.is_right
    assert found.differences[0].size > 0.1
    assert bool(found.apart) == (fault == "no_exchange")


def test_an_exchange_in_the_loop_is_found_in_the_compiled_program(made, tmp_path):
    inner = (lambda: layers.Dense(8, "tanh"), lambda: tpu_numbers_test.Centred(name="own"))
    model, batch = tpu_numbers_test.built(tpu_numbers_test.build(inner))
    outcome = lowered(model, batch, made, tmp_path).compile(tpu_check.Slice.parse("v5e:2x2"))
    assert outcome.message is None
    assert any("is inside a loop" in error for error in outcome.errors())
