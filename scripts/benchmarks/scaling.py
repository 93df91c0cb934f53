"""`benchmark.py --scaling`: what an update would take on many replicas. Nothing is measured.

Each replica computes its micro-batches, and exchanges the sum of their gradients, once. That is an
all-reduce in a ring, in buckets of which one waits for the other. It begins while the backward pass
of the last micro-batch runs, so part of it is hidden behind computing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import Table

MIB = 2**20
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)

# What is enough for the count of replicas up to which training scales.
ENOUGH = 0.9

# Of a micro-batch, about so much is its backward pass: two products for each of the forward pass.
_BACKWARD = 2 / 3


@dataclasses.dataclass(frozen=True)
class Network:
    """A link from each replica to the next in the ring.

    Attributes:
        name: How tables call it.
        bits_per_second: Of one direction.
        latency: Seconds that a message takes besides its bytes, software included.
    """

    name: str
    bits_per_second: float
    latency: float


# The latencies are assumed: of Ethernet and gRPC, and of remote direct memory access.
NETWORKS = (
    Network("100 Mbit/s", 1e8, 200e-6),
    Network("1 Gbit/s", 1e9, 100e-6),
    Network("10 Gbit/s", 1e10, 50e-6),
    Network("100 Gbit/s", 1e11, 10e-6),
    Network("400 Gbit/s", 4e11, 5e-6),
)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a replica computes and exchanges.

    Attributes:
        parameters: Of the model.
        micro_batch_seconds: Computing a micro-batch, forward and backward.
        bytes_of_gradient: Of one number, as it is exchanged.
        bucket_bytes: As the option `exchange_bucket_bytes`.
        small_exchanges: Of a few numbers: with `exchange_dtype`, before and after the buckets.
        is_overlapped: Whether buckets are sent during the last backward pass. Not where XLA
            compiles the step.
    """

    parameters: int
    micro_batch_seconds: float
    bytes_of_gradient: int = 4
    bucket_bytes: int = 32 * MIB
    small_exchanges: int = 0
    is_overlapped: bool = True

    @property
    def buckets(self) -> int:
        """Buckets of an exchange, if tensors fill them."""
        return math.ceil(self.parameters * self.bytes_of_gradient / self.bucket_bytes)

    def exchange_seconds(self, replicas: int, network: Network) -> float:
        """Time of an exchange.

        In a ring of n, a bucket takes 2 (n - 1) steps. In each, every replica sends a part of 1 / n
        of it.
        """
        steps = 2 * (replicas - 1)
        part = self.parameters * self.bytes_of_gradient / replicas
        messages = self.buckets + self.small_exchanges
        return steps * (8 * part / network.bits_per_second + messages * network.latency)

    def update_seconds(self, replicas: int, network: Network, k: int) -> float:
        """Time of an update with `k` micro-batches on each replica."""
        exchange = self.exchange_seconds(replicas, network)
        if self.is_overlapped:
            # The last bucket is complete when the pass is over.
            most = exchange * (1 - 1 / self.buckets)
            exchange -= min(_BACKWARD * self.micro_batch_seconds, most)
        return k * self.micro_batch_seconds + exchange

    def efficiency(self, replicas: int, network: Network, k: int) -> float:
        """Samples per second of a replica, compared with one that exchanges nothing."""
        return k * self.micro_batch_seconds / self.update_seconds(replicas, network, k)

    def micro_batches_for(self, efficiency: float, replicas: int, network: Network) -> int:
        """The least number of micro-batches with which training is that efficient."""
        compute = self.update_seconds(replicas, network, 0) * efficiency / (1 - efficiency)
        # Rounding errors must not add one.
        return max(1, math.ceil(compute / self.micro_batch_seconds - 1e-9))


def rows(training: Training, counts: Sequence[int]) -> list[dict[str, Any]]:
    """What --json holds: each network with each number of micro-batches.

    Args:
        training: What is computed and exchanged.
        counts: Micro-batches per update and replica.
    """
    return [
        {
            "network": network.name,
            "gradient_accumulation_steps": k,
            "update_seconds": {n: training.update_seconds(n, network, k) for n in COUNTS},
            "efficiency": {n: training.efficiency(n, network, k) for n in COUNTS},
        }
        for network in NETWORKS
        for k in counts
    ]


def remedies(training: Training) -> list[dict[str, Any]]:
    """How many micro-batches make training efficient, as it is and with what helps."""
    half, large = {"bytes_of_gradient": 2, "small_exchanges": 2}, {"bucket_bytes": 512 * MIB}
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "exchange_dtype": half,
        "buckets of 512 MiB": large,
        "both": half | large,
        "without overlap": {"is_overlapped": False},
    }
    return [
        {
            "network": network.name,
            "change": name,
            "micro_batches": {
                n: dataclasses.replace(training, **change).micro_batches_for(ENOUGH, n, network)
                for n in COUNTS
                if n > 1
            },
        }
        for network in NETWORKS
        for name, change in changes.items()
    ]


def tables(training: Training, counts: Sequence[int]) -> list[Table]:
    """The efficiency, and the micro-batches that are needed, by the number of replicas."""
    about = (
        f"{training.parameters:,} parameters, micro-batches of "
        f"{training.micro_batch_seconds:g} s, {training.buckets} buckets"
    )
    efficiencies = [
        (
            row["network"],
            str(row["gradient_accumulation_steps"]),
            *(f"{value:.2f}" for value in row["efficiency"].values()),
        )
        for row in rows(training, counts)
    ]
    needed = [
        (row["network"], row["change"], *map(str, row["micro_batches"].values()))
        for row in remedies(training)
    ]
    return [
        Table(
            f"Efficiency by the number of replicas, on paper: {about}",
            ("network", "K", *map(str, COUNTS)),
            efficiencies,
        ),
        Table(
            f"K for an efficiency of {ENOUGH:g} by the number of replicas, on paper",
            ("network", "change", *(str(n) for n in COUNTS if n > 1)),
            needed,
        ),
    ]


def show(tables: Sequence[Table]) -> None:
    """Prints tables."""
    for table in tables:
        print(f"\n{table.title}")
        for first, second, *cells in (table.heads, *table.lines):
            print(f"{first:<12}{second:<20}" + "".join(f"{cell:>8}" for cell in cells))
