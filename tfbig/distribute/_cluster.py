"""Finds the other workers of a job, and waits until they are up."""

import collections
import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver as _slurm

from tfbig import errors
from tfbig.distribute import _kubernetes

__all__ = ("Cluster", "find", "wait_for_workers")

# On a node.
_PORTS_OF_A_JOB = 16


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A job of several tasks, one of which is this process.

    Attributes:
        addresses: Job name ("chief" or "worker") -> addresses "host:port" of its tasks.
        task_type: The job of this process.
        task_index: Which task of the job this process is.
        source: Where the description comes from, such as "TF_CONFIG".
    """

    addresses: dict[str, list[str]]
    task_type: str
    task_index: int
    source: str

    @property
    def tasks(self) -> list[tuple[str, str]]:
        """Pairs of a task's name and address, the chief first."""
        return [
            (f"{job} {i}", address)
            for job in ("chief", "worker")
            for i, address in enumerate(self.addresses.get(job, ()))
        ]

    @property
    def own_task(self) -> str:
        """The name of this process."""
        return f"{self.task_type} {self.task_index}"

    def resolver(self) -> tf.distribute.cluster_resolver.ClusterResolver:
        """Returns the `tf.distribute` resolver of this cluster."""
        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(self.addresses),
            task_type=self.task_type,
            task_id=self.task_index,
            num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
            rpc_layer="grpc",
        )


def find(port: int | None = None) -> Cluster | None:
    """Returns the `Cluster` that the environment variables describe, or None.

    `tfbig.launch` sets TF_CONFIG, `srun` SLURM's variables, and a manifest such as
    scripts/jobset.yaml those of a Kubernetes Job.

    Args:
        port: The first port of each node under SLURM, by default derived from the job's number; or
            the port of each pod on Kubernetes.

    Raises:
        ClusterError: If the description is invalid.
    """
    if os.environ.get("TF_CONFIG", "").strip():
        return _from_tf_config(os.environ["TF_CONFIG"])
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm(port)
    if found := _kubernetes.workers(port):
        addresses, index = found
        return Cluster({"worker": addresses}, "worker", index, "Kubernetes")
    return None


_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


def _tf_config_error(rule: str, received: object) -> errors.ClusterError:
    return errors.ClusterError(
        f"TF_CONFIG must {rule}. Received: {received}. Example: TF_CONFIG='{_EXAMPLE}'"
    )


def _require(condition: bool, rule: str, received: object) -> None:
    if not condition:
        raise _tf_config_error(rule, received)


def _from_tf_config(text: str) -> Cluster | None:
    try:
        config = json.loads(text)
    except ValueError as e:
        raise _tf_config_error(f"be valid JSON ({e})", text[:200]) from e
    _require(isinstance(config, dict), "be a JSON object", text[:200])
    jobs = config.get("cluster") or {}
    if not jobs:
        return None
    _check_jobs(jobs)
    job, index = _checked_task(config.get("task"), jobs)
    return Cluster(jobs, job, index, "TF_CONFIG")


# `Any`: TF_CONFIG is JSON that users write, and may hold anything.
def _check_jobs(jobs: Any) -> None:
    _require(isinstance(jobs, dict), "hold an object as `cluster`", jobs)
    for job, addresses in jobs.items():
        _require(
            job in ("chief", "worker"),
            "only have the jobs `chief` and `worker`: tfbig trains without parameter servers "
            "(ps), and evaluates inside `fit` (evaluator)",
            f"a job {job!r}",
        )
        _require(
            isinstance(addresses, list) and all(map(_is_address, addresses)),
            "list the addresses of a job as strings 'host:port'",
            addresses,
        )
    _require(len(jobs.get("chief", [])) <= 1, "have at most one chief", jobs.get("chief"))
    counts = collections.Counter(a for addresses in jobs.values() for a in addresses)
    repeated = [a for a, count in counts.items() if count > 1]
    _require(not repeated, "give every task its own address", f"{repeated} more than once")


def _checked_task(task: Any, jobs: dict[str, list[str]]) -> tuple[str, int]:
    """Returns the job and the index of this process."""
    _require(isinstance(task, dict), "hold an object as `task`", task)
    job, index = task.get("type"), task.get("index")
    _require(
        isinstance(job, str) and job in jobs,
        f"have a task type that is a job of the cluster ({sorted(jobs)})",
        f"type {job!r}",
    )
    # Kubernetes templates turn numbers into strings.
    is_number = isinstance(index, int | str) and str(index).isdecimal()
    _require(
        is_number and int(index) < len(jobs[job]),
        f"have a task index from 0 to {len(jobs[job]) - 1}, because job {job!r} has "
        f"{len(jobs[job])} tasks",
        f"index {index!r}",
    )
    return job, int(index)


