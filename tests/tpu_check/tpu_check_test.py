"""`python -m tfbig.tpu_check`, as users call it."""

import subprocess
import sys

import pytest

from tests import job
from tfbig.tpu_check import __main__ as tpu_check

MODEL = """
import keras
import numpy as np

def build(inner=(), inputs=keras.Input((8,)), optimizer="adam"):
    model = keras.Sequential([inputs, *inner, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model

def python():
    import tensorflow as tf
    class Python(keras.layers.Layer):
        def call(self, x):
            return tf.ensure_shape(tf.numpy_function(np.tanh, [x], tf.float32), x.shape)
    return build([Python(name="tanh")])

def noisy():
    class Noisy(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="noisy")
            self.generator = keras.random.SeedGenerator(1)
        def call(self, x):
            return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)
    return build([Noisy()])

def strict():
    import tensorflow as tf
    class Strict(keras.layers.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(x), -9.0)]):
                return tf.identity(x)
    return build([Strict()])

def ragged():
    return build([keras.layers.GlobalMaxPooling1D()], keras.Input((None, 3)))

def sampled():
    return ragged(), (np.zeros((2, 7, 3), "float32"), np.zeros(2, "int32"))

def raising():
    raise KeyError("no such thing")

def automatic():
    import tfbig
    model = tfbig.extend(build(), micro_batch_size="auto")
    model.compile("sgd", "mse")
    return model

def not_compiled():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

def not_a_model():
    return 3

number = 3
"""


