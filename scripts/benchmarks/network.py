"""`benchmark.py --network`: one exchange per update against one per micro-batch.

Hosts are made of this one, each a network namespace with an address of its own. A cable, which is a
pair of virtual interfaces, joins each to a switch, and carries so many bits a second in either
direction. Each host runs one worker. What it sends is read from the counter of its interface, so
that it includes the headers of all protocols, acknowledgements and whatever else the workers tell
each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks import models
from benchmarks.markdown import Table

if TYPE_CHECKING:
    import keras
    import numpy as np

INTERFACE = "narrow0"
MOST_HOSTS = 64
SETTLE = 0.5  # Seconds, longer than the latency of the limit.

EXCHANGES = "exchange per micro-batch"
TFBIG = "tfbig"
ROWS = (EXCHANGES, TFBIG)


class UnavailableError(Exception):
    """Hosts cannot be made here."""


# --- Hosts ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts around a switch.

    Attributes:
        hosts: How many, at most `MOST_HOSTS`.
        megabits: That each cable carries in a second, in either direction.
    """

    hosts: int = 2
    megabits: int = 100

    @property
    def addresses(self) -> list[str]:
        """Of the hosts; reserved for documentation, and in these namespaces only."""
        return [f"192.0.2.{i + 1}" for i in range(self.hosts)]

    @property
    def limit(self) -> str:
        """Of each end of a cable, as `tc` takes it."""
        # What is sent at once must be more where there is less time between two timers.
        return f"rate {self.megabits}mbit burst {max(32, self.megabits // 3)}kbit latency 400ms"


