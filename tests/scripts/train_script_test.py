"""scripts/train.py with its tasks, as a user starts it: in a process of its own, or in a fork."""

import csv
import os
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from training.directory import RunDirectory
from training.history import Recorder

import tfbig
from tests import job
from tests.scripts import forked
from tests.scripts.scripts_test import TRAIN, run, table

# So small that tracing takes most of the time.
SMALL = {
    "language": (
        *("--task=language", "--corpus_bytes=10000", "--held_out_bytes=2000", "--window=32"),
        *("--vocabulary=300", "--batch_size=4", "--nojit_compile", "--verbose=2"),
    ),
    "speech": (
        *("--task=speech", "--voices=en-us+f1,en+m1", "--held_out_voices=en-us+m3", "--takes=1"),
        *("--batch_size=20", "--verbose=2"),
    ),
    "gan": ("--task=gan", "--batch_size=512", "--verbose=2"),
}
UPDATES = 45  # Of an epoch: 1,437 digits in batches of 32.
MEASURES = {"language": "bits_per_byte", "speech": "accuracy", "gan": "score"}


# What scripts/README.md says to load a model by. Only digits needs no more than tfbig.
CLASSES = TRAIN.parent / "tasks" / "saved_models.py"
IMPORTS = {"digits": "import tfbig"} | dict.fromkeys(
    SMALL, f"import runpy; runpy.run_path({str(CLASSES)!r})"
)
LOAD = """
import sys
import keras, numpy as np
IMPORT
model = keras.saving.load_model(sys.argv[1])
if model.name != "gan":
    outputs = model.predict(np.ones((2, *model.input_shape[1:]), "int32"), verbose=0)
    assert np.isfinite(outputs).all()
assert not {"command_line", "tasks.language"} & set(sys.modules)
assert not [p for p in sys.path if p.rstrip("/").endswith("scripts")]
print(type(model).__module__, int(model.optimizer.iterations.numpy()))
"""


def load(task, path, directory):
    """Module of the class and updates of a saved model, as a fresh process elsewhere finds them."""
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD.replace("IMPORT", IMPORTS[task]), path],
        cwd=directory,
        env=job.environment(PYTHONPATH=str(job.ROOT)),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    module, updates = done.stdout.split()
    return module, int(updates)


def history(directory):
    with (directory / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--cache_dir={tmp_path_factory.mktemp('cache')}"


def arguments_of(task, cache):
    return (*SMALL[task], cache) if task == "speech" else SMALL[task]


@pytest.mark.parametrize(
    ("task", "options", "micro_batches"),
    [
        ("language", ("--micro_batch_size=auto",), None),
        pytest.param(
            *("speech", ("--precision=mixed_float16", "--gradient_accumulation_steps=3"), "3"),
            marks=pytest.mark.slow,
        ),
        ("gan", ("--strategy=mirrored", "--micro_batch_size=100"), "3"),
    ],
)
def test_a_task_leaves_a_run_and_says_whether_it_reached_its_bar(
    task, options, micro_batches, cache, tmp_path
):
    arguments = (*arguments_of(task, cache), *options, f"--output_dir={tmp_path}")
    done = forked.run(TRAIN, *arguments, "--epochs=1", "--require_bar", timeout=300)
    # So little training misses the bar.
    assert done.returncode == 3, done.stderr
    said = "tfbig: micro_batch_size='auto' is 4 samples of the 4 of a replica\n"
    assert done.stderr == (said if "--micro_batch_size=auto" in options else "")
    name = f"val_{MEASURES[task]}"
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"{name} \d+\.\d{{4}} \(bar (below )?[\d.]+, missed\)", last)
    (epoch,) = history(tmp_path)
    assert f"{float(epoch[name]):.4f}" == last.split()[1]
    if micro_batches is not None:
        assert table(done.stdout)["micro-batches per update"] == f"{micro_batches} per replica"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    module, updates = load(task, tmp_path / "model.keras", tmp_path / "elsewhere")
    assert module.startswith("tasks." if task == "gan" else "tfbig.")
    assert updates > 0
    if task == "gan":
        assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    if task == "language":
        assert (tmp_path / "samples.txt").read_text().count("--- begun with") >= 1
        assert float(epoch["val_perplexity"]) > 1
        np.testing.assert_allclose(
            np.log(float(epoch["perplexity"])), float(epoch["loss"]), rtol=0.05
        )