@pytest.fixture
def directory(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("import no_such_module")
    monkeypatch.chdir(tmp_path)
    # Undoes what loading a file adds.
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_model", "broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(directory, capsys):
    def run(*arguments):
        code = tpu_check.main(arguments)
        return code, *capsys.readouterr()

    return run


def rows(output):
    """Returns the lines of the report by their titles."""
    return {line[:10].strip(): line[10:] for line in output.splitlines()}


def test_report(run):
    code, out, err = run("--topology", "v5e:2x2", "my_model.py:build", "--batch_size", "64",
                         "--micro_batch_size=4")  # fmt: skip
    assert (code, err) == (0, "")
    report = rows(out)
    assert report["model"] == "Sequential 'sequential'"
    assert report["data"].startswith(
        "x float32 (64, 8), y int32 (64,), inferred from the model's inputs"
    )
    assert report["slice"] == "v5e:2x2, 4 cores, 16 samples each, split into micro-batches of 4"
    assert report["traced"].startswith("under TPUStrategy of TensorFlow 2.")
    assert report["traced"].endswith("Nothing was compiled or run")
    assert "runs on" not in out
    assert report["checks"] == "passed"
    # The gradients of 90 numbers, and five scalars.
    assert report["exchange"] == "3 CrossReplicaSum, 380 B from each core per update"
    assert report["memory"] == "model variables          360 B (90 numbers)"
    # Two moments of 90 numbers; `iterations`, an int64; the learning rate.
    assert "optimizer                732 B" in out
    assert "of 16 GB of HBM" in out
    assert "https://cloud.google.com/tpu/docs/v5e" in out


def test_a_fault_is_reported_with_its_layer(run):
    code, out, _ = run("my_model.py:python", "--batch_size=64")
    assert code == 1
    assert rows(out)["checks"] == "1 failed"
    assert "HostOperationError: A TPU cannot call Python." in out
    assert "(PyFunc) in layer 'tanh' (Python)" in out


def test_shapes_of_a_sample(run):
    code, out, _ = run("my_model:sampled", "--batch_size=64", "--gradient_accumulation_steps=2")
    assert code == 0
    assert rows(out)["data"] == "x float32 (64, 7, 3), y int32 (64,)"
    assert rows(out)["slice"].endswith("split into 2 micro-batches")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (
            ["--batch_size=64"],
            2,
            "exactly one argument must name the function that makes the model",
        ),
        (["my_model.py:build"], 2, "--batch_size is required"),
        (["my_model.py:build", "--batch_size=0"], 2, "--batch_size"),
        (["my_model.py:build", "--batch_size=x"], 2, "--batch_size"),
        (["my_model.py:build", "--batch=4"], 2, "Unknown command line flag 'batch'"),
        (["my_model.py:build", "--batch_size=8", "--run=compiled"], 2, "--run"),
        (
            ["my_model.py:build", "--batch_size=6"],
            2,
            "must be a multiple of the 4 cores of v5e:2x2",
        ),
        (["my_model.py:build", "--batch_size=8", "--topology=v4:2x2"], 2, "A topology must be"),
        (
            [
                "my_model.py:build",
                "--batch_size=8",
                "--micro_batch_size=1",
                "--gradient_accumulation_steps=2",
            ],
            2,
            "mutually exclusive",
        ),
        (["my_model.py", "--batch_size=8"], 2, "a model must be named like my_model.py:build"),
        (["none.py:build", "--batch_size=8"], 2, "there is no file none.py"),
        (["broken.py:build", "--batch_size=8"], 2, "No module named 'no_such_module'"),
        (["my_model.py:other", "--batch_size=8"], 2, "has no function 'other'"),
        (["my_model.py:number", "--batch_size=8"], 2, "has no function 'number'"),
        (["my_model.py:raising", "--batch_size=8"], 2, "build() failed: KeyError"),
        (["my_model.py:not_compiled", "--batch_size=8"], 2, "Sequential, not compiled"),
        (["my_model.py:not_a_model", "--batch_size=8"], 2, "Received: int"),
        (["my_model.py:ragged", "--batch_size=8"], 1, "of shape (None, None, 3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_invalid_arguments_give_one_line(run, arguments, code, text):
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert text in err
    assert err.startswith("tfbig.tpu_check: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_a_slice_of_one_core(run, steps):
    code, out, _ = run("my_model.py:build", "--batch_size=8", "--topology=v5e:1x1",
                       f"--gradient_accumulation_steps={steps}", "--run=traced")  # fmt: skip
    assert code == 0
    assert rows(out)["checks"] == "passed"
    assert rows(out)["run"].startswith("correct")


def test_a_size_that_fit_refuses_on_tpus_is_refused(run):
    code, _, err = run("my_model.py:automatic", "--batch_size=8")
    assert code == 1
    assert "`micro_batch_size='auto'` is not supported on TPUs" in err
    # What the message says.
    assert run("my_model.py:automatic", "--batch_size=8", "--micro_batch_size=1")[0] == 0


def test_running_the_traced_program(run):
    code, out, _ = run("my_model.py:build", "--batch_size=16", "--run=traced",
                       "--gradient_accumulation_steps=2")  # fmt: skip
    assert code == 0
    assert "Nothing was" not in out
    assert rows(out)["run"].startswith(
        "correct: an update of the traced program, as 4 cores in one"
    )
    assert "all cores skip the update, weights unchanged bit for bit" in out


def test_an_impossible_comparison_is_not_correct(run):
    code, out, _ = run("my_model.py:noisy", "--batch_size=16", "--run=traced",
                       "--gradient_accumulation_steps=2")  # fmt: skip
    assert code == 1
    assert rows(out)["run"].startswith("not compared: random numbers of Noisy 'noisy' cannot be")
    assert "correct" not in out


def test_a_failing_run_gives_one_line(run):
    code, out, _ = run("my_model.py:strict", "--batch_size=16", "--run=traced")
    assert code == 1
    assert rows(out)["checks"] == "passed"
    assert rows(out)["run"].startswith("failed: InvalidArgumentError: ")


def test_an_environment_that_cannot_be_created(run, directory):
    code, out, err = run("my_model.py:build", "--batch_size=16", "--compile",
                         f"--environments={directory / 'broken.py'}")  # fmt: skip
    assert code == 1
    # Earlier results are still reported.
    assert rows(out)["checks"] == "passed"
    assert "broken.py cannot be created" in err


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "--topology" in out
    assert "Exit code" in out


def test_a_process_makes_as_many_devices_as_cores(directory):
    command = [sys.executable, "-m", "tfbig.tpu_check", "--topology=v6e:2x4", "my_model.py:build"]
    result = subprocess.run(
        [*command, "--batch_size=64"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=directory,
        env=job.environment(),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "v6e:2x4, 8 cores, 8 samples each" in result.stdout
    assert "of 32 GB of HBM" in result.stdout
