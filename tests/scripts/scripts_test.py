"""The scripts, as a user starts them: in a process of their own."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import keras
import pytest

import tfbig
from tests import job
from tests.scripts import forked

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
TRAIN, BENCHMARK = SCRIPTS / "train.py", SCRIPTS / "benchmark.py"
# 1,437 of the 1,797 digits are for training: 3 batches of 512.
UPDATES = 3


def run(script, *arguments, cwd=None, timeout=120):
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        check=False,
    )


def table(output):
    """The lines `name  value` of a table as a dictionary."""
    pairs = (line.rsplit("  ", 1) for line in output.splitlines() if "  " in line)
    return {name.strip(): value.strip() for name, value in pairs}


@pytest.mark.parametrize(
    ("arguments", "micro_batch", "count", "replicas", "stages", "scale"),
    [
        ([], "512", "1 per replica", "1", "1", "none"),
        (
            ["--strategy=mirrored", "--replicas=2", "--micro_batch_size=100"],
            "100",
            "3 per replica",
            *("2", "1", "none"),
        ),
        (
            ["--precision=mixed_float16", "--gradient_accumulation_steps=3"],
            "171",
            "3 per replica",
            *("1", "1", "32768"),
        ),
        (
            ["--pipeline=2", "--strategy=mirrored", "--replicas=2", "--micro_batch_size=64"],
            "64",
            "4 per replica",
            *("2", "2", "none"),
        ),
    ],
    ids=["default", "mirrored", "float16", "pipeline"],
)
def test_train_leaves_a_run_and_ends_with_a_table(
    tmp_path, arguments, micro_batch, count, replicas, stages, scale
):
    # What TensorFlow writes while it starts is hidden.
    started = run if not arguments else forked.run
    done = started(TRAIN, "--epochs=1", f"--output_dir={tmp_path}", *arguments)
    assert done.returncode == 0, done.stderr
    assert ("tfbig: stages of digits\n" in done.stderr) == (stages == "2")
    assert (done.stderr == "") == (stages == "1")

    rows = table(done.stdout)
    expected = {
        "effective batch": "512",
        "micro-batch": micro_batch,
        "micro-batches per update": count,
        "replicas": replicas,
        "stages": stages,
        "updates": str(UPDATES),
        "skipped updates": "0",
        "loss scale": scale,
    }
    assert {name: rows.get(name) for name in expected} == expected
    assert float(rows["samples/s"].replace(",", "")) > 0
    assert float(rows["peak memory"].removesuffix(" MiB").replace(",", "")) > 100

    with (tmp_path / "history.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    columns = {"epoch", "loss", "accuracy", "val_loss", "val_accuracy"}
    scaling = {"loss_scale", "skipped_updates"} if scale != "none" else set()
    assert set(epoch) == columns | scaling
    assert f"{float(epoch['val_accuracy']):.4f}" == rows["validation accuracy"]
    assert all((name in done.stdout) == bool(scaling) for name in ("loss_scale", "skipped_updates"))

    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "monitor/training.png").read_bytes().startswith(b"\x89PNG")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(model, tfbig.Sequential)
    assert int(model.optimizer.iterations.numpy()) == UPDATES


ERRORS = {
    "--task=nothing": "--task=nothing",
    "--gradient_accumulation_steps=0": "positive",
    "--micro_batch_size=8 --gradient_accumulation_steps=2": "at most one",
    "--batch_size=0": "positive",
    "--precision=int8": "mixed_float16",
    "--strategy=mirrored --replicas=0": "positive",
    "--replicas=2": "--strategy=mirrored",
    "--loss_scale=-1": "finite number > 0",
    "--pipeline=-1": "non-negative",
    "--pipeline=2 --shard=optimizer": "shard=optimizer: stages divide the model already",
    "--pipeline=2 --strategy=tpu": "all cores of a TPU run one program",
    "--pipeline=2 --micro_batch_size=auto": "give a number",
    "--pipeline=2 --jit_compile": "XLA compiles for one device",
    "--learning_rate=nan": "finite number > 0",
    "--output_dir=/proc/tfbig": "cannot be written",
    "--no_such_flag=1": "no_such_flag",
    "argument": "argument",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_a_bad_flag_gets_one_line_and_exit_code_2(arguments, tmp_path):
    done = run(TRAIN, *arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: ")
    assert ERRORS[arguments] in line
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["large_model.py --limit=-1", "backup_time.py --every=0"])
def test_other_programs_refuse_numbers_that_are_too_small(command):
    script, argument = command.split()
    done = run(SCRIPTS / script, argument, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: flag {argument}: ")


def test_a_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "model.keras").write_text("precious")
    done = run(TRAIN, f"--output_dir={tmp_path}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--overwrite" in line
    assert (tmp_path / "model.keras").read_text() == "precious"


@pytest.mark.slow
def test_skips_without_end_are_one_line(tmp_path):
    # The largest float16 is 65504, so that every update overflows and is skipped.
    done = forked.run(
        TRAIN,
        *("--precision=mixed_float16", "--loss_scale=1e30", "--batch_size=16", "--epochs=2"),
        *("--verbose=0", f"--output_dir={tmp_path}"),
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "100 updates in a row" in line


def test_an_interrupted_run_is_saved(tmp_path):
    process = subprocess.Popen(
        [sys.executable, TRAIN, "--epochs=1000", "--verbose=2", f"--output_dir={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("Epoch 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr.strip().splitlines()[-1]
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert int(model.optimizer.iterations.numpy()) >= 2 * UPDATES
    assert len((tmp_path / "history.csv").read_text().splitlines()) >= 3


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_first_backup_is_started_again(tmp_path):
    backup = tmp_path / "backup"
    arguments = ["--batch_size=32", "--epochs=8", "--verbose=2", "--backup_freq=100000"]
    arguments += [f"--output_dir={tmp_path}", f"--backup_dir={backup}"]
    process = subprocess.Popen(
        [sys.executable, TRAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process.stdout:
        for line in process.stdout:
            if line.startswith("Epoch 2/"):
                break
        process.kill()
        process.wait(timeout=60)
    # There are results, and no backup.
    assert (tmp_path / "history.csv").exists()
    assert not (backup / "backup.npz").exists()
    done = forked.run(TRAIN, *arguments)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 8
    with (tmp_path / "monitor/training.csv").open() as file:
        assert [int(row["update"]) for row in csv.DictReader(file)][-1] == 8 * 45


@pytest.mark.parametrize("script", [TRAIN, BENCHMARK], ids=lambda path: path.stem)
def test_help_is_quick_and_lists_the_flags(script, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = run(script, "--help")
    assert done.returncode == 0
    # What is imported is listed there; TensorFlow takes seconds.
    assert "absl.flags\n" in done.stderr
    assert "tensorflow" not in done.stderr
    for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps"):
        assert f"--{name}:" in done.stdout


ROWS = {
    "whole": "plain, whole batch",
    "built_in": "plain, built-in accumulation",
    "built_in_jit": "plain, built-in accumulation, jit_compile",
    "micro": "plain, micro-batch",
    "tfbig": "tfbig",
    "jit": "tfbig, jit_compile",
    "recompute": "tfbig, recompute",
}
MORE_ROWS = {"pipeline": "tfbig, pipeline", "no_jit": "tfbig, jit_compile=False"}


# Each row is a process. Without --rows it is all but those that must be asked for.
@pytest.mark.parametrize(
    "names",
    [
        ("built_in_jit", "micro", "tfbig", "no_jit", "recompute", "pipeline"),
        pytest.param(None, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_benchmark_measures_every_row(names, tmp_path):
    path, png = tmp_path / "rows.json", tmp_path / "rows.png"
    done = run(
        BENCHMARK,
        *([f"--rows={','.join(names)}"] if names else []),
        *("--models=mlp", "--batch_size=8", "--gradient_accumulation_steps=2"),
        *("--runs=1", "--steps=1", f"--json={path}", f"--png={png}"),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [(ROWS | MORE_ROWS)[name] for name in names or ROWS]
    base = rows["plain, micro-batch"]["seconds"]
    for name, row in rows.items():
        assert row["seconds"] > 0
        # A ratio is of the same numbers, divided once.
        assert row["ratio"] == row["seconds"] / base
        assert row["samples_per_second"] == 8 / row["seconds"]
        assert row["cpu_seconds"] > 0
        # No row computes less than its products. Both vary by a few hundredths, on a noisy machine
        # by more.
        assert row["floor_ratio"] == 1e3 * row["seconds"] / 8 / row["floor_milliseconds"] > 0.5
        # Tracing alone takes longer than an update.
        assert row["first_update_seconds"] > row["seconds"]
        assert row["peak_mib"] > row["growth_mib"] > 0
        assert row["parameters"] == 4 * (512 * 512 + 512) + 512 * 10 + 10
        assert name in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")

    # Each row of tfbig says which others are better, and in what.
    lines = done.stdout.split("Where tfbig loses:")[-1].splitlines()
    worse = {"slower": "seconds", "larger": "growth_mib", "later": "first_update_seconds"}
    others = [name for name in rows if not name.startswith("tfbig")]
    for name in rows.keys() - others:
        said = "".join(line for line in lines if f"K=2, '{name}': " in line).split(": ")[-1]
        for word, key in worse.items():
            part = "".join(part for part in said.split("; ") if part.startswith(word))
            for other in others:
                ratio = rows[name][key] / rows[other][key]
                assert (f"'{other}' ({ratio:.2f}x)" in part) == (ratio >= 1.01), (name, key)


def fake_peers(directory, monkeypatch, **answers):
    """Environments whose Python answers with an expression of `task` and `run`, from 0."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmarks import peers

    for peer, answer in answers.items():
        environment = directory / f".venv-{peer}"
        (environment / "bin").mkdir(parents=True)
        installed = "\n".join(peers.requirements(peer))
        (environment / "installed.txt").write_text(installed)
        python = environment / "bin" / "python"
        python.write_text(
            f"#!{sys.executable} -S\n"
            "import json, os, pathlib, sys\n"
            "task = json.loads(sys.argv[-1])\n"
            "name = 'runs-{gradient_accumulation_steps}'.format(**task)\n"
            "runs = pathlib.Path(__file__).with_name(name)\n"
            "run = len(runs.read_text()) if runs.exists() else 0\n"
            "runs.write_text('x' * (run + 1))\n"
            "answer = {'seconds': [1.0], 'cpu_seconds': [2.0], 'first_update_seconds': 1.5,\n"
            "          'peak_mib': 9.0, 'growth_mib': 4.0, 'parameters': 7}\n"
            f"print(json.dumps(answer | {answer}))\n"
        )
        python.chmod(0o755)
    return f"--peers_directory={directory}"