def test_a_bar_that_is_reached_is_exit_code_0_and_the_model_needs_only_tfbig(tmp_path):
    arguments = ("--batch_size=64", "--epochs=8", "--verbose=0", "--require_bar")
    done = forked.run(TRAIN, *arguments, f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"val_accuracy (0\.9[7-9]\d\d|1\.0000) \(bar 0\.97\)", done.stdout.splitlines()[-1]
    )
    # 1,437 digits.
    found = load("digits", tmp_path / "run/model.keras", tmp_path / "elsewhere")
    assert found == ("tfbig.models", 8 * 23)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, TRAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt(process, how, after):
    for line in process.stdout:
        if line.startswith(after):
            break
    process.send_signal(how)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGTERM, tfbig.callbacks.PREEMPTED),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes(how, code, tmp_path):
    # Small batches, so that it does not end before the signal comes.
    arguments = ("--batch_size=32", "--epochs=6", "--verbose=2")
    directory = f"--output_dir={tmp_path / 'parts'}"
    assert interrupt(start(*arguments, directory), how, "Epoch 3/") == code
    # After a SIGTERM there may be no time to draw.
    assert (tmp_path / "parts/monitor/training.png").exists() == (how == signal.SIGINT)
    resumed = forked.run(TRAIN, *arguments, directory, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "Epoch 1/" not in resumed.stdout
    assert table(resumed.stdout)["updates"] == str(6 * UPDATES)
    assert [row["epoch"] for row in history(tmp_path / "parts")] == list("012345")
    with (tmp_path / "parts/monitor/training.csv").open() as file:
        monitored = [int(row["update"]) for row in csv.DictReader(file)]
    assert monitored == sorted(set(monitored))
    assert set(monitored) >= {i * UPDATES for i in range(1, 7)}
    if how == signal.SIGINT:
        return
    whole = forked.run(TRAIN, *arguments, f"--output_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    pairs = zip(history(tmp_path / "whole"), history(tmp_path / "parts"), strict=True)
    for one, other in pairs:
        # Sums of several threads come in any order.
        assert float(one["val_loss"]) == pytest.approx(float(other["val_loss"]), abs=0.02)

    # It is complete now.
    again = forked.run(TRAIN, *arguments, directory, "--resume")
    assert again.returncode == 2
    assert "complete" in again.stderr


def test_a_long_run_grows_its_batch_and_takes_back_a_spike(tmp_path):
    arguments = ("--batch_size=32", "--epochs=5", "--verbose=0", "--batch_growth=60:40,140:64")
    ordinary = forked.run(TRAIN, *arguments, f"--output_dir={tmp_path / 'ordinary'}")
    assert ordinary.returncode == 0, ordinary.stderr
    # The first epoch has 45 updates; the next ones 15 of 32 samples and 24 of 40, 36 of 40, 20 of
    # 40 and 10 of 64, 23 of 64.
    shown = table(ordinary.stdout)
    assert (shown["updates"], shown["effective batch"]) == (str(45 + 39 + 36 + 30 + 23), "64")
    with (tmp_path / "ordinary/monitor/training.csv").open() as file:
        rows = list(csv.DictReader(file))
    # So the learning rate ends where it should.
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0, abs=1e-6)

    guarded = (*arguments, "--spike_guard", "--inject_spike=130", "--backup_freq=10")
    backups = (f"--backup_dir={tmp_path / 'backup'}", "--backup_on_background", "--keep_backups=2")
    done = forked.run(TRAIN, *guarded, *backups, f"--output_dir={tmp_path / 'guarded'}")
    assert done.returncode == 0, done.stderr
    last = history(tmp_path / "guarded")[-1]
    assert float(last["rollbacks"]) == 1
    assert int(table(done.stdout)["updates"]) < 173 - 5
    assert (tmp_path / "backup/backup-1.npz").exists()


@pytest.mark.parametrize(("first", "epochs"), [(0, 2), (3, 1)])
def test_the_speed_of_a_resumed_epoch_is_not_that_of_a_whole_one(first, epochs):
    recorder = Recorder(None, 2, "loss", False)
    recorder.set_model(keras.Sequential())
    for epoch in range(2):
        recorder.on_epoch_begin(epoch)
        for batch in range(0 if epoch else first, 5):
            recorder.on_train_batch_begin(batch)
            recorder.on_train_batch_end(batch, {})
        recorder.on_epoch_end(epoch, {"loss": 1.0})
    assert len(recorder.seconds) == epochs
    assert len(recorder.epochs) == 2


@pytest.mark.slow
def test_a_run_with_stages_resumes_without(tmp_path):
    arguments = ("--batch_size=32", "--epochs=4", "--verbose=2", "--gradient_accumulation_steps=4")
    arguments = (*arguments, "--nomonitor", f"--output_dir={tmp_path}")
    interrupted = interrupt(start(*arguments, "--pipeline=2"), signal.SIGTERM, "Epoch 3/")
    assert interrupted == tfbig.callbacks.PREEMPTED
    resumed = forked.run(TRAIN, *arguments, "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    found = table(resumed.stdout)
    assert (found["stages"], found["updates"]) == ("1", str(4 * UPDATES))
    # Weights from anew would make it rise.
    losses = [float(row["loss"]) for row in history(tmp_path)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("is_written", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_interruption_takes_a_backup(is_written, tmp_path):
    arguments = ("--batch_size=32", "--epochs=6", "--verbose=2", "--backup_freq=100000")
    arguments = (*arguments, f"--output_dir={tmp_path}")
    process = start(*arguments)
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            break
    if not is_written:
        (tmp_path / "backup").write_text("in the way")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    line = stderr.strip().splitlines()[-1]
    saved = int(re.search(r"(\d+) of 270 updates are saved", line)[1])
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert int(model.optimizer.iterations.numpy()) == saved >= UPDATES
    how = "continues from the last backup" if is_written else "starts over"
    assert f"--resume {how}" in line
    if not is_written:
        (tmp_path / "backup").unlink()
    # Not unasked.
    again = run(TRAIN, *arguments)
    assert again.returncode == 2
    (line,) = again.stderr.splitlines()
    assert "was interrupted. Resume it with --resume" in line
    resumed = forked.run(TRAIN, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert ("training starts over" in resumed.stderr) == (not is_written)
    assert ("Epoch 1/" in resumed.stdout) == (not is_written)
    assert table(resumed.stdout)["updates"] == str(6 * UPDATES)
    assert [row["epoch"] for row in history(tmp_path)] == list("012345")
    # It is complete now.
    assert "complete" in forked.run(TRAIN, *arguments, "--resume").stderr


INTERRUPTED_TWICE = """
import signal, sys
sys.path.insert(0, sys.argv[1])
import keras, numpy as np, tfbig
from training import interruption
signals = [signal.SIGINT] * 2
class Interrupted(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        while signals:
            signal.raise_signal(signals.pop())
model = tfbig.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
callbacks = [Interrupted(), tfbig.callbacks.BackupAndRestore(sys.argv[2])]
try:
    with interruption.with_backup("train.py"):
        model.fit(np.ones((8, 1)), np.ones((8, 1)), verbose=0, callbacks=callbacks)
except KeyboardInterrupt:
    print(len(signals), "left;", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


def test_a_second_interruption_ends_at_once_and_is_not_a_termination(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED_TWICE, TRAIN.parent, tmp_path]
    done = job.finish(job.start(command), 60)
    assert (done.returncode, done.stdout) == (0, "0 left; True\n"), done.stderr
    assert not (tmp_path / "backup.npz").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_first_backup_begins_anew(tmp_path):
    arguments = ("--batch_size=32", "--epochs=8", "--verbose=2", "--backup_freq=100000")
    arguments = (*arguments, f"--output_dir={tmp_path}")
    assert interrupt(start(*arguments), signal.SIGKILL, "Epoch 2/") == -signal.SIGKILL
    (tmp_path / "backup").mkdir(exist_ok=True)
    (tmp_path / "backup/.backup-1.tmp").write_bytes(b"half")
    resumed = forked.run(TRAIN, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert table(resumed.stdout)["updates"] == str(8 * UPDATES)
    assert not (tmp_path / "backup").exists()


@pytest.mark.slow
def test_a_history_that_cannot_be_read_is_named_and_one_that_is_gone_is_not_made_up(tmp_path):
    arguments = ("--batch_size=32", "--epochs=6", "--verbose=2", f"--output_dir={tmp_path}")
    interrupt(start(*arguments), signal.SIGTERM, "Epoch 3/")
    path = tmp_path / "history.csv"
    for text in (bytes(range(256)), b"a,b\n1,2\n", b"epoch,loss\n0,1.0\n", None):
        path.unlink()
        if text is None:
            path.mkdir()
        else:
            path.write_bytes(text)
        done = forked.run(TRAIN, *arguments, "--resume")
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert "history.csv holds the epochs so far, and cannot be read" in line
        assert "Epoch" not in done.stdout
    path.rmdir()
    done = forked.run(TRAIN, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    numbers = [int(row["epoch"]) for row in history(tmp_path)]
    assert numbers == list(range(numbers[0], 6))
    assert numbers[0] >= 2


# Ctrl-C where the backup is about to be read.
INTERRUPTED_READING = """
import numpy
load = numpy.load
def interrupted(file, **options):
    if str(getattr(file, "name", "")).endswith("backup.npz"):
        raise KeyboardInterrupt
    return load(file, **options)
numpy.load = interrupted
"""


@pytest.mark.slow
def test_an_interruption_before_anything_is_restored_leaves_the_model(tmp_path):
    # Its optimizers are built before training begins.
    directory = tmp_path / "run"
    arguments = (*SMALL["gan"], "--epochs=1000", f"--output_dir={directory}")
    assert interrupt(start(*arguments), signal.SIGINT, "Epoch 3/") == 130
    before = (directory / "model.keras").read_bytes()
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_READING)
    command = [sys.executable, TRAIN, *arguments, "--resume"]
    done = job.finish(job.start(command, PYTHONPATH=f"{tmp_path}{os.pathsep}{job.ROOT}"), 60)
    assert done.returncode == 130, done.stderr
    assert (directory / "model.keras").read_bytes() == before
    (line,) = done.stderr.strip().splitlines()
    assert "no update since the last session; --resume continues from the last backup" in line


ENDS = {
    "interrupted": ("raise KeyboardInterrupt", 130),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "full": ("raise OSError(28, 'No space left on device')", 1),
}


@pytest.mark.parametrize(
    "how", ["killed", *(pytest.param(h, marks=pytest.mark.slow) for h in ("interrupted", "full"))]
)
def test_a_run_that_ends_between_its_training_and_its_files_is_concluded(how, tmp_path):
    # The curves, which come after the model, are drawn by this.
    end, code = ENDS[how]
    (tmp_path / "matplotlib.py").write_text(f"def use(backend):\n    {end}\n")
    directory = tmp_path / "run"
    arguments = ("--epochs=2", "--nomonitor", "--verbose=2", "--micro_batch_size=auto")
    arguments = (*arguments, f"--output_dir={directory}")
    path = f"{tmp_path}{os.pathsep}{job.ROOT}"
    done = job.finish(job.start([sys.executable, TRAIN, *arguments], PYTHONPATH=path), 60)
    assert done.returncode == code, done.stderr
    model = keras.saving.load_model(directory / "model.keras")
    assert int(model.optimizer.iterations.numpy()) == 2 * 3
    if how != "killed":
        line = done.stderr.strip().splitlines()[-1]
        assert "training is complete, and --resume saves and judges it" in line
        assert "Traceback" not in done.stderr
    (directory / "model.keras").unlink()

    concluded = forked.run(TRAIN, *arguments, "--resume")
    assert concluded.returncode == 0, concluded.stderr
    assert "Epoch" not in concluded.stdout
    assert table(concluded.stdout)["updates"] == "6"
    assert "val_accuracy" in concluded.stdout.splitlines()[-1]
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = keras.saving.load_model(directory / "model.keras")
    assert int(model.optimizer.iterations.numpy()) == 2 * 3
    assert not (directory / "backup").exists()


REFUSED = {
    "--task=speech --voices=en-us+nobody": "no voice 'en-us+nobody'",
    "--task=speech --held_out_voices=klingon-x": "no voice 'klingon-x'",
    "--task=speech --voices=en-us+f1 --held_out_voices=en-us+f1": "for training or for validation",
    "--task=speech --cache_dir=/proc/tfbig": "--cache_dir=/proc/tfbig cannot be written to",
    "--task=gan --micro_batch_size=auto": "Give a number",
    "--task=gan --pipeline=2": "cuts a Functional or Sequential model",
    "--pipeline=5": "cannot have more stages than layers",
    "--task=language --precision=float64": "does not go with --task=language",
    "--task=language --parameters=2B": "from 1M to 1B",
    "--task=language --parameters=small": "from 1M to 1B",
    "--parameters=1M": "--parameters goes with --task=language",
    "--micro_batch_size=many": "auto or an integer >= 1",
    "--micro_batch_size=0": "auto or an integer >= 1",
    "--batch_growth=100": "UPDATE:SIZE",
    "--batch_growth=0:64": "integers >= 1",
    "--batch_growth=200:64,100:128": "updates rising",
    "--batch_growth=100:1 --strategy=mirrored": "number of replicas",
    "--inject_spike=9 --shard=weights": "leave --shard=weights out",
    "--backup_dir=/proc/tfbig": "--backup_dir=/proc/tfbig cannot be written to",
    "--backup_dir=/etc/passwd/x": "--backup_dir=/etc/passwd/x cannot be written to",
    "--backup_dir=gs://bucket/x": "mount the storage",
    "--output_dir=gs://bucket/x": "mount the storage",
    "--resume": "holds none",
    "--resume --overwrite": "at most one",
    "--overwrite --backup_dir=backup": "leave --overwrite out",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_done_gets_one_line_and_exit_code_2(arguments, tmp_path):
    done = forked.run(TRAIN, *arguments.split(), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: ")
    assert REFUSED[arguments] in line
    assert done.stdout == ""
    assert not list(tmp_path.rglob("model.keras"))


def test_what_cannot_hold_a_backup_leaves_the_old_run(tmp_path):
    (tmp_path / "model.keras").write_text("precious")
    for more in ("--overwrite", "--nomonitor"):
        done = run(TRAIN, more, "--backup_dir=/proc/tfbig", f"--output_dir={tmp_path}")
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "model.keras").read_text() == "precious"


@pytest.mark.parametrize(
    ("task", "package", "extra"),
    [("language", "tokenizers", "language"), ("speech", "espeakng_loader", "speech")],
)
def test_a_missing_extra_is_named(task, package, extra, tmp_path):
    (tmp_path / f"{package}.py").write_text("raise ModuleNotFoundError\n")
    # Nor is there a library of the system.
    site = "import ctypes.util\nctypes.util.find_library = lambda name: None\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    process = job.start(
        [sys.executable, TRAIN, *SMALL[task], f"--output_dir={tmp_path / 'run'}"],
        PYTHONPATH=f"{tmp_path}{os.pathsep}{job.ROOT}",
    )
    done = job.finish(process, 60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"pip install 'tfbig[{extra}]'" in line
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("task", ["digits", "gan"])
def test_without_matplotlib_a_run_leaves_all_but_pictures(task, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    directory = tmp_path / "run"
    arguments = (f"--task={task}", "--epochs=1", "--batch_size=512", f"--output_dir={directory}")
    path = f"{tmp_path}{os.pathsep}{job.ROOT}"
    done = job.finish(job.start([sys.executable, TRAIN, *arguments], PYTHONPATH=path), 100)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "pip install 'tfbig[plots]'" in line
    assert "history.csv, model.keras are in" in done.stdout
    assert (directory / "model.keras").exists()
    assert not list(directory.rglob("*.png"))


def test_a_directory_of_another_run_is_left_alone(tmp_path):
    done = forked.run(TRAIN, "--epochs=1", "--verbose=0", f"--output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    cases = {
        "--task=gan": "holds a run of --task=digits",
        "--task=gan --resume": "holds a run of --task=digits",
        "--task=digits": "already holds a run",
        "--resume --epochs=1 --seed=5": "one with seed=0. Received: seed=5",
    }
    for arguments, text in cases.items():
        done = run(TRAIN, *arguments.split(), f"--output_dir={tmp_path}")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert text in line
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_backup_elsewhere_is_gone_on_with_by_the_same_run_only(tmp_path):
    backup = f"--backup_dir={tmp_path / 'backup'}"
    arguments = ("--epochs=1", "--verbose=2", f"--output_dir={tmp_path / 'run'}")
    assert forked.run(TRAIN, *arguments, backup).returncode == 0
    about = (tmp_path / "run/run.json").read_text()
    cases = {
        ("--seed=7", "--learning_rate=0.5", backup): "learning_rate=0.5, seed=7",
        (f"--output_dir={tmp_path / 'other'}", "--seed=7", backup): "Received: seed=7",
        # Nor does another backup, which is none, make room.
        (f"--backup_dir={tmp_path}",): "already holds a run",
    }
    for others, text in cases.items():
        done = forked.run(TRAIN, *arguments, *others)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert text in line
    assert (tmp_path / "run/run.json").read_text() == about
    done = forked.run(TRAIN, *arguments, backup)
    assert done.returncode == 0, done.stderr
    assert "Epoch" not in done.stdout


def test_a_damaged_backup_is_named(tmp_path):
    arguments = ("--batch_size=16", "--epochs=50", "--verbose=2", f"--output_dir={tmp_path}")
    interrupt(start(*arguments), signal.SIGTERM, "Epoch 2/")
    backup = tmp_path / "backup/backup.npz"
    backup.write_bytes(backup.read_bytes()[:100])
    done = forked.run(TRAIN, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "was interrupted. Resume it with --resume" in line
    done = forked.run(TRAIN, *arguments, "--resume")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cannot be read" in line
    assert "Epoch" not in done.stdout
    (tmp_path / "run.json").write_text("{")
    done = forked.run(TRAIN, *arguments, "--resume")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "run.json" in line


def test_a_run_resumes_from_an_older_backup_where_the_newest_is_gone(tmp_path):
    # Moved away, as the error about a damaged one says; or training was killed as they got their
    # names.
    run = RunDirectory(tmp_path, {"task": "digits"}, None)
    (tmp_path / "run.json").write_text('{"task": "digits", "complete": false}')
    run.backup.mkdir()
    for name, resumes in {
        ".backup-0-7.tmp": False,
        "backup-part-0f-1-1.npz": False,
        "backup-1.npz": True,
    }.items():
        path = run.backup / name
        path.write_bytes(b"a backup")
        run.prepare(resume=True, overwrite=False)
        assert run.resumes == resumes
        run.begin()
        assert path.exists() == resumes
        run.backup.mkdir(exist_ok=True)


WAYS = {
    "alone": ((), ()),
    "mirrored": ((), ("--strategy=mirrored", "--replicas=2")),
    "workers": ((job.LAUNCH, "--workers", "2"), ()),
    "float16": ((), ("--precision=mixed_float16",)),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", ["digits", "gan", "language", "speech"])
@pytest.mark.parametrize("way", WAYS)
def test_the_bar_is_reached(task, way, tmp_path):
    launcher, options = WAYS[way]
    command = [sys.executable, *launcher, TRAIN, f"--task={task}", "--require_bar", "--verbose=2"]
    process = job.start([*command, f"--output_dir={tmp_path}", *options])
    done = job.finish(process, 1700)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