def _is_address(text: object) -> bool:
    match = re.fullmatch(r".+:(\d{1,5})", text) if isinstance(text, str) else None
    return match is not None and 0 < int(match[1]) < 2**16


def _from_slurm(port: int | None) -> Cluster:
    # TensorFlow's SlurmClusterResolver does not fit: it sorts nodes by name, node10 before node9,
    # but SLURM numbers tasks in the order of its own list. It also calls nvidia-smi.
    try:
        rank, count = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS"))
        nodes = _slurm.expand_hostlist(os.environ["SLURM_STEP_NODELIST"])
        tasks = _slurm.expand_tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        job, step = (int(os.environ.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "STEP_ID"))
        base = port or _first_port(job, step)
        if len(nodes) != len(tasks) or sum(tasks) != count or not 0 <= rank < count:
            raise ValueError(
                f"task {rank} of {count} does not fit the nodes {nodes} with {tasks} tasks"
            )
    except (KeyError, ValueError) as e:
        problem = f"{e.args[0]} is missing" if isinstance(e, KeyError) else e
        raise errors.ClusterError(
            f"SLURM's variables do not describe the job: {problem}. Start the program with srun."
        ) from None
    node_of = [node for node, number in zip(nodes, tasks, strict=True) for _ in range(number)]
    this_node = os.environ.get("SLURMD_NODENAME", node_of[rank])
    if this_node != node_of[rank]:
        raise errors.ClusterError(
            f"SLURM must number the tasks node by node. Received: task {rank} on {this_node}, not "
            f"on {node_of[rank]}. Start the program with srun --distribution=block."
        )
    ports = [base + i for number in tasks for i in range(number)]
    addresses = [f"{node}:{p}" for node, p in zip(node_of, ports, strict=True)]
    return Cluster({"worker": addresses}, "worker", rank, "SLURM")


def _first_port(job: int, step: int) -> int:
    """The port of the first task of a node, which jobs and steps of one node must not share.

    There is room for so many tasks of a node that jobs of consecutive numbers do not meet.
    """
    slots = 20_000 // _PORTS_OF_A_JOB
    return 10_000 + (job + 101 * step) % slots * _PORTS_OF_A_JOB


def wait_for_workers(cluster: Cluster, timeout: float) -> None:
    """Returns when every worker of the job listens at its address.

    Without this, TensorFlow's chief waits forever for a worker that never starts.

    Args:
        cluster: The job.
        timeout: Seconds to wait.

    Raises:
        ClusterError: If this process cannot listen at its own address.
        WorkerUnavailableError: If a worker is not up in time.
    """
    missing = dict(cluster.tasks)
    own = missing.pop(cluster.own_task)
    deadline = time.monotonic() + timeout
    with _listening(own, cluster.own_task):
        while missing and time.monotonic() < deadline:
            for name, address in list(missing.items()):
                # If a machine does not answer, each attempt takes all of its time.
                left = max(0.01, min(1.0, deadline - time.monotonic()))
                host, port = address.rsplit(":", 1)
                # UnicodeError: part of the host name is too long. OverflowError: the port is.
                with contextlib.suppress(OSError, UnicodeError, OverflowError):
                    socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
                    del missing[name]
            time.sleep(0.1 if missing else 0)
    if missing:
        listed = ", ".join(f"{name} at {address}" for name, address in missing.items())
        raise errors.WorkerUnavailableError(
            f"{listed} did not start within {timeout:g} s; {cluster.own_task} gives up. Check "
            "that it was started, and that its address and the firewall are right. "
            "`get_strategy(timeout=...)` sets the time to wait."
        )


@contextlib.contextmanager
def _listening(address: str, task: str) -> Iterator[None]:
    """Listens at an address until TensorFlow's server takes over."""
    port = int(address.rsplit(":", 1)[1])
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=1024,
        )
    except (OSError, OverflowError) as e:
        raise errors.ClusterError(
            f"{task} cannot listen at its address. Received: {address} ({e}). Another program "
            "may be using the port, perhaps a worker of an earlier run."
        ) from None
    with server:
        yield