def test_benchmark_measures_rows_in_turn(tmp_path):
    path = tmp_path / "rows.json"
    done = run(
        BENCHMARK,
        *("--in_turn", "--models=mlp", "--rows=built_in,tfbig,pipeline", "--batch_size=8"),
        *("--gradient_accumulation_steps=2", "--steps=3", f"--json={path}"),
        f"--markdown={tmp_path / 'rows.md'}",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # The stages, and what tfbig says of few micro-batches; nothing of TensorFlow.
    known = ("tfbig: ", "stage ", "0 ", "1 ")
    assert done.stderr
    assert all(line.startswith(known) for line in done.stderr.splitlines()), done.stderr
    measured = json.loads(path.read_text())["rows"]
    assert [row["row"] for row in measured] == [
        *("plain, built-in accumulation", "tfbig", "tfbig, pipeline")
    ]
    first, *others = measured
    assert first["ratio"] == 1.0
    for row in others:
        assert row["ratio"] > 0
        assert f"{8 / row['seconds']:.1f}" in done.stdout
    rows = (tmp_path / "rows.md").read_text()
    for row in measured:
        rate, ratio = f"{8 / row['seconds']:.1f}", f"{row['ratio']:.3f}"
        assert f"| mlp | 2 | {row['row']} | {rate} | {ratio} |" in rows


def test_benchmark_takes_the_median_of_runs_that_are_interleaved(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    seconds = "{'seconds': [[5.0, 1.0, 2.0][run]] * 3, 'first_update_seconds': 7.0}"
    cores = "{'cores': len(os.sched_getaffinity(0)), 'threads': os.environ['OMP_NUM_THREADS']}"
    done = run(
        BENCHMARK,
        *("--models=gpt", "--rows=", "--peers=torch,jax", "--batch_size=8", "--threads=1"),
        "--micro_batch_size=8",
        fake_peers(tmp_path, monkeypatch, torch=seconds, jax=cores),
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    torch, jax = json.loads(path.read_text())["rows"]
    assert (torch["seconds"], torch["seconds_min"], torch["seconds_max"]) == (2.0, 1.0, 5.0)
    assert torch["samples_per_second"] == 4.0
    # 7 s for the first update, of which an update itself takes 5, 1, and 2.
    assert torch["start_seconds"] == 5.0
    assert torch["ratio"] is None
    assert [row["row"] for row in (torch, jax)] == [
        "PyTorch, Accelerate",
        "Keras on JAX, built-in accumulation",
    ]
    order = [line.split("K=1, ")[1].split(",")[0] for line in done.stderr.splitlines()]
    assert order == ["PyTorch", "Keras on JAX"] * 3
    for own in jax["runs"]:
        assert own["threads"] == "1"
        assert own["cores"] == 1 or not hasattr(os, "sched_setaffinity")


@pytest.mark.parametrize(
    ("option", "batches"),
    [("--micro_batch_size=8", [8, 32]), ("--batch_size=32", [32, 32])],
    ids=["micro_batch_stays", "effective_batch_stays"],
)
def test_benchmark_varies_the_number_of_micro_batches(option, batches, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    grows = "{'growth_mib': 100.0 * task['gradient_accumulation_steps']}"
    done = run(
        BENCHMARK,
        *("--models=gpt", "--rows=", "--peers=jax", "--gradient_accumulation_steps=1,4", option),
        fake_peers(tmp_path, monkeypatch, jax=grows),
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["effective_batch"] for row in rows] == batches
    over_k = done.stdout.split("Growth of the peak memory, MiB\n")[1].splitlines()
    assert over_k[0].split()[-2:] == ["K=1", "K=4"]
    assert over_k[1].split()[-2:] == ["100", "400"]


def test_benchmark_goes_on_after_a_row_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    directory = fake_peers(tmp_path, monkeypatch, jax="{}")
    (tmp_path / ".venv-torch").write_text("in the way")
    done = run(
        BENCHMARK,
        # One K at which all rows are there, and a time in which TensorFlow is not imported.
        *("--models=mlp", "--rows=micro,tfbig", "--peers=torch,jax", "--timeout=1", "--runs=2"),
        *(directory, f"--json={path}"),
    )
    assert done.returncode == 1, done.stderr
    *killed, torch, jax = json.loads(path.read_text())["rows"]
    assert [row["error"] for row in killed] == ["killed after 1 s"] * 2
    assert torch["error"].startswith("python -m venv for torch: ")
    assert jax["seconds"] == 1.0
    # None is tried again.
    assert done.stderr.count("tfbig") == 1
    for row in (*killed, torch):
        assert f"failed: {row['error']}" in done.stdout


def test_benchmark_compares_models_of_one_size_only(tmp_path, monkeypatch):
    directory = fake_peers(tmp_path, monkeypatch, torch="{}", jax="{'parameters': 8}")
    done = run(BENCHMARK, "--models=vit", "--rows=", "--peers=torch,jax", directory)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "benchmark.py: vit is not the same model everywhere: 7 in 'PyTorch, Accelerate' but "
        "8 in 'Keras on JAX, built-in accumulation'"
    )


def test_over_a_network_an_update_is_one_exchange(tmp_path):
    path = tmp_path / "rows.json"
    settings = ("--gradient_accumulation_steps=1,4", "--runs=1", "--steps=1", f"--json={path}")
    settings = (*settings, "--network_hosts=3", "--network_megabits=80")
    # When the time is over it is told to end, and so removes the hosts that it made.
    done = job.finish(job.start([sys.executable, BENCHMARK, "--network", *settings]), timeout=150)
    assert done.returncode == 0, done.stderr
    if "--network skipped" in done.stderr:
        pytest.skip(done.stderr.strip())
    rows = {
        (row["row"], row["gradient_accumulation_steps"]): row
        for row in json.loads(path.read_text())["rows"]
    }
    sent = {key: row["bytes_per_sample"] for key, row in rows.items()}

    # In a ring of 3 workers, each sends the gradient of the 1,055,754 weights 4/3 times for its 32
    # samples.
    # A packet of 1,514 bytes has 66 of headers (4.6 %), and every one or two packets are
    # acknowledged by 66 more (2.3 to 4.6 %): 7 % was measured. Little else is sent.
    assert 1 < sent["tfbig", 1] / (4 / 3 * 4 * 1_055_754 / 32) < 1.12
    # Within 1 % as measured; acknowledgements alone may differ by 2.3 %, and a packet sent
    # again or on its way at the end of an update adds to that.
    assert sent["tfbig", 1] / sent["tfbig", 4] == pytest.approx(4, rel=0.05)
    other = "exchange per micro-batch"
    assert sent[other, 1] / sent[other, 4] == pytest.approx(1, rel=0.05)
    assert sent[other, 1] / sent["tfbig", 1] == pytest.approx(1, rel=0.05)
    # 3.9 as measured.
    assert rows["tfbig", 4]["samples_per_second_ratio"] > 1.5
    # Its bytes alone take so long at 80 Mbit/s.
    assert rows["tfbig", 1]["samples_per_second"] < 96 / (4 / 3 * 4 * 1_055_754 * 8 / 80e6)


def test_benchmark_writes_markdown_that_says_how_to_repeat_it(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    arguments = ("--models=gpt", "--rows=", "--peers=jax", "--gradient_accumulation_steps=1,4")
    directory = fake_peers(tmp_path, monkeypatch, jax="{}")
    done = run(BENCHMARK, *arguments, "--runs=2", directory, f"--markdown={path}")
    assert done.returncode == 0, done.stderr
    head, _, table, _, memory, *_ = path.read_text().split("\n\n")
    facts = dict(line.removeprefix("- ").split(": ", 1) for line in head.splitlines())
    assert list(facts) == ["Command", "Date", "Commit", "Machine", "Versions"]
    assert facts["Command"].startswith(f"`python scripts/benchmark.py {arguments[0]} --rows= ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["Date"])
    if (SCRIPTS.parent / ".git").exists():
        assert re.match("`[0-9a-f]{40}`", facts["Commit"])
    assert re.search(r"\d cores, [\d.]+ GiB of memory", facts["Machine"])
    names = ("Python", "tensorflow", "keras", "tfbig", "jax", "jaxlib", "numpy")
    assert all(re.search(rf"\b{name} \d", facts["Versions"]) for name in names)

    heads, ruler, *lines = ([c.strip() for c in row[1:-1].split("|")] for row in table.split("\n"))
    assert heads[:4] == ["model", "K", "row", "samples/s"]
    assert ruler[:4] == ["---", "---:", "---", "---:"]
    assert [line[:4] for line in lines] == [
        ["gpt", k, "Keras on JAX, built-in accumulation", "256.0"] for k in ("1", "4")
    ]
    # The same numbers as on the screen.
    for line in lines:
        assert all(cell in done.stdout for cell in line)
    assert memory.splitlines()[0] == "| model | row | K=1 | K=4 |"


def test_other_modes_of_benchmark_have_tables_for_markdown(tmp_path):
    from benchmarks import markdown, network, provenance, tuners

    speed = {"samples_per_second": 2.0, "samples_per_second_min": 1.0}
    speed |= {"samples_per_second_max": 3.0, "samples_per_second_ratio": 1.0}
    sent = {"bytes_per_sample": 7.0, "bytes_per_sample_ratio": 1.0}
    exchanged = {"gradient_accumulation_steps": 4, "row": "tfbig", **speed, **sent}
    searched = [{"row": "TPE", "problem": name, "best": [1.0, 2.0]} for name in tuners.PROBLEMS]
    searched.append({"row": "TPE", "milliseconds": dict.fromkeys(tuners.MOMENTS, 0.5)})
    tables = [network.table(network.Cluster(), [exchanged]), *tuners.tables(searched)]
    origin = provenance.Provenance("command", "date", "commit", "machine", {"Python": "3"})
    markdown.write(tmp_path / "tables.md", origin, tables, ["a | b"])
    text = (tmp_path / "tables.md").read_text()
    for row in (
        "| 4 | tfbig | 2.0 | 1.0-3.0 | 1.00 | 7 | 1.000 |",
        "| TPE | 1.500 (  1.000 to   2.000) | 1.500 (  1.000 to   2.000) |",
        "| TPE | 0.5 | 0.5 | 0.5 | 0.5 |",
        "- a \\| b",
    ):
        assert row in text


def test_benchmark_runs_every_search_that_it_compares():
    from benchmarks import tuners

    function, bounds = tuners.PROBLEMS["Branin"]
    for row, search in tuners.rows().items():
        values, seconds = search(function, bounds, 2, 0)
        assert len(values) == len(seconds) == 2, row
        assert min(values) > 0.39, row


NOT_MEASURED = {
    "--markdown=/tmp": "--markdown must be a file",
    "--json=/tmp": "--json must be a file",
    "--json=": "--json must be a file",
    "--json=/proc/rows.json": "--json=/proc cannot be written to",
    "--json=/proc/version": "--json=/proc/version cannot be written to",
    "--png=/tmp": "--png must be a file",
    "--png=rows.foo": "--png must end in .png",
    "--in_turn --models=mlp --rows=tfbig --png=rows.png": "--png does not go with --in_turn",
    "--gradient_accumulation_steps=": "gradient_accumulation_steps",
    "--gradient_accumulation_steps=x": "gradient_accumulation_steps",
    "--gradient_accumulation_steps=2,": "gradient_accumulation_steps",
}


@pytest.mark.parametrize("arguments", NOT_MEASURED)
def test_benchmark_says_before_it_measures_what_it_cannot_do(arguments, tmp_path):
    done = run(BENCHMARK, *arguments.split(), cwd=tmp_path, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert NOT_MEASURED[arguments] in line


@pytest.mark.parametrize(
    "arguments",
    [
        "--models=nothing",
        "--micro_batch_size=7",
        "--gradient_accumulation_steps=0",
        "--network --gradient_accumulation_steps=0",
        "--network --batch_size=64",
        "--network --network_hosts=1",
        "--network_megabits=10",
        "--network --peers=jax",
        "--peers=mxnet",
        "--rows=none",
        "--rows=",
        "--png=/nowhere/rows.png",
        "--in_turn --models=mlp,wide --rows=tfbig",
        "--in_turn --models=mlp --rows=whole,tfbig",
        "--batch_size=8 --micro_batch_size=4 --gradient_accumulation_steps=2",
    ],
)
def test_benchmark_refuses_in_one_line(arguments):
    done = run(BENCHMARK, *arguments.split())
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
