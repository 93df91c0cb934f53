"""benchmark.py --scaling: times on paper, against those worked out by hand."""

import dataclasses
import json

import pytest
from benchmarks import scaling

from tests.scripts.scripts_test import BENCHMARK, run

# 80 MB in buckets of 32 MiB: 3.
TRAINING = scaling.Training(parameters=20_000_000, micro_batch_seconds=0.5)
NETWORK = scaling.Network("100 Mbit/s", 1e8, 1e-3)


@pytest.mark.parametrize(
    ("replicas", "seconds"),
    [
        (1, 0.0),
        # 2 steps of 40 MB, 3.2 s each, and 3 latencies.
        (2, 2 * 3.203),
        # 6 steps of 20 MB.
        (4, 6 * 1.603),
        # 8,190 steps of 19,531.25 bytes, 1.5625 ms each.
        (4096, 8190 * 0.0045625),
    ],
)
def test_an_exchange_takes_what_its_bytes_and_messages_take(replicas, seconds):
    assert TRAINING.buckets == 3
    assert TRAINING.exchange_seconds(replicas, NETWORK) == pytest.approx(seconds, rel=1e-12)
    update = TRAINING.update_seconds(replicas, NETWORK, 8)
    # The backward pass of the last micro-batch hides a third of a second of it.
    hidden = 1 / 3 if replicas > 1 else 0.0
    assert update == pytest.approx(4.0 + seconds - hidden, rel=1e-12)
    assert TRAINING.efficiency(replicas, NETWORK, 8) == pytest.approx(4 / update, rel=1e-12)


def test_what_helps_does_as_much_as_was_worked_out():
    def seconds(**change):
        return dataclasses.replace(TRAINING, **change).update_seconds(2, NETWORK, 8)

    # Half of the bytes, in 2 buckets, between two exchanges of a few numbers.
    half = seconds(bytes_of_gradient=2, small_exchanges=2)
    assert half == pytest.approx(4 + 2 * 1.604 - 1 / 3, rel=1e-12)
    # A single bucket is complete when the pass is over.
    assert seconds(bucket_bytes=80_000_000) == pytest.approx(4 + 2 * 3.201, rel=1e-12)
    assert seconds(is_overlapped=False) == pytest.approx(4 + 6.406, rel=1e-12)
    # At most two of three buckets: a slow pass cannot hide the last one.
    slow = dataclasses.replace(TRAINING, micro_batch_seconds=60.0)
    assert slow.update_seconds(2, NETWORK, 1) == pytest.approx(60 + 6.406 / 3, rel=1e-12)


def test_the_least_number_of_micro_batches_that_is_efficient():
    # 6.406 s of exchange, of which a third of a second is hidden, need 54.654 s of computing.
    assert TRAINING.micro_batches_for(0.9, 2, NETWORK) == 110
    assert TRAINING.efficiency(2, NETWORK, 110) >= 0.9 > TRAINING.efficiency(2, NETWORK, 109)
    assert TRAINING.micro_batches_for(0.9, 1, NETWORK) == 1
    # Exactly 9 times as long.
    exact = dataclasses.replace(TRAINING, micro_batch_seconds=6.406, is_overlapped=False)
    assert exact.micro_batches_for(0.9, 2, NETWORK) == 9


def test_the_model_agrees_with_what_was_measured_over_100_megabits():
    # docs/benchmarks.md: samples per second of two hosts, 32 samples in a micro-batch of each.
    measured = {k: 64 * k / rate for k, rate in {1: 157.3, 4: 600.9, 16: 2115.2}.items()}
    micro_batch = (measured[16] - measured[1]) / 15
    # Sent by a host, headers included, instead of 4 bytes a parameter.
    training = scaling.Training(140_876 * 64 // 2, micro_batch, bytes_of_gradient=1)
    for k, seconds in measured.items():
        computed = training.update_seconds(2, scaling.NETWORKS[0], k)
        assert 0.89 < computed / seconds < 0.92


def test_tables_are_printed_and_written(tmp_path):
    path, markdown = tmp_path / "rows.json", tmp_path / "table.md"
    done = run(
        BENCHMARK,
        *("--scaling", "--model_parameters=20000000", "--micro_batch_seconds=0.5"),
        *("--gradient_accumulation_steps=8", f"--json={path}", f"--markdown={markdown}"),
    )
    assert done.returncode == 0, done.stderr
    assert "20,000,000 parameters, micro-batches of 0.5 s, 3 buckets" in done.stdout
    rows = json.loads(path.read_text())["rows"]
    # 4 s of computing, 6.4 s for the bytes and 1.2 ms for 6 messages, without 1/3 s of overlap.
    assert rows[0]["network"] == "100 Mbit/s"
    assert rows[0]["update_seconds"]["2"] == pytest.approx(10.4012 - 1 / 3, rel=1e-12)
    assert "| 100 Mbit/s | 8 | 1.00 | 0.40 |" in markdown.read_text()
    assert "| 100 Mbit/s | as it is | 110 |" in markdown.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scaling --models=mlp", "--models does not go with --scaling"),
        ("--scaling --in_turn", "--in_turn does not go with --scaling"),
        ("--scaling --steps=3", "--steps does not go with --scaling"),
        ("--scaling --tuners", "--tuners does not go with --scaling"),
        ("--scaling --hardware=gpu", "--hardware=gpu does not go with --scaling"),
        ("--model_parameters=7", "--model_parameters needs --scaling"),
        ("--scaling --micro_batch_seconds=0", "micro_batch_seconds"),
    ],
)
def test_flags_are_refused_in_one_line(arguments, message):
    done = run(BENCHMARK, *arguments.split(), timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert message in line