def _configure(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UnavailableError(f"`{command}` does not work here: {reason}")


@contextlib.contextmanager
def _made(cluster: Cluster) -> Iterator[list[str]]:
    """Makes the hosts, yields the names of their namespaces, and removes them."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise UnavailableError(f"there is no `{program}` (iproute2, on Linux)")
    # Two benchmarks may run at the same time.
    switch, *names = [f"tfbig-{os.getpid()}-{i}" for i in range(cluster.hosts + 1)]
    try:
        for name in (switch, *names):
            _configure(f"ip netns add {name}")
        _configure(f"ip -n {switch} link add bridge type bridge")
        _configure(f"ip -n {switch} link set bridge up")
        for i, (name, address) in enumerate(zip(names, cluster.addresses, strict=True)):
            port = f"port{i}"
            _configure(
                f"ip -n {name} link add {INTERFACE} type veth peer name {port} netns {switch}"
            )
            _configure(f"ip -n {switch} link set {port} master bridge")
            _configure(f"ip -n {name} address add {address}/24 dev {INTERFACE}")
            for namespace, interface in ((name, INTERFACE), (switch, port)):
                _configure(f"ip -n {namespace} link set {interface} up")
                _configure(f"tc -n {namespace} qdisc add dev {interface} root tbf {cluster.limit}")
            _configure(f"ip -n {name} link set lo up")
        yield names
    finally:
        # A second Ctrl-C must not leave a namespace behind. What follows is short.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for name in (*names, switch):
            # An interface goes with its namespace, and its peer with it.
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _config(cluster: Cluster, index: int) -> str:
    addresses = [f"{address}:2222" for address in cluster.addresses]
    return json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    )


def _run_workers(cluster: Cluster, command: list[str]) -> list[Any]:
    """Runs a command in all hosts, with a file for what it measured as the last argument.

    Returns:
        What the workers measured, in their order.
    """
    # `kill` and `timeout` send it. As an exception it removes the hosts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers: list[tuple[subprocess.Popen[Any], Any]] = []
        for i, name in enumerate(stack.enter_context(_made(cluster))):
            errors = stack.enter_context((directory / f"{i}.err").open("w+"))
            worker = subprocess.Popen(
                ["ip", "netns", "exec", name, *command, str(directory / f"{i}.json")],
                env=os.environ | {"TF_CONFIG": _config(cluster, i)},
                # The first worker says which row it measures.
                stdout=subprocess.DEVNULL if i else sys.stderr,
                stderr=errors,
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers.append((worker, errors))
        while any(worker.poll() is None for worker, _ in workers):
            # A worker that has failed leaves the others waiting.
            if any(worker.poll() for worker, _ in workers):
                break
            time.sleep(0.1)
        for i, (worker, errors) in enumerate(workers):
            if worker.returncode:
                errors.seek(0)
                lines = errors.read().strip().splitlines()
                reason = lines[-1] if lines else f"exit code {worker.returncode}"
                raise RuntimeError(f"worker {i}: {reason}")
        return [
            json.loads((directory / f"{i}.json").read_text(encoding="utf-8"))
            for i in range(len(workers))
        ]


# --- One worker, in its own process ------------------------------------------


def _model(row: str, k: int, inputs: keras.KerasTensor, outputs: keras.KerasTensor) -> keras.Model:
    import tensorflow as tf

    import tfbig

    # It uses the `fit` of tfbig, since Keras's own rejects the batches of several workers.
    class ExchangePerMicroBatch(tfbig.Model):
        def train_step(self, data: Any) -> dict[str, Any]:
            """One update that all-reduces the gradient of each micro-batch."""
            micro_batches = list(zip(*(tf.split(part, k) for part in data), strict=True))
            total = None
            for i, (x, y) in enumerate(micro_batches):
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y, self(x, training=True)) / k
                gradients = tape.gradient(loss, [v.value for v in self.trainable_variables])
                # Keras's optimizer sums over the replicas whatever it is given. That is the
                # exchange of the last micro-batch, and the reason why the others are means.
                if i < k - 1:
                    gradients = tf.distribute.get_replica_context().all_reduce("MEAN", gradients)
                total = gradients if total is None else list(map(tf.add, total, gradients))
            self.optimizer.apply(total, self.trainable_variables)
            return {"loss": loss}

    if row == TFBIG:
        return tfbig.Model(inputs, outputs, gradient_accumulation_steps=k)
    return ExchangePerMicroBatch(inputs, outputs)


def _sent() -> int:
    """Bytes that this host has sent."""
    path = pathlib.Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
    return int(path.read_text())


def _fit(model: keras.Model, x: np.ndarray, y: np.ndarray, batch_size: int) -> dict[str, Any]:
    """Seconds of each update but the first, and bytes sent during them."""
    import keras

    sent: list[int] = []
    begins: list[float] = []
    ends: list[float] = []

    def on_end(batch: int, logs: Any) -> None:
        ends.append(time.perf_counter())
        if batch in (0, last):
            # After the update, some of what this worker sent may still wait for the link.
            time.sleep(SETTLE)
            sent.append(_sent())

    last = len(x) // batch_size - 1
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: begins.append(time.perf_counter()),
        on_train_batch_end=on_end,
    )
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[callback])
    seconds = [end - begin for begin, end in zip(begins[1:], ends[1:], strict=True)]
    return {"seconds": seconds, "bytes": sent[-1] - sent[0]}


def measure(
    counts: list[int], micro_batch_size: int, steps: int, runs: int
) -> list[dict[str, Any]]:
    """Runs each row with each number of micro-batches on this worker.

    Args:
        counts: Micro-batches per update.
        micro_batch_size: Samples per replica and micro-batch.
        steps: Updates measured in a run.
        runs: How often each row is measured, the rows in turn.

    Returns:
        Each row with what was measured.
    """
    import keras
    import numpy as np

    import tfbig

    strategy = tfbig.distribute.get_strategy("multi_worker", timeout=60)
    replicas = strategy.num_replicas_in_sync
    rows = []
    for k in counts:
        batch = replicas * micro_batch_size * k
        x, y = models.data("mlp", batch * (steps + 1))
        for name in ROWS:
            # Every row begins with the same weights.
            keras.utils.set_random_seed(0)
            with strategy.scope():
                model = _model(name, k, *models.mlp())
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
            print(f"warm-up: K={k}, {name}", flush=True)
            _fit(model, x[:batch], y[:batch], batch)
            row = {"gradient_accumulation_steps": k, "row": name, "effective_batch": batch}
            rows.append((row | {"runs": []}, model, x, y))
        one, other = (model.get_weights() for _, model, _, _ in rows[-len(ROWS) :])
        deviation = max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))
        # Rounding in float32; an update changes weights by up to 1e-2.
        if deviation > 1e-6:
            raise RuntimeError(f"the rows are not the same update: they differ by {deviation:.1e}")
    for i, (row, model, x, y) in itertools.product(range(runs), rows):
        k, name = row["gradient_accumulation_steps"], row["row"]
        print(f"run {i + 1}/{runs}: K={k}, {name}", flush=True)
        row["runs"].append(_fit(model, x, y, row["effective_batch"]))
    return [row for row, *_ in rows]


# --- All rows ----------------------------------------------------------------


def summaries(workers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all workers as one list, with rates and ratios.

    Bytes and samples are those of all hosts.
    """
    rows = []
    for own in zip(*workers, strict=True):
        row = dict(own[0])
        batch = row["effective_batch"]
        rates = [batch / statistics.median(run["seconds"]) for run in row["runs"]]
        row["samples_per_second"] = statistics.median(rates)
        row["samples_per_second_min"], row["samples_per_second_max"] = min(rates), max(rates)
        updates = sum(len(run["seconds"]) for run in row["runs"])
        sent = sum(run["bytes"] for worker in own for run in worker["runs"])
        row["bytes_per_sample"] = sent / (updates * batch)
        row["runs"] = [worker["runs"] for worker in own]
        rows.append(row)
    key = "gradient_accumulation_steps"
    bases = {row[key]: row for row in rows if row["row"] == EXCHANGES}
    for row in rows:
        for name in ("samples_per_second", "bytes_per_sample"):
            row[f"{name}_ratio"] = row[name] / bases[row[key]][name]
    return rows


def compare(
    cluster: Cluster,
    program: str,
    counts: list[int],
    micro_batch_size: int,
    steps: int,
    runs: int,
) -> list[dict[str, Any]]:
    """Measures every row on all hosts, prints the table and returns its rows.

    Args:
        cluster: The hosts.
        program: Path of the program that calls `measure` in each host.
        counts: Micro-batches per update.
        micro_batch_size: Samples per worker and micro-batch.
        steps: Updates measured in a run.
        runs: How often each row is measured.
    """
    settings = [
        f"--gradient_accumulation_steps={','.join(map(str, counts))}",
        f"--micro_batch_size={micro_batch_size}",
        f"--steps={steps}",
        f"--runs={runs}",
    ]
    rows = summaries(
        _run_workers(cluster, [sys.executable, program, "--network", *settings, "--row"])
    )
    print(
        f"micro-batch {micro_batch_size} on each of {cluster.hosts} workers, {runs} runs of "
        f"{steps} updates each; ratios to '{EXCHANGES}'\n"
    )
    _print_table(rows)
    return rows


_HEADS = ("K", "row", "samples/s", "min-max", "ratio", "bytes/sample", "ratio")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["samples_per_second_min"], row["samples_per_second_max"]
    return (
        str(row["gradient_accumulation_steps"]),
        row["row"],
        f"{row['samples_per_second']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row['samples_per_second_ratio']:.2f}",
        f"{row['bytes_per_sample']:.0f}",
        f"{row['bytes_per_sample_ratio']:.3f}",
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = "{:>4}  {:<24} {:>9} {:>15} {:>6} {:>12} {:>6}"
    for cells in (_HEADS, *map(_cells, rows)):
        print(columns.format(*cells))


def table(cluster: Cluster, rows: list[dict[str, Any]]) -> Table:
    """What `compare` has returned."""
    title = f"Medians, {cluster.hosts} workers, {cluster.megabits} Mbit/s; ratios to '{EXCHANGES}'"
    return Table(title, _HEADS, [_cells(row) for row in rows])
